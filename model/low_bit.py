"""Linear layers whose matrix is held in 8 or 4 bits.

Where the hardware multiplies 8-bit numbers, each token is rounded to 8 bits as well, scaled by its own largest number,
so a token's result does not depend on the others. Elsewhere the matrix is widened for the duration of one product.
Either way scales are applied to the product, not to the matrix. 4-bit codes stand for 8-bit numbers, and are decoded
for the duration of one product (`model/four_bit.py`). If a matrix was rotated before rounding, tokens are rotated too:
(x H)(W H)ᵀ = x Wᵀ, with H orthogonal. A state dict holds `NAME.weight` and the tensors needed to read it (`SUFFIXES`).

Gradients flow to the tokens, never to the matrix. Tokens are then not rounded, so the gradients are exactly those of
the dequantised matrix.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.four_bit import GROUP_SIZE, Codes, decode_codes, rotation_size, to_codes
from model.quantize import Rows, restore, restored_chunks, rotate, round_rows, to_8_bits

MIN_TOKENS = 16  # CUDA's 8-bit products need more tokens than this
CHUNK_TOKENS = 2048  # on a CPU: each product repacks the whole matrix, and its result is wide before scaling


class Format(NamedTuple):
    """How a matrix is held."""

    dtype: torch.dtype  # of the products: int8 or float8_e4m3fn
    bits: int = 8  # 4: codes for those numbers
    rotation: int = 0  # group size in which its rows are rotated; 0: not rotated


FORMATS = {"int8": Format(torch.int8), "fp8": Format(torch.float8_e4m3fn), "int4": Format(torch.int8, bits=4)}
SUFFIXES = {8: ("", "_scale"), 4: ("", "_s_rel", "_s_channel", "_codebook")}  # of a weight's name; 4 bits as ComfyUI


def default_format(precision: str, in_features: int) -> Format:
    """How to hold a matrix [out, in] if its file does not decide: 4 bits need rotated rows."""
    format = FORMATS[precision]
    return format._replace(rotation=rotation_size(in_features)) if format.bits == 4 else format


class FewBitLinear(nn.Linear):
    """A linear layer (also to adapters and `isinstance`) with an int8 or e4m3 weight [out, in] and its scales, or with
    codes and theirs."""

    exact = False  # never round tokens, as when training on top

    def __init__(self, in_features: int, out_features: int, bias: bool, format: Format):
        """Built on the meta device: there is no random init in few bits."""
        super().__init__(in_features, out_features, bias, device="meta")
        self.format = format
        with torch.device("meta"):
            rows = torch.empty(out_features)
            if format.bits == 8:
                held = {"": torch.empty(out_features, in_features, dtype=format.dtype), "_scale": rows}
            else:
                packed = torch.empty(out_features, in_features // 2, dtype=torch.int8)
                groups = torch.empty(out_features, in_features // GROUP_SIZE, dtype=torch.uint8)
                held = dict(zip(SUFFIXES[4], Codes(packed, groups, rows, torch.empty(16)), strict=True))
        self.weight = nn.Parameter(held.pop(""), requires_grad=False)
        for end, tensor in held.items():
            self.register_buffer(f"weight{end}", tensor)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out] in x's dtype."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        tokens = x.flatten(0, -2)
        if self.format.rotation:
            tokens = rotate(tokens, self.format.rotation)
        if self.exact or (tokens.requires_grad and torch.is_grad_enabled()):
            output = DequantisedProduct.apply(tokens, *self.packed_tensors)
        elif self.runs_in_8_bits(tokens):
            output = eight_bit_product(tokens, *as_eight_bit(*self.packed_tensors))
        else:
            output = dequantised_product(tokens, *as_eight_bit(*self.packed_tensors))
        if self.bias is not None:
            output = output + self.bias.to(x.dtype)
        return output.unflatten(0, x.shape[:-1])

    @property
    def packed_tensors(self) -> tuple[Tensor, ...]:
        """The tensors of the matrix, in the order of `SUFFIXES`."""
        return tuple(getattr(self, f"weight{end}") for end in SUFFIXES[self.format.bits])

    def matrix(self) -> Tensor:
        """The layer's matrix, dequantised and with any rotation undone: fp32 [out, in]."""
        return restore(*as_eight_bit(*self.packed_tensors), torch.float32, self.format.rotation)

    def runs_in_8_bits(self, tokens: Tensor) -> bool:
        """Whether the product itself runs in 8 bits: if the device can, and its kernels accept the shape."""
        if not is_native(self.format.dtype, tokens.device.type):
            return False
        fits = self.in_features % 16 == 0 and self.out_features % 16 == 0
        return tokens.device.type == "cpu" or (fits and len(tokens) > MIN_TOKENS)


