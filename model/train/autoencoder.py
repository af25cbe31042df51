"""Train the small autoencoder: 8 x 8 pixels to 16 numbers, and back, on composed pictures of the data set.

`python -m model.train.autoencoder --minutes 20` trains both halves, measures the latents' statistics and freezes the
encoder; `--decoder` goes on with the decoder alone, from this run's result or else from the package's autoencoder, so
that latents stay what they are. Both follow the clock, stop exactly there, and resume exactly.
The loss is L1 + squared error (fidelity) + L1 of differences (edges) + a small Kullback-Leibler term, and the decoder
sees noisy latents, so that what a diffusion model gets almost right still decodes well.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

import model.vae
from model.checkpoint import save
from model.train.data import Catalog
from model.train.linear_start import start_linear
from model.train.optim import orthogonalise
from model.vae import QwenImageVAE, VAEConfig

RUN = Path(".runs/vae")
BOX = Path(__file__).parents[1] / "weights" / "mini-vae.safetensors"
SHAPE = VAEConfig(
    base_dim=8, dim_mult=(1, 2, 6, 12), num_res_blocks=1, latents_mean=(0.0,) * 16, latents_std=(1.0,) * 16
)


@dataclass(frozen=True)
class Recipe:
    """Everything that a run's outcome depends on."""

    minutes: float = 20.0
    batch: int = 16
    crop: int = 64  # px; the pictures are 128
    lr: float = 2e-3
    warmup: float = 0.04  # share of the run
    final: float = 0.01  # last learning rate as a share of the first
    edges: float = 0.5  # weight of the loss on differences of neighbours
    squares: float = 3.0  # weight of the squared error
    kl: float = 1e-5  # per latent number, against a unit Gaussian
    noise: float = 0.1  # of the latents' standard deviation, seen by the decoder
    average: float = 0.995  # decay of the averaged weights, which are the result
    pictures: int = 5000
    plain: float = 0.65  # share of the pictures without a medium
    seed: int = 0


def pool(split: str, count: int, plain: float, seed: int, folder: Path = RUN) -> NDArray[np.uint8]:
    """A fixed random choice of composed pictures, uint8 [N, 128, 128, 3], made once and kept in `folder`."""
    path = folder / f"{split}-{count}-{plain:g}-{seed}.npy"
    if not path.exists():
        catalog, rng = Catalog(), np.random.default_rng(seed)
        items = catalog.items(split)
        kinds = [item for item in items if item.look.medium == "plain"], [i for i in items if i.look.medium != "plain"]
        wanted = round(count * plain), count - round(count * plain)
        chosen = [kind[i] for kind, n in zip(kinds, wanted, strict=True) for i in rng.permutation(len(kind))[:n]]
        pictures = np.stack([catalog.picture(chosen[i]) for i in rng.permutation(len(chosen))])
        np.save(path.with_suffix(".draft.npy"), pictures)
        path.with_suffix(".draft.npy").replace(path)
    return np.load(path, mmap_mode="r")


def crops(pictures: NDArray[np.uint8], recipe: Recipe, rng: np.random.Generator) -> Tensor:
    """Random crops with random mirroring and colour order, float [B, 3, crop, crop] in -1 ... 1."""
    out = np.empty((recipe.batch, recipe.crop, recipe.crop, 3), np.float32)
    for row in out:
        picture = pictures[rng.integers(len(pictures))]
        top, left = rng.integers(0, picture.shape[0] - recipe.crop + 1, 2)
        cut = picture[
            top : top + recipe.crop, left : left + recipe.crop, rng.permutation(3) if rng.random() < 0.3 else [0, 1, 2]
        ]
        row[:] = cut[:, ::-1] if rng.random() < 0.5 else cut
    return torch.from_numpy(out).permute(0, 3, 1, 2) / 127.5 - 1  # channels_last in memory


def differences(error: Tensor) -> Tensor:
    """Mean absolute difference of neighbouring pixels, for an error [B, 3, H, W]: how wrong the edges are."""
    return error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()


def loss(vae: QwenImageVAE, images: Tensor, recipe: Recipe, frozen: bool) -> Tensor:
    """images [B, 3, H, W] -> the training loss; with `frozen` the encoder only supplies latents."""
    with torch.set_grad_enabled(not frozen):
        mean, logvar = vae.moments(images)
    spread = vae.std if frozen else mean.detach().std(dim=(0, 2, 3), keepdim=True)
    z = mean + recipe.noise * spread * torch.randn_like(mean)
    error = vae.reconstruct(z) - images
    total = error.abs().mean() + recipe.squares * error.square().mean() + recipe.edges * differences(error)
    if not frozen:
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        total = total + recipe.kl * kl
    return total


