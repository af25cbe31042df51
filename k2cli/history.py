"""What a project has rendered: every picture in its outputs with its record, read fast enough for thousands.

Records are the user's files, perhaps edited or damaged: what is read here is only shown, never rendered from.
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

from k2cli import fast_toml
from k2cli.folder import list_names
from k2cli.outputs import PICTURE_SUFFIXES, RUN_NUMBER, check_link, run_number
from k2cli.texts import MAX_PATH_PART, UNPRINTABLE, display_safe, nfc, search_form
from k2cli.toml_tables import MAX_FILE_BYTES, leaves, tables_in
from model import picture_file
from model.errors import USAGE, K2Error
from model.headers import open_file
from model.spec import STYLE_SETTINGS

AGE = re.compile(r"(\d+)\s*(m|h|d|w)")
UNITS = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}

WORD_CHAR = (
    r"[^\W_\u0590-\u1dff\u2000-\U0010ffff]"  # a letter or digit of scripts that separate words: Latin, Greek, Cyrillic
    r"|[\u0300-\u036f\u0483-\u0487\u1dc0-\u1dff\ufe20-\ufe2f]"  # or a combining accent of theirs
)

EARLIEST = datetime.min.replace(tzinfo=UTC)


def lora_weights(table: Mapping[str, Any]) -> dict[str, str]:
    """Every LoRA that a record says had a part in the picture: its file and weight; several styles may share one, each
    at its own weight."""
    found: dict[str, str] = {}
    for lora in tables_in(table, "lora"):
        if lora.get("file") and isinstance(lora.get("weight"), int | float):
            file, weight = display_safe(" ".join(str(lora["file"]).split())), f"{float(lora['weight']):g}"
            found[file] = f"{found[file]}, {weight}" if file in found else weight
    return found


NULLABLE_KEYS = {  # keys that TOML leaves out where a record has no value for them
    "": ("blocked", "leader", "init_image", "mask", "style", "lora"),
    "prompt": ("row", "caption", "unread"),
    "settings": ("sampler", "guidance_until", "denoise", *STYLE_SETTINGS),
    "leader": ("shared",),
}


def with_nulls(table: Mapping[str, Any]) -> dict[str, Any]:
    """A record as `k2 render --json` printed it: with null where it has no value."""
    full: dict[str, Any] = dict.fromkeys(NULLABLE_KEYS[""]) | dict(table)
    for part, keys in NULLABLE_KEYS.items():
        if isinstance(full.get(part), dict):
            full[part] = dict.fromkeys(keys) | full[part]
    if isinstance(full["style"], list):
        full["style"] = [{"method": None} | style if isinstance(style, dict) else style for style in full["style"]]
    return full


@dataclass(frozen=True)
class MadePicture:
    """One picture on disk and the table of its record. The properties accept whatever a record may hold."""

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
        """A value of the record on one line, without control characters."""
        value = self[place]
        return "" if value is None else display_safe(" ".join(str(value).split()))

    @cached_property
    def created(self) -> datetime | None:
        """When it was made, in UTC."""
        moment = self["created"]
        if not isinstance(moment, datetime) or not 1 < moment.year < 9999:  # zones stay in the calendar
            return None
        return moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)

    @cached_property
    def local_time(self) -> datetime | None:
        """The same in local time, or in UTC where that is out of range: on Windows before 1970."""
        try:
            return self.created and self.created.astimezone()
        except (OverflowError, ValueError, OSError):
            return self.created

    @cached_property
    def styles(self) -> dict[str, float]:
        """Name -> strength of every style that had a part in it."""
        return {
            display_safe(str(style["name"])): float(style["strength"])
            for style in tables_in(self.table, "style")
            if isinstance(style.get("strength"), int | float) and style["strength"] and style.get("name")
        }

    @property
    def size(self) -> str:
        return f"{self.text('settings.width')}x{self.text('settings.height')}"


@dataclass(frozen=True)
class Selection:
    """Which pictures are wanted; an empty field selects all."""

    run: str = ""  # a number, or part of the folder's name
    prompt: str = ""  # each of these words starts a word of the prompt
    styles: Collection[str] = ()  # all of which it was made with
    since: datetime | None = None

    def __contains__(self, made: MadePicture) -> bool:
        text = search_form(" ".join(made.text(f"prompt.{key}") for key in ("name", "text", "expanded")))
        return (
            all(word_starts(word, text) for word in search_form(self.prompt).split())
            and all(nfc(style) in made.styles for style in self.styles)
            and (self.since is None or (made.created is not None and made.created >= self.since))
        )

    def matches_run(self, name: str) -> bool:
        if not self.run.isdecimal() or len(self.run) > MAX_PATH_PART:  # too long for any folder's name
            return search_form(self.run) in search_form(name)
        number = RUN_NUMBER.match(name)
        return number is not None and int(number[1]) == int(self.run)


def word_starts(word: str, text: str) -> bool:
    """Whether a word of the text starts so; in scripts that join words, or do not separate them, whether the text
    contains it. A word of other scripts may also start right after letters of those."""
    parted = word[0] < "\u0590"  # Latin, Greek, Cyrillic and their like come first
    return re.search((f"(?<!{WORD_CHAR})" if parted else "") + re.escape(word), text) is not None


def read(
    outputs: Path, selection: Selection | None = None, on_skipped: Callable[[Path], None] | None = None
) -> Iterator[MadePicture]:
    """All pictures of an outputs folder, run after run, in the order in which they were made.

    A picture without a readable record, beside it or inside, is passed to `on_skipped`. Raises K2Error if the folder
    cannot be listed.
    """
    selection = selection or Selection()
    for run in run_folders(outputs):
        if selection.matches_run(run.name):
            yield from read_run(run, selection, on_skipped)


def latest(made: Iterable[MadePicture], limit: int | None) -> list[MadePicture]:
    """The last `limit` pictures, in the order in which they were made, across runs and projects; no more than that are
    held in memory."""

    def by_time(numbered: tuple[int, MadePicture]) -> tuple[datetime, int]:
        place, one = numbered
        return one.created or EARLIEST, place

    kept = nlargest(limit, enumerate(made), key=by_time) if limit else enumerate(made)
    return [one for _, one in sorted(kept, key=by_time)]


def run_folders(outputs: Path) -> list[Path]:
    """The folders of all runs, oldest first, after those that were renamed. Links are skipped: what they lead to was
    not made here.

    So are hidden folders, and names with control characters, which k2 never creates: a line break would make two lines
    of one in a pipe. Raises K2Error if the folder cannot be listed, or is a broken link.
    """
    check_link(outputs)
    found = [
        outputs / name for name in list_names(outputs) if not name.startswith(".") and not UNPRINTABLE.search(name)
    ]
    runs = [path for path in found if path.is_dir() and not path.is_symlink()]
    return sorted(runs, key=lambda run: (run_number(run) if RUN_NUMBER.match(run.name) else -1, run.name))


def read_run(
    run: Path, selection: Selection | None = None, on_skipped: Callable[[Path], None] | None = None
) -> list[MadePicture]:
    """The pictures of one run, as `read` gives them; none if it is gone by now: a run that has just begun is renamed,
    and one without pictures is removed."""
    try:
        with os.scandir(run) as entries:
            found = (entry.name for entry in entries if entry.is_file(follow_symlinks=False))
            names = {name for name in found if not UNPRINTABLE.search(name)}
    except (FileNotFoundError, NotADirectoryError):
        return []
    except PermissionError:
        if on_skipped:
            on_skipped(run)
        return []
    pictures = []
    for name in names:
        stem, dot, suffix = name.rpartition(".")
        if dot + suffix not in PICTURE_SUFFIXES or picture_file.is_sheet(run / name):
            continue
        sidecar = load_record(run / f"{stem}.toml") if f"{stem}.toml" in names else None
        table = sidecar or embedded_record(run / name)
        if table is not None:
            pictures.append(MadePicture(run / name, table))
        elif on_skipped and not is_gone(run / name):
            on_skipped(run / name)
    return sorted(
        (made for made in pictures if selection is None or made in selection),
        key=lambda made: (made.created or EARLIEST, natural_key(made.path.name)),
    )


def is_gone(path: Path) -> bool:
    try:
        path.lstat()
    except OSError as error:
        return isinstance(error, FileNotFoundError | NotADirectoryError)
    return False


def natural_key(name: str) -> list[tuple[int, str]]:
    """fox-9 before fox-10."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", name)]


