"""The Qwen-Image autoencoder as the 2-D network that it is for a single picture.

The published network is a causal 3-D convolutional video autoencoder. For one frame its temporal padding is zeros, so
every 3-D kernel acts as its last temporal slice, and temporal resampling is skipped. Here the kernels are 2-D from the
start: the same numbers for a third of the work. Parameter names are diffusers' (`AutoencoderKLQwenImage`).

Shapes: B pictures, H x W pixels, C channels. Pictures are RGB in -1 ... 1; one latent cell is f x f pixels, f the
factor: 8 in the release, twice that with one more scale.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import attention
from model.tiling import OVERLAP, TILE, apply_tiled
from model.upsample import upsample_conv

# fmt: off
QWEN_MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
             0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)
QWEN_STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
            3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)
# fmt: on
DIFFUSERS_KEY = "temperal_downsample"  # as diffusers' authors spell it

SINGLE_KERNEL_LIMIT = 20480  # numbers up to which PyTorch convolves a single picture by another kernel than a batch


@dataclass(frozen=True)
class VAEConfig:
    """Dimensions of a Qwen-Image autoencoder and the statistics that normalise its latents; defaults: the release's."""

    base_dim: int = 96
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    z_dim: int = 16
    temporal_downsample: tuple[bool, ...] = (False, True, True)  # matters for export only
    latents_mean: tuple[float, ...] = QWEN_MEAN
    latents_std: tuple[float, ...] = QWEN_STD

    @property
    def factor(self) -> int:
        """The side of a latent cell in pixels."""
        return 2 ** (len(self.dim_mult) - 1)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> VAEConfig:
        """From JSON values, ours or diffusers'; keys that do not shape the network are ignored.

        Raises TypeError or ValueError for values that no autoencoder has.
        """
        known = {"temporal_downsample": values[DIFFUSERS_KEY]} if DIFFUSERS_KEY in values else {}
        known |= {key: values[key] for key in cls.__dataclass_fields__ if key in values}
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in known.items()}
        config = cls(**fields)
        sizes = [(config.base_dim, 4096), (config.z_dim, 1024), (config.num_res_blocks, 64)]
        sizes += [(factor, 64) for factor in config.dim_mult]
        if not all(type(size) is int and 0 < size <= most for size, most in sizes) or len(config.dim_mult) > 8:
            raise ValueError("it states sizes that no autoencoder has")
        statistics = (config.latents_mean, config.latents_std)
        if any(len(each) != config.z_dim or not all(map(math.isfinite, each)) for each in statistics):
            raise ValueError("its latents' statistics are not one number per channel")
        if len(config.temporal_downsample) != len(config.dim_mult) - 1:
            raise ValueError("it does not say for each scale whether time is halved there")
        return config

    def to_diffusers(self) -> dict[str, Any]:
        """The `config.json` of diffusers' class."""
        values = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        return {
            "_class_name": "AutoencoderKLQwenImage",
            DIFFUSERS_KEY: values.pop("temporal_downsample"),
            "attn_scales": [],
            "dropout": 0.0,
            **values,
        }


def rms_norm(x: Tensor, gamma: Tensor) -> Tensor:
    """x [B, C, H, W], gamma [C, 1, 1] -> x scaled to a mean square of 1 over every pixel's channels, times gamma."""
    unit = F.normalize(x.float(), dim=1, eps=1e-12)
    return unit.mul_(gamma.float() * x.shape[1] ** 0.5).to(x.dtype)  # in place: a new tensor costs as much as the maths


def norm_silu(x: Tensor, gamma: Tensor) -> Tensor:
    """SiLU of `rms_norm`: all there is apart from convolutions; worth fusing (training compiles just this)."""
    return F.silu(rms_norm(x, gamma), inplace=True)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the channels of every pixel."""

    def __init__(self, dim: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> the same."""
        return rms_norm(x, self.gamma)


