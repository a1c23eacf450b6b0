"""A backbone as an ONNX program: images in, feature map out, for any batch and image size."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from densecl_ext.backbones.timm import TimmBackbone
from densecl_ext.checkpoints.exchange import BackboneFile, build
from densecl_ext.checkpoints.provenance import STAMP
from densecl_ext.checkpoints.verify import check_features, check_library

_TOLERANCE = 1e-3  # other kernels, and batch norm folded into convolutions


def program(source: BackboneFile) -> tuple[bytes, str]:
    """The program's bytes, checked by ONNX and, where it is installed, run by onnxruntime.

    Raises:
        ImportError: onnx or onnxscript is not installed.
        RuntimeError: the exported program computes other features.
    """
    for name in ("onnx", "onnxscript"):
        if importlib.util.find_spec(name) is None:
            raise ImportError(
                f"export_backbone: to 'onnx' needs {name}, which is not installed; "
                "pip install onnx onnxscript onnxruntime"
            )
    import onnx

    check_library(source, "timm" if source.of_timm else "torchvision")
    backbone = build(source, **source.options)
    # A vision transformer's grid is part of its program; a convolutional network takes any size.
    fixed = isinstance(backbone, TimmBackbone)
    size = backbone.native_size if isinstance(backbone, TimmBackbone) else (96, 128)
    sizes: dict[int, Any] = {0: torch.export.Dim("batch", min=1)}
    if not fixed:
        sizes |= {2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    with _quiet():
        exported = torch.onnx.export(
            backbone,
            (torch.zeros(2, source.in_channels, *size),),
            input_names=["images"],
            output_names=["features"],
            dynamic_shapes=(sizes,),
            dynamo=True,
            verbose=False,
        )
    assert exported is not None
    model = exported.model_proto
    words = json.dumps(source.provenance, sort_keys=True)
    onnx.helper.set_model_props(model, {STAMP: words})
    onnx.checker.check_model(model)
    data = model.SerializeToString()
    if importlib.util.find_spec("onnxruntime") is None:
        return data, "onnxruntime is not installed: the program was checked, not run"
    check_features(source, backbone, _session(data), _TOLERANCE)
    return data, ""


def _session(data: bytes) -> Any:
    import onnxruntime

    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])

    def features(images: Tensor) -> Tensor:
        (result,) = session.run(None, {"images": images.numpy()})
        return torch.from_numpy(result)

    return features


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter's progress and deprecations are not for the person who exports."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
