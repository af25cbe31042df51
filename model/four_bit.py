"""Matrices in 4 bits, as codes for 8-bit integers: what ComfyUI calls asym_w4a8_int8 (comfy-kitchen).

A code picks one of 16 levels. Times the scale of its group of 16 and rounded, that is an integer from −127 to 127;
times the scale of its row, a weight. So products run in 8 bits, as if the matrix had been stored in them (in two steps,
as in QServe, arXiv 2405.04532). Rows are rotated first, which makes their numbers normally distributed; the levels have
the least squared error for such numbers divided by the largest of 16 (Lloyd and Max).
"""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from model.comfy_formats import W4A4, W4A8
from model.headers import StoredTensor
from model.quantize import LARGEST_NUMBER

GROUP_SIZE = 16  # neighbours in a row that share a scale
LEVELS = (  # comfy-kitchen's: its kernels support no others
    -0.980602, -0.794529, -0.638165, -0.500986, -0.377321, -0.263187, -0.155210, -0.050720,
    0.052541, 0.156985, 0.265284, 0.379533, 0.502636, 0.638953, 0.794876, 0.980671,
)  # fmt: skip
UNSIGNED, SIGNED = tuple(range(-8, 8)), (*range(8), *range(-8, 0))  # for files without levels: codes as numbers
E4M3_ONE = 0x38  # in e4m3
TINY = torch.finfo(torch.float32).tiny
TABLE_STEPS = 512  # steps from 0 to a group's largest number, in a table that gives the nearest level
MAX_ROTATION = 256
MAX_NUMBER = LARGEST_NUMBER[torch.int8]
CHUNK = {"cpu": 1 << 18}  # numbers processed at once: working copies larger than the CPU's cache take twice as long
DEFAULT_CHUNK = 1 << 26


class Codes(NamedTuple):
    """A matrix [out, in] in 4 bits."""

    packed: Tensor  # int8 [out, in / 2], two codes per byte, the first in the low half
    groups: Tensor  # uint8 [out, in / 16], the bits of e4m3 scales
    rows: Tensor  # fp32 [out]
    levels: Tensor  # fp32 [16]

    @property
    def numbers(self) -> Tensor:
        """The integers that the codes stand for, int8 [out, in]."""
        return decode_codes(self.packed, self.groups, self.levels)


