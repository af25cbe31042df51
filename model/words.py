"""Words for pictures: linear discriminants over a style encoder's statistics.

Pictures and words share no embedding space, so the table is measured on training pictures (`model/train/words.py`) and
lies beside the weights as `NAME-words.safetensors`. A word is used only if its kind was right on looks that the table
had never seen, and only for pictures as close to the table's as those were.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.checkpoint import open_checkpoint
from model.errors import K2Error
from model.expand import look_words

Array = NDArray[np.float64]

MIN_ACCURACY = 0.5  # how often a kind of words must have been right on unseen looks
MIN_SHARE = 0.3  # of a board, from which a word is a keyword
MAX_PROBABILITY = 0.05  # below which it is absent
MAX_KEYWORDS, MAX_AVOIDS = 2, 2  # of each kind
REBUILD = "python -m model.train.words"


@dataclass(frozen=True)
class WordTable:
    """Linear discriminants, one for each kind of words, over standardised statistics x: p = softmax(W x + b).

    `middle` and `precision` hold the media's class means and their shared precision: they give a picture's distance
    from everything that the table was measured on. `unseen` is the share of right answers on unseen looks.
    """

    names: Mapping[str, tuple[str, ...]]
    weight: Mapping[str, Tensor]  # kind -> [words, F]
    offset: Mapping[str, Tensor]  # kind -> [words]
    mean: Tensor  # [F]
    deviation: Tensor  # [F]
    middle: Tensor  # [classes, F]
    precision: Tensor  # [F, F]
    furthest: float  # squared distance within which pictures are known
    unseen: Mapping[str, float]
    made_for: Mapping[str, str]

    @classmethod
    def load(cls, path: Path) -> WordTable:
        """Load a table of words. Raises K2Error if the file is not one."""
        checkpoint = open_checkpoint(path)
        about = checkpoint.metadata
        if about.get("kind") != "words":
            raise K2Error(f"{path} is not a table of words.", hint=f"Create it again: {REBUILD}")
        state = {name: tensor.double() for name, tensor in checkpoint.read()}
        kinds = about["names"]
        return cls(
            {kind: tuple(names) for kind, names in kinds.items()},
            {kind: state[f"{kind}.weight"] for kind in kinds},
            {kind: state[f"{kind}.offset"] for kind in kinds},
            state["mean"],
            state["deviation"],
            state["middle"],
            state["precision"],
            about["furthest"],
            about["unseen"],
            about["made_for"],
        )

    def predict(self, statistics: Tensor) -> tuple[dict[str, Array], NDArray[np.bool_]]:
        """statistics [B, F] -> kind -> probabilities [B, words], and which pictures are close enough to describe."""
        x = (statistics.double() - self.mean) / self.deviation
        probabilities = {k: torch.softmax(x @ self.weight[k].T + self.offset[k], 1).numpy() for k in self.names}
        away = x[:, None] - self.middle
        distance = ((away @ self.precision) * away).sum(-1).min(1).values
        return probabilities, (distance <= self.furthest).numpy()

    def trusted(self, kind: str) -> bool:
        return self.unseen.get(kind, 0.0) >= MIN_ACCURACY


def read_words(
    words: WordTable | None, probabilities: Mapping[str, Array], known: NDArray[np.bool_]
) -> tuple[list[str], list[str], dict[str, tuple[str, float]]]:
    """Keywords, avoids, and each kind's likeliest name with its share, for pictures [B] with these probabilities.

    A keyword's mean probability over the known pictures is at least `MIN_SHARE`; an avoid's is below `MAX_PROBABILITY`
    in nearly all of them, and the least likely come first.
    """
    keywords: list[str] = []
    avoids: list[str] = []
    likeliest: dict[str, tuple[str, float]] = {}
    if words is None or 2 * known.sum() < len(known):
        return keywords, avoids, likeliest
    table = look_words()
    for kind in filter(words.trusted, words.names):
        names, seen = words.names[kind], probabilities[kind][known]
        shares = seen.mean(0)
        best = int(shares.argmax())
        likeliest[kind] = (names[best], float(shares[best]))
        if kind not in ("medium", "drawing"):
            continue
        order = sorted(range(len(names)), key=lambda i: (-shares[i], names[i]))
        keywords += [
            table[kind][names[i]][0] for i in order[:MAX_KEYWORDS] if shares[i] >= MIN_SHARE and names[i] in table[kind]
        ]
        never = np.quantile(seen, 0.95, axis=0) < MAX_PROBABILITY
        far = sorted(range(len(names)), key=lambda i: (np.log(seen[:, i] + 1e-12).mean(), names[i]))
        avoids += [table[kind][names[i]][0] for i in far if never[i] and names[i] in table[kind]][:MAX_AVOIDS]
    return keywords, avoids, likeliest
