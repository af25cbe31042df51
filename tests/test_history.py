"""What is in outputs, read back: quickly, exactly, and without trusting it."""

from __future__ import annotations

import errno
import shutil
import unicodedata
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from conftest import many_pictures

from k2cli import gallery, history
from k2cli.history import MadePicture, Selection, word_starts
from model.errors import K2Error


def test_pictures_are_in_creation_order(tmp_path):
    many_pictures(tmp_path / "outputs", 24, per_run=12)

    made = list(history.read(tmp_path / "outputs"))

    assert [each.path.name for each in made[:12]] == [f"fox-{i}.png" for i in range(12)]
    assert [each.run for each in made] == ["0001-fox"] * 12 + ["0002-owl"] * 12


@pytest.mark.parametrize(
    ("chosen", "count"),
    [
        (Selection(), 24),
        (Selection(run="2"), 12),
        (Selection(run="0002"), 12),
        (Selection(run="fox"), 12),
        (Selection(run="2" * 5000), 0),
        (Selection(prompt="FOX red"), 12),
        (Selection(prompt="fox green"), 0),
        (Selection(prompt="film grain"), 24),
        (Selection(styles=["dusk"]), 12),
        (Selection(styles=["dus"]), 0),
        (Selection(since=datetime(2026, 1, 2, tzinfo=UTC)), 12),
    ],
)
def test_filters(tmp_path, chosen, count):
    many_pictures(tmp_path, 24, per_run=12)

    assert len(list(history.read(tmp_path, chosen))) == count


def test_prompts_are_found_by_name(tmp_path):
    many_pictures(tmp_path, 1, text="a tree")

    assert len(list(history.read(tmp_path, Selection(prompt="fox")))) == 1


@pytest.mark.parametrize(
    ("word", "found"),
    [
        ("owl", True),
        ("OWL", True),
        ("ow", True),
        ("wl", False),
        ("bow", False),
        ("雪", True),
        ("cole", False),
        ("кот", True),
        ("от", False),
    ],
)
def test_prompts_are_found_by_word_prefixes(word, found, tmp_path):
    """A bowl is not an owl. Languages written without spaces are searched for substrings."""
    many_pictures(tmp_path, 1, text="owls, 白雪, école, рыжий кот")

    assert len(list(history.read(tmp_path, Selection(prompt=word)))) == found


@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize(("word", "found"), [("école", True), ("ÉCOLE", True), ("cole", False), ("strasse", True)])
def test_composed_and_decomposed_accents_match(word, found, form, tmp_path):
    """Systems and keyboards write é as one character or as two: prompts, runs and styles are found by either."""
    text, word = (unicodedata.normalize(form, each) for each in ("une école, Straße", word))
    other = unicodedata.normalize({"NFC": "NFD", "NFD": "NFC"}[form], word)
    many_pictures(tmp_path, 1, text=text)
    (tmp_path / "0001-fox").rename(tmp_path / f"0001-{text}")

    for each in (word, other):
        assert len(list(history.read(tmp_path, Selection(prompt=each)))) == found
    assert len(list(history.read(tmp_path, Selection(run=other)))) == (found or word == "cole")
    made = MadePicture(tmp_path / "x.png", {"style": [{"name": "école", "strength": 1.0}]})
    assert made in Selection(styles=[unicodedata.normalize(form, "école")])


@pytest.mark.parametrize(
    ("word", "found"),
    [("замок", True), ("за\u0301мок", True), ("ЗАМО\u0301К", True), ("мок", False), ("istanbul", True), ("кои", False)],
)
def test_stress_marks_are_ignored_in_searches(word, found, tmp_path):
    """Dictionaries mark the stress of Russian words with them; й is a letter of its own."""
    many_pictures(tmp_path, 1, text="за\u0301мок у озера, кои\u0306, İstanbul")
    (tmp_path / "0001-fox").rename(tmp_path / "0001-за\u0301мок-İstanbul")

    assert len(list(history.read(tmp_path, Selection(prompt=word)))) == found
    assert len(list(history.read(tmp_path, Selection(run=word)))) == (found or word == "мок")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("а\u0301fox", False),
        ("г\u0483fox", False),
        ("红色fox睡觉", True),
        ("かわいいfoxの絵", True),
        ("日本fox", True),
        ("여우fox", True),
        ("redfox", False),
        ("рыжийfox", False),
        ("đỏấfox", False),
        ("7fox", False),
        ("red_fox", True),
    ],
)
def test_words_are_found_in_scripts_without_spaces(text, found):
    assert word_starts("fox", text) == found


def test_renamed_run_is_still_read(tmp_path):
    many_pictures(tmp_path, 3, per_run=1)
    (tmp_path / "0002-owl").rename(tmp_path / "for the client")
    (tmp_path / ".trash").mkdir()

    assert [run.name for run in history.run_folders(tmp_path)] == ["for the client", "0001-fox", "0003-teapot"]
    assert [made.path.name for made in history.read(tmp_path, history.Selection(run="client"))] == ["owl-1.png"]
    assert [made.path.name for made in history.read(tmp_path, history.Selection(run="3"))] == ["teapot-2.png"]


