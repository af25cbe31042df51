"""Looks: how a drawing becomes a picture with a medium and a ground.

A look is drawing set x medium x ground x palette. Media and grounds are made by code, so that their range (grainy film,
print, paint, light) does not depend on what a data set happens to contain, and captions always match. Pictures are
float RGB in 0 ... 1, [H, W, 3], of any size and shape. The subject and what it stands on scale with the square in the
middle, a medium's strokes and grain with the side of a square with as many pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from model.vocabulary import DRAWINGS as DRAWINGS
from model.vocabulary import MEDIA as MEDIA

Array = NDArray[np.floating[Any]]  # float32, or float64 where a product widened it
Generator = np.random.Generator

GROUNDS = ("white", "flat", "gradient", "scene", "floor")
MONOCHROME = ("fluent-emoji-high-contrast", "emojione-monotone")

PALETTES: dict[str, tuple[tuple[int, int, int], tuple[int, int, int]]] = {  # name -> main colour, second colour
    "sky blue": ((176, 220, 250), (118, 178, 232)),
    "mint green": ((190, 238, 208), (120, 204, 164)),
    "warm yellow": ((255, 226, 138), (250, 190, 84)),
    "rose pink": ((252, 196, 210), (240, 138, 164)),
    "lavender": ((216, 204, 246), (168, 148, 224)),
    "cream": ((250, 240, 218), (232, 208, 168)),
    "orange": ((255, 178, 102), (236, 128, 56)),
    "grey": ((206, 210, 214), (150, 156, 164)),
    "teal": ((92, 188, 184), (36, 132, 140)),
    "brick red": ((206, 96, 80), (152, 54, 50)),
    "night blue": ((38, 54, 96), (16, 24, 52)),
}
INKS = (((235, 84, 62), (36, 96, 158)), ((250, 120, 160), (20, 120, 110)), ((255, 150, 40), (70, 60, 140)))


@dataclass(frozen=True)
class Look:
    """One style of the data: everything about a picture but its subject."""

    drawing: str
    medium: str = "plain"
    ground: str = "white"  # one of GROUNDS
    palette: str = "cream"

    @property
    def ground_words(self) -> str:
        """The ground in a caption's words; a medium with a ground of its own decides it."""
        if self.medium in ("neon", "lowkey"):
            return "on black" if self.medium == "neon" else "in the dark"
        article = "an" if self.palette[0] in "aeiou" else "a"
        return {
            "white": "on a white background",
            "flat": f"on {article} {self.palette} background",
            "gradient": f"on {article} {self.palette} gradient",
            "scene": f"in a simple {self.palette} landscape",
            "floor": f"on {article} {self.palette} floor with a shadow",
        }[self.ground]


def _colour(rgb: tuple[int, int, int]) -> Array:
    return np.asarray(rgb, np.float32) / 255


def _blur(picture: Array, radius: float) -> Array:
    eight_bit = Image.fromarray((np.clip(picture, 0, 1) * 255 + 0.5).astype(np.uint8))
    return np.asarray(eight_bit.filter(ImageFilter.GaussianBlur(radius)), np.float32) / 255


def _luminance(picture: Array) -> Array:
    return picture @ np.asarray([0.299, 0.587, 0.114], np.float32)


