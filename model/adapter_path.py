"""What adapters add to a linear layer, as a second path beside it: low-rank, Hadamard and Kronecker products, and DoRA.

A layer computes W x + b, and an update U of weight s adds s U x. An update with a magnitude m is a DoRA (Liu et al.
2024, arXiv 2402.09353), where W' replaces W:

    W' = g (W + U),  g = m / ‖W + U‖

The norm is per row, as in PEFT, if m is [out, 1], and per column, as in OneTrainer, if m is [1, in]; LyCORIS trains
either. (ComfyUI divides rows by ‖W‖ only; the trainers do not.) s scales the difference, as in ComfyUI, so that 0
leaves the layer unchanged:

    rows:     s (W' − W) x = s (g − 1) W x + s g U x          W x exists already
    columns:  s (W' − W) x = W (s (g − 1) x) + s U (g x)      one more product with W

So W' is never built, and W + U only a few rows at a time for the norm, and a matrix in few bits keeps its fast product.
W is the base layer's matrix, dequantised, and U the DoRA's own, whatever else is applied to the layer: adapters add up,
in any order.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.low_bit import FewBitLinear, as_eight_bit
from model.quantize import restored_chunks

EPS = torch.finfo(torch.float32).eps  # added to a norm, as in LyCORIS: a row of zeros has none


@dataclass(frozen=True, kw_only=True)
class Update(ABC):
    """What is added to one linear layer at weight 1: scale · a product of factors, and a term for its bias."""

    scaled_factor: ClassVar[str]  # the factor that a scale is multiplied into
    scale: float = 1.0  # alpha / rank
    bias: Tensor | None = None  # [out]
    magnitude: Tensor | None = None  # of a DoRA: [out, 1] or [1, in]
    gains: WeakKeyDictionary[nn.Linear, Tensor] = field(default_factory=WeakKeyDictionary)  # by layer, once computed

    @abstractmethod
    def product(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out], unscaled."""

    @abstractmethod
    def dense(self, rows: slice) -> Tensor:
        """Some rows of the matrix [out, in], unscaled."""

    def changes(self) -> bool:
        """Whether it is not all zeros. A magnitude counts as a change: its effect shows only with its layer."""
        tensors = {name: each for name, each in vars(self).items() if isinstance(each, Tensor)}
        some = {name for name, each in tensors.items() if each.any()}
        factors = tensors.keys() - {"bias", "magnitude"}
        return bool(some & {"bias", "magnitude"}) or (bool(self.scale) and factors <= some)

    def times(self, weight: float) -> Self:
        """This update with scale · weight multiplied into one of its factors, in fp32."""
        factor: dict[str, Any] = {self.scaled_factor: getattr(self, self.scaled_factor).float() * (self.scale * weight)}
        return replace(self, scale=1.0, **factor)

    def to(self, *place: Any) -> Self:
        """This update with its tensors on another device or in another dtype; arguments as for `Tensor.to`."""
        tensors = {name: each for name, each in vars(self).items() if isinstance(each, Tensor)}
        moved: dict[str, Any] = {name: each.to(*place) for name, each in tensors.items()}
        return replace(self, **moved)


@dataclass(frozen=True)
class LowRank(Update):
    """LoRA: up @ down."""

    scaled_factor = "up"
    down: Tensor  # [r, in]
    up: Tensor  # [out, r]

    def product(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.down), self.up)

    def dense(self, rows: slice) -> Tensor:
        return self.up[rows] @ self.down


@dataclass(frozen=True)
class FullMatrix(Update):
    """A full matrix."""

    scaled_factor = "matrix"
    matrix: Tensor  # [out, in]

    def product(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix)

    def dense(self, rows: slice) -> Tensor:
        return self.matrix[rows]


