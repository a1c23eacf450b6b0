"""Classification, fine-tuning and detection, end to end on tiny data with planted answers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("torchvision")
pytest.importorskip("torchmetrics")

from evaluate_data import COLOURS, MeanColour, Normed, write_labelled

from densecl_ext.evaluate.classification import (
    ClassifiedImages,
    KnnOptions,
    LinearOptions,
    knn,
    linear,
)
from densecl_ext.evaluate.coco import BoxedImages, average_precision
from densecl_ext.evaluate.detection import DetectionOptions, detection, pyramid_levels
from densecl_ext.evaluate.finetune import FinetuneOptions, finetune

NAMES = ("red", "green", "blue")


@pytest.fixture(scope="module")
def coloured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """labels.csv and images/: a class is a colour, images of several sizes."""
    root = tmp_path_factory.mktemp("coloured")
    (root / "images").mkdir()
    rng = np.random.default_rng(0)
    lines = ["file,label"]
    for index in range(30):
        pixels = np.array(COLOURS[index % 3]) + rng.integers(-30, 31, (20 + index, 30, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / f"images/{index}.png")
        lines.append(f"{index}.png,{NAMES[index % 3]}")
    (root / "labels.csv").write_text("\n".join(lines) + "\n")
    return root


def test_knn_and_linear_know_colours(coloured: Path) -> None:
    report = knn(MeanColour(), KnnOptions(data=str(coloured), image_size=16, neighbours=5))
    assert report.numbers["accuracy"] == report.numbers["mean_class_accuracy"] == 1.0
    assert "leave-one-out" in report.line and report.terms is not None and len(report.terms) == 30
    split = knn(MeanColour(), KnnOptions(data=str(coloured), image_size=16, val_share=0.3))
    assert "21/9 by class and seed 0" in split.line and split.value == 1.0
    solved = linear(MeanColour(), LinearOptions(data=str(coloured), image_size=16))
    assert solved.value == 1.0 and "15/15" in solved.line
    json.dumps(solved.to_dict(), allow_nan=False)


def test_an_image_is_no_neighbour_of_itself() -> None:
    """Pairs of equal images with different labels: each one's nearest neighbour is wrong."""
    images = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8)
    data = ClassifiedImages(
        torch.cat([images, images]), torch.tensor([0] * 6 + [1] * 6), ("a", "b")
    )
    report = knn(MeanColour(), KnnOptions(neighbours=1), data=data)
    assert report.value == 0.0


def test_labels_by_subfolder(tmp_path: Path) -> None:
    for index, colour in enumerate(COLOURS):
        (tmp_path / NAMES[index]).mkdir()
        for copy in range(4):
            Image.new("RGB", (20, 20), colour).save(tmp_path / NAMES[index] / f"{copy}.png")
    data = ClassifiedImages.load(KnnOptions(data=str(tmp_path), image_size=8))
    assert data.class_names == ("blue", "green", "red") and len(data.images) == 12
    report = knn(MeanColour(), KnnOptions(neighbours=2, image_size=8), data=data)
    assert report.value == 1.0
    Image.new("RGB", (8, 8)).save(tmp_path / "loose.png")
    with pytest.raises(ValueError, match="one subfolder a class"):
        ClassifiedImages.load(KnnOptions(data=str(tmp_path)))


def test_classification_refuses(coloured: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="val_share"):
        LinearOptions(val_share=0.0)
    (tmp_path / "images").mkdir()
    (tmp_path / "labels.csv").write_text("file,label\nnot.png,a\n")
    with pytest.raises(ValueError, match="not.png, which is no file"):
        ClassifiedImages.load(KnnOptions(data=str(tmp_path)))
    (tmp_path / "labels.csv").write_text("name\n")
    with pytest.raises(ValueError, match="columns file and label"):
        ClassifiedImages.load(KnnOptions(data=str(tmp_path)))


def test_finetuning_learns_and_leaves_the_network(tmp_path: Path) -> None:
    root = write_labelled(tmp_path, {"train": 8, "val": 4})
    torch.manual_seed(0)
    network = Normed().eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    options = FinetuneOptions(
        data=str(root), labelled=4, iterations=60, batch_size=4, lr=0.1, seed=1
    )
    report = finetune(network, options)
    assert report.value > 0.8 and "labelled=4 of 8" in report.line
    assert finetune(network, options).terms.equal(report.terms)  # type: ignore[union-attr]
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())
    assert not any(module.training for module in network.modules())
    with pytest.raises(ValueError, match="layers must be empty"):
        FinetuneOptions(layers=("a",))


# ---------------------------------------------------------------- detection


