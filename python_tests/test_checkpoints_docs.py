"""The examples of docs/use_weights.md, run as they stand, where their library is installed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from densecl_ext.checkpoints import export_backbone

torchvision = pytest.importorskip("torchvision")
timm = pytest.importorskip("timm")

PAGE = Path(__file__).resolve().parent.parent / "docs" / "use_weights.md"


def examples(heading: str) -> list[str]:
    section = PAGE.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(1)
    network = torchvision.models.resnet50(weights=None)
    torch.save(network.state_dict(), folder / "source.pth")
    export_backbone(folder / "source.pth", folder / "backbone.pth")
    export_backbone(folder / "source.pth", folder / "timm.pth", "timm")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("heading", "needs"),
    [
        ("torchvision", "torchvision"),
        ("timm", "timm"),
        ("segmentation-models-pytorch", "segmentation_models_pytorch"),
        ("transformers, and a hub", "transformers"),
        ("Ultralytics", "ultralytics"),
    ],
)
def test_examples(heading: str, needs: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(needs)
    monkeypatch.chdir(folder)
    if needs == "transformers":
        export_backbone("source.pth", "hub", "huggingface")
    names: dict[str, object] = {}
    for code in examples(heading):
        if "HfApi" not in code:  # it would publish
            exec(code, names)
    weight = torch.load("source.pth")["layer4.2.conv3.weight"]
    for name in ("model", "detector", "segmenter", "pyramid"):
        if name in names:
            tensors = names[name].state_dict().values()  # type: ignore[attr-defined]
            assert any(t.shape == weight.shape and torch.equal(t, weight) for t in tensors), name