def as_eight_bit(weight: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
    """A layer's tensors -> its matrix in 8 bits [out, in], and the scales of its rows [out]."""
    if len(others) == 1:
        return weight, others[0]
    groups, rows, levels = others
    return decode_codes(weight, groups, levels), rows


class DequantisedProduct(torch.autograd.Function):
    """Tokens times a frozen matrix in few bits, with a gradient. The matrix is widened again in the backward pass:
    autograd would keep a wide copy of every layer, and lose the memory that few bits save."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, *held: Tensor) -> Tensor:
        ctx.save_for_backward(*held)
        return dequantised_product(tokens, *as_eight_bit(*held))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, scale = as_eight_bit(*ctx.saved_tensors)
        tokens = (gradient * scale).to(gradient.dtype) @ weight.to(gradient.dtype)
        return tokens, *(None for _ in ctx.saved_tensors)


def dequantised_product(tokens: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """tokens [M, K] times (weight [N, K] · scale [N]) transposed -> [M, N] in the tokens' dtype."""
    return (F.linear(tokens, weight.to(tokens.dtype)) * scale).to(tokens.dtype)


def is_native(dtype: torch.dtype, device: str) -> bool:
    """Whether a kind of device multiplies numbers of this format faster than bf16; constant to compilers.

    CPUs: int8 with the dot-product instructions (VNNI, AMX). CUDA: int8 from Ampere on; e4m3 with row-wise scales from
    Hopper on; on Windows only on Hopper, where cuBLAS provides it: PyTorch's own kernel is not built there. ROCm:
    neither, since its libraries support only some cards and crash on others.
    """
    return is_native_on(dtype, device, torch.cuda.current_device() if device == "cuda" else 0)


@cache
def is_native_on(dtype: torch.dtype, device: str, card: int) -> bool:
    """Whether a device multiplies numbers of this format faster than bf16, by its reported capabilities; `card` is the
    index of a CUDA card."""
    if device == "cpu":
        known = torch.cpu.get_capabilities()
        return dtype == torch.int8 and any(known.get(name) for name in ("avx512_vnni", "avx_vnni", "amx_int8"))
    if device == "cuda" and torch.version.hip is None:
        major, _ = torch.cuda.get_device_capability(card)
        if dtype == torch.int8:
            return major >= 8
        return major == 9 or (major > 9 and sys.platform != "win32")
    return False


def eight_bit_product(tokens: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    """tokens [M, K], rounded to 8 bits, times (weight [N, K] · weight_scale [N]) transposed -> [M, N] in tokens' dtype.

    On a CPU in parts of equal size.
    """
    if tokens.device.type != "cpu":
        return product(tokens, weight, weight_scale).to(tokens.dtype)
    output = tokens.new_empty(len(tokens), len(weight))
    parts = max(1, -(-len(tokens) // CHUNK_TOKENS))
    for part, out in zip(tokens.tensor_split(parts), output.tensor_split(parts), strict=True):
        out.copy_(product(part.float(), weight, weight_scale))
    return output


def product(tokens: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    """tokens [M, K], rounded to 8 bits, times (weight [N, K] · weight_scale [N]) transposed, all at once -> [M, N],
    fp32, or bf16 where the numbers are fp8."""
    rows, scale = round_rows(tokens, weight.dtype)
    if weight.dtype == torch.int8:
        whole = torch._int_mm(rows, weight.t())  # int32: exact, in any order
        return (whole * scale[:, None]).mul_(weight_scale)
    return torch._scaled_mm(
        rows,
        weight.t(),
        scale_a=scale[:, None],
        scale_b=weight_scale[None],
        out_dtype=torch.bfloat16,  # the only one that kernels with row scales support
        use_fast_accum=True,
    )


def use_few_bits(network: nn.Module, choose_format: Callable[[str, nn.Linear], Format | None]) -> None:
    """Replace linear layers of a network on the meta device by few-bit ones, still empty.

    choose_format: the format for a layer, given its name and the layer; None leaves it as is.
    """
    for name, layer in list(network.named_modules()):
        if isinstance(layer, nn.Linear) and (format := choose_format(name, layer)):
            parent, _, own = name.rpartition(".")
            small = FewBitLinear(layer.in_features, layer.out_features, layer.bias is not None, format)
            setattr(network.get_submodule(parent), own, small)


def few_bit_layers(network: nn.Module) -> dict[str, FewBitLinear]:
    """Name of each weight held in few bits -> its layer."""
    return {f"{n}.weight": m for n, m in network.named_modules() if isinstance(m, FewBitLinear)}


def pack(stored: Rows | Codes, scale: Tensor | None, group: int, format: Format) -> tuple[Tensor, ...]:
    """A matrix as stored -> a layer's tensors, in the order of `SUFFIXES`. It is rounded part by part, or not at all if
    it is already stored in the layer's format.

    stored, scale, group: as for `quantize.restore`, or codes and the rotation of their rows.
    """
    if isinstance(stored, Codes) and (format.bits, format.rotation) == (4, group):
        return tuple(stored)
    matrix, scale = (stored.numbers, stored.rows) if isinstance(stored, Codes) else (stored, scale)
    if format.bits == 8:
        return to_8_bits(matrix, format.dtype, scale, group, format.rotation)
    codes = (to_codes(part) for part in restored_chunks(matrix, scale, group, format.rotation))
    packed, groups, rows, levels = zip(*codes, strict=True)
    return torch.cat(packed), torch.cat(groups), torch.cat(rows), levels[0]


def dequantised_state(network: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """The network's state dict without few-bit layers: matrices in `dtype`, no scales."""
    few = few_bit_layers(network)
    extra_names = {f"{name}{end}" for name, layer in few.items() for end in SUFFIXES[layer.format.bits][1:]}
    return {
        name: few[name].matrix().to(dtype) if name in few else tensor
        for name, tensor in network.state_dict().items()
        if name not in extra_names
    }
