"""The training step's benchmark: the published baseline computes what ours does, and the report."""

from __future__ import annotations

import math
import sys
import types
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import step, step_models, step_report, step_worker
from benchmarks.cases import NotAvailable
from benchmarks.step import Config, Run, largest_batch, tiny
from densecl_ext import DenseCL

CPU = torch.device("cpu")
OURS = tiny(Config("ours", "ours", 128, precision="fp32"))


@pytest.mark.parametrize("loss_lambda", [0.5, 0.0])
def test_the_published_step_is_ours(loss_lambda: float) -> None:
    """Same weights, views and queues: losses, gradients, key encoder and queues agree."""
    settings: dict[str, Any] = {
        "queue_length": 12, "queue_init": "random", "hidden_dim": 16, "dim": 8,
        "backbone_channels": 32, "loss_lambda": loss_lambda, "key_bn_groups": 1, "momentum": 0.9,
    }  # fmt: skip
    ours = DenseCL(step_models.backbone("tiny", 32), **settings)
    published = step_models.ReferenceDenseCL(step_models.backbone("tiny", 32), **settings)
    published.backbone.load_state_dict(ours.backbone.state_dict())
    published.neck.load_state_dict(ours.neck.state_dict())
    published.momentum_encoder.module.load_state_dict(ours.momentum_encoder.module.state_dict())
    queues = ("global_queue", "dense_queue")
    for name in queues:
        getattr(published, name).queue.copy_(getattr(ours, name).keys.T)
    views = [(torch.randn(8, 3, 32, 32), torch.randn(8, 3, 32, 32)) for _ in range(2)]
    for view_q, view_k in views:  # the second batch of 8 wraps round a queue of 12
        for model in (ours, published):
            model.zero_grad()
            loss = model(view_q, view_k).loss
            loss.backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.grad is not None:
                        parameter -= 0.1 * parameter.grad
        torch.testing.assert_close(model.loss_lambda, loss_lambda)
        for (name, a), b in zip(ours.named_parameters(), published.parameters(), strict=True):
            assert (a.grad is None) == (b.grad is None), name
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n} {m}")
        for name in queues:
            queue = getattr(published, name)
            torch.testing.assert_close(getattr(ours, name).keys, queue.queue.T)
    assert int(published.global_queue.pointer) == int(ours.global_queue.pointer) == 4


@pytest.mark.parametrize("capacity", [0, 15, 16, 250, 517, 1040, 3000])
@pytest.mark.parametrize("guess", [16, 512, 1111])
def test_largest_batch(capacity: int, guess: int) -> None:
    tried: list[int] = []

    def fits(batch: int) -> bool:
        assert batch not in tried and batch % 16 == 0 and batch > 0
        tried.append(batch)
        return batch <= capacity

    found = largest_batch(fits, guess, 16, 200)
    assert found == (capacity // 16 * 16 or None)
    tried.clear()
    few = largest_batch(fits, guess, 16, 4)
    assert len(tried) <= 4 and (few is None or few <= capacity)


def test_first_guess_follows_the_peaks() -> None:
    found = {f"ours, batch {n}": {"peak_bytes": 2e9 + 1e8 * n} for n in (32, 256)}
    assert math.isclose(step.first_guess(found, "ours", 80e9), 740, abs_tol=1)
    assert step.first_guess(found, "reference", 80e9) == 512
    assert step.first_guess({}, "ours", 0.0) == 512


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_measured_configurations_and_the_reason_of_one_that_cannot_run(one_thread: None) -> None:
    graph = replace(OURS, id="graph", cuda_graph=True)
    published = replace(OURS, id="published", model="reference")
    found = step_worker.measure([asdict(c) for c in (OURS, graph, published)], CPU)
    assert "GPU" in found["graph"]["reason"]
    for name in ("ours", "published"):
        assert len(found[name]["images_per_second"]) == OURS.rounds
        phases = found[name]["phases"]
        assert {"momentum", "losses", "enqueue", "backward", "optimizer"} <= phases.keys()
        assert sum(phases.values()) - phases["step"] <= phases["step"]


def test_a_vit_is_a_backbone_with_a_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    class Vit(nn.Module):
        num_features, num_prefix_tokens = 6, 1

        def forward_features(self, images: torch.Tensor) -> torch.Tensor:
            patches = images.mean(dim=1).unfold(1, 8, 8).unfold(2, 8, 8).mean(dim=(3, 4))
            tokens = patches.flatten(1).unsqueeze(2).expand(-1, -1, 6)
            return torch.cat([torch.full_like(tokens[:, :1], 9.0), tokens], dim=1)

    timm = types.ModuleType("timm")
    timm.create_model = lambda name, num_classes, img_size: Vit()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "timm", timm)
    images = torch.randn(2, 3, 32, 32)
    backbone = step_models.backbone(step_models.VIT, 32)
    assert isinstance(backbone, nn.Module)
    features = backbone(images)
    expected = torch.nn.functional.avg_pool2d(images.mean(dim=1, keepdim=True), 8)
    torch.testing.assert_close(features, expected.expand(-1, 6, -1, -1))
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(NotAvailable, match="timm is not installed"):
        step_models.backbone(step_models.VIT, 32)


