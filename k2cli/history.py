"""What a project has made: every picture that stands in its outputs, with its record, read fast enough for thousands.

Records are somebody's files by now, edited or damaged perhaps: what is read here is looked at, never rendered from.
`records.parse` is the strict reader.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cached_property
from heapq import nlargest
from pathlib import Path
from typing import Any

from k2cli import dialect
from k2cli.folder import names_in
from k2cli.outputs import NUMBER, PICTURES, check_link, number_of
from k2cli.tables import LIMIT, leaves, tables_in
from k2cli.texts import LONGEST_PART, UNPRINTABLE, composed, masked, sought
from model import picture_file
from model.errors import USAGE, K2Error
from model.headers import open_file
from model.spec import OF_REFERENCES

SINCE = re.compile(r"(\d+)\s*(m|h|d|w)")
UNITS = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}

PARTED = (
    r"[^\W_\u0590-\u1dff\u2000-\U0010ffff]"  # a letter or digit of scripts that part words: Latin, Greek, Cyrillic
    r"|[\u0300-\u036f\u0483-\u0487\u1dc0-\u1dff\ufe20-\ufe2f]"  # or an accent of theirs that stands apart
)

LONG_AGO = datetime.min.replace(tzinfo=UTC)


def loras(table: Mapping[str, Any]) -> dict[str, str]:
    """Of a record every LoRA that had a part in the picture: its file, and at which weight; several styles may share
    one, each at its own."""
    found: dict[str, str] = {}
    for lora in tables_in(table, "lora"):
        if lora.get("file") and isinstance(lora.get("weight"), int | float):
            file, weight = masked(" ".join(str(lora["file"]).split())), f"{float(lora['weight']):g}"
            found[file] = f"{found[file]}, {weight}" if file in found else weight
    return found


MAY_BE_NULL = {  # keys of a record that has nothing to say of them, which TOML leaves out
    "": ("blocked", "leader", "init_image", "mask", "style", "lora"),
    "prompt": ("row", "caption", "unread"),
    "settings": ("sampler", "guidance_until", "denoise", *OF_REFERENCES),
    "leader": ("shared",),
}


def in_full(table: Mapping[str, Any]) -> dict[str, Any]:
    """A record as whoever rendered the picture was told of it: with null for what it has nothing to say of."""
    full: dict[str, Any] = dict.fromkeys(MAY_BE_NULL[""]) | dict(table)
    for part, keys in MAY_BE_NULL.items():
        if isinstance(full.get(part), dict):
            full[part] = dict.fromkeys(keys) | full[part]
    if isinstance(full["style"], list):
        full["style"] = [{"method": None} | style if isinstance(style, dict) else style for style in full["style"]]
    return full


@dataclass(frozen=True)
class Made:
    """One picture on disk and the table of its record. The properties take whatever a record may hold."""

    path: Path
    table: Mapping[str, Any]

    @property
    def run(self) -> str:
        """The name of its run's folder."""
        return self.path.parent.name

    def __getitem__(self, place: str) -> Any:
        """made["prompt.text"]: a value of the record, or None."""
        value: Any = self.table
        for key in place.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        return value

    def text(self, place: str) -> str:
        """A value of the record on one line that no terminal would obey."""
        value = self[place]
        return "" if value is None else masked(" ".join(str(value).split()))

    @cached_property
    def created(self) -> datetime | None:
        """When it was made, in UTC."""
        moment = self["created"]
        if not isinstance(moment, datetime) or not 1 < moment.year < 9999:  # no zone may lead out of the calendar
            return None
        return moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)

    @cached_property
    def local(self) -> datetime | None:
        """The same by the clock here, or in UTC where that does not go so far: on Windows not before 1970."""
        try:
            return self.created and self.created.astimezone()
        except (OverflowError, ValueError, OSError):
            return self.created

    @cached_property
    def styles(self) -> dict[str, float]:
        """Name -> strength of every style that had a part in it."""
        return {
            masked(str(style["name"])): float(style["strength"])
            for style in tables_in(self.table, "style")
            if isinstance(style.get("strength"), int | float) and style["strength"] and style.get("name")
        }

    @property
    def size(self) -> str:
        return f"{self.text('settings.width')}x{self.text('settings.height')}"


@dataclass(frozen=True)
class Chosen:
    """Which pictures are wanted; what is empty leaves all of them in."""

    run: str = ""  # a number, or a part of the folder's name
    prompt: str = ""  # words that all occur in what was asked, or begin one that does
    styles: Collection[str] = ()  # that it was all made with
    since: datetime | None = None

    def __contains__(self, made: Made) -> bool:
        asked = sought(" ".join(made.text(f"prompt.{key}") for key in ("name", "text", "expanded")))
        return (
            all(begins_in(word, asked) for word in sought(self.prompt).split())
            and all(composed(style) in made.styles for style in self.styles)
            and (self.since is None or (made.created is not None and made.created >= self.since))
        )

    def run_folder(self, name: str) -> bool:
        if not self.run.isdecimal() or len(self.run) > LONGEST_PART:  # as no folder has in its name
            return sought(self.run) in sought(name)
        number = NUMBER.match(name)
        return number is not None and int(number[1]) == int(self.run)


def begins_in(word: str, text: str) -> bool:
    """Whether a word of the text begins so; in scripts that join words to others, or do not part them, whether it is in
    it, and behind letters of those a word of the others may begin."""
    parted = word[0] < "\u0590"  # Latin, Greek, Cyrillic and their like come first
    return re.search((f"(?<!{PARTED})" if parted else "") + re.escape(word), text) is not None


