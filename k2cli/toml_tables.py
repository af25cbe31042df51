"""User-written TOML: parsed and checked against dataclasses; errors name the line."""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field, fields
from datetime import date, time
from functools import cache, cached_property
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, get_args, get_type_hints

from k2cli.texts import check_line, check_printable, display_safe
from model.errors import USAGE, K2Error, listed, nearest
from model.headers import open_file
from model.spec import LIMITS

MAX_FILE_BYTES = 1 << 20  # bytes in a file written by hand; anything larger is a mistake or an attack
MAX_LINE_CHARS = 400  # characters of a line searched for its key, to locate it in messages
DEEP_KEY = re.compile(  # a.b.c… where a key may be: tomllib takes quadratic time over its parts
    r"""(?m)(?:^|[{,\[])[ \t]*+(?:(?:[\w-]++|"[^"\n]*+"|'[^'\n]*+')[ \t]*+\.[ \t]*+){16}"""
)
TYPE_NAMES = {
    str: "a string in quotes",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    dict: "a table",
    list: "a list",
}

SYNTAX_HINTS = (  # how tomllib's messages start, and what to do
    (
        ("Invalid value",),
        'Strings need straight quotes (name = "moody"), numbers a leading digit (0.5); true and false are lower-case.',
    ),
    (("Unescaped",), r"Write \\ for a \, or use single quotes, in which it needs no escape."),
    (
        ("Unterminated", r"Illegal character '\n'", 'Expected "\'"'),
        "A string must end on its own line, with the quote it started with.",
    ),
    (("Illegal character",), "It is a control character, which few editors show: delete it."),
    (("Cannot declare", "Cannot overwrite"), "It is already defined further up: merge the two."),
    (
        ("Expected newline",),
        'A line is key = value: strings need quotes (size = "256x192"), numbers look like 0.5 and 7, not 07.',
    ),
    (("Expected '='", "Invalid statement"), "A line is key = value, a [table], or a # comment."),
    (("Expected ']",), "A table's name needs the same brackets on both sides: [render], [[prompt]]."),
    (("Unclosed",), "Separate the values with commas, and close the bracket."),
)

QUOTED = r"'([^']*)'"
DEFINED_TWICE = re.compile(rf"\(({QUOTED}(?:, {QUOTED})*),?\)(?= twice)")  # a table's name as Python prints it

T = TypeVar("T")


PATH = {"path": True}  # metadata of a field whose strings are paths, in which every space counts
NO_KEY = {"key": False}  # of a field that is no key of the table
WEIGHT = {"low": LIMITS["strength"][0], "high": LIMITS["strength"][1]}  # of a style, and of a picture within it


def between(default: Any, low: float, high: float) -> Any:
    """A dataclass field whose number must lie in low … high."""
    return field(default=default, metadata={"low": low, "high": high})


def limited(key: str, default: Any = None) -> Any:
    """A dataclass field whose number must keep to rendering's limits for it."""
    return between(default, *LIMITS[key])


def one_of(default: Any, *choices: str | int) -> Any:
    """A dataclass field whose value is one of these."""
    return field(default=default, metadata={"choices": choices})


def matching(default: Any, pattern: str, *examples: str) -> Any:
    """A dataclass field whose string must match a pattern."""
    return field(default=default, metadata={"pattern": pattern, "examples": examples})


class IntegerTooLarge(ValueError):
    """A whole number beyond TOML's 64 bits."""

    def __init__(self, path: tuple[str | int, ...]):
        key = [part for part in path if isinstance(part, str)][-1]
        super().__init__(f'"{display_safe(key)}" has more than 64 bits')
        self.path = path


def loads(text: str) -> dict[str, Any]:
    """The table in an untrusted TOML text. Raises ValueError, and RecursionError if it is nested absurdly deep."""
    if DEEP_KEY.search(text):
        raise RecursionError
    table = tomllib.loads(text)
    check_integers(table)
    return table


