"""What people read: standard error, through rich. Standard output carries results, and only results."""

from __future__ import annotations

import codecs
import errno
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.text import Text

from k2cli.disk import ended_as_by_ctrl_c
from k2cli.texts import UNPRINTABLE, from_here, masked, quote
from model.errors import K2Error

LONGEST = 2000  # characters of an error
MOST_ROWS = 2000  # in columns, which take half a millisecond each
NARROW = 60  # cells of a screen that fewer are too few for columns of words

console = Console(stderr=True, highlight=False)


def harmless(text: str) -> str:
    """The text as a terminal may show it: a name in a project may hold what would rewrite the screen."""
    return "\n".join("\t".join(masked(part) for part in line.split("\t")) for line in text.split("\n"))


def say(text: str, style: str = "") -> None:
    """A line for people."""
    console.print(Text(harmless(text), style), soft_wrap=True)


def last_words(text: str) -> None:
    """A line for people who may be gone: what ends a command may be that they closed its terminal."""
    with suppress(OSError):
        say(text)


def show_error(error: K2Error) -> None:
    """One sentence, and below it what to do. Names in it are a file's own words: they may be a megabyte long."""
    said = str(error) if len(str(error)) <= LONGEST else f"{str(error)[:LONGEST]}…"
    console.print(Text.assemble(("Error: ", "bold red"), harmless(said)), soft_wrap=True)
    if error.hint:
        console.print(Text.assemble(("Hint:  ", "bold cyan"), harmless(error.hint)), soft_wrap=True)


def result(line: str) -> None:
    """A line of results, at once, so that whoever reads the pipe can begin; a pipe gets it as it is."""
    with delivering():
        print(harmless(line) if sys.stdout.isatty() else line, flush=True)


def to_json(table: Any) -> str:
    """One line of JSON; control characters that JSON lets pass are escaped too, as terminals obey some of them.

    JSON has no nan and no inf: they are null. It is UTF-8, or ASCII where standard output speaks something else.
    """
    import json

    escaped = codecs.lookup(sys.stdout.encoding or "utf-8").name != "utf-8"

    def write(value: Any) -> str:
        return json.dumps(value, ensure_ascii=escaped, allow_nan=False, default=lambda moment: moment.isoformat())

    try:
        text = write(table)
    except ValueError:
        text = write(finite(table))
    return UNPRINTABLE.sub(lambda sign: f"\\u{ord(sign[0]):04x}", text)


def finite(value: Any) -> Any:
    """The same with None for every number that is not finite."""
    if isinstance(value, Mapping):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Unwritable(K2Error):
    """Standard output takes nothing any more: whatever else is made, nobody hears of it."""


@contextmanager
def delivering() -> Iterator[None]:
    """Turn what keeps standard output from taking results into one sentence; a reader who has left is Typer's."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.EPIPE:
            raise
        raise unwritable(error) from None


def unwritable(error: OSError) -> Unwritable:
    """What keeps standard output from taking anything, in a sentence; nothing more is written to it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python tries the rest again when it ends
    return Unwritable(f"Standard output cannot be written: {error.strerror}.", hint="Send the results somewhere else.")


def aligned(rows: Sequence[tuple[str, str]], width: int, cells: int | None = None) -> str:
    """Facts below one another, each behind its name, or below one that is longer than `width`; a name that the row
    above has is not said again. On a screen of so many cells no word is cut."""
    lines = []
    for (above, _), (name, fact) in pairwise([("", ""), *rows]):
        said = "" if name == above else name
        if len(said) >= width:
            lines.append(said)
            said = ""
        folded = [fact]
        if cells and fact:
            folded = [line.plain.rstrip() for line in Text(fact).wrap(console, max(20, cells - width))]
        lines += [f"{begin:<{width}}{line}" for begin, line in zip_longest([said], folded, fillvalue="")]
    return "\n".join(lines)


