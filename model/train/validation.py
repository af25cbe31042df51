"""The validation set that makes every stage after pretraining comparable: a twentieth of the train split.

`train_and_validate` runs a stage whose final figure is its loss there.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
from numpy.typing import NDArray

from model.errors import K2Error
from model.plan import native_bf16
from model.train import loop, pretrain
from model.train.data import Item, stable_seed
from model.train.loop import Report
from model.train.pretrain import PretrainStage, TrainedModel
from model.train.states import RUNS
from model.train.training_set import TrainingSet

VALIDATION_PICTURES = 128  # that a finished stage is validated on


def is_validation(item: Item) -> bool:
    """Whether every stage after pretraining keeps a picture of the train split for validation."""
    return stable_seed("validation", item.pair, item.look) % 20 == 0


def restrict(data: TrainingSet, keep: NDArray[np.bool_]) -> None:
    """Draw only from these pictures, at their previous odds."""
    weights = data.weights * keep
    if not (weights.any() and all(weights[shaped.indices].any() for shaped in data.shape_subsets)):
        hint = "Widen the recipe's domain, or name fewer shapes."
        raise K2Error("No picture of the data set, or of one of its shapes, is left to train on.", hint=hint)
    data.weights = weights / weights.sum()


def hold_out(data: TrainingSet) -> None:
    """Exclude the validation pictures from training."""
    restrict(data, np.array([not is_validation(item) for item in data.items]))


@torch.no_grad()
def validation_loss(model: TrainedModel, data: TrainingSet, recipe: pretrain.Recipe, pictures: int) -> float:
    """Flow loss on validation pictures, without references, at noise that is always the same."""
    held_out = copy.copy(data)
    held_out.weights = np.array([float(is_validation(item)) for item in data.items])
    held_out.weights /= held_out.weights.sum()
    batch = min(16, pictures)
    fixed = pretrain.Recipe(
        name="validation", steps=1, lr=0.0, muon_lr=0.0, size=recipe.size, mu=recipe.mu, batch=batch, repeats=2,
        references=0.0, seed=0,
    )  # fmt: skip
    device = model.look_head.weight.device
    losses = []
    for index in range(-(-pictures // batch)):
        part = held_out.batch(fixed, index)  # outside of autocast, as the loop's are: features are kept
        with torch.autocast(device.type, torch.bfloat16, enabled=native_bf16(device)):
            losses.append(model.losses(part, fixed)[0])
    return float(torch.cat(losses).mean())


def train_and_validate(stage: PretrainStage, data: TrainingSet, device: str, report: Report) -> loop.Run:
    """Run a stage to its end from where it stands, and validate its averages, which other stages start from."""
    recipe = stage.recipe
    run = loop.train(loop.Run(stage, RUNS / recipe.name, device), report)
    if run.idle and "validation" in run.figures:
        return run
    with run.averaged():
        run.figures["validation"] = validation_loss(stage.model, data, recipe, VALIDATION_PICTURES)
    run.save(last=True)
    report(f"{recipe.name}: validation {run.figures['validation']:.4f}")
    return run
