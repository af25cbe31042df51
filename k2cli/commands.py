"""The base of every command: it reports problems that the user can fix, and checks the options given."""

from __future__ import annotations

import errno
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from model.errors import USAGE, K2Error

PATH_ERRORS = {  # what can be wrong with any path that the user or a project names
    errno.EACCES: "Ask its owner for permission, or choose another.",
    errno.EPERM: "Ask its owner for permission, or choose another.",
    errno.ENAMETOOLONG: "Choose a shorter name.",
    errno.ELOOP: "Its links form a loop.",
    errno.ENOTDIR: "A part of the path is a file.",
}
NONEMPTY_METAVARS = {"ADDRESS", "DIR", "FILE", "FILE...", "IMAGE", "PICTURE", "PROJECT", "RUN", "TARGET"}  # metavars
PATH_METAVARS = NONEMPTY_METAVARS - {"ADDRESS"} | {"MODEL", "RECIPE"}


class CommandGroup(TyperGroup):
    """Reports a problem that the user can fix as one sentence and a hint, and ends with its exit code."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command given; for one that other tools have, an error that names k2's equivalent."""
        from k2cli.settings import FOREIGN_COMMANDS

        name = args[0]
        known = f"{ctx.info_name} {name}" if ctx.parent else name
        if known in FOREIGN_COMMANDS and not ctx.resilient_parsing:
            ctx.fail(f"No such command '{name}'. {FOREIGN_COMMANDS[known]}")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as reason:
            raise typer.Exit(getattr(reason, "code", 130)) from None  # a signal has its own
        except typer.BadParameter as error:
            error.message = explain_value(error)
            raise
        except Exception as error:
            problem = as_user_error(error) or explain_option(error)
            if problem is None:
                raise
            from k2cli.console import show_error

            show_error(problem)
            raise typer.Exit(problem.code) from None


class Command(TyperCommand):
    """If an option is given twice, the last counts, so that aliases can be overridden, and k2 says so. Empty paths are
    refused. Help shows the names of arguments without their types, which are Python's."""

    def __init__(self, *args: Any, **settings: Any):
        super().__init__(*args, **settings)
        for each in self.params:
            if each.param_type_name == "argument":
                vars(each)["display_type_rich"] = lambda ctx: None

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not ctx.resilient_parsing:
            values, _, order = self.make_parser(ctx).parse_args(args=[*args])
            refuse_empty(values, self.params)
            has_matrix = any(option.name == "matrix" for option in self.params)
            if not values.get("quiet") and (repeated := repeated_options(values, order, has_matrix)):
                from k2cli.console import say

                say(repeated, "yellow")
        rest = super().parse_args(ctx, args)
        for each in self.params:
            if each.metavar in PATH_METAVARS:
                ctx.params[each.name] = as_on_disk(ctx.params[each.name])
        return rest

    def invoke(self, ctx: Any) -> Any:
        Path.cwd()  # raises if it is gone: libraries below would end the process
        return super().invoke(ctx)


class CommandApp(typer.Typer):
    """An app whose commands are of that class."""

    def command(self, name: str | None = None, **settings: Any) -> Any:
        return super().command(name, cls=Command, **settings)


def refuse_empty(values: Mapping[str, Any], params: Sequence[Any]) -> None:
    """Raises K2Error if a path, a project or a run is "", as from an unset variable: it would mean all, or here.

    values: by the parameters' names
    """
    for each in params:
        value = values.get(each.name)
        if each.metavar in NONEMPTY_METAVARS and "" in (value if isinstance(value, list | tuple) else [value]):
            name = each.opts[0] if each.param_type_name == "option" else each.metavar.rstrip(".")
            hint = "Name one." if each.required else "Name one, or leave it out."
            raise K2Error(f"{name} is empty.", hint=hint, code=USAGE)


def as_on_disk(path: Any) -> Any:
    """A path, or several, spelt as on disk: some systems store accents apart from their letters."""
    if isinstance(path, list | tuple):
        return type(path)(map(as_on_disk, path))
    if not isinstance(path, str | Path) or str(path).isascii():
        return path
    from k2cli.folder import spelled_on_disk

    found = spelled_on_disk(Path(), path)
    return path if found == Path(path) else type(path)(found)


