"""The loader of images in memory: resampling for a GPU, reduced images, what it refuses."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("torchvision")
pytest.importorskip("PIL")

from data_images import encode, photo_folder, scene  # noqa: E402
from PIL import Image  # noqa: E402

from densecl_ext.data import Augmentation, build_loader  # noqa: E402
from densecl_ext.data.batch_augmentation import blur, resample  # noqa: E402

STILL = Augmentation(
    jitter_probability=0.0,
    gray_probability=0.0,
    blur_probability=0.0,
    mean=(0.0, 0.0, 0.0),
    std=(1 / 255, 1 / 255, 1 / 255),
)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return photo_folder(tmp_path_factory.mktemp("photos"), 12)


@pytest.mark.parametrize("size", [7, 32, 100])
def test_resample_is_pillows_filter_at_any_box_and_shape(size):
    rng = np.random.default_rng(0)
    images = [scene(number, 60 + 31 * number, 140 - 23 * number) for number in range(5)]
    arrays = [np.asarray(image) for image in images]
    starts = np.cumsum([0] + [array.size for array in arrays])[:-1]
    store = torch.from_numpy(np.concatenate([array.reshape(-1) for array in arrays]))
    which, boxes = [], []
    for number in list(range(5)) * 6:
        width, height = images[number].size
        x0, y0 = rng.uniform(0, width - 4), rng.uniform(0, height - 4)
        which.append(number)
        boxes.append([x0, y0, rng.uniform(x0 + 3, width), rng.uniform(y0 + 3, height)])
    boxes[:5] = [[0, 0, *image.size] for image in images]
    which[:5] = range(5)
    widths = np.array([images[number].width for number in which])

    made = resample(store, starts[which], widths, np.array(boxes), size)

    assert made.dtype == torch.uint8 and made.shape == (30, 3, size, size)
    for number, box, view in zip(which, boxes, made, strict=True):
        left, top = int(box[0]), int(box[1])
        part = images[number].crop((left, top, int(np.ceil(box[2])), int(np.ceil(box[3]))))
        inner = (box[0] - left, box[1] - top, box[2] - left, box[3] - top)
        expected = np.asarray(part.resize((size, size), Image.BILINEAR, box=inner)).astype(int)
        assert np.abs(view.permute(1, 2, 0).numpy().astype(int) - expected).max() <= 1


def test_blur_is_a_gaussian_at_each_views_width():
    torch.manual_seed(0)
    pixels = 255 * torch.rand(3, 3, 20, 20)
    sigmas = [0.2, 1.0, 2.0]
    made = blur(pixels, torch.tensor(sigmas).reshape(-1, 1, 1, 1)) - 0.5
    reach = np.arange(-60, 61)
    for view, sigma, ours in zip(pixels.double().numpy(), sigmas, made.numpy(), strict=True):
        kernel = np.exp(-0.5 * (reach / sigma) ** 2)
        kernel /= kernel.sum()
        wide = np.pad(view, ((0, 0), (60, 60), (60, 60)), mode="edge")
        for axis in (1, 2):
            wide = np.apply_along_axis(np.convolve, axis, wide, kernel, mode="same")
        assert np.abs(wide[:, 60:-60, 60:-60] - ours).max() < 0.7  # what lies beyond the kernel


def views(root, backend, **changes):
    settings = {"batch_size": 12, "size": 32, "workers": 0, "augmentation": STILL, **changes}
    with build_loader(root, backend=backend, **settings) as loader:
        return next(iter(loader))


@pytest.mark.parametrize("cache_size", [None, 40, 33])
def test_reduced_images_give_the_same_crops_and_nearly_the_pixels(photos, cache_size):
    exact, ours = views(photos, "torchvision"), views(photos, "memory", cache_size=cache_size)
    for name in ("crop_q", "crop_k", "index"):
        assert torch.equal(getattr(ours, name), getattr(exact, name))
    difference = (ours.view_q - exact.view_q).abs().mean(dim=(1, 2, 3))
    # Two views of an image differ by far more, and so would boxes rounded to reduced pixels.
    assert difference.mean() < 5.0
    assert (exact.view_q - exact.view_k).abs().mean() > 25.0
    assert abs(float((ours.view_q - exact.view_q).mean())) < 0.2


def test_shapes_are_kept(tmp_path):
    """A panorama's crops come from all of it, and a large view is not cut from few pixels."""
    for number, (width, height) in enumerate(((600, 60), (60, 600), (300, 300), (20, 20))):
        scene(number, width, height).save(tmp_path / f"{number}.png")
    with build_loader(
        tmp_path, batch_size=4, size=32, backend="memory", cache_size=40, crop_scale=(0.02, 0.1)
    ) as loader:
        assert [tuple(size) for size in loader._stored] == [
            (400, 40),
            (40, 400),
            (40, 40),
            (20, 20),
        ]
        boxes = torch.zeros(4, 2)
        for epoch in range(60):
            loader.set_epoch(epoch)
            for batch in loader:
                boxes[batch.index] = boxes[batch.index].maximum(batch.crop_q[:, 2:4])
    assert (boxes >= 0.9 * torch.tensor([[600, 60], [60, 600], [300, 300], [20, 20]])).all()


def test_images_that_do_not_fit_are_refused_early(tmp_path, monkeypatch):
    from densecl_ext.data import memory_loader

    for number in range(80):
        (tmp_path / f"{number}.jpg").write_bytes(encode(scene(number % 3, 40, 40), "JPEG"))
    monkeypatch.setattr(memory_loader, "_free_bytes", lambda device: 1000)
    with pytest.raises(ValueError, match=r"80 images of about 40 pixels take about .* GiB"):
        build_loader(tmp_path, batch_size=4, size=32, backend="memory")


@pytest.mark.parametrize("cache_size", [0, -3])
def test_cache_size_is_checked(photos, cache_size):
    with pytest.raises(ValueError, match=f"cache_size must be at least 1, got {cache_size}"):
        build_loader(photos, batch_size=4, size=32, backend="memory", cache_size=cache_size)


def test_views_that_are_made_together_are_what_they_are_alone(photos, monkeypatch):
    from densecl_ext.data import memory_loader

    def batches(changed_bytes, first=0):
        monkeypatch.setattr(memory_loader, "_CHANGED_BYTES", changed_bytes)
        with build_loader(photos, batch_size=2, size=24, backend="memory", drop_last=False) as one:
            one._move()  # as for a GPU
            one.load_state_dict(one.state_dict() | {"epoch": 3, "position": first})
            return list(one)

    alone, together = batches(0), batches(4 * 24 * 24**2 * 2)  # of six, four and two
    assert len(alone) == len(together) == 6
    for expected, batch in zip(alone + alone[3:], together + batches(2**20, 3), strict=True):
        for ours, theirs in zip(batch, expected, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.gpu
@pytest.mark.parametrize("augmentation", [STILL, Augmentation()])
def test_a_gpu_makes_the_cpus_views(photos, augmentation):
    settings = {"augmentation": augmentation, "channels_last": True, "cache_size": 40}
    expected = views(photos, "memory", **settings)
    made = views(photos, "memory", device="cuda", **settings)
    for name in ("crop_q", "crop_k"):
        assert torch.equal(getattr(made, name).cpu(), getattr(expected, name))
    for name in ("view_q", "view_k"):
        ours, theirs = getattr(made, name).cpu(), getattr(expected, name)
        scale = 1.0 if augmentation is STILL else 255 * 0.225
        assert (ours - theirs).abs().mean() * scale < 0.1
        assert (ours - theirs).abs().amax() * scale < 40  # a level's rounding, through contrast
