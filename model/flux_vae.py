"""The FLUX.2 autoencoder: factor 8, 32 channels, normalised by running statistics of packs of 2 x 2 cells.

Parameter names are diffusers' (`AutoencoderKLFlux2`). Its pipeline leaves the latents packed, 128 channels per 16 x 16
pixels; here they are unpacked again, as `patchify` needs them. Shapes: B pictures, H x W pixels; pictures are RGB in
-1 ... 1; one latent cell is 8 x 8 pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import attention
from model.tiling import OVERLAP, TILE, apply_tiled
from model.upsample import upsample_conv

EPS = 1e-6  # of every group norm
SCALES = 4  # so a latent cell is 8 x 8 pixels


@dataclass(frozen=True)
class FluxVAEConfig:
    """Dimensions of a FLUX.2 autoencoder; defaults: the release's. The names are diffusers'."""

    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    decoder_block_out_channels: tuple[int, ...] | None = None  # none: the encoder's
    layers_per_block: int = 2
    latent_channels: int = 32
    norm_num_groups: int = 32
    batch_norm_eps: float = 1e-4

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FluxVAEConfig:
        """From JSON values; keys that do not shape the network (diffusers' config.json has some) are ignored.

        Raises TypeError or ValueError for values that no autoencoder has.
        """
        known = {key: values[key] for key in cls.__dataclass_fields__ if key in values}
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in known.items()}
        config = cls(**fields)
        widths = (*config.block_out_channels, *(config.decoder_block_out_channels or ()))
        sizes = [(config.latent_channels, 1024), (config.layers_per_block, 64), (config.norm_num_groups, 4096)]
        sizes += [(width, 8192) for width in widths]
        if not all(type(size) is int and 0 < size <= most for size, most in sizes) or len(widths) > 16:
            raise ValueError("it states sizes that no autoencoder has")
        if {len(each) for each in (config.block_out_channels, config.decoder_block_out_channels) if each} != {SCALES}:
            raise ValueError(f"it does not have {SCALES} scales")
        if any(width % config.norm_num_groups for width in widths) or not config.batch_norm_eps > 0:
            raise ValueError("it states norms that no autoencoder has")
        return config


class ResidualBlock(nn.Module):
    """Group norm, SiLU, 3 x 3 convolution, twice, plus a shortcut."""

    def __init__(self, dim: int, out_dim: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, dim, EPS)
        self.conv1 = nn.Conv2d(dim, out_dim, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out_dim, EPS)
        self.conv2 = nn.Conv2d(out_dim, out_dim, 3, padding=1)
        if dim != out_dim:
            self.conv_shortcut = nn.Conv2d(dim, out_dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> [B, C', H, W]."""
        h = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return h + (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)


class Attention(nn.Module):
    """One head of self-attention over all cells of the smallest grid."""

    def __init__(self, dim: int, groups: int):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, dim, EPS)
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> the same."""
        cells = self.group_norm(x).flatten(2).transpose(1, 2).unsqueeze(1)  # [B, 1, H*W, C]
        attended = attention(self.to_q(cells), self.to_k(cells), self.to_v(cells))
        return x + self.to_out[0](attended).squeeze(1).transpose(1, 2).reshape(x.shape)


class MidBlock(nn.Module):
    """Residual block, attention, residual block."""

    def __init__(self, dim: int, groups: int):
        super().__init__()
        self.resnets = nn.ModuleList([ResidualBlock(dim, dim, groups), ResidualBlock(dim, dim, groups)])
        self.attentions = nn.ModuleList([Attention(dim, groups)])

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> the same."""
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Downsample(nn.Module):
    """Halve the grid; the zero padding sits at the right and bottom edges only."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> [B, C, H/2, W/2]."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double the grid."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> [B, C, 2H, 2W]."""
        return upsample_conv(x, self.conv)


class DownBlock(nn.Module):
    """The residual blocks of one scale, then the step to the next coarser one."""

    def __init__(self, dim: int, out_dim: int, blocks: int, groups: int, downsample: bool):
        super().__init__()
        self.resnets = nn.ModuleList(ResidualBlock(dim if i == 0 else out_dim, out_dim, groups) for i in range(blocks))
        if downsample:
            self.downsamplers = nn.ModuleList([Downsample(out_dim)])

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> [B, C', H/2, W/2], or [B, C', H, W] at the coarsest scale."""
        for layer in (*self.resnets, *getattr(self, "downsamplers", ())):
            x = layer(x)
        return x


class UpBlock(nn.Module):
    """The residual blocks of one scale, then the step to the next finer one."""

    def __init__(self, dim: int, out_dim: int, blocks: int, groups: int, upsample: bool):
        super().__init__()
        self.resnets = nn.ModuleList(ResidualBlock(dim if i == 0 else out_dim, out_dim, groups) for i in range(blocks))
        if upsample:
            self.upsamplers = nn.ModuleList([Upsample(out_dim)])

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> [B, C', 2H, 2W], or [B, C', H, W] at the finest scale."""
        for layer in (*self.resnets, *getattr(self, "upsamplers", ())):
            x = layer(x)
        return x