def write_boxes(root: Path, counts: dict[str, int]) -> Path:
    """Gray images with one red and perhaps one blue square."""
    (root / "images").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for split, count in counts.items():
        content: dict[str, list[dict[str, object]]] = {
            "images": [],
            "annotations": [],
            "categories": [{"id": 7, "name": "red"}, {"id": 3, "name": "blue"}],
        }
        for index in range(count):
            pixels = np.full((64, 80, 3), 120, np.uint8)
            for category, colour in ((7, COLOURS[0]), (3, COLOURS[2]))[: 1 + index % 2]:
                side = int(rng.integers(20, 30))
                x = int(rng.integers(0, 40 - side)) + (40 if category == 3 else 0)
                y = int(rng.integers(0, 64 - side))
                pixels[y : y + side, x : x + side] = colour
                content["annotations"].append(
                    {
                        "id": len(content["annotations"]) + 1, "image_id": index,
                        "category_id": category, "bbox": [x, y, side, side],
                    }
                )  # fmt: skip
            name = f"{split}{index}.png"
            Image.fromarray(pixels).save(root / "images" / name)
            content["images"].append({"id": index, "file_name": name, "width": 80, "height": 64})
        (root / f"{split}.json").write_text(json.dumps(content))
    return root


def test_average_precision_of_known_boxes(tmp_path: Path) -> None:
    pytest.importorskip("pycocotools")
    root = write_boxes(tmp_path, {"val": 4})
    data = BoxedImages.load(root / "val.json", root / "images")
    assert data.categories == ((3, "blue"), (7, "red")) and data.labels[1].tolist() == [2, 1]
    perfect = [
        {"boxes": boxes, "labels": labels, "scores": torch.ones(len(labels))}
        for boxes, labels in zip(data.boxes, data.labels, strict=True)
    ]
    assert average_precision(data, perfect)["ap"] == pytest.approx(1.0)
    shifted = [{**one, "boxes": one["boxes"] + 60.0} for one in perfect]
    assert average_precision(data, shifted)["ap"] == 0.0
    right = torch.tensor([1.0, 0.0, 1.0, 0.0]) / 8.0  # by an eighth of the side
    near = [
        {**one, "boxes": one["boxes"] + (one["boxes"][:, 2:3] - one["boxes"][:, :1]) * right}
        for one in perfect
    ]
    some = average_precision(data, near)  # IoU 7 / 9 = .78: right up to .75
    assert some["ap50"] == pytest.approx(1.0) and some["ap"] == pytest.approx(0.6)
    nothing = [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0), "scores": torch.zeros(0)}]
    assert average_precision(data, nothing * 4)["ap"] == 0.0


def test_detection_end_to_end(tmp_path: Path) -> None:
    pytest.importorskip("pycocotools")
    root = write_boxes(tmp_path, {"train": 6, "val": 2})
    torch.manual_seed(0)
    network = Normed(8).eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    options = DetectionOptions(
        data=str(root), image_size=64, largest=80, iterations=3, batch_size=2, channels=16,
        coarsest=16,
    )  # fmt: skip
    report = detection(network, options)
    assert set(report.numbers) == {"ap", "ap50", "ap75"} and 0.0 <= report.value <= 1.0
    assert "layers.5/8" in report.line and "train(6)" in report.line
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())


def test_pyramid_takes_the_last_layer_of_each_stride() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 6, 3, 2, 1), nn.ReLU(), nn.Conv2d(6, 8, 3, 2, 1)
    )
    assert pyramid_levels(network) == {"2": 4, "3": 8}
    assert pyramid_levels(nn.Sequential(network)) == {"0.2": 4, "0.3": 8}
    assert pyramid_levels(network, ("1",)) == {"1": 4}
    with pytest.raises(ValueError, match="no layer 'layer9'"):
        pyramid_levels(network, ("layer9",))


def test_detection_refuses(tmp_path: Path) -> None:
    root = write_boxes(tmp_path, {"train": 1})
    with pytest.raises(ValueError, match="must differ"):
        detection(Normed(), DetectionOptions(data=str(root), val_split="train"))
    content = json.loads((root / "train.json").read_text())

    def load(**changes: object) -> BoxedImages:
        (root / "bad.json").write_text(json.dumps(content | changes))
        return BoxedImages.load(root / "bad.json", root / "images")

    image, mark = content["images"][0], content["annotations"][0]
    for changes, message in (
        ({"images": [image | {"width": 64}]}, "the json says 64 x 64"),
        ({"images": [image | {"file_name": "no.png"}]}, "is missing"),
        ({"annotations": [mark | {"bbox": [5, 5, 0, 4]}]}, "without an area"),
        ({"annotations": [mark | {"category_id": 1}]}, "category 1, which is not listed"),
        ({"categories": []}, "an image and a category"),
    ):
        with pytest.raises(ValueError, match=message):
            load(**changes)
    (root / "bad.json").write_text("[")
    with pytest.raises(ValueError, match="no COCO json"):
        BoxedImages.load(root / "bad.json", root / "images")
