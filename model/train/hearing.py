"""Hearing: the text's way in learns to leave aside what no picture shows.

Captions come from a few rules, so a network that has seen nothing else takes every strange word for news: "a rusty
bicycle by the sea" gets neither. Here captions are wrapped in such words (`wild`), and only the text's way in is
trained, for the frozen rest to say of the wrapped caption what it says of the plain one. No new picture is learned, and
a distilled checkpoint hears as well by the same change (`stage = "merge"` with weights).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from model.latents import patchify
from model.train import loop, pretrain
from model.train.looks import DRAWINGS, MEDIA, PALETTES
from model.train.loop import RUNS, Batch, Report
from model.train.phrases import PARTS, teacher_words
from model.train.pretrain import Trainee, TrainingSet, training_set
from model.train.rollout import conditioned, noise_levels

TRAINED = ("dit.txtfusion.", "dit.txtmlp.")
FRAMES = (  # what prompts are wrapped in besides
    *("a photo of {}", "a picture of {}", "an image of {}", "a drawing of {}", "an illustration of {}", "{}, close up"),
    *("a portrait of {}", "{}, highly detailed", "{}, simple and clean", "{}, award winning", "beautiful {}", "{} art"),
    *("{}, centred", "{}, front view", "{}, side view", "a study of {}", "a render of {}", "{}, soft light", "my {}"),
    *("{}, dramatic", "{}, professional", "{}, 4k", "{}, in the style of a master", "one single {}", "detail of {}"),
)


def known_words() -> set[str]:
    """Words that captions use for looks: they are news indeed."""
    told = [*DRAWINGS.values(), *MEDIA.values(), *PALETTES]
    phrases = [phrase for each in told for phrase in ([each] if isinstance(each, str) else each)]
    words = {word for phrase in [*phrases, *PARTS["colours"]] for word in phrase.replace("-", " ").lower().split()}
    return {word for word in words if len(word) > 3 or word == "ink"}


class Wilderness:
    """Words around captions that say nothing a picture could show."""

    def __init__(self, subjects: Sequence[str], common: int = 6000):
        named = {word for name in subjects for word in name.split() if len(word) > 2} - {"the"}
        known = known_words() | named | {"background", "black", "dark"}

        def strange(part: str) -> bool:
            return "{" not in part and not known & set(part.replace("-", " ").split())

        self.qualities = [each for each in PARTS["qualities"] if strange(each)]
        self.doings = [each for each in PARTS["doings"] if strange(each)]
        self.places = [each for each in PARTS["grounds"] if strange(each)]
        self.words = [each for each in teacher_words()[:common] if len(each) > 3 and strange(each)]

    def wild(self, caption: str, names: Sequence[str], rng: np.random.Generator) -> str:
        """A caption among strange words; `names` are those of its subject."""
        name = next((each for each in sorted(names, key=len, reverse=True) if each in caption), None)
        if name is None:
            return caption

        def one(of: Sequence[str]) -> str:
            return of[int(rng.integers(len(of)))]

        def phrase() -> str:
            """A place, or strange words behind a preposition."""
            if rng.random() < 0.5:
                return one(self.places)
            return " ".join((one(("in", "on", "at", "near", "with", "from", "of", "under")), *some(1, 4)))

        def some(least: int, most: int) -> list[str]:
            return [one(self.words) for _ in range(int(rng.integers(least, most)))]

        before = [one(self.qualities)] * int(rng.random() < 0.5) + some(0, 3) * int(rng.random() < 0.6)
        after = [one(self.doings)] * int(rng.random() < 0.3) + [phrase()] * int(rng.random() < 0.4)
        head, *parts = caption.replace(name, " ".join((*before, name, *after)), 1).split(", ")
        if rng.random() < 0.3:
            head = head.removeprefix("an ").removeprefix("a ")
        if rng.random() < 0.4:
            head = one(FRAMES).format(head)
        for _ in range(int(rng.integers(0, 3))):
            extra = phrase() if rng.random() < 0.5 else " ".join(some(1, 4))
            parts.insert(int(rng.integers(len(parts) + 1)), extra)
        whole = [head, *parts]
        if rng.random() < 0.25:
            whole = [whole[i] for i in rng.permutation(len(whole))]
        return ", ".join(whole)


@dataclass(frozen=True, kw_only=True)
class Recipe(pretrain.Recipe):
    """A run that makes a checkpoint hear better, as its TOML file says it."""

    stage: str = "hearing"
    teacher: str = "box"  # a run, or the package's Raw weights; where it starts from, too
    wild: float = 0.75  # share of the captions among strange words; the others are to stay what they are
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
            self.wilderness = Wilderness(list(data.catalog.subjects))

    def batch(self, step: int, part: int = 0) -> Batch:
        assert self.set is not None
        batch = self.set.batch(self.recipe, step, part)
        rng = np.random.default_rng(pretrain.stable_seed(self.recipe.seed, "wild", step, part))
        subjects = self.set.catalog.subjects
        captions = [
            self.wilderness.wild(caption, subjects[subject].words, rng) if rng.random() < self.recipe.wild else caption
            for caption, subject in zip(batch["captions"], batch["subjects"], strict=True)
        ]
        rows = self.model.style.config.rows if batch["references"] is not None else 0
        embeds, mask = self.set.embed(captions, rows)
        return batch | {"wild": embeds, "wild_mask": mask}

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
        off = (conditioned(self.model.dit, wild, wild_mask, grid)(x, sigma) - target).square().mean((1, 2))
        share = off.detach().mean() / target.square().mean()
        return off.mean(), {"share": share, "high": off.detach()[sigma > 0.7].mean()}


def main(recipe: Recipe, device: str = "cpu", report: Report = print) -> loop.Run:
    """Run it to its end, from where it stands."""
    data = training_set(recipe, device)
    teacher = Trainee(recipe.config, len(data.looks)).to(device)
    loop.start(teacher, loop.parent(recipe.teacher, RUNS))
    run = loop.Run(Hearing(recipe, data, teacher, len(data.looks)), RUNS / recipe.name, device)
    report(f"{recipe.name}: from step {run.step}")
    return loop.train(run, report)
