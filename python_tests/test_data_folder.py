"""Finding and decoding the images of a folder."""

from __future__ import annotations

import os

import numpy as np
import pytest

pytest.importorskip("PIL")

from data_images import encode, scene  # noqa: E402
from PIL import Image  # noqa: E402

from densecl_ext.data import find_images  # noqa: E402
from densecl_ext.data.images import decode_rgb  # noqa: E402


def test_find_images_takes_any_tree_in_sorted_order(tmp_path):
    names = ["b.JPG", "a/c.jpeg", "a/b/d.png", "a/b/e.WebP", "a-b/f.bmp", "z.tiff", "g.gif"]
    others = ["notes.txt", ".hidden.jpg", ".cache/x.jpg", "a/.git/y.png", "jpg", "k.npy"]
    for name in names + others:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "folder.jpg").mkdir()

    found = find_images(tmp_path)

    assert found == sorted((tmp_path / name for name in names), key=lambda path: path.parts)
    assert find_images(str(tmp_path)) == found


def test_find_images_follows_links_and_survives_loops(tmp_path):
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    root.mkdir()
    elsewhere.mkdir()
    (elsewhere / "a.png").write_bytes(b"")
    (elsewhere / "c.png").write_bytes(b"")
    (root / "b.png").symlink_to(elsewhere / "a.png")
    (root / "linked").symlink_to(elsewhere, target_is_directory=True)
    (elsewhere / "back").symlink_to(root, target_is_directory=True)

    found = find_images(root)
    assert found == [root / "b.png", root / "linked" / "c.png"]
    # linked/a.png is b.png, and linked/back is the root.
    assert found.summary() == "2 second links to one file or folder"


def test_find_images_says_what_is_wrong(tmp_path):
    with pytest.raises(ValueError, match="must be a folder"):
        find_images(tmp_path / "missing")
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(ValueError, match="no image under"):
        find_images(tmp_path)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "GIF"])
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1"])
def test_decode_rgb_keeps_the_colours_of_every_mode(kind, mode):
    image = scene(1).convert(mode)
    if kind == "GIF" and mode == "RGB":
        image = image.quantize()
    decoded = decode_rgb(encode(image, kind))
    assert decoded.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(decoded), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_decode_rgb_reads_lossy_formats(kind):
    decoded = np.asarray(decode_rgb(encode(scene(1), kind, quality=95)), dtype=float)
    assert np.abs(decoded - np.asarray(scene(1))).mean() < 4


def test_decode_rgb_converts_cmyk():
    image = scene(2)
    decoded = decode_rgb(encode(image.convert("CMYK"), "TIFF"))
    assert np.abs(np.asarray(decoded, dtype=float) - np.asarray(image)).mean() < 2


def test_decode_rgb_drops_alpha_and_keeps_the_stored_colours():
    image = scene(3)
    transparent = image.copy()
    transparent.putalpha(0)
    decoded = decode_rgb(encode(transparent, "PNG"))
    np.testing.assert_array_equal(np.asarray(decoded), np.asarray(image))


def test_decode_rgb_scales_sixteen_bits():
    gray = np.arange(96 * 128, dtype=np.uint16).reshape(96, 128) * 5
    decoded = np.asarray(decode_rgb(encode(Image.fromarray(gray), "PNG")))
    np.testing.assert_array_equal(decoded, np.repeat((gray >> 8)[..., None], 3, axis=2))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_decode_rgb_turns_images_upright(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = scene(4, 96, 64)
    decoded = decode_rgb(encode(stored, "PNG", exif=exif))
    # What a viewer must do to show each orientation upright (EXIF 2.3, tag 0x0112).
    pixels = np.asarray(stored)
    upright = {
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.transpose(1, 0, 2),
        6: np.rot90(pixels, -1),
        7: pixels[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(pixels, 1),
    }[orientation]
    np.testing.assert_array_equal(np.asarray(decoded), upright)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP"])
def test_decode_rgb_refuses_truncated_files(kind):
    data = encode(scene(5), kind)
    for damaged in (data[: len(data) // 2], b"", b"no image at all", os.urandom(0) + bytes(500)):
        with pytest.raises(Exception):  # noqa: B017  (Pillow's plugins raise many kinds)
            decode_rgb(damaged)


def test_decode_rgb_refuses_floating_point_pixels():
    with pytest.raises(ValueError, match="floating-point"):
        decode_rgb(encode(Image.fromarray(np.ones((8, 8), dtype=np.float32)), "TIFF"))
