"""Finding and decoding the images of a folder."""

from __future__ import annotations

import os
import pickle
import sys
import warnings

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


# ---------------------------------------------------------------- what a scan leaves out


def test_a_scan_says_what_it_left_out(tmp_path):
    def make(name, data=b""):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)

    for name in ("a.jpg", "b/c.PNG", "b/d.webp"):
        make(name)
    for name in ("x.heic", "y.heic", "z.avif", "b/e.JPG.txt", "b/none", "b/odd.\x1b[2J"):
        make(name)
    for name in ("__MACOSX/._a.jpg", "__MACOSX/b/f.jpg", "b/._c.png", ".hidden/g.jpg", ".DS_Store"):
        make(name)
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    (tmp_path / "again.jpg").symlink_to(tmp_path / "b" / "c.PNG")
    os.link(tmp_path / "a.jpg", tmp_path / "hard.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")

    found = find_images(tmp_path)

    # Of two names of one file the first counts.
    assert [path.name for path in found] == ["a.jpg", "again.jpg", "d.webp"]
    told = found.summary().split(", ")
    assert "\x1b" not in found.summary() and "\n" not in found.summary()
    for line in (
        "6 files of other endings (.heic 2",
        "2 macOS archives' leftovers",
        "2 hidden names",
        "2 broken links",
        "2 second links to one file or folder",
        "1 name of no regular file",
    ):
        assert line in told, told
    for ending in (".avif 1", ".txt 1", "none 1"):
        assert any(part.startswith(ending) for part in told), told


def test_folders_that_cannot_be_listed_are_counted(tmp_path, monkeypatch):
    (tmp_path / "a.jpg").write_bytes(b"")
    (tmp_path / "closed").mkdir()
    scandir = os.scandir

    def refused(folder):
        if os.fsdecode(folder).endswith("closed"):
            raise PermissionError(13, "Permission denied")
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refused)
    assert find_images(tmp_path).summary() == "1 unreadable folder"


def test_a_folder_without_images_says_what_is_there_instead(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.heic").write_bytes(b"")
    with pytest.raises(ValueError, match=r"no image under .*left out 3 files of other endings"):
        find_images(tmp_path)


def test_the_loader_says_it_in_one_warning(tmp_path):
    from densecl_ext.data import LeftOutWarning, build_loader

    pytest.importorskip("torchvision")
    scene(1).save(tmp_path / "a.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build_loader(tmp_path, batch_size=1, backend="torchvision").close()
    (tmp_path / "b.heic").write_bytes(b"")
    with pytest.warns(
        LeftOutWarning, match=r"1 images under .*; left out 1 file of another"
    ) as told:
        build_loader(tmp_path, batch_size=1, backend="torchvision").close()
    assert len(told) == 1


# ---------------------------------------------------------------- the packed list


def test_packed_files_are_a_sequence_that_workers_share(tmp_path):
    names = [f"{folder}/{number}\udcff\u4e2d.jpg" for folder in "abc" for number in range(40)]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    files = find_images(tmp_path)
    expected = sorted((tmp_path / name for name in names), key=lambda path: path.parts)
    assert list(files) == expected and files[-1] == expected[-1] and files[3:5] == expected[3:5]
    assert len(files) == 120 and expected[7] in files and files.index(expected[9]) == 9
    with pytest.raises(IndexError):
        files[120]
    again = pickle.loads(pickle.dumps(files))  # for workers that do not fork
    assert again == files and again.identity == files.identity
    packed = files._names.nbytes + files._ends.nbytes + files._sizes.nbytes
    assert packed == sum(len(os.fsencode(name)) for name in names) + 16 * len(names)


def tree(root, sizes):
    for name, size in sizes.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(bytes(size))
    return find_images(root).identity


def test_the_identity_is_of_relative_paths_and_sizes(tmp_path):
    sizes = {"a/x.jpg": 1, "b/x.jpg": 2, "c.png": 3}
    first = tree(tmp_path / "first", sizes)
    assert tree(tmp_path / "moved", sizes) == first
    assert tree(tmp_path / "larger", {**sizes, "c.png": 4}) != first
    assert tree(tmp_path / "swapped", {"a/x.jpg": 2, "b/x.jpg": 1, "c.png": 3}) != first
    assert tree(tmp_path / "renamed", {"d/x.jpg": 1, "b/x.jpg": 2, "c.png": 3}) != first
    assert tree(tmp_path / "fewer", {"a/x.jpg": 1, "b/x.jpg": 2}) != first
    assert tree(tmp_path / "boundary", {"ax.jpg": 1, "b/x.jpg": 2, "c.png": 3}) != first


def test_several_folders_are_read_one_after_the_other(tmp_path):
    for name in ("one/b.jpg", "one/a.jpg", "two/a.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    one, two = tmp_path / "one", tmp_path / "two"
    both = find_images([two, one])
    assert both == [two / "a.jpg", one / "a.jpg", one / "b.jpg"]
    assert both.identity != find_images([one, two]).identity
    assert find_images([one]).identity == find_images(one).identity
    overlapping = find_images([one, tmp_path])
    assert overlapping == [one / "a.jpg", one / "b.jpg", two / "a.jpg"]
    with pytest.raises(ValueError, match="root must be a folder, got .*missing"):
        find_images([one, tmp_path / "missing"])


def test_a_deep_tree_needs_no_deep_stack(tmp_path):
    folder = tmp_path
    for _ in range(300):
        folder = folder / "d"
    folder.mkdir(parents=True)
    (folder / "a.jpg").write_bytes(b"")
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(150)
    try:
        assert len(find_images(tmp_path)) == 1
    finally:
        sys.setrecursionlimit(limit)
