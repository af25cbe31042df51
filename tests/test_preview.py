"""Previews: the protocol is chosen by what a terminal says it is, and what is sent draws the picture."""

from __future__ import annotations

import base64
import io
import os
import re
import select
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image, ImageChops

from k2cli import preview

K2 = Path(sys.executable).with_name("k2")
PICTURE = Image.merge("RGB", [Image.linear_gradient("L"), Image.radial_gradient("L"), Image.new("L", (256, 256), 90)])


@pytest.mark.parametrize(
    ("environ", "sixel", "way"),
    [
        ({"TERM": "xterm-kitty"}, False, "kitty"),
        ({"TERM": "xterm-256color", "KITTY_WINDOW_ID": "1"}, True, "kitty"),
        ({"TERM": "xterm-ghostty"}, False, "kitty"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "iTerm.app"}, True, "iterm2"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "WezTerm"}, True, "iterm2"),
        ({"TERM": "foot"}, True, "sixel"),
        ({"TERM": "xterm-256color"}, False, "blocks"),
        ({"TERM": "tmux-256color", "TMUX": "x", "KITTY_WINDOW_ID": "1"}, True, "blocks"),
        ({"TERM": "dumb"}, True, "off"),
        ({}, True, "off"),
        ({"WT_SESSION": "x"}, False, "blocks"),
        ({"WT_SESSION": "x", "NO_COLOR": "1"}, False, "off"),
        ({"TERM": "xterm-kitty", "NO_COLOR": "1"}, True, "off"),
        ({"TERM": "xterm-kitty", "K2_PREVIEW": "sixel"}, False, "sixel"),
        ({"TERM": "xterm-kitty", "K2_PREVIEW": "off"}, False, "off"),
        ({"TERM": "xterm-kitty", "K2_PREVIEW": "nonsense"}, False, "kitty"),
    ],
)
def test_protocol_follows_the_terminal(environ, sixel, way):
    assert preview.choose_mode(environ, lambda: sixel) == way


@pytest.mark.parametrize(
    ("size", "room", "fits"),
    [((256, 256), (40, 20), (40, 20)), ((512, 256), (40, 20), (40, 10)), ((256, 1024), (40, 20), (10, 20))],
)
def test_picture_keeps_its_proportions(size, room, fits):
    assert preview.fit_cells(size, *room) == fits


def test_kitty_gets_the_picture_in_chunks(monkeypatch):
    monkeypatch.setattr(preview, "cell_size", lambda: preview.DEFAULT_CELL)
    noise = Image.frombytes("RGB", (80, 80), os.urandom(3 * 80 * 80))
    drawn = preview.draw(noise, "kitty", {})
    pieces = re.findall(r"\x1b_G([^;]*);([^\x1b]*)\x1b\\", drawn)

    assert len(pieces) > 1 and max(len(data) for _, data in pieces) <= 4096
    assert pieces[0][0].startswith("a=T,f=100,") and [about[-3:] for about, _ in pieces[1:]] == [
        *["m=1"] * (len(pieces) - 2),
        "m=0",
    ]
    with Image.open(io.BytesIO(base64.b64decode("".join(data for _, data in pieces)))) as image:
        columns, lines = map(int, re.search(r"c=(\d+),r=(\d+)", pieces[0][0]).groups())
        assert columns == 2 * lines and image.size == (
            columns * preview.DEFAULT_CELL[0],
            lines * preview.DEFAULT_CELL[1],
        )


def test_several_pictures_are_shown_side_by_side_at_one_height(monkeypatch):
    monkeypatch.setattr(preview.shutil, "get_terminal_size", lambda: (200, 50))
    row = preview.in_row([Image.new("RGB", (64, 64), "red"), Image.new("RGB", (64, 128), "blue")])
    gap = 64 // preview.MAX_LINES

    assert row.size == (64 + gap + 32, 64)
    assert [row.getpixel((x, 32)) for x in (63, 64, 64 + gap)] == [(255, 0, 0), (0, 0, 0), (0, 0, 255)]
    lines = preview.draw(row, "blocks", {}, 2).splitlines()
    assert len(lines) == preview.MAX_LINES  # as each of them would have alone
    assert lines[0].count("▀") > preview.MAX_COLUMNS


def test_iterm2_gets_a_file():
    about, data = re.fullmatch(r"\x1b\]1337;File=([^:]*):(.*)\a", preview.draw(PICTURE, "iterm2", {})).groups()

    assert "inline=1" in about and f"size={len(base64.b64decode(data))}" in about
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        assert image.format == "PNG"


