"""Colours of pictures: the dominant ones, their shares, and their names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from model.expand import look_words

Array = NDArray[np.float64]

PALETTE_SIZE = 6
STRIP_SIZE = (480, 96)  # width and height in pixels of a palette strip
MIN_COLOUR_DISTANCE = 0.06  # OKLab distance below which two colours are one swatch
KEYWORD_SHARE = 0.3  # share of a board from which a colour is a keyword


@dataclass(frozen=True)
class Colour:
    rgb: tuple[int, int, int]
    share: float
    name: str

    @property
    def hex(self) -> str:
        return "#{:02x}{:02x}{:02x}".format(*self.rgb)


LIGHTNESS_WEIGHT = 0.7  # weight of lightness when naming: dark red is closer to red than to dark blue
BASIC_COLOURS = {  # hues, depths and muted tones missing from the data's palettes; the text encoder knows all names
    "white": [(252, 252, 252), (238, 238, 238)], "black": [(16, 16, 18)],
    "grey": [(118, 120, 124)], "dark grey": [(80, 82, 86), (46, 47, 50)],
    "red": [(214, 36, 40)], "brick red": [(92, 22, 30)],
    "green": [(70, 160, 60), (24, 76, 34), (140, 200, 60), (112, 120, 72), (90, 90, 20), (84, 110, 84)],
    "blue": [(40, 90, 200), (70, 130, 190), (72, 88, 136)], "sky blue": [(0, 190, 235)],
    "purple": [(120, 60, 160), (60, 24, 84), (112, 80, 112)],
    "brown": [(120, 76, 44), (66, 38, 28), (160, 120, 84)], "yellow": [(250, 214, 50)],
}  # fmt: skip


def oklab(rgb: Array) -> Array:
    """sRGB in 0 … 1, [..., 3] -> OKLab, [..., 3] (Ottosson 2020), whose distances match perception."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    cones = linear @ np.array(
        [
            [0.4122214708, 0.2119034982, 0.0883024619],
            [0.5363325363, 0.6806995451, 0.2817188376],
            [0.0514459929, 0.1073969566, 0.6299787005],
        ]
    )
    return np.cbrt(cones) @ np.array(
        [
            [0.2104542553, 1.9779984951, 0.0259040371],
            [0.7936177850, -2.4285922050, 0.7827717662],
            [-0.0040720468, 0.4505937099, -0.8086757660],
        ]
    )


def named_colours() -> dict[str, list[tuple[int, int, int]]]:
    """Colour names -> their colours: the data's palettes, both colours of each, and basic ones."""
    known = {
        name: [(int(code[1:3], 16), int(code[3:5], 16), int(code[5:7], 16)) for code in codes]
        for name, codes in look_words()["palette"].items()
    }
    return known | {name: known.get(name, []) + rgbs for name, rgbs in BASIC_COLOURS.items()}


def colour_name(rgb: Iterable[int]) -> str:
    """The nearest named colour, by hue rather than by lightness."""
    lab = oklab(np.array(list(rgb)) / 255)
    entries = [(name, colour) for name, colours in named_colours().items() for colour in colours]
    away = (oklab(np.array([colour for _, colour in entries]) / 255) - lab) * (LIGHTNESS_WEIGHT, 1, 1)
    return entries[int(np.linalg.norm(away, axis=1).argmin())][0]


def find_palette(pictures: Sequence[NDArray[np.uint8]]) -> tuple[Colour, ...]:
    """Dominant colours of pictures, uint8 [H, W, 3], largest share first: k-means over a histogram in OKLab."""
    pixels = np.concatenate([picture[::2, ::2].reshape(-1, 3) for picture in pictures])
    bins = (pixels >> 4).astype(np.int64) @ np.array([256, 16, 1])
    counts = np.bincount(bins, minlength=4096).astype(float)
    sums = np.stack([np.bincount(bins, pixels[:, c], 4096) for c in range(3)], 1)
    used = counts > 0
    colours, counts = sums[used] / counts[used, None], counts[used]
    labs = oklab(colours / 255)
    centres = labs[[int(counts.argmax())]]
    while len(centres) < PALETTE_SIZE:
        away = np.linalg.norm(labs[:, None] - centres, axis=-1).min(1)
        if away.max() < MIN_COLOUR_DISTANCE:
            break
        centres = np.vstack([centres, labs[int((away * np.sqrt(counts)).argmax())]])
    for _ in range(30):
        label = np.linalg.norm(labs[:, None] - centres, axis=-1).argmin(1)
        full = [k for k in range(len(centres)) if (label == k).any()]
        moved = np.stack([np.average(labs[label == k], axis=0, weights=counts[label == k]) for k in full])
        if moved.shape == centres.shape and np.abs(moved - centres).max() < 1e-6:
            break
        centres = moved
    label = np.linalg.norm(labs[:, None] - centres, axis=-1).argmin(1)
    found = []
    for k in np.unique(label):
        mean = np.average(colours[label == k], axis=0, weights=counts[label == k]).round().astype(int)
        share = counts[label == k].sum() / counts.sum()
        found.append(Colour((int(mean[0]), int(mean[1]), int(mean[2])), float(share), colour_name(mean)))
    return tuple(sorted(found, key=lambda colour: (-colour.share, colour.rgb)))


def swatches(palette: Sequence[Colour]) -> Image.Image:
    """The palette as a strip; each colour is as wide as its share, but never too narrow to see."""
    width, height = STRIP_SIZE
    shares = np.maximum([colour.share for colour in palette], 0.04)
    edges = [0, *(np.cumsum(shares / shares.sum()) * width).round().astype(int)]
    strip = Image.new("RGB", (width, height))
    for colour, left, right in zip(palette, edges, edges[1:], strict=False):
        strip.paste(colour.rgb, (int(left), 0, int(right), height))
    return strip


def colour_words(palette: Sequence[Colour]) -> tuple[list[str], list[str]]:
    """The data's colour name that dominates a board, if any, and the one furthest from all its colours, if far."""
    shares: dict[str, float] = {}
    for colour in palette:
        shares[colour.name] = shares.get(colour.name, 0.0) + colour.share
    names = look_words()["palette"]
    wanted = [
        name
        for name, share in sorted(shares.items(), key=lambda x: (-x[1], x[0]))
        if share >= KEYWORD_SHARE and name in names
    ]
    here = oklab(np.array([colour.rgb for colour in palette if colour.share > 0.005]) / 255)
    known = named_colours()

    def away(name: str) -> float:
        return float(np.linalg.norm(oklab(np.array(known[name]) / 255)[:, None] - here, axis=-1).min())

    furthest = max(sorted(names), key=away)
    return wanted[:1], [furthest] if away(furthest) > 3 * MIN_COLOUR_DISTANCE else []