class Encoder(nn.Module):
    """From pictures to the moments of their latents."""

    def __init__(self, config: FluxVAEConfig):
        super().__init__()
        dims, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = nn.Conv2d(3, dims[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            DownBlock(dims[max(i - 1, 0)], dim, config.layers_per_block, groups, downsample=i < len(dims) - 1)
            for i, dim in enumerate(dims)
        )
        self.mid_block = MidBlock(dims[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, dims[-1], EPS)
        self.conv_out = nn.Conv2d(dims[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, 3, H, W] -> [B, 64, H/8, W/8]."""
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    """From latents to pictures."""

    def __init__(self, config: FluxVAEConfig):
        super().__init__()
        dims = tuple(reversed(config.decoder_block_out_channels or config.block_out_channels))
        groups = config.norm_num_groups
        self.conv_in = nn.Conv2d(config.latent_channels, dims[0], 3, padding=1)
        self.mid_block = MidBlock(dims[0], groups)
        self.up_blocks = nn.ModuleList(
            UpBlock(dims[max(i - 1, 0)], dim, config.layers_per_block + 1, groups, upsample=i < len(dims) - 1)
            for i, dim in enumerate(dims)
        )
        self.conv_norm_out = nn.GroupNorm(groups, dims[-1], EPS)
        self.conv_out = nn.Conv2d(dims[-1], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """z [B, 32, h, w] -> [B, 3, 8h, 8w]."""
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class FluxVAE(nn.Module):
    """From pictures to normalised latents and back. Sides longer than `tile` pixels are processed in blended tiles."""

    tile, overlap = TILE, OVERLAP
    factor = 2 ** (SCALES - 1)  # pixels along the side of a latent cell

    def __init__(self, config: FluxVAEConfig):
        super().__init__()
        self.config = config
        z = self.channels = config.latent_channels
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(2 * z, 2 * z, 1)
        self.post_quant_conv = nn.Conv2d(z, z, 1)
        self.decoder = Decoder(config)
        self.bn = nn.BatchNorm2d(4 * z, eps=config.batch_norm_eps, affine=False)  # never trained: a normaliser

    def encode(self, images: Tensor) -> Tensor:
        """images [B, 3, H, W], H and W multiples of 16 -> normalised latents [B, 32, H/8, W/8]."""
        if images.shape[-2] % 16 or images.shape[-1] % 16:
            raise ValueError(f"height and width must be multiples of 16, not {tuple(images.shape[-2:])}")
        latents = apply_tiled(self._encode_mean, images, self.tile, self.overlap, Fraction(1, 8), unit=16)
        std, mean = self._norm_statistics(latents.dtype)
        return F.pixel_shuffle((F.pixel_unshuffle(latents, 2) - mean) / std, 2)

    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents [B, 32, h, w], h and w even -> images [B, 3, 8h, 8w] in -1 ... 1."""
        std, mean = self._norm_statistics(latents.dtype)
        z = F.pixel_shuffle(F.pixel_unshuffle(latents, 2) * std + mean, 2)
        images = apply_tiled(self._decode_raw, z, self.tile // 8, self.overlap // 8, Fraction(8))
        return images.clamp(-1, 1)

    def load_diffusers(self, state: Mapping[str, Tensor]) -> None:
        """Load diffusers' weights. Raises RuntimeError on any misfit."""
        self.load_state_dict(state, strict=True, assign=True)

    def _encode_mean(self, images: Tensor) -> Tensor:
        return self.quant_conv(self.encoder(images)).chunk(2, dim=1)[0]

    def _decode_raw(self, z: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(z))

    def _norm_statistics(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Standard deviation and mean of packed latents, [1, 128, 1, 1]."""
        assert self.bn.running_var is not None and self.bn.running_mean is not None
        std = (self.bn.running_var.float() + self.config.batch_norm_eps).sqrt()
        return std.view(1, -1, 1, 1).to(dtype), self.bn.running_mean.view(1, -1, 1, 1).to(dtype)
