"""Cohesion: how much the pictures of a batch belong together, from 0 (not at all) to 1.

Every picture is tied to a leader, the picture that one prompt and one seed come to by themselves. The leader goes
through the network beside those that follow, always ahead of them, and in proportion to c they share with it

    noise       the mean of each channel at the start goes towards the leader's by NOISE · c, as long as before
    statistics  queries and keys of the image tokens are pulled towards the leader's mean and variance by PULL · c
    attention   a share SHARE · c of each image token's answer is from attention that the leader's tokens are part of

in the deeper blocks, as the splice does with a reference (`model/splice.py`; after StyleAligned, arXiv 2312.02133). A
branch of guidance follows the leader's own branch. Words never see the leader.

A picture so depends on its own spec, which names the leader, and on nothing else: it can be made again by itself, in
company of any size, and memory does not grow with a batch. The leader of a batch is the picture that it would be alone.

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
from model.splice import Capture, first_block, guarded, moments, pulled

Spec = TypeVar("Spec", bound=RenderSpec)

# At c = 1. More attention ties looks more and lets the leader's content through: at 0.75 eight prompts of a run lose a
# tenth of their subjects on Raw. Damping alone lets twice as many go astray.
NOISE, PULL, SHARE = 1.0, 0.8, 0.65
GUARD = "both"  # against the leader's content


def leader_of(spec: Spec) -> Spec | None:
    """The picture that a spec is tied to: its own but for prompt, negative and seed. None where nothing is shared."""
    if not spec.cohesion or spec.leader is None:
        return None
    led = spec.leader
    return replace(spec, prompt=led.prompt, negative=led.negative, seed=led.seed, cohesion=0.0, leader=None)


def leads(spec: RenderSpec) -> bool:
    """Whether a tied picture is its own leader, and so the picture that it would be alone."""
    return leader_of(spec) == replace(spec, cohesion=0.0, leader=None)


def shares(spec: RenderSpec) -> dict[str, float]:
    """How much of its noise, statistics and attention a picture shares with its leader, for a record; the leader itself
    nothing."""
    c = 0.0 if leads(spec) else spec.cohesion
    return {"noise": round(NOISE * c, 6), "statistics": round(PULL * c, 6), "attention": round(SHARE * c, 6)}


def shared_noise(starts: Tensor, cohesion: float) -> Tensor:
    """Starts [B, C, H, W], the leader's first -> the same, the channels' means of all others in part the leader's.

    What noise holds of the slowest frequencies becomes the colours of the ground and of the whole; all that decides
    what stands where is left alone.
    """
    means, part = starts.mean((2, 3), keepdim=True), NOISE * cohesion
    mixed = means[1:].lerp(means[:1], part) * ((1 - part) ** 2 + part**2) ** -0.5  # of the same variance
    same = (starts[1:] == starts[:1]).flatten(1).all(1)  # of the leader's seed, which nothing is to be added to
    mixed[same] = means[1:][same]
    return torch.cat((starts[:1], starts[1:] + (mixed - means[1:])))


class Tie:
    """Listens to the leader in an evaluation of the network, and lets the rows evaluated after it follow."""

    def __init__(self, config: DiTConfig, cohesion: float, sigmas: Sequence[float], tokens: int, reach: float):
        """sigmas of the steps; how many image tokens there are, and the reach of their grid (`Krea2.reach`)."""
        self.config, self.cohesion, self.sigmas, self.tokens, self.reach = config, cohesion, sigmas, tokens, reach
        self.first = first_block(config.blocks)
        self.heard: dict[int, list[Capture]] = {}  # branch -> of each tied block what the leader left, keys guarded

    def listen(self, attend: Sequence[Attend | None] | None, branches: Sequence[int], step: int) -> list[Attend | None]:
        """The attention of the leader's rows, which are of these branches: as it is, and remembered."""
        tokens, sigma = self.tokens, self.sigmas[step]
        self.heard |= {branch: [] for branch in branches}

        def listening(inner: Attend, _: int) -> Attend:
            def block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                own_q, own_k, own_v = (x[:, :, -tokens:] for x in (q, k, v))
                keys = guarded(own_k, self.config, GUARD, sigma, self.reach)
                heard = Capture(keys, own_v, *moments(own_q), *moments(own_k))
                for row, branch in enumerate(branches):
                    self.heard[branch].append(Capture(*(x[row] for x in heard)))
                return inner(q, k, v)

            return block

        return self._deeper(attend, listening)

    def follow(self, attend: Sequence[Attend | None] | None, branches: Sequence[int]) -> list[Attend | None]:
        """The attention of rows in these branches, tied to what the same block heard of the leader before."""

        def following(inner: Attend, index: int) -> Attend:
            def block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                each = (self.heard[branch][index] for branch in branches)
                heard = Capture(*map(torch.stack, zip(*each, strict=True)))
                return tied(inner, heard, self.cohesion)(q, k, v)

            return block

        return self._deeper(attend, following)

    def _deeper(
        self, attend: Sequence[Attend | None] | None, wrap: Callable[[Attend, int], Attend]
    ) -> list[Attend | None]:
        inner = list(attend) if attend is not None else [None] * self.config.blocks
        return inner[: self.first] + [wrap(each or attention, i) for i, each in enumerate(inner[self.first :])]


def tied(inner: Attend, heard: Capture, cohesion: float) -> Attend:
    """A block's attention, and in the image tokens' answers a share of one that the leader is part of."""
    tokens, pull, share = heard.k.shape[2], PULL * cohesion, SHARE * cohesion

    def block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        own = inner(q, k, v)
        q_image = pulled(q[:, :, -tokens:], heard.q_mean, heard.q_var, pull)
        k_image = pulled(k[:, :, -tokens:], heard.k_mean, heard.k_var, pull)
        together = inner(
            torch.cat((q[:, :, :-tokens], q_image), 2),
            torch.cat((heard.k, k[:, :, :-tokens], k_image), 2),
            torch.cat((heard.v, v), 2),
        )
        image = own[:, :, -tokens:].lerp(together[:, :, -tokens:], share)
        return torch.cat((own[:, :, :-tokens], image), 2)

    return block
