"""Changes to a built network that keep the names of its weights: dilation, padding, truncation.

All of it works on the modules, after weights were made or loaded, so that a state dict of the plain
network loads into the changed one and back.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

PADDINGS = ("zeros", "reflect", "replicate")
OUTPUT_STRIDES = (8, 16, 32)


def check_options(output_stride: int | None, padding: str) -> None:
    """Raises ValueError for an output stride or a padding mode that no backbone has."""
    if output_stride is not None and output_stride not in OUTPUT_STRIDES:
        raise ValueError(
            f"build_backbone: output_stride must be one of {', '.join(map(str, OUTPUT_STRIDES))} "
            f"or None for the network's own, got {output_stride!r}"
        )
    if padding not in PADDINGS:
        raise ValueError(
            f"build_backbone: padding must be one of {', '.join(PADDINGS)}, got {padding!r}"
        )


def dilate(stage: nn.Module, dilation: int) -> int:
    """Let a stage keep its input's grid: strides become 1, and what follows them is dilated.

    As in Yu and Koltun (2016) and torchvision's ``replace_stride_with_dilation``: a strided
    convolution keeps the dilation of what comes before it, later ones get that times its stride.
    At every position of the coarse grid the result is what the strided stage computes there.

    Args:
        stage: a stage of which the first spatial convolution is the strided one, with 1 x 1
            convolutions wherever else.
        dilation: the dilation of the stage before; 1 if none was dilated.

    Returns:
        The dilation of the stage, for the next one.
    """
    found = list(_convolutions(stage))
    factor = max(conv.stride[0] for _, _, conv in found)
    for parent, name, conv in found:
        rate = dilation if conv.stride[0] > 1 else dilation * factor
        if conv.kernel_size == (1, 1):
            rate = 1  # it changes nothing there, but may choose a slower algorithm
        padding = tuple(rate * (side - 1) // 2 for side in conv.kernel_size)
        setattr(parent, name, _rebuilt(conv, stride=1, dilation=rate, padding=padding))
    return dilation * factor


def set_padding(network: nn.Module, padding: str, name: str) -> None:
    """Give every padded convolution the padding mode, in place.

    Max pooling stays: it pads with minus infinity, so it takes the maximum of the pixels that are
    there. Reflected or repeated pixels lie in the same windows of 3 x 3 and change no maximum.

    Args:
        network: any network.
        padding: "zeros" changes nothing; "reflect" or "replicate".
        name: the network's name for errors.

    Raises:
        ValueError: no convolution is padded, or one pads inside a forward of its own.
    """
    if padding == "zeros":
        return
    spatial = [found for found in _convolutions(network) if found[2].kernel_size != (1, 1)]
    padded = [found for found in spatial if found[2].padding not in ((0, 0), "valid")]
    own = [type(conv).__name__ for _, _, conv in spatial if type(conv) is not nn.Conv2d]
    if own or not padded:
        reason = (
            f"its {own[0]} layers pad in their own way" if own else "none of its layers is padded"
        )
        raise ValueError(
            f"build_backbone: padding of {name} must be 'zeros', got {padding!r}: {reason}"
        )
    for parent, child, conv in padded:
        setattr(parent, child, _rebuilt(conv, padding_mode=padding))


def adapt_weight(weight: Tensor, channels: int) -> Tensor:
    """A first convolution's weights for another number of input channels.

    Whatever the number, an image whose channels are all equal gives what its gray gave in the
    channels before. Fewer channels share the sum over all; more take turns with those that are
    there, and what one stands for several times is divided among them.

    Args:
        weight: (out, in, kh, kw), of groups 1.
        channels: the new number of inputs.

    Returns:
        (out, channels, kh, kw), in the same dtype.
    """
    had = weight.shape[1]
    if channels < had:
        return (weight.sum(dim=1, keepdim=True) / channels).repeat(1, channels, 1, 1)
    turns = [number % had for number in range(channels)]
    share = torch.tensor([1 / turns.count(turn) for turn in turns], dtype=weight.dtype)
    return weight[:, turns] * share.to(weight.device)[:, None, None]


def set_in_channels(network: nn.Module, channels: int, *, pretrained: bool) -> None:
    """Let a network's first convolution take images of another number of channels, in place.

    Args:
        network: a network whose first registered convolution sees the image.
        channels: of the images.
        pretrained: adapt its weights; otherwise they are drawn anew, as wide as they were.
    """
    parent, child, conv = next(_convolutions(network))
    if conv.in_channels == channels:
        return
    twin = _rebuilt(conv, in_channels=channels)
    if pretrained:
        weight = adapt_weight(conv.weight.detach(), channels)
    else:
        old = conv.weight.detach()
        weight = torch.empty_like(old[:, :1]).repeat(1, channels, 1, 1)
        if old.device.type != "meta":
            weight.normal_(0.0, float(old.std()))
    twin.weight = nn.Parameter(weight)
    setattr(parent, child, twin)


def first_convolution(network: nn.Module) -> tuple[str, nn.Conv2d]:
    """Name and module of the convolution that sees the image.

    Raises:
        ValueError: there is none.
    """
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            return name, module
    raise ValueError(f"{type(network).__name__} has no convolution")


def explain_reflection(error: RuntimeError, name: str, padding: str, images: Tensor) -> None:
    """Raises ValueError where an error says that a map was too small to be reflected."""
    if padding == "reflect" and "adding size should be less" in str(error):
        height, width = images.shape[2:]
        raise ValueError(
            f"{name}: images of {height} x {width} are too small for padding='reflect': some map "
            "is no larger than what is reflected; take larger images or padding='replicate'"
        ) from error


def keep_until(network: nn.Module, stage: str) -> None:
    """Remove every module that is registered after a stage, in place.

    Args:
        network: a module that runs its children in order, and so down to the stage.
        stage: dotted name of the last module to keep.
    """
    head, _, rest = stage.partition(".")
    names = [name for name, _ in network.named_children()]
    for name in names[names.index(head) + 1 :]:
        delattr(network, name)
    if rest:
        keep_until(getattr(network, head), rest)


def left_out_parts(before: Iterable[str], after: Iterable[str]) -> tuple[str, ...]:
    """The outermost parts of a network that hold nothing any more, by its state dict's names.

    Args:
        before: names of the whole network.
        after: names of what is left of it.
    """
    kept = {prefix for name in after for prefix in _prefixes(name)}
    parts = (next((p for p in _prefixes(name) if p not in kept), None) for name in before)
    return tuple(dict.fromkeys(part for part in parts if part is not None))


def warn_truncated(name: str, output_stride: int, left_out: tuple[str, ...]) -> None:
    """Say that an output stride was reached by leaving the last stages out."""
    warnings.warn(
        f"build_backbone: {name} cannot be dilated, so output_stride={output_stride} leaves out "
        f"{', '.join(left_out)}; truncate=True says that this is meant",
        UserWarning,
        stacklevel=2,
    )


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]


def _convolutions(module: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Conv2d]]:
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Conv2d):
                yield parent, name, child


def _rebuilt(conv: nn.Conv2d, **changes: Any) -> nn.Conv2d:
    """The convolution with other settings and the same parameters; draws no random number."""
    settings: dict[str, Any] = {
        name: getattr(conv, name)
        for name in ("in_channels", "stride", "padding", "dilation", "groups", "padding_mode")
    }
    twin = nn.Conv2d(
        out_channels=conv.out_channels,
        kernel_size=conv.kernel_size,  # type: ignore[arg-type]
        bias=conv.bias is not None,
        device=torch.device("meta"),
        **(settings | changes),
    )
    twin.weight, twin.bias = conv.weight, conv.bias
    return twin.train(conv.training)
