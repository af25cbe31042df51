"""Judges: small image-text dual encoders that read a picture's subject and look, and a critic of broken pictures.

A judge is trained only on real pictures of the data set, with its own split and seed. The evaluation judge is never
used as a reward; its figures are always given beside those of real pictures. A judge's critic learns to tell real
pictures from the same ones broken by rule: doubled, melted, patched, torn, speckled. `k2 train` on a recipe of the
stage `judge` trains both, as does `python -m model.train.judge SEED MINUTES [SIZE]`.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from model.checkpoint import read, save
from model.errors import exit_on_error
from model.references import from_bytes
from model.train import data, loop
from model.train import recipe as recipes
from model.train.data import DATA, Catalog, Item, fingerprint, stable_seed
from model.train.encode import cached_catalog
from model.train.looks import resize
from model.train.loop import Batch, Report
from model.train.states import RUNS

SIZE = 64  # px of a judge's input


@dataclass(frozen=True, kw_only=True)
class Recipe(recipes.Recipe):
    """A run that trains a judge; its seed also defines its split."""

    stage: str = "judge"
    batch: int = 64
    size: int = data.NATIVE  # px of the pictures before downscaling: that of the checkpoints to be judged

    def __post_init__(self) -> None:
        super().__post_init__()
        recipes.reject(self, "average")
        recipes.check_at_least(self, 1, "batch", "size")


@dataclass(frozen=True)
class JudgeConfig:
    words: tuple[str, ...]  # vocabulary of the text side
    subject: int = 96  # dimensions of the subject embedding
    style: int = 48


class ConvBlock(nn.Module):
    def __init__(self, channels_in: int, width: int):
        super().__init__()
        self.down = nn.Conv2d(channels_in, width, 3, stride=2, padding=1)
        self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.down(x)))
        return F.relu(x + self.norm2(self.conv(x)))


class Judge(nn.Module):
    """Embeds pictures and words in one space for subjects, and pictures in a second one for looks."""

    def __init__(self, config: JudgeConfig):
        super().__init__()
        self.config = config
        self.trunk = nn.Sequential(*(ConvBlock(a, b) for a, b in ((3, 32), (32, 64), (64, 128), (128, 192))))
        self.style_trunk = ConvBlock(64, 96)
        self.to_subject = nn.Linear(192 * 16, config.subject)
        self.to_style = nn.Linear(2 * (64 + 96), config.style)
        self.word = nn.EmbeddingBag(len(config.words) + 1, 128, mode="sum")
        self.to_text = nn.Sequential(nn.Linear(128, 192), nn.ReLU(), nn.Linear(192, config.subject))
        self.index = {word: i + 1 for i, word in enumerate(config.words)}

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """pictures [B, 3, 64, 64] in -1 ... 1 -> unit subject embeddings [B, 96], unit style embeddings [B, 48]."""
        fine = self.trunk[:2](pictures)
        subject = self.to_subject(self.trunk[2:](fine).flatten(1))
        statistics = [s for x in (fine, self.style_trunk(fine)) for s in (x.mean((2, 3)), x.std((2, 3)))]
        return F.normalize(subject, dim=-1), F.normalize(self.to_style(torch.cat(statistics, 1)), dim=-1)

    def read(self, phrases: Sequence[str]) -> Tensor:
        """Phrases -> unit subject embeddings [P, 96]; words outside the vocabulary are ignored."""
        bags = [[self.index.get(word, 0) for word in split_words(phrase)] or [0] for phrase in phrases]
        device = self.word.weight.device
        offsets = torch.tensor([0, *np.cumsum([len(bag) for bag in bags])[:-1]], device=device)
        flat = torch.tensor([index for bag in bags for index in bag], device=device)
        return F.normalize(self.to_text(self.word(flat, offsets)), dim=-1)

    @classmethod
    def load(cls, path: Path) -> Judge:
        """A trained judge, for inference. Raises K2Error if the file cannot be read."""
        state, about = read(path)
        judge = cls(JudgeConfig(**about["config"] | {"words": tuple(about["config"]["words"])}))
        judge.load_state_dict(state)
        return judge.eval()


def split_words(phrase: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", phrase.lower())


def may_train_judge(item: Item, seed: int) -> bool:
    """Whether a judge with this seed may train on the item: nine in ten pictures, none held out from the generator."""
    return not item.held_out and stable_seed("judge", seed, item.pair, item.look) % 10 != 0


class Critic(nn.Module):
    """How intact a picture looks: a logit."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(*(ConvBlock(a, b) for a, b in ((3, 24), (24, 48), (48, 96))))
        self.head = nn.Linear(2 * 96, 1)

    def forward(self, pictures: Tensor) -> Tensor:
        """pictures [B, 3, 64, 64] in -1 ... 1 -> [B]."""
        x = self.trunk(pictures).flatten(2)
        return self.head(torch.cat((x.mean(-1), x.amax(-1)), 1))[:, 0]

    @classmethod
    def load(cls, path: Path) -> Critic:
        """As `Judge.load`."""
        critic = cls()
        critic.load_state_dict(read(path)[0])
        return critic.eval()


