"""Qwen3-VL reads references: its vision tower, and what it adds to a prompt's rows.

All pictures share one vision span before the prompt (several spans make collages). Their effect on the prompt's own
rows is the difference between reading it with and without them; it is scaled by strength, and reversed by a negative
one. The vision rows themselves may follow the prompt's or be left out: without them the style acts only through the
words, the strongest guard against a reference's content. Scaling vision rows has no effect, since norms undo it, so
their strength is how much information they keep: the less, the closer each row moves to a few statistics of all rows.

P patches of a picture, V = P / merge² rows that it becomes, T tokens of prompt and suffix, N taps, E text width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from math import isqrt
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import attention
from model.checkpoint import Checkpoint, load, open_checkpoint
from model.errors import K2Error
from model.headers import FETCH_AGAIN
from model.library import VISION_PREFIXES, has_vision, text_weights
from model.references import fit_size, to_pixels
from model.text_encoder import MAX_LAYERS, MAX_SIZE, TextEncoder, VisionInputs, rotate

PIXELS = 512 * 512  # at which a reference is read
SHUFFLE_SEED = 0x71135  # of the shuffling: a reference is always shuffled the same way
THINNING_SHARE = 0.1  # share of the largest weight below which a picture's rows are thinned out, to none at 0


@dataclass(frozen=True)
class VisionConfig:
    """The dimensions of the tower, under transformers' names."""

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    out_hidden_size: int
    num_position_embeddings: int
    deepstack_visual_indexes: tuple[int, ...]
    patch_size: int = 16
    spatial_merge_size: int = 2
    temporal_patch_size: int = 2
    in_channels: int = 3

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> VisionConfig:
        """From transformers' config.json. Raises K2Error, also for sizes no tower has: they would be allocated."""
        try:
            known = {f.name: raw[f.name] for f in fields(cls) if f.name in raw}
            known["deepstack_visual_indexes"] = tuple(known.get("deepstack_visual_indexes", ()))
            config = cls(**known)
            deep = config.deepstack_visual_indexes
            sizes = [getattr(config, f.name) for f in fields(cls) if f.type == "int"]
            plausible = all(type(size) is int and 0 < size <= MAX_SIZE for size in (*sizes, *(1 + i for i in deep)))
            plausible &= config.depth <= MAX_LAYERS and all(index < config.depth for index in deep)
            if not plausible or config.hidden_size % (4 * config.num_heads):  # a head rotates pairs in two halves
                raise ValueError
            if isqrt(config.num_position_embeddings) ** 2 != config.num_position_embeddings:  # of a square grid
                raise ValueError
        except (TypeError, ValueError):
            raise K2Error("The vision tower's config cannot be used.", hint="Use a Qwen3-VL text encoder.") from None
        return config

    @property
    def unit(self) -> int:
        """Side in pixels of the square that becomes one row."""
        return self.patch_size * self.spatial_merge_size


class Attention(nn.Module):
    def __init__(self, c: VisionConfig):
        super().__init__()
        self.heads = c.num_heads
        self.qkv = nn.Linear(c.hidden_size, 3 * c.hidden_size)
        self.proj = nn.Linear(c.hidden_size, c.hidden_size)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """x [P, W], rope [P, d] twice -> [P, W]."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(1, 2, 0, 3)
        q, k = (rotate(each.float(), *rope).to(x.dtype) for each in (q, k))
        out = attention(q[None], k[None], v[None])[0]
        return self.proj(out.transpose(0, 1).flatten(1))


class MLP(nn.Module):
    def __init__(self, c: VisionConfig):
        super().__init__()
        self.linear_fc1 = nn.Linear(c.hidden_size, c.intermediate_size)
        self.linear_fc2 = nn.Linear(c.intermediate_size, c.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_fc2(F.gelu(self.linear_fc1(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, c: VisionConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(c.hidden_size, eps=1e-6)
        self.norm2 = nn.LayerNorm(c.hidden_size, eps=1e-6)
        self.attn = Attention(c)
        self.mlp = MLP(c)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.attn(self.norm1(x), rope)
        return x + self.mlp(self.norm2(x))


class Merger(nn.Module):
    """Neighbouring patches become one row of the language model's width."""

    def __init__(self, c: VisionConfig, *, norm_after: bool):
        super().__init__()
        self.width = c.hidden_size * c.spatial_merge_size**2
        self.norm = nn.LayerNorm(self.width if norm_after else c.hidden_size, eps=1e-6)
        self.linear_fc1 = nn.Linear(self.width, self.width)
        self.linear_fc2 = nn.Linear(self.width, c.out_hidden_size)
        self.norm_after = norm_after

    def forward(self, x: Tensor) -> Tensor:
        """[P, W] -> [V, E]."""
        x = self.norm(x.view(-1, self.width)) if self.norm_after else self.norm(x).view(-1, self.width)
        return self.linear_fc2(F.gelu(self.linear_fc1(x)))