def rate(progress: float, recipe: Recipe) -> float:
    """Learning rate as a share of its peak: linear warm-up, then a cosine; progress runs 0 ... 1 with the clock."""
    if progress < recipe.warmup:
        return progress / recipe.warmup + 1e-3
    fall = min(1.0, (progress - recipe.warmup) / (1 - recipe.warmup))
    return recipe.final + (1 - recipe.final) * 0.5 * (1 + math.cos(math.pi * fall))


@torch.no_grad()
def psnr(vae: QwenImageVAE, pictures: NDArray[np.uint8]) -> float:
    """Mean peak signal-to-noise ratio in dB over whole pictures, as 8-bit RGB with peak 255."""
    values = []
    for start in range(0, len(pictures), 16):
        images = torch.from_numpy(np.array(pictures[start : start + 16])).permute(0, 3, 1, 2)
        decoded = (vae.decode(vae.encode(images / 127.5 - 1)) * 127.5 + 127.5).round()
        values.append((decoded - images).square().mean(dim=(1, 2, 3)).clamp_min(0.1))
    return (10 * torch.log10(255.0**2 / torch.cat(values))).mean().item()


@torch.no_grad()
def sheet(vae: QwenImageVAE, pictures: NDArray[np.uint8], path: Path) -> None:
    """Originals above their reconstructions, twelve a row."""
    images = torch.from_numpy(np.array(pictures)).permute(0, 3, 1, 2)
    decoded = (vae.decode(vae.encode(images / 127.5 - 1)) * 127.5 + 127.5).round().to(torch.uint8)
    rows = []
    for start in range(0, len(images) - 11, 12):
        rows += [torch.cat(list(images[start : start + 12]), -1), torch.cat(list(decoded[start : start + 12]), -1)]
    Image.fromarray(torch.cat(rows, 1).permute(1, 2, 0).numpy()).save(path)


@torch.no_grad()
def measure(vae: QwenImageVAE, pictures: NDArray[np.uint8]) -> VAEConfig:
    """The configuration with the statistics of raw latents over whole pictures in it.

    Channels are scaled half-way, by the geometric mean of their own deviation and the average one: full equality would
    have a diffusion model spend as much on the faintest detail as on what the picture shows.
    """
    means = []
    for start in range(0, len(pictures), 32):
        images = torch.from_numpy(np.array(pictures[start : start + 32])).permute(0, 3, 1, 2)
        means.append(vae.moments(images / 127.5 - 1)[0])
    std, mean = torch.std_mean(torch.cat(means), dim=(0, 2, 3))
    std = (std * std.mean()).sqrt()
    return replace(vae.config, latents_mean=tuple(mean.tolist()), latents_std=tuple(std.tolist()))


def write(vae: QwenImageVAE, path: Path, training: dict[str, Any]) -> None:
    """The finished autoencoder as a checkpoint of its own kind."""
    metadata = {"kind": "vae", "config": asdict(vae.config), "native": 128, "training": training}
    save(path, {name: tensor.contiguous() for name, tensor in vae.state_dict().items()}, metadata)


