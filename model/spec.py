"""What crosses the seam between the command line and the model: plain, frozen, torch-free."""

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


SIDES = (64, 4096)  # pixels along each side of a picture that can be made
MOST_PIXELS = 2048 * 2048  # of one
METHODS = ("auto", "tokens", "splice", "vision")  # auto: tokens where the model has a style encoder, else splice
TILES = (1, 2, 4)  # along a side, that a reference is cut into and shuffled before a vision tower sees it
SAMPLERS = ("euler", "ab2")  # how the flow is followed; see `model/sampler.py`
DENOISE = 0.75  # where none is asked for: the prompt says what is there, the picture that it began with where; and
DENOISE_MASKED = 1.0  # within a mask, as there is enough around it to fit in with
LEAK_GUARDS = ("damping", "shift", "both", "none")  # against a spliced reference's content; see `model/splice.py`
OF_REFERENCES = ("style_guidance", "leak_guard", "vision_tiles", "vision_rows")  # of use to pictures of a style alone

LIMITS: Mapping[str, tuple[float, float]] = {  # of what pictures are rendered by, the least and the most
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


def says(text: str, words: str) -> bool:
    """Whether a text has these words already, as words, in whatever case and however accents are composed."""
    text, words = (unicodedata.normalize("NFC", each) for each in (text, words))
    return bool(re.search(rf"(?<!\w){re.escape(words)}(?!\w)", text, re.IGNORECASE))


def within(key: str, value: float) -> bool:
    """Whether a number keeps to its limits; what is no number does not."""
    least, most = LIMITS[key]
    return least <= value <= most


def span(key: str) -> str:
    """Limits as sentences say them: "−2 … 2"."""
    return " … ".join(f"{bound:g}".replace("-", "−") for bound in LIMITS[key])


def denoise_of(denoise: float | None, *, masked: bool) -> float:
    """How much of an initial picture is made anew."""
    return (DENOISE_MASKED if masked else DENOISE) if denoise is None else denoise


def steps_taken(denoise: float, steps: int) -> int:
    """How many of the steps a picture takes at this denoise, to the nearest: at least one."""
    return max(math.floor(round(denoise * steps, 6) + 0.5), 1)


def steps_guided(until: float, taken: int) -> int:
    """How many of the steps that are taken are guided: no fewer than that share."""
    return math.ceil(round(until * taken, 6))


def raw_mu(image_tokens: int, line: tuple[float, float] = (0.5, 1.15)) -> float:
    """Log of Raw's time shift: linear in the number of image tokens, not clamped; its values at 256 and at 6400."""
    low, high = line
    return low + (high - low) * (image_tokens - 256) / (6400 - 256)


def mu_at(mu: float | str | tuple[float, float], image_tokens: int) -> float:
    """The mu of a picture where a model recommends this: one for all, "auto" as Krea's Raw, or another line."""
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
    """A low-rank adapter of the network and its weight, negative too; 0 is exactly the picture without it."""

    path: Path
    weight: float = 1.0


@dataclass(frozen=True)
class Style:
    """A named look; strength −2 … 2 is its influence on the picture, 0 is exactly the picture without it.

    Its keywords are weighed where it has no more than words, and where they stand in the prompt between commas.
    """

    name: str
    strength: float
    references: tuple[Reference, ...] = ()
    keywords: tuple[str, ...] = ()
    avoids: tuple[str, ...] = ()
    lora: Path | None = None  # joins at the style's strength
    triggers: tuple[str, ...] = ()  # words that the LoRA was trained to answer to; whoever writes the prompt adds them
    method: str = "auto"  # one of METHODS: how the references reach the network


@dataclass(frozen=True)
class Leader:
    """What of the picture that others are tied to is its own; everything else it shares with them."""

    prompt: str
    seed: int
    negative: str = ""


@dataclass(frozen=True)
class RenderSpec:
    """One picture to render. What is None is the checkpoint's own recommendation, or what is usual."""

    prompt: str
    width: int | None = None  # pixels, multiples of a token's side: 16, mini's 32
    height: int | None = None
    seed: int = 0
    negative: str = ""  # takes the empty prompt's place where guidance is on; else the prompt is led away from it
    steps: int | None = None
    guidance: float | None = None  # Krea scale: v + g (v − v_uncond), 0 is off
    mu: float | None = None  # the time shift is exp(mu)
    style_guidance: float | None = (
        None  # v_0 + (1 + g)(v_c − v_0) + (1 + this)(v_cs − v_c); None: styles go with the prompt
    )
    leak_guard: str | None = None  # of spliced styles, one of LEAK_GUARDS
    vision_tiles: int | None = None  # of styles read by vision, one of TILES
    vision_rows: bool | None = None  # whether their rows follow the prompt's, or speak through the words alone
    styles: tuple[Style, ...] = ()
    loras: tuple[Lora, ...] = ()
    cohesion: float = 0.0  # 0 … 1: how much is shared with the leader (`model/cohesion.py`); 0 is the picture by itself
    leader: Leader | None = None
    sampler: str | None = None  # one of SAMPLERS; None: euler
    guidance_until: float | None = None  # the share of the steps, from the first on, that guidance is on for; None: 1
    init_image: Path | None = None  # a picture that it begins with, in the place of pure noise
    denoise: float | None = None  # the share of the steps, the last ones, that it then takes; None: DENOISE, 1: all
    mask: Path | str | None = None  # of init_image what is made anew: white in a picture, or a region, "96x64+80+120"

    @property
    def adapters(self) -> tuple[Lora, ...]:
        """The LoRAs that take part, its own and its styles'; their order means nothing."""
        own = (*self.loras, *(Lora(style.lora, style.strength) for style in self.styles if style.lora))
        return tuple(sorted((lora for lora in own if lora.weight), key=lambda lora: (lora.path, lora.weight)))


def tied(specs: Sequence[RenderSpec], cohesion: float, leader: Leader | None = None) -> list[RenderSpec]:
    """Specs as a batch that belongs together: the first one leads, or a picture that is none of them."""
    if not specs or not cohesion:
        return list(specs)
    leader = leader or Leader(specs[0].prompt, specs[0].seed, specs[0].negative)
    return [replace(spec, cohesion=cohesion, leader=leader) for spec in specs]


@dataclass(frozen=True)
class Picture:
    """A rendered picture and how it was made: everything resolved, in plain values that TOML can hold."""

    image: Image.Image
    record: Mapping[str, Any] = field(default_factory=dict)
