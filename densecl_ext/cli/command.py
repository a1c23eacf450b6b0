"""Commands on click: options from a class of options, in groups, with an example below."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from typing import Any

import click
from click.shell_completion import CompletionItem

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE


class Word(click.ParamType):
    """What was typed, as it was typed: the options class checks it. Completes words and paths."""

    name = "text"

    def __init__(self, metavar: str = "", words: Iterable[str] = ()) -> None:
        self.words = list(words)
        self.path = "dir" if "DIR" in metavar else "file" if "FILE" in metavar else ""

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """The words that begin so, and that a path may stand here."""
        fitting = [CompletionItem(word) for word in self.words if word.startswith(incomplete)]
        return fitting + ([CompletionItem(incomplete, type=self.path)] if self.path else [])


class Option(click.Option):
    """An option under a heading of the help."""

    def __init__(self, *args: Any, group: str = "options", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.group = group


def format_example(self: Any, ctx: click.Context, formatter: click.HelpFormatter) -> None:
    """Writes a command's example as it stands."""
    formatter.write(f"\nexample:\n  {self.epilog}\n")


class Command(click.Command):
    """A command whose help has groups and an example; `debug` shows tracebacks of errors."""

    def __init__(self, name: str, *, help: str, example: str, **settings: Any) -> None:
        """Makes the command.

        Args:
            name: as it is typed.
            help: shown above the options; its first line stands in lists.
            example: shown below them.
            settings: `callback` and `params`, as click has them.
        """
        super().__init__(name, help=help, epilog=example, **settings)
        self.params.append(
            click.Option(
                ["--debug"], is_flag=True, expose_value=False, help="show tracebacks of errors"
            )
        )

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Lets an option that may be given several times take several words at once."""
        several = {flag for p in self.params if getattr(p, "multiple", False) for flag in p.opts}
        words: list[str] = []
        flag = ""  # the option whose words follow
        for word in args:
            if word.startswith("-"):
                flag, first = word if word in several else "", True
            elif flag:
                words += [] if first else [flag]
                first = False
            words.append(word)
        return super().parse_args(ctx, words)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes one list per group."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):
                sections.setdefault(getattr(parameter, "group", "options"), []).append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)

    format_epilog = format_example


class Commands(click.Group):
    """A group whose commands are imported when they are run or asked for help."""

    def __init__(self, name: str, commands: Mapping[str, tuple[str, str]], **settings: Any) -> None:
        """Makes the group.

        Args:
            name: as it is typed.
            commands: name -> ("module:attribute" of this package, a clause for the list).
            settings: as click has them.
        """
        super().__init__(name, no_args_is_help=False, **settings)
        self._modules = dict(commands)

    format_epilog = format_example

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names, in order."""
        return list(self._modules)

    def get_command(self, ctx: click.Context, name: str) -> click.Command:
        """Imports a command."""
        if name not in self._modules:
            near = difflib.get_close_matches(name, self._modules, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(self._modules)}"
            ctx.fail(f"No such command {name!r}; {hint}")
        module, _, attribute = self._modules[name][0].partition(":")
        command: click.Command = getattr(import_module(f"{__package__}.{module}"), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Lists the commands without importing one."""
        with formatter.section("commands"):
            formatter.write_dl([(name, help) for name, (_, help) in self._modules.items()])


def options_of(cls: type, *, required: Mapping[str, str] | None = None) -> list[click.Parameter]:
    """The command line's options for a dataclass: names, help, defaults and groups from its schema.

    An option that is not given is None; `given` takes the others, for `densecl_ext.options.build`.

    Args:
        cls: of `densecl_ext.options.options`, or any dataclass with an `Attributes:` docstring.
        required: fields that must be given, whatever their default -> the placeholder in the help.
    """
    from densecl_ext.options import metavar, properties, words

    parameters: list[click.Parameter] = []
    for name, schema in properties(cls).items():
        flag, help = f"--{name.replace('_', '-')}", schema.get("description", "")
        default = schema.get("default")
        must = required or {}
        settings: dict[str, Any] = {
            "metavar": must.get(name, metavar(schema)),
            "required": name in must or "required" in schema,
        }
        if isinstance(default, bool):
            flag, settings = f"{flag}/--no-{flag[2:]}", {"default": None}
        elif any(part.get("type") == "array" for part in schema.get("anyOf", [schema])):
            settings["multiple"] = True
            settings["metavar"] += "..."
        if default not in ("", None, []):
            shown = str(default).lower() if isinstance(default, bool) else default
            help += f" (default: {shown})"
        if not isinstance(default, bool):
            settings["type"] = Word(settings["metavar"], map(str, words(schema)))
        group = schema.get("group", "options")
        parameters.append(Option([flag, name], help=help, group=group, **settings))
    return parameters


def given(values: Mapping[str, Any]) -> dict[str, Any]:
    """The options that were given."""
    return {name: value for name, value in values.items() if value not in (None, ())}


def command(
    name: str, help: str, example: str, *params: click.Parameter
) -> Callable[[Callable[..., Any]], Command]:
    """Makes a command of a function whose arguments are the parameters."""

    def make(function: Callable[..., Any]) -> Command:
        return Command(name, help=help, example=example, callback=function, params=[*params])

    return make
