"""How long the history takes: `k2 log` and `k2 gallery` over many pictures, and the gallery's page in Chromium.

`python tests/bench/pictures.py [--pictures 10000] [--page 2000]`. Wall-clock seconds, and CPU time, which is what an
otherwise idle machine would take. The page needs Playwright and the system's Chromium.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import many_pictures

K2 = str(Path(sys.executable).with_name("k2"))
CHROMIUM_SWITCHES = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update")
NEXT_FRAME = "() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"


def make_project(folder: Path, count: int) -> Path:
    many_pictures(folder / "outputs", count)
    (folder / "k2.toml").write_text("")
    return folder


def time_command(folder: Path, *arguments: str) -> tuple[float, float]:
    """Wall-clock and CPU seconds of one command."""
    start, before = time.perf_counter(), os.times()
    subprocess.run([K2, *arguments, "--project", str(folder), "--quiet"], check=True, stdout=subprocess.DEVNULL)
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return time.perf_counter() - start, used


def time_page(folder: Path) -> dict[str, tuple[float, float]]:
    """Time to open the page, to search, and then to add a style, each until the result is drawn."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as tool:
        browser = tool.chromium.launch(executable_path=shutil.which("chromium"), args=CHROMIUM_SWITCHES)
        tab = browser.new_page(viewport={"width": 1280, "height": 860})
        session = tab.context.new_cdp_session(tab)
        session.send("Performance.enable", {"timeDomain": "threadTicks"})

        def busy() -> float:
            metrics = session.send("Performance.getMetrics")["metrics"]
            return next(each["value"] for each in metrics if each["name"] == "TaskDuration")

        found = {}
        start = time.perf_counter()
        tab.goto((folder / "gallery" / "index.html").as_uri())
        tab.evaluate(NEXT_FRAME)
        found["open"] = (time.perf_counter() - start, busy())
        steps = {
            "search": "document.getElementById('search').value = 'owl'; filter()",
            "style": "document.querySelector('#styles button').click()",
        }
        for name, step in steps.items():
            start, before = time.perf_counter(), busy()
            tab.evaluate(step)
            tab.evaluate(NEXT_FRAME)
            found[name] = (time.perf_counter() - start, busy() - before)
        browser.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=10_000)
    parser.add_argument("--page", type=int, default=2_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        many = make_project(Path(scratch) / "many", options.pictures)
        rows = {
            f"k2 log, {options.pictures:,} pictures": time_command(many, "log"),
            f"k2 gallery, {options.pictures:,} pictures": time_command(many, "gallery"),
            f"k2 gallery again, {options.pictures:,} pictures": time_command(many, "gallery"),
        }
        some = make_project(Path(scratch) / "some", options.page)
        time_command(some, "gallery")
        try:
            rows |= {f"page of {options.page:,}: {name}": figures for name, figures in time_page(some).items()}
        except ImportError:
            print("Playwright is not installed: skipping the page in Chromium")
    print(f"{'':42}{'wall s':>10}{'CPU s':>13}")
    for name, (clock, used) in rows.items():
        print(f"{name:42}{clock:>10.2f}{used:>13.2f}")


if __name__ == "__main__":
    main()