def damage(pictures: Tensor, rng: np.random.Generator) -> Tensor:
    """Each picture [B, 3, H, W] broken in one of five ways, none of which smooths its grain."""
    out = pictures.clone()
    side = pictures.shape[-1]
    for index, picture in enumerate(pictures):
        way = int(rng.integers(5))
        row, column = (int(n) for n in rng.integers(side // 8, side // 2, 2))
        size = int(rng.integers(side // 5, side // 2))
        window = (slice(None), slice(row, row + size), slice(column, column + size))
        if way == 0:  # doubled
            moved = torch.roll(picture, tuple(rng.choice([-9, -6, 6, 9], 2).tolist()), (1, 2))
            out[index] = torch.minimum(picture, moved) if rng.random() < 0.5 else torch.maximum(picture, moved)
        elif way == 1:  # melted
            waves = torch.from_numpy(rng.normal(0, 0.12, (1, 2, 5, 5))).float()
            bend = F.interpolate(waves, (side, side), mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
            grid = F.affine_grid(torch.eye(2, 3)[None], [1, 3, side, side], align_corners=True) + bend
            out[index] = F.grid_sample(picture[None], grid, "nearest", "border", align_corners=True)[0]
        elif way == 2:  # patched with another's piece
            out[index][window] = pictures[(index + 1) % len(pictures)][window]
        elif way == 3:  # torn in one place, row by row
            shifts = rng.integers(-5, 6, size).cumsum()
            for line, shift in enumerate(shifts.tolist(), row):
                out[index, :, line, window[2]] = torch.roll(picture[:, line], shift, 1)[:, window[2]]
        else:  # speckled on the decoder's grid
            dots = torch.from_numpy(rng.normal(0, 1, (1, 3, side // 4, side // 4))).float()
            out[index] += float(rng.uniform(0.1, 0.25)) * F.interpolate(dots, (side, side))[0]
    return out.clamp(-1, 1)


class JudgeStage(loop.Stage):
    """The stage: contrast pictures with all subjects' names, looks with all others, and intact with broken pictures."""

    def __init__(self, recipe: Recipe, catalog: Catalog):
        torch.manual_seed(recipe.seed)
        self.recipe: Recipe = recipe
        self.catalog = catalog
        self.data = fingerprint(catalog)
        self.items = [item for item in catalog.items("train") if may_train_judge(item, recipe.seed)]
        self.subjects = list(catalog.subjects.values())
        looks = sorted({item.look for item in self.items}, key=repr)
        self.subject_index = {subject.name: i for i, subject in enumerate(self.subjects)}
        self.look_index = {look: i for i, look in enumerate(looks)}
        words = tuple(sorted({w for s in self.subjects for name in s.words for w in split_words(name)}))
        judge = Judge(JudgeConfig(words))
        look_head = nn.Linear(judge.config.style, len(looks), bias=False)
        self.judge, self.look_head, self.critic = judge, look_head, Critic()
        self.model = nn.ModuleDict({"judge": judge, "look_head": look_head, "critic": self.critic})
        self.composed: dict[int, NDArray[np.uint8]] = {}  # pictures at a judge's size, by index

    def compose(self) -> None:
        """Compose all pictures at once, on all cores; otherwise each is composed when first drawn."""
        parts = [self.items[start : start + 256] for start in range(0, len(self.items), 256)]
        with ProcessPoolExecutor() as pool:
            made = pool.map(thumbnails, repeat(self.catalog.folder), repeat(self.recipe.size), parts)
            self.composed = dict(enumerate(picture for part in made for picture in part))

    def batch(self, step: int, part: int = 0) -> Batch:
        """Pictures, slightly shifted and tinted, intact and broken; and a name of each subject."""
        rng = np.random.default_rng(stable_seed(self.recipe.seed, "judge", step, part))
        chosen = rng.choice(len(self.items), min(self.recipe.batch, len(self.items)), replace=False)
        for index in chosen:
            if index not in self.composed:
                self.composed[index] = resize(self.catalog.picture(self.items[index]), SIZE)
        x = from_bytes(np.stack([self.composed[index] for index in chosen]))
        x = torch.roll(x, tuple(rng.integers(-3, 4, 2).tolist()), (2, 3))
        x = x * float(rng.uniform(0.9, 1.1)) + float(rng.uniform(-0.1, 0.1))
        x = x.clamp(-1, 1)  # as `damage` does: else the range of values gives them away
        soft = torch.from_numpy(rng.random((len(x), 1, 1, 1)) ** 2).float()  # as decoders do
        x = torch.lerp(x, F.avg_pool2d(x, 3, 1, 1, count_include_pad=False), soft)
        grain = torch.from_numpy(rng.normal(0, 0.04, tuple(x.shape))).float()
        return {
            "x": x + grain,
            "broken": damage(x, rng) + grain,
            "names": [str(rng.choice(subject.words)) for subject in self.subjects],
            "subjects": torch.tensor([self.subject_index[self.items[i].pair.subject] for i in chosen]),
            "looks": torch.tensor([self.look_index[self.items[i].look] for i in chosen]),
        }

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Any]]:
        subject, style = self.judge(batch["x"])
        logits = 16 * subject @ self.judge.read(batch["names"]).T
        by_look = 16 * F.linear(style, F.normalize(self.look_head.weight, dim=-1))
        intact, damaged = self.critic(torch.cat((batch["x"], batch["broken"]))).float().chunk(2)
        figures = {
            "subject": F.cross_entropy(logits.float(), batch["subjects"]),
            "style": F.cross_entropy(by_look.float(), batch["looks"]),
            "whole": (F.softplus(-intact) + F.softplus(damaged)).mean() / 2,
        }
        right = (logits.argmax(1) == batch["subjects"]).float().mean()
        critic_right = ((intact > 0).float().mean() + (damaged < 0).float().mean()) / 2
        total = figures["subject"] + 0.5 * figures["style"] + 0.5 * figures["whole"]
        return total, {name: value.detach() for name, value in figures.items()} | {"right": right, "told": critic_right}

    def pictures(self) -> int:
        return self.recipe.batch


def thumbnails(folder: Path, size: int, items: Sequence[Item]) -> list[NDArray[np.uint8]]:
    """Pictures of items at a judge's size, uint8 RGB."""
    catalog = cached_catalog(folder, size)
    return [resize(catalog.picture(item), SIZE) for item in items]


def judge_path(kind: str, seed: int) -> Path:
    """The path of the trained judge of a seed, or its critic."""
    return RUNS / "judge" / f"{kind}-{seed}.safetensors"


def main(recipe: Recipe, device: str = "cpu", report: Report = print) -> loop.Run:
    """Train a judge and its critic, and store them in `.runs/judge` under the seed's number."""
    if device != "cpu":
        report("judges are small and are trained on the CPU")
    stage = JudgeStage(recipe, Catalog(DATA, recipe.size))
    if recipe.minutes > 2:
        stage.compose()
    run = loop.Run(stage, RUNS / recipe.name, "cpu")
    loop.train(run, report)
    judge_path("judge", recipe.seed).parent.mkdir(parents=True, exist_ok=True)
    training = {"seed": recipe.seed, "minutes": round(run.seconds / 60, 1), "steps": run.step, "size": recipe.size}
    for kind, module in (("judge", stage.judge), ("critic", stage.critic)):
        config = asdict(stage.judge.config) if kind == "judge" else {}
        about = {"kind": kind, "config": config, "training": training}
        save(judge_path(kind, recipe.seed), module.state_dict(), about)
    return run


if __name__ == "__main__":
    with exit_on_error():
        parser = argparse.ArgumentParser(description="Train a judge.")
        parser.add_argument("seed", type=int)
        parser.add_argument("minutes", type=float)
        parser.add_argument("size", type=int, nargs="?", default=data.NATIVE)
        options = parser.parse_args()
        name = f"judge-{options.seed}"
        main(Recipe(name=name, **vars(options), lr=2e-3, muon_lr=2e-3, decay=0.5))
