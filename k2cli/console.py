"""Standard error is for people, through rich. Standard output carries results, and only results."""

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

from k2cli.disk import signals_as_ctrl_c
from k2cli.texts import UNPRINTABLE, cwd_relative, display_safe, shell_quote
from model.errors import K2Error

MAX_ERROR = 2000  # characters of an error
MAX_TABLE_ROWS = 2000  # in columns, which take half a millisecond each
MIN_COLUMNS_WIDTH = 60  # cells of a screen; below that, columns of words do not fit

console = Console(stderr=True, highlight=False)


def sanitize(text: str) -> str:
    """The text as a terminal may show it: a name in a project may hold sequences that would rewrite the screen."""
    return "\n".join("\t".join(display_safe(part) for part in line.split("\t")) for line in text.split("\n"))


def say(text: str, style: str = "") -> None:
    """A line for people."""
    console.print(Text(sanitize(text), style), soft_wrap=True)


def say_at_exit(text: str) -> None:
    """A line for people who may be gone: a command may end because they closed its terminal."""
    with suppress(OSError):
        say(text)


def show_error(error: K2Error) -> None:
    """One sentence, and below it what to do. It may quote text from files, which may be a megabyte long."""
    message = str(error) if len(str(error)) <= MAX_ERROR else f"{str(error)[:MAX_ERROR]}…"
    console.print(Text.assemble(("Error: ", "bold red"), sanitize(message)), soft_wrap=True)
    if error.hint:
        console.print(Text.assemble(("Hint:  ", "bold cyan"), sanitize(error.hint)), soft_wrap=True)


def print_result(line: str) -> None:
    """A line of results, at once, so that a reader of the pipe can begin; a pipe gets it as is."""
    with writing_results():
        print(sanitize(line) if sys.stdout.isatty() else line, flush=True)


def to_json(table: Any) -> str:
    """One line of JSON; control characters that JSON allows are escaped, too, as terminals obey some of them.

    JSON has no nan and no inf: they become null. It is UTF-8, or ASCII if standard output has another encoding.
    """
    import json

    escaped = codecs.lookup(sys.stdout.encoding or "utf-8").name != "utf-8"

    def write(value: Any) -> str:
        return json.dumps(value, ensure_ascii=escaped, allow_nan=False, default=lambda moment: moment.isoformat())

    try:
        text = write(table)
    except ValueError:
        text = write(without_nan(table))
    return UNPRINTABLE.sub(lambda sign: f"\\u{ord(sign[0]):04x}", text)


def without_nan(value: Any) -> Any:
    """The same with None for every number that is not finite."""
    if isinstance(value, Mapping):
        return {key: without_nan(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Unwritable(K2Error):
    """Standard output cannot be written any more: nobody would learn of further results."""


@contextmanager
def writing_results() -> Iterator[None]:
    """Turn errors of writing standard output into one sentence; a reader who has left is handled by Typer."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.EPIPE:
            raise
        raise unwritable_error(error) from None


def unwritable_error(error: OSError) -> Unwritable:
    """Why standard output cannot be written, in a sentence; nothing more is written to it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes the rest again at exit
    return Unwritable(f"Standard output cannot be written: {error.strerror}.", hint="Send the results somewhere else.")


def aligned(rows: Sequence[tuple[str, str]], width: int, cells: int | None = None) -> str:
    """Facts below one another, each beside its name, or below it if that is longer than `width`; a name equal to the
    row above's is not repeated. If `cells` gives the screen's width, facts are wrapped and no word is cut."""
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


def print_results(rows: Sequence[Sequence[str]]) -> None:
    """Rows of results with equally many fields: separated by tabs in a pipe, in columns on a terminal unless there are
    very many."""
    cells = screen_width()
    if not cells or len(rows) > MAX_TABLE_ROWS:
        for row in rows:
            print_result("\t".join(row).rstrip("\t"))
    elif rows:
        laid_out = columns([[Text(sanitize(field)) for field in row] for row in rows], cells)
        with writing_results():
            Console(highlight=False).print(laid_out)


def columns(rows: Sequence[Sequence[Text]], cells: int) -> RenderableType:
    """Fields in columns, folded if too long; the first, of names, is not folded if that leaves room for the others. On
    a screen so narrow that words and numbers would fold, the others go below it instead."""
    from rich.padding import Padding
    from rich.table import Column, Table

    first, *others = [max(field.cell_len for field in column) for column in zip(*rows, strict=True)]
    if cells < MIN_COLUMNS_WIDTH and first + sum(2 + other for other in others) > cells:
        indented = (Padding(Text("  ").join(filter(None, row[1:])), (0, 0, 0, 2)) for row in rows)
        return Group(*(Group(row[0], below) for row, below in zip(rows, indented, strict=True)))
    more = (Column(overflow="fold") for _ in others)
    table = Table.grid(Column(no_wrap=first <= cells // 2, overflow="fold"), *more, padding=(0, 2, 0, 0))
    for row in rows:
        table.add_row(*row)
    return table


def screen_width() -> int | None:
    """How many cells a line of standard output has, if that is a terminal."""
    return Console().width if sys.stdout.isatty() else None


def short_path(path: Path) -> str:
    """A path as short as it can be typed here."""
    short = cwd_relative(path)
    return f"./{short}" if short.startswith("-") else short  # which would be read as an option


def name_among_several(root: Path) -> str:
    """What a project is called among several: the shortest path that can be typed here, or its folder's name."""
    short = short_path(root)
    return root.name if short == "." else short


def for_shell(path: Path) -> str:
    """The same, quoted for a shell."""
    return shell_quote(short_path(path))


class Meter:
    """Progress over pictures and steps; silent if nobody watches."""

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
    """A bar for the pictures, or whatever is made, and one for the steps of those being rendered, on a terminal only.
    `before` is what happens before the first step. A signal that ends the process meanwhile is raised as Ended;
    otherwise the cursor would stay hidden, and nobody would learn how to resume."""
    watched = console.is_terminal and not quiet
    with signals_as_ctrl_c(), progress_bars(total, what, before) if watched else nullcontext(Meter()) as bar:
        yield bar


@contextmanager
def progress_bars(total: int | None, what: str, before: str) -> Iterator[Meter]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(28), MofNCompleteColumn(), TimeRemainingColumn(compact=True))
    # Rich would redirect a piped standard output to the terminal; it may only if both are the same screen.
    progress = Progress(*columns, console=console, transient=True, redirect_stdout=sys.stdout.isatty())
    pictures = progress.add_task(before or what, total=total)
    steps = progress.add_task("   steps", total=None, visible=False)
    try:
        progress.start()
        yield Meter(progress, pictures, steps, what)
    except BaseException:
        with suppress(OSError):  # of a closed terminal: what ended it is reported instead
            progress.stop()
        raise
    progress.stop()
