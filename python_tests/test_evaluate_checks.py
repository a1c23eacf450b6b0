"""Damaged and misleading splits are told before any network runs."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest

Image = pytest.importorskip("PIL.Image")

from evaluate_data import write_labelled

from densecl_ext.evaluate import DenseData, SegmentationFolder, SegmentationOptions


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_labelled(tmp_path, {"train": 3, "val": 2}, size=(12, 16))


def load(root: Path, **changes: object) -> DenseData:
    return DenseData.load(SegmentationOptions(data=str(root), **changes))  # type: ignore[arg-type]


def split(root: Path, text: str, name: str = "val", encoding: str = "utf-8") -> None:
    (root / "splits" / f"{name}.txt").write_bytes(text.encode(encoding))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_lists_of_any_unicode(root: Path, encoding: str) -> None:
    split(root, "val1\r\n\r\nval0\r\n", encoding=encoding)
    (root / "classes.txt").write_bytes("Himmel\nStraße\nBaum\n".encode(encoding))
    data = load(root)
    assert data.val.names == ("val1", "val0") and data.class_names[:2] == ("Himmel", "Straße")


def test_what_is_no_text(root: Path) -> None:
    for content in ("val0\n".encode("utf-16-le"), b"\xffv\xfeal0\n", b"\xff\xfev"):
        (root / "splits" / "val.txt").write_bytes(content)
        with pytest.raises(ValueError, match=r"val\.txt must be a text file in UTF-8"):
            load(root)


def test_two_images_of_one_name(root: Path) -> None:
    Image.new("RGB", (16, 12)).save(root / "images" / "val0.jpg")
    with pytest.raises(ValueError, match=r"'val0' could be .*val0\.jpg or .*val0\.png"):
        load(root)
    split(root, "val0.png\nval1\n")  # the ending tells which
    assert len(load(root).val) == 2


def test_folders_in_names(root: Path) -> None:
    for folder, value in (("a", 0), ("b", 1)):
        for kind in ("images", "masks"):
            (root / kind / folder).mkdir()
        Image.new("RGB", (16, 12), (value * 90,) * 3).save(root / "images" / folder / "im0.png")
        Image.new("L", (16, 12), value).save(root / "masks" / folder / "im0.png")
    split(root, "a/im0\nb\\im0.png\n")
    data = load(root)
    assert data.val.names == ("a/im0", "b/im0")
    assert [int(label.max()) for label in data.val.labels] == [0, 1]
    split(root, "a/val0\nb/val0\n")  # only one val0 is there
    with pytest.raises(ValueError, match="twice, by 'a/val0' and 'b/val0'"):
        load(root)
    split(root, "val0\nval0.png\n")
    with pytest.raises(ValueError, match="twice"):
        load(root)
    split(root, "im0\n")
    with pytest.raises(ValueError, match="'im0', which is not in"):
        load(root)


def test_validation_is_not_training(root: Path) -> None:
    with pytest.raises(ValueError, match="3 of the 3 validation images are training images"):
        load(root, val_split="train")
    split(root, "val0\nimages/train1.png\n")
    with pytest.raises(ValueError, match="1 of the 2 .* the first is 'train1'"):
        load(root)


def test_masks_of_upper_case_endings(root: Path) -> None:
    (root / "masks" / "val0.png").rename(root / "masks" / "val0.PNG")
    (root / "images" / "val1.png").rename(root / "images" / "val1.PNG")
    assert len(load(root).val) == 2


def test_masks_of_0_and_255(root: Path) -> None:
    for name in ("val0", "val1"):
        mask = np.zeros((12, 16), np.uint8)
        mask[:, 8:] = 255
        Image.fromarray(mask).save(root / "masks" / f"{name}.png")
    with pytest.warns(UserWarning, match="0 and 255 alone, and 255 is ignored"):
        load(root)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_labelled(root, {"train": 3, "val": 2}, size=(12, 16))
        load(root)


@pytest.mark.parametrize("name", ["train", "val"])
def test_splits_without_a_label(root: Path, name: str) -> None:
    for path in (root / "masks").glob(f"{name}*.png"):
        Image.new("L", (16, 12), 255).save(path)
    with pytest.raises(ValueError, match=f"no pixel of the split '{name}' has a label"):
        load(root)


def test_too_many_classes(root: Path) -> None:
    with pytest.raises(ValueError, match="num_classes must be at most 255"):
        load(root, num_classes=256)
    (root / "classes.txt").write_text("\n".join(map(str, range(300))))
    with pytest.raises(ValueError, match="num_classes must be at most 255"):
        load(root)
    (root / "classes.txt").write_text("a\nb\n")
    with pytest.raises(ValueError, match="mask of 'train0' has the label 2.*num_classes = 2"):
        load(root)
    deep = Image.fromarray(np.full((12, 16), 300, np.uint16))
    deep.save(root / "masks" / "val0.png")
    with pytest.raises(ValueError, match=r"val0\.png must be 8-bit.*at most 255 classes"):
        load(root, num_classes=3)


def turned_image(path: Path, orientation: int, size: tuple[int, int]) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", size).save(path, exif=exif)


def test_a_turned_image_beside_a_mask_of_stored_pixels(root: Path) -> None:
    (root / "images" / "val0.png").unlink()
    turned_image(root / "images" / "val0.jpg", 6, (16, 12))  # upright it is 12 wide, 16 high
    with pytest.raises(ValueError, match=r"val0\.png .*16 x 12, got 12 x 16; .*EXIF orientation 6"):
        load(root)
    turned_image(root / "images" / "val0.jpg", 3, (16, 12))  # upside down: the size tells nothing
    with pytest.warns(UserWarning, match="1 images are turned by EXIF, the first is 'val0'"):
        load(root)


def test_damaged_files_are_named(root: Path) -> None:
    for kind in ("images", "masks"):
        path = root / kind / "val1.png"
        whole = path.read_bytes()
        for content in (whole[: len(whole) // 2], b"", b"text"):
            path.write_bytes(content)
            with pytest.raises(ValueError, match=f"{kind[:-1]} .*val1.png"):
                load(root)
        path.write_bytes(whole)
    (root / "masks" / "val1.png").unlink()
    with pytest.raises(ValueError, match=r"mask .*val1\.png is missing"):
        load(root)
    with pytest.raises(ValueError, match="no split 'test'"):
        SegmentationFolder(root, "test")
