"""Parsers for the options of a configuration: one value in, a checked value out.

A value comes from Python, from YAML or from the command line, where it is a string. Each parser
accepts all three, returns the value in its own type, and says what it expected when it cannot.
`option` ties a parser, a help text and a group to a dataclass field; the command line and the
recipe reader are generated from these.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Parser:
    """A checked conversion.

    Attributes:
        convert: raw value -> value; raises ValueError when the raw value does not fit.
        expected: what fits, in words, for messages ("an integer >= 1").
        metavar: the placeholder in `--help`.
    """

    convert: Callable[[Any], Any]
    expected: str
    metavar: str

    def __call__(self, raw: Any) -> Any:
        """Returns the converted value; raises ValueError that says what was expected."""
        try:
            return self.convert(raw)
        except (ValueError, TypeError, OverflowError):
            raise ValueError(f"expected {self.expected}, got {raw!r}") from None


def integer(minimum: int, maximum: int | None = None) -> Parser:
    """An int in [minimum, maximum]; "12", 12 and 12.0 fit, True and 1.5 do not."""

    def convert(raw: Any) -> int:
        if isinstance(raw, bool):
            raise ValueError
        number = float(raw)
        value = int(raw) if isinstance(raw, (int, str)) else int(number)
        if value != number or value < minimum or (maximum is not None and value > maximum):
            raise ValueError
        return value

    span = f">= {minimum}" if maximum is None else f"from {minimum} to {maximum}"
    return Parser(convert, f"an integer {span}", "N")


def number(
    minimum: float, maximum: float = math.inf, *, above: bool = False, below: bool = False
) -> Parser:
    """A finite float in [minimum, maximum]; `above` / `below` exclude that end."""

    def convert(raw: Any) -> float:
        if isinstance(raw, bool):
            raise ValueError
        value = float(raw)
        low = value > minimum if above else value >= minimum
        high = value < maximum if below else value <= maximum
        if not (math.isfinite(value) and low and high):
            raise ValueError
        return value

    span = f"{'>' if above else '>='} {minimum:g}"
    if maximum != math.inf:
        span += f" and {'<' if below else '<='} {maximum:g}"
    return Parser(convert, f"a number {span}", "X")


def choice(*values: str) -> Parser:
    """One of the given words."""

    def convert(raw: Any) -> str:
        if raw not in values:
            raise ValueError
        return str(raw)

    return Parser(convert, "one of " + ", ".join(values), "{" + ",".join(values) + "}")


def text(metavar: str = "TEXT") -> Parser:
    """Any string (or path)."""

    def convert(raw: Any) -> str:
        if raw is None or isinstance(raw, (bool, int, float, list, dict)):
            raise ValueError
        return str(raw)

    return Parser(convert, "text", metavar)


def boolean() -> Parser:
    """True or False; the strings true / false / yes / no / on / off fit too."""
    words = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}

    def convert(raw: Any) -> bool:
        if isinstance(raw, bool):
            return raw
        if str(raw).lower() not in words:
            raise ValueError
        return words[str(raw).lower()]

    return Parser(convert, "true or false", "BOOL")


def duration() -> Parser:
    """A number of steps (1000) or of epochs ("2ep"), kept as int or as that string."""

    def convert(raw: Any) -> int | str:
        if isinstance(raw, str) and raw.endswith("ep"):
            epochs = number(0.0)(raw[:-2])
            return f"{epochs:g}ep"
        return int(integer(0)(raw))

    return Parser(convert, "a number of steps (1000) or of epochs (2ep)", "STEPS|EPOCHSep")


def duration_in_steps(value: int | str, steps_per_epoch: int) -> int:
    """Converts what `duration` returned into steps, rounded to the nearest.

    Args:
        value: steps as an int, or epochs as a string such as "0.5ep".
        steps_per_epoch: length of an epoch in steps.
    """
    if isinstance(value, int):
        return value
    return round(float(value[:-2]) * steps_per_epoch)


def word_or(word: str, parser: Parser) -> Parser:
    """Either the given word (such as "auto") or what `parser` takes. None stands for "none"."""

    def convert(raw: Any) -> Any:
        if raw == word or (raw is None and word == "none"):
            return word
        return parser(raw)

    return Parser(convert, f"{word} or {parser.expected}", f"{word}|{parser.metavar}")


def option(default: Any, parser: Parser, help: str, *, group: str, may_change: bool = False) -> Any:
    """A dataclass field with its parser and help.

    Args:
        default: the default value.
        parser: checks and converts every value the field is given.
        help: one sentence for `--help`.
        group: the heading under which `--help` shows it.
        may_change: whether a resumed run may use another value than the interrupted one.
    """
    metadata = {"parser": parser, "help": help, "group": group, "may_change": may_change}
    return dataclasses.field(default=default, metadata=metadata)
