"""A picture in the terminal: by kitty's or iTerm2's protocol, as sixels, or as coloured half-blocks. Never in a pipe.

Protocols: kitty graphics protocol; iTerm2 inline images (OSC 1337); DEC STD 070 for sixels; device attributes (DA1),
which include a 4 if the terminal draws sixels.
"""

from __future__ import annotations

import base64
import io
import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import groupby
from pathlib import Path

from PIL import Image

from model import picture_file

MODES = ("kitty", "iterm2", "sixel", "blocks", "off")
MAX_COLUMNS, MAX_LINES = 40, 20  # cells, at most, of a preview
DEFAULT_CELL = (8, 16)  # pixels of a cell, if the terminal does not say
WINDOWS_TERMINAL = "WT_SESSION"  # set by Windows Terminal, which sets no TERM and has true colour
ANSWER_TIMEOUT = 0.2  # seconds to wait for a terminal's answer


def preview(paths: Sequence[Path]) -> None:
    """Print pictures side by side if standard output is a terminal that can show them; unreadable ones are skipped."""
    if not sys.stdout.isatty():
        return
    mode = choose_mode(os.environ, draws_sixels)
    if mode == "off":
        return
    images = []
    for path in paths:
        with suppress(Exception), picture_file.open_picture(path) as image:  # Pillow raises anything over a broken file
            if image.width * image.height <= picture_file.MAX_PIXELS:
                images.append(image.convert("RGB"))
    if images:
        sys.stdout.write(draw(in_row(images), mode, os.environ, len(images)) + "\n")
        sys.stdout.flush()


def choose_mode(environ: Mapping[str, str], ask: Callable[[], bool]) -> str:
    """The best way that this terminal supports. K2_PREVIEW decides if it is one of WAYS; NO_COLOR turns it off."""
    if (forced := environ.get("K2_PREVIEW", "")) in MODES:
        return forced
    term, program = environ.get("TERM", ""), environ.get("TERM_PROGRAM", "")
    if environ.get("NO_COLOR") or term == "dumb" or not (term or WINDOWS_TERMINAL in environ):
        return "off"
    if "TMUX" in environ or term.startswith(("tmux", "screen")):
        return "blocks"  # the outer terminal is unknown, and may change
    if "KITTY_WINDOW_ID" in environ or "kitty" in term or "ghostty" in term or program == "ghostty":
        return "kitty"
    if program in ("iTerm.app", "WezTerm") or environ.get("LC_TERMINAL") == "iTerm2":
        return "iterm2"
    return "sixel" if ask() else "blocks"


def draws_sixels() -> bool:
    """Ask the terminal for its attributes (DA1), and wait a moment for the answer."""
    try:
        import select
        import termios
        import tty
    except ImportError:  # not on Windows
        return False
    if not sys.stdin.isatty():
        return False
    handle, answer = sys.stdin.fileno(), b""
    try:
        settings = termios.tcgetattr(handle)
    except termios.error:
        return False
    try:
        tty.setcbreak(handle, termios.TCSANOW)
        os.write(sys.stdout.fileno(), b"\x1b[c")
        while not answer.endswith(b"c") and select.select([handle], [], [], ANSWER_TIMEOUT)[0]:
            answer += os.read(handle, 64)
    finally:
        termios.tcsetattr(handle, termios.TCSANOW, settings)
    found = re.search(rb"\x1b\[\?([\d;]*)c", answer)
    return found is not None and b"4" in found[1].split(b";")


def in_row(images: Sequence[Image.Image]) -> Image.Image:
    """Pictures in a row, as high as the first, with a narrow black gap between them."""
    height = images[0].height
    scaled = [image.resize((max(round(image.width * height / image.height), 1), height)) for image in images]
    gap = height // MAX_LINES
    row = Image.new("RGB", (sum(image.width + gap for image in scaled) - gap, height))
    left = 0
    for image in scaled:
        row.paste(image, (left, 0))
        left += image.width + gap
    return row