class KernelMuon(torch.optim.Optimizer):
    """Muon for convolutions: each kernel [O, I, kh, kw] is the matrix [O, I*kh*kw]."""

    def __init__(self, params: Sequence[Tensor], lr: float, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update; its root mean square is AdamW's usual 0.2 of the learning rate."""
        for group in self.param_groups:
            for kernel in group["params"]:
                momentum = self.state[kernel].setdefault("momentum", torch.zeros_like(kernel))
                momentum.lerp_(kernel.grad, 1 - group["momentum"])
                matrix = kernel.grad.lerp(momentum, group["momentum"]).flatten(1)
                update = orthogonalise(matrix[None])[0].view(kernel.shape)
                kernel.add_(update, alpha=-group["lr"] * 0.2 * max(matrix.shape) ** 0.5)


class Run:
    """One run's whole state, so that an interrupted one goes on exactly."""

    def __init__(self, vae: QwenImageVAE, recipe: Recipe, frozen: bool, path: Path):
        self.vae, self.recipe, self.frozen, self.path = vae, recipe, frozen, path
        for half in (vae.encoder, vae.quant_conv):
            half.requires_grad_(not frozen)
        self.parameters = [p for p in vae.parameters() if p.requires_grad]
        self.average = [p.detach().clone() for p in self.parameters]
        kernels = [p for p in self.parameters if p.dim() == 4 and p.shape[0] >= 8]
        rest = [p for p in self.parameters if all(p is not kernel for kernel in kernels)]
        self.optimisers = [
            KernelMuon(kernels, recipe.lr),
            torch.optim.AdamW(rest, recipe.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
        ]
        self.rng = np.random.default_rng(recipe.seed)
        torch.manual_seed(recipe.seed)
        self.step, self.seconds = 0, 0.0

    def save(self) -> None:
        """Everything to a file, whole or not at all."""
        state = {
            "parameters": [p.detach() for p in self.parameters],
            "average": self.average,
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "rng": self.rng.bit_generator.state,
            "torch": torch.get_rng_state(),
            "progress": (self.step, self.seconds),
        }
        torch.save(state, self.path.with_suffix(".draft"))
        os.replace(self.path.with_suffix(".draft"), self.path)

    def resume(self) -> None:
        """Go on from the file, if there is one."""
        if not self.path.exists():
            return
        state = torch.load(self.path, weights_only=True)
        with torch.no_grad():
            for target, source in zip(self.parameters, state["parameters"], strict=True):
                target.copy_(source)
        self.average = state["average"]
        for optimiser, kept in zip(self.optimisers, state.get("optimisers", []), strict=True):
            optimiser.load_state_dict(kept)
        self.rng.bit_generator.state = state["rng"]
        torch.set_rng_state(state["torch"])
        self.step, self.seconds = state["progress"]

    def swap(self) -> None:
        """Exchange the trained weights and their average."""
        with torch.no_grad():
            for parameter, average in zip(self.parameters, self.average, strict=True):
                kept = parameter.clone()
                parameter.copy_(average)
                average.copy_(kept)

    def train(self, pictures: NDArray[np.uint8], held_out: NDArray[np.uint8], compiled: bool) -> None:
        """Train until the recipe's minutes are over."""
        if compiled:
            model.vae.norm_silu = torch.compile(model.vae.norm_silu, dynamic=True)
        limit, saved, clock = self.recipe.minutes * 60, self.seconds, time.monotonic()
        while self.seconds < limit:
            for group in (group for optimiser in self.optimisers for group in optimiser.param_groups):
                group["lr"] = self.recipe.lr * rate(self.seconds / limit, self.recipe)
            value = loss(self.vae, crops(pictures, self.recipe, self.rng), self.recipe, self.frozen)
            value.backward()
            for optimiser in self.optimisers:
                optimiser.step()
                optimiser.zero_grad()
            self.step += 1
            decay = min(self.recipe.average, (1 + self.step) / (10 + self.step))
            torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - decay)
            now = time.monotonic()
            self.seconds, clock = self.seconds + now - clock, now
            if self.step % 50 == 0:
                print(f"{self.step} {self.seconds:.0f} s loss {value.item():.4f}", flush=True)
            if self.seconds - saved > 120:
                self.save()
                self.swap()
                print(f"{self.step} held-out {psnr(self.vae, held_out[:32]):.2f} dB", flush=True)
                self.swap()
                saved, clock = self.seconds, time.monotonic()
        self.save()
        self.swap()


def main() -> None:
    """Train, measure, write."""
    parser = argparse.ArgumentParser(description="Train the small autoencoder.")
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--lr", type=float, default=Recipe.lr)
    parser.add_argument("--plain", type=float, default=Recipe.plain, help="share of the pictures without a medium")
    parser.add_argument("--decoder", action="store_true", help="refine the decoder of the finished autoencoder")
    parser.add_argument(
        "--compile", action="store_true", help="fuse norm and SiLU first: a minute that long runs win back"
    )
    options = parser.parse_args()
    recipe = Recipe(minutes=options.minutes, lr=options.lr, plain=options.plain)
    RUN.mkdir(parents=True, exist_ok=True)
    pictures = pool("train", recipe.pictures, recipe.plain, recipe.seed)
    plain, media = pool("held-out", 128, 1.0, 1), pool("held-out", 128, 0.0, 2)

    vae = QwenImageVAE(SHAPE).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    result = RUN / "vae.safetensors"
    if options.decoder:
        vae = load(result if result.exists() else BOX)
    else:
        torch.manual_seed(recipe.seed)
        start_linear(vae, torch.from_numpy(np.array(pictures[:40])).permute(0, 3, 1, 2) / 127.5 - 1)
    run = Run(vae, recipe, options.decoder, RUN / ("decoder.state" if options.decoder else "both.state"))
    run.resume()
    run.train(pictures, plain, options.compile)
    if not options.decoder:
        trained = vae.state_dict()
        vae = QwenImageVAE(measure(vae, pictures[:3000])).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        vae.load_state_dict(trained)
    scores = {"psnr_plain": round(psnr(vae, plain), 2), "psnr_media": round(psnr(vae, media), 2)}
    write(vae, result, {**asdict(recipe), "steps": run.step, **scores})
    sheet(vae, np.concatenate([plain[:24], media[:24]]), RUN / "sheet.png")
    print(scores, flush=True)


def load(path: Path) -> QwenImageVAE:
    """A finished autoencoder from its checkpoint."""
    from model.checkpoint import read

    state, metadata = read(path)
    vae = QwenImageVAE(VAEConfig.from_dict(metadata["config"])).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    vae.load_state_dict(state)
    return vae


if __name__ == "__main__":
    main()