def read(outputs: Path, chosen: Chosen | None = None, skipped: Callable[[Path], None] | None = None) -> Iterator[Made]:
    """All pictures of an outputs folder, run after run in the order in which they were made.

    A picture without a record that can be read, beside it or within, is handed to `skipped`. Raises K2Error if the
    folder cannot be listed.
    """
    chosen = chosen or Chosen()
    for run in runs_of(outputs):
        if chosen.run_folder(run.name):
            yield from read_run(run, chosen, skipped)


def newest_last(made: Iterable[Made], most: int | None) -> list[Made]:
    """In the order in which they were made, whatever run of whatever project they are of: the last `most` of them, and
    no more are held on the way."""

    def moment(numbered: tuple[int, Made]) -> tuple[datetime, int]:
        place, one = numbered
        return one.created or LONG_AGO, place

    kept = nlargest(most, enumerate(made), key=moment) if most else enumerate(made)
    return [one for _, one in sorted(kept, key=moment)]


def runs_of(outputs: Path) -> list[Path]:
    """The folders of all runs, the oldest first, and before them those that were given other names. Links are passed
    over: what they lead to was not made here.

    So is what is hidden, and names with control characters, which k2 gives to nothing: a line break would make two
    lines of one in a pipe. Raises K2Error where the folder cannot be listed, or is a link to nothing.
    """
    check_link(outputs)
    found = [outputs / name for name in names_in(outputs) if not name.startswith(".") and not UNPRINTABLE.search(name)]
    runs = [path for path in found if path.is_dir() and not path.is_symlink()]
    return sorted(runs, key=lambda run: (number_of(run) if NUMBER.match(run.name) else -1, run.name))


def read_run(run: Path, chosen: Chosen | None = None, skipped: Callable[[Path], None] | None = None) -> list[Made]:
    """The pictures of one run, as `read` gives them; none of one that is gone by now: a run that has only just begun
    gets another name, and one that came to nothing is removed."""
    try:
        with os.scandir(run) as entries:
            found = (entry.name for entry in entries if entry.is_file(follow_symlinks=False))
            names = {name for name in found if not UNPRINTABLE.search(name)}
    except (FileNotFoundError, NotADirectoryError):
        return []
    except PermissionError:
        if skipped:
            skipped(run)
        return []
    pictures = []
    for name in names:
        stem, dot, suffix = name.rpartition(".")
        if dot + suffix not in PICTURES or picture_file.is_sheet(run / name):
            continue
        beside = load(run / f"{stem}.toml") if f"{stem}.toml" in names else None
        table = beside or carried(run / name)
        if table is not None:
            pictures.append(Made(run / name, table))
        elif skipped and not gone(run / name):
            skipped(run / name)
    return sorted(
        (made for made in pictures if chosen is None or made in chosen),
        key=lambda made: (made.created or LONG_AGO, natural(made.path.name)),
    )


def gone(path: Path) -> bool:
    try:
        path.lstat()
    except OSError as error:
        return isinstance(error, FileNotFoundError | NotADirectoryError)
    return False


def natural(name: str) -> list[tuple[int, str]]:
    """fox-9 before fox-10."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", name)]


def load(path: Path) -> dict[str, Any] | None:
    """A record's table, or None where there is none to be read, or where a number in it is nan or inf."""
    try:
        with open_file(path) as file:
            raw = file.read(LIMIT + 1)
        table = dialect.parse(raw.decode("utf-8-sig")) if len(raw) <= LIMIT else None
    except (OSError, ValueError, RecursionError):  # tomllib's own error is a ValueError
        return None
    return table if is_record(table) else None


def carried(picture: Path) -> dict[str, Any] | None:
    """The record's table that a picture itself carries, where none that can be read stands beside it."""
    # with all that a project is, for which the shell would wait when it completes the name of a run
    from k2cli.records import read as read_record

    with suppress(K2Error):
        table = dict(read_record(picture).table)
        return table if is_record(table) else None
    return None


def is_record(table: dict[str, Any] | None) -> bool:
    return table is not None and isinstance(table.get("prompt"), dict) and is_finite(table)


def is_finite(table: Any) -> bool:
    """Whether no number in a table is nan or inf."""
    return not any(isinstance(each, float) and not math.isfinite(each) for _, each in leaves(table))


def read_since(text: str, now: datetime | None = None) -> datetime:
    """ "3d", "2h", "2026-11-24" or "2026-11-24 12:00" -> a moment. Raises K2Error where it is none of these."""
    now = now or datetime.now(UTC)
    if match := SINCE.fullmatch(text.strip()):
        try:
            return now - timedelta(**{UNITS[match[2]]: int(match[1])})
        except (OverflowError, ValueError):  # Python reads no more than 4,300 digits
            return LONG_AGO
    if text.strip() in ("today", "yesterday"):
        midnight = now.astimezone().replace(hour=0, minute=0, second=0, microsecond=0)
        return midnight - timedelta(days=text.strip() == "yesterday")
    try:
        moment = datetime.fromisoformat(text.strip())
    except ValueError:
        said = f'--since: "{masked(text)}" is no moment.'
        hint = "Like 30m, 2h, 3d, 1w (minutes, hours, days, weeks), today, yesterday, 2026-11-24."
        raise K2Error(said, hint=hint, code=USAGE) from None
    try:
        return moment.astimezone() if moment.tzinfo is None else moment
    except (OverflowError, ValueError, OSError):  # a zone would lead out of the calendar, or out of the clock
        return moment.replace(tzinfo=UTC)
