"""All loaders beside damaged files: the same skips, the same batches, silence, and no delay."""

from __future__ import annotations

import struct
import time
import warnings

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("torchvision")
pytest.importorskip("PIL")

from data_images import encode, scene  # noqa: E402
from PIL import Image  # noqa: E402

from densecl_ext.data import NarrowRangeWarning, UnreadableImageWarning, build_loader  # noqa: E402

BACKENDS = ["torchvision", "dali", "memory"]


@pytest.fixture(params=BACKENDS)
def backend(request):
    if request.param == "dali":
        pytest.importorskip("nvidia.dali")
    return request.param


def build(root, backend, **changes):
    settings = {"batch_size": 10, "size": 32, "workers": 0, **changes}
    return build_loader(root, backend=backend, **settings)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """Ninety images in three formats, each damaged somewhere in its own way, and ten whole ones."""
    root = tmp_path_factory.mktemp("damaged")
    rng = np.random.default_rng(0)
    for number in range(100):
        kind = ("JPEG", "PNG", "WEBP")[number % 3]
        data = encode(scene(number, 96, 80), kind)
        length = int(rng.integers(1, 64))
        place = int(rng.integers(0, len(data) - length))
        before, behind = data[:place], data[place + length :]
        if number < 90:
            data = (
                before + bytes(length) + behind,
                before + rng.bytes(length) + behind,
                before,
                before + behind,
                before + rng.bytes(length) + data[place:],
            )[number // 3 % 5]
        (root / f"{number:03}.{kind.lower()}").write_bytes(data)
    return root


def test_all_loaders_skip_the_same_files_for_the_same_reasons(damaged, capfd):
    skipped, crops = [], []
    for backend in BACKENDS:
        if backend == "dali":
            pytest.importorskip("nvidia.dali")
        with warnings.catch_warnings(), build(damaged, backend) as loader:
            warnings.simplefilter("ignore", UnreadableImageWarning)
            crops.append(torch.cat([batch.crop_q for batch in loader]))
            skipped.append(dict(loader.skipped))
    assert 10 < len(skipped[0]) < 80
    for other in (1, 2):
        assert skipped[other] == skipped[0]
        assert torch.equal(crops[other], crops[0])
    # libjpeg, libpng and libtiff speak on standard error by themselves.
    assert capfd.readouterr().err == ""


def noisy(kind):
    """A whole image about which a decoder likes to complain."""
    data = encode(scene(1, 96, 80), kind)
    if kind == "PNG":
        profile = struct.pack(">I", 12) + b"iCCP" + bytes(16)
        return data[:33] + profile + data[33:]
    scan = data.index(b"\xff\xda") + 40
    return data[:scan] + bytes(30) + data[scan + 30 :]  # "Corrupt JPEG data"


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_nothing_is_said_about_what_is_used(tmp_path, backend, kind, capfd):
    for number in range(10):
        (tmp_path / f"{number}.{kind.lower()}").write_bytes(noisy(kind))
    with warnings.catch_warnings(), build(tmp_path, backend) as loader:
        warnings.simplefilter("error")
        assert len(list(loader)) == 1
        assert not loader.skipped
    assert capfd.readouterr().err == ""


def test_dali_runs_no_batch_twice_for_a_damaged_file(damaged, monkeypatch):
    """On a CPU; building the graph again took longer than several batches."""
    pytest.importorskip("nvidia.dali")
    from densecl_ext.data.dali_loader import DaliLoader

    with warnings.catch_warnings(), build(damaged, "dali") as loader:
        warnings.simplefilter("ignore", UnreadableImageWarning)
        monkeypatch.setattr(DaliLoader, "_build", None)
        start = time.perf_counter()
        assert len(list(loader)) == 10
        assert time.perf_counter() - start < 30


def test_what_is_in_a_folder_beside_images_is_no_obstacle(tmp_path, backend):
    """A PostScript program and a file of zeros under images' names; too many pixels."""
    for number in range(10):
        (tmp_path / f"good{number}.jpg").write_bytes(encode(scene(number), "JPEG"))
    (tmp_path / "program.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    with open(tmp_path / "zeros.png", "wb") as file:
        file.truncate(8 << 30)
    (tmp_path / "large.png").write_bytes(encode(Image.new("L", (400, 400)), "PNG"))
    with (
        pytest.warns(UnreadableImageWarning) as told,
        build(tmp_path, backend, max_pixels=100_000, batch_size=13) as loader,
    ):
        (batch,) = loader
        names = {path.name: reason for path, reason in loader.skipped.items()}
    assert set(names) == {"program.jpg", "zeros.png", "large.png"}
    assert "400 x 400 pixels, more than max_pixels = 100,000" in names["large.png"]
    assert len(told) == 3 and len(batch.index) == 13


def test_control_characters_in_names_do_not_reach_the_terminal(tmp_path, backend):
    (tmp_path / "good.png").write_bytes(encode(scene(1), "PNG"))
    (tmp_path / "bad\x1b]0;title\x07\n.png").write_bytes(b"x")
    with (
        pytest.warns(UnreadableImageWarning) as told,
        build(tmp_path, backend, batch_size=2) as loader,
    ):
        list(loader)
    (message,) = (str(warning.message) for warning in told)
    assert message.isprintable() and "bad\\x1b]0;title\\x07\\n.png" in message


def test_a_narrow_range_is_said_once(tmp_path, backend):
    for number in range(4):
        values = np.linspace(0, 255, 96 * 80).astype(np.uint16).reshape(80, 96)
        Image.fromarray(values).save(tmp_path / f"{number}.png")
    with pytest.warns(NarrowRangeWarning, match="value_range") as told:
        with build(tmp_path, backend, batch_size=4) as loader:
            (dark,) = loader
        assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with build(tmp_path, backend, batch_size=4, value_range=(0, 255)) as loader:
            (used,) = loader
            state = loader.state_dict()
    assert float(dark.view_q.std()) < 0.2 < float(used.view_q.std())
    with (
        build(tmp_path, backend, batch_size=4) as loader,
        pytest.raises(ValueError, match=r"value_range=\[0.0, 255.0\]"),
    ):
        loader.load_state_dict(state)


def test_states_from_before_value_range_are_accepted(tmp_path, backend):
    scene(1).save(tmp_path / "a.png")
    with build(tmp_path, backend, batch_size=1) as loader:
        state = loader.state_dict()
        del state["value_range"]
        loader.load_state_dict(state)


def test_crop_scale_is_the_augmentations(tmp_path, backend):
    for number in range(10):
        scene(number, 100, 100).save(tmp_path / f"{number}.png")
    with build(tmp_path, backend, crop_scale=(0.01, 0.02)) as loader:
        (batch,) = loader
    x0, y0, x1, y1 = batch.crop_q[:, :4].unbind(1)
    area = (x1 - x0) * (y1 - y0) / 10_000
    assert float(area.max()) < 0.03 and float(area.min()) > 0.005
    with pytest.raises(ValueError, match="scale is a fraction of the area"):
        build(tmp_path, backend, crop_scale=(0.5, 1.5))
