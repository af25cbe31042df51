"""Turbo: a few steps without guidance that land where many guided steps do.

Two stages, each a recipe. `guidance` teaches one pass to predict what the two passes of guidance give (arXiv
2210.03142, by regression on noised pictures). `trajectory` is Trajectory Distribution Matching (arXiv 2503.06674): the
student walks its K segments; each segment's end is noised further, and there a frozen teacher and a fake-score network,
which follows the student, give the direction in which the student's pictures must move towards the teacher's guided
ones.

Times here are noise levels: 1 is noise, 0 a picture; x_t = (1 − t) x₀ + t ε, velocity v = ε − x₀.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from model.train.rollout import Velocity


def expand_like(t: Tensor, like: Tensor) -> Tensor:
    """t [B] as [B, 1, ...], to multiply `like` by."""
    return t.view(-1, *[1] * (like.dim() - 1))


def predicted_image(x: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """x₀ of a point x [B, ...] of the flow at t [B], from its velocity there."""
    return x - expand_like(t, x) * v


def predicted_noise(x: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """ε of the same point."""
    return x + (1 - expand_like(t, x)) * v


@dataclass(frozen=True)
class Trajectory:
    """The student's own path from noise to pictures, without gradient."""

    times: tuple[float, ...]  # K + 1 noise levels, 1 … 0
    points: Tensor  # [K, B, ...] where each segment starts
    velocities: Tensor  # [K, B, ...] the student's output there

    def segment(self, segment: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """segment [B] of 0 … K − 1 -> points and velocities [B, ...], times of the segments' starts and ends [B]."""
        rows = torch.arange(len(segment), device=self.points.device)
        times = torch.tensor(self.times, device=self.points.device)
        segment = segment.to(self.points.device)
        return self.points[segment, rows], self.velocities[segment, rows], times[segment], times[segment + 1]


@torch.no_grad()
def follow(velocity: Velocity, noise: Tensor, times: Sequence[float]) -> Trajectory:
    """Follow `velocity` from noise [B, ...] by Euler steps, and record the path."""
    x, points, velocities = noise, [], []
    for t, end in pairwise(times):
        v = velocity(x, torch.full((len(x),), t, device=x.device))
        points.append(x)
        velocities.append(v)
        x = x + (end - t) * v
    return Trajectory(tuple(times), torch.stack(points), torch.stack(velocities))


def renoise(x0: Tensor, eps: Tensor, s: Tensor, t: Tensor, fresh: Tensor) -> tuple[Tensor, Tensor]:
    """Noise a segment's end x_s = (1 − s) x₀ + s ε further to t > s with fresh noise -> x_t and its velocity.

    x_t = a x_s + b ε' with a = (1 − t)/(1 − s), b² = t² − a² s²: it contains as much of x₀ as the flow does at t, and
    the two noises together have the flow's variance.
    """
    s, t = expand_like(s, x0), expand_like(t, x0)
    a = (1 - t) / (1 - s)
    noise = (a * s * eps + (t**2 - (a * s) ** 2).clamp_min(0).sqrt() * fresh) / t
    return (1 - t) * x0 + t * noise, noise - x0


def sample_between(s: Tensor, t: Tensor, uniform: Tensor, margin: float = 0.02) -> Tensor:
    """Noise levels inside (s, t), at least a share of the segment away from either end."""
    return s + (t - s) * (margin + (1 - 2 * margin) * uniform)


def matching_loss(
    x0: Tensor, fake: Tensor, teacher: Tensor, unconditional: Tensor, guidance: float, softness: float = 0.3
) -> Tensor:
    """Move the student's pictures x0 [B, ...] by the difference of the teacher's and the fake score's estimates -> [B].

    fake, teacher, unconditional: estimates of x₀ at a noised point, without gradient. Pseudo-Huber distance to the
    target, bent at `softness`, divided per picture by its distance from the teacher's guided estimate (as in DMD).
    """
    push = teacher - fake + guidance * (teacher - unconditional)
    aim = teacher + guidance * (teacher - unconditional)
    weight = (x0.detach() - aim).abs().flatten(1).mean(1).clamp_min(0.05)
    off = x0 - (x0 + push).detach()
    return ((off.square() + softness**2).sqrt() - softness).flatten(1).mean(1) / weight


@dataclass(frozen=True)
class Draws:
    """Random draws of a loss other than the student's noise, so that a step is a function of its seed."""

    segment: Tensor  # [B] which of the K
    uniform: Tensor  # [B] where between its ends
    fresh: Tensor  # [B, ...] the added noise

    @classmethod
    def draw(cls, segments: int, like: Tensor, generator: torch.Generator | None = None) -> Draws:
        """For pictures of the shape of `like` [B, ...]."""
        count = len(like)
        rng_options: dict[str, Any] = {"generator": generator, "device": generator.device if generator else like.device}
        # every segment about as often within a batch
        segment = (torch.randperm(count, **rng_options) + torch.randint(segments, (), **rng_options)) % segments
        fresh, uniform = torch.randn(like.shape, **rng_options), torch.rand(count, **rng_options)
        return cls(segment, uniform.to(like.device), fresh.to(like.device))


def fake_loss(fake: Velocity, trajectory: Trajectory, draws: Draws) -> Tensor:
    """The fake score learns the student's pictures: flow matching on the noised ends of segments [B]."""
    x, v, t, s = trajectory.segment(draws.segment)
    tau = sample_between(s, t, draws.uniform)
    x_tau, target = renoise(predicted_image(x, v, t), predicted_noise(x, v, t), s, tau, draws.fresh)
    return (fake(x_tau, tau) - target).square().flatten(1).mean(1)


def student_loss(
    student: Velocity,
    fake: Velocity,
    teacher: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    trajectory: Trajectory,
    draws: Draws,
    guidance: float,
) -> Tensor:
    """One segment of the student's walk, moved towards the teacher's guided pictures -> [B].

    teacher: (x, t) -> its velocities with and without the prompt.
    """
    x, _, t, s = trajectory.segment(draws.segment)
    v = student(x, t)
    x0 = predicted_image(x, v, t)
    with torch.no_grad():
        tau = sample_between(s, t, draws.uniform)
        x_tau, _ = renoise(x0, predicted_noise(x, v, t), s, tau, draws.fresh)
        fake_estimate, with_prompt, without = (
            predicted_image(x_tau, v, tau) for v in (fake(x_tau, tau), *teacher(x_tau, tau))
        )
    return matching_loss(x0, fake_estimate, with_prompt, without, guidance)