def draw(image: Image.Image, mode: str, environ: Mapping[str, str], count: int = 1) -> str:
    """The characters that draw the picture, or `count` in a row, in at most WIDEST x TALLEST cells each."""
    columns, lines = shutil.get_terminal_size()
    cell_columns, cell_lines = fit_cells(
        image.size, min(MAX_COLUMNS * count, columns - 1), min(MAX_LINES, max(lines - 4, 4))
    )
    if mode == "blocks":
        true_colour = environ.get("COLORTERM", "") in ("truecolor", "24bit") or WINDOWS_TERMINAL in environ
        return half_blocks(image.resize((cell_columns, 2 * cell_lines)), true_colour)
    width, height = cell_size()
    scaled = image.resize((cell_columns * width, cell_lines * height))
    if mode == "sixel":
        return sixels(scaled)
    buffer = io.BytesIO()
    scaled.save(buffer, "PNG")
    return (
        kitty(buffer.getvalue(), cell_columns, cell_lines)
        if mode == "kitty"
        else iterm2(buffer.getvalue(), cell_columns, cell_lines)
    )


def fit_cells(size: tuple[int, int], columns: int, lines: int) -> tuple[int, int]:
    """Columns and lines for a picture, each cell twice as high as wide."""
    width, height = size
    scale = min(columns / width, 2 * lines / height)
    return max(1, round(width * scale)), max(1, round(height * scale / 2))


def cell_size() -> tuple[int, int]:
    """A cell's width and height in pixels, as the terminal states them."""
    with suppress(ImportError, OSError):
        import fcntl
        import struct
        import termios

        lines, columns, width, height = struct.unpack("HHHH", fcntl.ioctl(1, termios.TIOCGWINSZ, bytes(8)))
        if lines and columns and width >= columns and height >= lines:
            return width // columns, height // lines
    return DEFAULT_CELL


def half_blocks(image: Image.Image, true_colour: bool) -> str:
    """Two pixels per cell: an upper half-block in one colour, the other as its background."""

    def colour(layer: int, pixel: tuple[int, ...]) -> str:
        if true_colour:
            return f"{layer};2;{';'.join(map(str, pixel))}"
        red, green, blue = (round(value / 255 * 5) for value in pixel)  # the cube of xterm's 256 colours
        return f"{layer};5;{16 + 36 * red + 6 * green + blue}"

    width, height = image.size
    pixels = list(zip(*[iter(image.tobytes())] * 3, strict=True))
    lines = []
    for top in range(0, height, 2):
        pairs = zip(pixels[top * width : (top + 1) * width], pixels[(top + 1) * width : (top + 2) * width], strict=True)
        runs = (
            f"\x1b[{colour(38, upper)};{colour(48, lower)}m" + "▀" * len([*run])
            for (upper, lower), run in groupby(pairs)
        )
        lines.append("".join(runs) + "\x1b[0m")
    return "\n".join(lines)


def kitty(png: bytes, columns: int, lines: int) -> str:
    """In pieces of 4096 characters, as the protocol asks."""
    text = base64.standard_b64encode(png).decode()
    pieces = [text[i : i + 4096] for i in range(0, len(text), 4096)]
    return "".join(
        f"\x1b_G{f'a=T,f=100,q=2,c={columns},r={lines},' if i == 0 else ''}m={int(i + 1 < len(pieces))};{piece}\x1b\\"
        for i, piece in enumerate(pieces)
    )


def iterm2(png: bytes, columns: int, lines: int) -> str:
    text = base64.standard_b64encode(png).decode()
    return f"\x1b]1337;File=inline=1;size={len(png)};width={columns};height={lines};preserveAspectRatio=1:{text}\a"


def sixels(image: Image.Image) -> str:
    """Bands of six rows, one pass for each colour in a band, run-length encoded."""
    small = image.quantize(128)
    width, height = small.size
    palette = small.getpalette() or []
    rows = [small.tobytes()[row * width : (row + 1) * width] for row in range(height)]
    out = [f'\x1bPq"1;1;{width};{height}']
    for index in sorted(set().union(*rows)):
        red, green, blue = (round(value / 255 * 100) for value in palette[3 * index : 3 * index + 3])
        out.append(f"#{index};2;{red};{green};{blue}")
    for top in range(0, height, 6):
        band = rows[top : top + 6]
        for index in sorted(set().union(*band)):
            column = (sum((row[x] == index) << bit for bit, row in enumerate(band)) for x in range(width))
            out.append(f"#{index}")
            for value, run in groupby(column):
                count = len([*run])
                out.append(f"!{count}{chr(63 + value)}" if count > 3 else chr(63 + value) * count)
            out.append("$")
        out.append("-")
    return "".join(out) + "\x1b\\"