def check_integers(value: Any) -> None:
    """Refuse whole numbers beyond TOML's 64 bits: Python accepts a megabyte of hexadecimal digits as one, which fits no
    float and cannot be printed. Raises TooManyBits."""
    for path, each in leaves(value):
        if isinstance(each, int) and not -(2**63) <= each < 2**63:
            raise IntegerTooLarge(path)


def leaves(value: Any) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """Every item in a value that is neither table nor list, at any depth, with the keys that lead to it."""
    stack: list[tuple[tuple[str | int, ...], Any]] = [((), value)]
    while stack:
        path, value = stack.pop()
        if isinstance(value, dict):
            stack.extend(((*path, key), each) for key, each in value.items())
        elif isinstance(value, list):
            stack.extend(((*path, index), each) for index, each in enumerate(value))
        else:
            yield path, value


def tables_in(table: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    """The tables in the list under a key of an untrusted table; everything else is skipped."""
    found = table.get(key)
    return [each for each in found if isinstance(each, Mapping)] if isinstance(found, list) else []


class Toml:
    """A parsed TOML text that knows the line of each key. `label` is what messages call it."""

    def __init__(self, text: str, label: str, parse: Callable[[str], dict[str, Any]] = loads):
        self.text, self.label = text, label
        try:
            self.table = parse(text)
        except RecursionError:
            raise K2Error(f"{label} is nested too deeply.", hint="Three levels of tables are enough.") from None
        except IntegerTooLarge as error:
            hint = f"Whole numbers go up to {2**63 - 1:,}."
            raise K2Error(f"{self.where(*error.path)}: {error}.", hint=hint) from None
        except ValueError as error:  # tomllib's own is one
            hint = next((hint for begins, hint in SYNTAX_HINTS if str(error).startswith(begins)), "")
            message = DEFINED_TWICE.sub(
                lambda found: f"[{'.'.join(re.findall(QUOTED, found[1]))}]", display_safe(str(error))
            )
            raise K2Error(f"{label} is not valid TOML: {message}.", hint=hint) from None

    @classmethod
    def read(
        cls, path: Path, label: str, limit: int = MAX_FILE_BYTES, parse: Callable[[str], dict[str, Any]] = loads
    ) -> Toml:
        """A file of at most `limit` bytes. Raises K2Error if it is missing, larger, or not readable as TOML."""
        try:
            with open_file(path) as file:
                content = file.read(limit + 1)
            if len(content) > limit:
                raise K2Error(f"{label} is larger than {limit >> 20} MB.", hint="Is it the right file?")
            return cls(content.decode("utf-8-sig"), label, parse)
        except FileNotFoundError:
            raise K2Error(f"There is no {label}.", hint="Check the name.") from None
        except OSError as error:
            raise K2Error(f"{label} cannot be read: {error.strerror}.", hint="Check its permissions.") from None
        except UnicodeDecodeError:
            raise K2Error(f"{label} is not a text file in UTF-8.", hint="Save it as UTF-8.") from None

    @cached_property
    def lines(self) -> dict[tuple[str | int, ...], int]:
        """Key path -> line number, for every `[table]`, `[[table]]` and `key =` on a line of its own."""
        found: dict[tuple[str | int, ...], int] = {}
        prefix: tuple[str | int, ...] = ()
        counts: dict[tuple[str | int, ...], int] = {}  # index of the last table in each list of tables
        open_quotes = ""  # the quotes of an open multi-line string
        for number, line in enumerate(self.text.split("\n"), 1):  # not splitlines: strings may hold other line ends
            if open_quotes:
                open_quotes = "" if open_quotes in line else open_quotes
                continue
            if line.lstrip().startswith("#"):  # even with quotes in it
                continue
            start = line[:MAX_LINE_CHARS]  # the patterns take quadratic time over endless lines
            if header := re.match(r"\s*(\[\[?)\s*([^\[\]]+?)\s*\]", start):
                prefix = ()
                for part in header[2].split("."):  # a table under a list of tables belongs to the last one
                    prefix = (*prefix, *([counts[prefix]] if prefix in counts else []), part.strip("\"' "))
                found.setdefault(prefix, number)
                if header[1] == "[[":
                    counts[prefix] = counts.get(prefix, -1) + 1
                    prefix = (*prefix, counts[prefix])
                    found.setdefault(prefix, number)
            elif key := re.match(r"\s*([\w.-]+|\"[^\"]*\"|'[^']*')\s*=", start):
                name = key[1]
                parts = (name[1:-1],) if name[0] in "\"'" else tuple(name.split("."))
                for end in range(1, len(parts) + 1):  # a.b = 1 defines a, too
                    found.setdefault((*prefix, *parts[:end]), number)
            for quotes in ('"""', "'''"):
                if line.count(quotes) % 2:
                    open_quotes = quotes
        return found

    def where(self, *path: str | int) -> str:
        """A key's place for a message: "k2.toml, line 7", or the file alone if the line cannot be found."""
        for end in range(len(path), 0, -1):
            if path[:end] in self.lines:
                return f"{self.label}, line {self.lines[path[:end]]}"
        return self.label


class Option(str):
    """An option as the place of an error, like a line of a file, for a value that was typed."""


@contextmanager
def error_context(where: str) -> Iterator[str]:
    """A context whose errors concern what was given at `where`: if that is an option, they are usage errors."""
    try:
        yield where
    except K2Error as error:
        if isinstance(where, Option):
            error.code = USAGE
        raise


@dataclass(frozen=True)
class Place:
    """A table in a file, for messages."""

    toml: Toml
    path: tuple[str | int, ...] = ()

    def __call__(self, key: str = "") -> str:
        return self.toml.where(*self.path, *([key] if key else []))

    def below(self, *path: str | int) -> Place:
        return Place(self.toml, (*self.path, *path))

    @property
    def title(self) -> str:
        """ " in [render]", " in [[prompt]]", or "" for the file itself."""
        name = ".".join(part for part in self.path if isinstance(part, str))
        if not name:
            return ""
        return f" in [{name}]" if isinstance(self.path[-1], str) else f" in [[{name}]]"


def read_table(cls: type[T], table: Any, place: Place, misplaced: Mapping[str, str] | None = None) -> T:
    """A dataclass from a TOML table: unknown keys, wrong types and numbers out of range are errors with a line."""
    known = {f.name: f for f in fields(cls) if f.metadata.get("key", True)}  # type: ignore[arg-type]
    check_keys(table, known, place, misplaced)
    hints = type_hints(cls)  # type: ignore[arg-type]  # a class is hashable
    for name, each in known.items():
        if each.default is MISSING and each.default_factory is MISSING and name not in table:
            raise K2Error(f'{place()}: "{name}" is missing{place.title}.')
    return cls(**{key: check_value(key, table[key], hints[key], known[key].metadata, place(key)) for key in table})


@cache
def type_hints(cls: type) -> dict[str, Any]:
    """A dataclass's types, cached: a file may hold thousands of one class."""
    return get_type_hints(cls)


def check_keys(table: Any, known: Iterable[str], place: Place, misplaced: Mapping[str, str] | None = None) -> None:
    """Refuse what is not a table, and a table with an unknown key. `misplaced` are hints for keys that belong
    elsewhere."""
    if not isinstance(table, dict):
        raise K2Error(
            f"{place()}: expected a table{place.title}.", hint="Write [name] on a line, and its keys below it."
        )
    for key in table:
        if key not in known:
            near = nearest(key, known)
            has_plural = f"{key}s" in known  # which is the nearest of all
            hint = near if has_plural else (misplaced or {}).get(key) or near
            raise K2Error(f'{place(key)}: unknown key "{display_safe(key)}"{place.title}.', hint=hint)


def check_value(key: str, value: Any, hint: Any, limits: Mapping[str, Any], where: str) -> Any:
    """The value as the field requires it: type, range and characters checked."""
    label = where if where == f"--{key.replace('_', '-')}" else f'{where}: "{key}"'
    types = [k for k in (get_args(hint) if isinstance(hint, UnionType) else (hint,)) if k is not type(None)]
    types = [getattr(k, "__origin__", k) for k in types]
    word, random_hint = limits.get("word"), ""
    if word and str in types:  # not in a record, where it is a number by then
        if value == word:
            return value
        types.remove(str)
        random_hint = f'Or "{word}", for a new one every time.'
    if isinstance(value, int) and not isinstance(value, bool) and float in types and int not in types:
        value = float(value)
    if (isinstance(value, bool) and bool not in types) or not isinstance(value, tuple(types)):
        list_hint = (
            f"Like {key} = [{describe_value(value)}]."
            if types == [list] and describe_value(value) == f'"{value}"'
            else ""
        )
        raise K2Error(
            f"{label} must be {' or '.join(TYPE_NAMES[k] for k in types)}, not {describe_value(value)}.",
            hint=list_hint or random_hint,
        )
    if isinstance(value, list) and any(not isinstance(item, str) for item in value):
        raise K2Error(f"{label} must be a list of strings.", hint=f'Like {key} = ["one", "two"].')
    if ("low" in limits and not (limits["low"] <= value <= limits["high"])) or (
        isinstance(value, float) and not math.isfinite(value)
    ):
        low, high = (f"{limits[end]:,}".replace("-", "−") for end in ("low", "high"))
        raise K2Error(f"{label} must be between {low} and {high}, not {value}.", hint=random_hint)
    value = limits["also"].get(value, value) if "also" in limits else value
    if value not in (choices := limits.get("choices", (value,))):
        raise K2Error(f"{label} cannot be {describe_value(value)}.", hint=nearest(str(value), map(str, choices)))
    if isinstance(value, str) and not re.fullmatch(limits.get("pattern", ".*"), value, re.DOTALL):
        raise K2Error(f"{label} cannot be {describe_value(value)}.", hint=f"Like {listed(limits['examples'])}.")
    clean = check_printable if limits.get("path") else check_line
    if isinstance(value, str):
        return clean(value, label)
    return [clean(item, label) for item in value] if isinstance(value, list) else value


def describe_value(value: Any) -> str:
    """A value in short, for a message."""
    if isinstance(value, dict | list):
        return TYPE_NAMES[type(value)]
    written = value.isoformat() if isinstance(value, date | time) else repr(value)
    toml_text = str(value).lower() if isinstance(value, bool) else written  # as TOML writes it
    text = display_safe(f'"{value}"' if isinstance(value, str) else toml_text)
    return text if len(text) <= 40 else f"{text[:37]}…"


def read_weights(table: Any, place: Place) -> dict[str, float]:
    """A table of NAME = weight, each −2 … 2."""
    if not isinstance(table, dict):
        name = place.title.removeprefix(" in ")
        raise K2Error(f"{place()}: expected a table{place.title}.", hint=f'Like {name} and below it "dusk = 0.6".')
    weights = {}
    for name, value in table.items():
        where, plain_name = place(name), check_line(name, place(name))
        if isinstance(value, dict):
            hint = f"Like {plain_name} = 0.6. {dotted_name_hint(name, value)}".strip()
            raise K2Error(f'{where}: "{plain_name}" must be a number, not a table.', hint=hint)
        weights[plain_name] = check_value(name, value, float, WEIGHT, where)
    return weights


def dotted_name_hint(name: str, value: Any) -> str:
    """A hint for a name whose dots TOML has read as tables; "" if it has not."""
    full_name = name
    while isinstance(value, dict) and value:
        part, value = next(iter(value.items()))
        full_name += f".{part}"
    return f'A name with a dot needs quotes: "{display_safe(full_name)}".' if full_name != name else ""
