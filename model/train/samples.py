"""Look at a run: `python -m model.train.samples RUN` renders fixed prompts from its averaged weights to a sheet."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from model.dit import Krea2
from model.latents import noise, patchify, unpatchify
from model.sampler import euler, guided, raw_mu, shifted_sigmas
from model.text_encoder import TextEncoder
from model.train import turbo
from model.train.autoencoder import load as load_autoencoder
from model.train.pretrain import BOX, RUNS, averages
from model.train.recipe import saved

PROMPTS = [
    *("a fox", "a cat", "a penguin", "a red apple", "a banana", "a car", "a sailboat", "a house"),
    *("a rocket", "a rose", "a guitar", "a hamburger", "a frog", "a bicycle", "a crown", "an octopus"),
    *("a panda, pixel art", "a strawberry, watercolour", "a robot, neon on black", "a lion, pencil hatching"),
    *("a train on a sky blue background, glossy 3d", "a duck on an orange background, flat design"),
    *("a mushroom, black ink stencil", "a bus, grainy film"),
]


@torch.inference_mode()
def sample(
    dit: Krea2,
    embeds: Tensor,
    empty: Tensor,
    size: int,
    steps: int,
    guidance: float,
    seed: int,
    mu: float | None = None,
) -> Tensor:
    """Latents [1, C, size/8, size/8] of one prompt: embeds [1, T, N, E], those of the empty prompt beside them."""
    cells, patch = size // 8, dit.config.patch
    grid = (cells // patch, cells // patch)
    sigmas = shifted_sigmas(steps, raw_mu(grid[0] * grid[1]) if mu is None else mu)
    mods = dit.modulate(torch.tensor(sigmas))
    with_prompt, without = dit.encode_text(embeds), dit.encode_text(empty)
    ropes = dit.rope(with_prompt.shape[1], grid), dit.rope(without.shape[1], grid)

    def velocity(tokens: Tensor, step: int) -> Tensor:
        conditional = dit.velocity(tokens, with_prompt, mods[step : step + 1], ropes[0])
        if not guidance:
            return conditional
        return guided(conditional, dit.velocity(tokens, without, mods[step : step + 1], ropes[1]), guidance)

    start = patchify(noise(seed, dit.config.channels, cells, cells), patch)
    return unpatchify(euler(velocity, start, sigmas), patch, cells, cells)


@torch.inference_mode()
def main(run: str, steps: int = 16, guidance: float = 2.5) -> Path:
    path = RUNS / run / "state.safetensors"
    with safe_open(path, "pt") as file:
        place = json.loads(file.metadata()["place"])
    recipe, mu = saved(place["recipe"]), None
    if isinstance(recipe, turbo.Recipe):
        steps, guidance, mu = recipe.walk_steps, 0.0, recipe.walk_mu
    dit = Krea2(recipe.config).eval()
    dit.load_state_dict({k[4:]: v for k, v in averages(path).items() if k.startswith("dit.")})
    text = TextEncoder.load(BOX / "mini-text.safetensors")
    vae = load_autoencoder(BOX / "mini-vae.safetensors")
    (empty, _) = text.encode([""])
    pictures = []
    for index, prompt in enumerate(PROMPTS):
        latents = sample(dit, text.encode([prompt])[0], empty, recipe.size, steps, guidance, index, mu)
        pixels = ((vae.decode(latents)[0].clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        pictures.append(np.asarray(Image.fromarray(pixels).resize((128, 128), Image.Resampling.LANCZOS)))
    rows = [np.concatenate(pictures[i : i + 8], 1) for i in range(0, len(pictures), 8)]
    out = RUNS / run / f"samples-{place['step']}.png"
    Image.fromarray(np.concatenate(rows)).save(out)
    return out


if __name__ == "__main__":
    print(main(sys.argv[1]))
