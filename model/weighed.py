"""What the styles of a picture come to for each of their reference pictures, and how many of these it may have."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from model.errors import K2Error
from model.hashes import sha256
from model.spec import Style

MOST_AT_ONCE = {"splice": 16, "vision": 16}  # by method; each of them lengthens every attention by a picture


class Weighed(NamedTuple):
    """A reference picture and what all styles' strengths and weights come to for it."""

    sha256: str
    image: Path
    weight: float


def weigh(styles: Iterable[Style], sha256: Callable[[Path], str]) -> tuple[Weighed, ...]:
    """Every reference picture of the styles once, in the order of their hashes, never in that of the arguments.

    Within a style its references share its strength by weight. The same picture twice is the picture at the sum of its
    weights; one whose weights come to nothing is left out.
    """
    shares: dict[str, list[float]] = {}
    images: dict[str, Path] = {}
    for style in styles:
        total = math.fsum(abs(reference.weight) for reference in style.references)
        for reference in style.references:
            if reference.weight and style.strength:
                key = sha256(reference.image)
                images[key] = min(images.get(key, reference.image), reference.image)
                shares.setdefault(key, []).append(style.strength * reference.weight / total)
    # fsum rounds once, in whatever order; 0.1 + 0.2 − 0.3 is nothing
    sums = ((key, round(math.fsum(shares[key]), 12)) for key in sorted(shares))
    return tuple(Weighed(key, images[key], weight) for key, weight in sums if weight)


def check_number(styles: Sequence[Style]) -> None:
    """Refuse styles of more reference pictures than a way takes at once. Raises K2Error."""
    for method, what in (("splice", "spliced"), ("vision", "read by vision")):
        found = weigh((style for style in styles if style.method == method), sha256)
        if len(found) > MOST_AT_ONCE[method]:
            raise K2Error(
                f"{len(found)} reference pictures are {what}, and {MOST_AT_ONCE[method]} is the most.",
                hint="Choose those that show the look best.",
            )
