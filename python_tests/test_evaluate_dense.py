"""Linear and in-context segmentation from shared features, and correspondence, on planted cases."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("PIL")
pytest.importorskip("torchmetrics")

from evaluate_data import MeanColour, Normed, PositionCode, write_labelled

from densecl_ext.evaluate import (
    CorrespondenceOptions,
    DenseData,
    InContext,
    InContextOptions,
    Linear,
    SegmentationOptions,
    Views,
    correspondence,
    evaluate_dense,
    incontext,
    linear_segmentation,
    reports_table,
    segmentation,
)
from densecl_ext.evaluate.correspondence import match_shares, position_share
from densecl_ext.evaluate.dense import soft_labels
from densecl_ext.evaluate.incontext import vote
from densecl_ext.evaluate.metrics import miou_of
from densecl_ext.evaluate.options import help_texts
from densecl_ext.evaluate.pixels import resize
from densecl_ext.evaluate.segmentation import solve_linear
from densecl_ext.protocols import PROTOCOLS, find_protocol


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_labelled(tmp_path_factory.mktemp("labelled"), {"train": 12, "val": 5})


def state_of(network: nn.Module) -> tuple[dict[str, Tensor], list[bool]]:
    state = {name: value.clone() for name, value in network.state_dict().items()}
    return state, [module.training for module in network.modules()]


def test_features_that_hold_the_labels_segment(root: Path) -> None:
    options = {"data": str(root), "rows": 500}
    data = DenseData.load(SegmentationOptions(**options))
    reports = evaluate_dense(
        MeanColour(), data,
        [Linear(SegmentationOptions(**options)), InContext(InContextOptions(**options))],
    )  # fmt: skip
    assert list(reports) == ["segmentation", "incontext"]
    for report in reports.values():
        assert report.value == report.numbers["miou"] > 0.85
        assert set(report.tables["iou"]) == {"red", "green", "blue"}
        assert report.terms is not None and len(report.terms) == 5 and report.headline is not None
        assert int(report.terms.sum()) == 5 * 31 * 48  # the first row of every mask is ignored
        assert math.isclose(float(report.headline(report.terms.sum(0)[None])), report.value)
        for stated in ("train(12)", "val(5)", "scored_at=32x48", "seed=0", "rows=500", "of 3"):
            assert stated in report.line
        json.dumps(report.to_dict(), allow_nan=False)
    table = reports_table({"a": reports["segmentation"], "b": reports["segmentation"]})
    assert "mIoU" in table and "green" in table


def test_a_network_alone_equals_the_shared_pass(root: Path) -> None:
    torch.manual_seed(0)
    network = Normed().train()
    before, modes = state_of(network)
    kw = {"data": str(root), "size": (16, 24), "recalibrate": 6, "rows": 100, "seed": 3}
    linear = SegmentationOptions(**kw, solver="lbfgs")
    neighbours = InContextOptions(**kw, bank=64, neighbours=5)
    data = DenseData.load(linear)
    together = evaluate_dense(network, data, [Linear(linear), InContext(neighbours)])
    alone = [segmentation(network, linear), incontext(network, neighbours)]
    for one, (name, both) in zip(alone, together.items(), strict=True):
        assert one.protocol == name and one.line == both.line
        assert torch.equal(one.terms, both.terms)
    assert "recalibrated on 6 images" in alone[0].line and "scored_at=16x24" in alone[0].line
    after, modes_after = state_of(network)
    assert modes == modes_after and all(torch.equal(before[k], after[k]) for k in before)
    again = segmentation(network, dataclasses.replace(linear, recalibrate=0))
    assert "batch_norm=own" in again.line


def test_adamw_keeps_the_numbers_of_linear_segmentation(root: Path) -> None:
    torch.manual_seed(0)
    network = Normed().eval()
    options = SegmentationOptions(data=str(root), epochs=2, batch_size=4)
    data = DenseData.load(options)
    expected = linear_segmentation(
        network, data.train, data.val, num_classes=3, epochs=2, batch_size=4
    )
    report = segmentation(network, options, data=data)
    assert report.terms is not None
    assert torch.equal(report.terms.sum(0), expected.confusion)
    assert math.isclose(report.value, expected.miou) and "solver=adamw" in report.line


def test_lbfgs_finds_the_minimum() -> None:
    """At the minimum of the convex problem the gradient, in float64, vanishes."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(400, 6, generator=generator)
    labels = torch.softmax(2 * torch.randn(400, 4, generator=generator), 1)
    weight, bias, steps = solve_linear(features, labels, 1e-2, 200)
    w, b = weight.double().requires_grad_(), bias.double().requires_grad_()
    scores = features.double() @ w.T + b
    loss = -(labels.double() * scores.log_softmax(1)).sum(1).mean() + 1e-2 * w.square().sum()
    loss.backward()
    assert w.grad is not None and b.grad is not None
    assert float(w.grad.abs().max()) < 1e-4 and float(b.grad.abs().max()) < 1e-4
    assert 0 < steps <= 200