def load_record(path: Path) -> dict[str, Any] | None:
    """A record's table, or None if it cannot be read, or if a number in it is nan or inf."""
    try:
        with open_file(path) as file:
            raw = file.read(MAX_FILE_BYTES + 1)
        table = fast_toml.parse(raw.decode("utf-8-sig")) if len(raw) <= MAX_FILE_BYTES else None
    except (OSError, ValueError, RecursionError):  # tomllib's own error is a ValueError
        return None
    return table if is_record(table) else None


def embedded_record(picture: Path) -> dict[str, Any] | None:
    """The record's table inside a picture, used if none that can be read is beside it."""
    # imported here, as it pulls in everything about projects, and completing the name of a run would wait for it
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


def parse_since(text: str, now: datetime | None = None) -> datetime:
    """ "3d", "2h", "2026-11-24" or "2026-11-24 12:00" -> a datetime. Raises K2Error if it is none of these."""
    now = now or datetime.now(UTC)
    if match := AGE.fullmatch(text.strip()):
        try:
            return now - timedelta(**{UNITS[match[2]]: int(match[1])})
        except (OverflowError, ValueError):  # Python reads no more than 4,300 digits
            return EARLIEST
    if text.strip() in ("today", "yesterday"):
        midnight = now.astimezone().replace(hour=0, minute=0, second=0, microsecond=0)
        return midnight - timedelta(days=text.strip() == "yesterday")
    try:
        moment = datetime.fromisoformat(text.strip())
    except ValueError:
        said = f'--since: "{display_safe(text)}" is not a time.'
        hint = "Examples: 30m, 2h, 3d, 1w (minutes, hours, days, weeks), today, yesterday, 2026-11-24."
        raise K2Error(said, hint=hint, code=USAGE) from None
    try:
        return moment.astimezone() if moment.tzinfo is None else moment
    except (OverflowError, ValueError, OSError):  # a zone would leave the calendar, or the range of the clock
        return moment.replace(tzinfo=UTC)
