"""Images that are not 8-bit RGB: reading, ranges, views, networks, a run, its export."""

from __future__ import annotations

import io
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("torchvision")
pytest.importorskip("PIL")
tifffile = pytest.importorskip("tifffile")

import train_runs as runs  # noqa: E402
from data_images import scene  # noqa: E402
from PIL import Image  # noqa: E402

from densecl_ext import cli  # noqa: E402
from densecl_ext.backbones import build_backbone  # noqa: E402
from densecl_ext.backbones.build import load_weights  # noqa: E402
from densecl_ext.checkpoints import export_backbone, load_backbone  # noqa: E402
from densecl_ext.data import Augmentation, build_loader, find_images  # noqa: E402
from densecl_ext.data.bands import decode_bands, read_bands, scaled  # noqa: E402
from densecl_ext.data.images import Reading, decode_rgb, encoded  # noqa: E402
from densecl_ext.data.measuring import measure_channels, measure_range  # noqa: E402
from densecl_ext.train import pretrain  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
RNG = np.random.default_rng(0)
ONNX = ("onnx", "onnxscript", "onnxruntime")
STILL = Augmentation(
    scale=(1.0, 1.0),
    ratio=(1.0, 1.0),
    jitter_probability=0.0,
    gray_probability=0.0,
    blur_probability=0.0,
    flip_probability=0.0,
)


def bands(data: bytes, **settings):
    return read_bands(encoded(data), max_pixels=10**6, **settings)


def saved(write, *arguments, **settings) -> bytes:
    buffer = io.BytesIO()
    write(buffer, *arguments, **settings)
    return buffer.getvalue()


def four_bands(seed: int, width: int = 48, height: int = 40) -> np.ndarray:
    """uint16 (4, height, width): a scene's colours and a fourth of their mixture, 12 bits deep."""
    rgb = np.asarray(scene(seed, width, height), dtype=np.float64)
    fourth = 255 - rgb.mean(axis=2, keepdims=True)
    return np.moveaxis(np.concatenate([rgb, fourth], axis=2) * 16, 2, 0).astype(np.uint16)


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    """Twenty-six planar TIFF files of four 16-bit bands."""
    folder = tmp_path_factory.mktemp("four") / "images"
    folder.mkdir()
    for number in range(26):
        tifffile.imwrite(
            folder / f"{number:02}.tif",
            four_bands(number),
            planarconfig="separate",
            photometric="minisblack",
            compression=("zlib", "lzw", None)[number % 3],
        )
    return folder


def written(kind: str, values: np.ndarray) -> bytes:
    """A file of pixels (H, W, C)."""
    planes = np.moveaxis(values, 2, 0)
    plain = {"photometric": "minisblack"}
    return {
        "planar": lambda: saved(tifffile.imwrite, planes, planarconfig="separate", **plain),
        "interleaved": lambda: saved(tifffile.imwrite, values, planarconfig="contig", **plain),
        "pages": lambda: saved(tifffile.imwrite, planes, **plain),
        "bigtiff": lambda: saved(tifffile.imwrite, planes, bigtiff=True, byteorder=">", **plain),
        "npy": lambda: saved(np.save, values),
        "npy, channels first": lambda: saved(np.save, planes),
        "npy, fortran": lambda: saved(np.save, np.asfortranarray(values)),
        "npz": lambda: saved(np.savez_compressed, values),
        "npz, named": lambda: saved(np.savez, image=values, label=np.zeros(3)),
    }[kind]()


