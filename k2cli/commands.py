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

THEIRS = {  # what can be wrong with any path that the user or a project names
    errno.EACCES: "Ask its owner for permission, or choose another.",
    errno.EPERM: "Ask its owner for permission, or choose another.",
    errno.ENAMETOOLONG: "Choose a shorter name.",
    errno.ELOOP: "Its links form a loop.",
    errno.ENOTDIR: "A part of the path is a file.",
}
PLACES = {"ADDRESS", "DIR", "FILE", "FILE...", "IMAGE", "PICTURE", "PROJECT", "RUN", "TARGET"}  # metavars
PATHS = PLACES - {"ADDRESS"} | {"MODEL", "RECIPE"}


class Group(TyperGroup):
    """Reports a problem that the user can fix as one sentence and a hint, and ends with its exit code."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command given; for one that other tools have, an error that names k2's equivalent."""
        from k2cli.settings import COMMANDS

        name = args[0]
        known = f"{ctx.info_name} {name}" if ctx.parent else name
        if known in COMMANDS and not ctx.resilient_parsing:
            ctx.fail(f"No such command '{name}'. {COMMANDS[known]}")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as reason:
            raise typer.Exit(getattr(reason, "code", 130)) from None  # a signal has its own
        except typer.BadParameter as error:
            error.message = in_plain_words(error)
            raise
        except Exception as error:
            problem = as_problem(error) or as_ours(error)
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
            said, _, order = self.make_parser(ctx).parse_args(args=[*args])
            refuse_empty(said, self.params)
            compares = any(option.name == "matrix" for option in self.params)
            if not said.get("quiet") and (twice := given_twice(said, order, compares)):
                from k2cli.console import say

                say(twice, "yellow")
        rest = super().parse_args(ctx, args)
        for each in self.params:
            if each.metavar in PATHS:
                ctx.params[each.name] = as_there(ctx.params[each.name])
        return rest

    def invoke(self, ctx: Any) -> Any:
        Path.cwd()  # raises if it is gone: libraries below would end the process
        return super().invoke(ctx)


class Commands(typer.Typer):
    """An app whose commands are of that class."""

    def command(self, name: str | None = None, **settings: Any) -> Any:
        return super().command(name, cls=Command, **settings)


def refuse_empty(said: Mapping[str, Any], params: Sequence[Any]) -> None:
    """Raises K2Error if a path, a project or a run is "", as from an unset variable: it would mean all, or here.

    said: the values by the parameters' names
    """
    for each in params:
        value = said.get(each.name)
        if each.metavar in PLACES and "" in (value if isinstance(value, list | tuple) else [value]):
            name = each.opts[0] if each.param_type_name == "option" else each.metavar.rstrip(".")
            hint = "Name one." if each.required else "Name one, or leave it out."
            raise K2Error(f"{name} is empty.", hint=hint, code=USAGE)


def as_there(said: Any) -> Any:
    """A path, or several, spelt as on disk: some systems store accents apart from their letters."""
    if isinstance(said, list | tuple):
        return type(said)(map(as_there, said))
    if not isinstance(said, str | Path) or str(said).isascii():
        return said
    from k2cli.folder import spelt

    found = spelt(Path(), said)
    return said if found == Path(said) else type(said)(found)


def given_twice(said: Mapping[str, Any], order: Sequence[Any], compares: bool) -> str:
    """Which options of one value, and which styles, were given more than once, in a sentence; "" if none was.

    said      the values by the options' names
    order     the parameters in the order given
    compares  whether the command has a --matrix
    """
    from k2cli.matrix import AXES

    told = []
    for option, times in Counter(order).items():
        if option.multiple and option.metavar == "NAME=W":
            told += styles_given_twice(said[option.name], compares)
        both_ways = getattr(option, "secondary_opts", [])  # --turbo/--raw
        if times == 1 or option.param_type_name != "option" or option.multiple or (option.is_flag and not both_ways):
            continue
        value = said[option.name]
        last = value if isinstance(value, str) else (option.opts if value else both_ways)[0]
        axis = option.name if compares and option.name in AXES else ""
        told.append(last_counts("/".join([*option.opts[:1], *both_ways[:1]]), times, last, axis))
    return " ".join(told)


def styles_given_twice(said: Sequence[str], compares: bool) -> list[str]:
    """The same for every style given with several weights."""
    pairs = [(name.strip(), weight) for name, equals, weight in (each.rpartition("=") for each in said) if equals]
    last = dict(pairs)
    often = Counter(name for name, _ in pairs)
    return [
        last_counts(f"--style {name}", times, last[name], f"style.{name}" if compares else "")
        for name, times in often.items()
        if times > 1
    ]


def last_counts(name: str, times: int, last: str, axis: str) -> str:
    """axis: its name in a --matrix, if that can compare it"""
    often = "twice" if times == 2 else f"{times} times"
    compare = f"; to compare, use --matrix {axis}=V,V" if axis else ""
    return f"{name} is given {often}: k2 uses {last}{compare}."


def as_ours(error: Exception) -> K2Error | None:
    """An error about an unknown option that says what it is called here, or where a project sets it; None if that is
    not known, or if it is another error."""
    context: Any = getattr(error, "ctx", None)  # Typer has no public name for the error of an unknown option
    if context is None or not hasattr(error, "possibilities"):
        return None
    from k2cli.settings import HOMES, INSTEAD, OTHERS

    option = str(getattr(error, "option_name", ""))
    key = option[2:].replace("-", "_") if option.startswith("--") else option
    ours, how = OTHERS.get(key, ("", ""))
    hint = (HOMES | INSTEAD).get(key) if context.command.name == "render" else None
    if any(each.param_type_name == "option" and each.name == ours for each in context.command.params):
        hint = f"It is called --{ours.replace('_', '-')}{how}."
    return K2Error(f"There is no option {option}.", hint=hint, code=USAGE) if hint else None


def in_plain_words(error: typer.BadParameter) -> str:
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


def as_problem(error: Exception) -> K2Error | None:
    """An error as one that the user can fix; None if it is a bug instead."""
    if isinstance(error, K2Error):
        return error
    if isinstance(error, UnicodeEncodeError):  # from a path: standard output replaces what it cannot encode
        from k2cli.texts import USE_UTF_8

        sign, encoding = error.object[error.start], error.encoding
        return K2Error(f'No file name can contain "{sign}" in the encoding here, {encoding}.', hint=USE_UTF_8)
    if isinstance(error, FileNotFoundError) and not is_somewhere():
        return K2Error("The current folder is gone.", hint="Change to another: cd ~")
    if isinstance(error, OSError) and error.errno in THEIRS and error.filename is not None:
        name = os.fsdecode(error.filename)
        short = name if len(name) < 200 else f"{name[:200]}…"
        return K2Error(f"{short}: {error.strerror}.", hint=THEIRS[error.errno])
    return None


def is_somewhere() -> bool:
    """Whether the current folder exists: it may have been deleted behind the shell's back."""
    try:
        Path.cwd()
    except FileNotFoundError:
        return False
    return True
