"""Inspect a run: `python -m model.train.samples RUN` renders a sheet of fixed prompts with its averaged weights."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from model.dit import Krea2
from model.errors import exit_on_error
from model.library import BUNDLED
from model.text_encoder import TextEncoder
from model.train.autoencoder import load as load_autoencoder
from model.train.recipe import saved_recipe
from model.train.rollout import decode, sample
from model.train.states import RUNS, averaged_weights, read_progress

PROMPTS = [
    *("a fox", "a cat", "a penguin", "a red apple", "a banana", "a car", "a sailboat", "a house"),
    *("a rocket", "a rose", "a guitar", "a hamburger", "a frog", "a bicycle", "a crown", "an octopus"),
    *("a panda, pixel art", "a strawberry, watercolour", "a robot, neon on black", "a lion, pencil hatching"),
    *("a train on a sky blue background, glossy 3d", "a duck on an orange background, flat design"),
    *("a mushroom, black ink stencil", "a bus, grainy film"),
]


@torch.inference_mode()
def main(run: str, device: str = "cpu") -> Path:
    """Render `PROMPTS` with a run's averaged weights, eight per row -> the sheet's path."""
    path = RUNS / run / "state.safetensors"
    place = read_progress(path)
    recipe = saved_recipe(place["recipe"])
    dit = Krea2(recipe.config).eval().to(device)
    dit.load_state_dict({k[4:]: v for k, v in averaged_weights(path).items() if k.startswith("dit.")})
    text = TextEncoder.load(BUNDLED / "mini-text.safetensors", device)
    vae = load_autoencoder(BUNDLED / "mini-vae.safetensors").to(device)
    sampling = recipe.sampling
    latents = sample(
        dit, text.encode, PROMPTS, recipe.size // vae.factor, sampling.steps, sampling.guidance, seed=0, mu=sampling.mu
    )
    pixels = ((decode(vae, latents) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    side = max(128, recipe.size)
    pictures = [np.asarray(Image.fromarray(each).resize((side, side), Image.Resampling.LANCZOS)) for each in pixels]
    rows = [np.concatenate(pictures[i : i + 8], 1) for i in range(0, len(pictures), 8)]
    out = RUNS / run / f"samples-{place['step']}.png"
    Image.fromarray(np.concatenate(rows)).save(out)
    return out


if __name__ == "__main__":
    with exit_on_error():
        parser = argparse.ArgumentParser(description="Render samples of a run.")
        parser.add_argument("run", metavar="RUN")
        print(main(parser.parse_args().run))
