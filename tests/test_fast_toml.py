"""k2's own TOML reader and writer agree with tomllib."""

from __future__ import annotations

import tomllib
from datetime import UTC

import pytest
from hypothesis import given
from hypothesis import strategies as st

from k2cli import fast_toml

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
def test_parse_agrees_with_tomllib_on_dumped_tables(table):
    text = fast_toml.dump(table).decode()

    assert fast_toml.parse(text) == tomllib.loads(text)


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
def test_parse_agrees_with_tomllib_on_handwritten_toml(text):
    """Valid or not, both readers give the same outcome."""

    def outcome(read):
        try:
            return read(text)
        except ValueError:
            return "no TOML"

    assert outcome(fast_toml.parse) == outcome(tomllib.loads)


def test_render_records_take_the_fast_path(moody, k2):
    """Otherwise they would be read only as fast as by tomllib, not as fast as promised."""
    k2("render", "--batch", "2")
    paths = list(moody.glob("outputs/*/*-[78].toml"))
    assert len(paths) == 4
    for path in paths:
        assert fast_toml.parse_lines(path.read_text()) == tomllib.loads(path.read_text())


def test_dump_leaves_out_only_none():
    assert (
        fast_toml.dump({"a": 0, "b": None, "c": {"d": [1, 2], "e": None, "f": ""}}).decode()
        == 'a = 0\n\n[c]\nd = [\n    1,\n    2,\n]\nf = ""\n'
    )
