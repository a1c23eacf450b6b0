"""The configuration: checks, automatic values, recipes, and what a resumed run may change."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from densecl_ext.train import PretrainConfig, load_recipe, recipe_names
from densecl_ext.train.config import auto_queue_length, merge_resumed
from densecl_ext.train.recipes import RECIPES, SCHEMA, dump_recipe, recipe_schema
from densecl_ext.train.schedule import cosine_lr, cosine_momentum, duration_in_steps

DATA = Path(__file__).parent / "data"


def test_strings_become_values() -> None:
    config = PretrainConfig(
        batch_size="64",  # type: ignore[arg-type]
        weight_decay="1e-4",  # type: ignore[arg-type]
        queue_length="512",
        tensorboard="false",  # type: ignore[arg-type]
        checkpoint_every="0.5ep",
        output_stride="16",  # type: ignore[arg-type]
    )
    assert config.output_stride == 16
    assert config.batch_size == 64 and isinstance(config.batch_size, int)
    assert config.weight_decay == 1e-4
    assert config.queue_length == 512
    assert config.tensorboard is False
    assert duration_in_steps(config.checkpoint_every, 37) == 18


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("batch_size", 0, "integer >= 1"),
        ("batch_size", 1.5, "integer >= 1"),
        ("batch_size", True, "integer >= 1"),
        ("temperature", 0, "number > 0"),
        ("temperature", "nan", "number > 0"),
        ("loss_lambda", 1.1, "<= 1"),
        ("matching", "nearest", "backbone, dense, geometric, random"),
        ("queue_length", "large", "auto or an integer"),
        ("lambda_warmup", "-1ep", "epochs"),
        ("precision", "fp16", "fp32, bf16"),
        ("data", None, "a folder, or a list of folders"),
        ("checkpoint_every", "ep", "epochs"),
        ("checkpoint_every", "1.5", "steps"),
        ("tensorboard", 3, "true or false"),
        ("output", "", "text that is not empty"),
        ("epochs", "010", "integer >= 1"),
        ("epochs", "1:30", "integer >= 1"),
        (
            "matching",
            "densee",
            "geometric, random, got 'densee'; did you mean dense",
        ),
    ],
)
def test_bad_value_names_option_and_what_fits(name: str, value: object, expected: str) -> None:
    with pytest.raises(ValueError, match=f"PretrainConfig: {name}: expected .*{expected}") as error:
        PretrainConfig(**{name: value})  # type: ignore[arg-type]
    assert repr(value) in str(error.value)


def test_unknown_option_suggests_the_nearest() -> None:
    with pytest.raises(ValueError, match="my.yaml: unknown option 'batchsize'; did you mean batch"):
        PretrainConfig.from_mapping({"batchsize": 3}, source="my.yaml")
    assert PretrainConfig.from_mapping({"batch-size": 3}).batch_size == 3


def test_defaults_are_the_papers_where_size_does_not_matter() -> None:
    config = PretrainConfig()
    assert (config.backbone, config.image_size, config.dim, config.hidden_dim) == (
        "resnet50",
        224,
        128,
        2048,
    )
    assert (config.temperature, config.loss_lambda) == (0.2, 0.5)
    # where the paper's own choice learns positions at most sizes (docs/training.md)
    assert (config.matching, config.dense_negatives) == ("geometric", "position")
    assert (config.base_lr, config.batch_size, config.weight_decay) == (0.3, 256, 1e-4)
    assert config.sgd_momentum == 0.9


@pytest.mark.parametrize(
    ("images", "length"),
    [(2, 1), (170, 64), (1000, 256), (2405, 1024), (5750, 2048), (118_287, 32768), (10**7, 65536)],
)
def test_auto_queue_is_well_below_the_number_of_images(images: int, length: int) -> None:
    assert auto_queue_length(images) == length
    assert length <= images // 2


def test_resolved_replaces_what_changes_the_result() -> None:
    config = PretrainConfig(batch_size=64, epochs=5)
    small = config.resolved(images=2405, native_bf16=True, loader="dali")
    assert (small.queue_length, small.precision, small.loader) == (1024, "bf16", "dali")
    assert small.lr == pytest.approx(0.3 * 64 / 256)
    assert small.key_momentum == 0.99
    longer = PretrainConfig(batch_size=64, epochs=100)
    longer = longer.resolved(images=2405, native_bf16=True, loader="dali")
    assert longer.key_momentum == pytest.approx(1 - 10 / 3700)
    coco = PretrainConfig(epochs=800).resolved(images=118_287, native_bf16=False, loader="dali")
    assert (coco.key_momentum, coco.precision, coco.lr) == (0.999, "fp32", 0.3)
    # Chosen values stay, and resolving twice changes nothing.
    chosen = PretrainConfig(queue_length=7, key_momentum=0.5, lr=1.0, precision="fp32")
    assert chosen.resolved(images=9, native_bf16=True, loader="dali").queue_length == 7
    assert small.resolved(images=9, native_bf16=False, loader="torchvision") == small


def test_shipped_recipes() -> None:
    assert {"densecl_coco_800ep", "densecl_imagenet_200ep", "small_data"} <= set(recipe_names())
    for name in recipe_names():
        PretrainConfig(**load_recipe(name))
    coco = PretrainConfig(**load_recipe("densecl_coco_800ep"))
    assert (coco.epochs, coco.base_lr, coco.queue_length) == (800, 0.3, 65536)
    assert (coco.key_momentum, coco.schedule, coco.queue_init) == (0.999, "epoch", "random")
    assert PretrainConfig(**load_recipe("densecl_imagenet_200ep")).base_lr == 0.03
    assert PretrainConfig(**load_recipe("mocov2_imagenet_200ep")).loss_lambda == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bach_size: 32\n", "unknown option 'bach_size'; did you mean batch_size"),
        ("- 3\n", "expected lines `option: value`, got a list"),
        ("words\n", "expected lines `option: value`, got a text"),
        ("a: [\n", "not valid YAML"),
        ("epochs: 3\nseed: 1\nepochs: 4\n", "line 3: epochs is given twice"),
        ("batch-size: 3\nbatch_size: 4\n", "option batch_size is given twice"),
        ("epochs: 010\n", "epochs: expected an integer >= 1, got '010'"),
        ("epochs: 1:30\n", "epochs: expected an integer >= 1, got '1:30'"),
        ("epochs: [3]\n", "epochs: expected an integer >= 1, got \\['3'\\]"),
        ("epochs:\n", "epochs: expected an integer >= 1, got None"),
        ("tensorboard: maybe\n", "tensorboard: expected true or false, got 'maybe'"),
    ],
)
def test_a_bad_recipe_is_named_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=f"mine.yaml: .*{message}") as error:
        load_recipe(file)
    assert "\n" not in str(error.value)


def test_recipe_files(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("batch_size: 32\nweight_decay: 1e-4\ndata: 0123\nmax_steps: ~\n")
    config = PretrainConfig(**load_recipe(file))
    assert (config.weight_decay, config.data, config.max_steps) == (1e-4, "0123", "none")
    file.write_text("# nothing\n")
    assert load_recipe(file) == {}
    file.write_text(dump_recipe(config))
    assert PretrainConfig(**load_recipe(file)) == config
    with pytest.raises(ValueError, match="did you mean small_data"):
        load_recipe("smal_data")


def test_a_recipe_of_version_0_1_0_means_what_it_meant() -> None:
    config = PretrainConfig(**load_recipe(DATA / "old_recipe.yaml"))
    assert (config.backbone, config.image_size, config.epochs) == ("resnet18", 96, 100)
    assert (config.weight_decay, config.key_momentum, config.loss_lambda) == (1e-4, 0.99, 1.0)
    assert (config.lambda_warmup, config.checkpoint_every) == ("0.5ep", 100)
    assert (config.max_steps, config.tensorboard, config.queue_length) == ("none", False, "auto")
    assert PretrainConfig(**load_recipe(DATA / "old_run" / "config.yaml")).lr == 0.09375


def test_the_schema_for_editors_is_current() -> None:
    assert SCHEMA.read_text() == recipe_schema(), "make schema"
    known = json.loads(recipe_schema())["properties"]
    assert known["loader"]["enum"] == ["auto", "dali", "torchvision", "memory"]
    assert known["image_size"]["minimum"] == 16 and known["image_size"]["description"]
    for name in recipe_names():
        assert "$schema=schema.json" in (RECIPES / f"{name}.yaml").read_text().splitlines()[0]


def test_resumed_run_keeps_its_values() -> None:
    stored = PretrainConfig(batch_size=64).resolved(images=1000, native_bf16=True, loader="dali")
    merged, changed = merge_resumed(PretrainConfig(batch_size=64, workers=3), stored)
    assert changed == ["workers"]
    assert merged == dataclasses.replace(stored, workers=3)
    with pytest.raises(ValueError, match="cannot resume with epochs = 7.*started with 200"):
        merge_resumed(dataclasses.replace(stored, epochs=7), stored)
    lower, changed = merge_resumed(dataclasses.replace(stored, base_lr=0.1), stored)
    assert lower.lr == pytest.approx(0.1 * 64 / 256) and changed == ["base_lr", "lr"]


def test_cosine_schedule() -> None:
    rates = [cosine_lr(2.0, step, 10) for step in range(10)]
    assert rates[0] == 2.0 and rates[5] == pytest.approx(1.0) and 0 < rates[9] < 0.06
    assert all(a > b for a, b in zip(rates, rates[1:], strict=False))
    by_epoch = [cosine_lr(2.0, step, 10, every=5) for step in range(10)]
    assert by_epoch == [2.0] * 5 + [pytest.approx(1.0)] * 5


def test_key_momentum_schedule() -> None:
    momenta = [cosine_momentum(0.99, step, 10) for step in range(10)]
    assert momenta[0] == pytest.approx(0.99) and momenta[5] == pytest.approx(0.995)
    assert all(a < b < 1 for a, b in zip(momenta, momenta[1:], strict=False))
    assert cosine_momentum(0.99, 10, 10) == 1.0


def test_a_run_from_before_the_options_goes_on_as_it_was() -> None:
    stored = PretrainConfig(data="x", matching="backbone").to_mapping()
    del stored["dense_negatives"]
    assert PretrainConfig.of_run(stored).dense_negatives == "pooled"
    assert PretrainConfig(data="x").dense_negatives == "position"


@pytest.mark.parametrize("name", ["densecl_coco_800ep", "densecl_imagenet_200ep"])
def test_the_papers_recipes_stay_the_papers(name: str) -> None:
    config = PretrainConfig.from_mapping(load_recipe(name))
    assert (config.matching, config.dense_negatives) == ("backbone", "pooled")
    assert (config.loss_lambda, config.temperature, config.smallest_crop) == (0.5, 0.2, 0.2)
