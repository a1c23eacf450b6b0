"""The loaders' views against each other and against torchvision's own random transforms.

All loaders share their draws, so every operation can be compared pixel by pixel on its own; the
distribution of what comes out is compared with MoCo v2's pipeline built from torchvision's classes,
which draw for themselves. Set DENSECL_TEST_PHOTOS to a folder to run this on photographs.
"""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transforms = pytest.importorskip("torchvision.transforms")
pytest.importorskip("PIL")

from data_images import photo_folder  # noqa: E402
from PIL import Image, ImageFilter  # noqa: E402
from test_data_augmentation import kolmogorov_smirnov  # noqa: E402

from densecl_ext.data import Augmentation, build_loader, find_images  # noqa: E402
from densecl_ext.data.images import decode_rgb  # noqa: E402

SIZE = 48
IMAGES = 24
LEVELS = {"mean": (0.0, 0.0, 0.0), "std": (1 / 255, 1 / 255, 1 / 255)}
STILL = {
    "jitter_probability": 0.0,
    "gray_probability": 0.0,
    "blur_probability": 0.0,
    "flip_probability": 0.0,
}
# Colour jitter always, of the one kind that is added to this.
ALONE = {
    "jitter_probability": 1.0,
    "brightness": 0.0,
    "contrast": 0.0,
    "saturation": 0.0,
    "hue": 0.0,
}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return photo_folder(tmp_path_factory.mktemp("photos"), IMAGES)


def views(root, backend, *, epochs=1, size=SIZE, **changes):
    """Both views in levels of 0 to 255, (views, 3, size, size), and of which file each is."""
    augmentation = Augmentation(**{**LEVELS, **changes})
    collected, index = [], []
    with build_loader(
        root,
        batch_size=IMAGES,
        size=size,
        backend=backend,
        workers=1 if backend == "dali" else 0,
        augmentation=augmentation,
        cache_size=1000,  # what is reduced cannot be equal, see the test of that
    ) as loader:
        for epoch in range(epochs):
            loader.set_epoch(epoch)
            batch = next(iter(loader))
            collected += [batch.view_q, batch.view_k]
            index += [batch.index, batch.index]
    return torch.cat(collected), torch.cat(index)


# Allowed difference in levels of 255: the mean over all pixels, that of the worst view, and the
# shift of the whole. Hue's are Pillow's own: it goes through HSV in 8 bits and loses some colour.
@pytest.mark.parametrize(
    ("changes", "mean", "worst", "shift"),
    [
        pytest.param({}, 0.25, 0.4, 0.03, id="crop"),
        pytest.param({"flip_probability": 1.0}, 0.25, 0.4, 0.03, id="flip"),
        pytest.param({**ALONE, "brightness": 0.4}, 0.25, 0.4, 0.03, id="brightness"),
        pytest.param({**ALONE, "contrast": 0.4}, 0.25, 0.4, 0.03, id="contrast"),
        pytest.param({**ALONE, "saturation": 0.4}, 0.25, 0.4, 0.03, id="saturation"),
        pytest.param({**ALONE, "hue": 0.1}, 0.9, 1.6, 0.3, id="hue"),
        pytest.param({**ALONE, "hue": 0.5}, 0.9, 1.6, 0.3, id="any-hue"),
        pytest.param({"gray_probability": 1.0}, 0.25, 0.4, 0.03, id="gray"),
        pytest.param({"blur_probability": 1.0}, 0.8, 2.0, 0.03, id="blur"),
        pytest.param(
            {"jitter_probability": 0.8, "gray_probability": 0.2, "blur_probability": 0.5},
            0.9,
            2.5,
            0.3,
            id="all",
        ),
    ],
)
@pytest.mark.parametrize("backend", ["dali", "memory"])
def test_each_operation_gives_the_same_pixels(photos, backend, changes, mean, worst, shift):
    if backend == "dali":
        pytest.importorskip("nvidia.dali")
    changes = {**STILL, **changes}
    ours, theirs = (views(photos, one, **changes)[0] for one in (backend, "torchvision"))
    difference = (ours - theirs).abs().mean(dim=(1, 2, 3))
    assert difference.mean() < mean
    assert difference.max() < worst
    assert (ours - theirs).mean().abs() < shift
    if changes != STILL:
        # The bounds mean something only where the operation changes far more than they allow.
        unchanged, _ = views(photos, "torchvision", **STILL)
        assert (theirs - unchanged).abs().mean() > 3 * mean


def hue_angles(pixels):
    """The mean hue of each view, of its mean position on the chromaticity plane, in radians."""
    red, green, blue = pixels.mean((2, 3)).unbind(1)
    return torch.atan2(3**0.5 * (green - blue), 2 * red - green - blue)


