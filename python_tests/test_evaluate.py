"""The probe: its metric against float64, its features, its folder, and that it learns."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from densecl_ext.evaluate import (
    IGNORE_INDEX,
    SegmentationFolder,
    SegmentationResult,
    confusion_matrix,
    extract_features,
    linear_segmentation,
    recalibrate_batch_norm,
)
from densecl_ext.evaluate.features import prepare_images
from densecl_ext.evaluate.metrics import confusion_matrices, results_table


def iou_of_sets(prediction: np.ndarray, label: np.ndarray, classes: int) -> list[float]:
    """Intersection over union from its definition, on sets of pixels, in float64."""
    valid = label != IGNORE_INDEX
    ious = []
    for c in range(classes):
        hit = np.float64(((prediction == c) & (label == c) & valid).sum())
        union = np.float64((((prediction == c) | (label == c)) & valid).sum())
        ious.append(float(hit / union) if union else math.nan)
    return ious


@pytest.mark.parametrize("ignored", [0.0, 0.3])
def test_miou_is_its_definition(ignored: float) -> None:
    rng = np.random.default_rng(1)
    label = rng.integers(0, 5, (3, 20, 30)).astype(np.uint8)
    label[label == 4] = 3  # class 4 is never labelled ...
    prediction = np.where(rng.random(label.shape) < 0.6, label, rng.integers(0, 4, label.shape))
    label[rng.random(label.shape) < ignored] = IGNORE_INDEX
    confusion = confusion_matrix(torch.from_numpy(prediction), torch.from_numpy(label), 6)
    result = SegmentationResult(confusion, tuple("abcdef"))
    expected = iou_of_sets(prediction, label, 6)
    for got, want in zip(result.iou_per_class, expected, strict=True):
        assert (math.isnan(got) and math.isnan(want)) or abs(got - want) < 1e-15
    # ... and, never predicted either, is left out of the mean
    assert abs(result.miou - np.nanmean(expected)) < 1e-15
    valid = label != IGNORE_INDEX
    assert abs(result.pixel_accuracy - (prediction == label)[valid].mean()) < 1e-15
    assert int(confusion.sum()) == valid.sum()


def test_confusion_rows_are_labels() -> None:
    confusion = confusion_matrix(torch.tensor([1, 1, 0]), torch.tensor([0, 0, 0]), 2)
    assert confusion.tolist() == [[1, 2], [0, 0]]


def test_confusions_of_a_batch_are_those_of_its_images() -> None:
    generator = torch.Generator().manual_seed(0)
    predictions = torch.randint(6, (3, 9, 11), generator=generator)
    labels = torch.randint(6, (3, 9, 11), generator=generator).byte()
    labels[:, 0] = 255
    found = confusion_matrices(predictions, labels, 6)
    for one, prediction, label in zip(found, predictions, labels, strict=True):
        assert torch.equal(one, confusion_matrix(prediction, label, 6))
    with pytest.raises(ValueError, match=r"label must lie in \[0, 5\), or be 255, got 5"):
        confusion_matrices(predictions.clamp(max=4), labels, 5)


def test_confusion_refuses() -> None:
    with pytest.raises(ValueError, match="one shape"):
        confusion_matrix(torch.zeros(2), torch.zeros(3), 2)
    with pytest.raises(ValueError, match=r"label must lie in \[0, 2\)"):
        confusion_matrix(torch.tensor([0]), torch.tensor([2]), 2)
    with pytest.raises(ValueError, match=r"prediction must lie in \[0, 2\)"):
        confusion_matrix(torch.tensor([3]), torch.tensor([1]), 2)


def test_table_has_every_class() -> None:
    result = SegmentationResult(torch.tensor([[3, 1], [0, 4]]), ("sky", "road"))
    table = results_table({"random": result, "pre-trained": result})
    assert "sky" in table and "road" in table and "77.5" in table  # (3/4 + 4/5) / 2
    with pytest.raises(ValueError, match="one set of classes"):
        results_table({"a": result, "b": SegmentationResult(torch.eye(2), ("x", "y"))})


def tiny_backbone() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, 2, 1),
        nn.BatchNorm2d(12),
        nn.ReLU(),
    )


def test_features_of_layers() -> None:
    backbone = tiny_backbone().train()
    inputs = torch.randn(2, 3, 16, 16)
    before = backbone[1].running_mean.clone()
    last = extract_features(backbone, inputs)
    both = extract_features(backbone, inputs, ["2", "5"])
    assert last.shape == (2, 12, 4, 4) and both.shape == (2, 20, 8, 8)
    enlarged = nn.functional.interpolate(last, size=(8, 8), mode="bilinear", align_corners=False)
    torch.testing.assert_close(both[:, 8:], enlarged)
    assert backbone.training and backbone[1].training
    torch.testing.assert_close(backbone[1].running_mean, before, rtol=0, atol=0)
    assert not any(module._forward_hooks for module in backbone.modules())
    with pytest.raises(ValueError, match="no layer 'layer9'"):
        extract_features(backbone, inputs, ["layer9"])


def test_recalibrated_statistics_are_the_data_s() -> None:
    backbone = tiny_backbone().eval()
    batches = [5.0 + 3.0 * torch.randn(4, 3, 16, 16) for _ in range(3)]
    recalibrate_batch_norm(backbone, batches)
    with torch.no_grad():
        out = torch.cat([backbone[0](batch) for batch in batches]).double()
    mean, var = backbone[1].running_mean.double(), backbone[1].running_var.double()
    torch.testing.assert_close(mean, out.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(var, out.var((0, 2, 3)), rtol=2e-2, atol=1e-5)
    assert backbone[1].momentum == 0.1 and not backbone[1].training
    with pytest.raises(ValueError, match="at least one batch"):
        recalibrate_batch_norm(backbone, [])


class Halves:
    """Images whose left is red and whose right is blue, with noise; the label says which."""

    def __init__(self, count: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.items: list[tuple[Tensor, Tensor]] = []
        for i in range(count):
            image = torch.randint(0, 60, (3, 32, 32), generator=generator, dtype=torch.uint8)
            label = torch.zeros(32, 32, dtype=torch.uint8)
            edge = 8 + 16 * i // count
            image[0, :, :edge] += 150
            image[2, :, edge:] += 150
            label[:, edge:] = 1
            label[:2] = IGNORE_INDEX
            self.items.append((image, label))

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.items[index]


def test_probe_learns_what_is_there_and_repeats() -> None:
    torch.manual_seed(0)
    backbone = tiny_backbone()
    weights = {name: value.clone() for name, value in backbone.state_dict().items()}
    lines: list[str] = []

    def run() -> SegmentationResult:
        return linear_segmentation(
            backbone, Halves(24, 0), Halves(8, 1), num_classes=2, batch_size=8, lr=0.03,
            class_names=("red", "blue"), report=lines.append,
        )  # fmt: skip

    result = run()
    assert result.miou > 0.9
    assert int(result.confusion.sum()) == 8 * 30 * 32  # two rows of every label are ignored
    assert (run().confusion == result.confusion).all()
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, weights[name]), name  # frozen
    assert all(parameter.grad is None for parameter in backbone.parameters())
    assert lines and "training images" in lines[0]


def test_probe_cannot_learn_from_constant_features() -> None:
    class Constant(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.ones(x.shape[0], 4, 8, 8)

    result = linear_segmentation(Constant(), Halves(8, 0), Halves(4, 1), num_classes=2, epochs=3)
    assert result.miou < 0.6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs must be positive"),
        ({"num_classes": 1}, "labels must be below num_classes = 1"),
        ({"class_names": ("a",)}, "class_names must be 2 names"),
        ({"train": []}, "must hold images"),
    ],
)
def test_probe_refuses(changes: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {"train": Halves(2, 0), "val": Halves(2, 0), "num_classes": 2}
    with pytest.raises(ValueError, match=message):
        linear_segmentation(tiny_backbone(), **(arguments | changes))  # type: ignore[arg-type]


def test_probe_refuses_images_of_several_sizes() -> None:
    small = (torch.zeros(3, 16, 16, dtype=torch.uint8), torch.zeros(16, 16, dtype=torch.uint8))
    mixed = [Halves(1, 0)[0], small]
    with pytest.raises(ValueError, match="one size"):
        linear_segmentation(tiny_backbone(), mixed, mixed, num_classes=2)


def test_prepared_images_are_normalised() -> None:
    white = torch.full((1, 3, 8, 8), 255, dtype=torch.uint8)
    x = prepare_images(white, (4, 6))
    assert x.shape == (1, 3, 4, 6)
    expected = torch.tensor([(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225])
    torch.testing.assert_close(x.mean((0, 2, 3)), expected)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    image = pytest.importorskip("PIL.Image")
    for name in ("images", "masks", "splits"):
        (tmp_path / name).mkdir()
    rng = np.random.default_rng(0)
    for i in range(4):
        pixels = rng.integers(0, 255, (10, 12, 3)).astype(np.uint8)
        image.fromarray(pixels).save(tmp_path / "images" / f"v1.{i}.jpg")
        label = image.fromarray(np.full((10, 12), i, dtype=np.uint8))
        if i % 2:
            label.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0, 9, 9, 9])
        label.save(tmp_path / "masks" / f"v1.{i}.png")
    (tmp_path / "splits" / "train.txt").write_text("v1.3\nv1.1.jpg\n\nimages/v1.0.jpg\n")
    (tmp_path / "classes.txt").write_text("sky\nroad\n")
    return tmp_path


def test_segmentation_folder(folder: Path) -> None:
    images = SegmentationFolder(folder, "train")
    assert images.names == ["v1.3", "v1.1", "v1.0"] and len(images) == 3
    assert images.class_names == ("sky", "road")
    for index, value in enumerate((3, 1, 0)):  # palette and gray masks both give ids
        image, label = images[index]
        assert image.shape == (3, 10, 12) and image.dtype == torch.uint8
        assert (label == value).all() and label.dtype == torch.uint8
    assert SegmentationFolder(folder, "train", limit=2).names == ["v1.3", "v1.1"]


def test_segmentation_folder_refuses(folder: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    with pytest.raises(ValueError, match="no split 'val'.*splits there: train"):
        SegmentationFolder(folder, "val")
    (folder / "splits" / "odd.txt").write_text("v1.0\nnowhere\n")
    with pytest.raises(ValueError, match="names 'nowhere'"):
        SegmentationFolder(folder, "odd")
    image.new("RGB", (12, 10)).save(folder / "masks" / "v1.0.png")
    with pytest.raises(ValueError, match="one channel"):
        SegmentationFolder(folder, "train")[2]
    with pytest.raises(ValueError, match="must be a folder"):
        SegmentationFolder(folder / "splits", "train")
