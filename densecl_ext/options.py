"""Options as typed fields: pydantic checks them, and their JSON schema tells everything else.

A class of options is a dataclass. Its JSON schema has each field's type, range, default and help;
the words of an error, the command line and an editor's completion all come from that schema.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar, cast

import pydantic
from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError, WithJsonSchema
from typing_extensions import dataclass_transform

T = TypeVar("T")
KINDS = {
    "integer": ("an integer", "N"),
    "number": ("a number", "X"),
    "string": ("text", "TEXT"),
    "boolean": ("true or false", "BOOL"),
    "null": ("nothing", "NONE"),
}
BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}


def _number(raw: Any) -> Any:
    """Refuses what others would read as another number: true is 1, and 010 is 8 in YAML 1.1."""
    if isinstance(raw, bool) or (isinstance(raw, str) and re.match(r"\s*[+-]?0[0-9_]", raw)):
        raise ValueError
    return raw


def _duration(raw: Any) -> Any:
    if isinstance(raw, str) and raw.endswith("ep"):
        epochs = _FLOAT.validate_python(raw[:-2])
        return f"{epochs:.12g}ep"
    return raw


is_number = BeforeValidator(_number)
# The names of types that fields are annotated with. A union with Auto or Nothing takes that word.
Auto = Literal["auto"]
Nothing = Annotated[Literal["none"], BeforeValidator(lambda raw: "none" if raw is None else raw)]
Natural = Annotated[int, Field(ge=0), is_number]
Positive = Annotated[int, Field(ge=1), is_number]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False), is_number]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False), is_number]
Share = Annotated[float, Field(gt=0, le=1), is_number]
Fraction = Annotated[float, Field(ge=0, le=1), is_number]
Text = Annotated[str, Field(min_length=1)]
Folders = Annotated[
    str | list[Text],
    BeforeValidator(
        lambda raw: raw[0] if isinstance(raw, (list, tuple)) and len(raw) == 1 else raw
    ),
    Field(json_schema_extra={"expected": "a folder, or a list of folders"}),
]
Duration = Annotated[
    Annotated[int, Field(ge=0), is_number] | Annotated[str, Field(pattern=r"^[0-9.]+ep$")],
    BeforeValidator(_duration),
    Field(
        json_schema_extra={
            "expected": "a number of steps (1000) or of epochs (2ep)",
            "metavar": "STEPS|EPOCHSep",
        }
    ),
]
_NUMBER = r"-?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?"
Range = Annotated[
    Annotated[str, Field(pattern=rf"^\s*{_NUMBER}\s*,\s*{_NUMBER}\s*$")],
    BeforeValidator(lambda raw: ",".join(map(str, raw)) if isinstance(raw, (list, tuple)) else raw),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "pattern": rf"^\s*{_NUMBER}\s*,\s*{_NUMBER}\s*$"},
                {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2},
            ],
            "expected": "two numbers (0,4095)",
            "metavar": "LOW,HIGH",
        }
    ),
]
Numbers = Annotated[
    Annotated[str, Field(pattern=rf"^\s*{_NUMBER}(\s*,\s*{_NUMBER})*\s*$")],
    BeforeValidator(
        lambda raw: ",".join(map(str, raw if isinstance(raw, (list, tuple)) else [raw]))
    ),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "pattern": rf"^\s*{_NUMBER}(\s*,\s*{_NUMBER})*\s*$"},
                {"type": "number"},
                {"type": "array", "items": {"type": "number"}, "minItems": 1},
            ],
            "expected": "a number for each channel (0.4,0.4,0.3,0.2)",
            "metavar": "X,...",
        }
    ),
]
_FLOAT = TypeAdapter(NonNegativeFloat)


def option(
    default: Any, help: str, *, group: str, may_change: bool = False, metavar: str | None = None
) -> Any:
    """A field of an options class.

    Args:
        default: the default value.
        help: one sentence for `--help` and for editors.
        group: the heading under which `--help` shows it.
        may_change: whether a resumed run may use another value than the interrupted one.
        metavar: the placeholder in `--help`; None takes one from the type.
    """
    extra: dict[str, Any] = {"group": group, "may_change": may_change}
    if metavar is not None:
        extra["metavar"] = metavar
    return Field(default=default, description=help, json_schema_extra=extra)


@dataclass_transform(kw_only_default=True, field_specifiers=(option,))
def options(cls: type[T]) -> type[T]:
    """Makes a dataclass whose fields are converted and checked on construction.

    Raises, on construction:
        ValueError: an unknown name (with the nearest known one), or a value that does not fit; the
            one line names the class, the option, what fits and what came.
    """
    made: Any = pydantic.dataclasses.dataclass(kw_only=True)(cls)
    construct = made.__init__

    @functools.wraps(construct)
    def __init__(self: Any, **values: Any) -> None:
        try:
            construct(self, **check_names(made, values, source=cls.__name__))
        except ValidationError as error:
            raise ValueError(f"{cls.__name__}: {told(made, error, values)}") from None

    made.__init__ = __init__
    return cast(type[T], made)


def build(cls: type[T], values: Mapping[str, Any], *, source: str) -> T:
    """Checks names and values and makes the dataclass of them, its own decorator or a plain one.

    Args:
        cls: a dataclass.
        values: option name (with _ or -) -> raw value.
        source: where the values come from, for error messages.

    Raises:
        ValueError: an unknown or missing name, or a value that does not fit.
    """
    values = check_names(cls, values, source=source)
    try:
        return TypeAdapter(cls).validate_python(values)
    except ValidationError as error:
        raise ValueError(f"{source}: {told(cls, error, values)}") from None


def told(cls: type, error: ValidationError, values: Mapping[str, Any]) -> str:
    """The first thing that pydantic found, in one line: which option, what fits, what came."""
    first = error.errors(include_url=False)[0]
    if not first["loc"]:  # the dataclass's own check of several values
        return str(first["ctx"]["error"]).removeprefix(f"{cls.__name__}: ")
    name = str(first["loc"][0])
    if name not in values:
        return f"{name} is missing"
    schema, raw = properties(cls)[name], values[name]
    near = difflib.get_close_matches(str(raw), [str(word) for word in words(schema)], n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"{name}: expected {expected(schema)}, got {raw!r}{hint}"


def check_names(cls: type, values: Mapping[str, Any], *, source: str) -> dict[str, Any]:
    """Returns the mapping with field names, or raises ValueError with the nearest known name.

    A number of a choice (`Literal[8, 16]`), which was written as text, becomes that number.
    """
    schemas = properties(cls)
    known = list(schemas)
    checked: dict[str, Any] = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; known: {', '.join(known)}"
            raise ValueError(f"{source}: unknown option {key!r}{hint}")
        if name in checked:
            raise ValueError(f"{source}: option {name} is given twice, as {key!r} too")
        numbers = {str(word): word for word in words(schemas[name])}
        checked[name] = numbers.get(value, value) if isinstance(value, str) else value
    return checked


@functools.cache
def properties(cls: type) -> dict[str, dict[str, Any]]:
    """Field name -> its JSON schema with `description`, for any dataclass.

    A help that is not in the field comes from the lines under `Attributes:` in the docstring.
    """
    schema = TypeAdapter(cls).json_schema()
    found: dict[str, dict[str, Any]] = schema.get("properties", {})
    for ancestor in reversed(cls.__mro__):
        _, _, attributes = inspect.cleandoc(ancestor.__doc__ or "").partition("\nAttributes:\n")
        for name, help in re.findall(r"^    (\w+): (.*(?:\n {5,}.*)*)", attributes, re.MULTILINE):
            if name in found:
                found[name].setdefault("description", " ".join(help.split()).removesuffix("."))
    for name in schema.get("required", ()):
        found[name]["required"] = True
    return found


def words(schema: Mapping[str, Any]) -> list[Any]:
    """The words that fit: a choice's, or "auto" beside a number."""
    if "anyOf" in schema:
        return [word for part in schema["anyOf"] for word in words(part)]
    return [schema["const"]] if "const" in schema else list(schema.get("enum", ()))


