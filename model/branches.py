"""Pictures that are rendered together, as rows through the network: one for each guidance branch of each picture.

Rows are grouped by context length, never padded, so no mask is needed and a picture does not depend on its batch. Where
it pays, all groups run as one stream, split only for attention: every weight is read once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from model.cohesion import LeadAttention
from model.dit import Attend, Krea2
from model.sampler import apply_guidance, apply_style_guidance
from model.splice import Splice


class WeightedContexts(NamedTuple):
    """One version of the prompts: its share in the velocity, and its contexts [1, T, D], one for each picture."""

    share: float
    contexts: Sequence[Tensor]


class PromptContexts(NamedTuple):
    """The prompts of pictures rendered together, in versions whose shares add up to 1."""

    branches: Mapping[str, Sequence[WeightedContexts]]  # as `model.resolve.prompt_branches` names and orders them
    negative: Sequence[WeightedContexts] = ()  # what guidance leads away from, if anything


class Group(NamedTuple):
    """Rows of one context length."""

    rows: list[int]
    context: Tensor  # [rows, T, D]
    rope: Tensor
    is_lead: bool = False  # the lead picture's rows, which the others follow


class GuidedVelocity:
    """The velocity of pictures of one schedule, as `model.sampler.euler` needs it."""

    def __init__(
        self,
        dit: Krea2,
        prompts: PromptContexts,
        mods: Tensor,
        grid: tuple[int, int],
        *,
        guidance: float,
        style_guidance: float | None,
        fade: float = 1.0,
        splice: Splice | None = None,
        cohesion: LeadAttention | None = None,
        one_stream: int = 0,
    ):
        """mods [steps, 1, 7D] from `Krea2.modulate`. With cohesion the first picture leads. `fade`: how much of
        what is "styled" but not "lasting" counts; below 1 it is fading out. `one_stream`: up to this many image tokens
        all groups run as one stream."""
        self.dit, self.prompts, self.mods, self.grid = dit, prompts, mods, grid
        self.guidance, self.style_guidance, self.fade = guidance, style_guidance, fade
        self.splice, self.cohesion, self.one_stream = splice, cohesion, one_stream
        branches = [each.contexts for versions in (*prompts.branches.values(), prompts.negative) for each in versions]
        self.branch_count, self.picture_count = len(branches), len(branches[0])
        rows = [context for branch in branches for context in branch]
        # The splice enters every branch, so that guidance contrasts prompts and not looks; the style's own guidance
        # term is the difference between a branch with the splice and one without.
        unspliced = 0 if style_guidance is None else len(prompts.branches["plain"]) + len(prompts.negative)
        spliced = (self.branch_count - unspliced) * self.picture_count if splice else 0
        self.spliced_groups = self._groups(rows, range(spliced))
        self.plain_groups = self._groups(rows, range(spliced, len(rows)))

    def __call__(self, tokens: Tensor, step: int) -> Tensor:
        """tokens [B, L, C·p·p], fp32 -> the guided velocity [B, L, C·p·p]."""
        x = tokens.repeat(self.branch_count, 1, 1)
        v = self._evaluate(x, self.plain_groups, step)
        if self.splice is not None:
            v = v + self.splice.velocity(lambda attend: self._evaluate(x, self.spliced_groups, step, attend), step)
        outputs = iter(v.chunk(self.branch_count))
        velocities = {name: weighted_sum(versions, outputs) for name, versions in self.prompts.branches.items()}
        with_style = velocities["styled"]
        if self.fade < 1:
            without = velocities["lasting" if "lasting" in velocities else "plain"]
            with_style = torch.lerp(without, with_style, self.fade)
        conditional = with_style if self.style_guidance is None else velocities["plain"]
        v = conditional
        if self.prompts.negative:
            v = apply_guidance(conditional, weighted_sum(self.prompts.negative, outputs), self.guidance)
        return (
            v if self.style_guidance is None else apply_style_guidance(with_style, conditional, v, self.style_guidance)
        )

    def _groups(self, contexts: Sequence[Tensor], rows: Sequence[int]) -> list[Group]:
        """Rows grouped by context length; the lead picture's groups come first."""
        found: dict[tuple[bool, int], list[int]] = {}
        for row in rows:
            leads = self.cohesion is not None and row % self.picture_count == 0
            found.setdefault((not leads, contexts[row].shape[1]), []).append(row)
        return [
            Group(group, torch.cat([contexts[row] for row in group]), self.dit.rope(length, self.grid), not follows)
            for (follows, length), group in sorted(found.items())
        ]

    def _evaluate(
        self, x: Tensor, groups: Sequence[Group], step: int, attend: Sequence[Attend | None] | None = None
    ) -> Tensor:
        """The network's velocities for all rows; zero for rows in no group. In fp32, whatever the network computes in,
        since x is integrated in fp32."""
        v = torch.zeros_like(x)
        mods = self.mods[step : step + 1]
        attends = [self._with_lead(group, attend, step) for group in groups]
        streams = [(x[rows].to(context.dtype), context, rope) for rows, context, rope, _ in groups]
        if len(groups) > 1 and sum(len(group.rows) for group in groups) * x.shape[1] <= self.one_stream:
            outputs = self.dit.velocities(streams, mods, attends)
        else:
            outputs = [
                self.dit.velocity(tokens, context, mods, rope, attend=own)
                for (tokens, context, rope), own in zip(streams, attends, strict=True)
            ]
        for group, output in zip(groups, outputs, strict=True):
            v[group.rows] = output.float()
        return v

    def _with_lead(
        self, group: Group, attend: Sequence[Attend | None] | None, step: int
    ) -> Sequence[Attend | None] | None:
        """A group's attention: the lead's is recorded, the others follow it."""
        if self.cohesion is None:
            return attend
        branches = [row // self.picture_count for row in group.rows]
        return self.cohesion.record(attend, branches, step) if group.is_lead else self.cohesion.follow(attend, branches)


def weighted_sum(versions: Sequence[WeightedContexts], outputs: Iterator[Tensor]) -> Tensor:
    """The weighted sum of all versions' velocities; takes the next answers."""
    if len(versions) == 1:
        return next(outputs)
    return torch.stack([each.share * next(outputs) for each in versions]).sum(0)
