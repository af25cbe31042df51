"""Resolve a spec: check that a model can render it, and fill in every default."""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from model.avoid import avoided_words, negative_prompt, phrases_in
from model.cohesion import lead_spec
from model.errors import K2Error
from model.reference_weights import WeightedReference, check_references, resolve_auto, weigh
from model.region import EXAMPLE, Region
from model.spec import (
    LEAK_GUARDS,
    MAX_PIXELS,
    METHODS,
    SAMPLERS,
    SIDES,
    TILES,
    RenderSpec,
    Style,
    in_limits,
    limits_of,
    resolve_denoise,
    resolve_mu,
    steps_guided,
    steps_taken,
)
from model.splice import LEAK_GUARD
from model.type_checks import check_types

FADE_BELOW = 0.1  # below this strength references fade out, to nothing at 0
VISION_TILES = 2  # the default: subjects fall apart, strokes and colours stay


@dataclass(frozen=True)
class Capabilities:
    """A model's abilities and recommended settings, as far as a spec depends on them."""

    name: str
    native: int  # the side in pixels that it was trained for
    unit: int  # pixels along the side of a token
    recommended: Mapping[str, Any]  # steps, guidance, mu (see `resolve_mu`)
    has_style_encoder: bool  # it has a style encoder
    has_vision: bool  # its text encoder has a vision tower


@dataclass(frozen=True)
class ResolvedSpec(RenderSpec):
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


