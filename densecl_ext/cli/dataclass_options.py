"""Command-line options from a dataclass of options: names, types, defaults and help texts."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from typing import Any

from densecl_ext.evaluate.options import help_texts


def add_dataclass(command: argparse.ArgumentParser, options: type, *required: str) -> None:
    """Add one option a field: `--like-this`; booleans also as `--no-like-this`.

    Args:
        command: the parser.
        options: the dataclass; fields are str, int, float, bool, or a tuple of one of these.
        required: names of fields that must be given.
    """
    hints, texts = typing.get_type_hints(options), help_texts(options)
    for field in dataclasses.fields(options):
        hint, default = hints[field.name], field.default
        text = texts[field.name].replace("%", "%%")
        keywords: dict[str, Any] = {"dest": field.name, "default": default}
        if field.name in required:
            keywords["required"] = True
        elif default not in ((), ""):
            text += f" (default: {str(default).lower() if hint is bool else default})"
        if hint is bool:
            keywords["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(hint) is tuple:
            keywords |= {"type": typing.get_args(hint)[0], "nargs": "+"}
        else:
            keywords["type"] = hint
        if hint is not bool:
            keywords["metavar"] = "DIR" if field.name == "data" else _metavar(hint)
        command.add_argument("--" + field.name.replace("_", "-"), help=text, **keywords)


def dataclass_of(options: type, given: argparse.Namespace) -> Any:
    """The dataclass with the values of a parsed command line.

    Raises:
        ValueError: a value that the dataclass refuses.
    """
    values = {field.name: getattr(given, field.name) for field in dataclasses.fields(options)}
    return options(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def _metavar(hint: Any) -> str:
    kind = typing.get_args(hint)[0] if typing.get_origin(hint) is tuple else hint
    return {int: "N", float: "X"}.get(kind, "NAME")


def dataclass_from_words(options: type, words: list[str]) -> Any:
    """The dataclass with values of words like `size=180,240`, `colour=false`.

    Raises:
        ValueError: no such option, or a value that does not fit.
    """
    hints = typing.get_type_hints(options)
    names = [field.name for field in dataclasses.fields(options)]
    values: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.partition("=")
        name = name.replace("-", "_")
        if name not in names or not equals:
            raise ValueError(
                f"{options.__name__}: must be OPTION=VALUE with an option of {', '.join(names)}, "
                f"got {word!r}"
            )
        hint = hints[name]
        try:
            if hint is bool:
                values[name] = {"true": True, "false": False}[text.lower()]
            elif typing.get_origin(hint) is tuple:
                kind = typing.get_args(hint)[0]
                values[name] = tuple(kind(item) for item in text.split(","))
            else:
                values[name] = hint(text)
        except (ValueError, KeyError):
            kind_name = getattr(hint, "__name__", hint)
            raise ValueError(
                f"{options.__name__}: {name} must be {kind_name}, got {text!r}"
            ) from None
    return options(**values)
