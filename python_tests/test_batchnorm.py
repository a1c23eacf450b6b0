from __future__ import annotations

import copy
from collections import namedtuple

import pytest
import torch
from tiny_models import TinyBackbone
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from densecl_ext import _native
from densecl_ext.nn.batchnorm import SplitBatchNorm, shuffled_forward, split_batch_norms
from densecl_ext.ops._split_batch_norm import takes

KINDS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


def group_by_group(norm: nn.Module, x: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same by plain batch norm, one group at a time: outputs and mean running statistics."""
    y, means, variances = [], [], []
    for group in range(groups):
        plain = copy.deepcopy(norm)
        block = slice(group * len(x) // groups, (group + 1) * len(x) // groups)
        y.append(plain(x[block]))
        means.append(plain.running_mean)
        variances.append(plain.running_var)
    return torch.cat(y), torch.stack(means).mean(0), torch.stack(variances).mean(0)


@pytest.mark.parametrize("shape", [(12, 5), (12, 5, 4), (12, 5, 4, 3), (12, 5, 2, 3, 4)])
@pytest.mark.parametrize("groups", [1, 2, 5, 6])  # 5 does not divide 12
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "channels last"])
@pytest.mark.parametrize("with_grad", [True, False])
def test_equals_plain_batch_norm_per_group(
    shape: tuple[int, ...], groups: int, layout: str, with_grad: bool
) -> None:
    torch.manual_seed(0)
    plain = KINDS[len(shape)](5, momentum=0.3)
    nn.init.uniform_(plain.weight)
    nn.init.uniform_(plain.bias)
    nn.init.uniform_(plain.running_mean)
    split = split_batch_norms(copy.deepcopy(plain), groups)
    assert isinstance(split, SplitBatchNorm)
    x = 2.0 + 3.0 * torch.randn(shape)
    if layout == "transposed":
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    elif layout == "channels last":
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    expected, mean, var = group_by_group(plain, x, groups)
    with torch.set_grad_enabled(with_grad):
        torch.testing.assert_close(split(x), expected)
    torch.testing.assert_close(split.running_mean, mean)
    torch.testing.assert_close(split.running_var, var)
    assert int(split.num_batches_tracked) == 1

    split.eval()
    plain.load_state_dict(split.state_dict())
    assert torch.equal(split(x), plain.eval()(x))
    torch.testing.assert_close(split.running_mean, mean)


def test_channels_last_stays_so() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 6, 4, 4)
    split = SplitBatchNorm(6, groups=4)
    for with_grad in (True, False):
        with torch.set_grad_enabled(with_grad):
            y = split(x.contiguous(memory_format=torch.channels_last))
            assert y.is_contiguous(memory_format=torch.channels_last)
            torch.testing.assert_close(y, split(x))


def test_nothing_is_gathered_or_scattered() -> None:
    """Every group is normalised where it lies, and its result written where it belongs."""

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore
            name = func.overloadpacket.__name__
            out = func(*args, **(kwargs or {}))
            if name in ("copy_", "clone", "cat", "index"):
                assert out.dim() == 1, name  # running statistics
            return out

    x = torch.randn(8, 6, 4, 4)
    for layout in (torch.contiguous_format, torch.channels_last):
        given = x.contiguous(memory_format=layout)
        with torch.no_grad(), Copies():
            SplitBatchNorm(6, groups=4)(given)


@pytest.mark.parametrize(("batch", "groups"), [(1, 1), (2, 1), (3, 1), (4, 2), (7, 3), (16, 8)])
def test_small_batches_form_fewer_groups(batch: int, groups: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(batch, 3, 4, 4)
    expected, _, _ = group_by_group(nn.BatchNorm2d(3), x, groups)
    torch.testing.assert_close(SplitBatchNorm(3, groups=8)(x), expected)


def test_cumulative_and_missing_statistics() -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 3, 4, 4)
    cumulative = SplitBatchNorm(3, groups=2, momentum=None)
    plain = nn.BatchNorm2d(3, momentum=None)
    for _ in range(2):
        _, mean, _ = group_by_group(plain, x, 2)
        cumulative(x)
        torch.testing.assert_close(cumulative.running_mean, mean)
        plain.load_state_dict(cumulative.state_dict())
    bare = SplitBatchNorm(3, groups=2, affine=False, track_running_stats=False)
    expected = torch.empty_like(x)
    for group in range(2):
        block = slice(3 * group, 3 * group + 3)
        expected[block] = nn.BatchNorm2d(3, affine=False, track_running_stats=False)(x[block])
    torch.testing.assert_close(bare(x), expected)
    torch.testing.assert_close(bare.eval()(x), expected)
    assert not bare.state_dict()


def test_conversion_keeps_the_state_dict() -> None:
    module = TinyBackbone()
    module(torch.randn(4, 3, 16, 16))
    split = split_batch_norms(copy.deepcopy(module), 4)
    assert sum(isinstance(layer, SplitBatchNorm) for layer in split.modules()) == 3
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in split.modules())
    before, after = module.state_dict(), split.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    split.load_state_dict(TinyBackbone().state_dict())  # and both ways
    assert nn.SyncBatchNorm.convert_sync_batchnorm(split).layers[1] is split.layers[1]


def test_conversion_keeps_shared_layers_and_modes() -> None:
    norm = nn.BatchNorm2d(4)
    module = nn.Sequential(norm, nn.Sequential(norm)).eval()
    split_batch_norms(module, 2)
    assert module[0] is module[1][0] and not module[0].training


def test_conversion_refuses_what_it_would_break() -> None:
    class NormAndActivation(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).relu()

    with pytest.raises(ValueError, match=r"'0.*NormAndActivation.*key_bn_groups=1"):
        split_batch_norms(nn.Sequential(NormAndActivation(4)), 2)
    with pytest.raises(ValueError, match="groups"):
        split_batch_norms(nn.Sequential(), 0)
    with pytest.raises(ValueError, match=r"\(N, 3, ...\)"):
        SplitBatchNorm(3, groups=2)(torch.randn(4, 5, 2, 2))


def test_no_image_sees_another_group() -> None:
    torch.manual_seed(0)
    encoder = split_batch_norms(TinyBackbone(), 4)
    images = torch.randn(12, 3, 16, 16)
    before = encoder(images)
    changed = images.clone()
    changed[5] += 1.0
    after = encoder(changed)
    same = torch.tensor([torch.equal(a, b) for a, b in zip(before, after, strict=True)])
    assert same.tolist() == [n // 3 != 5 // 3 for n in range(12)]
    leaking = split_batch_norms(encoder, 1)  # nothing left to convert: groups stay
    for layer in leaking.modules():
        if isinstance(layer, SplitBatchNorm):
            layer.groups = 1
    assert not any(map(torch.equal, leaking(images), leaking(changed)))


def test_shuffled_forward_restores_the_order_of_every_output() -> None:
    Outputs = namedtuple("Outputs", "images doubled nothing")
    seen: list[Tensor] = []

    def encoder(images: Tensor, *, factor: float) -> Outputs:
        seen.append(images)
        return Outputs(images, factor * images, None)

    images = torch.arange(32.0).view(16, 2)
    torch.manual_seed(0)
    out = shuffled_forward(encoder, images, factor=2.0)
    assert torch.equal(out.images, images) and torch.equal(out.doubled, 2.0 * images)
    assert out.nothing is None
    assert not torch.equal(seen[0], images)
    assert torch.equal(seen[0].sort(dim=0).values, images)
    shuffled_forward(encoder, images, factor=2.0)
    assert not torch.equal(seen[0], seen[1])  # another order at every step
    torch.manual_seed(0)
    shuffled_forward(encoder, images, factor=2.0)
    assert torch.equal(seen[0], seen[2])
    pair = shuffled_forward(lambda x: (x, x + 1), images)
    assert torch.equal(pair[1], images + 1)


def test_shuffled_forward_compiles_with_inductor() -> None:
    torch._dynamo.reset()
    images = torch.randn(6, 4)
    compiled = torch.compile(
        lambda x: shuffled_forward(lambda y: (2.0 * y, y[:, 0]), x), fullgraph=True
    )
    doubled, first = compiled(images)
    assert torch.equal(doubled, 2.0 * images) and torch.equal(first, images[:, 0])
    torch._dynamo.reset()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_layer_of_16_bit_parameters(dtype: torch.dtype, affine: bool, device: str) -> None:
    torch.manual_seed(0)
    plain = nn.BatchNorm2d(5, affine=affine).to(device, dtype)
    x = torch.randn(12, 5, 4, 3, device=device).to(dtype)
    for layout in (torch.contiguous_format, torch.channels_last):
        for with_grad in (True, False):
            split = split_batch_norms(copy.deepcopy(plain), 4)
            expected, mean, var = group_by_group(plain, x.contiguous(memory_format=layout), 4)
            with torch.set_grad_enabled(with_grad):
                got = split(x.contiguous(memory_format=layout))
            assert got.dtype == dtype and torch.equal(got, expected)
            torch.testing.assert_close(split.running_mean, mean)
            torch.testing.assert_close(split.running_var, var)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(10, 6, 5, 4), (11, 68, 3, 3), (64, 256, 14, 14), (9, 32)])
def test_without_a_gradient_as_with_one_on_a_gpu(
    shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format
) -> None:
    """Kernels of our own, or torch's into one tensor; beside torch's group by group."""
    x = (3.0 + torch.randn(shape, device="cuda")).to(dtype)
    x = x.contiguous(memory_format=layout) if x.dim() == 4 else x
    one, other = (SplitBatchNorm(shape[1], groups=4).cuda() for _ in range(2))
    for layer in (one, other):
        with torch.no_grad():
            layer.weight.copy_(torch.linspace(0.5, 2.0, shape[1]))
            layer.bias.copy_(torch.linspace(-1.0, 1.0, shape[1]))
    for _ in range(2):
        expected = one(x)
        with torch.no_grad():
            got = other(x)
        assert got.dtype == dtype and got.stride() == expected.stride()
        unit = {torch.float32: 1e-5, torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}[dtype]
        torch.testing.assert_close(got, expected.detach(), atol=unit, rtol=unit)
        torch.testing.assert_close(other.running_mean, one.running_mean, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(other.running_var, one.running_var, atol=1e-6, rtol=1e-5)


@pytest.mark.skipif(_native.missing_cuda is not None, reason="no CUDA kernels in this build")
@pytest.mark.parametrize("shape", [(16, 8, 7, 7), (16, 8), (16, 8, 3, 7, 7)])
def test_shapes_alone_go_through_the_kernels(shape: tuple[int, ...]) -> None:
    """As tracing a key encoder on a GPU does, where there is none."""
    layouts = {4: torch.channels_last, 5: torch.channels_last_3d}
    with FakeTensorMode(), torch.no_grad(), torch.device("cuda"):
        x = torch.empty(shape, dtype=torch.bfloat16)
        x = x.contiguous(memory_format=layouts.get(len(shape), torch.contiguous_format))
        layer = SplitBatchNorm(8, groups=4)
        assert takes(x, layer.weight, layer.bias, layer.running_mean, layer.running_var)
        got = layer(x)
    assert got.shape == x.shape and got.stride() == x.stride() and got.dtype == x.dtype


@pytest.mark.gpu
def test_far_values_keep_their_variance_on_a_gpu() -> None:
    """Sums of squares of values near 1,000 would lose a variance of 1e-4."""
    torch.manual_seed(0)
    x = 1000.0 + 0.01 * torch.randn(16, 8, 7, 7, device="cuda", dtype=torch.float64)
    layer = SplitBatchNorm(8, groups=4, eps=1e-12, affine=False).cuda()
    with torch.no_grad():
        got = layer(x.float().contiguous(memory_format=torch.channels_last))
    for part, out in zip(x.float().double().chunk(4), got.double().chunk(4), strict=True):
        mean = part.mean((0, 2, 3), keepdim=True)
        exact = (part - mean) / part.var((0, 2, 3), correction=0, keepdim=True).sqrt()
        torch.testing.assert_close(out, exact, atol=2e-2, rtol=1e-2)  # x itself has 24 bits
