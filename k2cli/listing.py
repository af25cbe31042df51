"""Lists of pictures and of their differences: a table on a terminal, tab-separated lines in a pipe."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.text import Text

from k2cli.console import MIN_COLUMNS_WIDTH, print_result, say, short_path
from k2cli.outputs import row_label
from k2cli.texts import display_safe

if TYPE_CHECKING:
    from rich.table import Table

    from k2cli.history import MadePicture
    from k2cli.records import Record

NAMES_WIDTH, MIN_PICTURE_WIDTH = 14, 18  # cells: the column of names, and the least for a picture's column
MAX_NAME_WIDTH = 20  # cells of a fact's name


def short_picture_path(made: MadePicture) -> str:
    """The shortest path by which a picture can be typed here."""
    return os.path.join(short_folder(made.path.parent, os.getcwd()), made.path.name)


@cache
def short_folder(folder: Path, cwd: str) -> str:
    """The shortest path of a run's folder from `cwd`, cached for thousands of pictures."""
    return short_path(folder)


def tsv_line(made: MadePicture) -> str:
    """A picture's line in a pipe."""
    created = f"{made.created:%Y-%m-%dT%H:%M:%SZ}" if made.created else ""
    seed = made.text("settings.seed")
    return "\t".join(
        [short_picture_path(made), created, seed, made.size, styles_text(made, ","), made.text("prompt.text")]
    )


def show_table(found: Sequence[MadePicture]) -> None:
    """Pictures on a terminal: a heading for each run, then a line for each picture, cut at the screen's edge. On a
    narrow screen the time and the prompt get lines of their own; so does what distinguishes the pictures of a
    comparison, if it does not fit."""
    screen = Console(highlight=False)
    max_widths = (screen.width // 3, 30, 30, screen.width // 5)  # cells of a column; the prompt gets the rest
    rows = [
        (
            Text("  " + shorten(made.path.name, max_widths[0] - 2)),
            Text(f"seed {made.text('settings.seed')}", "dim", overflow="ellipsis"),
            Text(made.size, "dim", overflow="ellipsis"),
            Text(styles_text(made, ", ", digits=2), "cyan", overflow="ellipsis"),
            Text.assemble((distinctions(made), "cyan"), "  " * bool(distinctions(made)), made.text("prompt.text")),
        )
        for made in found
    ]
    widths = [min(limit, max(row[column].cell_len for row in rows)) for column, limit in enumerate(max_widths) if rows]
    room = screen.width - sum(width + 2 for width in widths)
    narrow, cut = screen.width < MIN_COLUMNS_WIDTH, any(cell_len(distinctions(made)) > room for made in found)
    time_separator, prompt_separator = "\n" if narrow else "  ", "\n    " if narrow or cut else "  "
    runs = groupby(zip(found, rows, strict=True), key=lambda pair: pair[0].path.parent)
    for number, (folder, pictures) in enumerate(runs):
        (first, row), *more = pictures
        when = f"{first.local_time:%Y-%m-%d %H:%M}" if first.local_time else ""
        details = " · ".join(filter(None, [when, f"{first.text('model.name')} {first.text('model.variant')}".strip()]))
        heading = Text.assemble("\n" * bool(number), (short_path(folder), "bold"), time_separator, (details, "dim"))
        screen.print(heading, no_wrap=True, overflow="ellipsis")
        for cells in (row, *(row for _, row in more)):
            for column, width in enumerate(widths):
                cells[column].align("right" if column == 1 else "left", width)
            *facts, prompt = cells
            screen.print(Text("  ").join(facts), prompt, sep=prompt_separator, no_wrap=True, overflow="ellipsis")


def distinctions(made: MadePicture) -> str:
    """What distinguishes a picture of a comparison from those beside it."""
    row, caption = row_label(made.text("prompt.row"), made.text("prompt.text")), made.text("prompt.caption")
    row = "" if f"{caption} · ".startswith(f"{row} · ") else row  # as in the rows of a triangle
    return " · ".join(filter(None, [row, caption]))


def shorten(name: str, cells: int) -> str:
    """A file's name in so many cells, cut before its end, which distinguishes it from others of its prompt."""
    if cell_len(name) <= cells:
        return name
    end = name[-min(12, cells // 2) :]
    return f"{set_cell_size(name, cells - cell_len(end) - 1).rstrip()}…{end}"


def styles_text(made: MadePicture, separator: str, digits: int = 6) -> str:
    return separator.join(f"{name} {round(strength, digits):g}" for name, strength in made.styles.items())


def comparison_table(rows: Mapping[str, Sequence[str]], columns: slice) -> Table:
    """A table with a row for each fact, by name, and a column for each of some pictures."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(style="dim", overflow="fold", max_width=MAX_NAME_WIDTH)
    for name, row in rows.items():
        facts = (Text(display_safe(fact), "" if name else "bold", overflow="fold") for fact in row[columns])
        table.add_row(Text(display_safe(name)), *facts)
    return table


def show_differences(names: Sequence[str], found: Sequence[Record]) -> None:
    """One row per fact, one column per picture: on a terminal in tables that leave room for words, in a pipe
    tab-separated."""
    from k2cli.facts import differences

    file_names = [Path(name).name for name in names]
    rows = {"": file_names if len({*file_names}) == len(file_names) else [*names], **differences(found)}
    if sys.stdout.isatty():
        screen = Console(highlight=False)
        tables = math.ceil(len(found) / max(2, (screen.width - NAMES_WIDTH) // MIN_PICTURE_WIDTH))
        per_table = math.ceil(len(found) / tables)
        for start in range(0, len(found), per_table):
            screen.print(*[""] * bool(start), comparison_table(rows, slice(start, start + per_table)), sep="\n")
    else:
        for name, row in rows.items():
            print_result("\t".join([name, *(" ".join(fact.split()) for fact in row)]))
    same_pixels = len({str(record.pixels) for record in found}) == 1
    if len(rows) == 1:
        pixels = ", and so are their pixels" if same_pixels else ", yet their pixels differ"
        say(f"All that they were made from is the same{pixels}.", "dim")
    elif same_pixels:
        say("Their pixels are the same.", "dim")
