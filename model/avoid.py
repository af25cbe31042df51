"""Avoid words without guidance: a distilled checkpoint uses no negative prompt, so the prompt itself is steered away.

Guidance moves the velocity from the negative prompt's towards the prompt's. Here the same is done once, to the prompt's
rows before text fusion, and costs nothing per step.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from model.spec import RenderSpec, Style
from model.text_encoder import SUFFIX_TOKENS

NEUTRAL_PROMPT = "a picture"
MAX_WEIGHT = 2.0  # largest weight of one avoided phrase
MEAN_SHARE = 0.5  # share of the avoided mean taken from unrelated rows: all of it would cost one subject in ten

AvoidedPhrases = tuple[tuple[str, float], ...]  # phrases and their weights, sorted by phrase


def avoided_phrases(spec: RenderSpec) -> AvoidedPhrases:
    """What a picture without guidance is steered away from; with guidance nothing, as the negative prompt does that.

    A style's avoids weigh as much as the style, and so do the keywords of one with negative strength; phrases of the
    negative prompt, between commas, weigh at least 1, unless they come only from the styles.
    """
    if spec.guidance:
        return ()
    strengths: dict[str, list[float]] = defaultdict(list)
    for phrase, strength in style_avoids(spec):
        strengths[phrase].append(strength)
    weights = defaultdict(float, {phrase: min(math.fsum(each), MAX_WEIGHT) for phrase, each in strengths.items()})
    # what two styles add is added once
    joined = dict.fromkeys(text for style in spec.styles for text in avoided_words(style))
    for phrase in Counter(phrases_in(spec.negative)) - Counter(
        phrase for text in joined for phrase in phrases_in(text)
    ):
        weights[phrase] = max(weights[phrase], 1.0)
    return tuple(sorted((phrase, weight) for phrase, weight in weights.items() if weight))


def negative_prompt(spec: RenderSpec) -> str:
    """What guidance leads away from: the spec's negative prompt, plus the styles' avoids that it lacks."""
    present = phrases_in(spec.negative)
    lacking = sorted({phrase for phrase, _ in style_avoids(spec) if phrase not in present})
    return ", ".join(filter(None, [spec.negative, *lacking]))


def avoided_words(style: Style) -> tuple[str, ...]:
    """What a style adds to the negative prompt."""
    return style.avoids if style.strength > 0 else style.keywords


def style_avoids(spec: RenderSpec) -> list[tuple[str, float]]:
    """Each phrase that a style avoids, and how strongly, once for every style that does."""
    return [
        (phrase, abs(style.strength))
        for style in spec.styles
        for text in avoided_words(style)
        for phrase in phrases_in(text)
    ]


def phrases_in(text: str) -> list[str]:
    return [phrase for part in text.split(",") if (phrase := " ".join(part.split()))]


class Direction(NamedTuple):
    """The direction of a phrase, and how much of it to remove."""

    rows: Tensor  # [1, T_a, N, E] its rows when read as a prompt
    suffix_delta: Tensor  # [1, SUFFIX_TOKENS, N, E] what it adds to the current prompt's suffix
    weight: float


def directions(
    encode: Callable[[str], Tensor], truncated: Callable[[str], int], prompt: str, avoided: AvoidedPhrases
) -> list[Direction]:
    """The directions of avoided phrases for a prompt.

    encode     makes a prompt's rows [1, T, N, E]
    truncated  the number of tokens truncated from a prompt's end

    The suffix summarises the prompt, so what a phrase adds to it depends on the rest: it is the difference between the
    prompt with the phrase and without. If the prompt already contains the phrase, it is removed for the latter. A
    prompt too long for the phrase to fit after it loses its last words, each being at least one token.
    """
    found = []
    for phrase, weight in avoided:
        overflow = truncated(f"{prompt}, {phrase}")
        base = " ".join(prompt.split()[:-overflow]) if overflow else prompt
        without_phrase = re.sub(rf"[\s,]*(?<!\w){re.escape(phrase)}(?!\w)", "", base, flags=re.IGNORECASE)
        with_phrase = base if without_phrase != base else ", ".join(filter(None, (base, phrase)))
        suffixes = [split_suffix(encode(text).cpu().double())[1] for text in (with_phrase, without_phrase)]
        found.append(Direction(split_suffix(encode(phrase))[0], suffixes[0] - suffixes[1], weight))
    return found


def steer_away(embeds: Tensor, away: Sequence[Direction], neutral: Tensor) -> Tensor:
    """A prompt's rows steered away from avoided phrases; without phrases, the very same tensor.

    embeds   [1, T, N, E]  the prompt: its own rows, then the template's SUFFIX_TOKENS
    neutral  [1, T_0, N, E]  a neutral prompt
    returns  [1, T, N, E]

    Tap by tap, with m the mean of the neutral prompt's own rows, R_a − m the avoided phrase's, r_a their mean, P_a the
    projection onto what they span, g = |P_a (h − m)|² / |h − m|² of an own row h, averaged over the taps, s(g) =
    3 g² − 2 g³, and c = MEAN_SHARE (1 − the largest s(g) of all own rows),

        h' = h − Σ_a w_a (s(g) (h − m) + c (1 − s(g)) r_a)

    A row about what is avoided lies in that span, and becomes neutral at weight 1, word by word. (The mean alone would
    achieve that for a single word only: of three, two thirds of each would stay.) If the prompt does not mention it,
    rows are steered away by the mean; if it does, removing that is enough. The suffix rows lose what the phrase adds to
    them, so at weight 1 they are those of the prompt without it. Everything is linear in the weights, and the order of
    the phrases does not matter. At each tap a shift is capped at the row's distance from neutral, or the rows' average
    length if larger: otherwise many phrases together would leave only the opposite of themselves.
    """
    if not away:
        return embeds
    own, suffix = split_suffix(embeds.cpu().double())
    middle = split_suffix(neutral.cpu().double())[0].mean(1, keepdim=True)
    parts = [(removal(own - middle, rows.cpu().double() - middle), adds, weight) for rows, adds, weight in away]
    parts.sort(key=lambda part: (part[2], part[1].sum().item()))  # so that sums round the same in any order
    moved = []
    from_own = [weight * toward for toward, _, weight in parts]
    from_suffix = [weight * adds for _, adds, weight in parts]
    for rows, far, shifts in ((own, own - middle, from_own), (suffix, suffix, from_suffix)):
        shift = torch.stack(shifts).sum(0)
        if rows.shape[1]:
            max_shift = torch.maximum(
                rows.norm(dim=-1, keepdim=True).mean(1, keepdim=True), far.norm(dim=-1, keepdim=True)
            )
            shift = shift * (max_shift / shift.norm(dim=-1, keepdim=True).clamp(min=1e-12)).clamp(max=1)
        moved.append(rows - shift)
    return torch.cat(moved, 1).to(embeds)


def removal(rows: Tensor, avoided: Tensor) -> Tensor:
    """What weight 1 removes from rows [1, T, N, E], for avoided rows [1, T_a, N, E], both relative to the neutral
    mean."""
    by_tap, spanning = rows[0].transpose(0, 1), avoided[0].transpose(0, 1)  # [N, T, E], [N, T_a, E]
    _, sizes, basis = torch.linalg.svd(spanning, full_matrices=False)
    basis = basis * (sizes > 1e-3 * sizes[:, :1])[..., None]  # words with the same meaning give one direction
    inside = (by_tap @ basis.transpose(1, 2)).square().sum(-1, keepdim=True)
    share = (inside / by_tap.square().sum(-1, keepdim=True).clamp(min=1e-12)).mean(0)
    share = share**2 * (3 - 2 * share)
    aside = MEAN_SHARE * (1 - share.amax()) if len(share) else 0.0
    removed = share * by_tap + aside * (1 - share) * spanning.mean(1, keepdim=True)
    return removed.transpose(0, 1)[None]


def split_suffix(embeds: Tensor) -> tuple[Tensor, Tensor]:
    """A prompt's own rows and the suffix's."""
    return embeds[:, :-SUFFIX_TOKENS], embeds[:, -SUFFIX_TOKENS:]
