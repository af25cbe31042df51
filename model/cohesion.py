"""Cohesion: how much the pictures of a batch belong together, from 0 (not at all) to 1.

Every picture is tied to a lead picture, the one that a certain prompt and seed give on their own. The lead goes through
the network with the pictures that follow it, always ahead of them, and in proportion to c they share with it

    noise       the mean of each channel of the starting noise moves towards the lead's by NOISE · c, variance kept
    statistics  queries and keys of the image tokens are pulled towards the lead's mean and variance by PULL · c
    attention   a share SHARE · c of each image token's output comes from attention that includes the lead's tokens

the last two in the deeper blocks, as the splice does with a reference (`model/splice.py`; after StyleAligned, arXiv
2312.02133). Each branch of guidance follows the same branch of the lead. Prompt tokens never see the lead.

So a picture depends only on its own spec, which names the lead: it can be reproduced alone or in a batch of any size,
and memory does not grow with the batch. The lead of a batch is the same picture that it would be alone.

B rows, K key-value heads, H query heads, L image tokens, d head dim, as in `model/dit.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from model.attention import attention
from model.dit import Attend, DiTConfig
from model.spec import RenderSpec
from model.splice import Capture, first_block, guard_keys, moments, pull_statistics

Spec = TypeVar("Spec", bound=RenderSpec)

# At c = 1. More attention ties looks closer but lets the lead's content through: at 0.75 eight prompts of a run lose a
# tenth of their subjects on Raw. With damping alone twice as many are lost.
NOISE, PULL, SHARE = 1.0, 0.8, 0.65
LEAD_GUARD = "both"  # against the lead's content


def lead_spec(spec: Spec) -> Spec | None:
    """The spec of the lead picture: this one but for prompt, negative and seed. None if nothing is shared."""
    if not spec.cohesion or spec.leader is None:
        return None
    leader = spec.leader
    return replace(spec, prompt=leader.prompt, negative=leader.negative, seed=leader.seed, cohesion=0.0, leader=None)


def is_lead(spec: RenderSpec) -> bool:
    """Whether a tied picture is its own lead, and so the picture that it would be alone."""
    return lead_spec(spec) == replace(spec, cohesion=0.0, leader=None)


def shared_amounts(spec: RenderSpec) -> dict[str, float]:
    """How much noise, statistics and attention a picture shares with its lead, for a record; the lead itself shares
    none."""
    c = 0.0 if is_lead(spec) else spec.cohesion
    return {"noise": round(NOISE * c, 6), "statistics": round(PULL * c, 6), "attention": round(SHARE * c, 6)}


def shared_noise(starts: Tensor, cohesion: float) -> Tensor:
    """Starts [B, C, H, W], the lead's first -> the same with all other channel means moved towards the lead's.

    The lowest frequencies of the noise become the colours of the background and of the whole picture; what decides the
    layout is left alone.
    """
    means, part = starts.mean((2, 3), keepdim=True), NOISE * cohesion
    mixed = means[1:].lerp(means[:1], part) * ((1 - part) ** 2 + part**2) ** -0.5  # keeps the variance
    same = (starts[1:] == starts[:1]).flatten(1).all(1)  # those with the lead's seed stay as they are
    mixed[same] = means[1:][same]
    return torch.cat((starts[:1], starts[1:] + (mixed - means[1:])))


class LeadAttention:
    """Records the lead's attention in an evaluation of the network, and lets rows evaluated after it follow."""

    def __init__(self, config: DiTConfig, cohesion: float, sigmas: Sequence[float], tokens: int, column_offset: float):
        """sigmas of the steps, number of image tokens, and the `Krea2.column_offset` of their grid."""
        self.config, self.cohesion, self.sigmas = config, cohesion, sigmas
        self.tokens, self.column_offset = tokens, column_offset
        self.first_block = first_block(config.blocks)
        self.captures: dict[int, list[Capture]] = {}  # branch -> the lead's capture in each tied block, keys guarded

    def record(self, attend: Sequence[Attend | None] | None, branches: Sequence[int], step: int) -> list[Attend | None]:
        """Attention for the lead's rows, in these branches: unchanged, but recorded."""
        tokens, sigma = self.tokens, self.sigmas[step]
        self.captures |= {branch: [] for branch in branches}

        def recording(inner: Attend, _: int) -> Attend:
            def block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                own_q, own_k, own_v = (x[:, :, -tokens:] for x in (q, k, v))
                keys = guard_keys(own_k, self.config, LEAD_GUARD, sigma, self.column_offset)
                captured = Capture(keys, own_v, *moments(own_q), *moments(own_k))
                for row, branch in enumerate(branches):
                    self.captures[branch].append(Capture(*(x[row] for x in captured)))
                return inner(q, k, v)

            return block

        return self._in_deeper_blocks(attend, recording)

    def follow(self, attend: Sequence[Attend | None] | None, branches: Sequence[int]) -> list[Attend | None]:
        """Attention for rows in these branches, tied to what the same block recorded of the lead."""

        def following(inner: Attend, index: int) -> Attend:
            def block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                each = (self.captures[branch][index] for branch in branches)
                captured = Capture(*map(torch.stack, zip(*each, strict=True)))
                return shared_attention(inner, captured, self.cohesion)(q, k, v)

            return block

        return self._in_deeper_blocks(attend, following)

    def _in_deeper_blocks(
        self, attend: Sequence[Attend | None] | None, wrap: Callable[[Attend, int], Attend]
    ) -> list[Attend | None]:
        inner = list(attend) if attend is not None else [None] * self.config.blocks
        return inner[: self.first_block] + [
            wrap(each or attention, i) for i, each in enumerate(inner[self.first_block :])
        ]


def shared_attention(inner: Attend, lead: Capture, cohesion: float) -> Attend:
    """A block's attention, with a share of the image tokens' output from attention that includes the lead."""
    tokens, pull, share = lead.k.shape[2], PULL * cohesion, SHARE * cohesion

    def block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        native = inner(q, k, v)
        q_image = pull_statistics(q[:, :, -tokens:], lead.q_mean, lead.q_var, pull)
        k_image = pull_statistics(k[:, :, -tokens:], lead.k_mean, lead.k_var, pull)
        shared = inner(
            torch.cat((q[:, :, :-tokens], q_image), 2),
            torch.cat((lead.k, k[:, :, :-tokens], k_image), 2),
            torch.cat((lead.v, v), 2),
        )
        image = native[:, :, -tokens:].lerp(shared[:, :, -tokens:], share)
        return torch.cat((native[:, :, :-tokens], image), 2)

    return block
