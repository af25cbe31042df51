"""Contact sheets show everything, and nothing overlaps."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image, ImageChops, ImageColor

from k2cli import sheet
from k2cli.sheet import SheetEntry, bundled_font, choose_font, contact_sheet, contact_sheets, ellipsize, wrap_text


def entries(folder: Path, prompts: int, batch: int, size: tuple[int, int] = (64, 64)) -> list[SheetEntry]:
    made = []
    for prompt in range(prompts):
        for seed in range(batch):
            path = folder / f"{prompt}-{seed}.png"
            Image.new("RGB", size, (200, 10 + prompt, 10 + seed)).save(path)
            made.append(SheetEntry(path, f"prompt {prompt}", f"seed {seed}"))
    return made


@pytest.mark.parametrize(("prompts", "batch"), [(1, 1), (8, 1), (3, 4), (1, 9), (1, 17)])
@pytest.mark.parametrize("size", [(64, 64), (400, 160)])
def test_every_picture_is_shown_once_and_whole(tmp_path, prompts, batch, size):
    made = entries(tmp_path, prompts, batch, size)

    page = contact_sheet(made, "moody", "run 0001")

    counts = {colour: count for count, colour in page.getcolors(1 << 24) if colour[0] == 200 and colour[1] < 60}
    assert len(counts) == prompts * batch
    assert len(set(counts.values())) == 1  # all in one size, none overlapped


@pytest.mark.parametrize(("columns", "heights"), [(1, [64, 320]), (2, [320])])
def test_captions_are_below_their_own_picture(tmp_path, columns, heights):
    """However tall others are; and a row of strips is as high as its own pictures."""
    made = []
    for colour, size in (("red", (320, 64)), ("blue", (320, 320))):
        made.append(SheetEntry(tmp_path / f"{colour}.png", "", "caption", prompt=colour))
        Image.new("RGB", size, colour).save(made[-1].path)

    page = contact_sheet(made, "", "", columns=columns)

    for colour in ("red", "blue"):
        apart = ImageChops.difference(page, Image.new("RGB", page.size, colour)).convert("L")
        left, _, right, bottom = apart.point(lambda level: 255 * (level == 0)).getbbox()
        assert len(page.crop((left, bottom + 1, right, bottom + 7 + sheet.CAPTION_SIZE)).getcolors()) > 1
    rows = [2 * (sheet.LABEL_SIZE + 5) + 8 + height + sheet.CAPTION_SIZE + 12 for height in heights]
    head = 2 * sheet.MARGIN + sheet.TITLE_SIZE + sheet.CAPTION_SIZE + 36
    assert page.height == head + sum(rows) + sheet.STRIP_GAP * (len(rows) - 1)


@pytest.mark.parametrize(
    ("prompts", "batch", "columns", "across"),
    [(1, 8, None, 8), (1, 14, None, 7), (1, 48, 1, 8), (3, 14, 1, 14)],
)
def test_a_long_strip_is_broken_into_rows(tmp_path, prompts, batch, columns, across):
    """But not where strips are stacked for comparison."""
    page = contact_sheet(entries(tmp_path, prompts, batch), "moody", "run 0001", columns=columns)

    assert page.width == 2 * sheet.MARGIN + across * 320 + (across - 1) * sheet.PICTURE_GAP


@pytest.mark.parametrize(
    ("prompts", "columns"), [(2, 2), (3, 3), (4, 4), (5, 3), (6, 3), (8, 4), (9, 5), (10, 5), (12, 4)]
)
def test_few_places_stay_empty(tmp_path, prompts, columns):
    """Four pictures make one row, not three with one below; a page is landscape all the same."""
    page = contact_sheet(entries(tmp_path, prompts, 1, (256, 256)), "moody", "run 0001")
    assert page.width == 2 * sheet.MARGIN + columns * 256 + (columns - 1) * sheet.STRIP_GAP


@pytest.mark.parametrize("ink", [sheet.INK, sheet.FAINT])
def test_text_has_enough_contrast(ink):
    """For people with low vision, too: WCAG 2.2 asks for 4.5 to 1 in small type (1.4.3)."""

    def luminance(colour: str) -> float:
        parts = (part / 255 for part in ImageColor.getrgb(colour))
        red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    assert (luminance(sheet.PAPER) + 0.05) / (luminance(ink) + 0.05) >= 4.5


def test_long_runs_take_several_sheets(tmp_path, monkeypatch):
    monkeypatch.setattr(sheet, "PER_SHEET", 4)

    pages = list(contact_sheets(entries(tmp_path, 3, 2), "moody", "run 0001"))

    assert len(pages) == 2 and all(Image.open(io.BytesIO(page)).format == "PNG" for page in pages)


@pytest.mark.parametrize(("batch", "told"), [(2, ["run 1"]), (3, ["sheet 1 of 2 · run 1", "sheet 2 of 2 · run 1"])])
def test_sheets_are_numbered_if_there_are_several(tmp_path, monkeypatch, batch, told):
    subtitles = []
    draw = sheet.contact_sheet
    monkeypatch.setattr(sheet, "PER_SHEET", 2)
    monkeypatch.setattr(
        sheet, "contact_sheet", lambda part, title, *more, **form: subtitles.extend(more) or draw(part, title, *more)
    )

    assert len(list(contact_sheets(entries(tmp_path, 1, batch), "moody", "run 1"))) == len(told)
    assert subtitles == told


def test_narrow_sheets_show_all_facts(tmp_path, monkeypatch):
    """On as many lines as they take, and no fact is broken."""
    said = []
    monkeypatch.setattr(sheet.ImageDraw.ImageDraw, "text", lambda draw, at, text, ink, face: said.append((at[1], text)))
    facts = ["run 0001", "mini turbo", "8 steps", "init image leaf.png", "mask 112x96+64+80", "cohesion 0.8", "seed 7"]

    narrow = contact_sheet(entries(tmp_path, 1, 1), "moody", " · ".join(facts))
    lines = [(top, text) for top, text in said[1:-2] if text]  # between the title, and the label and caption
    wide = contact_sheet(entries(tmp_path, 1, 1), "moody", facts[0])

    assert " · ".join(text for _, text in lines) == " · ".join(facts) and len(lines) > 1
    assert narrow.height - wide.height == lines[-1][0] - lines[0][0]


def test_text_never_overflows(tmp_path):
    face = bundled_font(16)
    long = "a very long prompt about a lighthouse that goes on, and on, and on"

    assert face.getlength(ellipsize(long, face, 150)) <= 150
    lines = wrap_text(long, face, 150, 2)
    assert lines == ["a very long prompt", "about a ligh…and on"] and all(face.getlength(line) <= 150 for line in lines)
    assert wrap_text("short", face, 150, 2) == ["", "short"]


@pytest.mark.parametrize(("size", "shown"), [((64, 64), 320), ((32, 64), 160)])
@pytest.mark.parametrize(
    ("said", "right"), [("שועל", True), ("3 ثعلب", True), ("שועל" * 8, True), ("fox שועל", False), ("3", False)]
)
def test_right_to_left_text_begins_at_the_right(tmp_path, monkeypatch, said, right, size, shown):
    """Above and below its own pictures, even if others are wider or more; if longer, from where they begin; the title
    on the whole page."""
    places = []

    def note(draw, at, text, ink, face):
        if text == said:
            places.append((at[0], at[0] + face.getlength(text)))

    monkeypatch.setattr(sheet, "choose_font", lambda text, size: (text, bundled_font(size)))
    monkeypatch.setattr(sheet.ImageDraw.ImageDraw, "text", note)
    made = entries(tmp_path, 2, 3)[:5]
    made[3:] = [replace(entry, label=said) for entry in made[3:]]
    made[4] = replace(made[4], caption=said)
    for entry in made[3:]:
        Image.new("RGB", size).save(entry.path)

    page = contact_sheet(made, said, "", columns=1)

    second = sheet.MARGIN + 320 + sheet.PICTURE_GAP
    rooms = [
        (sheet.MARGIN, page.width - sheet.MARGIN),
        (sheet.MARGIN, second + shown),
        (second, second + shown),
    ]
    for (left, end), (first, last) in zip(places, rooms, strict=True):
        assert end == pytest.approx(max(last, first + end - left)) if right else left == first


def test_long_labels_of_centred_strips_stay_on_the_sheet(tmp_path):
    first, *more = (replace(entry, label="a teapot " * 20) for entry in entries(tmp_path, 1, 4))
    page = contact_sheet([first, *(replace(each, prompt="wider") for each in more)], "", "", columns=1, centred=True)

    margin = page.crop((page.width - sheet.MARGIN + 1, 0, page.width, page.height))
    assert margin.getcolors() == [(margin.width * margin.height, ImageColor.getrgb(sheet.PAPER))]


def test_text_is_respelled_without_a_wider_typeface(monkeypatch):
    monkeypatch.setattr(sheet, "SYSTEM_FONTS", ())

    assert choose_font("größe – für œuvre", 16)[0] == "grosse - fur oeuvre"


def test_text_is_set_in_the_typeface_that_covers_most_of_it(monkeypatch):
    """If several cover as much, in the first."""

    class Knows(str):
        def getmask(self, sign: str) -> bytes:
            return sign.encode() if sign in self else b"box"

    faces = {"first": Knows("aü –"), "second": Knows("a 日本"), "third": Knows("a 日本")}
    monkeypatch.setattr(sheet, "SYSTEM_FONTS", ("missing", *faces))
    monkeypatch.setattr(sheet, "system_font", lambda name, size: faces.get(name))

    assert choose_font("aü – a", 16)[1] is faces["first"]
    assert choose_font("日本 🦊", 16) == ("日本 🦊", faces["second"])
    assert choose_font("🦊", 16)[1] is faces["first"]