def repeated_options(values: Mapping[str, Any], order: Sequence[Any], has_matrix: bool) -> str:
    """Which options of one value, and which styles, were given more than once, in a sentence; "" if none was.

    values      by the options' names
    order       the parameters in the order given
    has_matrix  whether the command has a --matrix
    """
    from k2cli.matrix import AXES

    notes = []
    for option, times in Counter(order).items():
        if option.multiple and option.metavar == "NAME=W":
            notes += repeated_styles(values[option.name], has_matrix)
        both_ways = getattr(option, "secondary_opts", [])  # --turbo/--raw
        if times == 1 or option.param_type_name != "option" or option.multiple or (option.is_flag and not both_ways):
            continue
        value = values[option.name]
        last = value if isinstance(value, str) else (option.opts if value else both_ways)[0]
        axis = option.name if has_matrix and option.name in AXES else ""
        notes.append(describe_repeat("/".join([*option.opts[:1], *both_ways[:1]]), times, last, axis))
    return " ".join(notes)


def repeated_styles(values: Sequence[str], has_matrix: bool) -> list[str]:
    """The same for every style given with several weights."""
    pairs = [(name.strip(), weight) for name, equals, weight in (each.rpartition("=") for each in values) if equals]
    last = dict(pairs)
    counts = Counter(name for name, _ in pairs)
    return [
        describe_repeat(f"--style {name}", times, last[name], f"style.{name}" if has_matrix else "")
        for name, times in counts.items()
        if times > 1
    ]


def describe_repeat(name: str, times: int, last: str, axis: str) -> str:
    """axis: its name in a --matrix, if that can compare it"""
    often = "twice" if times == 2 else f"{times} times"
    compare = f"; to compare, use --matrix {axis}=V,V" if axis else ""
    return f"{name} is given {often}: k2 uses {last}{compare}."


def explain_option(error: Exception) -> K2Error | None:
    """An error about an unknown option that says what it is called here, or where a project sets it; None if that is
    not known, or if it is another error."""
    context: Any = getattr(error, "ctx", None)  # Typer has no public name for the error of an unknown option
    if context is None or not hasattr(error, "possibilities"):
        return None
    from k2cli.settings import FOREIGN_NAMES, FOREIGN_OPTIONS, MISPLACED

    option = str(getattr(error, "option_name", ""))
    key = option[2:].replace("-", "_") if option.startswith("--") else option
    ours, how = FOREIGN_NAMES.get(key, ("", ""))
    hint = (MISPLACED | FOREIGN_OPTIONS).get(key) if context.command.name == "render" else None
    if any(each.param_type_name == "option" and each.name == ours for each in context.command.params):
        hint = f"It is called --{ours.replace('_', '-')}{how}."
    return K2Error(f"There is no option {option}.", hint=hint, code=USAGE) if hint else None


def explain_value(error: typer.BadParameter) -> str:
    """What is wrong with an option's value; for numbers, not in the words of the parsing library."""
    cause: Any = error.__cause__
    if not hasattr(cause, "errors"):
        return error.message
    problem = cause.errors()[0]
    for key, how in (("ge", "at least"), ("le", "at most")):
        if key in problem.get("ctx", {}):
            return f"it must be {how} {problem['ctx'][key]}"
    if problem["type"] == "int_parsing_size":
        return "it has too many digits"
    noun = {"int_parsing": "a whole number", "float_parsing": "a number"}.get(problem["type"])
    if noun is None:
        return error.message
    given = str(problem["input"])
    with_point = re.fullmatch(r"[+-]?\d*,\d+", given) and noun == "a number"
    return f'"{given}" is not {noun}' + (f", but {given.replace(',', '.')} is" if with_point else "")


def as_user_error(error: Exception) -> K2Error | None:
    """An error as one that the user can fix; None if it is a bug instead."""
    if isinstance(error, K2Error):
        return error
    if isinstance(error, UnicodeEncodeError):  # from a path: standard output replaces what it cannot encode
        from k2cli.texts import USE_UTF_8

        char, encoding = error.object[error.start], error.encoding
        return K2Error(f'No file name can contain "{char}" in the encoding here, {encoding}.', hint=USE_UTF_8)
    if isinstance(error, FileNotFoundError) and not cwd_exists():
        return K2Error("The current folder is gone.", hint="Change to another: cd ~")
    if isinstance(error, OSError) and error.errno in PATH_ERRORS and error.filename is not None:
        name = os.fsdecode(error.filename)
        short = name if len(name) < 200 else f"{name[:200]}…"
        return K2Error(f"{short}: {error.strerror}.", hint=PATH_ERRORS[error.errno])
    return None


def cwd_exists() -> bool:
    """Whether the current folder exists: it may have been deleted behind the shell's back."""
    try:
        Path.cwd()
    except FileNotFoundError:
        return False
    return True