def results(rows: Sequence[Sequence[str]]) -> None:
    """Lines of results, each of as many fields: parted by tabs in a pipe, and laid out on a terminal. Very many are
    not laid out."""
    cells = screen()
    if not cells or len(rows) > MOST_ROWS:
        for row in rows:
            result("\t".join(row).rstrip("\t"))
    elif rows:
        laid_out = columns([[Text(harmless(field)) for field in row] for row in rows], cells)
        with delivering():
            Console(highlight=False).print(laid_out)


def columns(rows: Sequence[Sequence[Text]], cells: int) -> RenderableType:
    """Fields in columns, folded where they are too long; the first, of names, is not if that leaves room for the
    others. Where the screen is so narrow that words and numbers would fold, the others stand below it instead."""
    from rich.padding import Padding
    from rich.table import Column, Table

    first, *others = [max(field.cell_len for field in column) for column in zip(*rows, strict=True)]
    if cells < NARROW and first + sum(2 + other for other in others) > cells:
        indented = (Padding(Text("  ").join(filter(None, row[1:])), (0, 0, 0, 2)) for row in rows)
        return Group(*(Group(row[0], below) for row, below in zip(rows, indented, strict=True)))
    more = (Column(overflow="fold") for _ in others)
    table = Table.grid(Column(no_wrap=first <= cells // 2, overflow="fold"), *more, padding=(0, 2, 0, 0))
    for row in rows:
        table.add_row(*row)
    return table


def screen() -> int | None:
    """How many cells a line of standard output has, where that is a terminal."""
    return Console().width if sys.stdout.isatty() else None


def short_path(path: Path) -> str:
    """A path as short as it can be typed here."""
    short = from_here(path)
    return f"./{short}" if short.startswith("-") else short  # which would be read as an option


def among_others(root: Path) -> str:
    """What a project is called where there are several: as short as it can be typed, or by its folder's name."""
    short = short_path(root)
    return root.name if short == "." else short


def for_shell(path: Path) -> str:
    """The same, as a shell takes it."""
    return quote(short_path(path))


class Meter:
    """Progress over pictures and steps; a silent one where nobody watches."""

    def __init__(self, progress: Any = None, pictures: Any = None, steps: Any = None, what: str = ""):
        self.progress, self.pictures, self.steps, self.what = progress, pictures, steps, what

    def step(self, done: int, of: int) -> None:
        if self.progress is not None:
            self.progress.update(self.pictures, description=self.what)
            self.progress.update(self.steps, completed=done, total=of, visible=True)

    def saved(self, done: int, of: int | None = None) -> None:
        if self.progress is not None:
            self.progress.update(self.pictures, completed=done, total=of)


@contextmanager
def meter(total: int | None, *, quiet: bool, what: str = "pictures", before: str = "") -> Iterator[Meter]:
    """A bar for the pictures, or whatever is made, and one for the steps of those in hand, on a terminal only. It says
    what is done `before` the first step. A signal that ends the process meanwhile is raised as Ended, as it leaves the
    cursor hidden otherwise, and nobody knows how to go on."""
    watched = console.is_terminal and not quiet
    with ended_as_by_ctrl_c(), bars(total, what, before) if watched else nullcontext(Meter()) as bar:
        yield bar


@contextmanager
def bars(total: int | None, what: str, before: str) -> Iterator[Meter]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(28), MofNCompleteColumn(), TimeRemainingColumn(compact=True))
    # Rich would send what goes to a piped standard output to the terminal; only where both are one screen may it.
    progress = Progress(*columns, console=console, transient=True, redirect_stdout=sys.stdout.isatty())
    pictures = progress.add_task(before or what, total=total)
    steps = progress.add_task("   steps", total=None, visible=False)
    try:
        progress.start()
        yield Meter(progress, pictures, steps, what)
    except BaseException:
        with suppress(OSError):  # of a terminal that is closed: what ended it is told, not that
            progress.stop()
        raise
    progress.stop()
