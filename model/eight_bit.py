"""Linear layers whose matrix stays in 8 bits in memory.

Where the hardware multiplies 8-bit numbers, each token is rounded to 8 bits as well, by its own largest number, so a
token's answer does not depend on its company. Elsewhere the matrix is widened for the length of one product. Either
way scales are put to the product, not to the matrix. A state dict holds `NAME.weight` and `NAME.weight_scale`.

Gradients pass through to the tokens, never to the matrix: tokens are then not rounded, so they are the dequantised
matrix's own.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.quantize import round_rows

NUMBERS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}  # precision -> number format
FEW = 16  # tokens up to which CUDA's 8-bit products refuse to work
TOKENS_AT_ONCE = 256  # on a CPU: their wide copies then stay in the cache


class EightBitLinear(nn.Linear):
    """A linear layer (adapters and `isinstance` know it as such) of weight int8 or e4m3 [out, in] and its scales."""

    weight_scale: Tensor  # fp32 [out]
    exact = False  # never round tokens, as where something is learned on top

    def __init__(self, inward: int, outward: int, bias: bool, number: torch.dtype):
        """Built on the meta device: there is nothing to draw in 8 bits."""
        super().__init__(inward, outward, bias, device="meta")
        weight = torch.empty(outward, inward, dtype=number, device="meta")
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("weight_scale", torch.empty(outward, device="meta"))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out] in x's dtype."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        tokens = x.flatten(0, -2)
        if self.exact or (tokens.requires_grad and torch.is_grad_enabled()):
            answer = Widened.apply(tokens, self.weight, self.weight_scale)
        elif self.multiplies(tokens):
            answer = eight_bit_product(tokens, self.weight, self.weight_scale)
        else:
            answer = widened_product(tokens, self.weight, self.weight_scale)
        if self.bias is not None:
            answer = answer + self.bias.to(x.dtype)
        return answer.unflatten(0, x.shape[:-1])

    def multiplies(self, tokens: Tensor) -> bool:
        """Whether the product itself is taken in 8 bits: where the device can, and its kernels take the shape."""
        if not native(self.weight.dtype, tokens.device.type):
            return False
        fits = self.in_features % 16 == 0 and self.out_features % 16 == 0
        return tokens.device.type == "cpu" or (fits and len(tokens) > FEW)


class Widened(torch.autograd.Function):
    """Tokens times a frozen 8-bit matrix, with a gradient. The matrix is widened anew on the way back: autograd would
    keep the wide copy of every layer, and with it the memory that 8 bits save."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return widened_product(tokens, weight, scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        weight, scale = ctx.saved_tensors
        return (gradient * scale).to(gradient.dtype) @ weight.to(gradient.dtype), None, None


def widened_product(tokens: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """tokens [M, K] times (weight [N, K] · scale [N]) transposed -> [M, N] in the tokens' dtype."""
    return (F.linear(tokens, weight.to(tokens.dtype)) * scale).to(tokens.dtype)


def native(number: torch.dtype, device: str) -> bool:
    """Whether a kind of device multiplies numbers of this format faster than bf16; compilers take it as it is.

    CPUs: int8 with the dot-product instructions (VNNI, AMX). CUDA: int8 from Ampere on; e4m3 with a scale for every
    row from Hopper on.
    """
    return asked(number, device)


@cache
def asked(number: torch.dtype, device: str) -> bool:
    """What the device itself says to `native`."""
    if device == "cpu":
        known = torch.cpu.get_capabilities()
        return number == torch.int8 and any(known.get(name) for name in ("avx512_vnni", "avx_vnni", "amx_int8"))
    if device == "cuda":
        return torch.cuda.get_device_capability() >= ((8, 0) if number == torch.int8 else (9, 0))
    return False


def eight_bit_product(tokens: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    """tokens [M, K], rounded to 8 bits, times (weight [N, K] · weight_scale [N]) transposed -> [M, N] in tokens' dtype.

    On a CPU part by part.
    """
    if tokens.device.type != "cpu":
        return product(tokens, weight, weight_scale).to(tokens.dtype)
    answer = tokens.new_empty(len(tokens), len(weight))
    for part, room in zip(tokens.split(TOKENS_AT_ONCE), answer.split(TOKENS_AT_ONCE), strict=True):
        room.copy_(product(part.float(), weight, weight_scale))
    return answer


def product(tokens: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    """As `eight_bit_product`, all at once, -> fp32, or bf16 where the numbers are fp8."""
    rows, scale = round_rows(tokens, weight.dtype)
    if weight.dtype == torch.int8:
        whole = torch._int_mm(rows, weight.t())  # int32: exact, in any order
        return (whole * scale[:, None]).mul_(weight_scale)
    return torch._scaled_mm(
        rows,
        weight.t(),
        scale_a=scale[:, None],
        scale_b=weight_scale[None],
        out_dtype=torch.bfloat16,  # the only one that kernels with row scales know
        use_fast_accum=True,
    )


def shrink(network: nn.Module, number: torch.dtype) -> None:
    """Put 8-bit layers, still empty, in the place of all linear layers below a network on the meta device."""
    for name, layer in list(network.named_modules()):
        if isinstance(layer, nn.Linear):
            parent, _, own = name.rpartition(".")
            small = EightBitLinear(layer.in_features, layer.out_features, layer.bias is not None, number)
            setattr(network.get_submodule(parent), own, small)


def formats(network: nn.Module) -> dict[str, torch.dtype]:
    """Name of each matrix that is in 8 bits -> its number format."""
    return {f"{n}.weight": m.weight.dtype for n, m in network.named_modules() if isinstance(m, EightBitLinear)}


def widened(network: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """The network's state dict as if nothing were in 8 bits: matrices in `dtype`, no scales."""
    state, eight = network.state_dict(), formats(network)
    return {
        name: (tensor.float() * state[f"{name}_scale"][:, None]).to(dtype) if name in eight else tensor
        for name, tensor in state.items()
        if name.removesuffix("_scale") not in eight or name in eight
    }
