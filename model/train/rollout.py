"""Pictures rendered during training: prompts of any length in one batch, from the train split's own captions.

Post-training learns from the model's own pictures: groups of pictures of one prompt, judged by rewards. The prompts
here ask for pictures of the train split, so that the requested subject and look are known.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from model.dit import Krea2
from model.latents import patchify, unpatchify
from model.sampler import apply_guidance, euler, shifted_sigmas
from model.spec import raw_mu
from model.train.data import stable_seed
from model.train.looks import Look
from model.train.training_set import TrainingSet
from model.vae import QwenImageVAE

Velocity = Callable[[Tensor, Tensor], Tensor]  # (points [B, ...], noise levels [B]) -> noise − image there, fp32
Embed = Callable[[list[str]], tuple[Tensor, Tensor]]  # prompts -> right-padded text features [B, T, N, E], mask [B, T]


@dataclass(frozen=True)
class RolloutPrompt:
    """A prompt, and what its picture must show."""

    caption: str
    subject: str
    look: Look


def draw_prompts(data: TrainingSet, count: int, *seed: object) -> list[RolloutPrompt]:
    """Prompts with style words, for pictures drawn as in training."""
    rng = np.random.default_rng(stable_seed("asked", *seed))
    chosen = rng.choice(len(data.items), count, p=data.weights)
    items = [data.items[index] for index in chosen]
    return [RolloutPrompt(data.catalog.caption(item, rng, "medium"), item.pair.subject, item.look) for item in items]


def conditioned_velocity(dit: Krea2, embeds: Tensor, mask: Tensor | None, grid: tuple[int, int]) -> Velocity:
    """The velocity of tokens [B, L, C·p·p] under prompts.

    embeds [B or 1, T, N, E] and mask [B, T], needed if lengths differ, are on the network's device
    """
    context = dit.encode_text(embeds, mask)
    rope = dit.rope(context.shape[1], grid)

    def velocity(tokens: Tensor, sigma: Tensor) -> Tensor:
        return dit.velocity(tokens, context.expand(len(tokens), -1, -1), dit.modulate(sigma), rope, mask).float()

    return velocity


def draw_sigmas(count: int, mu: float, generator: torch.Generator) -> Tensor:
    """Shifted logit-normal noise levels [count], stratified, so that no step sees only easy or only hard ones."""
    rng_options: dict[str, Any] = {"generator": generator, "device": generator.device}
    spread = (torch.randperm(count, **rng_options) + torch.rand(count, **rng_options)) / count
    normal = torch.special.ndtri(spread.clamp(1e-4, 1 - 1e-4).cpu()).to(spread.device)  # Metal has no ndtri
    return torch.sigmoid(mu + normal)


def add_noise(image: Tensor, mu: float, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Clean tokens [B, L, D] -> tokens with noise, the noise, and the noise levels [B].

    The noise is drawn before the levels, on the generator's device, whatever device the tokens are on.
    """
    noise = torch.randn(image.shape, generator=generator, device=generator.device).to(image.device)
    sigma = draw_sigmas(len(image), mu, generator).to(image.device)
    return torch.lerp(image, noise, sigma[:, None, None]), noise, sigma


def append_rows(embeds: Tensor, mask: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Text features [B, T, N, E] and their mask [B, T], followed by style rows [B, R, N, E], all unmasked."""
    return torch.cat((embeds, rows), 1), F.pad(mask, (0, rows.shape[1]), value=True)


def sampling_sigmas(steps: int, cells: int, dit: Krea2) -> list[float]:
    """The sampler's noise levels for a square picture with `cells` latent cells per side."""
    return shifted_sigmas(steps, raw_mu((cells // dit.config.patch) ** 2))


@torch.no_grad()
def sample(
    dit: Krea2,
    embed: Embed,
    prompts: Sequence[str],
    cells: int,
    steps: int,
    guidance: float,
    seed: int,
    mu: float | None = None,
    init: tuple[Tensor, int] | None = None,
) -> Tensor:
    """Latents [B, C, cells, cells] of the prompts, from noise that depends only on `seed` and their position.

    init: latents of pictures to start from, and how many of the steps, the last ones, to take from there
    """
    if init is not None and not 0 <= init[1] <= steps:
        raise ValueError(f"of {steps} steps {init[1]} cannot be taken")
    device, patch = dit.first.weight.device, dit.config.patch
    sigmas = sampling_sigmas(steps, cells, dit) if mu is None else shifted_sigmas(steps, mu)
    sigmas = sigmas if init is None else sigmas[-init[1] - 1 :]
    grid = (cells // patch, cells // patch)

    def velocity_under(texts: list[str]) -> Velocity:
        embeds, mask = embed(texts)
        return conditioned_velocity(dit, embeds.to(device), mask.to(device), grid)

    velocity = velocity_under(list(prompts))
    unconditional = velocity_under([""] * len(prompts)) if guidance else velocity
    levels = torch.tensor(sigmas, device=device)

    def velocity_at(tokens: Tensor, step: int) -> Tensor:
        sigma = levels[step].expand(len(tokens))
        conditional = velocity(tokens, sigma)
        return apply_guidance(conditional, unconditional(tokens, sigma), guidance) if guidance else conditional

    noise = torch.randn(len(prompts), dit.config.channels, cells, cells, generator=torch.Generator().manual_seed(seed))
    noise = noise.to(device)
    start = noise if init is None else torch.lerp(init[0], noise, sigmas[0])
    return unpatchify(euler(velocity_at, patchify(start, patch), sigmas), patch, cells, cells)


@torch.no_grad()
def decode(vae: QwenImageVAE, latents: Tensor) -> Tensor:
    """Latents [B, C, h, w] -> pictures [B, 3, f·h, f·w] in −1 … 1, fp32."""
    with torch.autocast(latents.device.type, enabled=False):
        return torch.cat([vae.decode(part.float()).clamp(-1, 1) for part in latents.split(32)])
