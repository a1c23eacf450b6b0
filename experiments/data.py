"""The sets: a folder laid out as `--data-root` wants it, or small copies of it in a few files.

    python -m experiments.data --data-root DATA --out PACKED [--size 128]

`DATA` holds photos/images, caltech101/{images,labels.csv} (natural photographs), detect/{images,
raccoon_train.json, raccoon_val.json} and camvid/{images,masks,splits} (street scenes with masks).
`PACKED` holds the same at the sizes that experiments with views of `--size` use, so that they can
be repeated on a machine to which little can be copied: `--data-root PACKED` works alike.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from densecl_ext.data import find_images
from densecl_ext.evaluate.folder import SegmentationFolder
from densecl_ext.evaluate.pixels import resize

WINDOWS, WINDOW = 2500, 288
STREET = (180, 240)  # height and width at which CamVid is measured
PAIRS = 128  # photographs of which two crops are matched
STREET_QUALITY = 90
PACKS = ("photos", "windows", "camvid", "correspondence", "detect")


def stored(size: int) -> int:
    """Shorter side, in pixels, at which images are kept for views of this size."""
    return max(96, size + size // 8)


def pretraining_folders(name: str, root: Path, cache: Path, size: int = 64) -> list[Path]:
    """Folders of unlabelled images of a pre-training set, for views of this size."""
    if name == "photos":
        return [root / "photos/images", root / "caltech101/images"]
    if name == "camvid":
        packed = root / "windows"
        return [packed if packed.is_dir() else street_windows(root, cache, stored(size))]
    raise ValueError(f"experiments: set must be photos or camvid, got {name!r}")


def correspondence_folder(root: Path) -> Path:
    """Folder of the photographs that correspondence is measured on, at their full size."""
    packed = root / "correspondence"
    return packed if packed.is_dir() else root / "photos/images"


def street_windows(root: Path, cache: Path, side: int) -> Path:
    """2,500 square windows of CamVid's 367 training frames, no labels, reduced to this side."""
    folder = cache / f"camvid_windows_{WINDOWS}_{WINDOW}_{side}"
    if folder.is_dir():
        return folder
    partial = folder.with_suffix(".partial")
    partial.mkdir(parents=True, exist_ok=True)
    names = (root / "camvid/splits/train.txt").read_text().split()
    frames = [Image.open(root / f"camvid/images/{name}.jpg").convert("RGB") for name in names]
    rng = np.random.default_rng(5)
    for index in range(WINDOWS):
        frame = frames[rng.integers(len(frames))]
        x = int(rng.integers(frame.width - WINDOW + 1))
        y = int(rng.integers(frame.height - WINDOW + 1))
        window = frame.crop((x, y, x + WINDOW, y + WINDOW))
        window.resize((side, side), Image.Resampling.LANCZOS).save(partial / f"{index:04d}.png")
    return partial.rename(folder)


def prepared(root: Path, cache: Path, sets: set[tuple[str, int]]) -> Path:
    """The root with everything in place that runs on these sets and sizes read: unpacked, cut."""
    if (root / f"{PACKS[0]}.zip").is_file():
        packs = [root / f"{name}.zip" for name in PACKS if (root / f"{name}.zip").is_file()]
        stamp = max(int(path.stat().st_mtime) for path in packs)
        folder = cache / f"unpacked_{stamp}"
        if not folder.is_dir():
            cache.mkdir(parents=True, exist_ok=True)
            partial = Path(tempfile.mkdtemp(dir=cache))
            for path in packs:
                with zipfile.ZipFile(path) as archive:
                    archive.extractall(partial)
            partial.rename(folder)
        root = folder
    for name, size in sets:
        pretraining_folders(name, root, cache, size)
    return root


def pack(root: Path, out: Path, size: int, quality: int) -> None:
    """Write the small copies: a zip file each of the photographs, the windows, CamVid, the pairs.

    Photographs are reduced as the loader would, CamVid as its evaluation would; WebP changes both a
    little. The photographs for correspondence stay as they are.
    """
    out.mkdir(parents=True, exist_ok=True)
    kept = stored(size)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        for folder in ("photos/images", "caltech101/images"):
            for path in find_images(root / folder):
                image = Image.open(path).convert("RGB")
                short = min(image.size)
                if short > kept:
                    width, height = (max(1, round(side * kept / short)) for side in image.size)
                    image = image.resize((width, height), Image.Resampling.BICUBIC)
                save(image, work / "photos" / path.relative_to(root), quality)
        table = (root / "caltech101/labels.csv").read_text()
        (work / "photos/caltech101/labels.csv").write_text(table.replace(".jpg,", ".webp,"))
        for path in find_images(street_windows(root, work, kept)):
            save(Image.open(path), work / "windows/windows" / path.name, quality)
        street(root / "camvid", work / "camvid/camvid")
        photos = find_images(root / "photos/images")
        count = min(PAIRS, len(photos))
        chosen = [photos[index * len(photos) // count] for index in range(count)]
        (work / "correspondence/correspondence").mkdir(parents=True)
        for path in chosen:
            shutil.copy(path, work / "correspondence/correspondence" / path.name)
        raccoons(root / "detect", work / "detect/detect")
        for pack_name in PACKS:
            with zipfile.ZipFile(out / f"{pack_name}.zip", "w") as archive:
                for path in sorted((work / pack_name).rglob("*")):
                    if path.is_file():
                        archive.write(path, path.relative_to(work / pack_name))
            taken = os.path.getsize(out / f"{pack_name}.zip") / 1e6
            print(f"{pack_name}: {taken:.1f} MB", flush=True)


def raccoons(detect: Path, out: Path) -> None:
    """The images with boxes, and the files that say where these are."""
    for split in ("raccoon_train", "raccoon_val"):
        truth = json.loads((detect / f"{split}.json").read_text())
        for entry in truth["images"]:
            name = Path(entry["file_name"]).with_suffix(".webp")
            save(Image.open(detect / "images" / entry["file_name"]), out / "images" / name, 75)
            entry["file_name"] = str(name)
        (out / f"{split}.json").write_text(json.dumps(truth))


def street(camvid: Path, out: Path) -> None:
    """CamVid's images and masks at the size of the evaluation, resized as it does."""
    (out / "masks").mkdir(parents=True)
    shutil.copytree(camvid / "splits", out / "splits")
    if (camvid / "classes.txt").is_file():
        shutil.copy(camvid / "classes.txt", out)
    for split in sorted(path.stem for path in (camvid / "splits").glob("*.txt")):
        folder = SegmentationFolder(camvid, split)
        for index, name in enumerate(folder.names):
            image, label = resize(*folder[index], STREET)
            pixels = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
            save(pixels, out / f"images/{name}", STREET_QUALITY)
            Image.fromarray(label.to(torch.uint8).numpy()).save(
                out / f"masks/{name}.png", optimize=True
            )


def save(image: Image.Image, path: Path, quality: int) -> None:
    """As WebP, which at these sizes takes three quarters of what an equally good JPEG takes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path.with_suffix(".webp"), quality=quality)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.data", description=__doc__)
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", type=int, default=64, help="of the views")
    parser.add_argument("--quality", type=int, default=90, help="of the photographs and windows")
    given = parser.parse_args(arguments)
    pack(given.data_root.resolve(), given.out.resolve(), given.size, given.quality)


if __name__ == "__main__":
    main()
