"""Midtraining: the complete train split again, balanced over clusters of what pictures show and how they look.

Pictures are clustered by the text encoder's view of their subject and the style encoder's view of their latents. Every
cluster is drawn equally often, so that the common does not crowd out the rare.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from model.errors import K2Error
from model.train import loop, pretrain, states
from model.train.loop import Report
from model.train.pretrain import PretrainStage
from model.train.recipe import check_at_least, check_share, reject
from model.train.training_set import TrainingSet, load_training_set
from model.train.validation import hold_out, train_and_validate

MAX_ROUNDS = 25  # of k-means, at most


@dataclass(frozen=True, kw_only=True)
class Recipe(pretrain.Recipe):
    """A run of midtraining."""

    stage: str = "midtrain"
    clusters: int = 24
    balance: float = 1.0  # 1: all clusters equally often; 0: as often as in pretraining

    def __post_init__(self) -> None:
        super().__post_init__()
        reject(self, "two")
        check_at_least(self, 1, "clusters")
        check_share(self, "balance")
        if not self.init:
            raise K2Error(f'Recipe "{self.name}": midtraining continues a run, but init names none.')


def kmeans(points: NDArray[np.floating], count: int, seed: int = 0) -> NDArray[np.int64]:
    """Cluster points [N, D] -> the cluster of each [N], 0 … count − 1. Centres start by k-means++, under the seed."""
    rng = np.random.default_rng(seed)
    points = points.astype(np.float64)
    size = (points**2).sum(1)

    def distances(centres: NDArray) -> NDArray:
        return np.maximum(size[:, None] - 2 * points @ centres.T + (centres**2).sum(1), 0)

    centres = points[rng.integers(len(points))][None]
    while len(centres) < count:
        nearest = distances(centres).min(1)
        if not nearest.sum():  # fewer distinct points than clusters
            break
        centres = np.concatenate((centres, points[rng.choice(len(points), p=nearest / nearest.sum())][None]))
    assigned = distances(centres).argmin(1)
    for _ in range(MAX_ROUNDS):
        centres = np.stack(
            [points[assigned == k].mean(0) if (assigned == k).any() else centres[k] for k in range(len(centres))]
        )
        before, assigned = assigned, distances(centres).argmin(1)
        if (assigned == before).all():
            break
    return assigned


def balanced_odds(weights: NDArray[np.floating], clusters: NDArray[np.int64], balance: float) -> NDArray[np.floating]:
    """Odds of pictures [N] such that cluster c has a share proportional to s_c^(1 − balance), s_c its share before."""
    share = np.bincount(clusters, weights)
    wanted = np.where(share > 0, np.maximum(share, 1e-300) ** (1 - balance), 0.0)
    odds = weights * (wanted / np.where(share > 0, share, 1.0))[clusters]
    return odds / odds.sum()


@torch.no_grad()
def features(data: TrainingSet, model: pretrain.TrainedModel) -> NDArray[np.float32]:
    """Unit subject features and unit style vectors of all pictures, concatenated [N, N_taps·E + V]."""
    device = model.look_head.weight.device
    names = sorted({item.pair.subject for item in data.items})
    embeds, mask = data.embed(names)
    pooled = (embeds.flatten(2) * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    subjects = dict(zip(names, F.normalize(pooled - pooled.mean(0), dim=-1).cpu(), strict=True))
    styles = torch.cat([model.style(part.float().to(device))[1].float().cpu() for part in data.latents.split(256)])
    return torch.cat((torch.stack([subjects[item.pair.subject] for item in data.items]), styles), 1).numpy()


def main(recipe: Recipe, device: str = "cpu", report: Report = print) -> loop.Run:
    """Cluster by the parent's style encoder, balance, train."""
    data = load_training_set(recipe, device)
    hold_out(data)
    stage = PretrainStage(recipe, len(data.looks), data, device)
    before = pretrain.build_model(recipe, len(data.looks), device)
    states.init_from(before, states.parent_weights(recipe.init), ("look_head",))
    clusters = kmeans(features(data, before.to(device)), recipe.clusters, recipe.seed)
    data.weights = balanced_odds(data.weights, clusters, recipe.balance)
    report(f"{recipe.name}: {len(np.unique(clusters))} clusters of {np.bincount(clusters).min()} pictures and more")
    return train_and_validate(stage, data, device, report)
