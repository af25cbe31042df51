"""Shapes of pictures other than the square: each has a share of the data set, and every step uses one shape.

A picture of a shape shows what its square does, its subject complete and in the middle, as large as the shorter side
allows. A batch has one shape, so that nothing is padded and a run is exactly reproducible.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple, Self

from model.errors import K2Error
from model.train.data import NATIVE, Item, stable_seed

ONE_IN = 12  # one in so many pictures of the train split comes in a shape
LARGE_RENDERS = 384  # px of the renders for pictures whose shorter side is more than `NATIVE`


class Shape(NamedTuple):
    """Height and width of a picture in pixels; written "320x192", width first."""

    height: int
    width: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises K2Error for text that is not a size."""
        found = re.fullmatch(r"(\d+)x(\d+)", text)
        if not found:
            raise K2Error(f'"{text}" is not a size.', hint='Sizes are width and height in pixels, like "320x192".')
        return cls(int(found[2]), int(found[1]))

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"

    @property
    def render_size(self) -> int:
        """The size of the renders that its pictures are made of."""
        return NATIVE if min(self) <= NATIVE else LARGE_RENDERS


def indices_in_shape(items: Sequence[Item], shape: Shape) -> list[int]:
    """Which pictures of the train split also come in a shape."""
    return [i for i, each in enumerate(items) if not stable_seed("shape", shape, each.pair, each.look) % ONE_IN]
