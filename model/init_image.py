"""Start from a picture (init image) instead of pure noise: repaint all of it to some degree, or a part of it.

On the straight path from a picture z to its noise ε lie x(σ) = z + σ (ε − z). Repainting to a degree starts there, at a
noise level below 1 (SDEdit, Meng et al. 2022). What a mask keeps follows that path, whose velocity is ε − z, while the
rest is painted beside it at the same noise level (Blended Latent Diffusion, Avrahami et al. 2023, which restores the
same points after every step).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model import picture_file
from model.errors import K2Error
from model.hashes import sha256
from model.latents import patchify
from model.lru import LRU
from model.parts import Autoencoder
from model.references import feather, picture_size, to_mask, to_pixels
from model.resolve import ResolvedSpec

MAX_CACHED = 16  # pictures whose latents are kept


class Trajectory(NamedTuple):
    """Where pictures rendered together start, and what stays on the straight path: tokens [B, L, C·p·p], fp32."""

    start: Tensor
    kept_velocity: Tensor | None = None  # the velocity of what stays
    repaint: Tensor | None = None  # how much of each number is repainted, 0 … 1; None: all

    def blend(self, velocity: Tensor) -> Tensor:
        """The network's velocity, replaced by the straight path's where the picture stays."""
        if self.kept_velocity is None or self.repaint is None:
            return velocity
        return self.kept_velocity.lerp(velocity, self.repaint)


class KeptPixels(NamedTuple):
    """What stays of a picture: its pixels [3, H, W], and how much of each is repainted, 0 … 1."""

    pixels: Tensor
    repaint: Tensor

    def composite(self, decoded: Tensor) -> Tensor:
        """A decoded picture [3, H, W], with the original's exact pixels where that stays."""
        return self.pixels.lerp(decoded.float().cpu(), self.repaint)


class InitImages:
    """Init images as latents; recent ones are cached."""

    def __init__(self, vae: Autoencoder, patch: int, device: torch.device, dtype: torch.dtype):
        self.vae, self.patch, self.device, self.dtype = vae, patch, device, dtype
        self._latents: LRU[Tensor] = LRU(MAX_CACHED)

    def check(self, spec: ResolvedSpec) -> None:
        """Raises K2Error if a mask's proportions differ from its init image's: neither is stretched."""
        if not (isinstance(spec.mask, Path) and spec.init_image):
            return
        if not picture_file.same_shape(picture_size(spec.mask), picture_size(spec.init_image)):
            raise K2Error(
                f"{spec.mask} does not have the proportions of {spec.init_image}.", hint="Draw it on a copy of that."
            )

    def trajectory(self, specs: Sequence[ResolvedSpec], noise: Tensor, sigma: float) -> Trajectory:
        """The `Trajectory` for pictures of one schedule, from their noise, in tokens, and their init images. sigma:
        that of the first step. Raises K2Error."""
        first = specs[0]
        if not (first.first_step or first.mask):  # pure noise, as without an init image
            return Trajectory(noise)
        image = torch.cat([self.latents(spec.init_image, spec.width, spec.height) for spec in specs if spec.init_image])
        kept_velocity = noise - self._tokens(image)
        start = noise - (1 - sigma) * kept_velocity
        if not first.mask:
            return Trajectory(start)
        masks = [to_mask(spec.mask, spec.width, spec.height) for spec in specs if spec.mask]
        cells = F.avg_pool2d(torch.cat(masks), self.vae.factor)
        return Trajectory(start, kept_velocity, self._tokens(cells.expand_as(image)))

    def latents(self, image: Path, width: int, height: int) -> Tensor:
        """The latents [1, C, H/f, W/f] of a picture centre-cropped to width x height: fp32, on the CPU like the noise.
        Raises K2Error."""

        def read() -> Tensor:
            pixels = to_pixels(image, width, height).to(self.device, self.dtype)
            return self.vae.encode(pixels).float().cpu()

        return self._latents.get((sha256(image), width, height), read)

    def kept_pixels(self, spec: ResolvedSpec) -> KeptPixels | None:
        """What a mask keeps of the init image; call it before the first step, as files may change meanwhile. Raises
        K2Error."""
        if not spec.mask or not spec.init_image:
            return None
        repaint = feather(to_mask(spec.mask, spec.width, spec.height), self.vae.factor // 2)[0]
        return KeptPixels(to_pixels(spec.init_image, spec.width, spec.height)[0], repaint)

    def _tokens(self, latents: Tensor) -> Tensor:
        return patchify(latents.to(self.device), self.patch)
