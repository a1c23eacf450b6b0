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

# Runs every op on shapes around the sizes of tiles and prints a digest of all bits.
_DIGEST = """
import hashlib, itertools, sys
import torch
from densecl_ext import ops

torch.set_num_threads(1)
DIMS = [int(dim) for dim in sys.argv[1:]]
digest = hashlib.sha256()

def add(*tensors):
    for tensor in tensors:
        assert not (tensor.is_floating_point() and tensor.isnan().any()), tensor.shape
        digest.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())

g = torch.Generator().manual_seed(0)
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for m, k, d in itertools.product((1, 7, 13, 50), (1, 5, 97, 200), DIMS):
        query = torch.randn(m, d, generator=g).requires_grad_()
        positive = torch.randn(m, d, generator=g).requires_grad_()
        queue = torch.nn.functional.normalize(torch.randn(k, d, generator=g), dim=1).to(dtype)
        loss = ops.info_nce(query, positive, queue, reduction="none")
        loss.sum().backward()
        add(loss, query.grad, positive.grad)
        loss = ops.info_nce(100 * query, positive, queue, normalize=False, reduction="none")
        add(loss)
    for sq, sk, c in itertools.product((1, 5, 65), (1, 63, 70), DIMS):
        query = torch.randn(2, c, sq, generator=g).to(dtype)
        key = torch.randn(2, c, sk, generator=g).to(dtype)
        add(ops.dense_match(query, key), ops.dense_match(query, key, mutual=True))
    for count in (1, 3, 17, 1030):
        target = torch.randn(count, generator=g).to(dtype)
        ops.ema_update_([target], [torch.randn(count, generator=g)], 0.9)
        add(target)
        queue, pointer = torch.zeros(11, count, dtype=dtype), torch.tensor([9])
        ops.enqueue_(queue, pointer, torch.randn(4, count, generator=g))
        add(queue, pointer)
print(digest.hexdigest())
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


def _assert_fresh_memory_does_not_matter(isa: str, *dims: int) -> None:
    """With glibc filling fresh memory with all ones (NaN), then with another pattern: same bits."""
    digests = {
        _python(_DIGEST, *map(str, dims), DENSECL_CPU_ISA=isa, MALLOC_PERTURB_=fill)
        for fill in ("256", "129")
    }
    assert len(digests) == 1


@pytest.mark.parametrize("isa", ISAS)
def test_nothing_unwritten_is_read(isa: str) -> None:
    _assert_fresh_memory_does_not_matter(isa, 1, 5, 17, 41, 129)


def test_nothing_unwritten_is_read_without_features() -> None:
    _assert_fresh_memory_does_not_matter(ISAS[-1], 0)
