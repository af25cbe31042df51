"""Picture sizes as users write them: "256x384", "16:9", "1K"."""

from __future__ import annotations

import math
import re

from model.errors import K2Error
from model.spec import MAX_PIXELS, SIDES

STEP = 16  # px; some models need larger steps
MAX_RATIO = 4  # to 1, for a shape that was not asked for explicitly
ASPECTS = "1:1, 4:3, 3:2, 16:9, 2.35:1, 4:5, 2:3, 9:16"


def parse_size(size: str, where: str, step: int = 1) -> tuple[int, int]:
    """ "256x384" → (256, 384), both multiples of the model's step, if that is known."""
    match = re.fullmatch(r"(\d{1,20})\s*[xX×]\s*(\d{1,20})", size)
    if not match:
        raise K2Error(f'{where}: "{size}" is not a size.', hint='Write width x height, like "256x384".')
    width, height = int(match[1]), int(match[2])
    if not SIDES[0] <= min(width, height) <= max(width, height) <= SIDES[1]:
        raise K2Error(
            f"{where}: {width}x{height} is out of range.",
            hint=f"Sides are from {SIDES[0]} to {SIDES[1]} pixels.",
        )
    if width * height > MAX_PIXELS:
        raise K2Error(f"{where}: {width}x{height} is more than {MAX_PIXELS:,} pixels.", hint="Choose a smaller size.")
    if width % step or height % step:
        raise K2Error(
            f"{where}: the sides of {width}x{height} are not multiples of {step}.",
            hint=f"The nearest size is {round(width / step) * step}x{round(height / step) * step}.",
        )
    return width, height


def fit_aspect(aspect: str, edge: int, where: str, step: int = STEP) -> tuple[int, int]:
    """ "16:9" with as many pixels as a square of side `edge`, each side rounded to a multiple of `step`, or down if
    rounding to the nearest would make the picture too large."""
    match = re.fullmatch(r"(\d{1,4}(?:\.\d{1,4})?):(\d{1,4}(?:\.\d{1,4})?)", aspect)
    ratio = float(match[1]) / float(match[2]) if match and float(match[2]) else 0.0
    if not 1 / 8 <= ratio <= 8:
        raise K2Error(
            f'{where}: "{aspect}" is not an aspect ratio from 1:8 to 8:1.', hint=f"Write width:height, like {ASPECTS}."
        )
    sides = [edge * math.sqrt(r) / step for r in (ratio, 1 / ratio)]
    width, height = (round(side) * step for side in sides)
    if width * height > MAX_PIXELS >= edge**2:
        width, height = (math.floor(side) * step for side in sides)
    return parse_size(f"{width}x{height}", where, step)


def clamped_aspect(width: int, height: int) -> str:
    """A picture's aspect ratio, clamped to what a model can paint: "1.5000:1"."""
    return f"{min(max(width / height, 1 / MAX_RATIO), MAX_RATIO):.4f}:1"


def parse_resolution(resolution: str | int, where: str) -> int:
    """ "1K", "1.5K" or a number: the side of a square with as many pixels."""
    match = re.fullmatch(r"(\d(?:\.\d)?)[kK]|(\d{2,4})", str(resolution))
    if not match:
        raise K2Error(f'{where}: "{resolution}" is not a resolution.', hint='Write "1K", "2K", or pixels, like 256.')
    return round(float(match[1]) * 1024) if match[1] else int(match[2])
