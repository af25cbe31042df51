"""STPO: preference optimisation that holds on to the winner.

The name and the aim are Krea 2's: plain DPO lets the likelihood of both pictures of a pair fall, and drifts into
high-frequency artefacts. Their method is unpublished; this one is ours. With ℓ = mean‖v − (ε − x₀)‖² at the same noise
level and noise for both pictures, and Δ = (ℓ_w − ℓ_l) − (ℓ_w^ref − ℓ_l^ref):

    dpo        −log σ(−β/2 · Δ)                                    Diffusion-DPO, arXiv 2311.12908
    dpo+sft    ... + β/2 · anchor · ℓ_w
    stpo       the loser's gradient scaled by λ so that, to first order, the winner's loss cannot rise (Diffusion-SDPO,
               arXiv 2511.03317), ... + β/2 · (hinge · max(0, ℓ_w − ℓ_w^ref) + anchor · ℓ_w)

β is set once the spread of Δ over held-out pairs is known, so that βΔ/2 has a standard deviation of 1.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from model import checkpoint
from model.errors import K2Error
from model.latents import patchify
from model.train import loop, pretrain, states
from model.train.data import fingerprint, stable_seed
from model.train.loop import Batch, Report
from model.train.recipe import check_at_least, check_positive, check_share, reject
from model.train.rewards import JUDGING_KEYS, JudgedRecipe, Rewards, choice_key, top_octave
from model.train.rollout import RolloutPrompt, add_noise, conditioned_velocity, decode, draw_prompts, sample
from model.train.states import RUNS
from model.train.training_set import TrainingSet, load_training_set
from model.train.validation import hold_out, validation_loss

KINDS = ("dpo", "dpo+sft", "stpo")
CHOICE_KEYS = (*JUDGING_KEYS, "group", "margin", "guidance")  # keys that the choice of pairs depends on
PICTURES_PER_PROMPT = 4  # pictures of each prompt in the final comparison


@dataclass(frozen=True, kw_only=True)
class Recipe(JudgedRecipe):
    """A run of preference optimisation; `batch` counts pairs."""

    stage: str = "stpo"
    kind: str = "stpo"
    beta: float = 500.0  # until it is set from the spread of Δ
    calibrate_at: int = 50  # the step after which it is set; 0, or fewer than two held-out pairs: never
    safety: float = 0.1  # share of its own size by which the winner's step outweighs the loser's
    hinge: float = 0.5  # weights of the auxiliary losses, in units of β/2
    anchor: float = 0.05
    prompts: int = 160  # for making pairs ...
    group: int = 4  # ... each with so many pictures, of which the best and the worst form a pair ...
    margin: float = 0.1  # ... if their rewards, 0 … 1, differ by at least this
    aside: int = 24  # held-out pairs: β is set and the run is watched on them
    sample_steps: int = 16
    guidance: float = 2.0
    look: int = 12  # prompts whose pictures are compared before and after, at the end

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 0, "calibrate_at", "hinge", "anchor", "margin", "aside", "guidance", "look")
        check_at_least(self, 1, "prompts", "sample_steps")
        check_at_least(self, 2, "group")
        check_positive(self, "beta")
        check_share(self, "safety")
        if self.kind not in KINDS:
            raise K2Error(f'Recipe "{self.name}": kind must be one of {", ".join(KINDS)}.')
        unused = {"dpo": ("safety", "hinge", "anchor"), "dpo+sft": ("safety", "hinge"), "stpo": ()}[self.kind]
        reject(self, *unused, to=f'the kind "{self.kind}"')


class PairTerms(NamedTuple):
    """One quantity for a winner and for its loser, [B, ...] each."""

    winner: Tensor
    loser: Tensor


def squared_error(velocity: Tensor, target: Tensor) -> Tensor:
    """ℓ [B]."""
    return (velocity - target).square().flatten(1).mean(1)


def safe_scale(predicted: PairTerms, target: PairTerms, safety: float) -> Tensor:
    """λ [B] in 0 … 1: the share of the loser's gradient, at the velocities, that lets the winner's loss still fall."""
    toward, away = ((v - u).detach().flatten(1) for v, u in zip(predicted, target, strict=True))
    together = (toward * away).sum(1)
    bound = (1 - safety) * toward.square().sum(1) / together.clamp_min(1e-12)
    return torch.where(together > 0, bound.clamp(0, 1), 1.0)


def preference_loss(
    predicted: PairTerms,
    target: PairTerms,
    reference: PairTerms,
    beta: float | Tensor,
    kind: str = "stpo",
    *,
    safety: float = 0.1,
    hinge: float = 0.5,
    anchor: float = 0.05,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss [B] of velocities [B, ...] against noise − image, relative to the frozen reference's; figures, [B] each.

    Winner and loser share noise and noise level.
    """
    winner, loser = map(squared_error, predicted, target)
    winner_before, loser_before = map(squared_error, reference, target)
    figures = {"winner": winner.detach() - winner_before, "loser": loser.detach() - loser_before}
    if kind == "stpo":
        scale = safe_scale(predicted, target, safety)
        loser = loser.detach() + scale * (loser - loser.detach())
        figures["scale"] = scale
    difference = (winner - loser) - (winner_before - loser_before)
    loss = -F.logsigmoid(-beta / 2 * difference)
    if kind == "stpo":
        loss = loss + beta / 2 * hinge * (winner - winner_before).relu()
    if kind != "dpo":
        loss = loss + beta / 2 * anchor * winner
    return loss, figures | {"right": (difference.detach() < 0).float()}


