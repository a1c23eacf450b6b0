"""The examples of docs/ops.md, run as they stand."""

from __future__ import annotations

import copy
import doctest
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import densecl_ext

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "ops.md").read_text()
LIGHTLY = "In lightly's MoCo example"


def section(heading: str) -> str:
    return PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]


def code(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def test_examples_run() -> None:
    names: dict[str, Any] = {}
    for example in code(PAGE, "python"):
        exec(example, names)
    assert names["loss"].item() > 0.0
    assert int(names["queue"].filled) == 56


def test_errors_are_what_the_page_says() -> None:
    names = {**vars(densecl_ext), "torch": torch}
    for example in code(PAGE, "pycon"):
        test = doctest.DocTestParser().get_doctest(example, names, "ops.md", None, None)
        assert doctest.DocTestRunner().run(test).failed == 0


class MoCo(nn.Module):
    """The parts of lightly's example that the page's lines touch."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.projection_head = nn.Linear(12, 16), nn.Linear(16, 128)
        self.backbone_momentum = copy.deepcopy(self.backbone)
        self.projection_head_momentum = copy.deepcopy(self.projection_head)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.projection_head(self.backbone(x))

    @torch.no_grad()
    def forward_momentum(self, x: torch.Tensor) -> torch.Tensor:
        return self.projection_head_momentum(self.backbone_momentum(x))


def test_lightlys_loop_keeps_its_numbers() -> None:
    lightly = pytest.importorskip("lightly.loss")
    utils = pytest.importorskip("lightly.models.utils")
    names: dict[str, Any] = {}
    exec(code(section(LIGHTLY), "python")[0], names)
    torch.manual_seed(0)
    ours, theirs = MoCo(), lightly.NTXentLoss(memory_bank_size=(4096, 128))
    other = copy.deepcopy(ours)
    theirs.memory_bank.bank = names["queue"].keys.clone()
    for _ in range(2):
        views = torch.randn(2, 8, 12)
        loss = names["training_step"](ours, *views, 0.9)
        utils.update_momentum(other.backbone, other.backbone_momentum, 0.9)
        utils.update_momentum(other.projection_head, other.projection_head_momentum, 0.9)
        expected = theirs(other(views[0]), other.forward_momentum(views[1]))
        torch.testing.assert_close(loss, expected)
        loss.backward()
        expected.backward()
        for model in (ours, other):
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.grad is not None:
                        parameter -= 0.1 * parameter.grad
                        parameter.grad = None
