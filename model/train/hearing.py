"""Hearing: the text input layers learn other words for what captions say, and to ignore what no picture shows.

A network pretrained without such words takes every strange one as meaningful: "a rusty bicycle by the sea" gets
neither. Here captions are put in other words (`thesaurus.py`) and wrapped in strange ones (`strangers.py`), and only
the text input layers are trained, so that the frozen rest answers such a caption as it answers the plain one. Most
captions pass through the text input layers only: with one phrase in other words, or one of strange words inserted,
their output is to be that of the plain ones. No picture is learned, and the same change works for a distilled
checkpoint (`stage = "merge"` with weights).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.latents import patchify, token_grid
from model.text_encoder import SUFFIX_TOKENS
from model.train import loop, pretrain
from model.train.data import Item, fingerprint, stable_seed
from model.train.loop import Batch, Report
from model.train.pretrain import TrainedModel
from model.train.recipe import check_at_least, check_share, reject
from model.train.rollout import add_noise, append_rows, conditioned_velocity
from model.train.states import RUNS
from model.train.thesaurus import pick_one
from model.train.training_set import TrainingSet, load_training_set

TRAINED_PREFIXES = ("dit.txtfusion.", "dit.txtmlp.")


@dataclass(frozen=True, kw_only=True)
class Recipe(pretrain.Recipe):
    """The recipe of a run that makes a checkpoint understand more words."""

    stage: str = "hearing"
    teacher: str = "box"  # a run, or the bundled Raw weights; also the start
    reworded: float = 0.5
    strangers: float = 0.6  # captions that get neither are to keep their meaning
    whole: int = 4  # one in so many steps also goes through the whole network
    swapped: int = 256  # captions of a step that go through the text input layers only
    plain: float = 0.0  # share of those that stay unchanged
    inserted: float = 0.5  # share of the others that get strange words; the rest get a phrase in other words
    pool: int = 80  # batches of captions that go through the text input layers only
    swap: float = 1.0  # weight of the error in those
    repeats: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        reject(self, "style_loss", "frozen", "align", "recompute", "products", "repeats", "two")
        check_at_least(self, 1, "whole", "swapped", "pool")
        check_at_least(self, 0, "swap")
        check_share(self, "plain", "inserted")


class HearingStage(pretrain.RenderingStage):
    """The text input layers learn from the whole network as it was."""

    recipe: Recipe
    model: TrainedModel

    def __init__(self, recipe: Recipe, data: TrainingSet | None, teacher: TrainedModel, looks: int):
        torch.manual_seed(recipe.seed)
        self.recipe, self.set, self.teacher = recipe, data, teacher.eval()
        self.frozen = teacher.dit
        self.model = TrainedModel(recipe.config, looks)
        self.model.load_state_dict(teacher.state_dict())
        self.swap_batches: dict[int, Batch] = {}
        if data is not None:
            self.data = fingerprint(data.catalog)
            self.model.dit.side = teacher.dit.side = data.side
            self.items_by_subject: dict[str, list[Item]] = defaultdict(list)
            for item in data.items:
                self.items_by_subject[item.pair.subject].append(item)

    def batch(self, step: int, part: int = 0) -> Batch:
        number = (step * self.recipe.accumulate + part) % self.recipe.pool
        if number not in self.swap_batches:
            self.swap_batches[number] = self.swaps(number)
        swaps = self.swap_batches[number]
        return swaps if step % self.recipe.whole else swaps | self.reworded_batch(step, part)

    def reworded_batch(self, step: int, part: int) -> Batch:
        """Pictures, their captions, and the same in other words and among strange ones."""
        assert self.set is not None
        recipe, wording = self.recipe, self.set.wording
        batch = self.set.batch(replace(recipe, reworded=0.0, strangers=0.0), step, part)
        rng = np.random.default_rng(stable_seed(recipe.seed, "wild", step, part))
        captions = [
            wording.say(caption, subject, recipe.reworded, recipe.strangers, rng)
            for caption, subject in zip(batch["captions"], batch["subjects"], strict=True)
        ]
        rows = self.model.style.config.rows if batch["references"] is not None else 0
        embeds, mask = self.set.embed(captions, rows)
        return batch | {"wild": embeds, "wild_mask": mask}

    @torch.no_grad()
    def swaps(self, number: int) -> Batch:
        """Captions with one phrase in other words or one inserted, and the teacher's text output for the plain ones.

        Subjects come as often as they have other names. There are `pool` such batches, so that the text encoder runs
        only once for each.
        """
        assert self.set is not None
        catalog, text, wording = self.set.catalog, self.set.text, self.set.wording
        thesaurus = wording.thesaurus
        rng = np.random.default_rng(stable_seed(self.recipe.seed, "swaps", number))
        named = [subject for subject in self.items_by_subject for _ in thesaurus.taught_names(subject)]
        items = [pick_one(self.items_by_subject[pick_one(named, rng)], rng) for _ in range(self.recipe.swapped)]
        form = "short" if number % 4 else "medium"  # of a batch: rows are padded to the longest
        plain = [catalog.caption(item, rng, form) for item in items]
        reworded = []
        for caption, item in zip(plain, items, strict=True):
            subject = catalog.subjects[item.pair.subject]
            if rng.random() < self.recipe.plain:
                reworded.append(caption)
            elif rng.random() < self.recipe.inserted:
                reworded.append(wording.strange_words.insert(caption, subject.words, rng))
            else:
                reworded.append(thesaurus.swap(caption, subject, rng))
        embeds, mask = self.set.embed(reworded)
        target, target_mask = self.set.embed(plain)
        maps = torch.zeros(len(reworded), mask.shape[1], target_mask.shape[1], device=mask.device)
        for each, *captions in zip(maps, reworded, plain, strict=True):
            aligned = align(*map(text.token_ids, captions))
            each[: len(aligned), : aligned.shape[1]] = aligned
        return {"said": embeds, "said_mask": mask, "meant": maps @ self.teacher.dit.encode_text(target, target_mask)}

    def pictures(self) -> float:
        return self.recipe.batch / self.recipe.whole

    def rate(self, name: str) -> float:
        return float(name.startswith(TRAINED_PREFIXES))

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Any]]:
        device = self.model.look_head.weight.device
        tensors = {k: v.to(device) for k, v in batch.items() if isinstance(v, Tensor)}
        real, meant = tensors["said_mask"], tensors["meant"]
        error = (self.model.dit.encode_text(tensors["said"], real) - meant)[real].square().mean()
        swapped = error / meant[real].square().mean()
        figures = {"swapped": swapped.detach()}
        if "latents" not in batch:
            return self.recipe.swap * swapped, figures
        picture_loss, more = self.output_loss(tensors, batch["generator"])
        return picture_loss + self.recipe.swap * swapped, figures | more

    def output_loss(self, tensors: dict[str, Tensor], generator: torch.Generator) -> tuple[Tensor, dict[str, Any]]:
        """How far the network's output for captions as people say them is from the teacher's for the plain ones."""
        patch = self.recipe.config.patch
        image, grid = patchify(tensors["latents"], patch), token_grid(tensors["latents"], patch)
        plain, plain_mask, wild, wild_mask = (tensors[k] for k in ("embeds", "mask", "wild", "wild_mask"))
        references = tensors.get("references")
        if references is not None:
            with torch.no_grad():
                rows = self.teacher.style(references)[0]
            rows = torch.where(tensors["null"][:, None, None, None], self.teacher.style.null, rows)
            (plain, plain_mask), (wild, wild_mask) = (
                append_rows(embeds, mask, rows) for embeds, mask in ((plain, plain_mask), (wild, wild_mask))
            )
        x, _, sigma = add_noise(image, self.recipe.mu, generator)
        with torch.no_grad():
            target = conditioned_velocity(self.teacher.dit, plain, plain_mask, grid)(x, sigma)
        off = (conditioned_velocity(self.model.dit, wild, wild_mask, grid)(x, sigma) - target).square().mean((1, 2))
        share = off.detach().mean() / target.square().mean()
        return off.mean(), {"share": share, "high": off.detach()[sigma > 0.7].mean()}


def align(tokens: Sequence[int], plain_tokens: Sequence[int]) -> Tensor:
    """Tokens of a caption in other words, and of the plain one -> [said, meant], which rows are to become which.

    A common start and end map row by row. Each row between is to become the mean of the rows between; inserted words
    are to become what they are inserted before, and words at the end what they follow.
    """
    shorter = min(len(tokens), len(plain_tokens))
    first = next((i for i in range(shorter) if tokens[i] != plain_tokens[i]), shorter)
    last = next((i for i in range(shorter - first) if tokens[-1 - i] != plain_tokens[-1 - i]), shorter - first)
    if first + last == len(plain_tokens) < len(tokens):
        first, last = (first, last - 1) if last > SUFFIX_TOKENS else (first - 1, last)
    maps = torch.zeros(len(tokens), len(plain_tokens))
    maps[:first, :first].fill_diagonal_(1)
    maps[len(tokens) - last :, len(plain_tokens) - last :].fill_diagonal_(1)
    rows, columns = slice(first, len(tokens) - last), slice(first, len(plain_tokens) - last)
    between = maps[rows, columns]
    if between.shape[0] == between.shape[1]:
        between.fill_diagonal_(1)
    elif between.numel():
        between.fill_(1 / between.shape[1])
    return maps


def main(recipe: Recipe, device: str = "cpu", report: Report = print) -> loop.Run:
    """Run it to its end from where it stands."""
    data = load_training_set(recipe, device)
    teacher = pretrain.load_teacher(recipe, recipe.teacher, len(data.looks), device)
    run = loop.Run(HearingStage(recipe, data, teacher, len(data.looks)), RUNS / recipe.name, device)
    report(f"{recipe.name}: from step {run.step}")
    return loop.train(run, report)