def expected(schema: Mapping[str, Any]) -> str:
    """What fits, in words: "auto or an integer >= 1"."""
    if "expected" in schema:
        return str(schema["expected"])
    if "anyOf" in schema:
        return " or ".join(map(expected, schema["anyOf"]))
    if fitting := words(schema):
        return ("one of " if len(fitting) > 1 else "") + ", ".join(map(str, fitting))
    if schema["type"] == "array":
        return f"a list, each {expected(schema['items'])}"
    bounds = [f"{sign} {schema[key]:.15g}" for key, sign in BOUNDS.items() if key in schema]
    span = f" {' and '.join(bounds)}" if bounds else ""
    empty = " that is not empty" if schema.get("minLength") else ""
    return KINDS[schema["type"]][0] + span + empty


def metavar(schema: Mapping[str, Any]) -> str:
    """The placeholder in `--help`: "auto|N"."""
    if "metavar" in schema:
        return str(schema["metavar"])
    if "anyOf" in schema:
        return "|".join(metavar(part) for part in schema["anyOf"] if part.get("type") != "null")
    fitting = words(schema)
    if len(fitting) == 1:
        return str(fitting[0])
    if fitting:
        return "{" + ",".join(map(str, fitting)) + "}"
    if schema["type"] == "array":
        return metavar(schema["items"])
    return KINDS[schema["type"]][1]
