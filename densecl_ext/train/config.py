"""The configuration of a pre-training run: one flat dataclass, recipes, automatic values."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from densecl_ext.train.options import (
    boolean,
    choice,
    duration,
    integer,
    number,
    option,
    text,
    word_or,
)

RECIPES = Path(__file__).resolve().parent.parent / "recipes"


@dataclasses.dataclass
class PretrainConfig:
    """Everything that decides a pre-training run.

    The defaults are the paper's COCO recipe (Wang et al., CVPR 2021, section 4.1) where the size
    of the data does not matter, and "auto" where it does; `resolved` gives the rules. Values may
    be strings, as they come from YAML or the command line: they are converted and checked on
    construction.

    Raises:
        ValueError: a value does not fit; the message names the option, what fits and what came.
    """

    # --- data
    data: str = option("", text("DIR"), "folder of images, any tree, no labels", group="data")
    image_size: int = option(224, integer(16), "side of the square views in pixels", group="data")
    loader: str = option(
        "auto",
        choice("auto", "dali", "torchvision"),
        "what decodes and augments; auto: torchvision on a CPU, DALI on a GPU",
        group="data",
    )
    workers: int | str = option(
        "auto",
        word_or("auto", integer(0)),
        "decoding processes (torchvision) or threads (DALI)",
        group="data",
        may_change=True,
    )

    # --- model
    backbone: str = option(
        "resnet50",
        text("NAME"),
        "name of a torchvision ResNet, or timm/NAME for any network of timm's",
        group="model",
    )
    weights: str = option(
        "none",
        text("none|FILE|NAME"),
        "start from nothing, from a file (a checkpoint, an export, anything `densecl import` "
        "reads), or from "
        "torchvision's weights of that name (IMAGENET1K_V1)",
        group="model",
    )
    dim: int = option(128, integer(1, 1024), "size of a key", group="model")
    hidden_dim: int = option(2048, integer(1), "hidden width of both heads", group="model")
    grid_size: int | str = option(
        "none",
        word_or("none", integer(1)),
        "pool features to this many positions a side before the dense head; none keeps the "
        "backbone's own grid",
        group="model",
    )
    matching: str = option(
        "backbone",
        choice("backbone", "dense", "geometric", "random"),
        "how a query position finds its key position",
        group="model",
    )
    queue_length: int | str = option(
        "auto",
        word_or("auto", integer(1)),
        "negatives in each queue; auto: the largest power of two up to half the images, at most "
        "65536",
        group="model",
    )
    queue_dtype: str = option(
        "fp32", choice("fp32", "bf16"), "storage and arithmetic of the queues", group="model"
    )
    queue_init: str = option(
        "empty",
        choice("empty", "random"),
        "start the queues empty, or with random keys as the paper does",
        group="model",
    )
    key_momentum: float | str = option(
        "auto",
        word_or("auto", number(0.0, 1.0)),
        "momentum of the key encoder; auto: 0.99 up to 1,000 steps, 0.999 from 10,000 on",
        group="model",
    )
    key_momentum_schedule: str = option(
        "constant",
        choice("constant", "cosine"),
        "constant, as in the paper, or along a cosine up to 1 at the end of the run",
        group="model",
    )
    key_bn_groups: int = option(
        8,
        integer(1),
        "groups of the key batch that are normalised apart (1 GPU's stand-in for Shuffle-BN)",
        group="model",
    )
    temperature: float = option(
        0.2, number(0.0, above=True), "temperature of both losses", group="model"
    )
    loss_lambda: float = option(
        0.5, number(0.0, 1.0), "weight of the dense loss; 0 is MoCo v2", group="model"
    )
    lambda_warmup: int | str = option(
        0, duration(), "train with loss_lambda 0 for so long first", group="model"
    )

    # --- optimisation
    epochs: int = option(200, integer(1), "passes over the images", group="optimisation")
    batch_size: int = option(256, integer(1), "images a step", group="optimisation")
    base_lr: float = option(
        0.3,
        number(0.0, above=True),
        "learning rate at batch 256; the rate used is base_lr * batch_size / 256",
        group="optimisation",
        may_change=True,
    )
    lr: float | str = option(
        "auto",
        word_or("auto", number(0.0, above=True)),
        "the learning rate itself, unscaled, instead of base_lr",
        group="optimisation",
        may_change=True,
    )
    schedule: str = option(
        "step",
        choice("step", "epoch"),
        "how often the cosine lowers the learning rate; the paper does every epoch",
        group="optimisation",
    )
    weight_decay: float = option(
        1e-4, number(0.0), "weight decay, on all parameters", group="optimisation"
    )
    sgd_momentum: float = option(
        0.9, number(0.0, 1.0, below=True), "momentum of SGD", group="optimisation"
    )
    seed: int = option(0, integer(0, 2**31 - 1), "seed of everything random", group="optimisation")

    # --- machine
    device: str = option(
        "auto",
        text("auto|cpu|cuda[:N]"),
        "where to train; auto takes the first GPU if there is one",
        group="machine",
        may_change=True,
    )
    precision: str = option(
        "auto",
        choice("auto", "fp32", "bf16"),
        "arithmetic of the network, over float32 weights; auto: bf16 where the hardware multiplies "
        "it natively",
        group="machine",
        may_change=True,
    )
    cuda_graph: bool = option(
        False,
        boolean(),
        "replay the whole training step as one CUDA graph, with the same bits; needs a GPU",
        group="machine",
        may_change=True,
    )
    compile: bool = option(
        False,
        boolean(),
        "compile both encoders with torch.compile; changes the last bits",
        group="machine",
        may_change=True,
    )
    channels_last: bool = option(
        True, boolean(), "channels-last memory format", group="machine", may_change=True
    )
    threads: int | str = option(
        "auto",
        word_or("auto", integer(1)),
        "CPU threads of torch; auto leaves torch's choice",
        group="machine",
        may_change=True,
    )

    # --- output
    output: str = option("runs/densecl", text("DIR"), "run folder", group="output", may_change=True)
    checkpoint_every: int | str = option(
        "1ep",
        duration(),
        "how often checkpoints/last.pt is renewed",
        group="output",
        may_change=True,
    )
    keep_every: int = option(
        0,
        integer(0),
        "also keep checkpoints/epoch_N.pt every so many epochs; 0 keeps none",
        group="output",
        may_change=True,
    )
    log_every: int = option(10, integer(1), "steps between two log rows", group="output")
    tensorboard: bool = option(
        True,
        boolean(),
        "write TensorBoard logs beside metrics.csv",
        group="output",
        may_change=True,
    )
    max_steps: int | str = option(
        "none",
        word_or("none", integer(1)),
        "stop after so many steps, keeping the schedule of all epochs; resumable",
        group="output",
        may_change=True,
    )

    def __post_init__(self) -> None:
        """Converts and checks every value."""
        for field in dataclasses.fields(self):
            try:
                value = field.metadata["parser"](getattr(self, field.name))
            except ValueError as error:
                raise ValueError(f"PretrainConfig: {field.name}: {error}") from None
            setattr(self, field.name, value)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], *, source: str = "config") -> PretrainConfig:
        """Builds a config from names and raw values.

        Args:
            values: option name (with _ or -) -> raw value.
            source: where the values come from, for error messages.

        Raises:
            ValueError: an unknown name (with the nearest known one), or a value that does not fit.
        """
        return cls(**check_names(values, source=source))

    def to_mapping(self) -> dict[str, Any]:
        """Returns plain names and values, ready for YAML or a checkpoint."""
        return dataclasses.asdict(self)

    def resolved(self, *, images: int, native_bf16: bool, loader: str) -> PretrainConfig:
        """Replaces every "auto" that changes the result by its value, so that runs can be repeated.

        - queue_length: the largest power of two not above half the images, at most 65,536. A queue
          near the size of the data set holds keys of the very images in the batch, as false
          negatives, and keys an epoch old; with a fixed 65,536, training on small sets is unstable.
        - key_momentum: 1 - 10 / steps, kept within [0.99, 0.999]: 0.99 up to 1,000 steps, the
          paper's 0.999 from 10,000 steps on. With 0.999 the key encoder of a short run stays at
          its random start; below 0.99 it follows so closely that features collapse.
        - lr: base_lr * batch_size / 256 (linear scaling).
        - precision: bf16 if `native_bf16`, else fp32.
        - loader: `loader`.

        Args:
            images: number of images in the data set.
            native_bf16: whether the device multiplies bfloat16 in hardware.
            loader: the backend that was found ("dali" or "torchvision").

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
        if self.loader == "auto":
            values["loader"] = loader
        if self.precision == "auto":
            values["precision"] = "bf16" if native_bf16 else "fp32"
        return dataclasses.replace(self, **values)


