"""The next piece of training for a GPU that is there for minutes: `python -m model.train.queue MINUTES [--out DIR]`.

Unpacks the renders where only their archives travelled, encodes the data set on the device, trains the stages of
`STAGES` that are not done, Raw and then Turbo, sharing the minutes out, and leaves 8-bit weights and sheets of samples.
`python -m model.train.queue --pack` makes the archives: a tenth of the renders' size.
"""

from __future__ import annotations

import argparse
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from model.train import encode, recipe, release, samples
from model.train.data import DATA, NATIVE, SIZE, Catalog, renders_path
from model.train.loop import RUNS

STAGES = (
    ("gpu-128", 0.15),
    ("gpu-256", 0.3),
    ("gpu-styles", 0.25),
    ("gpu-guidance", 0.07),
    ("gpu-turbo", 0.23),
)  # recipe, share of the minutes
RELEASED = ("gpu-styles", "gpu-turbo")
SIZES = (SIZE, NATIVE)  # of the renders that they learn from


def main(minutes: float, out: Path, device: str) -> None:
    """Train for about so many minutes, encoding included."""
    out.mkdir(parents=True, exist_ok=True)
    for size in SIZES:
        if not renders_path(DATA, size).exists():
            np.save(renders_path(DATA, size), np.load(packed(size))["renders"])
    for name, share in STAGES:
        stage = replace(recipe.load(name), minutes=minutes * share)
        if not (DATA / f"latents-{stage.size}.npy").exists():
            encode.main(stage.size, device, batch=256)
        recipe.module(stage.stage, name).main(stage, device)
        samples.main(name)
        shutil.copy(max((RUNS / name).glob("samples-*.png"), key=lambda path: path.stat().st_mtime), out)
        for log in (RUNS / name).glob("log.csv"):  # very short runs have none
            shutil.copy(log, out / f"{name}.csv")
        if name in RELEASED:
            release.main(name, out)


def packed(size: int) -> Path:
    """Where the archive of the renders of a size lies."""
    return renders_path(DATA, size).with_suffix(".npz")


def pack() -> None:
    """The renders in archives that travel."""
    for size in SIZES:
        np.savez_compressed(packed(size), renders=Catalog(DATA, size).renders)
        print(f"{packed(size)}: {packed(size).stat().st_size / 1e6:.0f} MB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train the next stages on a GPU.")
    parser.add_argument("minutes", type=float, nargs="?", default=18)
    parser.add_argument("--out", type=Path, default=RUNS / "queue")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--pack", action="store_true", help="only pack the renders")
    options = parser.parse_args()
    if options.pack:
        pack()
    else:
        main(options.minutes, options.out, options.device)
