"""The embedded data set: small scenes of textured objects with pixel labels, drawn from a seed.

A scene holds a few large objects and some decoys before a cluttered, near-grey background. A class
is a texture, a silhouette and a hue that it tends to; size, rotation, texture scale and phase,
saturation, brightness, contrast, lighting, tint, occlusion and noise are drawn anew for each object
or scene, and decoys carry the silhouettes without texture. A segmentation needs features that set
these nuisances aside, which is what contrastive pre-training can learn without labels.

The pixels are the same bytes on every machine. Every number comes from ``Generator.random`` of a
stream keyed by ``(seed, index)``, and the drawing uses only operations that IEEE 754 rounds exactly
(+ - * /, square root, floor, comparisons): library sines and matrix products, which differ between
processors, are not used.
"""

from __future__ import annotations

import math
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

CLASS_NAMES = (
    "background",
    "stripes",
    "checks",
    "dots",
    "rings",
    "bricks",
    "zigzag",
    "mesh",
)
"""Class names; the index is the label's id."""

NUM_CLASSES = len(CLASS_NAMES)
CLASS_COLOURS = (
    (32, 33, 36),
    (230, 25, 75),
    (60, 180, 75),
    (255, 225, 25),
    (0, 130, 200),
    (245, 130, 48),
    (145, 30, 180),
    (70, 240, 240),
)
"""RGB of each class in the masks' palette."""

SCENE_SIZE = 96
_SUPERSAMPLING = 2

Array = NDArray[np.float64]


def _turn(turns: float) -> tuple[float, float]:
    """Cosine and sine of ``turns`` full turns, from arithmetic that rounds the same everywhere."""
    x = (turns - math.floor(turns)) * 4.0
    quadrant = int(x)
    x = (x - quadrant) * 1.5707963267948966
    y = x * x
    sine, cosine, term_s, term_c = 0.0, 0.0, x, 1.0
    for n in range(1, 11):  # Taylor series on [0, pi/2]: the 10th term is below 1e-17
        sine += term_s
        cosine += term_c
        term_s *= -y / ((2 * n) * (2 * n + 1))
        term_c *= -y / ((2 * n - 1) * (2 * n))
    for _ in range(quadrant):
        cosine, sine = -sine, cosine
    return cosine, sine


def _polygon(radii: Sequence[float], start: float = 0.0) -> Array:
    """Vertices (V, 2) at equal angles with the given distances from the centre."""
    points = []
    for i, radius in enumerate(radii):
        c, s = _turn(start + i / len(radii))
        points.append((radius * c, radius * s))
    return np.array(points)


def _cross(arm: float) -> Array:
    a, b = 1.0, arm
    return np.array(
        [(b, a), (b, b), (a, b), (a, -b), (b, -b), (b, -a), (-b, -a), (-b, -b), (-a, -b), (-a, b)]
        + [(-b, b), (-b, a)]
    )


_SILHOUETTES: tuple[Array, ...] = (
    _polygon([1.0] * 24) * np.array([1.0, 0.7]),  # ellipse: stripes
    _polygon([1.1] * 4, 0.125),  # square: checks
    _polygon([1.2] * 3),  # triangle: dots
    _polygon([1.0] * 24),  # disc: rings
    _polygon([1.15] * 4, 0.125) * np.array([1.15, 0.65]),  # slab: bricks
    _polygon([1.15, 0.6] * 5),  # star: zigzag
    _cross(0.45),  # cross: mesh
)


def _wave(x: Array) -> Array:
    """Triangle wave of period 1 in [0, 1]."""
    return 2.0 * np.abs(x - np.floor(x) - 0.5)


def _step(x: Array, sharpness: float = 4.0) -> Array:
    """Soft threshold at 0.5, into [0, 1]."""
    return np.clip((x - 0.5) * sharpness + 0.5, 0.0, 1.0)


def _stripes(s: Array, t: Array) -> Array:
    return _step(_wave(s))


def _checks(s: Array, t: Array) -> Array:
    a, b = _step(_wave(s * 0.75)), _step(_wave(t * 0.75))
    return a + b - 2.0 * a * b


