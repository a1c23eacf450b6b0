"""The drawn parameters: distribution against torchvision's own transforms, and reproducibility."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from densecl_ext.data import Augmentation
from densecl_ext.data.augmentation import draw_batch, draw_parameters, epoch_order

DRAWS = 4000
WIDTH, HEIGHT = 200, 150


def kolmogorov_smirnov(first, second) -> float:
    """Two-sample statistic, scaled: above 1.95 once in a thousand times where both are one law."""
    first, second = np.sort(first), np.sort(second)
    steps = np.concatenate([first, second])
    gap = np.searchsorted(first, steps, "right") / len(first)
    gap = gap - np.searchsorted(second, steps, "right") / len(second)
    return np.abs(gap).max() * math.sqrt(len(first) * len(second) / (len(first) + len(second)))


def draw(sample=0, *, seed=0, epoch=0, view=0, width=WIDTH, height=HEIGHT, **changes):
    return draw_parameters(
        Augmentation(**changes),
        seed=seed,
        epoch=epoch,
        sample=sample,
        view=view,
        width=width,
        height=height,
    )


@pytest.fixture(scope="module")
def drawn():
    return [draw(sample) for sample in range(DRAWS)]


def test_crops_follow_torchvision(drawn):
    torch = pytest.importorskip("torch")
    transforms = pytest.importorskip("torchvision.transforms")
    torch.manual_seed(0)
    image = torch.empty(3, HEIGHT, WIDTH)
    theirs = np.array(
        [
            transforms.RandomResizedCrop.get_params(image, [0.2, 1.0], [3 / 4, 4 / 3])
            for _ in range(DRAWS)
        ]
    )
    top, left, height, width = theirs.T
    x0, y0, x1, y1 = np.array([parameters.box for parameters in drawn]).T
    for ours, their in (
        ((x1 - x0) * (y1 - y0), height * width),
        ((x1 - x0) / (y1 - y0), width / height),
        (x0, left),
        (y0, top),
    ):
        assert kolmogorov_smirnov(ours, their) < 1.95
    # The statistic would notice a wrong law: another scale, another ratio.
    other = [draw(sample, scale=(0.3, 1.0)).box for sample in range(DRAWS)]
    area = [(box[2] - box[0]) * (box[3] - box[1]) for box in other]
    assert kolmogorov_smirnov(area, height * width) > 1.95


def test_colour_factors_follow_torchvision(drawn):
    torch = pytest.importorskip("torch")
    transforms = pytest.importorskip("torchvision.transforms")
    torch.manual_seed(0)
    jitter = transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)
    theirs = [
        jitter.get_params(jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
        for _ in range(DRAWS)
    ]
    ours = [parameters for parameters in drawn if parameters.order]
    for column, name in enumerate(("brightness", "contrast", "saturation", "hue"), start=1):
        values = [getattr(parameters, name) for parameters in ours]
        assert kolmogorov_smirnov(values, [their[column] for their in theirs]) < 1.95
    # ln 24 orders equally often: Pearson's statistic has mean 23 and exceeds 50 once in a thousand.
    counts = Counter(parameters.order for parameters in ours)
    assert set(counts) == set(itertools.permutations(range(4)))
    expected = len(ours) / 24
    assert sum((count - expected) ** 2 for count in counts.values()) / expected < 50


def test_rates_and_blur(drawn):
    rates = {
        "flip": (np.mean([parameters.flip for parameters in drawn]), 0.5),
        "gray": (np.mean([parameters.gray for parameters in drawn]), 0.2),
        "jitter": (np.mean([bool(parameters.order) for parameters in drawn]), 0.8),
        "blur": (np.mean([parameters.blur_sigma > 0 for parameters in drawn]), 0.5),
    }
    for name, (rate, probability) in rates.items():
        error = math.sqrt(probability * (1 - probability) / DRAWS)
        assert abs(rate - probability) < 3.3 * error, name
    sigmas = [parameters.blur_sigma for parameters in drawn if parameters.blur_sigma > 0]
    assert kolmogorov_smirnov(sigmas, np.linspace(0.1, 2.0, 20_000)) < 1.95


def test_choices_do_not_depend_on_each_other(drawn):
    columns = np.array(
        [(p.flip, p.gray, bool(p.order), p.blur_sigma, p.box[0], *p[3:7]) for p in drawn],
        dtype=float,
    )
    correlation = np.corrcoef(columns.T) - np.eye(columns.shape[1])
    assert np.abs(correlation).max() < 4 / math.sqrt(DRAWS)


def test_a_draw_depends_on_its_address_alone():
    address = {"sample": 5, "seed": 7, "epoch": 3, "view": 1}
    reference = draw(**address)
    draw(6), draw(7)
    assert draw(**address) == reference
    for name in address:
        assert draw(**{**address, name: address[name] - 1}) != reference, name


def test_a_batch_is_drawn_as_its_samples_are():
    sizes = np.random.default_rng(0).integers(4, 300, (2000, 2))
    sizes[0], sizes[1] = (300, 5), (4, 200)  # no attempt fits
    samples = range(7, 2007)
    for augmentation in (Augmentation(), Augmentation(hue=0.0, flip_probability=1.0)):
        many = draw_batch(augmentation, seed=7, epoch=2, samples=samples, sizes=sizes)
        addresses = itertools.product((0, 1), zip(samples, sizes.tolist(), strict=True))
        for row, (view, (sample, (width, height))) in enumerate(addresses):
            box, flip, order, factors, gray, sigma = (column[row].tolist() for column in many)
            applied = tuple(operation for operation in order if operation >= 0)
            assert (tuple(box), flip, applied, *factors, gray, sigma) == draw_parameters(
                augmentation, seed=7, epoch=2, sample=sample, view=view, width=width, height=height
            )


def test_orders_are_permutations_that_change():
    order = epoch_order(3, 5, 1000)
    assert sorted(order.tolist()) == list(range(1000))
    assert np.array_equal(order, epoch_order(3, 5, 1000))
    assert not np.array_equal(order, epoch_order(3, 6, 1000))
    assert not np.array_equal(order, epoch_order(4, 5, 1000))


@settings(max_examples=200, deadline=None)
@given(
    width=st.integers(1, 3000),
    height=st.integers(1, 3000),
    sample=st.integers(0, 2**40),
    seed=st.integers(0, 2**63),
)
def test_boxes_lie_inside_images_of_any_size(width, height, sample, seed):
    x0, y0, x1, y1 = draw(sample, seed=seed, width=width, height=height).box
    assert 0 <= x0 < x1 <= width
    assert 0 <= y0 < y1 <= height


def test_a_long_image_gives_its_largest_central_box():
    assert draw(width=1000, height=30, scale=(0.9, 1.0)).box == (480, 0, 520, 30)
    assert draw(width=30, height=1000, scale=(0.9, 1.0)).box == (0, 480, 30, 520)


def test_switched_off_operations_change_nothing():
    off = dict(jitter_probability=0, gray_probability=0, blur_probability=0, flip_probability=0)
    for sample in range(50):
        parameters = draw(sample, **off)
        assert parameters[1:] == (False, (), 1.0, 1.0, 1.0, 0.0, False, 0.0)


@pytest.mark.parametrize(
    "changes",
    [
        {"scale": (0.0, 1.0)},
        {"scale": (0.5, 1.5)},
        {"ratio": (2.0, 1.0)},
        {"blur_sigma": (1.0,)},
        {"brightness": -0.1},
        {"hue": 0.6},
        {"flip_probability": 1.5},
        {"std": (0.2, 0.0, 0.2)},
    ],
)
def test_values_out_of_range_are_named(changes):
    with pytest.raises(ValueError, match=f"Augmentation: {next(iter(changes))}"):
        Augmentation(**changes)


def test_lists_from_a_recipe_compare_equal():
    assert Augmentation(scale=[0.2, 1]) == Augmentation()
    assert hash(Augmentation(scale=[0.2, 1])) == hash(Augmentation())
