"""The embedded data set: same bytes everywhere, labels that fit the pixels."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import scenes


def digest(seed: int, index: int) -> str:
    image, mask = scenes.render_scene(scenes.scene_rng(seed, index))
    return hashlib.sha256(image.tobytes() + mask.tobytes()).hexdigest()[:16]


def test_pixels_are_pinned() -> None:
    """A change of the drawing changes every number that was ever measured on it: say so aloud."""
    assert [digest(0, 0), digest(0, 1), digest(7, 0)] == PINNED


PINNED = ["cb0a447e737cdbc6", "c5c07fe368fdcf74", "90e63dd45c66084b"]


def test_scene_shapes_and_ids() -> None:
    image, mask = scenes.render_scene(scenes.scene_rng(3, 5), size=64)
    assert image.shape == (64, 64, 3) and image.dtype == np.uint8
    assert mask.shape == (64, 64) and mask.dtype == np.uint8
    assert mask.max() < scenes.NUM_CLASSES == len(scenes.CLASS_COLOURS)
    with pytest.raises(ValueError, match="at least 32"):
        scenes.render_scene(scenes.scene_rng(0, 0), size=16)


def test_all_classes_appear() -> None:
    drawn = [scenes.render_scene(scenes.scene_rng(0, i))[1] for i in range(60)]
    share = np.bincount(np.stack(drawn).ravel(), minlength=scenes.NUM_CLASSES) / (60 * 96 * 96)
    assert 0.3 < share[0] < 0.8
    assert share[1:].min() > 0.01


def test_colour_alone_does_not_segment() -> None:
    """The best linear map from a pixel's colour to the classes (least squares) does badly."""
    drawn = [scenes.render_scene(scenes.scene_rng(1, i)) for i in range(60)]
    colours = np.stack([image for image, _ in drawn]).reshape(-1, 3) / 255.0
    labels = np.stack([mask for _, mask in drawn]).ravel()
    inputs = np.concatenate([colours, np.ones((len(colours), 1))], axis=1)
    weights = np.linalg.lstsq(inputs, np.eye(scenes.NUM_CLASSES)[labels], rcond=None)[0]
    prediction = (inputs @ weights).argmax(axis=1)
    ious = []
    for c in range(scenes.NUM_CLASSES):
        union = ((prediction == c) | (labels == c)).sum()
        ious.append(((prediction == c) & (labels == c)).sum() / union)
    assert np.mean(ious) < 0.25


def test_sine_of_whole_turns_is_exact_enough() -> None:
    for turns in np.linspace(-1.5, 2.5, 81):
        cosine, sine = scenes._turn(float(turns))
        assert abs(cosine - np.cos(2 * np.pi * turns)) < 1e-14
        assert abs(sine - np.sin(2 * np.pi * turns)) < 1e-14


def test_written_files_do_not_depend_on_workers(tmp_path: Path) -> None:
    image_module = pytest.importorskip("PIL.Image")
    seen: list[int] = []
    one = scenes.write_scenes(tmp_path / "one", 6, seed=4, val=2, workers=1, progress=seen.append)
    two = scenes.write_scenes(tmp_path / "two", 6, seed=4, val=2, workers=2)
    assert seen == [6]
    files = sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(two) for path in two.rglob("*") if path.is_file())
    assert len(files) == 6 + 6 + 2 + 1
    for file in files:
        assert (one / file).read_bytes() == (two / file).read_bytes()
    assert (one / "splits" / "val.txt").read_text().split() == ["scene_00004", "scene_00005"]

    image, mask = scenes.render_scene(scenes.scene_rng(4, 2))
    stored = np.array(image_module.open(one / "images" / "scene_00002.png"))
    labels = np.array(image_module.open(one / "masks" / "scene_00002.png"))
    assert (stored == image).all() and (labels == mask).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"count": 0}, "count must be at least 1"),
        ({"count": 3, "val": 4}, r"val must lie in \[0, 3\]"),
        ({"count": 3, "size": 8}, "size must be at least 32"),
    ],
)
def test_write_scenes_refuses(tmp_path: Path, arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scenes.write_scenes(tmp_path / "scenes", **arguments)  # type: ignore[arg-type]
    assert not (tmp_path / "scenes").exists()