@pytest.mark.parametrize(
    "kind",
    [
        *("planar", "interleaved", "pages", "bigtiff", "npy", "npy, channels first"),
        *("npy, fortran", "npz", "npz, named"),
    ],
)
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
@pytest.mark.parametrize("channels", [5, 12])
def test_values_arrive_as_they_are_stored(kind, dtype, channels):
    values = RNG.integers(0, 250, (20, 30, channels)).astype(dtype)
    if dtype == "float32":
        values = values / np.float32(7)
    if dtype == "int16":
        values = values - np.int16(100)
    found = bands(written(kind, values), channels=channels)
    assert found.dtype == values.dtype
    np.testing.assert_array_equal(found, values)
    with pytest.raises(ValueError, match="channels"):
        bands(written(kind, values), channels=channels - 1)


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA"])
@pytest.mark.parametrize("depth", [8, 16])
def test_png_at_its_full_depth(mode, depth):
    """16-bit PNG of every kind, whose low bytes Pillow drops."""
    import struct
    import zlib

    count = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4}[mode]
    values = RNG.integers(0, 2**depth, (9, 11, count)).astype(f">u{depth // 8}")
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    colour = {"L": 0, "LA": 4, "RGB": 2, "RGBA": 6}[mode]

    def chunk(name, data):
        body = name + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", 11, 9, depth, colour, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    data += chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    np.testing.assert_array_equal(bands(data, channels=count), values)
    # As RGB, alpha is dropped and the range is what black and white are, at either depth.
    top = 2**depth - 1
    rgb = np.asarray(decode_rgb(data, Reading(value_range=(0, top / 2) if depth == 16 else None)))
    colours = values[..., :1].repeat(3, axis=2) if mode in ("L", "LA") else values[..., :3]
    scale = 255 / (top / 2 if depth == 16 else top)
    expected = np.clip(colours.astype(np.float64) * scale + 0.5, 0, 255).astype(np.uint8)
    np.testing.assert_array_equal(rgb, expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_pillows(orientation):
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(scene(3, 40, 24).save, "PNG", exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    np.testing.assert_array_equal(bands(data), expected)
    tiff = saved(
        tifffile.imwrite, np.asarray(scene(3, 40, 24)), extratags=[(274, "H", 1, orientation)]
    )
    np.testing.assert_array_equal(bands(tiff), expected)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (saved(np.save, np.zeros((4, 5, 6, 7))), r"shape \(4, 5, 6, 7\)"),
        (saved(np.save, np.array([{}, 1], dtype=object), allow_pickle=True), "Python objects"),
        (saved(np.save, np.zeros((30, 30, 4)))[:-100], "cut off"),
        (saved(np.save, np.zeros((30, 30, 4), dtype=complex)), "complex128"),
        (saved(np.save, np.zeros((1, 2000, 2000), dtype=np.uint8)), "more than max_pixels"),
        (saved(np.savez, a=np.zeros((9, 9)), b=np.zeros((9, 9))), "got a, b"),
        (saved(tifffile.imwrite, np.zeros((40, 50), np.uint8))[:100], ""),
    ],
)
def test_damaged_and_strange_arrays_are_refused(data, why):
    with pytest.raises(Exception, match=why):
        bands(data)


def test_tifffile_is_asked_for_where_it_is_needed(four, monkeypatch):
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(ImportError, match=r"need tifffile.*pip install 'densecl_ext\[images\]'"):
        build_loader(four, batch_size=4, size=32, channels=4)
    plain = saved(Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30)).save, "TIFF")
    assert bands(plain).max() == 599


# ------------------------------------------------------------------ ranges


def deep_folder(folder, top, count=6, dtype=np.uint16):
    folder.mkdir()
    for number in range(count):
        values = np.asarray(scene(number, 64, 48).convert("L"), dtype=np.float64) / 255 * top
        np.save(folder / f"{number}.npy", values.astype(dtype))
    return folder


@pytest.mark.parametrize(("top", "dtype"), [(4095, np.uint16), (0.7, np.float32), (300, np.int16)])
def test_a_measured_range_crushes_nothing(tmp_path, top, dtype):
    source = find_images(deep_folder(tmp_path / "deep", top, dtype=dtype), arrays=True)
    low, high = measure_range(source, Reading(channels=1))
    assert (low, high) == measure_range(source, Reading(channels=1))
    assert 0 <= low < 0.25 * top and 0.7 * top < high <= 1.01 * top
    with build_loader(source, batch_size=6, size=48, channels=1, value_range="auto") as loader:
        assert loader.reading.value_range == (low, high)
        view = next(iter(loader)).view_q
    assert abs(float(view.mean())) < 0.6 and 0.5 < float(view.std()) < 1.5