def _dots(s: Array, t: Array) -> Array:
    u, v = s - np.floor(s) - 0.5, t - np.floor(t) - 0.5
    return np.clip((0.34 - np.sqrt(u * u + v * v)) * 8.0 + 0.5, 0.0, 1.0)


def _rings(s: Array, t: Array) -> Array:
    return _step(_wave(np.sqrt(s * s + t * t)))


def _bricks(s: Array, t: Array) -> Array:
    row = np.floor(t)
    shifted = 0.5 * s + 0.5 * (row - 2.0 * np.floor(0.5 * row))
    u = np.abs(shifted - np.floor(shifted) - 0.5) * 2.0  # half-widths of a brick
    v = np.abs(t - row - 0.5)
    return np.clip((0.5 - np.maximum(u - 0.5, v)) * 10.0 - 1.0, 0.0, 1.0)


def _zigzag(s: Array, t: Array) -> Array:
    return _step(_wave(s + 0.9 * _wave(t * 0.6)))


def _mesh(s: Array, t: Array) -> Array:
    u, v = np.abs(s - np.floor(s) - 0.5), np.abs(t - np.floor(t) - 0.5)
    return np.clip((0.2 - np.minimum(u, v)) * 9.0 + 0.5, 0.0, 1.0)


_TEXTURES: tuple[Callable[[Array, Array], Array], ...] = (
    _stripes,
    _checks,
    _dots,
    _rings,
    _bricks,
    _zigzag,
    _mesh,
)


def _smooth_noise(rng: np.random.Generator, height: int, width: int, cell: float) -> Array:
    """Bilinear value noise (height, width) in [0, 1) with grid cells of ``cell`` pixels."""
    y = (np.arange(height) + rng.random()) / cell
    x = (np.arange(width) + rng.random()) / cell
    iy, ix = np.floor(y).astype(np.intp), np.floor(x).astype(np.intp)
    grid = rng.random((int(iy[-1]) + 2, int(ix[-1]) + 2))
    fy, fx = (y - iy)[:, None], (x - ix)[None, :]
    rows = grid[iy] * (1.0 - fy) + grid[iy + 1] * fy
    return rows[:, ix] * (1.0 - fx) + rows[:, ix + 1] * fx


def _hue(turns: float) -> Array:
    """RGB of a fully saturated hue, (3,) in [0, 1]; turns from red over green and blue."""
    x = 6.0 * (turns - math.floor(turns))
    return np.clip(np.abs((x + np.array([0.0, 4.0, 2.0])) % 6.0 - 3.0) - 1.0, 0.0, 1.0)


def _object_colours(rng: np.random.Generator, turns: float) -> tuple[Array, Array]:
    """The dark and the light colour of one object: a hue near ``turns``, washed out and dimmed."""
    hue = _hue(turns + 0.12 * (rng.random() - 0.5))
    saturation = 0.4 + 0.5 * rng.random()
    light = (0.35 + 0.65 * rng.random()) * (1.0 - saturation + saturation * hue)
    return (0.3 + 0.4 * rng.random()) * light, light


def _ground_colours(rng: np.random.Generator) -> tuple[Array, Array]:
    """Two near-grey colours of a background or a decoy."""
    tints = 0.15 * (rng.random((2, 3)) - 0.5)
    return 0.15 + 0.7 * rng.random() + tints[0], 0.15 + 0.7 * rng.random() + tints[1]


def _inside(polygon: Array, u: Array, v: Array) -> NDArray[np.bool_]:
    """Even-odd rule: which points (u, v) lie inside the polygon (V, 2)."""
    inside = np.zeros(u.shape, dtype=bool)
    x0, y0 = polygon[-1]
    for x1, y1 in polygon:
        if y0 != y1:
            crosses = (v < y0) != (v < y1)
            inside ^= crosses & (u < (x1 - x0) * (v - y0) / (y1 - y0) + x0)
        x0, y0 = x1, y1
    return inside


