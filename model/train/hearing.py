"""Hearing: the text's way in learns what people say for what captions say, and to leave aside what no picture shows.

A network that was pretrained without them takes every strange word for news: "a rusty bicycle by the sea" gets neither.
Here captions are said in other words (`thesaurus.py`) and wrapped in strange ones (`strangers.py`), and only the text's
way in is trained, for the frozen rest to say of such a caption what it says of the plain one. Many more captions go
no further than the way in: with one phrase in other words, they are to leave it as the plain ones do. No picture is
learned, and a distilled checkpoint hears as well by the same change (`stage = "merge"` with weights).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from model.latents import patchify
from model.text_encoder import SUFFIX_TOKENS
from model.train import loop, pretrain
from model.train.loop import RUNS, Batch, Report
from model.train.pretrain import Trainee, TrainingSet, training_set
from model.train.rollout import conditioned, noise_levels

TRAINED = ("dit.txtfusion.", "dit.txtmlp.")


@dataclass(frozen=True, kw_only=True)
class Recipe(pretrain.Recipe):
    """A run that makes a checkpoint hear better, as its TOML file says it."""

    stage: str = "hearing"
    teacher: str = "box"  # a run, or the package's Raw weights; where it starts from, too
    reworded: float = 0.5
    strangers: float = 0.6  # captions that get neither are to stay what they are
    swapped: int = 128  # captions of a step that go through the way in only
    swap: float = 1.0  # weight of what is off in those
    repeats: int = 1


class Hearing(loop.Stage):
    """The text's way in learns from the whole network as it was."""

    recipe: Recipe
    model: Trainee

    def __init__(self, recipe: Recipe, data: TrainingSet | None, teacher: Trainee, looks: int):
        torch.manual_seed(recipe.seed)
        self.recipe, self.set, self.teacher = recipe, data, teacher.eval()
        self.frozen = teacher.dit
        self.model = Trainee(recipe.config, looks)
        self.model.load_state_dict(teacher.state_dict())
        if data is not None:
            self.data = pretrain.fingerprint(data.catalog)

    def batch(self, step: int, part: int = 0) -> Batch:
        assert self.set is not None
        recipe, wording = self.recipe, self.set.wording
        batch = self.set.batch(replace(recipe, reworded=0.0, strangers=0.0), step, part)
        rng = np.random.default_rng(pretrain.stable_seed(recipe.seed, "wild", step, part))
        captions = [
            wording.say(caption, subject, recipe.reworded, recipe.strangers, rng)
            for caption, subject in zip(batch["captions"], batch["subjects"], strict=True)
        ]
        rows = self.model.style.config.rows if batch["references"] is not None else 0
        embeds, mask = self.set.embed(captions, rows)
        return batch | {"wild": embeds, "wild_mask": mask} | self.swaps(rng)

    def swaps(self, rng: np.random.Generator) -> Batch:
        """Captions, the same with one phrase in other words, and which rows of those have which of these to become."""
        assert self.set is not None
        catalog, text = self.set.catalog, self.set.text
        items = [self.set.items[i] for i in rng.choice(len(self.set.items), self.recipe.swapped, p=self.set.weights)]
        meant = [catalog.caption(item, rng, str(rng.choice(("short", "medium")))) for item in items]
        said = [
            self.set.wording.thesaurus.swap(caption, catalog.subjects[item.pair.subject], rng)
            for caption, item in zip(meant, items, strict=True)
        ]
        embeds, mask = self.set.embed(said)
        target, target_mask = self.set.embed(meant)
        maps = torch.zeros(len(said), mask.shape[1], target_mask.shape[1])
        for each, *captions in zip(maps, said, meant, strict=True):
            aligned = align(*map(text.token_ids, captions))
            each[: len(aligned), : aligned.shape[1]] = aligned
        return {"said": embeds, "said_mask": mask, "meant": target, "meant_mask": target_mask, "maps": maps}

    def rate(self, name: str) -> float:
        return float(name.startswith(TRAINED))

    def muon(self, name: str, param: Tensor) -> bool:
        return param.ndim == 2 and min(param.shape) > 1

    def pictures(self) -> int:
        return self.recipe.batch

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Any]]:
        generator, device = batch["generator"], self.model.look_head.weight.device
        tensors = {k: v.to(device) for k, v in batch.items() if isinstance(v, Tensor)}
        image = patchify(tensors["latents"], self.recipe.config.patch)
        grid = (tensors["latents"].shape[-1] // self.recipe.config.patch,) * 2
        plain, plain_mask, wild, wild_mask = (tensors[k] for k in ("embeds", "mask", "wild", "wild_mask"))
        if "references" in tensors:
            with torch.no_grad():
                rows = self.teacher.style(tensors["references"])[0]
            rows = torch.where(tensors["null"][:, None, None, None], self.teacher.style.null, rows)
            plain, wild = torch.cat((plain, rows), 1), torch.cat((wild, rows), 1)
            plain_mask, wild_mask = (F.pad(each, (0, rows.shape[1]), value=True) for each in (plain_mask, wild_mask))
        noise = torch.randn(image.shape, generator=generator, device=generator.device).to(device)
        sigma = noise_levels(len(image), self.recipe.mu, generator).to(device)
        x = torch.lerp(image, noise, sigma[:, None, None])
        with torch.no_grad():
            target = conditioned(self.teacher.dit, plain, plain_mask, grid)(x, sigma)
            meant = tensors["maps"] @ self.teacher.dit.encode_text(tensors["meant"], tensors["meant_mask"])
        off = (conditioned(self.model.dit, wild, wild_mask, grid)(x, sigma) - target).square().mean((1, 2))
        share = off.detach().mean() / target.square().mean()
        said, real = self.model.dit.encode_text(tensors["said"], tensors["said_mask"]), tensors["maps"].any(-1)
        swapped = (said - meant)[real].square().mean() / meant[real].square().mean()
        figures = {"share": share, "high": off.detach()[sigma > 0.7].mean(), "swapped": swapped.detach()}
        return off.mean() + self.recipe.swap * swapped, figures


def align(said: Sequence[int], meant: Sequence[int]) -> Tensor:
    """Tokens of a caption in other words, and of the plain one -> [said, meant], which rows are to become which.

    What both begin and end with is the same, row by row. Each row between is to become the mean of those between; words
    that are put in are to become what they are put before, and words at the end what they are put behind.
    """
    shorter = min(len(said), len(meant))
    first = next((i for i in range(shorter) if said[i] != meant[i]), shorter)
    last = next((i for i in range(shorter - first) if said[-1 - i] != meant[-1 - i]), shorter - first)
    if first + last == len(meant) < len(said):
        first, last = (first, last - 1) if last > SUFFIX_TOKENS else (first - 1, last)
    maps = torch.zeros(len(said), len(meant))
    maps[:first, :first].fill_diagonal_(1)
    maps[len(said) - last :, len(meant) - last :].fill_diagonal_(1)
    ours, theirs = slice(first, len(said) - last), slice(first, len(meant) - last)
    between = maps[ours, theirs]
    if between.shape[0] == between.shape[1]:
        between.fill_diagonal_(1)
    elif between.numel():
        between.fill_(1 / between.shape[1])
    return maps


def main(recipe: Recipe, device: str = "cpu", report: Report = print) -> loop.Run:
    """Run it to its end, from where it stands."""
    data = training_set(recipe, device)
    teacher = Trainee(recipe.config, len(data.looks)).to(device)
    loop.start(teacher, loop.parent(recipe.teacher, RUNS))
    run = loop.Run(Hearing(recipe, data, teacher, len(data.looks)), RUNS / recipe.name, device)
    report(f"{recipe.name}: from step {run.step}")
    return loop.train(run, report)
