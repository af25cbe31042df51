"""Training with 8-bit matrix products: both factors of a product are rounded just before it; weights stay wide.

One autograd function, y = x · wᵀ and its two gradients, over three back ends (int8, e4m3 on hardware that has it, e4m3
emulated) and two kinds of scale: one per tensor, or one per row along the summed dimension. A recipe says
`products = "int8-rowwise"`. Only the blocks' matrices use it: the ends have few parameters, and carry every step's
error.

Gradients: fp8 rounds all three products, with e5m2 for the incoming gradient if it has one scale, as in torchao's
recipes. int8 has no exponent for a gradient's range, so its weight gradient stays wide: SwitchBack (arXiv 2304.13013).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.errors import K2Error
from model.low_bit import MIN_TOKENS
from model.quantize import LARGEST_NUMBER

SIDE_MULTIPLE = 16  # both sides of a matrix must be multiples of this: 8-bit kernels require it

WIDE = "wide"  # not in 8 bits
E5M2 = torch.float8_e5m2


class QuantisedMatrix(NamedTuple):
    """A matrix in 8 bits: numbers [R, K] · scale, fp32 [R, 1] or [1, 1]."""

    numbers: Tensor
    scale: Tensor


@dataclass(frozen=True)
class Products:
    """How products are computed."""

    dtype: torch.dtype  # int8 or e4m3
    rowwise: bool  # a scale per row, else one for the tensor
    # a [M, K], b [N, K] -> a · bᵀ [M, N], scales included
    multiply: Callable[[QuantisedMatrix, QuantisedMatrix], Tensor]

    @property
    def gradient_dtype(self) -> torch.dtype:
        """The format that an incoming gradient is rounded to."""
        return E5M2 if self.dtype == torch.float8_e4m3fn and not self.rowwise else self.dtype

    @property
    def wide_weight_gradient(self) -> bool:
        return self.dtype == torch.int8

    def quantise(
        self, matrix: Tensor, dtype: torch.dtype | None = None, *, transposed: bool = False
    ) -> QuantisedMatrix:
        """matrix [R, K] -> 8 bits; the largest number of a row, or of the tensor, uses the format's full range.

        transposed: for the transposed matrix, which is rounded before it is moved, so that a quarter of the bytes move.
        """
        dtype = dtype or self.dtype
        size = matrix.abs()
        largest = size.amax(0 if transposed else 1, keepdim=True) if self.rowwise else size.amax().view(1, 1)
        scale = largest.float() / (57344.0 if dtype == E5M2 else LARGEST_NUMBER[dtype])
        scaled = matrix * (1 / scale.clamp(min=torch.finfo(torch.float32).tiny))
        numbers = (scaled.round_() if dtype == torch.int8 else scaled).to(dtype)
        return (
            QuantisedMatrix(numbers.t().contiguous(), scale.t())
            if transposed
            else QuantisedMatrix(numbers.contiguous(), scale)
        )

    def quantise_transposed(
        self, rounded: QuantisedMatrix | None, matrix: Tensor, number: torch.dtype | None = None
    ) -> QuantisedMatrix:
        """The transposed matrix, for sums over the other dimension. One scale serves both; row scales do not."""
        if self.rowwise or rounded is None:
            return self.quantise(matrix, number, transposed=True)
        return QuantisedMatrix(rounded.numbers.t().contiguous(), rounded.scale)


def exact_product(a: QuantisedMatrix, b: QuantisedMatrix) -> Tensor:
    """int8 × int8 -> int32, exact; then the scales."""
    return torch._int_mm(a.numbers, b.numbers.t()).float() * a.scale * b.scale.t()


def emulated_product(a: QuantisedMatrix, b: QuantisedMatrix) -> Tensor:
    """8-bit numbers multiplied in fp32: what hardware would compute, without the speed."""
    return (a.numbers.float() @ b.numbers.float().t()) * a.scale * b.scale.t()


def scaled_product(a: QuantisedMatrix, b: QuantisedMatrix) -> Tensor:
    """fp8 × fp8 by the hardware, sums in fp32."""
    rowwise = a.scale.numel() > 1 or b.scale.numel() > 1
    scales = (
        (a.scale.expand(len(a.numbers), 1).contiguous(), b.scale.t().expand(1, len(b.numbers)).contiguous())
        if rowwise
        else (a.scale.view(()), b.scale.view(()))
    )
    return torch._scaled_mm(a.numbers, b.numbers.t(), scale_a=scales[0], scale_b=scales[1], out_dtype=torch.bfloat16)


BACK_ENDS = {
    "int8": (torch.int8, exact_product),
    "fp8": (torch.float8_e4m3fn, scaled_product),
    "fp8-emulated": (torch.float8_e4m3fn, emulated_product),
}
PRODUCT_NAMES = (WIDE, *(f"{end}-{scales}" for end in BACK_ENDS for scales in ("tensorwise", "rowwise")))


def parse_products(name: str, device: torch.device | str = "cpu") -> Products | None:
    """What a recipe's `products` means on a device; None is wide. Raises K2Error if unknown or unsupported here."""
    if name not in PRODUCT_NAMES:
        raise K2Error(f'There are no products "{name}".', hint=f"Choose one of {', '.join(PRODUCT_NAMES)}.")
    if name == WIDE:
        return None
    end, _, scales = name.rpartition("-")
    if end == "fp8" and not supports_fp8(torch.device(device)):
        raise K2Error(f'Products "{name}" need a GPU that multiplies fp8.', hint="fp8-emulated runs anywhere, slowly.")
    number, multiply = BACK_ENDS[end]
    return Products(number, scales == "rowwise", multiply)


