from __future__ import annotations

import pytest
import torch
from tiny_models import TinyBackbone
from torch import Tensor, nn

from densecl_ext.nn.momentum import MomentumEncoder


def test_parameters_follow_and_buffers_do_not() -> None:
    torch.manual_seed(0)
    module = TinyBackbone()
    encoder = MomentumEncoder(module, momentum=0.75)
    start = {name: p.clone() for name, p in encoder.module.named_parameters()}
    module(torch.randn(4, 3, 16, 16))  # moves the module's running statistics
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1.0)
    encoder.update_(module)
    for name, parameter in encoder.module.named_parameters():
        torch.testing.assert_close(parameter.data, start[name] + 0.25, msg=name)
    assert not encoder.module.layers[1].running_mean.any()
    assert module.layers[1].running_mean.any()


def test_never_asks_for_a_gradient() -> None:
    module = nn.Linear(3, 2)
    encoder = MomentumEncoder(module)
    assert not any(p.requires_grad for p in encoder.parameters())
    assert all(p.requires_grad for p in module.parameters())
    assert not encoder(torch.randn(2, 3, requires_grad=True)).requires_grad


def test_tied_parameters_move_once() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    module[1].weight = module[0].weight
    encoder = MomentumEncoder(module, momentum=0.5)
    start = encoder.module[0].weight.clone()
    with torch.no_grad():
        module[0].weight.add_(1.0)
    encoder.update_(module)
    assert encoder.module[0].weight is encoder.module[1].weight
    torch.testing.assert_close(encoder.module[0].weight.data, start + 0.5)


@pytest.mark.parametrize("momentum", [0.0, 1.0])
def test_limits_of_momentum(momentum: float) -> None:
    module = nn.Linear(3, 2)
    encoder = MomentumEncoder(module, momentum)
    before = encoder.module.weight.clone()
    with torch.no_grad():
        module.weight.add_(1.0)
    encoder.update_(module)
    assert torch.equal(encoder.module.weight, module.weight if momentum == 0.0 else before)


def test_copy_takes_over_parameters_and_buffers() -> None:
    module = TinyBackbone()
    encoder = MomentumEncoder(module, bn_groups=2)
    other = TinyBackbone()
    other(torch.randn(4, 3, 16, 16))
    encoder.copy_(other)
    for name, value in encoder.module.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    assert all(
        a.data_ptr() != b.data_ptr()
        for a, b in zip(encoder.parameters(), other.parameters(), strict=True)
    )


def test_errors() -> None:
    with pytest.raises(ValueError, match="momentum"):
        MomentumEncoder(nn.Linear(2, 2), momentum=1.1)
    encoder = MomentumEncoder(nn.Linear(3, 2))
    before = encoder.module.weight.clone()
    with pytest.raises(ValueError, match="'bias'"):
        encoder.update_(nn.Linear(3, 2, bias=False))
    with pytest.raises(ValueError, match=r"'weight'.*\(2, 3\).*\(2, 4\)"):
        encoder.update_(nn.Linear(4, 2))
    assert torch.equal(encoder.module.weight, before)


def test_wrappers_of_the_query_encoder_are_looked_through() -> None:
    """torch.compile of the module, of a part of it, in place; DataParallel; and both at once."""
    torch.manual_seed(0)
    module = TinyBackbone()
    part = TinyBackbone()
    part.layers[0] = torch.compile(part.layers[0], backend="eager")
    part.load_state_dict(
        {
            name.replace("layers.0.", "layers.0._orig_mod."): value
            for name, value in module.state_dict().items()
        }
    )
    ways = [
        torch.compile(module, backend="eager"),
        nn.DataParallel(module),
        nn.DataParallel(torch.compile(module, backend="eager")),
        torch.compile(nn.DataParallel(module), backend="eager"),
        part,
    ]
    for wrapped in ways:
        for start in (TinyBackbone(), wrapped):
            encoder = MomentumEncoder(start, momentum=0.5)
            middle = [(a + b) / 2 for a, b in pairs(encoder, module)]
            encoder.update_(wrapped)
            for (moved, _), expected in zip(pairs(encoder, module), middle, strict=True):
                torch.testing.assert_close(moved, expected)
            encoder.copy_(wrapped)
            assert all(torch.equal(a, b) for a, b in pairs(encoder, module))
        expected = module.layers[0](torch.ones(1, 3, 8, 8))
        assert torch.equal(encoder.module.layers[0](torch.ones(1, 3, 8, 8)), expected)


def pairs(encoder: MomentumEncoder, module: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Parameters of both, without gradient."""
    both = zip(encoder.module.parameters(), module.parameters(), strict=True)
    return [(a.detach(), b.detach()) for a, b in both]


def test_parts_by_name_stand_for_the_module() -> None:
    module = nn.ModuleDict({"backbone": nn.Linear(3, 2), "neck": nn.Linear(2, 2)})
    encoder = MomentumEncoder(nn.ModuleDict(module), momentum=0.5)
    with torch.no_grad():
        module["neck"].bias.add_(1.0)
    encoder.update_(dict(module))
    torch.testing.assert_close(encoder.module["neck"].bias, module["neck"].bias - 0.5)
