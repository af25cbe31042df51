"""TOML as k2 writes it, read back as tomllib reads it."""

from __future__ import annotations

import tomllib
from datetime import UTC

import pytest
from hypothesis import given
from hypothesis import strategies as st

from k2cli import dialect

values = st.one_of(
    st.text(st.characters(codec="utf-8")),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False),
    st.booleans(),
    st.datetimes(timezones=st.just(UTC)),
    st.lists(st.text(st.characters(codec="utf-8"))),
)
keys = st.from_regex(r"[A-Za-z0-9_-]{1,8}", fullmatch=True) | st.text(st.characters(codec="utf-8"), max_size=5)
flat = st.dictionaries(keys, values, max_size=4)
tables = st.dictionaries(
    keys, values | flat | st.lists(flat, max_size=3) | st.dictionaries(keys, flat | st.lists(flat)), max_size=5
)


@given(tables)
def test_what_dump_writes_is_read_as_tomllib_reads_it(table):
    text = dialect.dump(table).decode()

    assert dialect.parse(text) == tomllib.loads(text)


@pytest.mark.parametrize(
    "text",
    [
        "a = 1\na = 2\n",
        "[a]\nb = 1\n[a]\nc = 2\n",
        'a = """\nb = 1\n"""\n',
        "a.b = 1\na.c = 2\n",
        "  a = 1 # two\n[ b ]\nc = 2\n",
        "a = [\n  1, # ]\n  2\n]\n",
        "[[a]]\nb = 1\n[a.c]\nd = 1\n[[a]]\n[a.c]\nd = 2\n",
        "a = 1\n[a.b]\nc = 1\n",
        "[a\n",
        "a = 1\r\nb = 2\r\n",
    ],
)
def test_what_hands_write_is_read_as_tomllib_reads_it(text):
    """Valid or not: both readers say the same."""

    def outcome(read):
        try:
            return read(text)
        except ValueError:
            return "no TOML"

    assert outcome(dialect.parse) == outcome(tomllib.loads)


def test_records_of_a_render_take_the_quick_way(moody, k2):
    """Else the speed that is promised would be tomllib's."""
    k2("render", "--batch", "2")
    paths = list(moody.glob("outputs/*/*-[78].toml"))
    assert len(paths) == 4
    for path in paths:
        assert dialect.parse_lines(path.read_text()) == tomllib.loads(path.read_text())


def test_nothing_is_left_out_of_toml_but_none():
    assert (
        dialect.dump({"a": 0, "b": None, "c": {"d": [1, 2], "e": None, "f": ""}}).decode()
        == 'a = 0\n\n[c]\nd = [\n    1,\n    2,\n]\nf = ""\n'
    )
