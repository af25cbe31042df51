"""Merging checkpoints: θ = Σ w_i θ_i, of runs with weights by validation or stated, or of a run's last snapshots.

The first makes one checkpoint of runs fine-tuned from one parent on different domains. With stated weights, what one
run learned is carried over to another (task arithmetic, arXiv 2212.04089): a Turbo of an earlier Raw, plus the later
Raw, minus the earlier one, is a Turbo of the later. The last is PMA (arXiv 2505.12082): the plain mean of the last
snapshots of the stable phase, instead of a running average.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from model.checkpoint import read
from model.errors import K2Error, listed
from model.library import BUNDLED
from model.train import states
from model.train.loop import Report
from model.train.recipe import Table, check_at_least, reject, saved_recipe
from model.train.states import RUNS

State = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Recipe(Table):
    """A merge: of several runs, or of one run's snapshots."""

    stage: str = "merge"
    runs: tuple[str, ...] = ()  # whose averaged weights are merged; with weights also "box", "turbo": the bundled ones
    weights: tuple[float, ...] = ()  # one for each; default: chosen by validation
    snapshots: str = ""  # a run whose snapshots are averaged instead
    divisions: int = 4  # weights are tried in steps of 1 / divisions
    pictures: int = 128  # to validate on

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.snapshots) == bool(self.runs):
            raise K2Error(f'Recipe "{self.name}" must name either runs or a run\'s snapshots.')
        if self.weights and len(self.weights) != len(self.runs):
            raise K2Error(f'Recipe "{self.name}" states {len(self.weights)} weights for {len(self.runs)} runs.')
        if self.name in (*self.runs, self.snapshots):
            raise K2Error(
                f'Recipe "{self.name}" would overwrite the run "{self.name}", which it merges.',
                hint="Give the merge another name.",
            )
        if self.weights or self.snapshots:  # nothing is searched for
            reject(self, "divisions", to="weights that are known")
        if self.weights:
            reject(self, "pictures", to="weights that are stated")
        check_at_least(self, 1, "divisions", "pictures")


def combine(states: Sequence[State], weights: Sequence[float]) -> dict[str, Tensor]:
    """Σ w_i θ_i, summed in fp64; tensors that are not floating point are the first state's. All have the same names."""
    if lacking := set().union(*states) - set(states[0]).intersection(*states):
        hint = "A Turbo has no style encoder: set weights, and name it first."
        raise K2Error(f"Checkpoints cannot be merged if one lacks {listed(sorted(lacking), 3)}.", hint=hint)
    merged = {}
    for name, first in states[0].items():
        if len({state[name].shape for state in states}) > 1:
            raise K2Error(f"Checkpoints whose {name} have different shapes cannot be merged.")
        if first.is_floating_point():
            parts = [weight * state[name].double() for state, weight in zip(states, weights, strict=True)]
            merged[name] = torch.stack(parts).sum(0).to(first.dtype)
        else:
            merged[name] = first.clone()
    return merged


def simplex_grid(count: int, divisions: int) -> list[tuple[float, ...]]:
    """Weights that sum to 1 in steps of 1 / divisions, each parent alone and the plain mean among them."""
    grid = [
        tuple(part / divisions for part in parts)
        for parts in product(range(divisions + 1), repeat=count)
        if sum(parts) == divisions
    ]
    mean = (1 / count,) * count
    return grid if mean in grid else [*grid, mean]


def best_weights(
    states: Sequence[State], score: Callable[[State], float], divisions: int
) -> tuple[tuple[float, ...], float, dict[tuple[float, ...], float]]:
    """The weights with the lowest score, that score, and all scores by weights."""
    scores = {weights: score(combine(states, weights)) for weights in simplex_grid(len(states), divisions)}
    best = min(scores, key=lambda weights: scores[weights])
    return best, scores[best], scores


