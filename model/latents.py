"""Between latents [B, C, H, W], one cell of which is a square of pixels, and the tokens that the transformer reads."""

from __future__ import annotations

import torch
from torch import Tensor


def noise(seed: int, channels: int, height: int, width: int) -> Tensor:
    """Where a picture starts: [1, C, height, width] in latent cells, fp32.

    Always drawn on the CPU, from a generator of its own, so a seed means the same on every device and in any batch.
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


def unpatchify(tokens: Tensor, patch: int, height: int, width: int) -> Tensor:
    """Put tokens [B, L, C·p·p] back together: latents [B, C, height, width], in latent cells."""
    batch, channels = tokens.shape[0], tokens.shape[2] // patch**2
    cells = tokens.view(batch, height // patch, width // patch, channels, patch, patch)
    return cells.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels, height, width)


def position_ids(text_tokens: int, rows: int, columns: int) -> Tensor:
    """(frame, row, column) of every token of the stream [text | image] -> [text_tokens + rows · columns, 3].

    Text sits at the origin: the order of words is the text encoder's business.
    """
    ids = torch.zeros(text_tokens + rows * columns, 3, dtype=torch.long)
    image = ids[text_tokens:].view(rows, columns, 3)
    image[..., 1] = torch.arange(rows)[:, None]
    image[..., 2] = torch.arange(columns)
    return ids
