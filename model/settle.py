"""Settle a spec: check that a model can render it, and fill in every default."""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from model.avoid import negative_prompt, phrases, unsaid
from model.cohesion import leader_of
from model.errors import K2Error
from model.kinds import check_kinds
from model.region import LIKE, Region
from model.spec import (
    LEAK_GUARDS,
    METHODS,
    MOST_PIXELS,
    SAMPLERS,
    SIDES,
    TILES,
    RenderSpec,
    Style,
    denoise_of,
    mu_at,
    span,
    steps_guided,
    steps_taken,
    within,
)
from model.splice import LEAK_GUARD
from model.weighed import Weighed, check_references, weigh, with_way

FADE = 0.1  # below this strength references fade out, to nothing at 0
VISION_TILES = 2  # the default: subjects fall apart, strokes and colours stay


@dataclass(frozen=True)
class Able:
    """A model's abilities and recommended settings, as far as a spec depends on them."""

    name: str
    native: int  # the side in pixels that it was trained for
    unit: int  # pixels along the side of a token
    recommended: Mapping[str, Any]  # steps, guidance, mu (see `mu_at`)
    reads: bool  # it has a style encoder
    sees: bool  # its text encoder has a vision tower


@dataclass(frozen=True)
class Settled(RenderSpec):
    """A spec as a model renders it, with nothing left open."""

    width: int = 0
    height: int = 0
    steps: int = 0
    guidance: float = 0.0
    mu: float = 0.0
    sampler: str = "euler"

    @property
    def first_step(self) -> int:
        """The first step taken: an init image skips those before it."""
        if self.denoise is None:
            return 0
        return self.steps - steps_taken(self.denoise, self.steps)

    @property
    def end_of_guidance(self) -> int:
        """The first step without guidance: it evaluates only the prompt's branches; steps before it are guided."""
        taken = self.steps - self.first_step
        return self.first_step + steps_guided(self.guidance_until or 0, taken)


