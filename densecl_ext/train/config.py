"""The configuration of a pre-training run: one flat dataclass, and its automatic values."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from densecl_ext.options import (
    Auto,
    Duration,
    Folders,
    Fraction,
    Natural,
    NonNegativeFloat,
    Nothing,
    Numbers,
    Positive,
    PositiveFloat,
    Range,
    Share,
    Text,
    build,
    is_number,
    option,
    options,
    properties,
    words,
)

data_option, model_option, optimisation_option, machine_option, output_option = (
    functools.partial(option, group=group)
    for group in ("data", "model", "optimisation", "machine", "output")
)


@options
class PretrainConfig:
    """Everything that decides a pre-training run.

    The defaults are the paper's COCO recipe (Wang et al., CVPR 2021, section 4.1), with geometric
    matching and single-position negatives in place of matching by features and pooled ones
    (docs/training.md says why), and "auto" where the size of the data matters; `resolved` gives
    the rules. The recipes named densecl_* and mocov2_* are the papers' in everything. Values may
    be strings, as they come from YAML or the command line: they are converted and checked on
    construction.

    Raises:
        ValueError: an unknown name (with the nearest known one), or a value that does not fit; the
            message names the option, what fits and what came.
    """

    # --- data
    data: Folders = data_option(
        "",
        "folders of images, any tree, no labels; or lists (.txt, .csv), .tar shards, .parquet or "
        ".arrow tables, saved datasets; a resumed run finds the same images elsewhere",
        may_change=True,
        metavar="DIR",
    )
    every_nth: Positive = data_option(
        1, "take every n-th image alone: frames of a video are near-duplicates"
    )
    image_size: Annotated[int, Field(ge=16), is_number] = data_option(
        224, "side of the square views in pixels"
    )
    smallest_crop: Share = data_option(0.2, "area of the smallest crop, as a share of the image's")
    loader: Literal["auto", "dali", "torchvision", "memory"] = data_option(
        "auto",
        "what decodes and augments; auto: torchvision on a CPU, DALI on a GPU; memory decodes "
        "every image once and keeps it, for sets that fit",
    )
    cache_size: Auto | Positive = data_option(
        "auto",
        "with loader memory, pixels of the shorter side to which larger images are reduced; auto: "
        "1.25 x image_size",
    )
    channels: Literal["rgb"] | Positive = data_option(
        "rgb",
        "rgb makes 8-bit RGB of every image; a number reads images of that many channels at their "
        "full depth, of .npy and .npz files too",
    )
    value_range: Auto | Nothing | Range = data_option(
        "none",
        "values that become black and white in files of more than 8 bits; none: 0,65535; auto "
        "measures them over some images",
    )
    pixel_mean: Auto | Numbers = data_option(
        "auto",
        "mean of each channel, of values from 0 to 1; auto: ImageNet's for rgb, else measured",
    )
    pixel_std: Auto | Numbers = data_option(
        "auto", "deviation of each channel, which values are divided by; auto likewise"
    )
    reduced_jpeg: bool = data_option(
        False,
        "with loader torchvision, decode JPEG files at 1/2, 1/4 or 1/8 of their size where no crop "
        "must then be enlarged: twice as fast and more for photographs of many pixels",
    )
    max_pixels: Positive = data_option(
        178_956_970, "width x height above which a file is skipped", may_change=True
    )
    workers: Auto | Natural = data_option(
        "auto", "decoding processes (torchvision) or threads (DALI)", may_change=True
    )

    # --- model
    backbone: Text = model_option(
        "resnet50",
        "ResNet, RegNet or ConvNeXt by torchvision's name, or timm/NAME for any network of timm's",
        metavar="NAME",
    )
    weights: Text = model_option(
        "none",
        "start from nothing, from a file (a checkpoint, an export, anything `densecl import` "
        "reads), or from "
        "torchvision's weights of that name (IMAGENET1K_V1)",
        metavar="none|FILE|NAME",
    )
    output_stride: Nothing | Literal[8, 16, 32] = model_option(
        "none",
        "pixels between neighbouring grid positions, by dilation of the last stages, or without "
        "them; none keeps the network's own",
    )
    truncate: bool = model_option(
        False, "reach output_stride by leaving the last stages out, rather than dilating them"
    )
    padding: Literal["zeros", "reflect", "replicate"] = model_option(
        "zeros", "what convolutions see beyond the border; zeros tell features where they are"
    )
    dim: Annotated[int, Field(ge=1, le=1024), is_number] = model_option(128, "size of a key")
    hidden_dim: Positive = model_option(2048, "hidden width of both heads")
    grid_size: Nothing | Positive = model_option(
        "none",
        "pool features to this many positions a side before the dense head; none keeps the "
        "backbone's own grid",
    )
    matching: Literal["backbone", "dense", "geometric", "random"] = model_option(
        "geometric",
        "how a query position finds its key position: where the views show the same place, or by "
        "the backbone's features (the paper's), the dense head's, or at random",
    )
    geometric_share: Fraction = model_option(
        0.0, "with another matching, match by geometry for this share of the run first"
    )
    mutual_matching: bool = model_option(
        False, "with matching by features, leave out positions whose best match is not mutual"
    )
    row_weight: Literal["none", "overlap", "similarity"] = model_option(
        "none",
        "weight of a position in the dense loss: overlap of the matched cells, or similarity of "
        "their features squared",
    )
    dense_negatives: Literal["position", "pooled"] = model_option(
        "position",
        "dense keys that become negatives: single grid positions, or their mean over the grid "
        "(the paper's), which rewards features for telling their position alone",
    )
    positions_per_image: Positive = model_option(
        1, "grid positions an image adds to the dense queue"
    )
    symmetric: bool = model_option(
        False, "let the views change places and take both losses; twice the work"
    )
    predictor_dim: Nothing | Positive = model_option(
        "none", "hidden width of a predictor on the query side; none has none"
    )
    queue_length: Auto | Positive = model_option(
        "auto",
        "negatives in each queue; auto: the largest power of two up to half the images, at most "
        "65536",
    )
    queue_dtype: Literal["fp32", "bf16"] = model_option(
        "fp32", "storage and arithmetic of the queues"
    )
    queue_init: Literal["empty", "random"] = model_option(
        "empty", "start the queues empty, or with random keys as the paper does"
    )
    key_momentum: Auto | Fraction = model_option(
        "auto", "momentum of the key encoder; auto: 0.99 up to 1,000 steps, 0.999 from 10,000 on"
    )
    key_momentum_schedule: Literal["constant", "cosine"] = model_option(
        "constant", "constant, as in the paper, or along a cosine up to 1 at the end of the run"
    )
    key_bn: Literal["split", "shuffle", "sync"] = model_option(
        "split",
        "what keeps batch norm from telling which key belongs to which query; split: the key "
        "encoder normalises groups of a process's batch apart, nothing is sent; shuffle: processes "
        "exchange the key images, as in the paper; sync: both encoders normalise over the batch of "
        "all processes, so that results do not depend on their number",
    )
    key_bn_groups: Positive = model_option(
        8,
        "groups of the batch of all processes for key_bn split; a process has its share of them, "
        "and two at least",
    )
    temperature: PositiveFloat = model_option(0.2, "temperature of both losses")
    dense_temperature: Auto | PositiveFloat = model_option(
        "auto", "temperature of the dense loss; auto: that of both"
    )
    loss_lambda: Fraction = model_option(0.5, "weight of the dense loss; 0 is MoCo v2")
    lambda_warmup: Duration = model_option(0, "train with loss_lambda 0 for this long at the start")

    # --- optimisation
    epochs: Positive = optimisation_option(200, "passes over the images")
    batch_size: Positive = optimisation_option(256, "images a step, of all processes together")
    accumulate: Positive = optimisation_option(
        1, "take the batch in this many parts, for one that does not fit; batch norm sees a part"
    )
    base_lr: PositiveFloat = optimisation_option(
        0.3,
        "learning rate at batch 256; the rate used is base_lr * batch_size / 256",
        may_change=True,
    )
    lr: Auto | PositiveFloat = optimisation_option(
        "auto", "the learning rate itself, unscaled, instead of base_lr", may_change=True
    )
    schedule: Literal["step", "epoch"] = optimisation_option(
        "step", "how often the cosine lowers the learning rate; the paper does every epoch"
    )
    lr_warmup: Duration = optimisation_option(
        0, "raise the learning rate from 0 over this long at the start"
    )
    optimizer: Literal["sgd", "adamw"] = optimisation_option(
        "sgd", "sgd as in the paper; adamw for vision transformers"
    )
    layer_decay: Share = optimisation_option(
        1.0,
        "learning rate of each layer of the backbone as a share of the next one's, for "
        "pre-trained vision transformers",
    )
    weight_decay: NonNegativeFloat = optimisation_option(1e-4, "weight decay, on all parameters")
    sgd_momentum: Annotated[float, Field(ge=0, lt=1), is_number] = optimisation_option(
        0.9, "momentum of SGD"
    )
    seed: Annotated[int, Field(ge=0, le=2**31 - 1), is_number] = optimisation_option(
        0, "seed of everything random"
    )

    # --- machine
    device: Text = machine_option(
        "auto",
        "where to train; auto takes the first GPU if there is one",
        may_change=True,
        metavar="auto|cpu|cuda[:N]",
    )
    devices: Auto | Positive = machine_option(
        "auto",
        "processes on this machine, each with its own GPU or a share of the CPU's cores; auto: 1, "
        "or as many as torchrun or srun has started",
        may_change=True,
    )
    num_nodes: Positive = machine_option(
        1,
        "machines; with --devices each needs MASTER_ADDR, MASTER_PORT and NODE_RANK",
        may_change=True,
    )
    timeout: Positive = machine_option(
        1800, "seconds after which a process that does not answer counts as lost", may_change=True
    )
    precision: Literal["auto", "fp32", "bf16"] = machine_option(
        "auto",
        "arithmetic of the network, over float32 weights; auto: bf16 where the hardware multiplies "
        "it natively",
        may_change=True,
    )
    cuda_graph: bool = machine_option(
        False,
        "replay the whole training step as one CUDA graph, with the same bits; needs a GPU",
        may_change=True,
    )
    compile: bool = machine_option(
        False, "compile both encoders with torch.compile; changes the last bits", may_change=True
    )
    channels_last: bool = machine_option(True, "channels-last memory format", may_change=True)
    threads: Auto | Positive = machine_option(
        "auto", "CPU threads of torch; auto leaves torch's choice", may_change=True
    )

    # --- output
    output: Text = output_option("runs/densecl", "run folder", may_change=True, metavar="DIR")
    checkpoint_every: Duration = output_option(
        "1ep", "how often checkpoints/last.pt is renewed", may_change=True
    )
    keep_every: Natural = output_option(
        0, "also keep checkpoints/epoch_N.pt every N epochs; 0 keeps none", may_change=True
    )
    probe: Text = output_option(
        "none",
        "measure the features along the run on this folder: labelled images as `densecl evaluate` "
        "takes them, or plain images; the best checkpoint is kept as checkpoints/best.pt",
        may_change=True,
        metavar="none|DIR",
    )
    probe_every: Duration = output_option("10ep", "how often to measure", may_change=True)
    log_every: Positive = output_option(10, "steps between two log rows")
    logger: Literal["auto", "csv", "tensorboard", "wandb", "mlflow"] = output_option(
        "auto",
        "where log rows go beside metrics.csv; csv: nowhere; auto: TensorBoard, unless "
        "--no-tensorboard",
        may_change=True,
    )
    tensorboard: bool = output_option(
        True, "write TensorBoard logs beside metrics.csv", may_change=True
    )
    max_steps: Nothing | Positive = output_option(
        "none",
        "stop after this many steps, keeping the schedule of all epochs; resumable",
        may_change=True,
    )

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], *, source: str = "config") -> PretrainConfig:
        """Builds a config from names and raw values.

        Args:
            values: option name (with _ or -) -> raw value.
            source: where the values come from, for error messages.

        Raises:
            ValueError: an unknown name (with the nearest known one), or a value that does not fit.
        """
        return build(cls, values, source=source)

    @classmethod
    def of_run(cls, stored: Mapping[str, Any]) -> PretrainConfig:
        """The configuration of a run, also of one from before some options existed."""
        return cls(**{**BEFORE, **stored})

    def to_mapping(self) -> dict[str, Any]:
        """Returns plain names and values, ready for YAML or a checkpoint."""
        return dataclasses.asdict(self)

    def resolved(
        self,
        *,
        images: int,
        native_bf16: bool,
        loader: str,
        measured: Mapping[str, str] | None = None,
    ) -> PretrainConfig:
        """Replaces every "auto" that changes the result by its value, so that runs can be repeated.

        - queue_length: the largest power of two not above half the images, at most 65,536. A queue
          near the size of the data set holds keys of the very images in the batch, as false
          negatives, and keys an epoch old; with a fixed 65,536, training on small sets is unstable.
        - key_momentum: 1 - 10 / steps, kept within [0.99, 0.999]: 0.99 up to 1,000 steps, the
          paper's 0.999 from 10,000 steps on. With 0.999 the key encoder of a short run stays at
          its random start; below 0.99 it follows so closely that features collapse.
        - lr: base_lr * batch_size / 256 (linear scaling).
        - precision: bf16 if `native_bf16`, else fp32.
        - loader: `loader`, unless it is a loader of the caller's.
        - value_range, pixel_mean, pixel_std: what `measured` says.
        - data: absolute paths, so that the run goes on from any folder.

        Args:
            images: number of images in the data set.
            native_bf16: whether the device multiplies bfloat16 in hardware.
            loader: the backend that was found ("dali" or "torchvision").
            measured: option -> what the loader has measured over the images.

        Returns:
            A new config; what depends on the machine alone (device, workers, threads) stays.
        """
        steps = self.epochs * max(1, images // self.batch_size)
        values: dict[str, Any] = {}
        if self.queue_length == "auto":
            values["queue_length"] = auto_queue_length(images)
        if self.key_momentum == "auto":
            values["key_momentum"] = min(0.999, max(0.99, 1.0 - 10.0 / steps))
        if self.lr == "auto":
            values["lr"] = self.base_lr * self.batch_size / 256
        if self.loader == "auto" and loader in words(properties(PretrainConfig)["loader"]):
            values["loader"] = loader
        for name, value in (measured or {}).items():
            if getattr(self, name) == "auto":
                values[name] = value
        if self.data:
            values["data"] = absolute(self.data)
        if self.precision == "auto":
            values["precision"] = "bf16" if native_bf16 else "fp32"
        return dataclasses.replace(self, **values)


# What options did before they existed, where it is not what their default does.
BEFORE = {"dense_negatives": "pooled"}


# Options whose "auto" asks this machine, whatever the machine before had.
MACHINE = ("device", "devices", "workers", "threads")


def absolute(folders: str | list[str]) -> str | list[str]:
    """The folders' absolute paths; no folder stays none."""
    if isinstance(folders, list):
        return [os.path.abspath(folder) for folder in folders]
    return os.path.abspath(folders) if folders else folders