def test_the_range_of_rgb_images_is_measured_of_the_deep_ones_alone(tmp_path):
    scene(0).save(tmp_path / "8bit.png")
    gray = np.asarray(scene(1).convert("L"), dtype=np.uint16) * 16
    Image.fromarray(gray).save(tmp_path / "12bit.png")
    assert gray.max() > 3000
    source = find_images(tmp_path)
    low, high = measure_range(source, Reading())
    assert high == pytest.approx(np.quantile(gray, 0.999), rel=2e-3)
    with build_loader(
        tmp_path, batch_size=2, size=32, workers=0, value_range="auto", augmentation=STILL
    ) as loader:
        assert loader.reading.value_range == (low, high)
        for view in next(iter(loader)).view_q:
            assert float(view.max() - view.min()) > 1.5, "crushed to black"
    (tmp_path / "12bit.png").unlink()
    assert measure_range(find_images(tmp_path), Reading()) is None


def test_a_measured_range_keeps_the_one_channel_of_large_values(tmp_path):
    """Of 64 channels, 1 in 64 values: most of that channel would be cut were all taken together."""
    values = RNG.integers(0, 1000, (40, 40, 64)).astype(np.uint16)
    values[..., 7] = RNG.integers(20_000, 60_000, (40, 40))
    np.save(tmp_path / "a.npy", values)
    low, high = measure_range(find_images(tmp_path, arrays=True), Reading(channels=64))
    assert low == 0 and 59_900 < high < 60_000
    made = scaled(values, (low, high))
    assert (made[..., 7] == 1).mean() < 3e-3


def test_nan_and_infinity_do_not_count(tmp_path):
    values = RNG.normal(5, 1, (64, 64, 2)).astype(np.float32)
    values[:30, :, 0], values[0, 0, 1], values[0, 1, 1] = np.nan, np.inf, -np.inf
    np.save(tmp_path / "a.npy", values)
    low, high = measure_range(find_images(tmp_path, arrays=True), Reading(channels=2))
    assert 1 < low < 3 and 7 < high < 9
    made = scaled(values, (low, high))
    assert made.min() == 0 and made.max() == 1 and np.isfinite(made).all()


def test_mean_and_deviation_are_those_of_the_pixels(four):
    source = find_images(four)
    reading = Reading(value_range=(0, 4095), channels=4)
    mean, std, count = measure_channels(source, reading)
    assert count == 26
    pixels = np.concatenate(
        [scaled(bands(p.read_bytes()), (0, 4095)).reshape(-1, 4) for p in source]
    )
    np.testing.assert_allclose(mean, pixels.mean(axis=0), rtol=1e-4)
    np.testing.assert_allclose(std, pixels.std(axis=0), rtol=1e-4)
    with build_loader(
        four, batch_size=26, size=48, workers=0, channels=4, value_range=(0, 4095)
    ) as loader:
        assert loader.augmentation.mean == mean and loader.augmentation.std == std
        assert loader.augmentation.saturation == loader.augmentation.gray_probability == 0


# ------------------------------------------------------------------ views