def _halve(x: Array) -> Array:
    """Mean over 2 x 2 blocks of the two leading axes."""
    return 0.25 * (x[0::2, 0::2] + x[1::2, 0::2] + x[0::2, 1::2] + x[1::2, 1::2])


def _paste(
    rng: np.random.Generator,
    image: Array,
    mask: NDArray[np.uint8],
    label: int,
    radius: float,
    spread: float = 1.0,
) -> None:
    """Draw one object (label > 0) or decoy (label 0) into image (H, W, 3) and mask (H, W).

    ``spread`` is the share of the scene, about its middle, in which the centre may lie.
    """
    height, width = mask.shape
    cx = (0.5 + spread * (rng.random() - 0.5)) * width
    cy = (0.5 + spread * (rng.random() - 0.5)) * height
    extent = 1.35 * radius
    x0, x1 = max(0, int(cx - extent)), min(width, int(cx + extent) + 1)
    y0, y1 = max(0, int(cy - extent)), min(height, int(cy + extent) + 1)
    offsets = (np.arange(_SUPERSAMPLING) + 0.5) / _SUPERSAMPLING
    x = (np.arange(x0, x1)[:, None] + offsets).reshape(1, -1) - cx
    y = (np.arange(y0, y1)[:, None] + offsets).reshape(-1, 1) - cy

    c, s = _turn(rng.random())
    u, v = (c * x + s * y) / radius, (c * y - s * x) / radius
    silhouette = label - 1 if label else int(rng.random() * len(_SILHOUETTES))
    cover = _inside(_SILHOUETTES[silhouette], u, v).astype(np.float64)  # (2h, 2w)

    if label:
        first, second = _object_colours(rng, (label - 1) / (NUM_CLASSES - 1))
    else:
        first, second = _ground_colours(rng)
    period = width * (0.08 + 0.07 * rng.random())  # pixels
    tc, ts = _turn(rng.random())
    if label == 0:
        blend = _smooth_noise(rng, u.shape[0], u.shape[1], 6.0 + 40.0 * rng.random())
    elif CLASS_NAMES[label] == "rings":
        blend = _TEXTURES[label - 1](x / period + 0.0 * y, y / period + 0.0 * x)
    else:
        phase_s, phase_t = rng.random(), rng.random()
        blend = _TEXTURES[label - 1](
            (tc * x + ts * y) / period + phase_s, (tc * y - ts * x) / period + phase_t
        )
    shade = np.clip(0.85 + 0.3 * (rng.random() - 0.5) + 0.25 * u, 0.4, 1.2)  # light from one side
    colour = (first + (second - first) * blend[..., None]) * shade[..., None]  # (2h, 2w, 3)

    alpha = _halve(cover)  # (h, w)
    drawn = _halve(colour * cover[..., None])
    window = (slice(y0, y1), slice(x0, x1))
    image[window] = image[window] * (1.0 - alpha[..., None]) + drawn
    mask[window][alpha >= 0.5] = label


