"""The next piece of training for a GPU that is lent for minutes: `python -m model.train.queue MINUTES [--out DIR]`.

Unpacks the renders where only their archive travelled, encodes the data set on the device, trains the stages of
`STAGES` that are not done, Raw and then Turbo, sharing the minutes out, and leaves 8-bit weights and sheets of samples.
`python -m model.train.queue --pack` makes the archive: a tenth of the renders' size.
"""

from __future__ import annotations

import argparse
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from model.train import encode, recipe, release, samples
from model.train.data import DATA
from model.train.loop import RUNS

STAGES = (
    ("gpu-64", 0.22),
    ("gpu-128", 0.48),
    ("gpu-guidance", 0.08),
    ("gpu-turbo", 0.22),
)  # recipe, share of the minutes
RELEASED = ("gpu-128", "gpu-turbo")
PACKED = DATA / "renders.npz"


def main(minutes: float, out: Path, device: str) -> None:
    """Train for about so many minutes, encoding included."""
    out.mkdir(parents=True, exist_ok=True)
    if not (DATA / "renders.npy").exists():
        np.save(DATA / "renders.npy", np.load(PACKED)["renders"])
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


def pack() -> None:
    """The renders in an archive that travels."""
    np.savez_compressed(PACKED, renders=np.load(DATA / "renders.npy"))
    print(f"{PACKED}: {PACKED.stat().st_size / 1e6:.0f} MB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train the next stages on a lent GPU.")
    parser.add_argument("minutes", type=float, nargs="?", default=18)
    parser.add_argument("--out", type=Path, default=RUNS / "queue")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--pack", action="store_true", help="only pack the renders")
    options = parser.parse_args()
    if options.pack:
        pack()
    else:
        main(options.minutes, options.out, options.device)
