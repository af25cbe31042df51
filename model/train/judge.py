"""Judges: small image-text dual encoders that read a picture's subject and its look.

A judge is trained on real pictures of the data set only, on a split and a seed of its own. The evaluation judge is
never used as a reward; its figures always stand beside those of real pictures. `python -m model.train.judge` trains it.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from model.train.data import DATA, Catalog, Item, stable_seed
from model.train.encode import to_tensor
from model.train.optim import warmup_stable_decay

SIZE = 64  # px that a judge looks at
RUNS = Path(".runs")


@dataclass(frozen=True)
class JudgeConfig:
    words: tuple[str, ...]  # vocabulary of the text side
    subject: int = 96  # dimensions of the subject embedding
    style: int = 48


class ConvBlock(nn.Module):
    def __init__(self, inward: int, width: int):
        super().__init__()
        self.down = nn.Conv2d(inward, width, 3, stride=2, padding=1)
        self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.down(x)))
        return F.relu(x + self.norm2(self.conv(x)))


class Judge(nn.Module):
    """Pictures and words into one space for subjects; pictures into a second one for looks."""

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
        """Phrases -> unit subject embeddings [P, 96]; words outside the vocabulary count for nothing."""
        bags = [[self.index.get(word, 0) for word in words_of(phrase)] or [0] for phrase in phrases]
        offsets = torch.tensor([0, *np.cumsum([len(bag) for bag in bags])[:-1]])
        flat = torch.tensor([index for bag in bags for index in bag])
        return F.normalize(self.to_text(self.word(flat, offsets)), dim=-1)

    @classmethod
    def load(cls, path: Path) -> Judge:
        with safe_open(path, "pt") as file:
            config = json.loads(file.metadata()["k2"])["config"]
        judge = cls(JudgeConfig(**config | {"words": tuple(config["words"])}))
        judge.load_state_dict(load_file(path))
        return judge.eval()


def words_of(phrase: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", phrase.lower())


def judged(item: Item, seed: int) -> bool:
    """Whether a judge of this seed may train on the item: nine in ten pictures, none that the generator never saw."""
    return not item.held_out and stable_seed("judge", seed, item.pair, item.look) % 10 != 0


def train(seed: int, minutes: float, batch: int = 64) -> Judge:
    """Contrast every picture with the names of all subjects, and every look with all other looks."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    catalog = Catalog(DATA)
    items = [item for item in catalog.items("train") if judged(item, seed)]
    subjects = list(catalog.subjects.values())
    looks = sorted({item.look for item in items}, key=repr)
    which_subject = {s.name: i for i, s in enumerate(subjects)}
    which_look = {look: i for i, look in enumerate(looks)}
    judge = Judge(JudgeConfig(tuple(sorted({w for s in subjects for name in s.words for w in words_of(name)}))))
    look_head = nn.Linear(judge.config.style, len(looks), bias=False)
    params = [*judge.parameters(), *look_head.parameters()]
    optimiser = torch.optim.AdamW(params, 2e-3, weight_decay=0.02, fused=True)
    pictures: dict[int, Tensor] = {}
    started, step, total = time.monotonic(), 0, minutes * 60
    while (elapsed := time.monotonic() - started) < total:
        optimiser.param_groups[0]["lr"] = 2e-3 * warmup_stable_decay(elapsed, total, 0.03, 0.5)
        chosen = rng.choice(len(items), batch, replace=False)
        for index in chosen:
            if index not in pictures:
                pictures[index] = to_tensor([catalog.picture(items[index])], SIZE)[0]
        x = torch.stack([pictures[index] for index in chosen])
        shift = torch.from_numpy(rng.integers(-3, 4, 2))
        x = torch.roll(x, tuple(shift.tolist()), (2, 3)) * float(rng.uniform(0.9, 1.1)) + float(rng.uniform(-0.1, 0.1))
        x = x + 0.04 * torch.randn_like(x)
        subject, style = judge.train()(x)
        names = judge.read([str(rng.choice(s.words)) for s in subjects])
        target = torch.tensor([which_subject[items[i].pair.subject] for i in chosen])
        look = torch.tensor([which_look[items[i].look] for i in chosen])
        by_look = F.linear(style, F.normalize(look_head.weight, dim=-1))
        loss = F.cross_entropy(16 * subject @ names.T, target) + 0.5 * F.cross_entropy(16 * by_look, look)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        step += 1
        if step % 100 == 0:
            print(step, f"{elapsed:.0f} s, loss {loss.item():.3f}", flush=True)
    return judge.eval()


def main(seed: int, minutes: float, path: Path) -> None:
    judge = train(seed, minutes)
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"kind": "judge", "config": asdict(judge.config), "training": {"seed": seed, "minutes": minutes}}
    save_file(judge.state_dict(), path, {"k2": json.dumps(metadata)})


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]), RUNS / "judge" / f"judge-{sys.argv[1]}.safetensors")
