"""Memory: how much a loss takes beyond its inputs, and that no op reads what nobody wrote."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from op_cases import ISAS

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="reads /proc/self and sets glibc's MALLOC_PERTURB_"
)

_ROOT = Path(__file__).resolve().parents[1]

_PEAK = """
import json, sys
import torch
from densecl_ext import ops, reference

def status(name):
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(name + ":"))
    return int(line.split()[1]) * 1024

def reset_peak():
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")

def step(info_nce, m, k):
    torch.manual_seed(0)
    query, positive = torch.randn(m, 128, requires_grad=True), torch.randn(m, 128)
    positive.requires_grad_()
    queue = torch.nn.functional.normalize(torch.randn(k, 128), dim=1).to(DTYPE)
    reset_peak()
    before = status("VmRSS")
    info_nce(query, positive, queue).backward()
    return status("VmHWM") - before

name, dtype = sys.argv[1:]
DTYPE = getattr(torch, dtype)
torch.set_num_threads(2)
info_nce = {"native": ops.info_nce, "eager": reference.info_nce}[name]
step(info_nce, 8, 100)
print(json.dumps(step(info_nce, 1568, 65536)))
"""

# Runs every op on shapes around the sizes of tiles; prints a digest of all bits by instruction set
# and kind of shape.
_DIGEST = """
import hashlib, itertools, json, os, sys
import torch
from densecl_ext import _host, ops

def digest(*dims):
    digest = hashlib.sha256()
    g = torch.Generator().manual_seed(0)

    def add(*tensors):
        for tensor in tensors:
            digest.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for m, k, d in itertools.product((1, 7, 13, 50), (1, 5, 97, 200), dims):
            query = torch.randn(m, d, generator=g).requires_grad_()
            positive = torch.randn(m, d, generator=g).requires_grad_()
            queue = torch.nn.functional.normalize(torch.randn(k, d, generator=g), dim=1).to(dtype)
            loss = ops.info_nce(query, positive, queue, reduction="none")
            loss.sum().backward()
            add(loss, query.grad, positive.grad)
            add(ops.info_nce(100 * query, positive, queue, normalize=False, reduction="none"))
        for sq, sk, c in itertools.product((1, 5, 65), (1, 63, 70), dims):
            query = torch.randn(2, c, sq, generator=g).to(dtype)
            key = torch.randn(2, c, sk, generator=g).to(dtype)
            add(ops.dense_match(query, key), ops.dense_match(query, key, mutual=True))
        for count in dims:
            target = torch.randn(count, generator=g).to(dtype)
            ops.ema_update_([target], [torch.randn(count, generator=g)], 0.9)
            queue, pointer = torch.zeros(11, count, dtype=dtype), torch.tensor([9])
            ops.enqueue_(queue, pointer, torch.randn(4, count, generator=g))
            add(target, queue, pointer)
    return digest.hexdigest()

torch.set_num_threads(1)
result = {}
for isa in _host.available_isas():
    os.environ["DENSECL_CPU_ISA"] = isa
    result[isa] = {"no features": digest(0), "features": digest(1, 5, 17, 41, 129)}
print(json.dumps(result))
"""


def _python(script: str, *arguments: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True,
        text=True,
        cwd=_ROOT,
        env=os.environ | {"PYTHONPATH": str(_ROOT)} | environment,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.mark.parametrize("isa", ISAS[-1:])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peak_of_forward_and_backward(dtype: str, isa: str) -> None:
    """Forward, backward and the gradients themselves at M = 1,568, K = 65,536, D = 128."""
    peak = json.loads(_python(_PEAK, "native", dtype, DENSECL_CPU_ISA=isa))
    assert 0 < peak < 20e6


def test_peak_of_the_eager_formula() -> None:
    """The measurement sees memory: the same loss in eager PyTorch takes over a gigabyte."""
    assert json.loads(_python(_PEAK, "eager", "float32")) > 1_000e6


@pytest.fixture(scope="module")
def digests() -> list[dict[str, dict[str, str]]]:
    """With glibc filling fresh memory with all ones (NaN), then with another pattern."""
    return [json.loads(_python(_DIGEST, MALLOC_PERTURB_=fill)) for fill in ("256", "129")]


@pytest.mark.parametrize("shapes", ["features", "no features"])
@pytest.mark.parametrize("isa", ISAS)
def test_nothing_unwritten_is_read(
    isa: str, shapes: str, digests: list[dict[str, dict[str, str]]]
) -> None:
    """What fresh memory holds changes no bit of any result."""
    assert digests[0][isa][shapes] == digests[1][isa][shapes]
