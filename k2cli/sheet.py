"""Contact sheets: a run at a glance, with one labelled strip of pictures per prompt."""

from __future__ import annotations

import io
import math
import unicodedata
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from model.picture_file import SHEET_KEY

PAPER, INK, FAINT, EDGE = "#faf8f4", "#262422", "#6c665f", "#e4dfd7"
MARGIN, PICTURE_GAP, STRIP_GAP = 40, 12, 32  # px: around the sheet, between pictures of a strip, between strips
TITLE_SIZE, LABEL_SIZE, CAPTION_SIZE = 26, 16, 13  # px, type sizes
CELL_SIDES = range(192, 321)  # px, the longer side of a picture as shown
PER_ROW = 8  # pictures in a row of a strip; strips to be compared get one row each, whatever their length
PER_SHEET = 48  # pictures; longer runs get several sheets, so that memory does not grow with their length
PER_GRID = 120  # pictures, if the columns are given: a sweep is one sheet
MAX_CELLS = 1000  # on a sheet, blank ones included; at 320 pixels they are a third of a gigabyte
SYSTEM_FONTS = (
    *("DejaVuSans.ttf", "NotoSans-Regular.ttf", "LiberationSans-Regular.ttf", "Arial Unicode.ttf", "segoeui.ttf"),
    *("NotoSansCJK-Regular.ttc", "wqy-zenhei.ttc", "DroidSansFallbackFull.ttf"),  # Chinese, Japanese, Korean
    *("Hiragino Sans GB.ttc", "AppleSDGothicNeo.ttc", "msyh.ttc", "YuGothM.ttc", "malgun.ttf"),
)
NO_GLYPH = "\U0010ffff"  # for which every typeface shows its shape for missing characters
ASCII_FORMS = str.maketrans(
    {"–": "-", "—": "-", "−": "-", "×": "x", "ß": "ss", "ø": "o", "Ø": "O", "ł": "l", "Ł": "L", "œ": "oe", "æ": "ae"}
)

EXTRA_CHARS = str.maketrans("", "", "·…‘’“”")  # what the plain typeface has besides ASCII

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True)
class SheetEntry:
    """One picture on a sheet; neighbours with the same prompt and label share a strip."""

    path: Path
    label: str
    caption: str
    prompt: str = ""  # its name

    @property
    def strip(self) -> tuple[str, str]:
        return self.prompt, self.label


def contact_sheets(
    entries: Sequence[SheetEntry], title: str, subtitle: str, *, columns: int | None = None, centred: bool = False
) -> Iterator[bytes]:
    """PNGs of all entries in order, at most PER_SHEET pictures on each, or PER_GRID if `columns` is given."""
    parts = list(split_sheets(entries, columns))
    for number, part in enumerate(parts, 1):
        which = f"sheet {number} of {len(parts)} · " if len(parts) > 1 else ""
        buffer, info = io.BytesIO(), PngImagePlugin.PngInfo()
        info.add_text(SHEET_KEY, "pictures of a run")
        page = contact_sheet(part, title, which + subtitle, columns=columns, centred=centred)
        page.save(buffer, "PNG", pnginfo=info)
        yield buffer.getvalue()


