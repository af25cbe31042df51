"""GRPO on flow models: groups of pictures of one prompt, several rewards, no guidance.

Flow-GRPO (arXiv 2505.05470) turns some of the sampler's steps into steps of a stochastic equation with the same
marginals, whose transitions have probabilities. Times are noise levels t, falling; dt < 0; ε̂ = x + (1 − t) v:

    x' = x + [v + s²/2t · ε̂] dt + s √(−dt) n,    s = a √(t / (1 − t))

Rewards are combined as in GDPO (arXiv 2601.05242): each is normalised within its group, then weighted, then the sum is
normalised over the batch; groups in which no reward distinguishes pictures are dropped.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from model.atomic import atomic_write
from model.errors import K2Error
from model.latents import patchify, unpatchify
from model.train import loop, pretrain, states
from model.train.data import fingerprint, stable_seed
from model.train.loop import Batch, Report
from model.train.recipe import check_at_least, check_positive
from model.train.rewards import JUDGING_KEYS, JudgedRecipe, Rewards, apply_gates, choice_key
from model.train.rollout import (
    RolloutPrompt,
    Velocity,
    conditioned_velocity,
    decode,
    draw_prompts,
    sample,
    sampling_sigmas,
)
from model.train.states import RUNS
from model.train.training_set import TrainingSet, load_training_set
from model.train.validation import hold_out, validation_loss

CHOICE_KEYS = (*JUDGING_KEYS, "gates", "pool")  # keys that the choice of prompts depends on
MIN_STD = 1e-3  # a reward whose standard deviation in a group is below this counts as constant


@dataclass(frozen=True, kw_only=True)
class Recipe(JudgedRecipe):
    """A run of GRPO; `batch` counts prompts, each rendered `group` times."""

    stage: str = "grpo"
    group: int = 8
    sample_steps: int = 8
    stochastic: int = 2  # number of these, chosen at random for each rollout
    noise: float = 0.7  # a
    trust: float = 1e-4  # how far a transition's probability ratio may move from 1: log-probabilities are means
    updates: int = 2  # optimiser steps per rollout
    gates: dict[str, str] = field(default_factory=dict)  # reward -> another that it is multiplied by
    prompts: int = 192  # candidates, of which those whose rewards differ most ...
    pool: int = 64  # ... and are neither won nor hopeless form the pool to train on

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 1, "updates", "prompts", "pool")
        check_at_least(self, 2, "group")
        check_positive(self, "noise", "trust")
        if self.every % self.updates:
            raise K2Error(
                f'Recipe "{self.name}": every must be a multiple of updates.', hint="A run is saved between rollouts."
            )
        if idle := [name for name in self.gates if name not in self.weights]:
            raise K2Error(f'Recipe "{self.name}": "{idle[0]}" is gated, but is not a reward in weights.')
        if not 0 < self.stochastic < self.sample_steps:
            raise K2Error(f'Recipe "{self.name}": stochastic must be at least 1 and less than sample_steps.')


class Transition(NamedTuple):
    """One stochastic step of a rollout."""

    sigma: float
    next_sigma: float
    before: Tensor  # [B, L, D]
    after: Tensor
    log_prob: Tensor  # [B], under the policy that made it


def sde_step(
    tokens: Tensor, velocity: Tensor, sigma: float, next_sigma: float, noise: float, cap: float = 1.0
) -> tuple[Tensor, float]:
    """Mean of the next tokens [B, L, D], and their standard deviation. With noise 0 it is Euler's step, bit for bit.

    s diverges as t approaches 1, so t is capped at `cap` in its denominator, as in Flow-GRPO.
    """
    dt = next_sigma - sigma
    spread = noise * (sigma / max(1 - min(sigma, cap), 1e-6)) ** 0.5
    drift = velocity + spread**2 / (2 * sigma) * (tokens + (1 - sigma) * velocity)
    return tokens + dt * drift, spread * (-dt) ** 0.5


def log_prob(after: Tensor, mean: Tensor, std: float) -> Tensor:
    """Gaussian log-probability of [B, L, D], its mean over the numbers of each picture, in fp32: [B]."""
    error = (after.float() - mean.float()).square().flatten(1).mean(1)
    return -error / (2 * std**2) - float(np.log(std) + 0.5 * np.log(2 * np.pi))


@torch.no_grad()
def rollout(
    velocity: Velocity,
    tokens: Tensor,
    sigmas: Sequence[float],
    stochastic: Collection[int],
    noise: float,
    generator: torch.Generator,
) -> tuple[Tensor, list[Transition]]:
    """From noise [B, L, D] to pictures, and the transitions at the stochastic steps; the others are Euler's."""
    transitions: list[Transition] = []
    for step, (sigma, next_sigma) in enumerate(pairwise(sigmas)):
        v = velocity(tokens, torch.full((len(tokens),), sigma, device=tokens.device))
        step_noise = noise if step in stochastic else 0.0
        mean, std = sde_step(tokens, v, sigma, next_sigma, step_noise, sigmas[1])
        after = mean
        if step_noise:
            after = mean + std * torch.randn(mean.shape, generator=generator).to(mean.device)
            transitions.append(Transition(sigma, next_sigma, tokens, after, log_prob(after, mean, std)))
        tokens = after
    return tokens, transitions