def auto_queue_length(images: int) -> int:
    """Largest power of two not above images / 2, from 1 to 65,536."""
    return min(65536, 1 << max(0, (images // 2).bit_length() - 1))


def check_names(values: Mapping[str, Any], *, source: str) -> dict[str, Any]:
    """Returns the mapping with field names, or raises ValueError with the nearest known name."""
    known = [field.name for field in dataclasses.fields(PretrainConfig)]
    checked = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; known: {', '.join(known)}"
            raise ValueError(f"{source}: unknown option {key!r}{hint}")
        checked[name] = value
    return checked


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_recipe(recipe: str | Path) -> dict[str, Any]:
    """Reads a recipe: option names and raw values.

    Args:
        recipe: a YAML file, or the name of a recipe that comes with the package.

    Returns:
        Field name -> raw value, names checked.

    Raises:
        ValueError: no such recipe, not YAML, not a mapping, an unknown option.
    """
    import yaml

    path = Path(recipe)
    if not path.is_file():
        path = RECIPES / f"{recipe}.yaml"
    if not path.is_file():
        near = difflib.get_close_matches(str(recipe), recipe_names(), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(
            f"recipe: {str(recipe)!r} is neither a file nor one of "
            f"{', '.join(recipe_names())}{hint}"
        )
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"recipe {path}: not valid YAML: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(
            f"recipe {path}: expected lines `option: value`, got a {type(values).__name__}"
        )
    return check_names(values, source=f"recipe {path}")


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
    for field in dataclasses.fields(PretrainConfig):
        asked, had = getattr(config, field.name), getattr(stored, field.name)
        if asked == had or (asked == "auto" and field.name not in ("device", "workers", "threads")):
            continue
        if not field.metadata["may_change"]:
            raise ValueError(
                f"pretrain: cannot resume with {field.name} = {asked!r}: the run in "
                f"{config.output} was started with {had!r}; leave the option out, or "
                "start a new run in another --output"
            )
        values[field.name] = asked
        changed.append(field.name)
    if "base_lr" in changed and "lr" not in changed:
        values["lr"] = values["base_lr"] * values["batch_size"] / 256
        changed.append("lr")
    return PretrainConfig(**values), changed
