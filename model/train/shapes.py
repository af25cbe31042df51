"""Shapes of pictures other than the square: a share of the data set comes in each of them, and a step in one of all.

A picture of a shape shows what its square does, its subject in the middle and whole, as large as the shorter side lets
it be. Batches are of one shape, so that nothing is padded and a run repeats exactly.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple, Self

from model.errors import K2Error
from model.train.data import NATIVE, Item, stable_seed

SHARE = 12  # of so many pictures of the train split one comes in a shape
LARGE = 384  # px of the renders for pictures whose shorter side is more than `NATIVE`


class Shape(NamedTuple):
    """Height and width of a picture in pixels, said "320x192", width first."""

    height: int
    width: int

    @classmethod
    def of(cls, text: str) -> Self:
        """Raises K2Error for what is no size."""
        found = re.fullmatch(r"(\d+)x(\d+)", text)
        if not found:
            raise K2Error(f'"{text}" is no size.', hint='Sizes are width and height in pixels, "320x192".')
        return cls(int(found[2]), int(found[1]))

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"

    @property
    def renders(self) -> int:
        """The size of the renders that its pictures are made of."""
        return NATIVE if min(self) <= NATIVE else LARGE


def of_shape(items: Sequence[Item], shape: Shape) -> list[int]:
    """Which pictures of the train split come in a shape, too."""
    return [i for i, each in enumerate(items) if not stable_seed("shape", shape, each.pair, each.look) % SHARE]
