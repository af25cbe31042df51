"""Sampling: follow the flow from noise (sigma 1) to a picture (sigma 0)."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from itertools import islice, pairwise

import torch
from torch import Tensor

StepVelocity = Callable[[Tensor, int], Tensor]  # (tokens [B, L, C·p·p], index of the step) -> d tokens / d sigma


def shifted_sigmas(steps: int, mu: float) -> list[float]:
    """`steps + 1` noise levels from 1 to 0, evenly spaced, then shifted towards noise by exp(mu)."""
    if steps < 1:
        raise ValueError(f"there must be at least one step, not {steps}")
    shift = math.exp(mu)
    return [shift * t / (shift * t + (1 - t)) for t in ((steps - i) / steps for i in range(steps + 1))]


def apply_guidance(conditional: Tensor, unconditional: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance, on Krea's scale: 0 is off, 3.5 is what others call 4.5."""
    return conditional + guidance * (conditional - unconditional)


def apply_style_guidance(styled: Tensor, conditional: Tensor, guided: Tensor, style_guidance: float) -> Tensor:
    """The style's own term on top of the prompt's guidance, on the same scale: 0 adds the style's effect once."""
    return guided + (1 + style_guidance) * (styled - conditional)


@torch.no_grad()
def euler(
    velocity: StepVelocity,
    tokens: Tensor,
    sigmas: list[float],
    on_step: Callable[[int], None] | None = None,
    first: int = 0,
) -> Tensor:
    """Follow the flow from sigmas[first] (0: noise) to sigmas[-1] (image); `on_step(steps done)` after every step."""
    for step, (sigma, next_sigma) in islice(enumerate(pairwise(sigmas)), first, None):
        tokens = tokens + (next_sigma - sigma) * velocity(tokens, step)
        if on_step is not None:
            on_step(step + 1 - first)
    return tokens


@torch.no_grad()
def adams_bashforth(
    velocity: StepVelocity,
    tokens: Tensor,
    sigmas: list[float],
    on_step: Callable[[int], None] | None = None,
    restart_steps: Collection[int] = (),
    first: int = 0,
) -> Tensor:
    """Second-order `euler`: each step extrapolates from the last two velocities, at no extra evaluation.

    v_n + h_n / (2 h_{n−1}) · (v_n − v_{n−1}) replaces v_n, with h the steps' lengths: two-step Adams–Bashforth (Hairer,
    Nørsett and Wanner, Solving Ordinary Differential Equations I, III.5). `restart_steps`: steps whose velocity field
    differs from that of the step before, where extrapolation would mislead; they are Euler steps, like the first.
    """
    previous: tuple[Tensor, float] | None = None
    for step, (sigma, next_sigma) in islice(enumerate(pairwise(sigmas)), first, None):
        v, length = velocity(tokens, step), next_sigma - sigma
        extrapolated = v
        if previous is not None and step not in restart_steps:
            extrapolated = v + length / (2 * previous[1]) * (v - previous[0])
        tokens, previous = tokens + length * extrapolated, (v, length)
        if on_step is not None:
            on_step(step + 1 - first)
    return tokens
