"""`correspondence`: do the features of two views of one image find each other's places?

Two crops of every image are known, so where a cell's centre lies in the other view is known too; no
label is needed. A network that writes its own coordinates into its features matches equal indices:
the share of such matches stands beside what geometry alone gives.
"""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from densecl_ext.checkpoints import load_checkpoint
from densecl_ext.data.augmentation import KEY_VIEW, QUERY_VIEW, Augmentation, draw_parameters
from densecl_ext.data.folder import find_images
from densecl_ext.data.images import read_rgb, reason_of
from densecl_ext.evaluate.dense import NetworkInputs, recalibrate
from densecl_ext.evaluate.features import extract_features, untouched
from densecl_ext.evaluate.options import NetworkOptions, require_at_least
from densecl_ext.evaluate.report import Report
from densecl_ext.nn.matching import feature_match, geometric_match
from densecl_ext.nn.necks import DenseCLNeck

EXAMPLES = 4
"""Pairs of views in the picture."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CorrespondenceOptions(NetworkOptions):
    """Exact correspondence of two views under known crops; no labels.

    Attributes:
        data: folder of images, any tree.
        images: number of images, evenly spread over the folder; 0 takes all.
        view_size: side of a view in pixels.
        smallest_crop: least area of a crop as a share of the image's.
        colour: also change the views' colours, gray and blur them as MoCo v2 does.
    """

    data: str = ""
    images: int = 128
    view_size: int = 64
    smallest_crop: float = 0.4
    colour: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, 1, "view_size")
        require_at_least(self, 0, "images")
        if not 0.0 < self.smallest_crop <= 1.0:
            raise ValueError(
                "CorrespondenceOptions: smallest_crop must be a share of the image's area in "
                f"(0, 1], got {self.smallest_crop}"
            )


@dataclasses.dataclass(frozen=True)
class Views:
    """Two views of every image, rendered once for many networks.

    Attributes:
        query: uint8 (N, 3, S, S).
        key: uint8 (N, 3, S, S).
        query_crops: float32 (N, 5): x0, y0, x1, y1 in pixels of the image, 1 where mirrored.
        key_crops: float32 (N, 5).
        settings: what the protocol line says of the views.
    """

    query: Tensor
    key: Tensor
    query_crops: Tensor
    key_crops: Tensor
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def load(cls, options: CorrespondenceOptions) -> Views:
        """Read the images and cut their views; a pure function of files and options.

        Raises:
            ValueError: no image in the folder, or one that cannot be read.
            ImportError: torchvision or Pillow is not installed.
        """
        from densecl_ext.data.torchvision_loader import render_view

        files = find_images(options.data)
        count = min(options.images or len(files), len(files))
        chosen = [files[index * len(files) // count] for index in range(count)]
        smallest = (options.smallest_crop, 1.0)
        augmentation = Augmentation(scale=smallest)
        if not options.colour:
            augmentation = Augmentation(
                scale=smallest, jitter_probability=0.0, gray_probability=0.0, blur_probability=0.0
            )
        views: dict[int, list[Tensor]] = {QUERY_VIEW: [], KEY_VIEW: []}
        crops: dict[int, list[list[float]]] = {QUERY_VIEW: [], KEY_VIEW: []}
        for index, file in enumerate(chosen):
            try:
                image = read_rgb(file)
            except Exception as error:
                raise ValueError(f"correspondence: {file}: {reason_of(error)}") from None
            for view in (QUERY_VIEW, KEY_VIEW):
                drawn = draw_parameters(
                    augmentation, seed=options.seed, epoch=0, sample=index, view=view,
                    width=image.width, height=image.height,
                )  # fmt: skip
                pixels = torch.tensor(render_view(image, drawn, options.view_size))
                views[view].append(pixels.permute(2, 0, 1))
                crops[view].append([*map(float, drawn.box), float(drawn.flip)])
        settings = {
            "data": Path(options.data).resolve().name,
            "images": f"{count} of {len(files)}",
            "view_size": options.view_size,
            "crop_area": f"{options.smallest_crop:g}..1",
            "colour": "MoCo v2" if options.colour else "unchanged",
            "seed": options.seed,
        }
        return cls(
            torch.stack(views[QUERY_VIEW]), torch.stack(views[KEY_VIEW]),
            torch.tensor(crops[QUERY_VIEW]), torch.tensor(crops[KEY_VIEW]), settings,
        )  # fmt: skip


def correspondence(
    backbone: nn.Module,
    options: CorrespondenceOptions,
    *,
    dense_head: nn.Module | None = None,
    views: Views | None = None,
) -> Report:
    """Match every grid position of one view to the most similar one of the other.

    A position counts where its centre lies inside the other crop. ``exact`` is the share of those
    whose most similar position (cosine) is the cell that holds the centre, ``within_one`` the share
    at most one cell away from it, each way. ``same_index`` is the share matched to their own index,
    ``same_index_base`` the share for which that is right. ``position_share`` is the share of the
    unit features' variance that the mean feature of each position explains, over the first views:
    near 1 for a network that tells where, not what. ``head_*`` are the same of the dense head.

    Args:
        backbone: (N, 3, H, W) to (N, C, h, w), on the device where everything is computed; given
            back as it was.
        options: of the protocol.
        dense_head: (N, C, h, w) to (N, D, h', w'); None leaves its numbers out.
        views: what :meth:`Views.load` made with the same options; None makes them.

    Returns:
        The shares named above, and ``visible``, the share of positions that count.

    Raises:
        ValueError: data or options that do not fit, or no position that both views show.
    """
    start = time.perf_counter()
    views = views or Views.load(options)
    with untouched(backbone):
        recalibrated = recalibrate(backbone, views.query, options)
        first, second = (_features(backbone, part, options) for part in (views.query, views.key))
    settings = {
        **views.settings,
        "grid": tuple(first.shape[2:]),
        "channels": first.shape[1],
        "layers": options.layers or "last",
        "batch_norm": f"recalibrated on {recalibrated} query views" if recalibrated else "own",
        "precision": options.precision,
    }
    numbers, terms = match_shares(first, second, views.query_crops, views.key_crops)
    numbers["position_share"] = position_share(first)
    if dense_head is not None:
        with torch.no_grad(), untouched(dense_head):
            heads = [dense_head(part) for part in (first, second)]
        shares, _ = match_shares(heads[0], heads[1], views.query_crops, views.key_crops)
        numbers |= {f"head_{name}": shares[name] for name in ("exact", "within_one", "same_index")}
        numbers["head_position_share"] = position_share(heads[0])
    few = slice(0, EXAMPLES)
    _, found, distance = _matched(
        first[few], second[few], views.query_crops[few], views.key_crops[few]
    )
    query, key, grid = views.query[few], views.key[few], (first.shape[2], first.shape[3])

    def draw(png: Path) -> None:
        from densecl_ext.visualize.matches import plot_found

        plot_found(query, key, found, distance, grid, png)

    return Report(
        "correspondence",
        numbers,
        settings,
        terms=terms,
        headline=lambda sums: sums[:, 0].double() / sums[:, 1],
        draw=draw,
        seconds=time.perf_counter() - start,
    )


def load_dense_head(path: str | os.PathLike[str]) -> nn.Module | None:
    """The dense head of a run's checkpoint, on the CPU; None for a file that holds no run."""
    content = load_checkpoint(path)
    model = content.get("model") if isinstance(content, dict) else None
    prefix = "neck.dense_head."
    state = {
        name.removeprefix(prefix): value
        for name, value in (model if isinstance(model, dict) else {}).items()
        if name.startswith(prefix)
    }
    if state.keys() != {"0.weight", "0.bias", "2.weight", "2.bias"}:
        return None
    hidden, channels = state["0.weight"].shape[:2]
    head = DenseCLNeck(channels, hidden, len(state["2.weight"])).dense_head
    head.load_state_dict(state)
    return head.eval()