class PatchEmbed(nn.Module):
    def __init__(self, c: VisionConfig):
        super().__init__()
        kernel = (c.temporal_patch_size, c.patch_size, c.patch_size)
        self.proj = nn.Conv3d(c.in_channels, c.hidden_size, kernel, kernel)

    def forward(self, patches: Tensor) -> Tensor:
        """[P, C·t·p·p] -> [P, W]; each patch fills the convolution's kernel, so it is a matrix product."""
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class VisionTower(nn.Module):
    """Qwen3-VL's vision model, one picture at a time, under transformers' parameter names."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        c = self.config = config
        self.patch_embed = PatchEmbed(c)
        empty = torch.empty(c.num_position_embeddings, c.hidden_size)
        self.pos_embed = nn.Embedding.from_pretrained(empty, freeze=False)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.depth))
        self.merger = Merger(c, norm_after=False)
        self.deepstack_merger_list = nn.ModuleList(Merger(c, norm_after=True) for _ in c.deepstack_visual_indexes)

    def forward(self, pixels: Tensor) -> tuple[Tensor, list[Tensor]]:
        """pixels [1, 3, H, W] in −1 … 1, multiples of `unit` -> rows [V, E], and what deeper layers add to them."""
        c = self.config
        grid = pixels.shape[2] // c.patch_size, pixels.shape[3] // c.patch_size
        x = self.patch_embed(self.patches(pixels)) + self.positions(grid)
        rope = self.rope(grid, x.device)
        deep: dict[int, Tensor] = {}
        for index, block in enumerate(self.blocks):
            x = block(x, rope)
            if index in c.deepstack_visual_indexes:
                deep[index] = self.deepstack_merger_list[c.deepstack_visual_indexes.index(index)](x)
        return self.merger(x), [deep[index] for index in c.deepstack_visual_indexes]

    def grid(self, pixels: Tensor) -> tuple[int, int]:
        """How many rows and columns a picture [1, 3, H, W] becomes."""
        return pixels.shape[2] // self.config.unit, pixels.shape[3] // self.config.unit

    def patches(self, pixels: Tensor) -> Tensor:
        """[1, 3, H, W] -> [P, C·t·p·p]; a still picture is repeated over a patch's time axis."""
        c = self.config
        cells = self.in_merge_order(
            pixels[0].unfold(1, c.patch_size, c.patch_size).unfold(2, c.patch_size, c.patch_size)
        )
        return cells[:, :, None].expand(-1, -1, c.temporal_patch_size, -1, -1).flatten(1)

    def in_merge_order(self, cells: Tensor) -> Tensor:
        """Cells of a grid [C, h, w, …], reordered so that those merged into one row are adjacent -> [P, C, …]."""
        m = self.config.spatial_merge_size
        blocks = cells.unflatten(2, (-1, m)).unflatten(1, (-1, m)).transpose(2, 3)
        return blocks.flatten(1, 4).transpose(0, 1)

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """The learned square of positions, resized to the grid -> [P, W]."""
        side = isqrt(self.config.num_position_embeddings)
        square = self.pos_embed.weight.T.unflatten(1, (side, side))[None].float()
        stretched = F.interpolate(square, grid, mode="bilinear", align_corners=True)[0]
        return self.in_merge_order(stretched).to(self.pos_embed.weight.dtype)

    def rope(self, grid: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
        """Cosine and sine [P, d]: half of a head rotates with the row, half with the column; fp32."""
        quarter = self.config.hidden_size // self.config.num_heads // 4
        speeds = 1e4 ** -(torch.arange(quarter, device=device).float() / quarter)
        places = torch.stack(torch.meshgrid(*(torch.arange(n, device=device) for n in grid), indexing="ij"))
        angles = (self.in_merge_order(places)[..., None] * speeds).flatten(1).repeat(1, 2)
        return angles.cos(), angles.sin()


def find_tower(path: Path) -> Checkpoint | None:
    """The files that also hold a text encoder's vision tower; None if there is none, or one without layers."""
    return open_checkpoint(text_weights(path)) if has_vision(path) else None


def load_tower(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> VisionTower:
    """A vision tower with its weights. Raises K2Error if names or shapes do not match."""
    with torch.device("meta"):
        tower = VisionTower(VisionConfig.from_dict(checkpoint.config["vision_config"]))
    prefix = next(p for p in VISION_PREFIXES if any(name.startswith(p) for name in checkpoint.tensors))
    tensors = {name.removeprefix(prefix): s for name, s in checkpoint.tensors.items() if name.startswith(prefix)}
    load(tower, replace(checkpoint, tensors=tensors), device=device, dtype=dtype)
    return tower


class PictureTokens(NamedTuple):
    """The tokens before a picture, for each of its rows, and after it."""

    start: int
    pad: int
    end: int


def read_picture_tokens(checkpoint: Checkpoint) -> PictureTokens:
    """The marks named in a text encoder's config. Raises K2Error if it names none."""
    ids = [checkpoint.config.get(f"{name}_token_id") for name in ("vision_start", "image", "vision_end")]
    known = [each for each in ids if isinstance(each, int)]
    if len(known) < len(ids):
        raise K2Error(f"{checkpoint.path} does not say which tokens stand for pictures.", hint=FETCH_AGAIN)
    return PictureTokens(*known)


class EncodedPicture(NamedTuple):
    """A picture as the tower sees it."""

    rows: Tensor  # [V, E]
    deepstack: list[Tensor]  # [V, E] each, what deeper layers add
    grid: tuple[int, int]  # rows and columns, V in all


class WeightedPicture(NamedTuple):
    """A picture and its weight."""

    picture: EncodedPicture
    weight: float


def encode_picture(tower: VisionTower, pixels: Tensor) -> EncodedPicture:
    """pixels [1, 3, H, W] in −1 … 1."""
    rows, deep = tower(pixels.to(tower.pos_embed.weight))
    return EncodedPicture(rows, deep, tower.grid(pixels))


class VisionReader:
    """A text encoder with a vision tower."""

    def __init__(self, text: TextEncoder, checkpoint: Checkpoint):
        weight = text.tower.embed_tokens.weight
        self.text, self.tower = text, load_tower(checkpoint, weight.device, weight.dtype)
        self.picture_tokens = read_picture_tokens(checkpoint)

    @torch.no_grad()
    def encode_reference(self, path: Path, tiles: int) -> EncodedPicture:
        """A reference picture, its tiles shuffled, as the tower sees it. Raises K2Error."""
        size = fit_size(path, PIXELS, self.tower.config.unit * tiles)
        return encode_picture(self.tower, shuffle_tiles(to_pixels(path, *size), tiles))

    @torch.no_grad()
    def encode(self, prompt: str, pictures: Sequence[WeightedPicture], *, keep_rows: bool) -> Tensor:
        """The prompt's rows as changed by pictures of positive and negative weight -> [1, T or T + V, N, E].

        Pictures in one span are read as one, so different weights take several readings, each of fewer pictures: with
        t_1 < t_2 < … the absolute weights, r_k the reading of the n_k pictures of weight t_k and more, and r_0 that of
        none, the words are r_0 ± Σ n_k (t_k − t_{k−1}) (r_k − r_0). `keep_rows` appends the rows of the positive
        pictures, each with information in proportion to its weight, and thinned out as a weight nears 0 beside others.
        """
        plain = self.text.encode([prompt])[0]
        words, rows = plain, []
        for sign in (1, -1):
            shown = [picture for picture in pictures if round(picture.weight * sign, 9) > 0]
            sizes = [round(picture.weight * sign, 9) for picture in shown]
            own: list[Any] = [0.0] * len(shown)  # each picture's rows [V, N, E]
            for before, size in pairwise([0.0, *sorted(set(sizes))]):
                some = [index for index, each in enumerate(sizes) if each >= size]
                read, seen, counts = self.read_with_pictures(prompt, [shown[index].picture for index in some])
                words = words + sign * len(some) * (size - before) * (read - plain)
                for index, part in zip(some, seen[0].split(counts), strict=True):
                    own[index] = own[index] + (size - before) / sizes[index] * part
            if keep_rows and sign > 0 and shown:
                heaviest, strength = max(sizes), min(sum(sizes), 1.0)
                kept = [
                    thin_rows(each, size / heaviest / THINNING_SHARE) for each, size in zip(own, sizes, strict=True)
                ]
                known = [
                    torch.full((len(each),), strength * size / heaviest) for each, size in zip(kept, sizes, strict=True)
                ]
                rows.append(quantise_rows(torch.cat(kept), torch.cat(known))[None])
        return torch.cat((words, *rows), 1)

    def read_with_pictures(self, prompt: str, pictures: Sequence[EncodedPicture]) -> tuple[Tensor, Tensor, list[int]]:
        """Prompt and suffix read with the pictures [1, T, N, E]; the pictures' rows [1, V, N, E]; rows per picture."""
        encoder, words = self.text, self.text.token_ids(prompt)
        parts: list[list[int] | EncodedPicture] = [
            [self.picture_tokens.start],
            *pictures,
            [self.picture_tokens.end, *words],
        ]
        ids, seen = interleave(parts, self.picture_tokens.pad, encoder.prefix_ids.shape[1])
        taps, _ = encoder.tower(torch.tensor([ids], device=encoder.prefix_ids.device), encoder.prefix_cache, seen)
        counts = [len(picture.rows) for picture in pictures]
        return taps[:, -len(words) :], taps[:, 1 : 1 + sum(counts)], counts


def interleave(
    parts: Sequence[list[int] | EncodedPicture], pad: int, before: int = 0
) -> tuple[list[int], VisionInputs]:
    """Tokens and pictures as one sequence after `before` tokens: its ids, and what its pictures contribute."""
    ids: list[int] = []
    where: list[bool] = []
    seen = [part for part in parts if isinstance(part, EncodedPicture)]
    for part in parts:
        own = [pad] * len(part.rows) if isinstance(part, EncodedPicture) else part
        ids += own
        where += [isinstance(part, EncodedPicture)] * len(own)
    rows = torch.cat([each.rows for each in seen])
    layers = [torch.cat(layer) for layer in zip(*(each.deepstack for each in seen), strict=True)]
    places = positions(before, [part.grid if isinstance(part, EncodedPicture) else len(part) for part in parts])
    return ids, VisionInputs(torch.tensor(where, device=rows.device), rows, layers, places.to(rows.device))


def positions(before: int, parts: Sequence[int | tuple[int, int]]) -> Tensor:
    """Time, row and column of everything after `before` tokens -> [3, tokens].

    A part is a number of text tokens, or a picture's rows and columns; each starts where the last one ends, and a
    picture is as long as its longer side.
    """
    places, at = [], before
    for part in parts:
        if isinstance(part, tuple):
            grid = torch.meshgrid(torch.arange(1), *map(torch.arange, part), indexing="ij")
            place, length = torch.stack(grid).flatten(1), max(part)
        else:
            place, length = torch.arange(part).expand(3, -1), part
        places.append(place + at)
        at += length
    return torch.cat(places, 1)


def quantise_rows(rows: Tensor, known: Tensor) -> Tensor:
    """Vision rows with less information: in every tap, each is pulled to the nearest of μ − σ, μ and μ + σ of all rows.

    rows [V, N, E], known [V] 0 … 1: how much of each row is kept -> [V, N, E]
    """
    wide = rows.float()
    deviation, mean = torch.std_mean(wide, 0, correction=0)
    anchors = torch.stack((mean - deviation, mean, mean + deviation))  # [3, N, E]
    nearest = (wide[:, None] - anchors).square().sum(-1).argmin(1)  # [V, N]
    anchor = anchors[nearest, torch.arange(rows.shape[1], device=rows.device)]
    return anchor.lerp(wide, known.to(wide)[:, None, None]).to(rows.dtype)


def thin_rows(rows: Tensor, share: float) -> Tensor:
    """An evenly spaced selection of rows [V, …], of a share 0 … 1; from 1 on, all of them."""
    count = min(round(share * len(rows)), len(rows))
    return rows[(torch.arange(count, device=rows.device) + 0.5).mul(len(rows) / max(count, 1)).long()]


def shuffle_tiles(pixels: Tensor, tiles: int) -> Tensor:
    """A picture [1, 3, H, W] cut into tiles x tiles, all of which change places; H and W multiples of tiles."""
    if tiles == 1:
        return pixels
    count = tiles**2
    cut = pixels.unflatten(3, (tiles, -1)).unflatten(2, (tiles, -1)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(SHUFFLE_SEED))
    moved = cut.clone()
    moved[:, order] = cut[:, order.roll(1)]  # one cycle through all places
    grid = moved.unflatten(1, (tiles, tiles)).permute(0, 3, 1, 4, 2, 5)
    return grid.flatten(4, 5).flatten(2, 3)