def advantages(
    rewards: Mapping[str, Tensor], weights: Mapping[str, float], gates: Mapping[str, str] | None = None
) -> tuple[Tensor, Tensor]:
    """Rewards [P, G] by name, 0 … 1 -> advantages [P, G], at most 5, and which groups count [P].

    A gated reward is multiplied by the one that gates it. Groups that do not count have advantages of 0.
    """
    rewards = apply_gates(rewards, gates or {})
    total = torch.zeros_like(next(iter(rewards.values())), dtype=torch.float32)
    counts = torch.zeros(len(total), dtype=torch.bool, device=total.device)
    for name, weight in weights.items():
        reward = rewards[name].float()
        spread = reward.std(1, keepdim=True)
        varies = spread >= MIN_STD
        counts |= varies[:, 0]
        total += weight * torch.where(varies, (reward - reward.mean(1, keepdim=True)) / spread.clamp_min(MIN_STD), 0.0)
    kept = total[counts]
    if not len(kept):
        return torch.zeros_like(total), counts
    normalised = (total - kept.mean()) / kept.std().clamp_min(1e-6)
    return torch.where(counts[:, None], normalised.clamp(-5, 5), 0.0), counts


def policy_loss(
    velocity: Velocity, transitions: Sequence[Transition], advantage: Tensor, noise: float, cap: float, trust: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped policy loss of transitions under the current velocity; advantage [B]."""
    losses, ratios = [], []
    for transition in transitions:
        v = velocity(
            transition.before, torch.full((len(transition.before),), transition.sigma, device=transition.before.device)
        )
        mean, std = sde_step(transition.before, v, transition.sigma, transition.next_sigma, noise, cap)
        ratio = (log_prob(transition.after, mean, std) - transition.log_prob).exp()
        losses.append(torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - trust, 1 + trust)))
        ratios.append(ratio.detach())
    ratio = torch.stack(ratios)
    figures = {"ratio": (ratio - 1).abs().max(), "clipped": ((ratio - 1).abs() > trust).float().mean()}
    return torch.stack(losses).mean(), figures


class JudgedRollout(NamedTuple):
    """A judged rollout, which some optimiser steps learn from."""

    number: int
    transitions: list[Transition]
    advantage: Tensor  # [B]
    figures: dict[str, float]


class GRPOStage(pretrain.RenderingStage):
    """The stage: roll out, judge, and learn from the same rollout for `updates` steps."""

    pool: Sequence[RolloutPrompt] = ()  # prompts to learn from

    def __init__(self, recipe: Recipe, data: TrainingSet, rewards: Rewards, device: str = "cpu"):
        self.recipe: Recipe = recipe
        self.set, self.rewards = data, rewards
        self.data = fingerprint(data.catalog)
        self.model: pretrain.TrainedModel = pretrain.build_model(recipe, len(data.looks), device)
        self.judged_rollouts: dict[int, JudgedRollout] = {}  # the last of each part

    def rate(self, name: str) -> float:
        return float(name.startswith("dit."))

    def batch(self, step: int, part: int = 0) -> Batch:
        """The prompts of a rollout, each `group` times, and its seed: the same for all of its updates."""
        recipe = self.recipe
        number = step // recipe.updates
        rng = np.random.default_rng(stable_seed(recipe.seed, recipe.name, number, part))
        chosen = rng.choice(len(self.pool), min(recipe.batch, len(self.pool)), replace=False)
        prompts = [self.pool[index] for index in chosen for _ in range(recipe.group)]
        embeds, mask = self.set.embed([each.caption for each in prompts])
        steps = rng.choice(recipe.sample_steps - 1, recipe.stochastic, replace=False)  # the last ends in the picture
        return {
            "asked": prompts,
            "embeds": embeds,
            "mask": mask,
            "stochastic": sorted(steps.tolist()),
            "seed": int(rng.integers(2**62)),
            "round": (number, part),
        }

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Any]]:
        recipe, dit = self.recipe, self.model.dit
        device, patch, cells = dit.first.weight.device, dit.config.patch, self.set.cells
        sigmas = sampling_sigmas(recipe.sample_steps, cells, dit)
        grid = (cells // patch, cells // patch)
        embeds, mask = batch["embeds"].to(device), batch["mask"].to(device)
        number, part = batch["round"]
        if part not in self.judged_rollouts or self.judged_rollouts[part].number != number:
            generator = torch.Generator().manual_seed(batch["seed"])
            shape = (len(batch["asked"]), dit.config.channels, cells, cells)
            start = patchify(torch.randn(shape, generator=generator), patch).to(device)
            with torch.no_grad():
                velocity = conditioned_velocity(dit, embeds, mask, grid)
            tokens, transitions = rollout(velocity, start, sigmas, batch["stochastic"], recipe.noise, generator)
            pictures = decode(self.rewards.vae, unpatchify(tokens, patch, cells, cells))
            needed = {**recipe.weights, **dict.fromkeys(recipe.gates.values(), 0.0)}
            found = self.rewards.chosen(pictures, batch["asked"], needed)
            by_group = {name: value.view(-1, recipe.group) for name, value in found.items()}
            advantage, counts = advantages(by_group, recipe.weights, recipe.gates)
            figures = {name: float(value.mean()) for name, value in found.items()}
            figures["groups"] = float(counts.float().mean())
            self.judged_rollouts[part] = JudgedRollout(number, transitions, advantage.flatten(), figures)
            torch.clear_autocast_cache()  # else weights first cast without gradient stay without
        judged = self.judged_rollouts[part]
        velocity = conditioned_velocity(dit, embeds, mask, grid)
        loss, more = policy_loss(velocity, judged.transitions, judged.advantage, recipe.noise, sigmas[1], recipe.trust)
        return loss, judged.figures | more

    def pictures(self) -> int:
        return self.recipe.batch * self.recipe.group

    def figures(self) -> Mapping[str, float]:
        """Held-out flow loss: what the rewards do not measure must not be forgotten."""
        return {"held": validation_loss(self.model, self.set, self.recipe, 32)}


def informative_prompts(
    dit: Any, data: TrainingSet, rewards: Rewards, recipe: Recipe, report: Callable[[str], None]
) -> list[RolloutPrompt]:
    """Of many prompts, those whose pictures' rewards differ most and are neither won nor hopeless."""
    prompts = draw_prompts(data, recipe.prompts, recipe.seed, recipe.name)
    scores: list[tuple[float, float]] = []
    group, at_once = 4, 8
    for start in range(0, len(prompts), at_once):
        chunk = [prompt for prompt in prompts[start : start + at_once] for _ in range(group)]
        seed = stable_seed(recipe.seed, "prompts", start) % 2**62
        latents = sample(dit, data.embed, [p.caption for p in chunk], data.cells, recipe.sample_steps, 0.0, seed)
        reward = rewards.total(decode(rewards.vae, latents), chunk, recipe.weights, recipe.gates).view(-1, group)
        scores += list(zip(reward.std(1).tolist(), reward.mean(1).tolist(), strict=True))
    order = sorted(range(len(prompts)), key=lambda i: (not 0.05 < scores[i][1] < 0.95, -scores[i][0]))
    chosen = order[: recipe.pool]
    spread = float(np.mean([scores[i][0] for i in chosen])), float(np.mean([score for score, _ in scores]))
    report(
        f"{recipe.name}: rewards of {len(chosen)} chosen prompts differ by {spread[0]:.3f}, of all by {spread[1]:.3f}"
    )
    return [prompts[i] for i in chosen]


def write_pool(path: Path, data: TrainingSet, rewards: Rewards, recipe: Recipe, device: str, report: Report) -> None:
    """Write the prompts that distinguish the parent's rewards best, unless they exist."""
    parent = pretrain.TrainedModel(recipe.config, len(data.looks))
    states.init_from(parent, states.parent_weights(recipe.init))
    dit = parent.to(device).dit
    key = choice_key(recipe, CHOICE_KEYS, dit, rewards, data)
    if path.exists() and json.loads(path.read_text()).get("chosen_by") == key:
        return
    chosen = informative_prompts(dit, data, rewards, recipe, report)
    with atomic_write(path) as draft:
        prompts = [(each.caption, each.subject, str(each.look)) for each in chosen]
        draft.write_text(json.dumps({"chosen_by": key, "prompts": prompts}))


def main(recipe: Recipe, device: str = "cpu", report: Report = print) -> loop.Run:
    """Choose the prompts, unless those of the recipe exist, then run to the end from where it stands."""
    data = load_training_set(recipe, device)
    hold_out(data)
    rewards = Rewards.load(recipe.judge, data, device)
    stage = GRPOStage(recipe, data, rewards, device)
    run = loop.Run(stage, RUNS / recipe.name, device)
    path = run.folder / "pool.json"
    already_trained = run.done and path.exists()  # then it learned from the existing ones
    if run.world.is_main and not already_trained:
        write_pool(path, data, rewards, recipe, device, report)
    run.world.wait()
    looks, stored = {str(look): look for look in data.looks}, json.loads(path.read_text())["prompts"]
    stage.pool = [RolloutPrompt(caption, subject, looks[look]) for caption, subject, look in stored if look in looks]
    return loop.train(run, report)