def _edges(picture: Array) -> Array:
    """Strength of colour edges, [H, W], about 0 ... 1; at 128 px they are one pixel wide on either side."""
    reach = max(1, _side(picture) // 128)
    inside, far = slice(reach, -reach), 2 * reach
    padded = np.pad(picture, ((reach, reach), (reach, reach), (0, 0)), mode="edge")
    across = padded[inside, far:] - padded[inside, :-far]
    down = padded[far:, inside] - padded[:-far, inside]
    return np.clip(np.sqrt((across**2 + down**2).sum(-1)), 0, 1)


def _side(picture: Array) -> int:
    """The side of a square with as many pixels."""
    return round(math.sqrt(picture.shape[0] * picture.shape[1]))


def _grid(shape: tuple[int, ...], side: int) -> tuple[Array, Array]:
    """Columns and rows in units such that the square of `side` pixels in the middle has 128."""
    height, width = shape[:2]
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    left, top = (np.float32((length - side) / 2) for length in (width, height))
    return (x - left) * (128 / side), (y - top) * (128 / side)  # lengths below are for 128 px


def draw_ground(
    look: Look, height: int, width: int, rng: Generator, shadows: Sequence[tuple[float, float]] = ((64, 34),)
) -> Array:
    """The background of subjects, [height, width, 3]; shadows: the middle and half width of each on a floor, of 128."""
    light, deep = (_colour(c) for c in PALETTES[look.palette])
    x, y = _grid((height, width), min(height, width))
    if look.ground == "white":
        return np.ones((height, width, 3), np.float32)
    if look.ground == "flat":
        return np.broadcast_to(light, (height, width, 3)).copy()
    if look.ground == "gradient":
        blend = ((y - y[0, 0]) * (min(height, width) / height) / 127)[..., None]
        return light * (1 - blend) + deep * blend
    if look.ground == "scene":
        sky = light * (1 - y[..., None] / 220) + 0.25 * (y[..., None] / 220)
        phase, second = rng.uniform(0, 6.28, 2)
        hills = 84 + 7 * np.sin(x / 21 + phase) + 4 * np.sin(x / 9 + second)
        return np.where((y > hills)[..., None], deep * (1 - 0.25 * (y[..., None] - 84) / 44), sky)
    wall = np.broadcast_to(light, (height, width, 3)).copy()
    floor = deep * (1 - 0.3 * (y[..., None] - 92) / 36)
    wall[y > 92] = floor[y > 92]
    for middle, half in shadows:
        shadow = np.exp(-((((x - middle) / half) ** 2 + ((y - 114) / 7) ** 2) ** 2))
        wall = wall * (1 - 0.45 * shadow[..., None])
    return wall


def _film(picture: Array, rng: Generator) -> Array:
    faded = picture * 0.82 + 0.07
    toned = faded * np.asarray([1.05, 1.0, 0.9], np.float32)
    grain = rng.standard_normal(picture.shape[:2]).astype(np.float32)
    return toned + 0.11 * grain[..., None] * (1.1 - np.abs(2 * _luminance(toned)[..., None] - 1))


def _halftone(picture: Array, rng: Generator) -> Array:
    x, y = _grid(picture.shape, _side(picture))
    u, v = (x + y) * (np.pi / 6.4), (x - y) * (np.pi / 6.4)
    screen = 0.5 + 0.25 * (np.cos(u) + np.cos(v))
    ink = np.clip((1.02 - _luminance(picture) - screen * 0.95) * 5 + 0.5, 0, 1)[..., None]
    return ink * picture * 0.78 + (1 - ink) * (0.35 * picture + 0.65 * _colour((253, 248, 236)))


def _pixel(picture: Array, rng: Generator) -> Array:
    height, width = picture.shape[:2]
    whole = [cell for cell in range(1, height + 1) if height % cell == width % cell == 0]
    cell = min(whole, key=lambda cell: abs(cell - _side(picture) / 32))
    small = picture.reshape(height // cell, cell, width // cell, cell, 3).mean((1, 3))
    return np.kron(np.round(small * 6) / 6, np.ones((cell, cell, 1), np.float32))


def _hatching(picture: Array, rng: Generator) -> Array:
    x, y = _grid(picture.shape, _side(picture))
    dark = 1 - _luminance(_blur(picture, _side(picture) / 128))
    paper = np.full_like(dark, 0.97)
    for angle, threshold in ((0.8, 0.12), (2.3, 0.38), (0.1, 0.62)):
        lines = np.sin((x * np.cos(angle) + y * np.sin(angle)) * 1.75 + rng.uniform(0, 6.28))
        paper -= 0.42 * np.clip((lines - 0.1) * 2, 0, 1) * np.clip((dark - threshold) * 5, 0, 1)
    paper -= 0.75 * _edges(picture)
    return np.clip(paper, 0.08, 1)[..., None] * np.asarray([1.0, 0.99, 0.97], np.float32)


def _smooth_noise(picture: Array, cells: int, rng: Generator) -> Array:
    """Low-frequency noise over a picture, `cells` per side of a square: -1 ... 1, [H, W]."""
    height, width = picture.shape[:2]
    rows, columns = (max(1, round(cells * length / _side(picture))) for length in (height, width))
    field = (rng.random((rows, columns)) * 255).astype(np.uint8)
    return np.asarray(Image.fromarray(field).resize((width, height), Image.Resampling.BICUBIC), np.float32) / 127.5 - 1


def _watercolour(picture: Array, rng: Generator) -> Array:
    (height, width), size = picture.shape[:2], _side(picture)
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    wobble = size / 128 * 2.2
    across = np.clip(x + wobble * _smooth_noise(picture, 12, rng), 0, width - 1).astype(np.int64)
    down = np.clip(y + wobble * _smooth_noise(picture, 12, rng), 0, height - 1).astype(np.int64)
    wash = _blur(picture[down, across], size / 128 * 1.1)
    rim = _edges(_blur(wash, size / 128 * 0.8))[..., None]
    pigment = (1 - wash) * (0.78 + 0.22 * _smooth_noise(picture, 10, rng)[..., None]) * (1 + 1.1 * rim)
    paper = 1 - 0.035 * np.abs(rng.standard_normal((height, width, 1)).astype(np.float32))
    return (1 - 0.82 * pigment) * paper


def _riso(picture: Array, rng: Generator) -> Array:
    size = _side(picture)
    first, second = (_colour(c) for c in INKS[int(rng.integers(len(INKS)))])
    warm = np.clip(1.25 - 0.9 * picture[..., 2] - 0.35 * picture[..., 1], 0, 1)
    cool = np.clip(1.05 - 1.1 * picture[..., 0], 0, 1)
    cool = np.roll(cool, (size // 64, -(size // 64)), (0, 1))  # the second drum never registers exactly
    speckle = 0.82 + 0.18 * rng.random((2, *picture.shape[:2])).astype(np.float32)
    warm, cool = (warm * speckle[0])[..., None], (cool * speckle[1])[..., None]
    return _colour((250, 246, 234)) * (1 - warm * (1 - first)) * (1 - cool * (1 - second))


def _neon(picture: Array, rng: Generator) -> Array:
    size = _side(picture)
    lines = _edges(_blur(picture, size / 128 * 0.6))[..., None]
    hue = picture - picture.min(-1, keepdims=True) * 0.8
    hue = hue / (hue.max(-1, keepdims=True) + 0.08) * 0.85 + 0.15
    tubes = np.clip(lines * 1.9, 0, 1) * hue
    return 0.02 + tubes + 0.9 * _blur(tubes, size / 128 * 3.5) + 0.3 * np.clip(lines * 2 - 0.9, 0, 1)


def _lowkey(picture: Array, rng: Generator) -> Array:
    x, y = _grid(picture.shape, _side(picture))
    light = np.exp(-(((x - 44) / 46) ** 2 + ((y - 42) / 50) ** 2))[..., None]
    return (picture * 0.95) ** 1.35 * (0.06 + 1.05 * light) * np.asarray([1.08, 0.98, 0.84], np.float32)


EFFECTS: dict[str, Callable[[Array, Generator], Array]] = {
    "plain": lambda picture, rng: picture,
    "film": _film,
    "halftone": _halftone,
    "pixel": _pixel,
    "hatching": _hatching,
    "watercolour": _watercolour,
    "riso": _riso,
    "neon": _neon,
    "lowkey": _lowkey,
}


def place_subject(render: NDArray[np.uint8], look: Look, rng: Generator, shape: tuple[int, int] | None = None) -> Array:
    """A subject in the middle of its ground, before its medium.

    render   uint8 RGBA [S, S, 4], the bare drawing
    shape    (H, W) of the picture; default: S by S
    returns  float32 RGB [H, W, 3], 0 ... 1
    """
    height, width = shape or render.shape[:2]
    canvas, size = draw_ground(look, height, width, rng), min(height, width)
    side = round(size * rng.uniform(0.80, 0.88))
    left, top = (int((length - side) / 2 + rng.uniform(-0.03, 0.03) * size) for length in (width, height))
    paste(canvas, render, choose_ink(canvas, look), left, top, side)
    return canvas


def place_two_subjects(
    renders: tuple[NDArray[np.uint8], NDArray[np.uint8]],
    look: Look,
    rng: Generator,
    beside: bool,
    shape: tuple[int, int] | None = None,
) -> Array:
    """As `place_subject`, but two subjects: the first to the left of the second, or else above it."""
    height, width = shape or renders[0].shape[:2]
    size, on_ground = min(height, width), look.ground in ("scene", "floor")
    apart, lower = (0.23 * size, 0.14 * size * on_ground) if beside else (0.225 * size, 0)
    canvas = draw_ground(look, height, width, rng, ((34, 19), (94, 19)) if beside else ((64, 22),))
    ink = choose_ink(canvas, look)
    for render, sign in zip(renders, (-1, 1), strict=True):
        side = round(size * rng.uniform(0.45, 0.53))
        middle = (height / 2 + lower, width / 2 + sign * apart) if beside else (height / 2 + sign * apart, width / 2)
        top, left = (
            round(min(max(each + rng.uniform(-0.02, 0.02) * size - side / 2, 0), length - side))
            for each, length in zip(middle, (height, width), strict=True)
        )
        paste(canvas, render, ink, left, top, side)
    return canvas


def choose_ink(ground: Array, look: Look) -> Array | None:
    """The colour for monochrome drawings that stands out from a ground; None for coloured drawings."""
    if look.drawing not in MONOCHROME:
        return None
    return _colour((244, 240, 230)) if _luminance(ground).mean() < 0.4 else _colour((30, 30, 34))


def paste(canvas: Array, render: NDArray[np.uint8], ink: Array | None, left: int, top: int, side: int) -> None:
    """Put a drawing on a canvas, scaled to a square of `side` pixels, in its own colours or in an ink."""
    subject = np.asarray(
        Image.fromarray(render).convert("RGBa").resize((side, side), Image.Resampling.LANCZOS), np.float32
    )
    alpha, colour = subject[..., 3:] / 255, subject[..., :3] / 255  # premultiplied
    if ink is not None:
        colour = alpha * ink
    window = canvas[top : top + side, left : left + side]
    canvas[top : top + side, left : left + side] = window * (1 - alpha) + colour


def apply_medium(placed: Array, look: Look, rng: Generator) -> NDArray[np.uint8]:
    """Apply the medium to the result of `place_subject`: uint8 RGB [H, W, 3]."""
    picture = EFFECTS[look.medium](placed, rng)
    return (np.clip(picture, 0, 1) * 255 + 0.5).astype(np.uint8)


def resize(picture: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """A square picture at another size, by area averaging."""
    return np.asarray(Image.fromarray(picture).resize((size, size), Image.Resampling.BOX))


def split_looks(drawing: str) -> tuple[list[Look], list[Look]]:
    """The looks of one drawing set: those for training and those permanently held out.

    Each set has the plain medium on six grounds and five of the eight media; its other three media are held out. Which
    three rotates over the sets, so that every drawing set and every medium is known, but not these pairs.
    """
    index = list(DRAWINGS).index(drawing)
    names = list(PALETTES)

    def palette(offset: int) -> str:
        return names[(index * 3 + offset) % len(names)]

    grounds = [("white", 0), ("flat", 0), ("flat", 4), ("gradient", 2), ("scene", 6), ("floor", 8)]
    train = [Look(drawing, "plain", kind, palette(offset)) for kind, offset in grounds]
    media = [medium for medium in MEDIA if medium != "plain"]
    kinds = {"film": "scene", "halftone": "flat", "pixel": "flat", "lowkey": "gradient", "neon": "white"}
    held = {media[(index + step) % len(media)] for step in (0, 3, 5)}
    effects = [Look(drawing, m, kinds.get(m, "white"), palette(i + 1)) for i, m in enumerate(media)]
    return train + [e for e in effects if e.medium not in held], [e for e in effects if e.medium in held]