def test_a_view_is_the_crop_resized_and_normalised(four):
    settings = {"mean": (0.1, 0.2, 0.3, 0.4), "std": (0.5, 0.6, 0.7, 0.8)}
    with build_loader(
        four,
        batch_size=26,
        size=20,
        workers=0,
        channels=4,
        value_range=(0, 4095),
        augmentation=STILL,
        crop_scale=(0.2, 0.9),
        **settings,
    ) as loader:
        batch, files = next(iter(loader)), loader.files
    assert batch.view_q.shape == (26, 4, 20, 20)
    for view, (x0, y0, x1, y1, flip), index in zip(
        batch.view_q, batch.crop_q.int().tolist(), batch.index.tolist(), strict=True
    ):
        planes = np.moveaxis(tifffile.imread(files[index]), 0, 0)[:, y0:y1, x0:x1] / 4095
        assert not flip
        for channel in range(4):
            picture = Image.fromarray(planes[channel].astype(np.float32))
            expected = np.asarray(picture.resize((20, 20), Image.Resampling.BILINEAR))
            expected = (expected - settings["mean"][channel]) / settings["std"][channel]
            np.testing.assert_allclose(view[channel].numpy(), expected, atol=2e-4)


def test_brightness_contrast_blur_and_flip_by_their_formulas():
    from densecl_ext.data.augmentation import BRIGHTNESS, CONTRAST, ViewParameters
    from densecl_ext.data.band_views import render_bands

    values = RNG.uniform(0.3, 0.6, (24, 24, 3)).astype(np.float32)
    plain = ViewParameters((0, 0, 24, 24), False, (), 1.0, 1.0, 1.0, 0.0, False, 0.0)

    def view(**changes):
        made = render_bands(values, (0.0, 1.0), plain._replace(**changes), 24)
        return made.transpose(1, 2, 0).astype(np.float64)

    exact = values.astype(np.float64)
    np.testing.assert_allclose(view(), exact, atol=1e-6)
    np.testing.assert_allclose(view(flip=True), exact[:, ::-1], atol=1e-6)
    mean = exact.mean(axis=(0, 1))
    order = (CONTRAST, BRIGHTNESS)
    expected = 1.3 * (mean + 0.7 * (exact - mean))
    np.testing.assert_allclose(view(order=order, brightness=1.3, contrast=0.7), expected, atol=1e-6)
    assert view(order=(BRIGHTNESS,), brightness=1.9).max() == 1
    blurred = view(blur_sigma=1.5)
    assert blurred.std() < 0.5 * exact.std()
    np.testing.assert_allclose(blurred.mean(axis=(0, 1)), mean, atol=0.01)


