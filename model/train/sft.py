"""Supervised fine-tuning on small curated subsets, one run per domain; `merge` makes one checkpoint of them.

A domain is what the recipe lets through: media, drawing sets, grounds. Of these it keeps the pictures whose subject a
judge reads best, up to a number per subject.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model.train import loop, pretrain
from model.train.data import Item, stable_seed
from model.train.looks import DRAWINGS, GROUNDS, MEDIA
from model.train.loop import Report
from model.train.pretrain import PretrainStage
from model.train.recipe import check_at_least, check_known, reject
from model.train.training_set import TrainingSet, load_training_set
from model.train.validation import is_validation, restrict, train_and_validate


@dataclass(frozen=True, kw_only=True)
class Recipe(pretrain.Recipe):
    """A run on one domain; an empty list lets everything through."""

    stage: str = "sft"
    media: tuple[str, ...] = ()
    drawings: tuple[str, ...] = ()
    on: tuple[str, ...] = ()  # grounds
    judge: str = ""  # curates by its reading of the subject; default: random choice
    per_subject: int = 24  # pictures kept of each

    def __post_init__(self) -> None:
        super().__post_init__()
        reject(self, "two")
        check_at_least(self, 1, "per_subject")
        check_known(self, self.media, MEDIA, "medium")
        check_known(self, self.drawings, DRAWINGS, "drawing set")
        check_known(self, self.on, GROUNDS, "ground")


def domain_mask(items: list[Item], recipe: Recipe) -> NDArray[np.bool_]:
    """Which pictures are of the recipe's media, drawing sets and grounds."""
    wanted = ((recipe.media, "medium"), (recipe.on, "ground"))
    return np.array(
        [
            (not recipe.drawings or item.pair.drawing in recipe.drawings)
            and all(not names or getattr(item.look, key) in names for names, key in wanted)
            for item in items
        ]
    )


def best_of_each(items: list[Item], keep: NDArray[np.bool_], score: NDArray[np.floating], count: int) -> NDArray:
    """Of the kept pictures, the `count` with the highest scores for every subject."""
    by_subject: dict[str, list[int]] = defaultdict(list)
    for index in np.flatnonzero(keep).tolist():
        by_subject[items[index].pair.subject].append(index)
    best = np.zeros(len(items), bool)
    for members in by_subject.values():
        best[sorted(members, key=lambda index: -score[index])[:count]] = True
    return best


def curate(data: TrainingSet, recipe: Recipe, device: str) -> None:
    """Keep the pictures of the domain that the judge reads best, a limited number per subject, all equally often."""
    from model.train.rewards import Rewards
    from model.train.rollout import RolloutPrompt, decode

    keep = (
        domain_mask(data.items, recipe)
        & (data.weights > 0)
        & np.array([not is_validation(item) for item in data.items])
    )
    score = np.array([stable_seed("sft", recipe.seed, item.pair, item.look) / 2**64 for item in data.items])
    if recipe.judge:
        rewards = Rewards.load(recipe.judge, data, device)
        members = np.flatnonzero(keep).tolist()
        for start in range(0, len(members), 64):
            part = members[start : start + 64]
            prompts = [RolloutPrompt("", data.items[i].pair.subject, data.items[i].look) for i in part]
            pictures = decode(rewards.vae, data.latents[part].to(device))
            score[part] = rewards.chosen(pictures, prompts, ["subject"])["subject"].cpu().numpy()
    restrict(data, best_of_each(data.items, keep, score, recipe.per_subject))
    counts: dict[str, float] = defaultdict(float)
    for item, weight in zip(data.items, data.weights, strict=True):
        counts[item.pair.subject] += weight
    even = np.array([1 / counts[item.pair.subject] if counts[item.pair.subject] else 0.0 for item in data.items])
    data.weights = data.weights * even / (data.weights * even).sum()


def main(recipe: Recipe, device: str = "cpu", report: Report = print) -> loop.Run:
    """Fine-tune on the recipe's domain."""
    data = load_training_set(recipe, device)
    curate(data, recipe, device)
    report(f"{recipe.name}: {(data.weights > 0).sum()} curated pictures")
    return train_and_validate(PretrainStage(recipe, len(data.looks), data, device), data, device, report)