def render_scene(
    rng: np.random.Generator, size: int = SCENE_SIZE
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Draw one scene.

    Args:
        rng: source of every choice; only its ``random`` method is used.
        size: height and width in pixels, at least 32.

    Returns:
        The image (size, size, 3) uint8 RGB and the mask (size, size) uint8 of class ids
        (:data:`CLASS_NAMES`; 0 is background).

    Raises:
        ValueError: when ``size`` is below 32.
    """
    if size < 32:
        raise ValueError(f"render_scene: size must be at least 32 pixels, got {size}")
    first, second = _ground_colours(rng)
    coarse = _smooth_noise(rng, size, size, size * (0.15 + 0.5 * rng.random()))
    image = first + (second - first) * coarse[..., None]  # (H, W, 3)
    grain = 0.25 * rng.random()
    fine = _smooth_noise(rng, size, size, 1.5 + 6.0 * rng.random())
    image = image + grain * (fine[..., None] - 0.5)
    mask = np.zeros((size, size), dtype=np.uint8)

    for _ in range(1 + int(2 * rng.random())):
        _paste(rng, image, mask, 0, size * (0.06 + 0.12 * rng.random()))
    for _ in range(2 + int(2 * rng.random())):
        label = 1 + int((NUM_CLASSES - 1) * rng.random())
        _paste(rng, image, mask, label, size * (0.2 + 0.16 * rng.random()))

    light = 0.75 + 0.5 * _smooth_noise(rng, size, size, float(size))
    tint = 0.85 + 0.3 * rng.random(3)
    noise = rng.random((size, size, 3)) + rng.random((size, size, 3)) - 1.0  # triangular, mean 0
    image = image * light[..., None] * tint + 0.04 * noise
    return np.floor(np.clip(image, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8), mask


def scene_rng(seed: int, index: int) -> np.random.Generator:
    """The random stream of scene ``index`` of the set ``seed``: independent of all others."""
    return np.random.Generator(np.random.PCG64([seed, index]))


def _write_one(index: int, *, root: Path, seed: int, size: int) -> None:
    from PIL import Image

    image, mask = render_scene(scene_rng(seed, index), size)
    name = scene_name(index)
    Image.fromarray(image).save(root / "images" / f"{name}.png", compress_level=1)
    labels = Image.fromarray(mask)
    labels.putpalette([value for colour in CLASS_COLOURS for value in colour])
    labels.save(root / "masks" / f"{name}.png", compress_level=1)


def scene_name(index: int) -> str:
    """File name, without extension, of scene ``index``."""
    return f"scene_{index:05d}"


def write_scenes(
    root: str | os.PathLike[str],
    count: int,
    seed: int = 0,
    *,
    val: int | None = None,
    size: int = SCENE_SIZE,
    workers: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Path:
    """Draw scenes into a folder that pre-training and the linear probe both read.

    Writes ``images/scene_00000.png`` and on (RGB), ``masks/`` (palette PNG of class ids),
    ``splits/train.txt`` and ``splits/val.txt`` (names, the last ``val`` scenes are for validation)
    and ``classes.txt``. Existing files of these names are replaced. The pixels depend on ``seed``,
    ``size`` and the scene's index alone.

    Args:
        root: the folder; made if missing.
        count: number of scenes, validation included.
        seed: of the whole set.
        val: number of scenes in the validation split; None takes a tenth.
        size: height and width in pixels, at least 32.
        workers: processes that draw; None takes one per core, 0 or 1 draws in this process.
        progress: called with the number of scenes done, now and then.

    Returns:
        ``root`` as a path.

    Raises:
        ValueError: ``count`` is below 1, ``size`` is below 32, or ``val`` is not in [0, count].
        OSError: a file cannot be written.
    """
    if count < 1:
        raise ValueError(f"write_scenes: count must be at least 1, got {count}")
    if size < 32:
        raise ValueError(f"write_scenes: size must be at least 32 pixels, got {size}")
    val = count // 10 if val is None else val
    if not 0 <= val <= count:
        raise ValueError(f"write_scenes: val must lie in [0, {count}], got {val}")
    root = Path(root)
    for folder in ("images", "masks", "splits"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    draw = partial(_write_one, root=root, seed=seed, size=size)
    processes = (os.cpu_count() or 1) if workers is None else workers
    tell = progress or (lambda done: None)
    if processes > 1:
        # spawn: a fork would copy whatever threads the caller has running
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(processes, mp_context=context) as pool:
            for done, _ in enumerate(pool.map(draw, range(count), chunksize=32), start=1):
                if done % 100 == 0 or done == count:
                    tell(done)
    else:
        for index in range(count):
            draw(index)
            if (index + 1) % 100 == 0 or index + 1 == count:
                tell(index + 1)
    names = [scene_name(index) for index in range(count)]
    for split, part in (("train", names[: count - val]), ("val", names[count - val :])):
        (root / "splits" / f"{split}.txt").write_text("".join(f"{name}\n" for name in part))
    (root / "classes.txt").write_text("".join(f"{name}\n" for name in CLASS_NAMES))
    return root