class ResidualBlock(nn.Module):
    """Norm, SiLU, 3 x 3 convolution, twice, plus a shortcut."""

    def __init__(self, dim: int, out_dim: int):
        super().__init__()
        self.norm1 = RMSNorm(dim)
        self.conv1 = nn.Conv2d(dim, out_dim, 3, padding=1)
        self.norm2 = RMSNorm(out_dim)
        self.conv2 = nn.Conv2d(out_dim, out_dim, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(dim, out_dim, 1) if dim != out_dim else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> [B, C', H, W]."""
        h = self.conv1(norm_silu(x, self.norm1.gamma))
        return self.conv2(norm_silu(h, self.norm2.gamma)).add_(self.conv_shortcut(x))


class Attention(nn.Module):
    """One head of self-attention over all cells of the smallest grid."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = RMSNorm(dim)
        self.to_qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> the same."""
        q, k, v = self.to_qkv(self.norm(x)).flatten(2).transpose(1, 2).unsqueeze(1).chunk(3, dim=-1)
        attended = attention(q, k, v)  # [B, 1, H*W, C]
        return x + self.proj(attended.squeeze(1).transpose(1, 2).reshape(x.shape))


class MidBlock(nn.Module):
    """Residual block, attention, residual block."""

    def __init__(self, dim: int):
        super().__init__()
        self.resnets = nn.ModuleList([ResidualBlock(dim, dim), ResidualBlock(dim, dim)])
        self.attentions = nn.ModuleList([Attention(dim)])

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> the same."""
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Downsample(nn.Module):
    """Halve the grid; the zero padding sits at the right and bottom edges only."""

    def __init__(self, dim: int):
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(dim, dim, 3, stride=2))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> [B, C, H/2, W/2]."""
        return self.resample(x)


class Upsample(nn.Module):
    """Double the grid and halve the channels."""

    def __init__(self, dim: int):
        super().__init__()
        conv = nn.Conv2d(dim, dim // 2, 3, padding=1)
        self.resample = nn.Sequential(nn.Upsample(scale_factor=2.0, mode="nearest-exact"), conv)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> [B, C/2, 2H, 2W]."""
        return upsample_conv(x, cast(nn.Conv2d, self.resample[1]))


class UpBlock(nn.Module):
    """The residual blocks of one scale, then the step to the next finer one."""

    def __init__(self, dim: int, out_dim: int, blocks: int, upsample: bool):
        super().__init__()
        self.resnets = nn.ModuleList(ResidualBlock(dim if i == 0 else out_dim, out_dim) for i in range(blocks))
        self.upsamplers = nn.ModuleList([Upsample(out_dim)] if upsample else [])

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> [B, C'/2, 2H, 2W], or [B, C', H, W] at the finest scale."""
        for layer in (*self.resnets, *self.upsamplers):
            x = layer(x)
        return x


class Encoder(nn.Module):
    """From pictures to the moments of their latents."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        dims = [config.base_dim * mult for mult in config.dim_mult]
        self.conv_in = nn.Conv2d(3, config.base_dim, 3, padding=1)
        self.down_blocks = nn.ModuleList()
        dim = config.base_dim
        for scale, out_dim in enumerate(dims):
            for _ in range(config.num_res_blocks):
                self.down_blocks.append(ResidualBlock(dim, out_dim))
                dim = out_dim
            if scale < len(dims) - 1:
                self.down_blocks.append(Downsample(dim))
        self.mid_block = MidBlock(dim)
        self.norm_out = RMSNorm(dim)
        self.conv_out = nn.Conv2d(dim, 2 * config.z_dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, 3, H, W] -> [B, 2*z_dim, H/f, W/f]."""
        x = self.conv_in(x)
        for layer in self.down_blocks:
            x = layer(x)
        return self.conv_out(norm_silu(self.mid_block(x), self.norm_out.gamma))


class Decoder(nn.Module):
    """From latents to pictures."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        dims = [config.base_dim * mult for mult in reversed(config.dim_mult)]
        self.conv_in = nn.Conv2d(config.z_dim, dims[0], 3, padding=1)
        self.mid_block = MidBlock(dims[0])
        self.up_blocks = nn.ModuleList()
        dim = dims[0]
        for scale, out_dim in enumerate(dims):
            self.up_blocks.append(UpBlock(dim, out_dim, config.num_res_blocks + 1, upsample=scale < len(dims) - 1))
            dim = out_dim // 2
        self.norm_out = RMSNorm(dims[-1])
        self.conv_out = nn.Conv2d(dims[-1], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """z [B, z_dim, h, w] -> [B, 3, f*h, f*w]."""
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(norm_silu(x, self.norm_out.gamma))


class QwenImageVAE(nn.Module):
    """From pictures to normalised latents and back. Sides longer than `tile` pixels are processed in blended tiles."""

    tile, overlap = TILE, OVERLAP
    mean: Tensor
    std: Tensor

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.factor, self.channels = config.factor, config.z_dim  # factor: pixels along the side of a latent cell
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(2 * config.z_dim, 2 * config.z_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.z_dim, config.z_dim, 1)
        self.decoder = Decoder(config)
        self.register_buffer("mean", torch.tensor(config.latents_mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config.latents_std).view(1, -1, 1, 1), persistent=False)

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images [B, 3, H, W] -> mean and log-variance of the raw latents, each [B, z_dim, H/f, W/f]."""
        mean, logvar = self.quant_conv(self.encoder(images)).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def encode(self, images: Tensor) -> Tensor:
        """images [B, 3, H, W], H and W multiples of f -> normalised latents [B, z_dim, H/f, W/f]."""
        f = self.config.factor
        if images.shape[-2] % f or images.shape[-1] % f:
            raise ValueError(f"height and width must be multiples of {f}, not {tuple(images.shape[-2:])}")
        mean = apply_tiled(lambda part: self.moments(part)[0], images, self.tile, self.overlap, Fraction(1, f), unit=f)
        return (mean - self.mean) / self.std

    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents [B, z_dim, h, w] -> images [B, 3, f*h, f*w] in -1 ... 1.

        On one thread bit for bit the same in any batch; several threads may split batches by size, and then differ.
        """
        z = latents * self.std + self.mean
        f, widest = self.config.factor, self.config.base_dim * self.config.dim_mult[-1]
        alone = len(z) == 1 and widest * z.shape[-2:].numel() <= SINGLE_KERNEL_LIMIT
        z = z.expand(2, -1, -1, -1) if alone else z
        images = apply_tiled(self.reconstruct, z, self.tile // f, self.overlap // f, Fraction(f)).clamp(-1, 1)
        return images[:1] if alone else images

    def reconstruct(self, z: Tensor) -> Tensor:
        """Raw latents [B, z_dim, h, w] -> images [B, 3, f*h, f*w], not clamped: what training compares."""
        return self.decoder(self.post_quant_conv(z))

    def load_diffusers(self, state: Mapping[str, Tensor]) -> None:
        """Load diffusers' weights: the last temporal slice of each 3-D kernel. Raises RuntimeError on any misfit."""
        self.load_state_dict(from_diffusers(state), strict=True, assign=True)

    def to_diffusers(self) -> dict[str, Tensor]:
        """The weights in diffusers' 3-D shapes; those that a single frame never uses are zero."""
        return to_diffusers(self.state_dict(), self.config)


# These modules are 2-D in diffusers; every other convolution and norm of its network is 3-D.
PLANAR_MODULES = (".resample.", ".attentions.")


def from_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Diffusers' 3-D weights to this module's: kernels [O, I, T, kh, kw] -> [O, I, kh, kw], gammas -> [C, 1, 1]."""
    flat = {}
    for name, tensor in state.items():
        if ".time_conv." in name:
            continue
        if name.endswith("gamma"):
            tensor = tensor.reshape(-1, 1, 1)
        elif tensor.dim() == 5:
            tensor = tensor[:, :, -1].contiguous()
        flat[name] = tensor
    return flat


def to_diffusers(state: Mapping[str, Tensor], config: VAEConfig) -> dict[str, Tensor]:
    """The inverse of `from_diffusers`: kernels as long in time as they are high, zero but for the last slice."""
    deep = {}
    for name, tensor in state.items():
        planar = any(part in name for part in PLANAR_MODULES)
        if not planar and name.endswith("gamma"):
            tensor = tensor.unsqueeze(-1)
        elif not planar and tensor.dim() == 4:
            kernel = tensor.new_zeros(*tensor.shape[:2], tensor.shape[2], *tensor.shape[2:])
            kernel[:, :, -1] = tensor
            tensor = kernel
        deep[name] = tensor
    return deep | _time_convs(state, config)


def _time_convs(state: Mapping[str, Tensor], config: VAEConfig) -> dict[str, Tensor]:
    """Zero weights for the temporal resampling: half as many frames in the encoder, twice as many in the decoder."""
    per_scale = config.num_res_blocks + 1
    zeros = {}
    for scale, temporal in enumerate(config.temporal_downsample):
        if not temporal:
            continue
        up = len(config.temporal_downsample) - 1 - scale
        down_name = f"encoder.down_blocks.{scale * per_scale + per_scale - 1}"
        for name, factor in ((down_name, 1), (f"decoder.up_blocks.{up}.upsamplers.0", 2)):
            like = state[f"{name}.resample.1.weight"]
            dim = like.shape[1]
            zeros[f"{name}.time_conv.weight"] = like.new_zeros(factor * dim, dim, 3, 1, 1)
            zeros[f"{name}.time_conv.bias"] = like.new_zeros(factor * dim)
    return zeros
