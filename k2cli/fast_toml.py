"""TOML in the layout that k2 writes, which is read back many times faster than arbitrary TOML.

A project has thousands of records, and a plan may be megabytes long.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any

from k2cli.toml_tables import MAX_FILE_BYTES, loads

MAX_LINES, MAX_DISTINCT_LINES = 1_000_000, 200_000  # of a long text: lines, distinct lines
MAX_ESCAPES = 1_000_000  # in its strings
HEADER = re.compile(r"(\[\[?)([\w-]+(?:\.[\w-]+)*)\]\]?\s*$")
KEY = re.compile(r"(?:[\w-]+|\"[^\"\\]*\") = ")
SIMPLE_PAIR = re.compile(  # a string without escapes, an integer, a float, a datetime
    r"""([A-Za-z0-9_-]+) = (?:"([^"\\\x00-\x1f\x7f]*+)"|(-?(?:0|[1-9][0-9]{0,17}))|(-?(?:0|[1-9][0-9]{0,17})\.[0-9]+)"""
    r"""|([0-9]{4}-[0-9]{2}-[0-9]{2} [0-9]{2}:[0-9]{2}:[0-9]{2}(?:\.[0-9]{6})?[+-][0-9]{2}:[0-9]{2}))"""
)
VALUE_PARSERS: tuple[Callable[[str], Any], ...] = (str, int, float, datetime.fromisoformat)  # of each group in turn
SCALAR = r"""(?:"(?:[^"\\]|\\.)*+"|[-+:. \w]{1,40})"""
PAIR = KEY.pattern + SCALAR
PLAIN_LINE = re.compile(  # as `dump` writes it; lists hold scalars or short tables
    rf"|{HEADER.pattern}|{PAIR}|{KEY.pattern}\[\]?|    {SCALAR},|    {{ {PAIR}(?:, {PAIR}){{0,9}} }},|\]"
)


def dump(table: Mapping[str, Any]) -> bytes:
    """TOML of plain values; None is left out, as TOML has no null."""
    import tomli_w

    def clean(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(key): clean(each) for key, each in value.items() if each is not None}
        return [clean(each) for each in value] if isinstance(value, list | tuple) else value

    return tomli_w.dumps(clean(table)).encode()


def parse(text: str) -> dict[str, Any]:
    """The same as tomllib, several times faster if the text is as `dump` writes it.

    Most lines of a project's records are alike, so every `key = value` is parsed once and cached. Any other layout
    goes to tomllib in full. Raises ValueError, and RecursionError as `loads` does.
    """
    try:
        return parse_lines(text)
    except (ValueError, TypeError, KeyError, AttributeError):
        return loads(text)


def parse_lines(text: str) -> dict[str, Any]:
    """Parse text laid out as `dump` writes it; ValueError, TypeError, KeyError or AttributeError mean it is not."""
    root: dict[str, Any] = {}
    table = root
    lines = iter(text.split("\n"))
    for line in lines:
        if not line:
            continue
        if line[0] == "[":
            header = HEADER.match(line)
            if not header:
                raise ValueError("not a line that dump writes")
            *path, name = header[2].split(".")
            table = root
            for part in path:
                found = table[part]
                table = found[-1] if isinstance(found, list) else found
            if header[1] == "[[":
                table.setdefault(name, []).append({})
                table = table[name][-1]
            else:
                if name in table:
                    raise ValueError("duplicate table")
                table[name] = table = {}
            continue
        if not KEY.match(line):
            raise ValueError("not a line that dump writes")
        if line.endswith("= ["):
            rest = []
            for more in lines:
                rest.append(more)
                if more == "]":
                    break
            line = "\n".join([line, *rest])
        key, value = parse_line(line)
        if key in table:
            raise ValueError("duplicate key")
        table[key] = list(value) if isinstance(value, list) else value
    return root


@lru_cache(maxsize=1 << 16)
def parse_line(line: str) -> tuple[str, Any]:
    if simple := SIMPLE_PAIR.fullmatch(line):  # seeds, hashes and datetimes are new in every record
        group = simple.lastindex or 0
        return simple[1], VALUE_PARSERS[group - 2](simple[group])
    ((key, value),) = loads(line).items()
    return key, value


def parse_long(text: str) -> dict[str, Any]:
    """Parse text that, if longer than anybody writes by hand, must be laid out as `dump` writes it: the most intricate
    TOML is read many times slower. Raises ValueError, and RecursionError as `loads` does."""
    if len(text) <= MAX_FILE_BYTES:
        return loads(text)
    lines = text.split("\n")
    distinct = set(lines)
    fits = len(lines) <= MAX_LINES and len(distinct) <= MAX_DISTINCT_LINES and text.count("\\") <= MAX_ESCAPES
    if not fits or not all(map(PLAIN_LINE.fullmatch, distinct)):
        raise ValueError("it is long, and not as k2 writes it")
    try:
        return parse_lines(text)
    except (TypeError, KeyError, AttributeError):
        raise ValueError("it is long, and not as k2 writes it") from None