def settle(spec: RenderSpec, able: Able) -> Settled:
    """The spec as this model renders it. Raises K2Error if it cannot."""
    check_kinds(spec, RenderSpec)
    width, height = size_of(spec, able)
    steps = able.recommended["steps"] if spec.steps is None else spec.steps
    guidance = float(able.recommended["guidance"] if spec.guidance is None else spec.guidance)
    until, sampler = 1.0 if spec.guidance_until is None else spec.guidance_until, spec.sampler or "euler"
    mu = able.recommended["mu"] if spec.mu is None else spec.mu
    mu = mu_at(mu, width * height // able.unit**2)
    if not (isinstance(steps, int) and within("steps", steps)):
        raise K2Error(f"{steps} steps are out of range.", hint=f"Choose {span('steps')}.")
    if not (within("guidance", guidance) and within("mu", mu)):
        raise K2Error(
            f"Guidance {guidance:g} with mu {mu:g} is out of range.",
            hint=f"Choose guidance {span('guidance')} and mu {span('mu')}.",
        )
    if not within("guidance_until", until):
        raise K2Error(
            f"Guidance cannot end after {until:g} of the steps.",
            hint=f"It is a share of the steps, {span('guidance_until')}; guidance 0 turns it off.",
        )
    if sampler not in SAMPLERS:
        raise K2Error(f'There is no sampler "{sampler}".', hint=f"Choose one of {', '.join(SAMPLERS)}.")
    denoise = denoise_of(spec.denoise, masked=bool(spec.mask))
    if not within("denoise", denoise):
        raise K2Error(
            f"A denoise of {denoise:g} is out of range.", hint=f"Choose {span('denoise')}; 1 repaints everything."
        )
    if spec.init_image is None and (spec.denoise is not None or spec.mask):
        what = "mask" if spec.mask else "denoise"
        raise K2Error(f"There is no picture to {what}.", hint="Name it as init_image.")
    if isinstance(spec.mask, str):
        region = Region.read(spec.mask)
        if region is None:
            raise K2Error(f'"{spec.mask}" is not a region.', hint=LIKE)
        region.check(width, height)
    check_company(spec)
    styles = tuple(with_method(style, able) for style in spec.styles if style.strength)
    loras = tuple(lora for lora in spec.loras if lora.weight)
    said = vars(spec) | {"width": width, "height": height, "steps": steps, "guidance": guidance, "mu": mu}
    said |= {"sampler": sampler, "guidance_until": float(until) if guidance else None}
    said |= {"denoise": float(denoise) if spec.init_image else None}
    settled = settle_styles(Settled(**(said | {"styles": styles, "loras": loras})))
    for lora in settled.adapters:
        if not within("lora", lora.weight):
            raise K2Error(f"{lora.path} cannot have the weight {lora.weight:g}.", hint=f"Choose {span('lora')}.")
    return settled


def size_of(spec: RenderSpec, able: Able) -> tuple[int, int]:
    """Width and height in pixels. Raises K2Error."""
    width, height = (able.native if side is None else side for side in (spec.width, spec.height))
    unit = able.unit
    if not all(SIDES[0] <= side <= SIDES[1] and side % unit == 0 for side in (width, height)):
        fitting = "x".join(str(min(max(round(side / unit) * unit, SIDES[0]), SIDES[1])) for side in (width, height))
        raise K2Error(
            f"A picture of {width}x{height} cannot be rendered.",
            hint=f"Sides are multiples of {unit} from {SIDES[0]} to {SIDES[1]}, such as {fitting}.",
        )
    if width * height > MOST_PIXELS:
        raise K2Error(f"{width}x{height} is more than {MOST_PIXELS:,} pixels.", hint="Choose a smaller size.")
    return width, height


def check_company(spec: RenderSpec) -> None:
    """Check seeds and cohesion. Raises K2Error."""
    for seed in (spec.seed, spec.leader.seed if spec.leader else 0):
        if not (isinstance(seed, int) and 0 <= seed < 2**63):
            raise K2Error(f"{seed} is not a seed.", hint="Seeds are whole numbers from 0 to 2^63 − 1.")
    if not within("cohesion", spec.cohesion):
        raise K2Error(f"A cohesion of {spec.cohesion:g} is out of range.", hint=f"Choose {span('cohesion')}.")
    if spec.cohesion and spec.leader is None:
        raise K2Error("Cohesion needs a lead picture, and none is named.", hint="Set `leader` to the first one.")


def with_method(style: Style, able: Able) -> Style:
    """The style with `auto` resolved. Raises K2Error."""
    if not all(within("strength", weight) for weight in (style.strength, *(r.weight for r in style.references))):
        raise K2Error(f'"{style.name}" or a reference in it is too strong.', hint=f"Strengths are {span('strength')}.")
    if style.method not in METHODS:
        raise K2Error(f'There is no style method "{style.method}".', hint=f"Choose one of {', '.join(METHODS)}.")
    return with_way(style, able.name, reads=able.reads, sees=able.sees)


def settle_styles(spec: Settled) -> Settled:
    """Settings that only references use: filled in if any reference counts, else None. Raises K2Error."""
    guard = LEAK_GUARD if spec.leak_guard is None else spec.leak_guard
    if guard not in LEAK_GUARDS:
        raise K2Error(f'There is no leak guard "{guard}".', hint=f"Choose one of {', '.join(LEAK_GUARDS)}.")
    if spec.style_guidance is not None and not within("style_guidance", spec.style_guidance):
        raise K2Error(
            f"style_guidance {spec.style_guidance:g} is out of range.", hint=f"Choose {span('style_guidance')}."
        )
    if spec.vision_tiles not in (None, *TILES):
        raise K2Error(f"vision_tiles cannot be {spec.vision_tiles}.", hint="Choose 1, 2 or 4.")
    tokens, spliced, shown = (weigh(spec.styles, method) for method in ("tokens", "splice", "vision"))
    check_references(spec.styles, spec.steps)
    return replace(
        spec,
        style_guidance=spec.style_guidance if tokens or spliced or shown else None,
        leak_guard=guard if spliced else None,
        vision_tiles=(spec.vision_tiles or VISION_TILES) if shown else None,
        vision_rows=(spec.vision_rows is not False) if shown else None,
    )


# ---- what a settled spec means for the network ----------------------------------------------------------------------


def presence(spec: RenderSpec) -> float:
    """How much the change made by references' rows counts, 0 … 1, so that strength fades to 0 continuously.

    Even rows without meaning change the picture by being there, so as a strength goes to 0 they are faded out, in the
    velocity. What adds no rows, such as a splice, does not need this.
    """
    tokens = sum(abs(each.weight) for each in weigh(spec.styles, "tokens"))
    seen = [each.weight for each in weigh(spec.styles, "vision")] if spec.vision_rows else []
    strengths = [tokens, sum(weight for weight in seen if weight > 0)]
    return min(max(strengths) / FADE, 1.0) if any(strengths) else 1.0


def ways(spec: RenderSpec) -> tuple[str, ...]:
    """The branches in which a prompt is evaluated: "styled", as asked for; "lasting", if something fades, without that;
    "plain", if styles have their own guidance, without any reference. "plain" serves as both if nothing would be left
    in "lasting"."""
    fades, guided = presence(spec) < 1, spec.style_guidance is not None
    lasts = bool(weigh(spec.styles, "splice")) or any(read_beside(spec, "lasting"))
    return ("styled", *(["lasting"] if fades and (lasts or not guided) else []), *(["plain"] if guided else []))


def read_beside(spec: RenderSpec, way: str) -> tuple[tuple[Weighed, ...], tuple[Weighed, ...]]:
    """The references used with a prompt in one of the `ways`: those that become tokens, and those read by vision."""
    tokens, seen = weigh(spec.styles, "tokens"), weigh(spec.styles, "vision")
    if way == "styled":
        return tokens, seen
    return (), tuple(each for each in seen if way == "lasting" and not (spec.vision_rows and each.weight > 0))


class Wording(NamedTuple):
    """A prompt, and its share of the picture's velocity."""

    prompt: str
    share: float


def wordings(spec: RenderSpec) -> list[Wording]:
    """The prompts whose velocities make up the picture's, with shares that add up to 1; just one if no words are
    weighted.

    Words have no strength themselves: those of a keywords-only style get the style's, applied to the velocity, or the
    sum over several styles, at most 1 or, if larger, the largest of them. With their strengths t_1 < t_2 < …, `eased`,
    v_k the velocity of the prompt with the words of strength t_k and more, and v_0 with none,
    v = v_0 + Σ (t_k − t_{k−1}) (v_k − v_0). If pictures or a LoRA carry a style's strength, its words join in full,
    even if a keywords-only style has them too.
    """
    said = [(style, style.keywords if style.strength > 0 else style.avoids) for style in spec.styles]
    whole = {word for style, words in said if carried(style) for word in (*words, *style.triggers)}
    return by_strength(
        spec.prompt, [(abs(style.strength), words) for style, words in said if not carried(style)], whole
    )


def unwanted(spec: RenderSpec) -> list[Wording]:
    """The negative prompts whose velocities guidance leads away from, with shares as in `wordings`: they hold what
    styles avoid, or, for styles of negative strength, their keywords."""
    said = [(style, [phrase for text in unsaid(style) for phrase in phrases(text)]) for style in spec.styles]
    whole = {phrase for style, found in said if carried(style) for phrase in found}
    alone = [(abs(style.strength), found) for style, found in said if not carried(style)]
    prompt = negative_prompt(spec)
    found = by_strength(", ".join(phrases(prompt)), alone, whole)
    return found if len(found) > 1 else [Wording(prompt, 1.0)]


def carried(style: Style) -> bool:
    """Whether something other than words carries a style's strength."""
    return bool(style.references or style.lora)


def by_strength(prompt: str, alone: Sequence[tuple[float, Sequence[str]]], whole: Collection[str]) -> list[Wording]:
    """A prompt's wordings: with all words of these strengths, with only the stronger ones … and with none."""
    parts: dict[str, list[float]] = {}
    for strength, words in alone:
        for word in dict.fromkeys(words):
            parts.setdefault(word, []).append(strength)
    # rounded, or 0.1 + 0.2 and 0.3 would count as two strengths
    sums = {word: round(math.fsum(each), 12) for word, each in parts.items() if word not in whole}
    strengths = {word: min(total, max(1, *parts[word])) for word, total in sums.items()}
    found, before = [], 0.0
    for strength in sorted({*strengths.values()}):
        reached = eased(strength)
        found.append(Wording(prompt, reached - before))
        prompt, before = without(prompt, [word for word, own in strengths.items() if own == strength]), reached
    return [each for each in (*found, Wording(prompt, 1 - before)) if each.share]


def eased(strength: float) -> float:
    """Strength beyond 1 at half rate: words that count twice tear pictures apart."""
    return min(strength, (1 + strength) / 2)


def without(prompt: str, words: Iterable[str]) -> str:
    """A prompt without these words, where they stand between commas; the last occurrence of each is removed."""
    for word in words:
        parts = f", {prompt}, ".rpartition(f", {word}, ")
        if parts[1]:
            prompt = f"{parts[0]}, {parts[2]}"[2:-2]
    return prompt


def branches(spec: Settled) -> int:
    """The most evaluations that a picture takes per step, not counting a splice's."""
    return len(wordings(spec)) * len(ways(spec)) + (len(unwanted(spec)) if spec.guidance else 0)


def schedule(spec: Settled) -> Hashable:
    """What pictures must share to be rendered together."""
    course = (spec.height, spec.width, spec.steps, spec.first_step, bool(spec.mask), spec.mu, spec.sampler)
    guided = (spec.guidance, spec.end_of_guidance, spec.style_guidance)
    spliced = tuple((style.strength, style.references) for style in spec.styles if style.method == "splice")
    said = (wordings(spec), unwanted(spec) if spec.guidance else ())
    shares = tuple(tuple(wording.share for wording in each) for each in said)
    looks = (presence(spec), ways(spec), shares, spec.leak_guard, spliced)
    return course, guided, looks, spec.adapters, spec.cohesion, leader_of(spec)
