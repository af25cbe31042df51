"""Bundle trained weights: `python -m model.train.release RUN` stores a run's averaged weights in 8 bits.

Writes `mini-raw.safetensors` and `mini-style.safetensors` into `model/weights`; for a distillation only
`mini-turbo.safetensors`, for an autoencoder only `mini-vae.safetensors`, for a judge `judge-SEED.safetensors` and its
critic, so that figures can be reproduced. The text encoder is stored by its own training. Each file's metadata says how
it was made. A new style encoder or autoencoder needs new words: `python -m model.train.words`.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from model.checkpoint import read, save
from model.errors import exit_on_error
from model.library import BUNDLED
from model.quantize import quantise
from model.style import StyleConfig
from model.train import autoencoder, hearing, judge, turbo
from model.train.data import DATA, Catalog
from model.train.recipe import saved_recipe
from model.train.states import RUNS, averaged_weights, read_progress

RECOMMENDED = {"steps": 28, "guidance": 2.5, "mu": "auto"}


def main(run: str, folder: Path = BUNDLED) -> None:
    """Store a run's weights in a folder as bundled files."""
    path = RUNS / run / "state.safetensors"
    place = read_progress(path)
    recipe = place["recipe"]
    stage = saved_recipe(recipe)
    if isinstance(stage, autoencoder.Recipe):
        state, metadata = read(RUNS / run / "vae.safetensors")
        save(folder / "mini-vae.safetensors", quantise(state), metadata)
        return
    if isinstance(stage, judge.Recipe):
        for kind in ("judge", "critic"):
            state, metadata = read(judge.judge_path(kind, stage.seed))
            save(folder / f"{kind}-{stage.seed}.safetensors", quantise(state), metadata)
        return
    config = stage.config
    weights = averaged_weights(path)
    training: dict[str, Any] = {
        "recipe": recipe,
        "steps": place["step"],
        "minutes": round(place["seconds"] / 60, 1),
        "data": Catalog(DATA).manifest["renders"]["sha256"],
        "torch": torch.__version__,
    }
    shared = {"native": recipe["size"], "training": training}
    shared |= {"shapes": list(dict.fromkeys(stage.shapes))} if stage.shapes else {}
    dit: dict[str, Any] = {"kind": "dit", "variant": "raw", "config": asdict(config), "recommended": RECOMMENDED}

    def write_part(name: str, prefix: str, about: dict[str, Any]) -> None:
        state = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
        save(folder / f"mini-{name}.safetensors", quantise(state), about | shared)

    distilled = isinstance(stage, turbo.Recipe)
    if distilled or stage.init == "turbo":  # what started from Turbo stays one
        if distilled:
            recommended = {"steps": stage.walk_steps, "guidance": 0.0, "mu": stage.walk_mu}
        else:
            recommended = read(BUNDLED / "mini-turbo.safetensors")[1]["recommended"]
        write_part("turbo", "dit.", dit | {"variant": "turbo", "recommended": recommended})
        return
    write_part("raw", "dit.", dit)
    if not (isinstance(stage, hearing.Recipe) or "style" in stage.frozen):  # otherwise it stays, and so do its words
        style = StyleConfig(text_width=config.text_width, text_taps=config.text_taps)
        write_part("style", "style.", {"kind": "style", "config": asdict(style)})
    for file in sorted(folder.glob("mini-*.safetensors")):
        print(f"{file.name}: {file.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    with exit_on_error():
        parser = argparse.ArgumentParser(description="Bundle a run's weights.")
        parser.add_argument("run", metavar="RUN")
        main(parser.parse_args().run)
