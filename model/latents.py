"""Conversions between latents [B, C, H, W], whose cells are squares of pixels, and the transformer's tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def draw_noise(seed: int, channels: int, height: int, width: int) -> Tensor:
    """A picture's starting noise: [1, C, height, width] in latent cells, fp32.

    Always drawn on the CPU with its own generator, so a seed means the same on every device and in any batch.
    """
    return torch.randn(1, channels, height, width, generator=torch.Generator("cpu").manual_seed(seed))


def patchify(latents: Tensor, patch: int) -> Tensor:
    """Cut latents into square tokens, row by row.

    latents  [B, C, H, W]   normalised latents, H and W multiples of the patch
    returns  [B, L, C·p·p]  L = (H/p) · (W/p); inside a token channel varies slowest, then patch row, patch column
    """
    batch, channels, height, width = latents.shape
    cells = latents.view(batch, channels, height // patch, patch, width // patch, patch)
    return cells.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * patch**2)


def token_grid(latents: Tensor, patch: int) -> tuple[int, int]:
    """Rows and columns of the tokens that latents [..., H, W] are cut into."""
    return latents.shape[-2] // patch, latents.shape[-1] // patch


def unpatchify(tokens: Tensor, patch: int, height: int, width: int) -> Tensor:
    """Put tokens [B, L, C·p·p] back together: latents [B, C, height, width], in latent cells."""
    batch, channels = tokens.shape[0], tokens.shape[2] // patch**2
    cells = tokens.view(batch, height // patch, width // patch, channels, patch, patch)
    return cells.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels, height, width)


def position_ids(text_tokens: int, rows: int, columns: int) -> Tensor:
    """(frame, row, column) of every token of the stream [text | image] -> [text_tokens + rows · columns, 3].

    All text tokens sit at the origin: word order is the text encoder's business.
    """
    ids = torch.zeros(text_tokens + rows * columns, 3, dtype=torch.long)
    image = ids[text_tokens:].view(rows, columns, 3)
    image[..., 1] = torch.arange(rows)[:, None]
    image[..., 2] = torch.arange(columns)
    return ids


OUTER_SPACING = 0.3  # spacing of rows and columns beyond the square, relative to those inside


def centre_on_square(positions: Tensor, grid: tuple[int, int], side: int) -> Tensor:
    """Map the rows and columns of a grid [L, 2] to positions on the square of `side` tokens used in training.

    The centres coincide. The scale is the geometric mean of two: the one at which the areas are equal, where a long
    picture cuts off its subject, and the one at which the square fits into the picture, where subjects come out small.
    Positions beyond the square are pulled close to its edge, since further out subjects repeat. The square itself is
    unchanged. Chosen by eye and by the judge among five methods (`model/train/shape_study.py` measures this one).
    """
    scale = side / math.sqrt(math.sqrt(math.prod(grid)) * min(grid))
    middle, edge = (torch.tensor(grid) - 1) / 2, (side - 1) / 2
    away = (positions - middle) * scale
    return edge + away.clamp(-edge, edge) + OUTER_SPACING * (away - away.clamp(-edge, edge))