def test_views_repeat_whatever_the_workers_and_resume(four):
    def build(workers=0):
        return build_loader(four, batch_size=8, size=24, workers=workers, channels=4, seed=3)

    with build() as first, build(2) as second, build() as third:
        whole = list(first)
        for one, other in zip(whole, second, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
        iterator = iter(third)
        next(iterator)
        state = third.state_dict()
        assert state["channels"] == 4
        with build() as fourth:
            fourth.load_state_dict(state)
            rest = list(fourth)
    assert torch.equal(rest[0].view_q, whole[1].view_q)
    with build() as other, pytest.raises(ValueError, match="channels=5, this loader has 4"):
        other.load_state_dict(state | {"channels": 5})


@pytest.mark.parametrize("backend", ["dali", "memory"])
def test_other_loaders_say_that_they_read_rgb_alone(four, backend):
    pytest.importorskip("nvidia.dali")
    with pytest.raises(ValueError, match="must be torchvision .* channels 4"):
        build_loader(four, batch_size=4, size=24, channels=4, backend=backend)


def test_files_of_other_channels_are_skipped_by_name(four, tmp_path):
    for path in list(four.iterdir())[:6]:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    scene(0).save(tmp_path / "rgb.png")
    with build_loader(tmp_path, batch_size=7, size=24, workers=0, channels=4) as loader:
        list(loader)
    assert loader.skipped == {tmp_path / "rgb.png": "ValueError: 3 channels, expected 4"}


# ------------------------------------------------------------------ networks


@pytest.mark.parametrize("name", ["resnet18", "regnet_y_400mf", "timm/resnet18"])
@pytest.mark.parametrize("channels", [1, 2, 4])
def test_rgb_weights_are_adapted(name, channels, tmp_path):
    """Equal channels give what three equal ones gave."""
    rgb = build_backbone(name).eval()
    network = build_backbone(name, in_channels=channels).eval()
    assert network.in_channels == channels
    load_weights(network, rgb.state_dict())
    gray = torch.rand(2, 1, 64, 64)
    with torch.no_grad():
        expected = rgb(gray.repeat(1, 3, 1, 1))
        found = network(gray.repeat(1, channels, 1, 1))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_random_starts_are_as_wide_as_before():
    torch.manual_seed(0)
    wide = build_backbone("resnet50", in_channels=10)
    assert wide.conv1.weight.shape == (64, 10, 7, 7)
    expected = build_backbone("resnet50").conv1.weight.std().item()
    assert wide.conv1.weight.std().item() == pytest.approx(expected, rel=0.05)
    with pytest.raises(ValueError, match="in_channels must be at least 1, got 0"):
        build_backbone("resnet18", in_channels=0)


# ------------------------------------------------------------------ a run


def config(four, output, **options):
    return runs.tiny_config(
        four, output, backbone="resnet18", channels=4, value_range="auto", **options
    )


@pytest.fixture(scope="module")
def run(four, tmp_path_factory):
    return pretrain(config(four, tmp_path_factory.mktemp("run") / "four", epochs=2))


def test_a_run_on_four_bands_keeps_what_it_measured(run, four):
    from densecl_ext.checkpoints import load_checkpoint
    from densecl_ext.train.build import numbers

    stored = load_checkpoint(run.checkpoint)["config"]
    assert stored["channels"] == 4
    low, high = numbers(stored["value_range"])
    assert low == 0 and 3800 < high <= 4080
    mean, std, _ = measure_channels(find_images(four), Reading(channels=4, value_range=(low, high)))
    assert numbers(stored["pixel_mean"]) == mean and numbers(stored["pixel_std"]) == std
    assert float(runs.rows(run)[-1]["loss"]) > 0


# Three stages less to save and to verify.
SMALL = {"output_stride": 8, "truncate": True}


def test_it_resumes_to_the_same_bits(four, tmp_path):
    """What was measured belongs to the run: it is not measured again."""
    whole = pretrain(config(four, tmp_path / "whole", epochs=2, **SMALL))
    pretrain(config(four, tmp_path / "cut", epochs=2, max_steps=4, **SMALL))
    again = config(four, tmp_path / "cut", epochs=2, max_steps="none", **SMALL)
    assert again.value_range == again.pixel_mean == "auto"
    cut = pretrain(again, resume=True)
    first, second = (torch.load(r.checkpoint, weights_only=False) for r in (whole, cut))
    runs.assert_same(first["model"], second["model"])


@pytest.mark.parametrize(
    ("to", "name"),
    [
        ("torchvision", "t.pth"),
        ("timm", "t.safetensors"),
        ("mmengine", "m.pth"),
        ("detectron2", "d.pkl"),
        ("huggingface", "hub"),
        pytest.param("onnx", "o.onnx", marks=pytest.mark.slow),
    ],
)
def test_its_backbone_goes_out_with_four_channels(run, to, name, tmp_path):
    for module in {"timm": ["timm"], "huggingface": ["timm"], "onnx": ONNX}.get(to, []):
        pytest.importorskip(module)
    made = export_backbone(run.output, tmp_path / name, to)
    assert made.in_channels == 4
    normalisation = made.provenance["normalisation"]
    assert len(normalisation["mean"]) == 4 and "4 channels" in normalisation["channels"]
    if to == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(str(tmp_path / name))
        (first,) = session.get_inputs()
        assert first.shape[1] == 4
        images = torch.rand(1, 4, 64, 64)
        (features,) = session.run(None, {first.name: images.numpy()})
        with torch.no_grad():
            expected = load_backbone(run.output)(images)
        torch.testing.assert_close(torch.from_numpy(features), expected, rtol=1e-3, atol=1e-3)
    elif to != "huggingface":
        again = load_backbone(tmp_path / name)
        assert again.in_channels == 4
        images = torch.rand(1, 4, 64, 64)
        with torch.no_grad():
            torch.testing.assert_close(again(images), load_backbone(run.output)(images))
    if to == "detectron2":
        low, high = normalisation["value_range"]
        mean = [round(low + (high - low) * value, 2) for value in normalisation["mean"]]
        line = next(x for x in made.usage.splitlines() if "PIXEL_MEAN" in x)
        assert eval(line.partition("=")[2]) == pytest.approx(mean, rel=1e-4)
    if to == "mmengine":
        assert "in_channels=4" in made.usage


@pytest.mark.parametrize("to", ["torchvision", "timm"])
def test_the_lines_of_use_work_as_they_stand(run, to, tmp_path):
    import torchvision

    space = {"torch": torch, "torchvision": torchvision}
    if to == "timm":
        space["timm"] = pytest.importorskip("timm")
    made = export_backbone(run.output, tmp_path / "b.pth", to)
    exec(made.usage, space)
    assert space["model"](torch.rand(2, 4, 64, 64)).shape[0] == 2


def test_it_starts_another_run_and_so_do_rgb_weights(run, four, tmp_path):
    export_backbone(run.output, tmp_path / "four.pth", "backbone")
    torch.save(build_backbone("resnet18").state_dict(), tmp_path / "rgb.pth")
    for weights in ("four.pth", "rgb.pth"):
        settings = config(
            four, tmp_path / "run", max_steps=1, weights=str(tmp_path / weights), **SMALL
        )
        assert pretrain(settings, overwrite=True).step == 1


def test_what_rgb_alone_can_do_says_so(four, run, tmp_path):
    with pytest.raises(ValueError, match="probe needs channels rgb, got channels 4"):
        pretrain(config(four, tmp_path / "probe", probe=str(four)))


def test_commands_of_rgb_images_refuse_its_backbone(run, four, tmp_path, capsys):
    words = ["evaluate", "correspondence", str(run.output), "--data", str(four)]
    assert cli.main(words) == 2
    assert "takes images of 4 channels, and evaluate reads RGB" in capsys.readouterr().err


def test_the_check_suggests_channels_and_shows_them(four, tmp_path, capsys):
    sheet = tmp_path / "sheet.png"
    assert cli.main(["check", str(four), "--no-loaders", "--sheet", str(sheet)]) == 0
    told = capsys.readouterr().out
    assert "--channels 4 --value-range auto" in told
    assert "26 x ValueError: a TIFF of 4 bands, which cannot be read as RGB" in told
    with Image.open(sheet) as picture:
        assert np.asarray(picture).std() > 20


def test_the_command_line_says_what_it_measured(four, tmp_path, capsys):
    words = ["pretrain", "--data", str(four), "--output", str(tmp_path / "run")]
    words += ["--channels", "4", "--value-range", "auto", "--backbone", "resnet18"]
    words += [
        "--output-stride",
        "8",
        "--truncate",
        "--image-size",
        "32",
        "--batch-size",
        "8",
        "--workers",
        "0",
        "--device",
        "cpu",
    ]
    assert cli.main([*words, "--epochs", "1", "--dry-run"]) == 0
    told = capsys.readouterr()
    assert "value_range: 0," in told.out and "pixel_mean: " in told.out
    assert cli.main([*words, "--epochs", "1", "--max-steps", "1", "--no-tensorboard"]) == 0
    told = capsys.readouterr()
    assert "4; values: 0," in told.err and "not saturation, hue and grayscale" in told.err


def test_decode_bands_asks_for_a_range_of_floats():
    data = saved(np.save, np.zeros((8, 8, 2), dtype=np.float32))
    with pytest.raises(ValueError, match="state one by value_range, or have it measured"):
        decode_bands(encoded(data), Reading(channels=2))