def read_sixels(text: str) -> Image.Image:
    """A decoder for those parts of the standard that the encoder uses."""
    width, height = map(int, re.match(r'\x1bPq"1;1;(\d+);(\d+)', text).groups())
    image, palette = Image.new("RGB", (width, height), "magenta"), {}
    x = y = colour = 0
    commands = r"#(\d+);2;(\d+);(\d+);(\d+)|#(\d+)|!(\d+)([?-~])|([?-~])|(\$)|(-)"
    for command in re.finditer(commands, text[text.index("#") : -2]):
        index, red, green, blue, select_, count, run, one, back, _ = command.groups()
        if index:
            palette[int(index)] = tuple(round(int(part) * 2.55) for part in (red, green, blue))
        elif select_:
            colour = int(select_)
        elif run or one:
            for _ in range(int(count or 1)):
                for bit in range(6):
                    if (ord(run or one) - 63) >> bit & 1:
                        image.putpixel((x, y + bit), palette[colour])
                x += 1
        else:
            x, y = 0, y if back else y + 6
    return image


def test_sixels_draw_the_picture():
    small = PICTURE.resize((60, 40))
    drawn = preview.sixels(small)
    difference = ImageChops.difference(read_sixels(drawn), small)

    assert drawn.endswith("\x1b\\")
    assert max(high for _, high in difference.getextrema()) < 40


@pytest.mark.parametrize(("true_colour", "error"), [(True, 0), (False, 26)])
def test_half_blocks_draw_the_picture(true_colour, error):
    small = PICTURE.resize((12, 8))
    lines = preview.half_blocks(small, true_colour).split("\n")
    shown = Image.new("RGB", small.size)

    def pixel(code: str) -> tuple[int, ...]:
        parts = [int(part) for part in code.split(";")]
        if parts[0] == 2:
            return tuple(parts[1:])
        return tuple((parts[1] - 16) // unit % 6 * 51 for unit in (36, 6, 1))

    for row, line in enumerate(lines):
        x = 0
        for upper, lower, run in re.findall(r"\x1b\[38;([25];[\d;]+?);48;([25];[\d;]+?)m(▀+)", line):
            for _ in run:
                shown.putpixel((x, 2 * row), pixel(upper))
                shown.putpixel((x, 2 * row + 1), pixel(lower))
                x += 1
        assert x == 12 and line.endswith("\x1b[0m")
    assert max(high for _, high in ImageChops.difference(shown, small).getextrema()) <= error


def test_no_preview_in_a_pipe(moody, k2):
    k2("render", "-p", "tea")
    shown = k2("show", "outputs/0001-tea/tea-7.png").stdout

    assert "\x1b" not in shown and shown.startswith("prompt      tea")


def in_a_terminal(command: list[str], environ: dict[str, str], answer: bytes = b"") -> str:
    """What a command prints on a terminal that replies `answer` when asked for its attributes."""
    pty = pytest.importorskip("pty", reason="terminals as POSIX has them")
    ours, theirs = pty.openpty()
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=os.environ | environ)
    os.close(theirs)
    seen = b""
    while True:
        try:
            if select.select([ours], [], [], 30)[0] and (part := os.read(ours, 65536)):
                seen += part
                if part.endswith(b"\x1b[c"):
                    os.write(ours, answer)
                continue
        except OSError:  # the other end is closed
            pass
        break
    process.wait()
    os.close(ours)
    return seen.decode()


@pytest.mark.parametrize("name", ["tea-7.png", "tea-7.toml", "saved.jpeg", "saved.jfif"])
def test_picture_with_any_name_is_drawn(moody, k2, name):
    """And not another picture beside it."""
    picture = Path(k2("render", "-p", "tea", "--format", "jpeg" if "saved" in name else "png").stdout.strip())
    if "saved" in name:
        picture.rename(picture.with_name(name))
        PICTURE.save(picture.with_name("saved.png"))

    seen = in_a_terminal([str(K2), "show", str(picture.with_name(name))], {"TERM": "xterm-kitty", "NO_COLOR": ""})

    payload = "".join(re.findall(r"\x1b_G[^;]*;([^\x1b]*)", seen))
    assert Image.open(io.BytesIO(base64.b64decode(payload))).convert("RGB").getcolors(8)  # the other has thousands
    assert "prompt      tea" in seen


@pytest.mark.parametrize(
    ("answer", "drawn"), [(b"\x1b[?62;4;22c", "\x1bPq"), (b"\x1b[?62;22c", "▀"), (b"", "▀"), (b"garbage", "▀")]
)
def test_real_terminal_is_queried(tmp_path, monkeypatch, answer, drawn):
    PICTURE.save(tmp_path / "x.png")
    code = "from pathlib import Path; from k2cli.preview import preview; preview([Path('x.png')]); print('after')"
    environ = {"TERM": "xterm-256color", "TERM_PROGRAM": "", "LC_TERMINAL": "", "NO_COLOR": "", "K2_PREVIEW": ""}
    for key in ("TMUX", "KITTY_WINDOW_ID"):
        monkeypatch.delenv(key, raising=False)

    seen = in_a_terminal([sys.executable, "-c", f"import os; os.chdir({str(tmp_path)!r}); {code}"], environ, answer)

    assert drawn in seen and seen.rstrip().endswith("after")