def match_shares(
    query: Tensor, key: Tensor, query_crops: Tensor, key_crops: Tensor
) -> tuple[dict[str, float], Tensor]:
    """Compare the most similar positions with the true ones.

    Args:
        query: features (N, C, h, w) of the first views.
        key: (N, C, h, w) of the second views.
        query_crops: (N, 5), see :func:`densecl_ext.nn.matching.geometric_match`.
        key_crops: (N, 5).

    Returns:
        ``exact``, ``within_one``, ``same_index``, ``same_index_base`` and ``visible`` as
        :func:`correspondence` tells them, and int64 (N, 2): exact matches and positions that count.

    Raises:
        ValueError: no position of any view lies inside the other.
    """
    height, width = query.shape[2:]
    truth, found, distance = _matched(query, key, query_crops, key_crops)
    counts = distance >= 0
    total = int(counts.sum())
    if not total:
        raise ValueError("correspondence: no position of a view lies inside the other view's crop")
    exact = distance == 0
    own = torch.arange(height * width)
    numbers = {
        "exact": exact,
        "within_one": (distance <= 1) & counts,
        "same_index": (found == own) & counts,
        "same_index_base": (truth == own) & counts,
    }
    shares = {name: int(hits.sum()) / total for name, hits in numbers.items()}
    shares["visible"] = total / truth.numel()
    return shares, torch.stack([exact.sum(1), counts.sum(1)], dim=1)


def _matched(
    query: Tensor, key: Tensor, query_crops: Tensor, key_crops: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """True and found index, and their distance in cells (the larger of both axes), (N, h * w).

    The distance is -1 where the position lies outside the other view.
    """
    height, width = query.shape[2:]
    truth = geometric_match(query_crops, key_crops, (height, width))
    found = feature_match(query, key).cpu()
    rows = (found // width - truth // width).abs()
    columns = (found % width - truth % width).abs()
    return truth, found, torch.where(truth >= 0, torch.maximum(rows, columns), -1)


def position_share(features: Tensor) -> float:
    """Share of the variance of unit features that is explained by the grid position.

    The variance of the positions' mean features over the whole variance, both about the mean of
    all. A network without a position code gives about 1 / N, the noise of a mean of N images.

    Args:
        features: (N, C, h, w).

    Returns:
        A share in [0, 1]; NaN where the features do not vary at all.
    """
    unit = F.normalize(features.double().flatten(2), dim=1)  # (N, C, S)
    centred = unit - unit.mean(dim=(0, 2), keepdim=True)
    total = centred.square().sum(1).mean()
    by_position = centred.mean(0).square().sum(0).mean()
    return float(by_position / total) if total > 1e-20 else float("nan")


@torch.no_grad()
def _features(backbone: nn.Module, images: Tensor, options: CorrespondenceOptions) -> Tensor:
    inputs = NetworkInputs(backbone, images, options)
    return torch.cat(
        [extract_features(backbone, x, options.layers, precision=options.precision) for x in inputs]
    ).contiguous()