def statistics(pixels, index, originals):
    """What each operation moves, one number a view: {name: (views,)}."""
    red, green, blue = pixels.unbind(1)
    high, low = pixels.amax(1), pixels.amin(1)
    chroma = high - low
    gray = 0.299 * red + 0.587 * green + 0.114 * blue
    edges = (gray[:, :, 1:] - gray[:, :, :-1]).abs().mean((1, 2))
    turned = hue_angles(pixels) - hue_angles(originals)[index]
    turned = torch.remainder(turned + torch.pi, 2 * torch.pi) - torch.pi
    return {
        "brightness": gray.mean((1, 2)),
        "contrast": gray.flatten(1).std(1),
        "saturation": (chroma / high.clamp(min=1)).mean((1, 2)),
        "hue": turned[chroma.mean((1, 2)) > 4],
        "sharpness": edges / gray.flatten(1).std(1).clamp(min=1),
        "grayscale": (chroma.amax((1, 2)) <= 1).float(),
    }


@pytest.fixture(scope="module")
def sources(photos):
    """The images behind the views; the loaders' one batch an epoch must hold each of them."""
    files = find_images(photos)
    if len(files) != IMAGES:
        pytest.skip(f"compares folders of {IMAGES} images")
    return [decode_rgb(path.read_bytes()) for path in files]


@pytest.fixture(scope="module")
def originals(sources):
    shrunk = [np.asarray(image.resize((SIZE, SIZE))) for image in sources]
    return torch.from_numpy(np.stack(shrunk)).permute(0, 3, 1, 2).float()


@pytest.fixture(scope="module")
def moco(sources, originals):
    """Statistics of the views that torchvision's own random transforms make."""
    torch.manual_seed(5)
    rng = np.random.default_rng(5)
    pipeline = transforms.Compose(
        [
            transforms.RandomResizedCrop(SIZE, scale=(0.2, 1.0)),
            transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            transforms.RandomGrayscale(p=0.2),
            transforms.RandomApply(
                [lambda view: view.filter(ImageFilter.GaussianBlur(rng.uniform(0.1, 2.0)))], p=0.5
            ),
            transforms.RandomHorizontalFlip(),
            transforms.PILToTensor(),
        ]
    )
    pixels = [pipeline(image) for image in sources for _ in range(40)]
    index = torch.arange(len(sources)).repeat_interleave(40)
    return statistics(torch.stack(pixels).float(), index, originals)


@pytest.mark.parametrize("backend", ["torchvision", "dali", "memory"])
def test_views_are_distributed_as_moco_v2_makes_them(photos, originals, moco, backend):
    if backend == "dali":
        pytest.importorskip("nvidia.dali")
    ours = statistics(*views(photos, backend, epochs=20), originals)
    for name, values in ours.items():
        if name == "grayscale":
            error = (0.2 * 0.8 * 2 / len(values)) ** 0.5
            assert abs(values.mean() - moco[name].mean()) < 3.3 * error, name
        else:
            statistic = kolmogorov_smirnov(values.numpy(), moco[name].numpy())
            assert statistic < 1.95, f"{name}: {statistic:.2f}"


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("brightness", {"brightness": 0.0}),
        ("saturation", {"saturation": 1.0}),
        ("hue", {"hue": 0.0}),
        ("sharpness", {"blur_probability": 0.0}),
        ("sharpness", {"scale": (0.02, 0.2)}),
    ],
)
def test_the_comparison_would_notice_another_augmentation(photos, originals, moco, name, changes):
    other = statistics(*views(photos, "torchvision", epochs=20, **changes), originals)
    assert kolmogorov_smirnov(other[name].numpy(), moco[name].numpy()) > 1.95


@pytest.mark.parametrize("backend", ["dali", "memory"])
def test_hard_edges_are_filtered_alike(tmp_path, backend):
    """The worst case of a filter: black and white, pixel by pixel."""
    if backend == "dali":
        pytest.importorskip("nvidia.dali")
    rng = np.random.default_rng(0)
    for number in range(IMAGES):
        pixels = 255 * rng.integers(0, 2, (150, 200), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number:02}.png")
    ours, theirs = (views(tmp_path, one, **STILL)[0] for one in (backend, "torchvision"))
    difference = (ours - theirs).abs()
    assert difference[:, :, 1:-1, 1:-1].max() < 1.5
    # At the edge of a crop DALI repeats the last pixel, where Pillow leaves out what is not there.
    assert difference.max() < (25 if backend == "dali" else 1.5)
    assert difference.mean() < 0.7
