"""What adapters add to a linear layer, as a second path beside it: low-rank, Hadamard and Kronecker products.

A layer answers W x + b, and an update U at the weight s adds s U x: adapters add up, in any order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Update:
    """What is added to one linear layer at weight 1: scale · a product of factors, and something to its bias."""

    scaled: ClassVar[str]  # the factor that takes a scale
    scale: float = 1.0  # alpha / rank
    bias: Tensor | None = None  # [out]

    def product(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out], without the scale."""
        raise NotImplementedError

    def times(self, weight: float) -> Self:
        """The same with scale · weight in a factor, in fp32."""
        factor: dict[str, Any] = {self.scaled: getattr(self, self.scaled).float() * (self.scale * weight)}
        return replace(self, scale=1.0, **factor)

    def to(self, *place: Any) -> Self:
        """Its tensors elsewhere, or in other numbers, as of `Tensor.to`."""
        tensors = {name: each for name, each in vars(self).items() if isinstance(each, Tensor)}
        moved: dict[str, Any] = {name: each.to(*place) for name, each in tensors.items()}
        return replace(self, **moved)


@dataclass(frozen=True)
class LowRank(Update):
    """LoRA: up @ down."""

    scaled = "up"
    down: Tensor  # [r, in]
    up: Tensor  # [out, r]

    def product(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.down), self.up)


@dataclass(frozen=True)
class Hadamard(Update):
    """LoHa: (w1_a @ w1_b) ⊙ (w2_a @ w2_b) (Hyeon-Woo et al. 2021, "FedPara", arXiv 2108.06098)."""

    scaled = "w1_a"
    w1_a: Tensor  # [out, r]
    w1_b: Tensor  # [r, in]
    w2_a: Tensor  # [out, q]
    w2_b: Tensor  # [q, in]

    def product(self, x: Tensor) -> Tensor:
        """It is of rank r·q: up and down are all products of columns of w1_a and w2_a, and of rows of w1_b and w2_b."""
        rank, out, inward = len(self.w1_b) * len(self.w2_b), len(self.w1_a), x.shape[-1]
        if rank * (out + inward) > out * inward:
            return F.linear(x, self.dense())
        down = (self.w1_b[:, None] * self.w2_b).flatten(0, 1)
        up = (self.w1_a[:, :, None] * self.w2_a[:, None]).flatten(1)
        return F.linear(F.linear(x, down), up)

    def dense(self) -> Tensor:
        return (self.w1_a @ self.w1_b) * (self.w2_a @ self.w2_b)


@dataclass(frozen=True)
class Kronecker(Update):
    """LoKr: left ⊗ right, or some of its rows."""

    scaled = "left"
    left: Tensor  # [a, b]
    right: Tensor  # [c, d], for a layer of b·d numbers in and a·c out
    rows: slice  # of their product

    def product(self, x: Tensor) -> Tensor:
        parts = F.linear(x.unflatten(-1, (self.left.shape[1], self.right.shape[1])), self.right)  # [..., b, c]
        return (self.left @ parts).flatten(-2)[..., self.rows]


class SecondPath:
    """A forward hook: the layer's answer, and what several updates add to it, each at its weight."""

    def __init__(self, weighted: Sequence[tuple[Update, float]]):
        updates = [each.times(weight) for each, weight in weighted]
        pairs = [each for each in updates if isinstance(each, LowRank) and len(each.down)]
        others = [each for each in updates if not isinstance(each, LowRank)]
        self.updates: list[Update] = [*stacked(pairs), *others]
        biases = [each.bias.float() * weight for each, weight in weighted if each.bias is not None]
        self.bias = torch.stack(biases).sum(0) if biases else None

    def __call__(self, layer: nn.Linear, inputs: tuple[Tensor], answer: Tensor) -> Tensor:
        (x,) = inputs
        # x tells where, and how exactly, the layer computes
        self.updates = [each.to(x) for each in self.updates]
        for each in self.updates:
            answer = answer + each.product(x)
        if self.bias is not None:
            self.bias = self.bias.to(x)
            answer = answer + self.bias
        return answer


def stacked(pairs: Sequence[LowRank]) -> list[LowRank]:
    """Pairs, their scales in them already, as one: down [Σr, in] and up [out, Σr]. None of none."""
    if not pairs:
        return []
    return [LowRank(torch.cat([each.down.float() for each in pairs]), torch.cat([each.up for each in pairs], 1))]
