"""Containers of other libraries: the folder of a model hub, detectron2's pickle."""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from densecl_ext.backbones.timm import TIMM, TimmBackbone, create_timm
from densecl_ext.checkpoints.exchange import BackboneFile
from densecl_ext.checkpoints.names import from_huggingface, to_huggingface
from densecl_ext.checkpoints.storage import TEMPORARY_PREFIX
from densecl_ext.checkpoints.verify import (
    Features,
    check_features,
    last_features,
    plain_backbone,
)
from densecl_ext.checkpoints.writing import require_equal, write_file, write_weights

TIMM_WEIGHTS = "model.safetensors"
TRANSFORMERS_WEIGHTS = "transformers.safetensors"
# Depths and kind of block of the ResNets that transformers' own class can be.
_TRANSFORMERS = {
    "resnet18": ([2, 2, 2, 2], "basic"),
    "resnet34": ([3, 4, 6, 3], "basic"),
    "resnet50": ([3, 4, 6, 3], "bottleneck"),
    "resnet101": ([3, 4, 23, 3], "bottleneck"),
    "resnet152": ([3, 8, 36, 3], "bottleneck"),
}
# Rounding of other kernels for the same layers.
_TOLERANCE = 1e-4


def write_huggingface(source: BackboneFile, output: Path) -> dict[str, str]:
    """Writes the folder that timm and, of a ResNet, transformers load.

    Both look for model.safetensors and config.json, under different names for the same weights.
    One config.json serves both, and tells transformers of a file of its own.

    Returns:
        Library -> "loaded" or, where it is not installed, "names".

    Raises:
        ValueError: the output is a file.
        RuntimeError: a library does not load it, or computes other features.
    """
    if output.exists() and not output.is_dir():
        raise ValueError(f"export_backbone: the output {output} must be a folder, it is a file")
    if (output / "checkpoints").exists():
        raise ValueError(f"export_backbone: the output {output} is the folder of a run")
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        stage = Path(tempfile.mkdtemp(dir=output.parent, prefix=TEMPORARY_PREFIX))
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(output)) from None
    try:
        (stage / "config.json").write_text(json.dumps(_config(source), indent=2) + "\n")
        (stage / "preprocessor_config.json").write_text(
            json.dumps(_preprocessor(source), indent=2) + "\n"
        )
        write_weights(stage / TIMM_WEIGHTS, source.tensors, source.provenance)
        backbone = plain_backbone(source)
        check_features(source, backbone, _timm_folder(stage, backbone), 0.0)
        loads = {"timm": "loaded"}
        if source.architecture in _TRANSFORMERS:
            named = {to_huggingface(key): value for key, value in source.tensors.items()}
            write_weights(stage / TRANSFORMERS_WEIGHTS, named, source.provenance)
            if {from_huggingface(key) for key in named} != source.tensors.keys():
                raise RuntimeError(f"{source.path}: transformers' names do not lead back")
            loads["transformers"] = "names"
            if importlib.util.find_spec("transformers") is not None:
                check_features(source, backbone, _transformers_folder(stage), _TOLERANCE)
                loads["transformers"] = "loaded"
        output.mkdir(exist_ok=True)
        for file in sorted(stage.iterdir()):
            os.replace(file, output / file.name)
    except RuntimeError as error:  # names the file that a person asked for
        raise RuntimeError(str(error).replace(str(stage), str(output))) from error
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(output)) from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    return loads


def write_detectron2(output: Path, tensors: Mapping[str, Tensor], words: Mapping[str, Any]) -> None:
    """Writes detectron2's pickle of arrays (.pkl), or the same with tensors (.pth).

    `matching_heuristics` makes its checkpointer find the names below any prefix.
    """
    around = {"__author__": "densecl_ext", "matching_heuristics": True, "densecl_ext": dict(words)}
    if output.suffix != ".pkl":
        write_weights(output, tensors, words, wrap=lambda state: {"model": state, **around})
        return
    arrays = {key: value.cpu().numpy() for key, value in tensors.items()}
    data = pickle.dumps({"model": arrays, **around}, protocol=4)

    def verify(temporary: Path) -> None:
        require_equal(temporary, output, tensors)

    write_file(output, lambda file: file.write(data), verify)


def _config(source: BackboneFile) -> dict[str, Any]:
    name = source.architecture.removeprefix(TIMM)
    values = source.provenance["normalisation"]
    with torch.device("meta"):
        network = create_timm(name)
    default = network.default_cfg
    channels = source.in_channels
    first = default.get("first_conv") if channels == 3 else None  # else timm would adapt it again
    config: dict[str, Any] = {
        "architecture": name,
        "num_classes": 0,
        "num_features": network.num_features,
        "pretrained_cfg": {
            "mean": values["mean"],
            "std": values["std"],
            "num_classes": 0,
            "input_size": [channels, *default["input_size"][1:]],
            "interpolation": default.get("interpolation", "bicubic"),
            "crop_pct": default.get("crop_pct", 0.875),
            "fixed_input_size": bool(default.get("fixed_input_size", False)),
            "first_conv": first,
            "classifier": default.get("classifier"),
            "license": "",
        },
    }
    if channels != 3:
        config["model_args"] = {"in_chans": channels}
    if name in _TRANSFORMERS:
        depths, layer_type = _TRANSFORMERS[name]
        widths = [64, 128, 256, 512]
        config |= {
            "model_type": "resnet",
            "architectures": ["ResNetBackbone"],
            "num_channels": channels,
            "embedding_size": 64,
            "hidden_sizes": [w * (4 if layer_type == "bottleneck" else 1) for w in widths],
            "depths": depths,
            "layer_type": layer_type,
            "hidden_act": "relu",
            "downsample_in_first_stage": False,
            "downsample_in_bottleneck": False,
            "out_features": ["stage4"],
            "transformers_weights": TRANSFORMERS_WEIGHTS,
        }
    return config


def _preprocessor(source: BackboneFile) -> dict[str, Any]:
    values = source.provenance["normalisation"]
    return {
        "image_processor_type": "ConvNextImageProcessor",
        "size": {"shortest_edge": 224},
        "crop_pct": 0.875,
        "do_resize": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": values["mean"],
        "image_std": values["std"],
    }


def _timm_folder(folder: Path, backbone: Any) -> Features:
    import timm

    with torch.random.fork_rng(devices=[]):
        network: Any = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0)
    network.eval()
    if isinstance(backbone, TimmBackbone):
        return last_features(network, backbone)
    return network.forward_features


def _transformers_folder(folder: Path) -> Features:
    import transformers

    with torch.random.fork_rng(devices=[]):
        # Not AutoBackbone, which asks the hub for a repository of the folder's name (5.24).
        loaded: Any = transformers.ResNetBackbone.from_pretrained(
            str(folder), output_loading_info=True, local_files_only=True
        )
    network, told = loaded
    wrong = {kind: list(names)[:3] for kind, names in told.items() if names}
    if wrong:
        raise RuntimeError(f"transformers does not load it exactly: {wrong}")
    return lambda images: network.eval()(images).feature_maps[-1]