def test_votes_are_their_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    query = nn.functional.normalize(torch.randn(700, 8, generator=generator), dim=1)
    bank = nn.functional.normalize(torch.randn(90, 8, generator=generator), dim=1)
    labels = torch.rand(90, 3, generator=generator)
    got = vote(query, bank, labels, 7, 0.1)
    cosine = query.double().numpy() @ bank.double().numpy().T
    for row in (0, 511, 512, 699):
        near = np.argsort(-cosine[row])[:7]
        weight = np.exp(cosine[row][near] / 0.1)
        wanted = (weight / weight.sum()) @ labels.double().numpy()[near]
        np.testing.assert_allclose(got[row].numpy(), wanted, rtol=1e-4)
    rough = vote(query, bank, labels, 7, 0.1, "bfloat16")
    assert float((rough - got).abs().mean()) < 0.02


def test_soft_labels_and_resizing() -> None:
    label = torch.tensor([[0, 0, 1, 255], [0, 1, 255, 255]], dtype=torch.uint8)
    soft = soft_labels(label[None], 2, (1, 2))
    assert soft.tolist() == [[0.75, 0.25], [0.0, 0.25]]
    with pytest.raises(ValueError, match="below num_classes = 1"):
        soft_labels(label[None], 1, (1, 2))
    image = torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8)
    small, mask = resize(image, torch.tensor([[3] * 8] * 8, dtype=torch.uint8), (4, 6))
    assert small.shape == (3, 4, 6) and mask.shape == (4, 6) and int(mask.max()) == 3


def test_miou_of_sums_leaves_absent_classes_out() -> None:
    confusions = torch.tensor([[[3, 1, 0], [0, 4, 0], [0, 0, 0]]])
    assert math.isclose(float(miou_of(confusions)), (3 / 4 + 4 / 5) / 2)
    assert math.isnan(float(miou_of(torch.zeros(1, 3, 3))))


def test_dense_refuses(root: Path) -> None:
    first, second = SegmentationOptions(data=str(root)), InContextOptions(data=str(root), seed=1)
    data = DenseData.load(first)
    with pytest.raises(ValueError, match="agree on seed"):
        evaluate_dense(MeanColour(), data, [Linear(first), InContext(second)])
    with pytest.raises(ValueError, match="at least one"):
        evaluate_dense(MeanColour(), data, [])
    with pytest.raises(ValueError, match="solver must be"):
        SegmentationOptions(solver="sgd")
    with pytest.raises(ValueError, match="precision must be"):
        InContextOptions(precision="float16")
    with pytest.raises(ValueError, match="height and a width"):
        InContextOptions(size=(3,))
    with pytest.raises(ValueError, match="bank must be at least 1"):
        InContextOptions(bank=0)


# ---------------------------------------------------------------- correspondence


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from data_images import scene

    root = tmp_path_factory.mktemp("photos")
    for index in range(12):
        scene(index, 120, 100).save(root / f"{index}.png")
    return root


class SourceCoordinates(nn.Module):
    """Each cell's unit feature tells the point of the source that it shows: the perfect network.

    The source's coordinates are in the pixels: red is x, green is y.
    """

    def forward(self, x: Tensor) -> Tensor:
        mean = x.new_tensor([0.485, 0.456]).view(1, 2, 1, 1)
        std = x.new_tensor([0.229, 0.224]).view(1, 2, 1, 1)
        point = nn.functional.avg_pool2d(x[:, :2], 8) * std + mean  # in [0, 1]
        angle = point * 1.5
        lift = torch.cat([angle.cos(), angle.sin()], 1)  # (N, 4, h, w): cosine falls with distance
        return lift


def coordinate_images(root: Path, count: int) -> Path:
    from PIL import Image

    y, x = np.mgrid[0:192, 0:192]
    pixels = np.stack([x * 255 / 191, y * 255 / 191, np.full_like(x, 90)], -1).astype(np.uint8)
    for index in range(count):
        Image.fromarray(pixels).save(root / f"{index}.png")
    return root


def test_features_that_are_the_source_s_coordinates(tmp_path: Path) -> None:
    root = coordinate_images(tmp_path, 24)
    report = correspondence(
        SourceCoordinates(), CorrespondenceOptions(data=str(root), colour=False, images=0)
    )
    # 8-bit colours place a point to about a pixel, and cells are cut where centres lie between two
    assert report.numbers["exact"] > 0.9 and report.numbers["within_one"] > 0.999
    assert abs(report.numbers["same_index"] - report.numbers["same_index_base"]) < 0.03
    assert report.terms is not None and report.headline is not None
    assert math.isclose(float(report.headline(report.terms.sum(0)[None])), report.value)
    assert "images=24 of 24" in report.line and "colour=unchanged" in report.line


