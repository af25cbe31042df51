"""The key/value splice: apply a reference's look on any checkpoint, without training.

The reference goes through the transformer at every step's noise level, always with the same noise and an empty prompt.
The keys and values of its image tokens are captured in the deeper blocks, after norm and rotation, and the picture's
image tokens attend to them as well as to their own, with queries and keys pulled towards the reference's statistics.
Prompt tokens never see the reference, so it cannot act through them.

Several references are spliced together: statistics are those of their weighted mixture, and a bias of log(weight)
divides attention among them. So two equal references act as one, and one pass serves any number. (Summing velocities
per reference would cost a pass for each.) A negative weight cannot be a share, so negative ones form a mixture of their
own, which the velocity is pushed away from: v − s · (v_away − v_native).

Keys and values of one reference at 1024 x 1024 take 0.5 GB per step in bf16 for the open 12.9B weights; only the
current step's are in memory, together with a guarded copy.

K key-value heads, H query heads, L image tokens, d head dim, as in `model/dit.py`; n spliced blocks, R references.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.atomic import atomic_write, remove_drafts
from model.attention import attention
from model.dit import Attend, DiTConfig, Krea2, rotate
from model.latents import patchify
from model.reference_weights import WeightedReference

# The default, as others use it on the open weights. On mini the reference's subject shows under neither guard; "shift"
# comes closer to its look (Turbo: nearest of twenty in 0.38 of 200 pictures, against 0.22), "damping" costs no subject
# (0.96 are kept, against 1.00).
LEAK_GUARD = "damping"
REFERENCE_PROMPT = ""  # the prompt for a reference's own pass
REFERENCE_SEED = 0x57A1E  # of the references' noise
PULL = 0.85  # how far queries and keys move towards the reference's statistics, at strengths up to 1
KEY_GAIN = 1.06
DAMP_HIGH, DAMP_LOW, DAMP_POWER = 1.04, 0.10, 2.5
CACHE_BYTES = 8 << 30
MIN_FREE_BYTES = 2 << 30  # disk space that captures leave free
CACHE_VERSION = 2  # version of the captures on disk


def first_block(blocks: int) -> int:
    """The first quarter of the blocks decides the layout and is left alone: 7 of 28."""
    return blocks // 4


class Capture(NamedTuple):
    """Image tokens' keys, values and statistics for others to use: a reference's, at one noise level, in n blocks.

    In `model/cohesion.py` they are the lead picture's in one block, and n is the number of rows that follow it.
    """

    k: Tensor  # [n, K, L, d]
    v: Tensor  # [n, K, L, d]
    q_mean: Tensor  # [n, H, 1, d] over the image tokens, fp32, as the three below
    q_var: Tensor
    k_mean: Tensor  # [n, K, 1, d]
    k_var: Tensor

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self)


def capture(dit: Krea2, tokens: Tensor, context: Tensor, step_mod: Tensor, rope: Tensor) -> Capture:
    """Run one reference: tokens [1, L, C·p·p], noised to the step's level; the rest as for `Krea2.velocity`."""
    captured: list[tuple[Tensor, ...]] = []

    def record(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        image = [x[0, :, -tokens.shape[1] :] for x in (q, k, v)]
        captured.append((image[1], image[2], *moments(image[0]), *moments(image[1])))
        return attention(q, k, v)

    first = first_block(len(dit.blocks))
    dit.velocity(tokens, context, step_mod, rope, attend=[None] * first + [record] * (len(dit.blocks) - first))
    return Capture(*map(torch.stack, zip(*captured, strict=True)))


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance over the tokens of x [..., L, d], in fp32 -> [..., 1, d] each."""
    variance, mean = torch.var_mean(x.float(), -2, keepdim=True, correction=0)
    return mean, variance


def mix_moments(means: Sequence[Tensor], variances: Sequence[Tensor], shares: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Mean and variance of a mixture of distributions, whose shares add up to one."""
    share = torch.tensor(shares, device=means[0].device).view(-1, *[1] * means[0].dim())
    each = torch.stack(list(means))
    mean = (share * each).sum(0)
    return mean, (share * (torch.stack(list(variances)) + (each - mean) ** 2)).sum(0)


def pull_statistics(x: Tensor, mean: Tensor, variance: Tensor, pull: float, eps: float = 1e-6) -> Tensor:
    """x [B, heads, L, d] with its statistics over the tokens moved towards the given ones, [heads, 1, d]."""
    own_mean, own_variance = moments(x)
    target = (x.float() - own_mean) * ((variance + eps) / (own_variance + eps)).sqrt() + mean
    return x.float().lerp(target, pull).to(x.dtype)


# ---- against leakage: the parts of a key that encode positions in the reference -------------------------------------


def damping_factors(config: DiTConfig, sigma: float) -> Tensor:
    """A factor for each dimension of a key, [d]. Fast-rotating pairs carry the layout, and with it the content; they
    fade as the picture forms, while slow ones gain a little."""
    high, low = DAMP_HIGH * sigma, 1 + DAMP_LOW * (1 - sigma)
    frame, *sides = config.rope_axes
    ramps = [(high + (low - high) * torch.linspace(0, 1, dim // 2) ** DAMP_POWER) for dim in sides]
    return torch.cat((torch.ones(frame), *(ramp.repeat_interleave(2) for ramp in ramps)))


def shift_keys(k: Tensor, config: DiTConfig, column_offset: float) -> Tensor:
    """Keys [..., L, d] rotated as if the reference lay to the right of the picture: (row, column + reach)."""
    frame, rows, across = config.rope_axes
    speeds = config.rope_base ** -(torch.arange(0, across, 2, dtype=torch.float64) / across)
    angle = torch.cat((torch.zeros((frame + rows) // 2), column_offset * speeds))
    return rotate(k, torch.stack((angle.cos(), angle.sin()), -1).to(k.device, torch.float32))


def guard_keys(k: Tensor, config: DiTConfig, guard: str, sigma: float, column_offset: float) -> Tensor:
    """A reference's keys [n, K, L, d] with the guard applied, as the picture's queries see them."""
    if guard in ("damping", "both"):
        k = (k.float() * damping_factors(config, sigma).to(k.device)).to(k.dtype)
    if guard in ("shift", "both"):
        k = shift_keys(k, config, column_offset)
    return k * KEY_GAIN


# ---- into the picture -----------------------------------------------------------------------------------------------


def spliced_attention(captures: Sequence[Capture], keys: Sequence[Tensor], weights: Sequence[float]) -> list[Attend]:
    """Attention for the spliced blocks, with references of positive weight mixed in.

    captures, keys  of each reference; the keys guarded, [n, K, L, d]
    weights         their sum is the strength: up to 1 the spliced output is blended in, beyond 1 the references get
                    more of the attention and their statistics pull harder
    """
    strength = math.fsum(weights)
    shares = [weight / strength for weight in weights]
    blend, gain = min(strength, 1.0), max(strength, 1.0)
    pull = min(1.0, PULL + (1 - PULL) * (gain - 1))
    length = captures[0].k.shape[2]
    biases = [math.log(share * gain) for share in shares]
    bias = torch.tensor(biases).repeat_interleave(length) if any(biases) else None
    q_mean, q_var = mix_moments([c.q_mean for c in captures], [c.q_var for c in captures], shares)
    k_mean, k_var = mix_moments([c.k_mean for c in captures], [c.k_var for c in captures], shares)
    extra_k, extra_v = torch.cat(list(keys), 2), torch.cat([c.v for c in captures], 2)

    def block(i: int) -> Attend:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            text = q.shape[2] - length
            k_image = pull_statistics(k[:, :, -length:], k_mean[i], k_var[i], pull)
            more_k, more_v = (x[i].expand(len(q), -1, -1, -1) for x in (extra_k, extra_v))
            styled = attention(
                pull_statistics(q[:, :, text:], q_mean[i], q_var[i], pull),
                torch.cat((k[:, :, :-length], k_image, more_k), 2),
                torch.cat((v, more_v), 2),
                None if bias is None else F.pad(bias, (k.shape[2], 0)).to(q)[None, None, None],
            )
            native = attention(q if blend < 1 else q[:, :, :text], k, v)
            image = styled if blend == 1 else native[:, :, text:].lerp(styled, blend)
            return torch.cat((native[:, :, :text], image), 2)

        return attend

    return [block(i) for i in range(extra_k.shape[0])]


class Splice:
    """Spliced references for pictures that are rendered together."""

    def __init__(
        self,
        dit: Krea2,
        references: Sequence[WeightedReference],
        capture_at: Callable[[WeightedReference, int], Capture],
        sigmas: Sequence[float],
        column_offset: float,
        guard: str = LEAK_GUARD,
    ):
        """capture_at(reference, step) gives its capture for that step; column_offset of the picture's grid, as in
        `Krea2`."""
        self.dit, self.capture_at, self.sigmas = dit, capture_at, sigmas
        self.column_offset, self.guard = column_offset, guard
        self.positive = [r for r in references if r.weight > 0]
        self.negative = [r for r in references if r.weight < 0]
        self.negative_strength = -math.fsum(r.weight for r in self.negative)

    def velocity(self, evaluate: Callable[[list[Attend | None] | None], Tensor], step: int) -> Tensor:
        """The spliced velocity. It takes one evaluation, two with only negative weights, three with both signs.

        Pure noise holds nothing of a reference, so at sigma 1 nothing is spliced.
        """
        if self.sigmas[step] >= 1:
            return evaluate(None)
        toward = evaluate(self._attention(self.positive, step)) if self.positive else evaluate(None)
        if not self.negative:
            return toward
        native = evaluate(None) if self.positive else toward
        away = evaluate(
            self._attention([r._replace(weight=-r.weight / self.negative_strength) for r in self.negative], step)
        )
        return toward - self.negative_strength * (away - native)

    def _attention(self, references: Sequence[WeightedReference], step: int) -> list[Attend | None]:
        captures = [self.capture_at(reference, step) for reference in references]
        keys = [guard_keys(c.k, self.dit.config, self.guard, self.sigmas[step], self.column_offset) for c in captures]
        return [
            *[None] * first_block(len(self.dit.blocks)),
            *spliced_attention(captures, keys, [reference.weight for reference in references]),
        ]


def add_noise(latents: Tensor, noise: Tensor, sigma: float, patch: int) -> Tensor:
    """A reference at a noise level: latents and noise [1, C, H, W] -> tokens [1, L, C·p·p], fp32."""
    return patchify((1 - sigma) * latents.float() + sigma * noise, patch)


# ---- kept between runs ----------------------------------------------------------------------------------------------


class CaptureCache:
    """Captures on disk, least recently used evicted first. If the folder cannot be used, it only costs time."""

    def __init__(self, folder: Path):
        self.folder, self.limit = folder, CACHE_BYTES

    def get(self, facts: Mapping[str, Any], device: torch.device) -> Capture | None:
        """The capture stored under the same facts, bit for bit; None if there is none that can be read."""
        path = self._path(facts)
        try:
            found = Capture(**load_file(path, str(device)))
        except (OSError, SafetensorError, TypeError):
            return None
        with suppress(OSError):
            os.utime(path)
        return found

    def put(self, facts: Mapping[str, Any], capture: Capture, count: int = 1) -> None:
        """Store a capture under these facts. `count`: how many such captures the run makes; if they cannot all be kept,
        none is written."""
        if capture.nbytes * count > self.limit:
            return
        path = self._path(facts)
        with suppress(OSError, SafetensorError):
            self.folder.mkdir(parents=True, exist_ok=True)
            if shutil.disk_usage(self.folder).free < MIN_FREE_BYTES + capture.nbytes:
                return
            with atomic_write(path) as draft:
                save_file({name: tensor.contiguous() for name, tensor in capture._asdict().items()}, draft)
            self._trim()

    def _trim(self) -> None:
        remove_drafts(self.folder)
        files = [(file, file.stat()) for file in self.folder.glob("*.safetensors")]
        held = sum(stat.st_size for _, stat in files)
        for file, stat in sorted(files, key=lambda pair: pair[1].st_mtime_ns):
            if held <= self.limit:
                break
            file.unlink(missing_ok=True)
            held -= stat.st_size

    def _path(self, facts: Mapping[str, Any]) -> Path:
        text = json.dumps({"format": CACHE_VERSION, **facts}, sort_keys=True)
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()}.safetensors"
