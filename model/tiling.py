"""Run large pictures through a network in overlapping tiles, blended without seams.

Memory then depends on the tile and not on the picture. Tiles overlap by a margin over which one fades into the next;
weights are divided by their sum, so what all tiles agree on comes out exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import torch
from torch import Tensor

TILE, OVERLAP = 1536, 256  # a tile's side in pixels, and how much of it a neighbour shares


def tile_starts(length: int, tile: int, overlap: int, unit: int) -> list[int]:
    """Where tiles start, multiples of `unit`; the last one ends at the border, so all have full size."""
    if length <= tile:
        return [0]
    count = -(-(length - overlap) // (tile - overlap))
    return [round(i * (length - tile) / (count - 1) / unit) * unit for i in range(count)]


def blend_ramp(length: int, fade: int, first: bool, last: bool) -> Tensor:
    """Blend weights [length] of a tile: 1 inside, falling over `fade` towards a neighbour, 1 at the picture's border.

    The outer quarter of the overlap has weight 0: there a tile is still affected by the padding at its edge.
    """
    position = torch.arange(length, dtype=torch.float32) + 0.5
    slope = (position / fade * 2 - 0.5).clamp(0, 1)
    up = torch.ones(length) if first else slope
    down = torch.ones(length) if last else slope.flip(0)
    return torch.minimum(up, down)


def apply_tiled(
    apply: Callable[[Tensor], Tensor], x: Tensor, tile: int, overlap: int, scale: Fraction, unit: int = 1
) -> Tensor:
    """apply: [B, C, h, w] -> [B, C', h*scale, w*scale], tile by tile over x [B, C, H, W].

    `tile` and `overlap` are in cells of x and multiples of `unit`, the smallest step that maps to whole output cells.
    Raises ValueError if they are not, or if the overlap leaves no step.
    """
    if tile % unit or overlap % unit or not 0 < overlap < tile or (unit * scale).denominator != 1:
        raise ValueError(f"tile {tile} and overlap {overlap} must be multiples of {unit}, and the overlap smaller")
    if max(x.shape[-2:]) <= tile:
        return apply(x)
    height, width = (int(side * scale) for side in x.shape[-2:])
    rows, columns = (tile_starts(side, tile, overlap, unit) for side in x.shape[-2:])
    total, weights = None, torch.zeros(height, width, device=x.device)
    for row in rows:
        for column in columns:
            part = apply(x[..., row : row + tile, column : column + tile])
            if total is None:
                total = torch.zeros(*part.shape[:2], height, width, device=x.device)
            h, w = part.shape[-2:]
            fade, top, left = int(overlap * scale), int(row * scale), int(column * scale)
            weight = torch.outer(
                blend_ramp(h, fade, row == rows[0], row == rows[-1]),
                blend_ramp(w, fade, column == columns[0], column == columns[-1]),
            ).to(x.device)
            total[..., top : top + h, left : left + w] += part.float() * weight
            weights[top : top + h, left : left + w] += weight
    assert total is not None
    return (total / weights).to(x.dtype)
