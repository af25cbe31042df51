"""Weights in 8 bits: one scale per output row, integers from −127 to 127 or fp8's e4m3.

A stored matrix `NAME.weight` is int8 beside `NAME.weight_scale`, fp32 [out]; everything else is bf16. The same reader
handles other tools' fp8 files, with one scale per tensor, and int8 that was rotated before rounding.
`model/low_bit.py` multiplies by such matrices.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from itertools import count
from typing import Protocol

import torch
from torch import Tensor

from model.comfy_formats import SCALE_SUFFIXES, is_auxiliary

_SENSITIVE = re.compile(r"^(first|last|tmlp|tproj)\.")  # few numbers, and every step's error passes through them
_MIN_NUMBERS = 1 << 14
_CHUNK = 1 << 20  # numbers processed at once when rounding to 8 bits: larger copies leave the cache, need new pages

LARGEST_NUMBER = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}  # 8-bit formats of a matrix, and their largest number


class Rows(Protocol):
    """The interface of a matrix [out, in] to be rounded: a tensor, or one that is still being read."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    def __len__(self) -> int: ...

    def split(self, count: int, /) -> Iterable[Tensor]: ...


def quantise(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Large matrices to int8 rows, the rest to bf16: first, last, modulation, norms, convolutions, everything small."""
    stored: dict[str, Tensor] = {}
    for name, tensor in state.items():
        matrix = name.endswith(".weight") and tensor.ndim == 2 and tensor.numel() >= _MIN_NUMBERS
        if not tensor.is_floating_point():
            stored[name] = tensor
        elif not matrix or _SENSITIVE.match(name):
            stored[name] = tensor.to(torch.bfloat16)
        else:
            stored[name], stored[f"{name}_scale"] = to_int8(tensor)
    return stored


def dequantise(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo `quantise`, or per-tensor fp8: every float in fp32, no scales left."""
    weights = ((name, tensor, scale_name(name, state)) for name, tensor in state.items() if not is_auxiliary(name))
    return {name: restore(tensor, state[scale] if scale else None, torch.float32) for name, tensor, scale in weights}


def to_int8(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """matrix [out, in] -> int8 [out, in] and fp32 scale [out]; a row's largest number becomes ±127."""
    return to_8_bits(matrix, torch.int8)


def to_8_bits(
    matrix: Rows, dtype: torch.dtype, scale: Tensor | None = None, group: int = 0, rotation: int = 0
) -> tuple[Tensor, Tensor]:
    """A matrix in 8 bits, with a scale per row: [out, in], dtype int8 or float8_e4m3fn -> [out, in], fp32 [out].

    `scale` and `group` describe a matrix stored in few bits, as for `restore`. If it is already in the format asked
    for, with the rotation asked for (`rotation`), it is kept as is; otherwise it is rounded a second time.
    """
    as_stored = (matrix.dtype, group) == (dtype, rotation)
    if as_stored and isinstance(matrix, Tensor) and (scale is None or scale.numel() in (1, len(matrix))):
        kept = torch.ones(1, device=matrix.device) if scale is None else scale.float().flatten()
        return matrix, kept.expand(len(matrix)).contiguous()
    rows = torch.empty(matrix.shape, dtype=dtype, device=matrix.device)
    scales, start = rows.new_empty(len(rows), dtype=torch.float32), 0
    for part in restored_chunks(matrix, scale, group, rotation):
        place = slice(start, start := start + len(part))
        rows[place], scales[place] = round_rows(part, dtype)
    return rows, scales


def restored_chunks(matrix: Rows, scale: Tensor | None, group: int, rotation: int) -> Iterator[Tensor]:
    """A stored matrix, a few rows at a time, restored to fp32 and rotated in groups of `rotation`, 0 for none."""
    step = max(1, _CHUNK // matrix.shape[1])
    for start, part in zip(count(step=step), matrix.split(step)):
        stored = scale if scale is None or scale.numel() == 1 else scale.reshape(len(matrix), -1)[start : start + step]
        wide = restore(part, stored, torch.float32, group)
        yield rotate(wide, rotation) if rotation else wide


def round_rows(wide: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """wide [M, K] -> [M, K] in `dtype`, and fp32 scales [M] that map each row's largest number to the format's."""
    scale = torch.maximum(wide.amax(1), wide.amin(1).abs()).float() / LARGEST_NUMBER[dtype]
    scaled = wide / scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None]  # in fp32, whatever `wide` is
    return (scaled.round_() if dtype == torch.int8 else scaled).to(dtype), scale


def restore(tensor: Tensor, scale: Tensor | None, dtype: torch.dtype, group: int = 0) -> Tensor:
    """A stored tensor as floats; the scale holds one number, or one per row, or one per block of every row.

    group: how many numbers of a row were rotated together before rounding; 0 if it was not rotated.
    """
    if scale is None:
        return tensor.to(dtype) if tensor.is_floating_point() else tensor
    rows = 1 if scale.numel() == 1 else len(tensor)
    blocks = scale.float().reshape(rows, -1, 1)
    wide = (tensor.float().reshape(rows, blocks.shape[1], -1) * blocks).view(tensor.shape)
    return (rotate(wide, group) if group else wide).to(dtype)


def rotate(matrix: Tensor, group: int) -> Tensor:
    """ConvRot's rotation of a matrix [out, in]: every `group` numbers of a row (a power of 4) times `hadamard(group)`.

    It spreads outliers before rounding, and is its own inverse. Rotating the tokens too leaves a product with rotated
    rows unchanged, as in ComfyUI: (x H)(W H)ᵀ = x Wᵀ.
    """
    inner = min(group, 16 if matrix.device.type == "cpu" and matrix.dtype == torch.float32 else 256)
    parts = matrix.reshape(-1, group // inner, inner) @ hadamard(inner, matrix.dtype, matrix.device)
    if group > inner:  # H of a product of sizes is a Kronecker product: the large matrix is never built
        parts = hadamard(group // inner, matrix.dtype, matrix.device) @ parts
    return parts.view(matrix.shape)


def hadamard(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[size, size], symmetric and orthogonal: Kronecker powers of a 4 x 4 matrix whose rows and columns all have the
    same sum, not Sylvester's, whose first column would collect a row's mean (comfy-kitchen).

    Built once per device: copies to a card cannot be recorded in a graph, and compilers treat it as a constant.
    """
    return cached_hadamard(size, dtype, device)


@cache
@torch.inference_mode(False)  # it is cached, and gradients may pass through it later
def cached_hadamard(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The matrix that `hadamard` returns, built once per size, number format and device."""
    small, whole = (1 - 2 * torch.eye(4).flip(1)) / 2, torch.ones(1, 1)
    while len(whole) < size:
        whole = torch.kron(small, whole)
    return whole.to(device, dtype)


def scale_name(name: str, names: Mapping[str, object]) -> str | None:
    """The name of a weight's scale among the stored names, if it has one."""
    stem = name.removesuffix(".weight")
    return next((stem + suffix for suffix in SCALE_SUFFIXES if stem != name and stem + suffix in names), None)