def split_sheets(entries: Sequence[SheetEntry], columns: int | None) -> Iterator[Sequence[SheetEntry]]:
    """The entries of each sheet: fewer if one long strip would leave most of a large sheet blank."""
    limit, start = PER_GRID if columns else PER_SHEET, 0
    while start < len(entries):
        part = entries[start : start + limit]
        while len(part) > 1 and count_cells(part, columns) > MAX_CELLS:
            part = part[: len(part) // 2]
        start += len(part)
        yield part


def count_cells(entries: Sequence[SheetEntry], columns: int | None) -> int:
    """The number of cells of a sheet with these entries, blank ones included."""
    strips = [len(list(strip)) for _, strip in groupby(entries, key=lambda entry: entry.strip)]
    across = min(columns or 1, len(strips))
    return math.prod(strip_shape(max(strips), len(strips), columns)) * across * math.ceil(len(strips) / across)


def strip_shape(longest: int, strips: int, columns: int | None) -> tuple[int, int]:
    """How many pictures of a strip are side by side, and how many such rows the longest strip has."""
    rows = math.ceil(longest / PER_ROW) if columns is None or strips == 1 else 1
    return math.ceil(longest / rows), rows


def contact_sheet(
    entries: Sequence[SheetEntry], title: str, subtitle: str, *, columns: int | None = None, centred: bool = False
) -> Image.Image:
    """One sheet, its strips in `columns` columns, or in as many as look best: a landscape page, few empty places."""
    strips = [list(strip) for _, strip in groupby(entries, key=lambda entry: entry.strip)]
    with Image.open(entries[0].path) as first:
        scale = scale_to_cell(max(first.size))
    sizes = {entry: shown_size(entry.path, scale) for entry in entries}
    cell_width = max(max(width for width, _ in sizes.values()), CELL_SIDES[0])
    across, down = strip_shape(max(map(len, strips)), len(strips), columns)
    strip_width = across * cell_width + (across - 1) * PICTURE_GAP

    lines = 2 if across == 1 else 1  # a label over one picture has less room
    label_height = lines * (LABEL_SIZE + 5) + 8

    def rows_in(columns: int) -> list[tuple[list[list[SheetEntry]], int]]:
        """The strips side by side in each row, and the height of the tallest picture in them, with its caption."""
        rows = [strips[start : start + columns] for start in range(0, len(strips), columns)]
        return [(row, max(sizes[entry][1] for strip in row for entry in strip) + CAPTION_SIZE + 12) for row in rows]

    def strip_height(picture_height: int) -> int:
        return label_height + down * picture_height + (down - 1) * PICTURE_GAP

    def page_width(columns: int) -> int:
        return columns * strip_width + (columns - 1) * STRIP_GAP

    def head_height(columns: int) -> int:
        return TITLE_SIZE + len(wrap_facts(subtitle, page_width(columns))) * (CAPTION_SIZE + 5) + 31

    def sheet_size(columns: int) -> tuple[int, int]:
        heights = [strip_height(picture_height) for _, picture_height in rows_in(columns)]
        return (
            2 * MARGIN + page_width(columns),
            2 * MARGIN + head_height(columns) + sum(heights) + (len(heights) - 1) * STRIP_GAP,
        )

    def layout_cost(columns: int) -> float:
        """Its deviation from a landscape page, plus the share of places left empty at its end."""
        (width, height), places = sheet_size(columns), math.ceil(len(strips) / columns) * columns
        return abs(math.log(width / height / 1.4)) + 1.5 * (places - len(strips)) / places

    columns = min(columns or min(range(1, len(strips) + 1), key=layout_cost), len(strips))
    sheet, width = Image.new("RGB", sheet_size(columns), PAPER), page_width(columns)
    draw = ImageDraw.Draw(sheet)
    draw_line(draw, (MARGIN, MARGIN), title, TITLE_SIZE, INK, width, width)
    for number, line in enumerate(wrap_facts(subtitle, width)):
        draw_line(
            draw,
            (MARGIN, MARGIN + TITLE_SIZE + 12 + number * (CAPTION_SIZE + 5)),
            line,
            CAPTION_SIZE,
            FAINT,
            width,
            width,
        )

    top = MARGIN + head_height(columns)
    for row, picture_height in rows_in(columns):
        for column, strip in enumerate(row):
            indent = (across - min(len(strip), across)) * (cell_width + PICTURE_GAP) // 2 if centred else 0
            left = MARGIN + column * (strip_width + STRIP_GAP) + indent
            first_row = strip[:across]
            row_width = (len(first_row) - 1) * (cell_width + PICTURE_GAP) + sizes[first_row[-1]][0]
            draw_label(draw, (left, top), strip[0].label, row_width, strip_width - indent, lines)
            for index, entry in enumerate(strip):
                x = left + index % across * (cell_width + PICTURE_GAP)
                y = top + label_height + index // across * (picture_height + PICTURE_GAP)
                draw_picture(sheet, (x, y), entry, sizes[entry], cell_width)
        top += strip_height(picture_height) + STRIP_GAP
    return sheet


def draw_picture(sheet: Image.Image, at: tuple[int, int], entry: SheetEntry, size: tuple[int, int], width: int) -> None:
    """Draw a picture in its frame, with its caption below; a longer caption may extend to `width`."""
    (x, y), (shown_width, height), draw = at, size, ImageDraw.Draw(sheet)
    with Image.open(entry.path) as image:
        sheet.paste(image.convert("RGB").resize(size, Image.Resampling.LANCZOS), at)
    draw.rectangle((x - 1, y - 1, x + shown_width, y + height), outline=EDGE)
    draw_line(draw, (x, y + height + 7), entry.caption, CAPTION_SIZE, FAINT, shown_width, width)


def draw_line(
    draw: ImageDraw.ImageDraw, at: tuple[int, int], content: str, size: int, ink: str, item_width: int, width: int
) -> None:
    """Draw a line of text as wide as its own item, or wider up to `width`, where it is cut."""
    text, face = choose_font(content, size)
    line = ellipsize(text, face, width)
    room = max(item_width, face.getlength(line))
    draw.text((text_x(line, face, at[0], room, text), at[1]), line, ink, face)


def wrap_facts(facts: str, width: float) -> list[str]:
    """A sheet's facts in as many lines as they need, without breaking a fact."""
    lines = [""]
    for fact in facts.split(" · "):
        longer = " · ".join(filter(None, [lines[-1], fact]))
        text, face = choose_font(longer, CAPTION_SIZE)
        if lines[-1] and face.getlength(text) > width:
            lines.append(fact)
        else:
            lines[-1] = longer
    return lines


def draw_label(
    draw: ImageDraw.ImageDraw, at: tuple[int, int], label: str, row_width: int, width: int, lines: int
) -> None:
    """Draw a strip's label at the bottom of its lines: as wide as its own pictures, or wider up to the longest strip's
    width."""
    text, face = choose_font(label, LABEL_SIZE)
    found = wrap_text(text, face, width, lines)
    room = max(row_width, *(face.getlength(line) for line in found))
    for number, line in enumerate(found):
        draw.text((text_x(line, face, at[0], room, text), at[1] + number * (LABEL_SIZE + 5)), line, INK, face)


def text_x(line: str, face: Font, left: float, width: float, text: str) -> float:
    """The x at which to draw a line of text: aligned right if the text reads from right to left, which its first letter
    with a direction decides (Unicode's bidirectional algorithm, P2)."""
    directions = (unicodedata.bidirectional(sign) for sign in text)
    strong = next((way for way in directions if way in ("L", "R", "AL")), "L")
    return left if strong == "L" else left + width - face.getlength(line)


def scale_to_cell(side: int) -> float:
    """The scale for a picture: a whole factor for small ones, the largest cell for large ones."""
    return max(1, CELL_SIDES[-1] // side) if side <= CELL_SIDES[-1] else CELL_SIDES[-1] / side


def shown_size(path: Path, scale: float) -> tuple[int, int]:
    with Image.open(path) as image:
        width, height = image.size
    limit = min(scale, CELL_SIDES[-1] / max(width, height))
    return max(1, round(width * limit)), max(1, round(height * limit))


@cache
def bundled_font(size: int) -> Font:
    """The typeface that comes with Pillow, the same on every machine; it has little but ASCII."""
    return ImageFont.load_default(size)


@cache
def system_font(name: str, size: int) -> Font | None:
    """A system typeface for other scripts, if installed."""
    with suppress(OSError):
        return ImageFont.truetype(name, size)
    return None


def count_glyphs(face: Font, text: str) -> int:
    """How many different characters of a text a typeface has a shape for."""
    no_glyph = bytes(face.getmask(NO_GLYPH))
    return sum(bytes(face.getmask(sign)) != no_glyph for sign in set(text))


def choose_font(text: str, size: int) -> tuple[str, Font]:
    """The text and the typeface that shows most of it; without one, the text is reduced to ASCII."""
    if text.translate(EXTRA_CHARS).isascii():
        return text, bundled_font(size)
    if faces := [face for name in SYSTEM_FONTS if (face := system_font(name, size))]:
        return text, max(faces, key=lambda face: count_glyphs(face, text))
    folded = "".join(
        c for c in unicodedata.normalize("NFKD", text.translate(ASCII_FORMS)) if not unicodedata.combining(c)
    )
    return folded.encode("ascii", "replace").decode(), bundled_font(size)


def ellipsize(text: str, face: Font, width: float, *, tail: float = 0) -> str:
    """The text, cut with an ellipsis if it is wider than `width`: at its end, or leaving the share `tail` of what
    remains after the cut."""
    if face.getlength(text) <= width:
        return text

    def cut(count: int) -> str:
        end = int(count * tail)
        return text[: count - end].rstrip(" ,.;") + "…" + text[len(text) - end :].lstrip()

    return cut(bisect_right(range(1, len(text) + 1), width, key=lambda count: face.getlength(cut(count))))


def wrap_text(text: str, face: Font, width: float, lines: int) -> list[str]:
    """The text in at most so many lines, aligned at the bottom; the last one is cut if necessary, but keeps its end, in
    which readings of one prompt differ."""
    words, found = text.split(), [""]
    for index, word in enumerate(words):
        longer = f"{found[-1]} {word}".strip()
        if face.getlength(longer) <= width or not found[-1]:
            found[-1] = longer
        elif len(found) == lines:
            found[-1] = " ".join([found[-1], *words[index:]])
            break
        else:
            found.append(word)
    return [""] * (lines - len(found)) + [ellipsize(line, face, width, tail=0.4) for line in found]
