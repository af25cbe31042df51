"""The next training for a GPU that is available for minutes: `python -m model.train.queue MINUTES [--out DIR]`.

Renders the data set if it is missing, from the archives in `.data/mini` (to be copied along if no registry can be
reached), encodes it on the device, trains the unfinished stages of `STAGES` with their shares of the minutes, and
leaves 8-bit weights and sheets of samples: Raw continues from the bundled weights, and Turbo is distilled from it.
Called again, it resumes where it was interrupted.
"""

from __future__ import annotations

import argparse
import shutil
from dataclasses import replace
from pathlib import Path

import torch

from model.errors import exit_on_error
from model.train import data, encode, recipe, release, samples
from model.train.data import DATA
from model.train.shapes import LARGE_RENDERS, Shape
from model.train.states import RUNS

STAGES = (
    ("gpu-further", 0.66),
    ("gpu-guidance", 0.06),
    ("gpu-turbo", 0.28),
)  # recipe, share of the minutes
RELEASED = ("gpu-further", "gpu-turbo")


def main(minutes: float, out: Path, device: str) -> None:
    """Train for about this many minutes; rendering and encoding come on top."""
    out.mkdir(parents=True, exist_ok=True)
    if not (DATA / "manifest.toml").exists():
        data.build(DATA)
        for size in (data.NATIVE, LARGE_RENDERS):
            data.render_at_size(size, DATA)
    for name, share in STAGES:
        stage = replace(recipe.load(name), minutes=minutes * share)
        for size in (stage.size, *map(Shape.parse, stage.shapes)):
            if not data.latents_file(DATA, size).exists():
                encode.main(size, device, batch=256)
        if stage.two and not data.latents_file(DATA, stage.size, two=True).exists():
            encode.main(stage.size, device, batch=256, two=True)
        recipe.stage_module(stage.stage, name).main(stage, device)
        samples.main(name, device=device)
        shutil.copy(max((RUNS / name).glob("samples-*.png"), key=lambda path: path.stat().st_mtime), out)
        for log in (RUNS / name).glob("log.csv"):  # very short runs have none
            shutil.copy(log, out / f"{name}.csv")
        if name in RELEASED:
            release.main(name, out)


if __name__ == "__main__":
    with exit_on_error():
        parser = argparse.ArgumentParser(description="Train the next stages on a GPU.")
        parser.add_argument("minutes", type=float, nargs="?", default=15)
        parser.add_argument("--out", type=Path, default=RUNS / "queue")
        parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        options = parser.parse_args()
        main(options.minutes, options.out, options.device)