@dataclass(frozen=True)
class Pairs:
    """Two pictures of each prompt, the first the better: latents [N, C, h, w], float16."""

    captions: list[str]
    latents: PairTerms

    def __len__(self) -> int:
        return len(self.captions)

    def save(self, path: Path, metadata: dict[str, Any]) -> None:
        metadata = metadata | {"captions": self.captions}
        checkpoint.write(path, self.latents._asdict(), {"pairs": json.dumps(metadata)})

    @classmethod
    def load(cls, path: Path) -> Pairs:
        with safe_open(path, "pt") as file:
            captions = json.loads(file.metadata()["pairs"])["captions"]
        return cls(captions, PairTerms(**load_file(path)))


def pairs_made_for(path: Path, key: Mapping[str, Any], aside: int) -> bool:
    """Whether a file holds pairs that would be chosen the same way now, and more than the held-out ones."""
    if not path.exists():
        return False
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["pairs"])
    return about.get("chosen_by") == key and len(about["captions"]) > aside


def best_and_worst(reward: Tensor, margin: float) -> tuple[Tensor, Tensor, Tensor]:
    """reward [P, G] -> indices of the best and the worst in each group, [P] each, and whether they differ enough."""
    best, worst = reward.argmax(1), reward.argmin(1)
    gap = reward.gather(1, best[:, None]) - reward.gather(1, worst[:, None])
    return best, worst, gap[:, 0] >= margin