def test_damaged_and_foreign_files_are_skipped(tmp_path):
    many_pictures(tmp_path, 3, per_run=3)
    run = tmp_path / "0001-fox"
    (run / "fox-0.toml").write_bytes(b"\xff\x00")
    (run / "fox-1.toml").write_text("schema = 1\n")
    (run / "alone.png").write_bytes(b"no record")
    (tmp_path / "secret.png").write_bytes(b"elsewhere")
    (tmp_path / "secret.toml").write_text("[prompt]\ntext = 'mine'\n")
    (run / "link.png").symlink_to(tmp_path / "secret.png")
    (run / "link.toml").symlink_to(tmp_path / "secret.toml")
    (tmp_path / "0009-linked").symlink_to(run)
    unread: list[Path] = []

    made = list(history.read(tmp_path, on_skipped=unread.append))

    assert [each.path.name for each in made] == ["fox-2.png"]
    assert sorted(path.name for path in unread) == ["alone.png", "fox-0.png", "fox-1.png"]


def test_run_may_vanish_while_being_read(tmp_path, monkeypatch):
    """A run that has just started is given its name, and one that produced nothing is removed."""
    many_pictures(tmp_path, 2, per_run=1)
    runs = history.run_folders(tmp_path)
    (tmp_path / "0001-fox").rename(tmp_path / "0001-vixen")
    for run in (tmp_path / "0001-fox", tmp_path / "0002-owl" / "owl-1.png"):
        assert history.read_run(run, on_skipped=pytest.fail) == []
    monkeypatch.setattr(history, "run_folders", lambda outputs: runs)
    assert [made.run for made in history.read(tmp_path)] == ["0002-owl"]

    def load(path: Path) -> None:
        shutil.rmtree(path.parent)

    monkeypatch.setattr(history, "load_record", load)
    assert list(history.read(tmp_path, on_skipped=pytest.fail)) == []


@pytest.mark.parametrize("number", ["nan", "-inf", "1e999"])
def test_record_with_nan_or_inf_is_skipped(tmp_path, number):
    """JSON, which the gallery and the log are made of, has no such numbers."""
    many_pictures(tmp_path, 80)
    odd = tmp_path / "0002-owl" / "owl-40.toml"
    odd.write_text(odd.read_text().replace("strength = 0.6", f"strength = {number}"))
    unread: list[Path] = []

    assert len(list(history.read(tmp_path, on_skipped=unread.append))) == 79
    assert unread == [odd.with_suffix(".png")]


def test_record_of_any_shape_can_be_inspected(tmp_path):
    run = tmp_path / "0001-x"
    run.mkdir()
    (run / "x.png").write_bytes(b"")
    (run / "x.toml").write_text(
        'created = "then"\nseconds = "long"\nstyle = [1, {name = 2, strength = "no"}]\nmodel = 3\n'
        '[prompt]\ntext = ["\\u001b[2J"]\n[settings]\nseed = "\\u202e"\nwidth = [1]\nmu = {}\n'
    )

    (made,) = history.read(tmp_path)

    assert made.created is None and made.styles == {}
    assert made.text("settings.seed") == "?" and "\x1b" not in made.text("prompt.text")


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("3d", datetime(2026, 11, 21, 12, tzinfo=UTC)),
        ("90m", datetime(2026, 11, 24, 10, 30, tzinfo=UTC)),
        ("2026-11-01T10:00+00:00", datetime(2026, 11, 1, 10, tzinfo=UTC)),
        ("2026-11-01", datetime(2026, 11, 1).astimezone()),
        ("99999999999w", history.EARLIEST),
        (f"{'9' * 5000}d", history.EARLIEST),
    ],
)
def test_since(text, moment):
    assert history.parse_since(text, datetime(2026, 11, 24, 12, tzinfo=UTC)) == moment


def test_since_accepts_ages_and_dates():
    now = datetime.now(UTC)

    assert history.parse_since("yesterday", now) <= history.parse_since("today", now) - timedelta(hours=22)
    with pytest.raises(K2Error, match="is not a time"):
        history.parse_since("soon", now)


def test_unreadable_run_does_not_hide_others(tmp_path, monkeypatch):
    for name in ("0001-fox", "0002-owl"):
        (tmp_path / name).mkdir()
    scan, skipped = history.os.scandir, []

    def scandir(folder):
        if Path(folder).name == "0001-fox":
            raise PermissionError(13, "Permission denied", str(folder))
        return scan(folder)

    monkeypatch.setattr(history.os, "scandir", scandir)
    assert list(history.read(tmp_path, on_skipped=skipped.append)) == []
    assert [path.name for path in skipped] == ["0001-fox"]


def test_time_outside_the_local_range_is_shown_in_utc():
    """On Windows local time begins in 1970, and pictures may carry any date."""

    class Early(datetime):
        def astimezone(self, zone=None):
            if zone is None:
                raise OSError(errno.EINVAL, "Invalid argument")
            return super().astimezone(zone)

    made = MadePicture(Path("fox-7.png"), {"created": Early(1969, 7, 20, 20, 17, tzinfo=UTC)})

    assert gallery.describe_run(made, ()) == "20 Jul 1969, 20:17"
    assert dict(gallery.picture_facts(made))["created"] == "1969-07-20 20:17:00"
