"""Matrices whose rows are scaled in blocks, as stored by ComfyUI (comfy-kitchen): NVFP4 and MXFP8.

NVFP4: 4-bit numbers (e2m1), two per byte, high half first; an e4m3 scale for every 16 of a row, and one in fp32 for the
matrix. MXFP8: e4m3 numbers, and a power of 2 (e8m0) for every 32. Scales are stored in cuBLAS's order ("1D Block
Scaling Factors Layout" in its documentation): tiles of 128 rows by 4 blocks, in which rows i, i + 32, i + 64 and i + 96
lie side by side; the last tiles are padded.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from model.comfy_formats import BLOCK_SIZES, SCALE_DTYPES
from model.headers import StoredTensor

E2M1_TIMES_2 = torch.tensor([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], dtype=torch.int8)
TILE = (128, 4)  # rows and blocks
STACKED_ROWS = 32  # rows of a tile that are stacked
CHUNK_BYTES = 1 << 22  # bytes unpacked at once, to keep working copies small


def unpack_blocks(
    kind: str, matrix: Tensor, scale: Tensor, matrix_scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """A matrix as stored -> numbers [out, in], int8 or fp8, and fp32 scales [out, in / block].

    matrix_scale: NVFP4's scale of the matrix.
    """
    numbers = unpack_e2m1(matrix) if kind == "nvfp4" else matrix
    scales = unswizzle(scale, len(numbers), numbers.shape[1] // BLOCK_SIZES[kind])
    if matrix_scale is None:
        return numbers, scales.view(torch.float8_e8m0fnu).float()
    return numbers, scales.float() * (matrix_scale.float() / 2)


def unpack_e2m1(matrix: Tensor) -> Tensor:
    """Bytes [out, in / 2] -> their numbers times 2, int8 [out, in]."""
    halves = E2M1_TIMES_2.to(matrix.device)
    numbers = torch.empty(*matrix.shape, 2, dtype=torch.int8, device=matrix.device)
    step = max(CHUNK_BYTES // matrix.shape[1], 1)
    for start in range(0, len(matrix), step):
        rows = matrix[start : start + step]
        numbers[start : start + step] = halves[torch.stack([rows >> 4, rows & 15], -1).int()]
    return numbers.view(len(matrix), -1)


def unswizzle(scale: Tensor, rows: int, blocks: int) -> Tensor:
    """Scales in cuBLAS's order -> [rows, blocks]."""
    tiles = [whole // size for whole, size in zip(pad_to_tiles(rows, blocks), TILE, strict=True)]
    stored = scale.view(*tiles, STACKED_ROWS, TILE[0] // STACKED_ROWS, TILE[1])
    return stored.permute(0, 3, 2, 1, 4).reshape(tiles[0] * TILE[0], -1)[:rows, :blocks].contiguous()


def pad_to_tiles(rows: int, blocks: int) -> Sequence[int]:
    """The numbers of rows and blocks with scales, rounded up to whole tiles."""
    return [-(-count // size) * size for count, size in zip((rows, blocks), TILE, strict=True)]


def find_problem(kind: str, stored: StoredTensor, scale: StoredTensor | None, matrix_scale: StoredTensor | None) -> str:
    """What is missing or wrong in a matrix scaled in blocks; empty if nothing is."""
    rows, numbers = stored.shape if len(stored.shape) == 2 else (0, 0)
    if not numbers or numbers % BLOCK_SIZES[kind]:
        return f"{kind} of shape {list(stored.shape)}"
    if (kind == "nvfp4") != (matrix_scale is not None):
        return f"{kind} with{'out' if matrix_scale is None else ''} a scale of the whole matrix"
    if matrix_scale is not None and (matrix_scale.dtype, prod(matrix_scale.shape)) != ("F32", 1):
        return f"{kind} with {matrix_scale.dtype} {list(matrix_scale.shape)} as the scale of the whole matrix"
    if scale is None:
        return f"{kind} without scales"
    right = scale.dtype in SCALE_DTYPES[kind] and prod(scale.shape) == prod(
        pad_to_tiles(rows, numbers // BLOCK_SIZES[kind])
    )
    return "" if right else f"{kind} with scales of {scale.dtype} {list(scale.shape)}"