def resolve_spec(spec: RenderSpec, model: Capabilities) -> ResolvedSpec:
    """The spec as this model renders it. Raises K2Error if it cannot."""
    check_types(spec, RenderSpec)
    width, height = resolve_size(spec, model)
    steps = model.recommended["steps"] if spec.steps is None else spec.steps
    guidance = float(model.recommended["guidance"] if spec.guidance is None else spec.guidance)
    until, sampler = 1.0 if spec.guidance_until is None else spec.guidance_until, spec.sampler or "euler"
    mu = model.recommended["mu"] if spec.mu is None else spec.mu
    mu = resolve_mu(mu, width * height // model.unit**2)
    if not (isinstance(steps, int) and in_limits("steps", steps)):
        raise K2Error(f"{steps} steps are out of range.", hint=f"Choose {limits_of('steps')}.")
    if not (in_limits("guidance", guidance) and in_limits("mu", mu)):
        raise K2Error(
            f"Guidance {guidance:g} with mu {mu:g} is out of range.",
            hint=f"Choose guidance {limits_of('guidance')} and mu {limits_of('mu')}.",
        )
    if not in_limits("guidance_until", until):
        raise K2Error(
            f"Guidance cannot end after {until:g} of the steps.",
            hint=f"It is a share of the steps, {limits_of('guidance_until')}; guidance 0 turns it off.",
        )
    if sampler not in SAMPLERS:
        raise K2Error(f'There is no sampler "{sampler}".', hint=f"Choose one of {', '.join(SAMPLERS)}.")
    denoise = resolve_denoise(spec.denoise, masked=bool(spec.mask))
    if not in_limits("denoise", denoise):
        raise K2Error(
            f"A denoise of {denoise:g} is out of range.", hint=f"Choose {limits_of('denoise')}; 1 repaints everything."
        )
    if spec.init_image is None and (spec.denoise is not None or spec.mask):
        what = "mask" if spec.mask else "denoise"
        raise K2Error(f"There is no picture to {what}.", hint="Name it as init_image.")
    if isinstance(spec.mask, str):
        region = Region.parse(spec.mask)
        if region is None:
            raise K2Error(f'"{spec.mask}" is not a region.', hint=EXAMPLE)
        region.check(width, height)
    check_seeds_and_cohesion(spec)
    styles = tuple(resolve_method(style, model) for style in spec.styles if style.strength)
    loras = tuple(lora for lora in spec.loras if lora.weight)
    values = vars(spec) | {"width": width, "height": height, "steps": steps, "guidance": guidance, "mu": mu}
    values |= {"sampler": sampler, "guidance_until": float(until) if guidance else None}
    values |= {"denoise": float(denoise) if spec.init_image else None}
    resolved = resolve_style_settings(ResolvedSpec(**(values | {"styles": styles, "loras": loras})))
    for lora in resolved.adapters:
        if not in_limits("lora", lora.weight):
            raise K2Error(f"{lora.path} cannot have the weight {lora.weight:g}.", hint=f"Choose {limits_of('lora')}.")
    return resolved


def resolve_size(spec: RenderSpec, model: Capabilities) -> tuple[int, int]:
    """Width and height in pixels. Raises K2Error."""
    width, height = (model.native if side is None else side for side in (spec.width, spec.height))
    unit = model.unit
    if not all(SIDES[0] <= side <= SIDES[1] and side % unit == 0 for side in (width, height)):
        fitting = "x".join(str(min(max(round(side / unit) * unit, SIDES[0]), SIDES[1])) for side in (width, height))
        raise K2Error(
            f"A picture of {width}x{height} cannot be rendered.",
            hint=f"Sides are multiples of {unit} from {SIDES[0]} to {SIDES[1]}, such as {fitting}.",
        )
    if width * height > MAX_PIXELS:
        raise K2Error(f"{width}x{height} is more than {MAX_PIXELS:,} pixels.", hint="Choose a smaller size.")
    return width, height


def check_seeds_and_cohesion(spec: RenderSpec) -> None:
    """Check seeds and cohesion. Raises K2Error."""
    for seed in (spec.seed, spec.leader.seed if spec.leader else 0):
        if not (isinstance(seed, int) and 0 <= seed < 2**63):
            raise K2Error(f"{seed} is not a seed.", hint="Seeds are whole numbers from 0 to 2^63 − 1.")
    if not in_limits("cohesion", spec.cohesion):
        raise K2Error(f"A cohesion of {spec.cohesion:g} is out of range.", hint=f"Choose {limits_of('cohesion')}.")
    if spec.cohesion and spec.leader is None:
        raise K2Error("Cohesion needs a lead picture, and none is named.", hint="Set `leader` to the first one.")


def resolve_method(style: Style, model: Capabilities) -> Style:
    """The style with `auto` resolved. Raises K2Error."""
    if not all(in_limits("strength", weight) for weight in (style.strength, *(r.weight for r in style.references))):
        raise K2Error(
            f'"{style.name}" or a reference in it is too strong.', hint=f"Strengths are {limits_of('strength')}."
        )
    if style.method not in METHODS:
        raise K2Error(f'There is no style method "{style.method}".', hint=f"Choose one of {', '.join(METHODS)}.")
    return resolve_auto(style, model.name, has_style_encoder=model.has_style_encoder, has_vision=model.has_vision)


def resolve_style_settings(spec: ResolvedSpec) -> ResolvedSpec:
    """Settings that only references use: filled in if any reference counts, else None. Raises K2Error."""
    guard = LEAK_GUARD if spec.leak_guard is None else spec.leak_guard
    if guard not in LEAK_GUARDS:
        raise K2Error(f'There is no leak guard "{guard}".', hint=f"Choose one of {', '.join(LEAK_GUARDS)}.")
    if spec.style_guidance is not None and not in_limits("style_guidance", spec.style_guidance):
        raise K2Error(
            f"style_guidance {spec.style_guidance:g} is out of range.", hint=f"Choose {limits_of('style_guidance')}."
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


# ---- what a resolved spec means for the network ----------------------------------------------------------------------


def fade_weight(spec: RenderSpec) -> float:
    """How much the change made by references' rows counts, 0 … 1, so that strength fades to 0 continuously.

    Even rows without meaning change the picture by being there, so as a strength goes to 0 they are faded out, in the
    velocity. What adds no rows, such as a splice, does not need this.
    """
    tokens = sum(abs(each.weight) for each in weigh(spec.styles, "tokens"))
    seen = [each.weight for each in weigh(spec.styles, "vision")] if spec.vision_rows else []
    strengths = [tokens, sum(weight for weight in seen if weight > 0)]
    return min(max(strengths) / FADE_BELOW, 1.0) if any(strengths) else 1.0


def prompt_branches(spec: RenderSpec) -> tuple[str, ...]:
    """The branches in which a prompt is evaluated: "styled", as asked for; "lasting", if something fades, without that;
    "plain", if styles have their own guidance, without any reference. "plain" serves as both if nothing would be left
    in "lasting"."""
    fades, guided = fade_weight(spec) < 1, spec.style_guidance is not None
    lasts = bool(weigh(spec.styles, "splice")) or any(references_in(spec, "lasting"))
    return ("styled", *(["lasting"] if fades and (lasts or not guided) else []), *(["plain"] if guided else []))


def references_in(spec: RenderSpec, branch: str) -> tuple[tuple[WeightedReference, ...], tuple[WeightedReference, ...]]:
    """The references used with a prompt in one of the `prompt_branches`: those that become tokens, and those read by
    vision."""
    tokens, seen = weigh(spec.styles, "tokens"), weigh(spec.styles, "vision")
    if branch == "styled":
        return tokens, seen
    return (), tuple(each for each in seen if branch == "lasting" and not (spec.vision_rows and each.weight > 0))


class WeightedPrompt(NamedTuple):
    """A prompt, and its share of the picture's velocity."""

    prompt: str
    share: float


def weighted_prompts(spec: RenderSpec) -> list[WeightedPrompt]:
    """The prompts whose velocities make up the picture's, with shares that add up to 1; just one if no words are
    weighted.

    Words have no strength themselves: those of a keywords-only style get the style's, applied to the velocity, or the
    sum over several styles, at most 1 or, if larger, the largest of them. With their strengths t_1 < t_2 < …, as `ease`
    leaves them, v_k the velocity of the prompt with the words of strength t_k and more, and v_0 with none, v = v_0 + Σ
    (t_k − t_{k−1}) (v_k − v_0). If pictures or a LoRA carry a style's strength, its words join in full, even if a
    keywords-only style has them too.
    """
    style_words = [(style, style.keywords if style.strength > 0 else style.avoids) for style in spec.styles]
    unweighted = {word for style, words in style_words if has_carrier(style) for word in (*words, *style.triggers)}
    return split_by_strength(
        spec.prompt,
        [(abs(style.strength), words) for style, words in style_words if not has_carrier(style)],
        unweighted,
    )


def weighted_negatives(spec: RenderSpec) -> list[WeightedPrompt]:
    """The negative prompts whose velocities guidance leads away from, with shares as in `weighted_prompts`: they hold
    what styles avoid, or, for styles of negative strength, their keywords."""
    style_phrases = [
        (style, [phrase for text in avoided_words(style) for phrase in phrases_in(text)]) for style in spec.styles
    ]
    unweighted = {phrase for style, found in style_phrases if has_carrier(style) for phrase in found}
    weighted = [(abs(style.strength), found) for style, found in style_phrases if not has_carrier(style)]
    prompt = negative_prompt(spec)
    found = split_by_strength(", ".join(phrases_in(prompt)), weighted, unweighted)
    return found if len(found) > 1 else [WeightedPrompt(prompt, 1.0)]


def has_carrier(style: Style) -> bool:
    """Whether something other than words carries a style's strength."""
    return bool(style.references or style.lora)


def split_by_strength(
    prompt: str, weighted: Sequence[tuple[float, Sequence[str]]], unweighted: Collection[str]
) -> list[WeightedPrompt]:
    """A prompt in versions: with all words of these strengths, with only the stronger ones … and with none."""
    parts: dict[str, list[float]] = {}
    for strength, words in weighted:
        for word in dict.fromkeys(words):
            parts.setdefault(word, []).append(strength)
    # rounded, or 0.1 + 0.2 and 0.3 would count as two strengths
    sums = {word: round(math.fsum(each), 12) for word, each in parts.items() if word not in unweighted}
    strengths = {word: min(total, max(1, *parts[word])) for word, total in sums.items()}
    found, before = [], 0.0
    for strength in sorted({*strengths.values()}):
        eased = ease(strength)
        found.append(WeightedPrompt(prompt, eased - before))
        prompt, before = remove_words(prompt, [word for word, own in strengths.items() if own == strength]), eased
    return [each for each in (*found, WeightedPrompt(prompt, 1 - before)) if each.share]


def ease(strength: float) -> float:
    """Strength beyond 1 at half rate: words that count twice tear pictures apart."""
    return min(strength, (1 + strength) / 2)


def remove_words(prompt: str, words: Iterable[str]) -> str:
    """A prompt without these words, where they stand between commas; the last occurrence of each is removed."""
    for word in words:
        parts = f", {prompt}, ".rpartition(f", {word}, ")
        if parts[1]:
            prompt = f"{parts[0]}, {parts[2]}"[2:-2]
    return prompt


def evaluations(spec: ResolvedSpec) -> int:
    """The most evaluations that a picture takes per step, not counting a splice's."""
    return len(weighted_prompts(spec)) * len(prompt_branches(spec)) + (
        len(weighted_negatives(spec)) if spec.guidance else 0
    )


def batch_key(spec: ResolvedSpec) -> Hashable:
    """What pictures must share to be rendered together."""
    schedule = (spec.height, spec.width, spec.steps, spec.first_step, bool(spec.mask), spec.mu, spec.sampler)
    guided = (spec.guidance, spec.end_of_guidance, spec.style_guidance)
    spliced = tuple((style.strength, style.references) for style in spec.styles if style.method == "splice")
    versions = (weighted_prompts(spec), weighted_negatives(spec) if spec.guidance else ())
    shares = tuple(tuple(version.share for version in each) for each in versions)
    looks = (fade_weight(spec), prompt_branches(spec), shares, spec.leak_guard, spliced)
    return schedule, guided, looks, spec.adapters, spec.cohesion, lead_spec(spec)
