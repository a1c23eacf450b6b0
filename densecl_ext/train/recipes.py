"""Recipes: YAML files of options, read so that every line means what it says."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter

from densecl_ext.options import check_names
from densecl_ext.train.config import PretrainConfig

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
SCHEMA = RECIPES / "schema.json"


class Words(yaml.BaseLoader):
    """YAML whose scalars stay the words that were written, as on the command line.

    YAML 1.1 would make 8 of 010, 90 of 1:30 and text of 1e-4, and keep the last of two equal keys.
    """


def _mapping(loader: Words, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key, deep=True) for key, _ in node.value]
    for position, key in enumerate(keys):
        if key in keys[:position]:
            line = node.value[position][0].start_mark.line + 1
            raise yaml.YAMLError(f"line {line}: {key} is given twice")
    return dict(yaml.BaseLoader.construct_mapping(loader, node, deep=True))


def _word(loader: Words, node: yaml.ScalarNode) -> str | None:
    nothing = node.style is None and node.value in ("", "~", "null", "Null", "NULL")
    return None if nothing else str(node.value)


Words.add_constructor(yaml.resolver.BaseResolver.DEFAULT_SCALAR_TAG, _word)
Words.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_recipe(recipe: str | Path) -> dict[str, Any]:
    """Reads a recipe: option names and raw values.

    Args:
        recipe: a YAML file, or the name of a recipe that comes with the package.

    Returns:
        Field name -> raw value, all checked.

    Raises:
        ValueError: no such recipe, not YAML, not a mapping, a key given twice, an unknown option,
            or a value that does not fit.
    """
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
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=Words)  # noqa: S506 (no objects)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"recipe {path}: not valid YAML: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        kind = "list" if isinstance(values, list) else "text"
        raise ValueError(f"recipe {path}: expected lines `option: value`, got a {kind}")
    values = check_names(PretrainConfig, values, source=f"recipe {path}")
    PretrainConfig.from_mapping(values, source=f"recipe {path}")
    return values


def dump_recipe(config: PretrainConfig) -> str:
    """A recipe that repeats the configuration; its first line lets editors complete and check."""
    head = f"# yaml-language-server: $schema={SCHEMA}\n"
    return head + yaml.safe_dump(config.to_mapping(), sort_keys=False)


def recipe_schema() -> str:
    """The JSON schema of a recipe, as recipes/schema.json holds it."""
    schema = TypeAdapter(PretrainConfig).json_schema()
    schema |= {"title": "densecl pretrain", "description": "A recipe for `densecl pretrain`."}
    return json.dumps(schema, indent=1) + "\n"
