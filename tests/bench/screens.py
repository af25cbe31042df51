"""Take the README's screenshots: `python tests/bench/screens.py PROJECT [FOLDER]`.

PROJECT must have been rendered. Needs Playwright and the system's Chromium. Each command runs on its own terminal, so
that it prints what people see; the gallery is built in a temporary folder.
"""

from __future__ import annotations

import fcntl
import io
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import termios
from pathlib import Path

from pictures import CHROMIUM_SWITCHES, K2
from PIL import Image
from playwright.sync_api import Page, sync_playwright
from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

SCREENS_FOLDER = Path(__file__).parents[2] / "projects_example" / "screens"
COLUMNS, LINES = 96, 48
PICKED_TILES = (0, 3, 4)  # in the gallery
PAGE = """<meta charset="utf-8"><style>
body {{ margin: 0; background: {background}; color: {foreground}; }}
pre {{ margin: 0; padding: 18px 22px; width: max-content; font: 14px "DejaVu Sans Mono", monospace; }}
</style><pre>{code}</pre>"""  # the font's own line height, which joins half-blocks


def run_in_terminal(arguments: list[str], project: Path) -> str:
    """What a command prints when its three streams are a terminal."""
    leader, follower = os.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
    terminal_env = {"TERM": "xterm-256color", "COLORTERM": "truecolor", "K2_PREVIEW": "blocks"}
    streams = {"stdin": follower, "stdout": follower, "stderr": follower}
    running = subprocess.Popen([K2, *arguments], cwd=project, env=os.environ | terminal_env, **streams)
    os.close(follower)
    written = b""
    while True:
        try:
            some = os.read(leader, 1 << 16)
        except OSError:  # the other end is closed
            break
        if not some:
            break
        written += some
    os.close(leader)
    assert running.wait() == 0, written.decode()
    return written.decode().replace("\r\n", "\n").replace(str(project.parent), "~")


def terminal_page(arguments: list[str], project: Path) -> str:
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(Text("$ ", "bold green"), Text(" ".join(["k2", *arguments]), "bold"), sep="")
    console.print(Text.from_ansi(run_in_terminal(arguments, project)))
    return console.export_html(theme=MONOKAI, inline_styles=True, code_format=PAGE)


def save_screenshot(tab: Page, path: Path, selector: str = "") -> None:
    raw = tab.locator(selector).screenshot() if selector else tab.screenshot()
    Image.open(io.BytesIO(raw)).convert("RGB").save(path, quality=84, method=6)
    print(f"{path}  {path.stat().st_size / 1000:.0f} kB")


def main(project: Path, folder: Path = SCREENS_FOLDER) -> None:
    project = project.resolve()
    folder.mkdir(exist_ok=True)
    newest = subprocess.run([K2, "log", "-n", "1"], cwd=project, check=True, capture_output=True, text=True).stdout
    commands = {"help": ["--help"], "here": [], "log": ["log"], "show": ["show", newest.split("\t")[0]]}
    with sync_playwright() as tool, tempfile.TemporaryDirectory() as scratch:
        browser = tool.chromium.launch(executable_path=shutil.which("chromium"), args=CHROMIUM_SWITCHES)
        tab = browser.new_page(viewport={"width": 1000, "height": 700})
        for name, arguments in commands.items():
            tab.set_content(terminal_page(arguments, project))
            save_screenshot(tab, folder / f"{name}.webp", "pre")
        site = Path(scratch) / "site"
        subprocess.run([K2, "gallery", "-o", str(site), "-q"], cwd=project, check=True, stdout=subprocess.DEVNULL)
        for name, scheme in (("gallery", "light"), ("picture", "dark")):
            tab = browser.new_page(viewport={"width": 1100, "height": 700}, color_scheme=scheme)
            tab.goto((site / "index.html").as_uri())
            if name == "picture":
                tab.locator(".tile").first.click()
            for at in PICKED_TILES if name == "gallery" else ():
                tab.locator(".pick").nth(at).click()
            tab.wait_for_load_state("networkidle")
            save_screenshot(tab, folder / f"{name}.webp")
        browser.close()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]))