def make_pairs(
    model: pretrain.TrainedModel, data: TrainingSet, rewards: Rewards, recipe: Recipe, report: Report
) -> Pairs:
    """Groups of pictures by the model that the run starts from, judged -> the best and the worst of each."""
    prompts = draw_prompts(data, recipe.prompts, recipe.seed, recipe.name)
    captions: list[str] = []
    winners: list[Tensor] = []
    losers: list[Tensor] = []
    at_once = max(1, 32 // recipe.group)
    for start in range(0, len(prompts), at_once):
        chunk = [prompt for prompt in prompts[start : start + at_once] for _ in range(recipe.group)]
        seed = stable_seed(recipe.seed, "pairs", start) % 2**62
        latents = sample(
            model.dit, data.embed, [p.caption for p in chunk], data.cells, recipe.sample_steps, recipe.guidance, seed
        )
        judged = rewards.total(decode(rewards.vae, latents), chunk, recipe.weights).view(-1, recipe.group)
        best, worst, enough = best_and_worst(judged, recipe.margin)
        groups = latents.unflatten(0, (-1, recipe.group)).half().cpu()
        for index in enough.nonzero()[:, 0].tolist():
            captions.append(prompts[start + index].caption)
            winners.append(groups[index, best[index]])
            losers.append(groups[index, worst[index]])
        report(f"{recipe.name}: {len(captions)} pairs from {start + len(chunk) // recipe.group} prompts")
    if len(captions) <= recipe.aside:
        raise K2Error(
            f"Only {len(captions)} of {len(prompts)} prompts gave pairs that differ by {recipe.margin:g}.",
            hint="Raise prompts, or lower margin or aside.",
        )
    return Pairs(captions, PairTerms(torch.stack(winners), torch.stack(losers)))


class STPOStage(pretrain.RenderingStage):
    """The stage: the transformer learns, compared with a frozen copy of its start."""

    own = ("beta",)

    def __init__(self, recipe: Recipe, data: TrainingSet, weights: Mapping[str, Tensor], device: str):
        self.recipe: Recipe = recipe
        self.set = data
        self.data = fingerprint(data.catalog)
        self.model: pretrain.TrainedModel = pretrain.build_model(recipe, len(data.looks), device)
        self.model.register_buffer("beta", torch.tensor(recipe.beta))
        self.reference = pretrain.TrainedModel(recipe.config, len(data.looks)).requires_grad_(False).to(device)
        for model in (self.model, self.reference):
            states.init_from(model, weights, self.own)
        self.frozen = self.reference
        self.pairs: Pairs | None = None

    def rate(self, name: str) -> float:
        return float(name.startswith("dit."))

    def batch(self, step: int, part: int = 0) -> Batch:
        """Pairs that are not held out; none of them twice in a step, if there are enough."""
        assert self.pairs is not None
        rng = np.random.default_rng(stable_seed(self.recipe.seed, self.recipe.name, step, part))
        known = len(self.pairs) - self.recipe.aside
        chosen = self.recipe.aside + rng.choice(known, self.recipe.batch, replace=known < self.recipe.batch)
        return self.pairs_batch(chosen.tolist(), int(rng.integers(2**62)))

    def pairs_batch(self, indices: list[int], seed: int) -> Batch:
        """The pairs at these indices, and the seed of their noise."""
        assert self.pairs is not None
        embeds, mask = self.set.embed([self.pairs.captions[index] for index in indices])
        latents = [each[indices].float() for each in self.pairs.latents]
        return {"winner": latents[0], "loser": latents[1], "embeds": embeds, "mask": mask, "seed": seed}

    def compare(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """`preference_loss` of a batch of pairs."""
        recipe, dit = self.recipe, self.model.dit
        device, patch = dit.first.weight.device, dit.config.patch
        generator = torch.Generator().manual_seed(batch["seed"])
        images = [patchify(batch[key], patch).to(device) for key in ("winner", "loser")]
        winner, noise, sigma = add_noise(images[0], recipe.mu, generator)
        both = torch.cat((winner, torch.lerp(images[1], noise, sigma[:, None, None])))
        embeds, mask = (batch[key].to(device).repeat(2, *[1] * (batch[key].dim() - 1)) for key in ("embeds", "mask"))
        side = batch["winner"].shape[-1] // patch
        predicted = PairTerms(*conditioned_velocity(dit, embeds, mask, (side, side))(both, sigma.repeat(2)).chunk(2))
        with torch.no_grad():
            reference = PairTerms(
                *conditioned_velocity(self.reference.dit, embeds, mask, (side, side))(both, sigma.repeat(2)).chunk(2)
            )
        target = PairTerms(*(noise - image for image in images))
        options = {key: getattr(recipe, key) for key in ("safety", "hinge", "anchor")}
        return preference_loss(predicted, target, reference, self.model.get_buffer("beta"), recipe.kind, **options)

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Any]]:
        """In units of β/2, so that a gradient's norm means the same for any β."""
        loss, figures = self.compare(batch)
        return 2 / self.model.get_buffer("beta") * loss.mean(), {name: value.mean() for name, value in figures.items()}

    @torch.no_grad()
    def held_out_figures(self) -> dict[str, Tensor]:
        """The figures of each held-out pair, at noise that is always the same."""
        return self.compare(self.pairs_batch(list(range(self.recipe.aside)), 0))[1]

    def pictures(self) -> int:
        return 2 * self.recipe.batch

    def after(self, step: int) -> None:
        recipe = self.recipe
        if step == recipe.calibrate_at and recipe.aside > 1:  # one pair has no spread
            figures = self.held_out_figures()
            spread = float((figures["winner"] - figures["loser"]).std())
            beta = min(max(2 / max(spread, 1e-12), recipe.beta / 10), recipe.beta * 10)
            self.model.get_buffer("beta").fill_(beta)

    def figures(self) -> Mapping[str, float]:
        if not self.recipe.aside:
            return {}
        watched = {f"aside_{name}": float(value.mean()) for name, value in self.held_out_figures().items()}
        return watched | {
            "held": validation_loss(self.model, self.set, self.recipe, 32),
            "beta": float(self.model.get_buffer("beta")),
        }

    @torch.no_grad()
    def evaluate(self, rewards: Rewards, prompts: list[RolloutPrompt]) -> dict[str, float]:
        """Pictures of fixed prompts, `PICTURES_PER_PROMPT` of each, by the reference and by the model: rewards, how
        often they rose, power in the top octave, and the spread of pictures of one prompt. By the judge that chose the
        pairs."""
        recipe = self.recipe
        found: dict[str, float] = {}
        totals: list[Tensor] = []
        repeated = [prompt for prompt in prompts for _ in range(PICTURES_PER_PROMPT)]
        for who, model in (("before", self.reference), ("after", self.model)):
            parts = []
            for start in range(0, len(repeated), 16):
                chunk = [prompt.caption for prompt in repeated[start : start + 16]]
                latents = sample(
                    model.dit, self.set.embed, chunk, self.set.cells, recipe.sample_steps, recipe.guidance, start
                )
                parts.append(decode(rewards.vae, latents))
            pictures = torch.cat(parts)
            totals.append(rewards.total(pictures, repeated, recipe.weights))
            found[f"reward_{who}"] = float(totals[-1].mean())
            found[f"top_octave_{who}"] = float(top_octave(pictures).log().mean())
            found[f"apart_{who}"] = float(pictures.unflatten(0, (-1, PICTURES_PER_PROMPT)).std(1).mean())
        return found | {"reward_win_rate": float((totals[1] > totals[0]).float().mean())}


