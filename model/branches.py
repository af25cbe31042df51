"""Pictures that are made together, as rows through the network: one for each branch of each picture's guidance.

Rows are grouped by the length of their contexts, never padded, so no mask is needed and a picture does not depend on
its company. Where it pays all groups are one stream, which only attention takes apart: every weight is read once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from model.cohesion import Tie
from model.dit import Attend, Krea2
from model.sampler import guided, style_guided
from model.splice import Splice


class Told(NamedTuple):
    """One wording: its share in the velocity, and its contexts [1, T, D], one for each picture."""

    share: float
    contexts: Sequence[Tensor]


class Said(NamedTuple):
    """What pictures made together are told, in wordings whose shares add up to 1."""

    ways: Mapping[str, Sequence[Told]]  # as `model.settle.ways` names and orders them
    negative: Sequence[Told] = ()  # what guidance leads away from, where there is any


class Group(NamedTuple):
    """Rows of one context length."""

    rows: list[int]
    context: Tensor  # [rows, T, D]
    rope: Tensor
    leads: bool = False  # the leader's rows, in the presence of which the others are evaluated


class Branches:
    """A velocity for pictures of one schedule, as `model.sampler.euler` wants it."""

    def __init__(
        self,
        dit: Krea2,
        said: Said,
        mods: Tensor,
        grid: tuple[int, int],
        *,
        guidance: float,
        style_guidance: float | None,
        presence: float = 1.0,
        splice: Splice | None = None,
        tie: Tie | None = None,
        pack: int = 0,
    ):
        """mods [steps, 1, 7D] from `Krea2.modulate`. With a tie the first picture is the leader. `presence`: how much
        of what is "styled" and not "lasting" counts, below 1 on the way to none. `pack`: up to so many image tokens all
        groups are one stream."""
        self.dit, self.said, self.mods, self.grid = dit, said, mods, grid
        self.guidance, self.style_guidance, self.presence = guidance, style_guidance, presence
        self.splice, self.tie, self.pack = splice, tie, pack
        branches = [told.contexts for way in (*said.ways.values(), said.negative) for told in way]
        self.count, self.pictures = len(branches), len(branches[0])
        rows = [context for branch in branches for context in branch]
        # The splice enters every branch, so that guidance tells apart prompts and not looks; a term of the style's own
        # is the difference between a branch that has it and one that has not.
        without = 0 if style_guidance is None else len(said.ways["plain"]) + len(said.negative)
        spliced = (self.count - without) * self.pictures if splice else 0
        self.spliced, self.others = self._groups(rows, range(spliced)), self._groups(rows, range(spliced, len(rows)))

    def __call__(self, tokens: Tensor, step: int) -> Tensor:
        """tokens [B, L, C·p·p], fp32 -> the guided velocity [B, L, C·p·p]."""
        x = tokens.repeat(self.count, 1, 1)
        v = self._evaluate(x, self.others, step)
        if self.splice is not None:
            v = v + self.splice.velocity(lambda attend: self._evaluate(x, self.spliced, step, attend), step)
        answers = iter(v.chunk(self.count))
        ways = {way: whole(told, answers) for way, told in self.said.ways.items()}
        with_style = ways["styled"]
        if self.presence < 1:
            with_style = torch.lerp(ways["lasting" if "lasting" in ways else "plain"], with_style, self.presence)
        conditional = with_style if self.style_guidance is None else ways["plain"]
        v = conditional
        if self.said.negative:
            v = guided(conditional, whole(self.said.negative, answers), self.guidance)
        return v if self.style_guidance is None else style_guided(with_style, conditional, v, self.style_guidance)

    def _groups(self, contexts: Sequence[Tensor], rows: Sequence[int]) -> list[Group]:
        """Rows by the length of their contexts, one group for each; the leader's come first."""
        found: dict[tuple[bool, int], list[int]] = {}
        for row in rows:
            leads = self.tie is not None and row % self.pictures == 0
            found.setdefault((not leads, contexts[row].shape[1]), []).append(row)
        return [
            Group(group, torch.cat([contexts[row] for row in group]), self.dit.rope(length, self.grid), not follows)
            for (follows, length), group in sorted(found.items())
        ]

    def _evaluate(
        self, x: Tensor, groups: Sequence[Group], step: int, attend: Sequence[Attend | None] | None = None
    ) -> Tensor:
        """Velocities of all rows by the network; zero in the rows of no group. fp32, whatever it computes in, for x is
        integrated in that."""
        v = torch.zeros_like(x)
        mods = self.mods[step : step + 1]
        attends = [self._tied(group, attend, step) for group in groups]
        streams = [(x[rows].to(context.dtype), context, rope) for rows, context, rope, _ in groups]
        if len(groups) > 1 and sum(len(group.rows) for group in groups) * x.shape[1] <= self.pack:
            answers = self.dit.velocities(streams, mods, attends)
        else:
            answers = [
                self.dit.velocity(tokens, context, mods, rope, attend=own)
                for (tokens, context, rope), own in zip(streams, attends, strict=True)
            ]
        for group, answer in zip(groups, answers, strict=True):
            v[group.rows] = answer.float()
        return v

    def _tied(self, group: Group, attend: Sequence[Attend | None] | None, step: int) -> Sequence[Attend | None] | None:
        """A group's attention: the leader's is listened to, the others' follow it."""
        if self.tie is None:
            return attend
        branches = [row // self.pictures for row in group.rows]
        return self.tie.listen(attend, branches, step) if group.leads else self.tie.follow(attend, branches)


def whole(wordings: Sequence[Told], answers: Iterator[Tensor]) -> Tensor:
    """The velocity that all wordings make together; the next answers are theirs."""
    if len(wordings) == 1:
        return next(answers)
    return torch.stack([told.share * next(answers) for told in wordings]).sum(0)