def auto_queue_length(images: int) -> int:
    """Largest power of two not above images / 2, from 1 to 65,536."""
    return min(65536, 1 << max(0, (images // 2).bit_length() - 1))


def merge_resumed(
    config: PretrainConfig, stored: PretrainConfig
) -> tuple[PretrainConfig, list[str]]:
    """Decides the configuration of a resumed run.

    Args:
        config: what is asked for now; "auto" accepts whatever the run used.
        stored: the resolved configuration in the checkpoint.

    Returns:
        The configuration to go on with, and the names of options that changed.

    Raises:
        ValueError: an option differs that must not change within a run.
    """
    values, changed = stored.to_mapping(), []
    for name, schema in properties(PretrainConfig).items():
        asked, had = getattr(config, name), getattr(stored, name)
        if name == "data":  # relative to where this process is, or not given with a loader
            asked, had = absolute(asked or had), absolute(had)
        if asked == had or (asked == "auto" and name not in MACHINE):
            continue
        if not schema["may_change"]:
            raise ValueError(
                f"pretrain: cannot resume with {name} = {asked!r}: the run in "
                f"{config.output} was started with {had!r}; leave the option out, or "
                "start a new run in another --output"
            )
        values[name] = asked
        changed.append(name)
    if "base_lr" in changed and "lr" not in changed:
        values["lr"] = values["base_lr"] * values["batch_size"] / 256
        changed.append("lr")
    return PretrainConfig(**values), changed