def main(recipe: Recipe, device: str = "cpu", report: Report = print) -> loop.Run:
    """Make the pairs, unless those of the recipe exist, then run the stage to its end from where it stands."""
    data = load_training_set(recipe, device)
    hold_out(data)
    rewards = Rewards.load(recipe.judge, data, device)
    stage = STPOStage(recipe, data, states.parent_weights(recipe.init), device)
    run = loop.Run(stage, RUNS / recipe.name, device)
    path = run.folder / "pairs.safetensors"
    key = choice_key(recipe, CHOICE_KEYS, stage.reference.dit, rewards, data)
    already_trained = run.done and path.exists()  # then it learned from the existing ones
    if run.world.is_main and not already_trained and not pairs_made_for(path, key, recipe.aside):
        pairs = make_pairs(stage.reference, data, rewards, recipe, report)
        pairs.save(path, {"recipe": asdict(recipe), "chosen_by": key})
    run.world.wait()
    stage.pairs = Pairs.load(path)
    loop.train(run, report)
    if not recipe.look or (run.idle and "reward_after" in run.figures):
        return run
    with run.averaged():
        figures = stage.evaluate(rewards, draw_prompts(data, recipe.look, "look over"))
    run.figures |= figures
    run.save(last=True)
    report(f"{recipe.name}: " + ", ".join(f"{name} {value:.4g}" for name, value in figures.items()))
    return run
