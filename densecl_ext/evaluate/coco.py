"""Images with boxes: a COCO json beside a folder of images."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from densecl_ext.data.images import read_rgb, reason_of


@dataclasses.dataclass(frozen=True)
class BoxedImages:
    """Images with boxes, in memory.

    Attributes:
        images: uint8 (3, H, W), of any sizes.
        boxes: float32 (n, 4) for each image: x0, y0, x1, y1 in pixels.
        labels: int64 (n,) for each image, from 1 on: an index into ``categories``.
        image_ids: the json's.
        categories: (id, name) in the order of the ids.
        truth: the json, with which the result is compared.
    """

    images: list[Tensor]
    boxes: list[Tensor]
    labels: list[Tensor]
    image_ids: list[int]
    categories: tuple[tuple[int, str], ...]
    truth: dict[str, Any]

    def __len__(self) -> int:
        return len(self.images)

    @classmethod
    def load(cls, annotations: Path, images: Path, limit: int = 0) -> BoxedImages:
        """Read a COCO json and its images; crowds are for evaluation alone.

        Args:
            annotations: the json.
            images: folder to which its ``file_name`` are relative.
            limit: take at most this many images, evenly spread; 0 takes all.

        Raises:
            ValueError: not a COCO json, a box without an area or outside its image, an image that
                is missing, cannot be read, or has another size than the json says.
        """
        if not annotations.is_file():
            raise ValueError(f"detection: there is no file {annotations}")
        try:
            truth = json.loads(annotations.read_text(encoding="utf-8-sig"))
            listed, marks = truth["images"], truth["annotations"]
            categories = tuple(sorted((int(c["id"]), str(c["name"])) for c in truth["categories"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"detection: {annotations} is no COCO json with images, annotations and "
                f"categories: {type(error).__name__}: {error}"
            ) from None
        if limit and limit < len(listed):
            listed = [listed[index * len(listed) // limit] for index in range(limit)]
        if not listed or not categories:
            raise ValueError(f"detection: {annotations} must have an image and a category")
        index_of = {identity: index for index, (identity, _) in enumerate(categories, start=1)}
        marked: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in listed}
        for mark in marks:
            if mark["category_id"] not in index_of:
                raise ValueError(
                    f"detection: {annotations}: annotation {mark.get('id')} has category "
                    f"{mark['category_id']}, which is not listed"
                )
            if mark["image_id"] in marked:
                marked[mark["image_id"]].append(mark)
        pixels, boxes, labels = [], [], []
        for entry in listed:
            pixels.append(_read(images / entry["file_name"], entry))
            kept = [mark for mark in marked[entry["id"]] if not mark.get("iscrowd", 0)]
            rows = torch.tensor([mark["bbox"] for mark in kept], dtype=torch.float32)
            rows = rows.reshape(-1, 4)
            rows[:, 2:] += rows[:, :2]  # x, y, width, height to corners
            height, width = pixels[-1].shape[1:]
            rows[:, 0::2].clamp_(0, width)
            rows[:, 1::2].clamp_(0, height)
            if bool((rows[:, 2:] <= rows[:, :2]).any()):
                raise ValueError(
                    f"detection: {annotations}: {entry['file_name']} has a box without an area "
                    f"inside its {width} x {height} pixels"
                )
            boxes.append(rows)
            ids = [index_of[mark["category_id"]] for mark in kept]
            labels.append(torch.tensor(ids, dtype=torch.int64))
        chosen = {entry["id"] for entry in listed}
        truth = {
            "info": {},
            "images": listed,
            "annotations": [_complete(mark) for mark in marks if mark["image_id"] in chosen],
            "categories": truth["categories"],
        }
        return cls(pixels, boxes, labels, [e["id"] for e in listed], categories, truth)


def average_precision(data: BoxedImages, found: list[dict[str, Tensor]]) -> dict[str, float]:
    """COCO's average precision, by pycocotools.

    Args:
        data: the images.
        found: for each image, ``boxes`` (n, 4) as corners, ``labels`` (n,), ``scores`` (n,).

    Returns:
        ``ap`` (mean over IoU .5 to .95), ``ap50``, ``ap75``; 0 where nothing was found, NaN where
        there is no box to find.

    Raises:
        ImportError: pycocotools is not installed.
    """
    import contextlib
    import io

    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError as error:
        raise ImportError(
            f"detection: average precision needs pycocotools ({error}); install the extra: "
            "pip install 'densecl_ext[evaluate]'"
        ) from None
    results = []
    for identity, one in zip(data.image_ids, found, strict=True):
        for box, label, score in zip(
            one["boxes"].tolist(), one["labels"].tolist(), one["scores"].tolist(), strict=True
        ):
            x0, y0, x1, y1 = box
            results.append(
                {
                    "image_id": identity,
                    "category_id": data.categories[label - 1][0],
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "score": score,
                }
            )
    names = ("ap", "ap50", "ap75")
    if not results:
        return dict.fromkeys(names, 0.0 if data.truth["annotations"] else float("nan"))
    with contextlib.redirect_stdout(io.StringIO()):  # it reports its progress there
        truth = COCO()
        truth.dataset = data.truth
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    values = [float(value) for value in evaluation.stats[:3]]
    return dict(zip(names, (v if v >= 0.0 else float("nan") for v in values), strict=True))


def _complete(mark: dict[str, Any]) -> dict[str, Any]:
    """An annotation with the two entries that pycocotools insists on."""
    area = mark["bbox"][2] * mark["bbox"][3]
    return {**mark, "iscrowd": mark.get("iscrowd", 0), "area": mark.get("area", area)}


def _read(path: Path, entry: dict[str, Any]) -> Tensor:
    import numpy as np

    if not path.is_file():
        raise ValueError(f"detection: the image {path} is missing")
    try:
        image = read_rgb(path)
    except Exception as error:
        raise ValueError(f"detection: {path}: {reason_of(error)}") from None
    said = (entry.get("width", image.width), entry.get("height", image.height))
    if said != image.size:
        raise ValueError(
            f"detection: {path} has {image.width} x {image.height} pixels, the json says "
            f"{said[0]} x {said[1]}; boxes belong to the upright image"
        )
    return torch.tensor(np.array(image)).permute(2, 0, 1)
