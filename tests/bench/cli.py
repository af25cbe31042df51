"""How long the command line takes as a user experiences it: from process start to exit.

`python tests/bench/cli.py [--rounds 5] [--out FILE]`. Each row compares two commands that run alternately, so that
other load affects both; figures are medians, ratios are medians of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

import tomli_w
import torch

K2 = str(Path(sys.executable).with_name("k2"))
FOX_COMMAND = ["render", "-p", "a red fox", "--quiet"]
MANY_PROMPTS = [part for index in range(128) for part in ("-p", f"a red fox number {index}")]


@dataclass(frozen=True)
class Row:
    """A comparison: `ours` may cost at most `limit` times `theirs`. `share` is the number of units in ours."""

    name: str
    ours: list[str]
    theirs: list[str]
    limit: float
    share: int = 1
    what: str = "seconds"


ROWS = [
    Row("k2 --help / import typer, rich", [K2, "--help"], [sys.executable, "-c", "import typer, rich"], 2.0),
    Row(
        "one picture in 8 steps / import torch",
        [K2, *FOX_COMMAND, "--batch", "1", "--steps", "8"],
        [sys.executable, "-c", "import torch"],
        2.5,
    ),
    Row(
        "a picture of 16 in one run / alone",
        [K2, *FOX_COMMAND, "--batch", "16"],
        [K2, *FOX_COMMAND, "--batch", "1"],
        0.5,
        16,
    ),
    Row(
        "peak memory of 32 prompts / of 4",
        [K2, "render", "--quiet", "--steps", "4", *MANY_PROMPTS[:64]],
        [K2, "render", "--quiet", "--steps", "4", *MANY_PROMPTS[:8]],
        1.05,
        what="megabytes",
    ),
    Row(
        "peak memory of 128 prompts / of 64",  # by then, what a run keeps (contexts, a page of the sheet) is full
        [K2, "render", "--quiet", "--steps", "1", *MANY_PROMPTS],
        [K2, "render", "--quiet", "--steps", "1", *MANY_PROMPTS[:128]],
        1.05,
        what="megabytes",
    ),
]


def measure(command: list[str], folder: Path) -> dict[str, float]:
    """Seconds and peak megabytes that a command takes in a process of its own."""
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        sys.exit(f"failed: {' '.join(command)}")
    return {"seconds": seconds, "megabytes": usage.ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(".cache/bench-cli.toml"))
    options = parser.parse_args()

    found = []
    print(f"{'':<40}{'ours':>10}{'theirs':>10}{'ratio':>8}{'limit':>8}")
    with tempfile.TemporaryDirectory() as scratch:
        project = Path(scratch) / "bench"
        subprocess.run([K2, "new", str(project), "--quiet"], check=True, stdout=subprocess.DEVNULL)
        for row in ROWS:
            measure(row.ours, project)  # the very first run reads from disk
            rounds = [(measure(row.ours, project), measure(row.theirs, project)) for _ in range(options.rounds)]
            pairs = [(ours[row.what] / row.share, theirs[row.what]) for ours, theirs in rounds]
            ours, theirs = (median(side) for side in zip(*pairs, strict=True))
            ratio = median(mine / other for mine, other in pairs)
            print(f"{row.name:<40}{ours:>10.2f}{theirs:>10.2f}{ratio:>8.2f}{row.limit:>8.2f}  {row.what}", flush=True)
            found.append(asdict(row) | {"medians": [ours, theirs], "ratio": ratio, "rounds": [list(p) for p in pairs]})
    machine = {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "processor": platform.machine()}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    when = datetime.now(UTC).replace(microsecond=0)
    options.out.write_text(tomli_w.dumps({"when": when, "torch": torch.__version__, "machine": machine, "row": found}))
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
