"""How libraries name the tensors of one and the same ResNet, and the way between their names."""

from __future__ import annotations

import re

# Torchvision's name -> the other library's, as a pattern and what it becomes. `{n-1}` counts from
# one in torchvision's names and from zero in the other's.
_BN = r"(weight|bias|running_mean|running_var|num_batches_tracked)"


def to_huggingface(name: str) -> str:
    """Torchvision's name of a ResNet's tensor -> that of transformers' ResNet.

    Raises:
        ValueError: no such name in a ResNet without its classifier.
    """
    stem = {"conv1": "convolution", "bn1": "normalization"}
    if match := re.fullmatch(rf"(conv1|bn1)\.{_BN}", name):
        return f"embedder.embedder.{stem[match[1]]}.{match[2]}"
    if match := re.fullmatch(rf"layer(\d)\.(\d+)\.(conv|bn)(\d)\.{_BN}", name):
        stage, block, kind, number, last = match.groups()
        part = f"layer.{int(number) - 1}.{stem[f'{kind}1']}"
    elif match := re.fullmatch(rf"layer(\d)\.(\d+)\.downsample\.([01])\.{_BN}", name):
        stage, block, kind, last = match.groups()
        part = f"shortcut.{'convolution' if kind == '0' else 'normalization'}"
    else:
        raise ValueError(f"{name} is no tensor of a ResNet")
    return f"encoder.stages.{int(stage) - 1}.layers.{block}.{part}.{last}"


def from_huggingface(name: str) -> str:
    """The way back; names of no such form stay as they are."""
    stem = {"convolution": "conv", "normalization": "bn"}
    if match := re.fullmatch(rf"embedder\.embedder\.(\w+)\.{_BN}", name):
        return f"{stem.get(match[1], match[1])}1.{match[2]}"
    block = rf"encoder\.stages\.(\d)\.layers\.(\d+)\.(?:layer\.(\d)|shortcut)\.(\w+)\.{_BN}"
    if match := re.fullmatch(block, name):
        stage, number, inner, kind, last = match.groups()
        if inner is None:
            part = f"downsample.{int(kind == 'normalization')}"
        else:
            part = f"{stem.get(kind, kind)}{int(inner) + 1}"
        return f"layer{int(stage) + 1}.{number}.{part}.{last}"
    return name


def to_detectron2(name: str) -> str:
    """Torchvision's name of a ResNet's tensor -> that of detectron2's ResNet; raises ValueError."""
    if match := re.fullmatch(rf"(conv1|bn1)\.{_BN}", name):
        return f"stem.conv1.{'norm.' if match[1] == 'bn1' else ''}{match[2]}"
    if match := re.fullmatch(rf"layer(\d)\.(\d+)\.(conv|bn)(\d)\.{_BN}", name):
        stage, block, kind, number, last = match.groups()
        part = f"conv{number}{'.norm' if kind == 'bn' else ''}"
    elif match := re.fullmatch(rf"layer(\d)\.(\d+)\.downsample\.([01])\.{_BN}", name):
        stage, block, kind, last = match.groups()
        part = f"shortcut{'.norm' if kind == '1' else ''}"
    else:
        raise ValueError(f"{name} is no tensor of a ResNet")
    return f"res{int(stage) + 1}.{block}.{part}.{last}"


def from_detectron2(name: str) -> str:
    """The way back; names of no such form stay as they are."""
    if match := re.fullmatch(rf"stem\.conv1\.(norm\.)?{_BN}", name):
        return f"{'bn1' if match[1] else 'conv1'}.{match[2]}"
    block = rf"res([2-5])\.(\d+)\.(?:conv(\d)|shortcut)\.(norm\.)?{_BN}"
    if match := re.fullmatch(block, name):
        stage, number, inner, norm, last = match.groups()
        if inner is None:
            part = f"downsample.{int(bool(norm))}"
        else:
            part = f"{'bn' if norm else 'conv'}{inner}"
        return f"layer{int(stage) - 1}.{number}.{part}.{last}"
    return name


# What `Sequential(*list(resnet.children()))` makes of the modules' names.
_SEQUENTIAL = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}


def from_sequential(name: str) -> str:
    """The name of a ResNet's tensor in a Sequential of its children -> torchvision's."""
    first, _, rest = name.partition(".")
    return f"{_SEQUENTIAL.get(first, first)}.{rest}"
