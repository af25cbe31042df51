"""Avoiding words without guidance: a distilled checkpoint reads no negative prompt, so the prompt itself is led away.

Guidance moves the velocity from the negative prompt's to the prompt's. Here the same is done once, on the prompt's rows
before text fusion, and costs nothing per step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from model.spec import RenderSpec
from model.text_encoder import SUFFIX_TOKENS

SAYS_NOTHING = "a picture"  # what a prompt says that says nothing
MOST = 2.0  # weight of one avoided phrase

Avoided = tuple[tuple[str, float], ...]  # phrases and their weights, by phrase


def avoided(spec: RenderSpec) -> Avoided:
    """What a picture without guidance is led away from; with guidance nothing, its negative prompt does that.

    A style's avoids weigh as much as the style, and so do the keywords of one that is turned around; other phrases of
    the negative prompt, between commas, weigh 1.
    """
    if spec.guidance:
        return ()
    weights: dict[str, float] = {}
    for style in spec.styles:
        for text in style.avoids if style.strength > 0 else style.keywords:
            for phrase in phrases(text):
                weights[phrase] = min(weights.get(phrase, 0.0) + abs(style.strength), MOST)
    for phrase in phrases(spec.negative):
        weights.setdefault(phrase, 1.0)
    return tuple(sorted((phrase, weight) for phrase, weight in weights.items() if weight))


def phrases(text: str) -> list[str]:
    return [phrase for part in text.split(",") if (phrase := " ".join(part.split()))]


def steer_away(embeds: Tensor, away: Sequence[tuple[Tensor, float]], neutral: Tensor) -> Tensor:
    """A prompt's rows with the directions of avoided phrases subtracted; without phrases, the very same tensor.

    embeds   [1, T, N, E]            the prompt: its own rows, then the template's SUFFIX_TOKENS
    away     [1, T_a, N, E], weight  the avoided phrases, encoded like prompts
    neutral  [1, T_0, N, E]          a prompt that says nothing
    returns  [1, T, N, E]

    With m(e) the mean of a prompt's own rows, for every tap n and own row t

        h'[t, n] = h[t, n] − Σ_a w_a (m(e_a)[n] − m(e_0)[n])

    and the suffix rows, which stand in the same place in every prompt, likewise row by row, h'[t] = h[t] − Σ_a w_a
    (e_a[t] − e_0[t]). So at weight 1 a row of an avoided phrase itself becomes about the neutral row, and rows of other
    words move to the far side of neutral from it. It is linear in the weights, and the order of the phrases means
    nothing. At no tap is the shift longer than the rows it is taken from are on average: many phrases together would
    leave only their opposite of a prompt.
    """
    if not away:
        return embeds
    own, suffix = split(embeds.double())
    neutral_own, neutral_suffix = split(neutral.double())
    parts = [(split(rows.double()), weight) for rows, weight in away]
    parts.sort(key=lambda part: (part[1], part[0][0].sum().item()))  # sums round the same in any order
    shifts = (
        torch.stack([w * (r.mean(1, keepdim=True) - neutral_own.mean(1, keepdim=True)) for (r, _), w in parts]).sum(0),
        torch.stack([w * (r - neutral_suffix) for (_, r), w in parts]).sum(0),
    )
    moved = embeds.double().clone()
    for rows, shift, place in zip(
        (own, suffix), shifts, (slice(None, -SUFFIX_TOKENS), slice(-SUFFIX_TOKENS, None)), strict=True
    ):
        if rows.shape[1]:
            room = rows.norm(dim=-1, keepdim=True).mean(1, keepdim=True)
            length = shift.norm(dim=-1, keepdim=True)
            moved[:, place] -= shift * (room / length.clamp(min=1e-12)).clamp(max=1)
    return moved.to(embeds.dtype)


def split(embeds: Tensor) -> tuple[Tensor, Tensor]:
    """A prompt's own rows and the suffix's."""
    return embeds[:, :-SUFFIX_TOKENS], embeds[:, -SUFFIX_TOKENS:]