def weighted_mean(recipe: Recipe, parent: Any, paths: Sequence[Path], device: str) -> tuple[State, dict[str, Any]]:
    """The mean of a run's snapshots, or of runs by weights that are stated or validate best, and figures."""
    if recipe.weights:
        parents = [states.parent_weights(name, RUNS) for name in recipe.runs]
        shared_names = {name for name in parents[0] if name.startswith("style.")}  # a Turbo has a transformer alone
        shared_names |= {name for state in parents for name in state if name.startswith("dit.")}
        shared_names |= set(parents[0]).intersection(*parents)  # of training parts, like a fake score, what all have
        comparable = [{name: tensor for name, tensor in state.items() if name in shared_names} for state in parents]
        return combine(comparable, recipe.weights), {"weights": dict(zip(recipe.runs, recipe.weights, strict=True))}

    from model.train.pretrain import TrainedModel
    from model.train.training_set import load_training_set
    from model.train.validation import validation_loss

    data = load_training_set(parent, device)
    model = TrainedModel(parent.config, len(data.looks)).to(device)
    names = set(model.state_dict())

    def score(state: State) -> float:
        if not names <= state.keys():  # a Turbo has a transformer alone
            raise K2Error("The merged runs have no style encoder to validate with.", hint="Set weights for the runs.")
        model.load_state_dict({name: tensor for name, tensor in state.items() if name in names})
        return validation_loss(model, data, parent, recipe.pictures)

    if recipe.snapshots:
        kept = states.snapshots(RUNS / recipe.snapshots)
        if not kept:
            raise K2Error(
                f'The run "{recipe.snapshots}" kept no snapshots.', hint="Set keep and keep_every in its recipe."
            )
        weights = [load_file(path) for path in kept]
        merged = combine(weights, [1 / len(weights)] * len(weights))
        mean, ema, last = score(merged), score(states.averaged_weights(paths[0])), score(weights[-1])
        return merged, {"mean": mean, "ema": ema, "last": last, "snapshots": len(kept)}
    averages = [states.averaged_weights(path) for path in paths]
    comparable = [{name: tensor for name, tensor in state.items() if name in names} for state in averages]
    count = len(comparable)
    best, value, scores = best_weights(comparable, score, recipe.divisions)
    single_scores = {name: scores[tuple(float(i == k) for k in range(count))] for i, name in enumerate(recipe.runs)}
    return combine(comparable, best), {
        "weights": dict(zip(recipe.runs, best, strict=True)),
        "validation": value,
        "alone": single_scores,
        "mean": scores[(1 / count,) * count],
    }


def bundled_progress(name: str) -> dict[str, Any]:
    """The progress of the run that the bundled weights come from."""
    training = read(BUNDLED / f"mini-{states.BUNDLED_VARIANTS[name]}.safetensors")[1]["training"]
    return {"step": training["steps"], "seconds": 60 * training["minutes"], "recipe": training["recipe"]}


def main(recipe: Recipe, device: str = "cpu", report: Report = print) -> Any:
    """Merge, and leave the result as a run that others can start from and that can be released."""
    from model.train import pretrain

    parents = list(recipe.runs) or [recipe.snapshots]
    paths = [RUNS / name / "state.safetensors" for name in parents]
    for name, path in zip(parents, paths, strict=True):
        if not (path.exists() or (name in states.BUNDLED_VARIANTS and recipe.weights)):
            raise K2Error(f'There is no run "{name}" to merge.', hint=f"{path} does not exist: train that run first.")
    all_progress = [
        bundled_progress(name) if name in states.BUNDLED_VARIANTS else states.read_progress(path)
        for name, path in zip(parents, paths, strict=True)
    ]
    for name, each in zip(parents, all_progress, strict=True):
        if not isinstance(saved_recipe(each["recipe"]), pretrain.Recipe):
            hint = "A LoRA, an encoder or a judge cannot be merged."
            raise K2Error(f'The run "{name}" has no transformer: its stage is "{each["recipe"]["stage"]}".', hint=hint)
    shapes = max((tuple(each["recipe"].get("shapes", ())) for each in all_progress), key=len)  # one has, all have
    parent = replace(saved_recipe(all_progress[0]["recipe"]), shapes=shapes)
    merged, figures = weighted_mean(recipe, parent, paths, device)
    report(f"{recipe.name}: {figures}")
    folder = RUNS / recipe.name
    progress = {
        "step": max(each["step"] for each in all_progress),
        "seconds": sum(each["seconds"] for each in all_progress),
        "recipe": asdict(replace(parent, name=recipe.name, init=parents[0])),
        "layout": {},  # averages only: no run resumes from them
    }
    record = {
        "recipe": asdict(recipe),
        "parents": [each["recipe"] for each in all_progress],
        "commit": states.code_commit(),
    }
    states.write_state(
        folder, {f"ema.{name}": tensor for name, tensor in merged.items()}, progress, record | {"figures": figures}
    )
    return SimpleNamespace(folder=folder, result=folder / "state.safetensors", figures=figures)
