"""Pictures of two subjects in one look, beside or above each other, and their captions.

The data set proper shows one subject per picture, and a network that knows nothing else paints a mixture of two.
Which two subjects meet is drawn at random, from some 150,000 pairs, so that most were never seen together: what is
learned is to keep things apart, and which word is where.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model.train.data import Catalog, Item, Pair, Subject, phrase, stable_seed
from model.train.looks import Array, place_two_subjects

COUNT = 24_000  # pictures
BESIDE = 0.65  # share of pictures whose subjects stand side by side
RELATIONS = {  # whether side by side -> what captions say; {0} is the left or upper subject
    True: (
        *("{0} and {1}", "{0} and {1}", "{0} and {1}", "{0} next to {1}", "{0} beside {1}", "{0} with {1}"),
        *("{0} to the left of {1}", "{1} to the right of {0}", "{0} and {1} side by side", "{0} near {1}"),
    ),
    False: (
        *("{0} on top of {1}", "{0} above {1}", "{0} on {1}", "{1} below {0}", "{1} under {0}", "{0} over {1}"),
        *("{0} sitting on {1}", "{0} standing on {1}"),
    ),
}


@dataclass(frozen=True)
class TwoSubjects(Item):
    """A picture of two subjects: its pair's, on the left or above, and a second one in the same drawing set."""

    second_row: int
    second: Pair
    beside: bool

    @property
    def held_out(self) -> bool:
        return False  # made of drawings that are not

    @property
    def subjects(self) -> tuple[str, ...]:
        return self.pair.subject, self.second.subject

    @property
    def seed(self) -> int:
        return stable_seed("two subjects", self.pair, self.look, self.second, self.beside)

    def place(self, renders: NDArray[np.uint8], rng: np.random.Generator, shape: tuple[int, int] | None) -> Array:
        both = np.asarray(renders[self.row]), np.asarray(renders[self.second_row])
        return place_two_subjects(both, self.look, rng, self.beside, shape)

    def draw_name(self, subjects: Mapping[str, Subject], rng: np.random.Generator) -> str:
        relations = RELATIONS[self.beside]
        names = [
            Item(row, pair, self.look).draw_name(subjects, rng)
            for row, pair in ((self.row, self.pair), (self.second_row, self.second))
        ]
        return relations[int(rng.integers(len(relations)))].format(*map(phrase, names))

    def with_article(self, name: str, rng: np.random.Generator) -> str:
        return name  # both have theirs


def pictures_of_two(catalog: Catalog, count: int = COUNT, split: str = "train") -> list[TwoSubjects]:
    """Pictures of two subjects in trained looks, always the same ones, in a fixed order.

    train     may be trained on
    held-out  other pictures of the same drawings, drawn likewise; some of their pairs also meet in training
    """
    items = catalog.items("train")
    by_drawing: dict[str, list[int]] = defaultdict(list)
    for row, pair in enumerate(catalog.pairs):
        if not pair.held_out:
            by_drawing[pair.drawing].append(row)
    rng = np.random.default_rng(stable_seed("two subjects", split))
    found: list[TwoSubjects] = []
    while len(found) < count:
        first = items[int(rng.integers(len(items)))]
        peers = by_drawing[first.pair.drawing]
        second = peers[int(rng.integers(len(peers)))]
        beside = bool(rng.random() < BESIDE)
        if catalog.pairs[second].subject != first.pair.subject:
            found.append(TwoSubjects(first.row, first.pair, first.look, second, catalog.pairs[second], beside))
    return found
