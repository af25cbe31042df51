"""The types passed between the command line and the model: plain, frozen, torch-free."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image


SIDES = (64, 4096)  # the smallest and largest side of a picture, in pixels
MAX_PIXELS = 2048 * 2048  # of one picture
METHODS = ("auto", "tokens", "splice", "vision")  # auto: tokens where the model has a style encoder, else splice
TILES = (1, 2, 4)  # per side; a reference's tiles are shuffled before a vision tower sees it
SAMPLERS = ("euler", "ab2")  # how the flow is followed; see `model/sampler.py`
DENOISE = 0.75  # the default: the prompt decides the content, the init image the layout
DENOISE_MASKED = 1.0  # the default with a mask, as the surroundings give enough to fit in with
LEAK_GUARDS = ("damping", "shift", "both", "none")  # against a spliced reference's content; see `model/splice.py`
STYLE_SETTINGS = ("style_guidance", "leak_guard", "vision_tiles", "vision_rows")  # only used by pictures with styles

LIMITS: Mapping[str, tuple[float, float]] = {  # the smallest and largest value of each setting
    "steps": (1, 1000),
    "guidance": (0, 100),
    "guidance_until": (0.01, 1),
    "style_guidance": (0, 100),
    "mu": (-10, 10),
    "denoise": (0.01, 1),
    "cohesion": (0, 1),
    "strength": (-2, 2),  # of a style, and the weight of a reference within it
    "lora": (-10, 10),  # the weight of an adapter
}


def mentions(text: str, words: str) -> bool:
    """Whether a text already has these words, as whole words, in any case and any composition of accents."""
    text, words = (unicodedata.normalize("NFC", each) for each in (text, words))
    return bool(re.search(rf"(?<!\w){re.escape(words)}(?!\w)", text, re.IGNORECASE))


def in_limits(key: str, value: float) -> bool:
    """Whether a number is within its limits; NaN is not."""
    low, high = LIMITS[key]
    return low <= value <= high


def limits_of(key: str) -> str:
    """Limits as written in messages: "−2 … 2"."""
    return " … ".join(f"{bound:g}".replace("-", "−") for bound in LIMITS[key])


def resolve_denoise(denoise: float | None, *, masked: bool) -> float:
    """How much of an init image to repaint."""
    return (DENOISE_MASKED if masked else DENOISE) if denoise is None else denoise


def steps_taken(denoise: float, steps: int) -> int:
    """How many of the steps a picture takes at this denoise, rounded: at least one."""
    return max(math.floor(round(denoise * steps, 6) + 0.5), 1)


def steps_guided(until: float, taken: int) -> int:
    """How many of the steps taken are guided: at least that share."""
    return math.ceil(round(until * taken, 6))


def raw_mu(image_tokens: int, ends: tuple[float, float] = (0.5, 1.15)) -> float:
    """Log of Raw's time shift: linear in the number of image tokens, not clamped. line: values at 256 and 6400."""
    low, high = ends
    return low + (high - low) * (image_tokens - 256) / (6400 - 256)


def resolve_mu(mu: float | str | tuple[float, float], image_tokens: int) -> float:
    """The mu of a picture, given a model's recommendation: one for all sizes, "auto" as in Krea's Raw, or a line."""
    if mu == "auto":
        return raw_mu(image_tokens)
    return raw_mu(image_tokens, mu) if isinstance(mu, tuple) else float(mu)


@dataclass(frozen=True)
class Reference:
    """One reference picture of a style; weight −2 … 2 within its style."""

    image: Path
    weight: float = 1.0


@dataclass(frozen=True)
class Lora:
    """A low-rank adapter of the network and its weight, which may be negative; 0 is exactly the picture without it."""

    path: Path
    weight: float = 1.0


@dataclass(frozen=True)
class Style:
    """A named look; strength −2 … 2 is its influence on the picture, 0 is exactly the picture without it.

    Keywords follow the strength only in a style without references and LoRA, where the prompt has them between commas.
    """

    name: str
    strength: float
    references: tuple[Reference, ...] = ()
    keywords: tuple[str, ...] = ()
    avoids: tuple[str, ...] = ()
    lora: Path | None = None  # applied at the style's strength
    triggers: tuple[str, ...] = ()  # the LoRA's trigger words; whoever writes the prompt must add them
    method: str = "auto"  # one of METHODS: how the references reach the network


@dataclass(frozen=True)
class Leader:
    """What is specific to the lead picture that others follow; it shares everything else with them."""

    prompt: str
    seed: int
    negative: str = ""


@dataclass(frozen=True)
class RenderSpec:
    """One picture to render. None means the checkpoint's own recommendation, or the default."""

    prompt: str
    width: int | None = None  # pixels, multiples of a token's side: 16, mini's 32
    height: int | None = None
    seed: int = 0
    negative: str = ""  # replaces the empty prompt if guidance is on; else the prompt is steered away from it
    steps: int | None = None
    guidance: float | None = None  # Krea scale: v + g (v − v_uncond), 0 is off
    mu: float | None = None  # the time shift is exp(mu)
    style_guidance: float | None = (
        None  # v_0 + (1 + g)(v_c − v_0) + (1 + this)(v_cs − v_c); None: styles are guided with the prompt
    )
    leak_guard: str | None = None  # of spliced styles, one of LEAK_GUARDS
    vision_tiles: int | None = None  # of styles read by vision, one of TILES
    vision_rows: bool | None = None  # whether their rows follow the prompt's, or they act only through the words
    styles: tuple[Style, ...] = ()
    loras: tuple[Lora, ...] = ()
    cohesion: float = 0.0  # 0 … 1: how much it shares with the lead picture (`model/cohesion.py`); 0 is independent
    leader: Leader | None = None
    sampler: str | None = None  # one of SAMPLERS; None: euler
    guidance_until: float | None = None  # the share of the steps, from the first, with guidance; None: 1
    init_image: Path | None = None  # a picture to start from, instead of pure noise
    denoise: float | None = None  # the share of the steps, the last ones, then taken; None: DENOISE, 1: all
    mask: Path | str | None = None  # what to repaint of init_image: white in a picture, or a region, "96x64+80+120"

    @property
    def adapters(self) -> tuple[Lora, ...]:
        """The LoRAs in use, its own and its styles'; their order does not matter."""
        own = (*self.loras, *(Lora(style.lora, style.strength) for style in self.styles if style.lora))
        return tuple(sorted((lora for lora in own if lora.weight), key=lambda lora: (lora.path, lora.weight)))


def tie_to_lead(specs: Sequence[RenderSpec], cohesion: float, leader: Leader | None = None) -> list[RenderSpec]:
    """Specs tied into a batch: the first one leads, or the given `leader`, which need not be one of them."""
    if not specs or not cohesion:
        return list(specs)
    leader = leader or Leader(specs[0].prompt, specs[0].seed, specs[0].negative)
    return [replace(spec, cohesion=cohesion, leader=leader) for spec in specs]


@dataclass(frozen=True)
class Picture:
    """A rendered picture and how it was made: every setting resolved, in plain values that TOML can hold."""

    image: Image.Image
    record: Mapping[str, Any] = field(default_factory=dict)