def read_codes(kind: str, packed: Tensor, rows: Tensor, groups: Tensor | None, levels: Tensor | None) -> Codes:
    """Codes as stored by ComfyUI: W4A8, with or without its own levels, or W4A4, which has no group scales."""
    if kind == W4A4 or groups is None:
        groups = torch.full(
            (len(packed), 2 * packed.shape[1] // GROUP_SIZE), E4M3_ONE, dtype=torch.uint8, device=packed.device
        )
    if levels is None:
        levels = torch.tensor(SIGNED if kind == W4A4 else UNSIGNED, device=packed.device)
    return Codes(packed, groups.view(torch.uint8), rows.float().flatten(), levels.float())


def decode_codes(packed: Tensor, groups: Tensor, levels: Tensor) -> Tensor:
    """The integers that codes stand for (arguments as in `Codes`), int8 [out, in]. They are looked up by scale and
    byte, two numbers at once: the table has 65,536 entries."""
    both = torch.arange(256, device=packed.device)
    pairs = levels[torch.stack([both & 15, both >> 4], -1)]
    table = (
        (decode_e4m3(both)[:, None, None] * pairs)
        .round()
        .clamp(-MAX_NUMBER, MAX_NUMBER)
        .to(torch.int8)
        .view(torch.int16)
        .flatten()
    )
    numbers = torch.empty(packed.shape, dtype=torch.int16, device=packed.device)
    codes, scales = packed.view(torch.uint8).unflatten(1, (-1, GROUP_SIZE // 2)), (groups.int() << 8)[..., None]
    step = max(1, CHUNK.get(packed.device.type, DEFAULT_CHUNK) // max(1, packed.shape[1]))
    for some, high, room in zip(codes.split(step), scales.split(step), numbers.split(step), strict=True):
        torch.index_select(table, 0, (some + high).flatten(), out=room.flatten())
    return numbers.view(torch.int8)


def decode_e4m3(bits: Tensor) -> Tensor:
    """The numbers that bytes mean in e4m3, which not every device supports; 480 instead of NaN."""
    exponent, fraction = bits >> 3 & 15, (bits & 7) / 8
    size = torch.where(exponent > 0, torch.ldexp(1 + fraction, exponent - 7), torch.ldexp(fraction, exponent - 6))
    return torch.where(bits > 127, -size, size)


def to_codes(matrix: Tensor) -> Codes:
    """A matrix [out, in] with rotated rows -> its codes; in is a multiple of 16.

    A group's scale is the least-squares fit to the levels that are nearest when its largest number is scaled to 1.
    """
    levels = torch.tensor(LEVELS, device=matrix.device)
    steps = torch.arange(-TABLE_STEPS, TABLE_STEPS + 1, device=matrix.device) / TABLE_STEPS
    nearest = torch.bucketize(steps, (levels[1:] + levels[:-1]) / 2)

    def look_up(table: Tensor, size: Tensor) -> Tensor:
        """Look up each number, divided by its group's entry of `size`, in a table over -1 … 1."""
        places = (wide * (TABLE_STEPS / size.clamp(min=TABLE_STEPS * TINY))[..., None]).add_(TABLE_STEPS + 0.5).int()
        return table.index_select(0, places.clamp_(0, 2 * TABLE_STEPS).flatten()).view(wide.shape)

    wide = matrix.float().unflatten(1, (-1, GROUP_SIZE))
    sizes = wide.abs().amax(-1)
    near = look_up(levels[nearest], sizes)
    scale = (torch.linalg.vecdot(wide, near) / torch.linalg.vecdot(near, near)).clamp(min=0)
    rows = scale.amax(1) * (LEVELS[-1] / MAX_NUMBER) + 0 * sizes.amax(1)  # NaN stays NaN
    groups = (scale / rows.clamp(min=TINY)[:, None]).to(torch.float8_e4m3fn)
    codes = look_up(nearest.to(torch.uint8), groups.float() * rows[:, None])
    both = codes.flatten(1).view(torch.int16)  # the first in the low byte
    return Codes((both | both >> 4).to(torch.int8), groups.view(torch.uint8), rows, levels)


def rotation_size(in_features: int) -> int:
    """The rotation's group size for rows of this length: the largest power of 4 that divides it, up to
    `MAX_ROTATION`."""
    return next(size for size in (MAX_ROTATION, 64, 16, 4, 1) if in_features % size == 0)


def find_problem(
    kind: str, stored: StoredTensor, rows: StoredTensor | None, groups: StoredTensor | None, levels: StoredTensor | None
) -> str:
    """What is missing or wrong in a matrix of codes; empty if nothing is."""
    out_features, in_features = stored.shape if len(stored.shape) == 2 else (0, 0)
    if not in_features or in_features % GROUP_SIZE:
        return f"{kind} of shape {list(stored.shape)}"
    if rows is None or (kind == W4A8 and groups is None):
        return f"{kind} without scales"
    if rows.dtype != "F32" or prod(rows.shape) != out_features:
        return f"{kind} with scales of {rows.dtype} {list(rows.shape)}"
    if kind == W4A4:
        return f"{kind} with group scales" if groups or levels else ""
    assert groups
    if groups.dtype not in ("F8_E4M3", "U8") or groups.shape != (out_features, in_features // GROUP_SIZE):
        return f"{kind} with scales of {groups.dtype} {list(groups.shape)}"
    if levels and (levels.dtype, levels.shape) != ("F32", (16,)):
        return f"{kind} with levels of {levels.dtype} {list(levels.shape)}"
    return ""