def results() -> dict[str, Any]:
    """step.json with round numbers."""
    rates = {"reference, batch 32": 100.0, "ours, batch 32": 130.0, "reference, batch 256": 200.0,
             "ours, batch 256": 210.0, "ours, lambda 0, batch 256": 212.0}  # fmt: skip
    configs: dict[str, Any] = {
        name: {"id": name, "batch": 256, "images_per_second": [rate, rate / 2, 2 * rate],
               "peak_bytes": 30e9 if "reference" in name else 18e9}
        for name, rate in rates.items()
    }  # fmt: skip
    configs["ours, batch 256"]["phases"] = {
        "momentum": 0.2, "losses": 0.3, "matching": 0.1, "enqueue": 0.1, "backward": 5.0,
        "step": 100.0,
    }  # fmt: skip
    configs["ours, CUDA graph, batch 32"] = {"id": "graph", "reason": "capture failed"}
    return {
        "suite": "step", "machine_info": None, "datetime": "2030-01-02T03:04:05", "quick": False,
        "configs": configs,
        "largest": {"ours": {"batch": 1024, "tries": {1024: "fits"}},
                    "reference": {"batch": 640, "tries": {640: "fits"}}},
    }  # fmt: skip


def test_verdicts() -> None:
    found = [(v.ratio, v.met) for v in step_report.verdicts(results())]
    assert found == [
        ("1.30x", True),
        ("ours, CUDA graph, batch 32: capture failed", None),
        ("1.05x", False),
        ("+12.0 GB", True),
        ("1.0 % slower", True),
        ("0.7 %", True),
        ("1.60x", True),
    ]
    text = step_report.markdown(results())
    assert "capture failed" in text and "no loader takes part" in text
    empty = results() | {"configs": {}, "largest": {}}
    assert all(v.met is None for v in step_report.verdicts(empty))
    assert "The machine is not known." in step_report.markdown(empty)


def test_a_group_that_loses_its_process_is_tried_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path, "cpu", quick=True, seconds=100.0)

    def ask(request: dict[str, Any], limit: float) -> dict[str, Any]:
        configs = request["measure"]
        if len(configs) > 1 or configs[0]["model"] == "ours":
            return {"error": "failed: no answer within 110 s"}
        return {"found": {configs[0]["id"]: {"images_per_second": [5.0], "peak_bytes": None}}}

    monkeypatch.setattr(run, "_ask", ask)
    run.group([OURS, replace(OURS, id="published", model="reference")])
    assert run.results["configs"]["ours"]["reason"] == "failed: no answer within 110 s"
    assert run.results["configs"]["published"]["images_per_second"] == [5.0]
    assert "| published" in (tmp_path / "step.md").read_text()


def test_nothing_starts_when_the_time_is_over(tmp_path: Path) -> None:
    run = Run(tmp_path, "cpu", quick=True, seconds=-1.0)
    run.everything()
    reasons = {config["reason"] for config in run.results["configs"].values()}
    assert reasons == {"not run: the -1 s were over"}
    assert run.results["largest"]["ours"]["reason"].startswith("not run")


def test_quick_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way through the processes, on two configurations."""
    monkeypatch.setattr(step, "groups", lambda: [[Config("ours, batch 32", "ours", 32)], []])
    run = Run(tmp_path, "cpu", quick=True, seconds=300.0)
    run.everything()
    assert run.results["configs"]["ours, batch 32"]["images_per_second"]
    assert run.results["machine_info"]["device"]["kind"] == "cpu"
    assert run.results["largest"]["ours"]["tries"] == {16: "fits"}
    assert "A quick run" in (tmp_path / "step.md").read_text()