def supports_fp8(device: torch.device) -> bool:
    """From Ada on, with one scale or one per row: PyTorch has both kernels for all of these GPUs."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


class EightBitProduct(torch.autograd.Function):
    """x [M, K] · wᵀ, w [N, K], in 8 bits, with gradients for both."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, products: Products) -> Tensor:
        left, right = products.quantise(x), products.quantise(weight)
        ctx.how = products
        # what is rounded a second time is kept wide; if one scale serves both ways, the 8 bits are kept instead
        wide = x if products.rowwise or products.wide_weight_gradient else None
        ctx.save_for_backward(wide, weight, *(() if products.rowwise else (*left, *right)))
        return products.multiply(left, right).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        products: Products = ctx.how
        x, weight, *rest = ctx.saved_tensors
        left, right = (QuantisedMatrix(*rest[:2]), QuantisedMatrix(*rest[2:])) if rest else (None, None)
        incoming = products.quantise(gradient, products.gradient_dtype)
        for_x = for_weight = None
        if ctx.needs_input_grad[0]:
            for_x = products.multiply(incoming, products.quantise_transposed(right, weight)).to(gradient.dtype)
        if ctx.needs_input_grad[1]:
            if products.wide_weight_gradient:
                for_weight = gradient.t() @ x
            else:
                turned = products.quantise_transposed(incoming, gradient, products.gradient_dtype)
                for_weight = products.multiply(turned, products.quantise_transposed(left, x))
            for_weight = for_weight.to(weight.dtype)
        return for_x, for_weight, None


class EightBitLinear(nn.Linear):
    """A linear layer with 8-bit products; its weight is an ordinary one."""

    products: Products

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out], in the dtype that autocast asks for, else x's."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        tokens = x.flatten(0, -2)
        if len(tokens) <= MIN_TOKENS:  # kernels refuse so few, and there is nothing to gain
            return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))
        rows = F.pad(tokens, (0, 0, 0, -len(tokens) % SIDE_MULTIPLE))  # the weight's gradient sums over rows
        answer = EightBitProduct.apply(rows, self.weight, self.products)[: len(tokens)]
        if self.bias is not None:
            answer = answer + self.bias.to(x.dtype)
        return answer.unflatten(0, x.shape[:-1])


def use_8_bit_products(network: nn.Module, products: Products | None) -> list[str]:
    """Give a network's linear layers 8-bit products where their sides fit -> the names of the converted ones.

    Parameters stay the same objects, so optimisers and state dicts do not notice.
    """
    changed = []
    for name, layer in list(network.named_modules()):
        if (
            products is None
            or type(layer) is not nn.Linear
            or layer.in_features % SIDE_MULTIPLE
            or layer.out_features % SIDE_MULTIPLE
        ):
            continue
        parent, _, own = name.rpartition(".")
        made = EightBitLinear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        made.weight, made.bias, made.products = layer.weight, layer.bias, products
        setattr(network.get_submodule(parent), own, made)
        changed.append(name)
    return changed
