"""Style: pictures in, prompt rows out.

A reference picture becomes K rows in the space of the text features, [K, N, E]. They are appended to the prompt's rows
before text fusion, just where a vision-language encoder's image rows would go, so the transformer needs no new part.
Strength and mixing happen there: rows = S_null + sum_i s_i (S_i - S_null), independent of the order of the references,
with strengths that are evened out first (`response`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

STYLE_ROWS = 4  # prompt rows per style
SHUFFLES = 4  # of a reference, at each of two tile sizes
STRENGTHS, RESPONSES = (0.0, 0.25, 0.5, 0.75, 1.0), (0.0, 0.285, 0.355, 0.51, 1.0)  # of `response`


@dataclass(frozen=True, kw_only=True)
class StyleConfig:
    """The shape of a style encoder."""

    text_width: int
    text_taps: int
    rows: int = STYLE_ROWS
    channels: int = 16  # of the latents
    width: int = 128
    hidden: int = 448
    vector: int = 64


class ResidualConv(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.GroupNorm(8, width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.conv1(F.silu(self.norm(x)))))


class StyleEncoder(nn.Module):
    """Reference latents to style rows and one style vector.

    Only means and deviations over the picture reach the output, so where things are, and most of what they are, is
    lost: a style is what remains of a picture when its content is averaged out.
    """

    def __init__(self, config: StyleConfig):
        super().__init__()
        c = self.config = config
        self.inward = nn.Conv2d(c.channels, c.width, 2, stride=2)
        self.blocks = nn.Sequential(*(ResidualConv(c.width) for _ in range(3)))
        self.trunk = nn.Sequential(nn.Linear(2 * c.width, c.hidden), nn.SiLU())
        self.to_rows = nn.Linear(c.hidden, c.rows * c.text_taps * c.text_width)
        self.to_vector = nn.Linear(c.hidden, c.vector)
        self.null = nn.Parameter(torch.zeros(c.rows, c.text_taps, c.text_width))

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """latents [B, C, H, W], normalised, H and W even -> rows [B, K, N, E], unit vectors [B, V]."""
        return self.from_statistics(self.statistics(latents))

    def statistics(self, latents: Tensor) -> Tensor:
        """All that the encoder sees of latents [B, C, H, W]: means and deviations of features [B, 2·width]."""
        x = self.blocks(self.inward(latents)).flatten(2)
        return torch.cat((x.mean(-1), x.std(-1)), -1)

    def from_statistics(self, statistics: Tensor) -> tuple[Tensor, Tensor]:
        """statistics [B, 2·width] -> rows [B, K, N, E], unit vectors [B, V]."""
        c, trunk = self.config, self.trunk(statistics)
        rows = self.to_rows(trunk).view(-1, c.rows, c.text_taps, c.text_width)
        return rows, F.normalize(self.to_vector(trunk), dim=-1)

    def encode_reference(self, latents: Tensor) -> Tensor:
        """A reference's rows, latents [1, C, H, W] -> [K, N, E], with tiles shuffled as in training.

        Seams are part of the statistics that the encoder was trained on, so an unshuffled picture works less well.
        Averaged over a few shuffles, always the same ones.
        """
        generator = torch.Generator().manual_seed(0)
        tiles = [
            tile
            for tile in (latents.shape[-1] // 8, latents.shape[-1] // 4)
            if tile > 1 and latents.shape[-1] % tile == 0
        ]
        shuffled = [destroy_content(latents, tile, generator) for tile in tiles for _ in range(SHUFFLES)]
        return self(torch.cat(shuffled) if shuffled else latents)[0].mean(0)

    def initialise(self) -> None:
        """Rows start as noise, fainter than the text's rows: present, but without meaning yet."""
        nn.init.normal_(self.null, std=0.5)
        nn.init.normal_(self.to_rows.weight, std=0.7 * self.config.hidden**-0.5)

    def mix(self, rows: Sequence[Tensor], strengths: Sequence[float]) -> Tensor:
        """Mix several styles' rows [K, N, E] at their strengths (-2 ... 2) into one style's rows [K, N, E].

        `response` is applied to the sum of the positive and the sum of the negative strengths, so that the proportions
        between styles, and paths from one to another, are preserved. Summed in fp64 and in the order of the parts'
        bytes, so the order of the arguments never matters: only identical parts can change places.
        """
        null = self.null.detach().cpu().double()
        evened = even_out(strengths)
        parts = [strength * (each.cpu().double() - null) for each, strength in zip(rows, evened, strict=True)]
        parts.sort(key=lambda part: part.numpy().tobytes())
        return torch.stack([null, *parts]).sum(0).to(self.null)


def response(strength: float) -> float:
    """How far rows go from the null rows towards a style at a strength: just as far at 0, 1 and beyond, less between.

    Along the straight path, a picture takes on a look within a short stretch, at its own point between a fifth and a
    half. `RESPONSES` holds the positions for `STRENGTHS`: there, by the judge, mean likeness reaches three, six and
    nine tenths of its range. Linear in between; odd, so that negative strengths mirror positive ones.
    """
    size = abs(strength)
    return strength if size >= 1 else math.copysign(float(np.interp(size, STRENGTHS, RESPONSES)), strength)


def even_out(strengths: Sequence[float]) -> list[float]:
    """Strengths as applied to the rows: positive ones keep their proportions to each other, and so do negative ones."""
    sums = {sign: math.fsum(abs(s) for s in strengths if (s > 0) is sign) for sign in (True, False)}
    return [s * response(total) / total if (total := sums[s > 0]) else 0.0 for s in strengths]


def destroy_content(latents: Tensor, tile: int, generator: torch.Generator) -> Tensor:
    """Shuffle a reference's tiles and flip it at random: its look stays, its subject does not.

    latents [B, C, H, W], tile in latent cells, H and W multiples of it -> the same shape
    """
    batch, channels, height, width = latents.shape
    rows, columns = height // tile, width // tile
    tiles = latents.view(batch, channels, rows, tile, columns, tile).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    dice: dict[str, Any] = {"generator": generator, "device": generator.device}
    order = torch.rand(batch, rows * columns, **dice).argsort(1).to(latents.device)
    tiles = tiles.gather(1, order[..., None, None, None].expand_as(tiles))
    if torch.rand((), **dice) < 0.5:
        tiles = tiles.flip(-1)
    grid = tiles.view(batch, rows, columns, channels, tile, tile).permute(0, 3, 1, 4, 2, 5)
    return grid.reshape(batch, channels, height, width)
