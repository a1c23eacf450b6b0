"""Both loaders: what a batch holds, reproducibility, resuming, and files that do not read."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import resource
import signal
import sys
import threading
import time
import warnings

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("torchvision")
pytest.importorskip("PIL")

from data_images import encode, photo_folder, scene  # noqa: E402
from PIL import Image  # noqa: E402

from densecl_ext.data import Augmentation, UnreadableImageWarning, build_loader  # noqa: E402
from densecl_ext.data.images import decode_rgb, header_size  # noqa: E402

SIZE = 32
STILL = Augmentation(
    jitter_probability=0.0,
    gray_probability=0.0,
    blur_probability=0.0,
    flip_probability=0.5,
    mean=(0.0, 0.0, 0.0),
    std=(1.0, 1.0, 1.0),
)


@pytest.fixture(params=["torchvision", "dali", "memory"])
def backend(request):
    if request.param == "dali":
        pytest.importorskip("nvidia.dali")
    return request.param


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return photo_folder(tmp_path_factory.mktemp("photos"))


def build(root, backend, **changes):
    settings = {"batch_size": 5, "size": SIZE, "workers": 0, "seed": 3, **changes}
    settings.setdefault("cache_size", 1000)  # nothing is reduced
    return build_loader(root, backend=backend, **settings)


def assert_equal(first, second):
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        for name, value, expected in zip(one._fields, one, other, strict=True):
            assert torch.equal(value, expected), name


def test_a_batch_holds_what_it_says(photos, backend):
    with build(photos, backend) as loader:
        assert loader.backend == backend
        batches = list(loader)
        assert len(batches) == len(loader) == len(loader.files) // 5
    for batch in batches:
        for view in (batch.view_q, batch.view_k):
            assert view.shape == (5, 3, SIZE, SIZE)
            assert view.dtype == torch.float32
            assert view.is_contiguous()
        for crop in (batch.crop_q, batch.crop_k):
            assert crop.shape == (5, 5)
            assert crop.dtype == torch.float32
        assert batch.index.dtype == torch.int64
        assert not torch.equal(batch.crop_q, batch.crop_k)
    index = torch.cat([batch.index for batch in batches]).tolist()
    assert len(set(index)) == len(index), "an image came twice in an epoch"
    assert index != sorted(index), "the images came unshuffled"


def test_crops_and_flips_say_where_the_pixels_came_from(photos, backend):
    with build(photos, backend, augmentation=STILL) as loader:
        batch = next(iter(loader))
        files = loader.files
    flips = torch.cat([batch.crop_q[:, 4], batch.crop_k[:, 4]])
    assert set(flips.tolist()) == {0.0, 1.0}
    for view, crop in ((batch.view_q, batch.crop_q), (batch.view_k, batch.crop_k)):
        for pixels, (*box, flip), index in zip(view, crop.tolist(), batch.index, strict=True):
            image = decode_rgb(files[index].read_bytes()).crop(tuple(int(edge) for edge in box))
            expected = np.asarray(image.resize((SIZE, SIZE), Image.BILINEAR), dtype=np.float32)
            if flip:
                expected = expected[:, ::-1]
            difference = 255 * pixels.permute(1, 2, 0).numpy() - expected
            assert np.abs(difference).mean() < 0.5


def test_normalisation(tmp_path, backend):
    for number in range(2):
        Image.new("RGB", (40, 40), (51, 102, 204)).save(tmp_path / f"{number}.png")
    still = Augmentation(jitter_probability=0.0, gray_probability=0.0)
    with build(tmp_path, backend, batch_size=2, augmentation=still) as loader:
        view = next(iter(loader)).view_q
    expected = (torch.tensor([0.2, 0.4, 0.8]) - torch.tensor(still.mean)) / torch.tensor(still.std)
    torch.testing.assert_close(view, expected.reshape(1, 3, 1, 1).expand_as(view))


def test_same_seed_same_views_whatever_the_workers(photos, backend):
    epochs = []
    for workers in (0, 1, 2):
        with build(photos, backend, workers=workers) as loader:
            loader.set_epoch(2)
            epochs.append(list(loader))
    assert_equal(epochs[0], epochs[1])
    assert_equal(epochs[0], epochs[2])


def test_epochs_and_seeds_differ_and_repeat(photos, backend):
    with build(photos, backend, workers=1) as loader:
        first = list(loader)
        loader.set_epoch(1)
        second = list(loader)
        loader.set_epoch(0)
        again = list(loader)
    assert_equal(first, again)
    assert not torch.equal(first[0].index, second[0].index)
    with build(photos, backend, seed=4) as loader:
        assert not torch.equal(next(iter(loader)).index, first[0].index)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_epoch_gives_the_remaining_batches(photos, backend, workers):
    with build(photos, backend, workers=workers) as loader:
        loader.set_epoch(6)
        batches, states = [], []
        for batch in loader:
            batches.append(batch)
            states.append(json.loads(json.dumps(loader.state_dict())))
        assert [state["position"] for state in states] == list(range(1, len(loader) + 1))
    with build(photos, backend, workers=workers) as loader:
        loader.load_state_dict(states[1])
        loader.set_epoch(6)
        assert_equal(list(loader), batches[2:])
        assert len(list(loader)) == len(loader), "only the resumed epoch is shorter"
        loader.load_state_dict(states[-1])
        assert list(loader) == []
        loader.load_state_dict(states[1])
        loader.set_epoch(7)
        assert len(list(loader)) == len(loader)


def test_a_state_of_other_settings_is_refused(photos, backend):
    with build(photos, backend) as loader:
        state = loader.state_dict()
    with (
        build(photos, backend, batch_size=4) as loader,
        pytest.raises(ValueError, match="batch_size=5"),
    ):
        loader.load_state_dict(state)


def test_an_abandoned_epoch_starts_afresh(photos, backend):
    with build(photos, backend, workers=1) as loader:
        complete = list(loader)
        for batch in loader:
            torch.equal(batch.index, complete[0].index)
            break
        assert_equal(list(loader), complete)


def test_an_incomplete_last_batch(photos, backend):
    with build(photos, backend, batch_size=7, drop_last=False) as loader:
        sizes = [len(batch.index) for batch in loader]
        count = len(loader.files)
    assert sum(sizes) == count
    assert sizes[:-1] == [7] * (count // 7)


def test_every_format_and_mode_becomes_rgb(tmp_path, backend):
    exif = Image.Exif()
    exif[0x0112] = 6
    image = scene(1)
    alpha = image.copy()
    alpha.putalpha(Image.linear_gradient("L").resize(image.size))
    gray16 = Image.fromarray((np.asarray(image)[..., 0].astype(np.uint16)) << 8)
    files = {
        "a.jpg": encode(image, "JPEG"),
        "b.JPEG": encode(image.convert("L"), "JPEG"),
        "c.jpg": encode(image.convert("CMYK"), "JPEG"),
        "d.jpg": encode(image, "JPEG", exif=exif),
        "e.png": encode(image, "PNG"),
        "f.png": encode(image.convert("P"), "PNG"),
        "g.png": encode(alpha, "PNG"),
        "h.png": encode(alpha.convert("LA"), "PNG"),
        "i.png": encode(gray16, "PNG"),
        "j.png": encode(image.convert("1"), "PNG"),
        "k.webp": encode(image, "WEBP"),
        "l.webp": encode(alpha, "WEBP"),
        "m.bmp": encode(image, "BMP"),
        "n.tif": encode(image, "TIFF"),
        "o.gif": encode(image.quantize(), "GIF"),
        "p.png": encode(image, "PNG", exif=exif),
        "q.gif": encode(
            image.quantize(), "GIF", save_all=True, append_images=[scene(2).quantize()]
        ),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    with (
        build(tmp_path, backend, batch_size=len(files), augmentation=STILL) as loader,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("error", UnreadableImageWarning)
        batch = next(iter(loader))
        assert loader.skipped == {}
    for view, crop, index in zip(batch.view_q, batch.crop_q, batch.index.tolist(), strict=True):
        path = loader.files[index]
        box = tuple(int(edge) for edge in crop[:4])
        decoded = decode_rgb(path.read_bytes()).crop(box).resize((SIZE, SIZE), Image.BILINEAR)
        expected = np.asarray(decoded, dtype=np.float32)
        expected = expected[:, ::-1] if crop[4] else expected
        assert np.abs(255 * view.permute(1, 2, 0).numpy() - expected).mean() < 0.5, path.name


@pytest.fixture
def damaged(tmp_path):
    """Ten good images among nine that do not read, each in its own way."""
    for number in range(10):
        (tmp_path / f"good{number}.jpg").write_bytes(encode(scene(number), "JPEG"))
    bad = {"bad_empty.jpg": b"", "bad_text.jpg": b"this is no image", "bad_zeros.png": bytes(900)}
    for kind in ("JPEG", "PNG", "WEBP", "BMP"):
        data = encode(scene(20), kind)
        bad[f"bad_truncated.{kind.lower()}"] = data[: len(data) // 2]
    data = encode(scene(20), "PNG")
    half = len(data) // 2
    # Header and end are whole: only decoding tells.
    bad["bad_middle.png"] = data[:half] + bytes(20) + data[half + 20 :]
    for name, data in bad.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "bad_eps.jpg").write_bytes(encode(scene(20), "EPS"))
    return tmp_path


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_files_are_named_once_counted_and_skipped(damaged, backend, workers):
    with build(damaged, backend, batch_size=6, workers=workers) as loader:
        with pytest.warns(UnreadableImageWarning) as caught:
            first = list(loader)
        assert [len(batch.index) for batch in first] == [6, 6, 6]
        for batch in first:
            assert all(loader.files[index].name.startswith("good") for index in batch.index)
            assert torch.isfinite(batch.view_q).all()
        assert {path.name[:3] for path in loader.skipped} == {"bad"}
        assert len(loader.skipped) == 9
        messages = [str(warning.message) for warning in caught]
        assert len(messages) == 9
        for path, reason in loader.skipped.items():
            assert sum(f"skipped {path}: {reason}" == message for message in messages) == 1
            assert reason and "\n" not in reason
        with warnings.catch_warnings():
            warnings.simplefilter("error", UnreadableImageWarning)
            again = list(loader)
    # What is known to be unreadable must not change what takes its place.
    assert_equal(first, again)


def test_substitutes_do_not_depend_on_what_was_met_before(damaged, backend):
    with pytest.warns(UnreadableImageWarning), build(damaged, backend, batch_size=6) as loader:
        batches = []
        for batch in loader:
            batches.append(batch)
            if len(batches) == 1:
                state = loader.state_dict()
    with pytest.warns(UnreadableImageWarning), build(damaged, backend, batch_size=6) as loader:
        loader.load_state_dict(state)
        assert_equal(list(loader), batches[1:])


def test_both_backends_skip_and_substitute_alike(damaged):
    pytest.importorskip("nvidia.dali")
    seen = []
    for backend in ("torchvision", "dali"):
        with pytest.warns(UnreadableImageWarning), build(damaged, backend, batch_size=6) as loader:
            seen.append([(batch.index, batch.crop_q, batch.crop_k) for batch in loader])
    for one, other in zip(*seen, strict=True):
        assert all(torch.equal(first, second) for first, second in zip(one, other, strict=True))


def test_dali_hands_what_it_cannot_decode_to_pillow(tmp_path, monkeypatch):
    pytest.importorskip("nvidia.dali")
    from densecl_ext.data import dali_loader

    for number in range(6):
        (tmp_path / f"{number}.jpg").write_bytes(encode(scene(number), "JPEG"))
    (tmp_path / "x.gif").write_bytes(encode(scene(7).quantize(), "GIF"))
    (tmp_path / "y.bmp").write_bytes(encode(scene(8), "BMP"))
    with build(tmp_path, "dali", batch_size=8) as loader:
        expected = list(loader)

    def deluded(file, max_pixels):
        if file.kind == "BMP":
            return file.data, 1000, 1000  # crops will lie outside
        return file.data, *header_size(file)[:2]  # DALI has no decoder for GIF

    # As on a GPU, where files go to DALI as they are.
    monkeypatch.setattr(dali_loader.DaliLoader, "_decodes", True)
    monkeypatch.setattr(dali_loader, "_native", deluded)
    with build(tmp_path, "dali", batch_size=8) as loader:
        assert_equal(list(loader), expected)
        assert loader._through_pillow == {6, 7}
        assert loader.skipped == {}


def test_dali_errors_that_no_file_explains_are_not_hidden(photos, monkeypatch):
    pytest.importorskip("nvidia.dali")
    from densecl_ext.data import dali_loader

    row_of = dali_loader.row_of
    outside = np.zeros(21, dtype=np.float32)
    outside[:4] = 5000, 5000, 10, 10
    monkeypatch.setattr(dali_loader, "row_of", lambda drawn: row_of(drawn) + outside)
    with build(photos, "dali") as loader, pytest.raises(RuntimeError, match="slice"):
        next(iter(loader))


def test_a_folder_without_a_readable_image_is_an_error(tmp_path, backend):
    (tmp_path / "a.jpg").write_bytes(b"this is no image")
    (tmp_path / "b.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"none of the 2 image files .* can be read.*a\.jpg"):
        build(tmp_path, backend, batch_size=2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 1000}, "do not fill one batch of 1000"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"size": 0}, "size must be at least 1"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"workers": -1}, "workers must be at least 0"),
        ({"backend": "tensorflow"}, "backend must be"),
    ],
)
def test_values_out_of_range_are_named(photos, changes, message):
    with pytest.raises(ValueError, match=message):
        build(photos, **{"backend": "torchvision", **changes})


def test_auto_takes_torchvision_on_a_cpu(photos):
    with build(photos, "auto") as loader:
        assert loader.backend == "torchvision"


@pytest.mark.gpu
def test_auto_takes_dali_on_a_gpu_where_it_works(photos, monkeypatch):
    pytest.importorskip("nvidia.dali")
    from densecl_ext.data import dali_loader

    with build(photos, "auto", device="cuda") as loader:
        assert loader.backend == "dali"

    def broken(self):
        raise RuntimeError("no such driver")

    monkeypatch.setattr(dali_loader.DaliLoader, "_build", broken)
    with (
        pytest.warns(UserWarning, match="DALI does not work here.*no such driver"),
        build(photos, "auto", device="cuda") as loader,
    ):
        assert loader.backend == "torchvision"


def test_dali_that_was_asked_for_is_not_replaced(photos, monkeypatch):
    pytest.importorskip("nvidia.dali")
    from densecl_ext.data import dali_loader

    def broken(self):
        raise RuntimeError("no such driver")

    monkeypatch.setattr(dali_loader.DaliLoader, "_build", broken)
    with pytest.raises(RuntimeError, match="no such driver"):
        build(photos, "dali")


def test_a_missing_package_is_named(photos, monkeypatch):
    from densecl_ext.data import loader as module

    installed = module.find_spec
    hidden = {"nvidia.dali"}
    monkeypatch.setattr(
        module, "find_spec", lambda name: None if name in hidden else installed(name)
    )
    with build(photos, "auto") as loader:
        assert loader.backend == "torchvision"
    with pytest.raises(ImportError, match="'dali' needs nvidia-dali"):
        build(photos, "dali")
    hidden.add("PIL")
    with pytest.raises(ImportError, match="needs pillow"):
        build(photos, "auto")


def test_workers_leave_ctrl_c_to_the_main_process(photos):
    with build(photos, "torchvision", workers=2) as loader:
        complete = list(loader)
        batches = []
        for batch in loader:
            batches.append(batch)
            for worker in multiprocessing.active_children():
                os.kill(worker.pid, signal.SIGINT)
        assert_equal(batches, complete)


def left_running() -> tuple[int, int]:
    """Threads and worker processes that there are."""
    return threading.active_count(), len(multiprocessing.active_children())


def wait_for_feeders() -> None:
    """The threads that feed the queues of earlier loaders end by themselves, soon after them."""
    gc.collect()
    deadline = time.monotonic() + 10.0
    while any(thread.name == "QueueFeederThread" for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_close_leaves_nothing_behind_and_may_be_undone(photos, backend):
    wait_for_feeders()
    before = left_running()
    loader = build(photos, backend, workers=2)
    batches = list(loader)
    next(iter(loader))
    loader.close()
    loader.close()
    wait_for_feeders()
    deadline = time.monotonic() + 10.0
    while (now := left_running()) != before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert now == before
    assert_equal(list(loader), batches)
    loader.close()


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes on Linux alone")
def test_epochs_neither_grow_nor_vanish(photos, backend):
    with build(photos, backend, batch_size=8, size=64) as loader:
        peaks = []
        for epoch in range(10):
            loader.set_epoch(epoch)
            assert sum(1 for _ in loader) == len(loader)
            peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    # Six epochs of leaked views alone would be 14 MB.
    assert peaks[-1] - peaks[3] < 8
