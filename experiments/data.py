"""The sets, outside of the project: a folder laid out as `--data-root` wants it.

photos/images and caltech101/images are natural photographs, camvid/ has street scenes with masks.
What is derived from them (windows of CamVid's frames) goes to a cache folder.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

WINDOWS, WINDOW, STORED = 2500, 288, 96


def pretraining_folders(name: str, root: Path, cache: Path) -> list[Path]:
    """Folders of unlabelled images of a pre-training set."""
    if name == "photos":
        return [root / "photos/images", root / "caltech101/images"]
    if name == "camvid":
        return [street_windows(root, cache)]
    raise ValueError(f"experiments: set must be photos or camvid, got {name!r}")


def street_windows(root: Path, cache: Path) -> Path:
    """2,500 square windows of CamVid's 367 training frames, no labels, reduced to 96 pixels."""
    from PIL import Image

    folder = cache / f"camvid_windows_{WINDOWS}_{WINDOW}_{STORED}"
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
        window.resize((STORED, STORED), Image.Resampling.LANCZOS).save(partial / f"{index:04d}.png")
    return partial.rename(folder)
