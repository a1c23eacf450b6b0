"""`densecl check`: what it finds in images, what it suggests, and the sheet of views."""

from __future__ import annotations

import json

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("PIL")

from data_images import encode, photo_folder, scene  # noqa: E402
from PIL import Image  # noqa: E402

from densecl_ext import cli  # noqa: E402
from densecl_ext.data.folder import find_images  # noqa: E402
from densecl_ext.data.images import Reading  # noqa: E402
from densecl_ext.data.rates import loader_rates  # noqa: E402
from densecl_ext.data.survey import survey  # noqa: E402
from densecl_ext.train.checking import check_images  # noqa: E402


def look(folder, **reading):
    return survey(find_images(folder, arrays=True), Reading(**reading)).report()


pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture
def untidy(tmp_path):
    folder = photo_folder(tmp_path / "images", 20)
    turned = Image.Exif()
    turned[0x0112] = 6
    (folder / "turned.jpg").write_bytes(encode(scene(50, 120, 80), "JPEG", exif=turned))
    (folder / "copy.jpg").write_bytes((folder / "003.jpg").read_bytes())
    (folder / "png.jpg").write_bytes(encode(scene(51), "PNG"))
    Image.new("RGB", (64, 64), (120, 120, 121)).save(folder / "empty.png")
    (folder / "cut.png").write_bytes(encode(scene(52), "PNG")[:900])
    (folder / "text.jpg").write_text("no image")
    (folder / "notes.txt").write_text("left out")
    deep = np.linspace(7, 4011, 64 * 48).reshape(48, 64).astype(np.uint16)
    Image.fromarray(deep).save(folder / "deep.png")
    Image.fromarray(deep.astype(np.float32)).save(folder / "float.tiff")
    mask = np.zeros((60, 60), dtype=np.uint8)
    mask[:30, :30], mask[30:] = 3, 11
    Image.fromarray(mask).save(folder / "mask.png")
    np.save(folder / "array.npy", np.zeros((5, 40, 50), dtype=np.uint16))
    first, second = (scene(number).quantize(16) for number in (60, 61))
    first.save(folder / "moving.gif", save_all=True, append_images=[second])
    return folder


def test_everything_untidy_is_found(untidy):
    found = look(untidy)
    name = untidy.joinpath
    assert found["images"] == found["looked_at"] == 31
    assert found["formats"] == {"JPEG": 22, "PNG": 4, "GIF": 1, "TIFF": 1, "NPY": 1}
    assert found["other_endings"] == {".txt": 1}
    assert found["misnamed"] == {"count": 1, "examples": [str(name("png.jpg"))]}
    assert found["channels"] == {"3": 25, "1": 3, "5": 1}
    assert found["bits"] == {"8": 26, "16": 2, "float32": 1}
    assert found["values"]["16"] == [0.0, 4011.0] and found["values"]["float32"] == [7.0, 4011.0]
    assert found["orientation"] == {"1": 28, "6": 1}
    assert found["animated"] == 1
    assert found["duplicates"]["examples"] == [[str(name("003.jpg")), str(name("copy.jpg"))]]
    assert str(name("empty.png")) in found["near_empty"]["examples"]
    assert found["like_masks"] == {"count": 1, "examples": [str(name("mask.png"))]}
    assert not found["neighbours"]["like_video"]


def test_what_is_skipped_is_what_the_loaders_skip(untidy):
    from densecl_ext.data import build_loader

    found = survey(find_images(untidy), Reading())
    skipped = {found.source[index] for index in found.skipped}
    assert {path.name for path in skipped} == {"cut.png", "text.jpg", "float.tiff"}
    with build_loader(untidy, batch_size=5, size=32, backend="torchvision", workers=0) as loader:
        for epoch in range(2):
            loader.set_epoch(epoch)
            list(loader)
        assert loader.skipped.keys() == skipped
        for index, why in found.skipped.items():
            assert loader.skipped[found.source[index]] == why
    stated = survey(find_images(untidy), Reading(value_range=(0, 4095)))
    assert {stated.source[index].name for index in stated.skipped} == {"cut.png", "text.jpg"}


def test_frames_of_a_video_are_told_from_photographs(tmp_path):
    wide = np.asarray(np.hstack([scene(number) for number in range(70, 75)]))
    frames = tmp_path / "frames"
    frames.mkdir()
    for number in range(100):
        part = wide[:, 4 * number : 4 * number + 128]
        Image.fromarray(part).save(frames / f"{number:03}.png")
    report = check_images([str(frames)], rates=False)
    assert report["neighbours"]["like_video"]
    assert report["suggestion"]["options"]["every_nth"] == 5
    photos = check_images([str(photo_folder(tmp_path / "photos"))], rates=False)
    assert not photos["neighbours"]["like_video"]
    assert "every_nth" not in photos["suggestion"]["options"]


def test_the_command_tells_all_and_draws_the_sheet(untidy, tmp_path, capsys):
    sheet = tmp_path / "views.png"
    words = ["check", str(untidy), "--sheet", str(sheet), "--image-size", "32"]
    assert cli.main([*words, "--no-loaders", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["suggestion"]["recipe"] == "small_data"
    assert report["suggestion"]["options"]["queue_length"] == 8
    assert report["suggestion"]["options"]["value_range"] == "auto"
    assert cli.main([*words, "--no-loaders"]) == 0
    told = capsys.readouterr().out
    for line in ("EXIF orientation", "would be skipped", "exact copies", "suggested:"):
        assert line in told
    with Image.open(sheet) as picture:
        pixels = np.asarray(picture)
    # Sixteen images in two columns; each view stands in its frame.
    assert pixels.shape == (8 * 168 + 8, 1032, 3)
    orange, blue = ((pixels == colour).all(axis=2) for colour in ((230, 120, 20), (30, 110, 220)))
    for row in range(8):
        for column in range(2):
            left, top = 8 + 520 * column, 8 + 168 * row
            tiles = [
                np.s_[top : top + 160, left + 168 * n : left + 168 * n + 160] for n in range(3)
            ]
            assert orange[tiles[1]][0].all() and blue[tiles[2]][0].all()
            assert orange[tiles[0]].any() and blue[tiles[0]].any()
            assert pixels[tiles[1]][3:-3, 3:-3].std() > 0


def test_the_loaders_are_timed(tmp_path):
    source = find_images(photo_folder(tmp_path / "photos"))
    rates = loader_rates(source, Reading(), size=32, workers=0, seconds=0.2)
    assert rates.keys() == {"dali", "torchvision", "memory"}
    assert rates["torchvision"] > 0 and rates["memory"] > 0