@dataclass(frozen=True)
class Hadamard(Update):
    """LoHa: (w1_a @ w1_b) ⊙ (w2_a @ w2_b) (Hyeon-Woo et al. 2021, "FedPara", arXiv 2108.06098)."""

    scaled_factor = "w1_a"
    w1_a: Tensor  # [out, r]
    w1_b: Tensor  # [r, in]
    w2_a: Tensor  # [out, q]
    w2_b: Tensor  # [q, in]

    def product(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out], unscaled. The matrix has rank r·q: up holds all products of columns of w1_a and
        w2_a, down those of rows of w1_b and w2_b."""
        rank, out_features, in_features = len(self.w1_b) * len(self.w2_b), len(self.w1_a), x.shape[-1]
        if rank * (out_features + in_features) > out_features * in_features:
            return F.linear(x, self.dense(slice(None)))
        down = (self.w1_b[:, None] * self.w2_b).flatten(0, 1)
        up = (self.w1_a[:, :, None] * self.w2_a[:, None]).flatten(1)
        return F.linear(F.linear(x, down), up)

    def dense(self, rows: slice) -> Tensor:
        return (self.w1_a[rows] @ self.w1_b) * (self.w2_a[rows] @ self.w2_b)


@dataclass(frozen=True)
class Kronecker(Update):
    """LoKr: left ⊗ right, or some of its rows."""

    scaled_factor = "left"
    left: Tensor  # [a, b]
    right: Tensor  # [c, d], for a layer of b·d numbers in and a·c out
    rows: slice  # of the product

    def product(self, x: Tensor) -> Tensor:
        parts = F.linear(x.unflatten(-1, (self.left.shape[1], self.right.shape[1])), self.right)  # [..., b, c]
        return (self.left @ parts).flatten(-2)[..., self.rows]

    def dense(self, rows: slice) -> Tensor:
        places = torch.arange(len(self.left) * len(self.right), device=self.left.device)[self.rows][rows]
        left, right = self.left[places // len(self.right)], self.right[places % len(self.right)]
        return (left[:, :, None] * right[:, None]).flatten(1)


class AdapterPath:
    """A forward hook: the layer's output plus what several updates add, each at its weight."""

    def __init__(self, weighted: Sequence[tuple[Update, float]]):
        plain = [each.times(weight) for each, weight in weighted if each.magnitude is None]
        pairs = [each for each in plain if isinstance(each, LowRank) and len(each.down)]
        others = [each for each in plain if not isinstance(each, LowRank)]
        self.updates: list[Update] = [*stack_pairs(pairs), *others]
        self.doras = [Dora(each, weight) for each, weight in weighted if each.magnitude is not None]
        biases = [each.bias.float() * weight for each, weight in weighted if each.bias is not None]
        self.bias = torch.stack(biases).sum(0) if biases else None

    def __call__(self, layer: nn.Linear, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        (x,) = inputs
        first = next(iter(layer._forward_hooks.values())) is self  # else other hooks have added to the answer
        base_output = output if first or not self.doras else layer.forward(x)
        # x has the device and dtype that the layer computes in
        self.updates = [each.to(x) for each in self.updates]
        for each in self.updates:
            output = output + each.product(x)
        if self.bias is not None:
            self.bias = self.bias.to(x)
            output = output + self.bias
        for dora in self.doras:
            output = output + dora.difference(layer, x, base_output)
        return output


def stack_pairs(pairs: Sequence[LowRank]) -> list[LowRank]:
    """Several pairs, already scaled, as one: down [Σr, in] and up [out, Σr]. [] for no pairs."""
    if not pairs:
        return []
    return [LowRank(torch.cat([each.down.float() for each in pairs]), torch.cat([each.up for each in pairs], 1))]


class Dora:
    """A DoRA applied to a layer, at a weight s. Its norm is computed when the layer first runs: a streamed layer has no
    matrix before."""

    def __init__(self, update: Update, weight: float):
        self.update, self.weight = update, weight
        self.gain: Tensor | None = None  # g, [out] or [in]
        self.gain_delta: Tensor  # s (g − 1)
        self.by_row: bool

    def difference(self, layer: nn.Linear, x: Tensor, base_output: Tensor) -> Tensor:
        """x [..., in], own [..., out] the bare layer's output -> s (W' − W) x [..., out]."""
        if self.gain is None:
            gain = self.update.gains.get(layer)
            if gain is None:  # costs reading the whole matrix
                gain = self.update.gains[layer] = dora_gain(layer, self.update)
            self.by_row = gain.shape == (layer.out_features, 1)
            self.gain = gain.flatten()
            self.gain_delta = self.weight * (gain - 1).flatten()  # in bf16 g − 1 would be lost
            self.update = self.update.times(self.weight)
        self.update, self.gain, self.gain_delta = self.update.to(x), self.gain.to(x), self.gain_delta.to(x)
        bias = 0 if layer.bias is None else layer.bias.to(base_output)
        if self.by_row:
            return self.gain_delta * (base_output - bias) + self.gain * self.update.product(x)
        return layer.forward(self.gain_delta * x) - bias + self.update.product(self.gain * x)


@torch.no_grad()
def dora_gain(layer: nn.Linear, update: Update) -> Tensor:
    """m / ‖W + U‖ in m's shape, [out, 1] or [1, in], fp32. W + U is built a few rows at a time."""
    update = update.times(1.0).to(layer.weight.device, torch.float32)
    assert update.magnitude is not None
    by_row = update.magnitude.shape == (layer.out_features, 1)
    squares, start = torch.zeros_like(update.magnitude), 0
    for chunk in row_chunks(layer):
        rows = slice(start, start := start + len(chunk))
        changed = (chunk + update.dense(rows)).square()
        if by_row:
            squares[rows] = changed.sum(1, keepdim=True)
        else:
            squares += changed.sum(0, keepdim=True)
    return update.magnitude / (squares.sqrt() + EPS)


def row_chunks(layer: nn.Linear) -> Iterator[Tensor]:
    """A layer's matrix, dequantised to fp32, a few rows at a time."""
    if isinstance(layer, FewBitLinear):
        return restored_chunks(*as_eight_bit(*layer.packed_tensors), layer.format.rotation, 0)
    return restored_chunks(layer.weight, None, 0, 0)