def test_a_position_code_is_called_out(photos: Path) -> None:
    options = CorrespondenceOptions(data=str(photos), images=8)
    report = correspondence(PositionCode(), options, dense_head=nn.Identity())
    numbers = report.numbers
    assert numbers["same_index"] == 1.0 and numbers["position_share"] > 0.999
    assert numbers["head_same_index"] == 1.0 and numbers["head_position_share"] > 0.999
    assert math.isclose(numbers["exact"], numbers["same_index_base"])  # right by geometry alone
    assert numbers["same_index_base"] < 0.5
    content = correspondence(MeanColour(), options)  # and its absence is not
    assert content.numbers["same_index"] < 0.5 and content.numbers["position_share"] < 0.5


def test_the_dense_head_of_a_run(tmp_path: Path) -> None:
    from tiny_models import TinyBackbone

    from densecl_ext import DenseCL
    from densecl_ext.evaluate.correspondence import load_dense_head

    model = DenseCL(TinyBackbone(), dim=8, hidden_dim=16, queue_length=32)
    torch.save({"format": "densecl_ext", "model": model.state_dict()}, tmp_path / "run.pt")
    head = load_dense_head(tmp_path / "run.pt")
    features = torch.randn(2, 12, 4, 4)
    assert head is not None
    torch.testing.assert_close(head(features), model.neck.dense_head(features))
    torch.save(model.backbone.state_dict(), tmp_path / "backbone.pt")
    assert load_dense_head(tmp_path / "backbone.pt") is None


def test_position_share_is_its_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(200, 16, 4, 4, generator=generator)
    assert abs(position_share(noise) - 1 / 200) < 0.002
    code = torch.randn(1, 16, 4, 4, generator=generator)
    half = position_share(noise + code)
    assert 0.4 < half < 0.6
    assert math.isnan(position_share(torch.ones(3, 4, 2, 2)))


def test_shares_on_known_crops() -> None:
    """A view and its mirror image: column c of one is column w - 1 - c of the other."""
    box = [0.0, 0.0, 64.0, 64.0]
    query, key = torch.tensor([[*box, 0.0]]), torch.tensor([[*box, 1.0]])
    features = torch.randn(1, 32, 4, 4)
    shares, terms = match_shares(features, features.flip(3), query, key)
    assert shares["exact"] == shares["within_one"] == shares["visible"] == 1.0
    assert shares["same_index"] == shares["same_index_base"] == 0.0
    assert terms.tolist() == [[16, 16]]
    shares, _ = match_shares(features, features, query, key)
    assert shares["exact"] == 0.0 and shares["within_one"] == 0.5 and shares["same_index"] == 1.0
    away = torch.tensor([[64.0, 64.0, 128.0, 128.0, 0.0]])
    with pytest.raises(ValueError, match="no position"):
        match_shares(features, features, query, away)


def test_views_repeat_and_the_network_is_given_back(photos: Path) -> None:
    options = CorrespondenceOptions(data=str(photos), images=5, recalibrate=4, seed=2)
    views = Views.load(options)
    assert views.query.shape == (5, 3, 64, 64) and views.query_crops.shape == (5, 5)
    assert torch.equal(views.key, Views.load(options).key)
    assert not torch.equal(views.key, Views.load(dataclasses.replace(options, seed=3)).key)
    network = Normed(8).train()
    before, modes = state_of(network)
    one, two = correspondence(network, options, views=views), correspondence(network, options)
    assert one.numbers == two.numbers and "recalibrated on 4 query views" in one.line
    after, modes_after = state_of(network)
    assert modes == modes_after and all(torch.equal(before[k], after[k]) for k in before)
    with pytest.raises(ValueError, match="smallest_crop"):
        CorrespondenceOptions(smallest_crop=0.0)
    (photos / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\nno")
    try:
        with pytest.raises(ValueError, match="bad.png"):
            Views.load(CorrespondenceOptions(data=str(photos), images=0))
    finally:
        (photos / "bad.png").unlink()


# ---------------------------------------------------------------- the registry


@pytest.mark.parametrize("name", PROTOCOLS)
def test_protocols_are_told(name: str) -> None:
    protocol = find_protocol(name)
    fields = {field.name for field in dataclasses.fields(protocol.options)}
    assert set(help_texts(protocol.options)) == fields and protocol.help
    assert all(texts for texts in help_texts(protocol.options).values())


def test_unknown_protocol() -> None:
    with pytest.raises(ValueError, match="must be one of segmentation"):
        find_protocol("segmentatoin")
