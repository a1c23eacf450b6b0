"""Two modules' parameters as pairs, whatever the modules are wrapped in."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from densecl_ext.ops import _checks


def paired_parameters(
    owner: str, target: nn.Module, source: nn.Module | Mapping[str, nn.Module]
) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters of two modules, paired by name, tied ones once.

    Wrappers are looked through: torch.compile's, of the module and of parts of it, and those of
    DataParallel and DistributedDataParallel. The source may also come as its parts by name.

    Raises:
        ValueError: names or shapes that differ.
    """
    targets, sources = _named_parameters(target), _named_parameters(source)
    if targets.keys() != sources.keys():
        lacking = sorted(targets.keys() - sources.keys())
        unknown = sorted(sources.keys() - targets.keys())
        raise ValueError(
            f"{owner}: the module that is followed must have the same parameters; it lacks "
            f"{lacking[:3]} and has besides {unknown[:3]} "
            f"({len(lacking)} and {len(unknown)} in all)"
        )
    for name, parameter in targets.items():
        if parameter.shape != sources[name].shape:
            raise ValueError(
                f"{owner}: parameter {name!r} must have shape {_checks.size(parameter)}, "
                f"got {_checks.size(sources[name])}"
            )
    return list(targets.values()), [sources[name] for name in targets]


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside torch.compile's, DataParallel's or DistributedDataParallel's wrapper."""
    while True:
        if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            module = module.module
        elif isinstance(inner := getattr(module, "_orig_mod", None), nn.Module):
            module = inner
        else:
            return module


def plain_name(name: str) -> str:
    """A parameter's or buffer's name without what torch.compile puts before parts of a module."""
    return name.replace("_orig_mod.", "")


def _named_parameters(module: nn.Module | Mapping[str, nn.Module]) -> dict[str, Tensor]:
    parts = module if isinstance(module, Mapping) else {"": module}
    return {
        plain_name(name): parameter
        for prefix, part in parts.items()
        for name, parameter in unwrapped(part).named_parameters(prefix)
    }
