"""How styles' reference pictures are read: the method, the weight of each, and how many a picture may have. Needs no
torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from model.errors import K2Error
from model.hashes import sha256
from model.spec import Style

MAX_REFERENCES = {"splice": 16, "vision": 16}  # by method; each one lengthens every attention by a picture


class WeightedReference(NamedTuple):
    """A reference picture and its total weight over all styles."""

    sha256: str
    image: Path
    weight: float


def auto_method(has_style_encoder: bool) -> str:
    """The default method of reading references, given whether the model has a style encoder."""
    return "tokens" if has_style_encoder else "splice"


def resolve_auto(style: Style, model: str, *, has_style_encoder: bool, has_vision: bool) -> Style:
    """The style with `auto` resolved. Raises K2Error for a method that the model lacks the part for.

    has_vision: whether its text encoder has a vision tower
    """
    instead = f'Give "{style.name}" the method "splice".'
    if style.method == "tokens" and style.references and not has_style_encoder:
        raise K2Error(f"{model} has no style encoder.", hint=instead)
    if style.method == "vision" and style.references and not has_vision:
        raise K2Error(f"The text encoder of {model} cannot read pictures.", hint=instead)
    return replace(style, method=auto_method(has_style_encoder)) if style.method == "auto" else style


def weigh(styles: Iterable[Style], method: str) -> tuple[WeightedReference, ...]:
    """The reference pictures that use this method, each once, ordered by hash, not by style. Raises K2Error if one
    cannot be read.

    References share their style's strength in proportion to their weights. A picture that occurs twice gets the sum of
    its weights; one whose weights cancel is left out.
    """
    shares: dict[str, list[float]] = {}
    images: dict[str, Path] = {}
    for style in (style for style in styles if style.method == method):
        total = math.fsum(abs(reference.weight) for reference in style.references)
        for reference in style.references:
            if reference.weight and style.strength:
                key = sha256(reference.image)
                images[key] = min(images.get(key, reference.image), reference.image)
                shares.setdefault(key, []).append(style.strength * reference.weight / total)
    # fsum rounds only once, in any order; 0.1 + 0.2 − 0.3 counts as 0
    sums = ((key, round(math.fsum(shares[key]), 12)) for key in sorted(shares))
    return tuple(WeightedReference(key, images[key], weight) for key, weight in sums if weight)


def check_references(styles: Sequence[Style], steps: int) -> None:
    """Refuse styles with more reference pictures than a method allows, or too few steps. Raises K2Error."""
    for method, what in (("splice", "spliced"), ("vision", "read by vision")):
        found = weigh(styles, method)
        if found and method == "splice" and steps == 1:
            raise K2Error("A spliced style needs two steps: the first is pure noise.", hint="Choose more steps.")
        if len(found) > MAX_REFERENCES[method]:
            raise K2Error(
                f"{len(found)} reference pictures are {what}, but at most {MAX_REFERENCES[method]} can be.",
                hint="Choose those that show the look best.",
            )
