"""Training the small autoencoder: 8 x 8 pixels to 16 numbers and back, on composed pictures of the data set.

`k2 train autoencoder` trains both halves and measures the latents' statistics; `k2 train finer` takes it to cells of
16 x 16 (`finer.py`); `k2 train decoder` trains only the decoder of the bundled autoencoder further, so that latents
stay the same, and `k2 train sharpen` does so on what the network draws (`sharpen.py`). The loss is L1 + squared error
(fidelity) + L1 of differences (edges) + a small Kullback-Leibler term, and the decoder sees noisy latents, so that
nearly correct latents of a diffusion model still decode well. With `texture` it also compares the strength of fine
detail: the other terms alone are lowest without any grain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

import model.vae
from model.atomic import atomic_write
from model.checkpoint import read, save
from model.library import BUNDLED
from model.references import from_bytes
from model.train import data, loop
from model.train import recipe as recipes
from model.train.data import DATA, Catalog, Item, fingerprint, stable_seed
from model.train.linear_init import init_linear
from model.train.loop import Batch, Report
from model.train.recipe import check_at_least, check_share, reject
from model.train.states import RUNS
from model.vae import QwenImageVAE, VAEConfig

ENCODER_PREFIXES = ("encoder.", "quant_conv.")
WIDE_WINDOW, NARROW_WINDOW = 32, 4  # px, of windows
DIRECTIONS, PATCHES = 48, 12.0  # of patches, and the weight of their distance relative to that of the strengths
GRAINY_MEDIUM = "film"  # the medium whose fine detail is noise
MINI_CONFIG = VAEConfig(
    base_dim=8, dim_mult=(1, 2, 6, 12), num_res_blocks=1, latents_mean=(0.0,) * 16, latents_std=(1.0,) * 16
)


@dataclass(frozen=True, kw_only=True)
class Recipe(recipes.Recipe):
    """A run of the autoencoder's training."""

    stage: str = "autoencoder"
    batch: int = 16
    size: int = data.SIZE  # px of the pictures
    crop: int = 64  # px of the crops
    edges: float = 0.5  # weight of the loss on differences of neighbours
    squares: float = 3.0  # weight of the squared error
    texture: float = 0.0  # weight of the loss on fine detail: grain is matched in strength, not in position
    grainy: float = 0.0  # share of the pictures that are always grainy
    kl: float = 1e-5  # per latent number, against a unit Gaussian
    noise: float = 0.1  # of the latents' standard deviation, seen by the decoder
    pictures: int = 5000
    plain: float = 0.65  # share of the pictures without a medium
    held_out: int = 128  # pictures of either kind to measure the result on
    decoder: bool = False  # train only the decoder of the bundled autoencoder

    def __post_init__(self) -> None:
        super().__post_init__()
        reject(self, "init", "fresh")
        if self.decoder:
            reject(self, "kl", to="a decoder alone")
        check_at_least(self, 1, "batch", "crop", "pictures", "held_out")
        check_at_least(self, 0, "edges", "squares", "texture", "kl", "noise")
        check_share(self, "grainy", "plain")


class Pool(NamedTuple):
    """Composed pictures."""

    pictures: NDArray[np.uint8]  # [N, size, size, 3]
    grainy: NDArray[np.bool_]  # [N]


def sample_items(items: Sequence[Item], count: int, plain: float, rng: np.random.Generator) -> list[Item]:
    """`count` items, a share `plain` of them without a medium: those first, then the others."""
    kinds = [item for item in items if item.look.medium == "plain"], [i for i in items if i.look.medium != "plain"]
    wanted = round(count * plain), count - round(count * plain)
    return [kind[i] for kind, n in zip(kinds, wanted, strict=True) for i in rng.permutation(len(kind))[:n]]


def choose_items(catalog: Catalog, split: str, count: int, plain: float, seed: int) -> list[Item]:
    """A fixed random choice of items of a split, in a random order."""
    rng = np.random.default_rng(seed)
    chosen = sample_items(catalog.items(split), count, plain, rng)
    return [chosen[i] for i in rng.permutation(len(chosen))]


def load_pool(catalog: Catalog, split: str, count: int, plain: float, seed: int, folder: Path) -> Pool:
    """A fixed random choice of composed pictures, made once and kept in `folder`."""
    path = folder / f"{split}-{count}-{plain:g}-{seed}-{catalog.size}-{fingerprint(catalog)[:12]}.npy"
    chosen = choose_items(catalog, split, count, plain, seed)
    if not path.exists():
        with atomic_write(path) as draft, draft.open("wb") as file:
            np.save(file, np.stack([catalog.picture(item) for item in chosen]))
    return Pool(np.load(path, mmap_mode="r"), np.array([item.look.medium == GRAINY_MEDIUM for item in chosen]))


def pick(grainy: NDArray[np.bool_], recipe: Recipe, rng: np.random.Generator) -> list[int]:
    """Indices of a batch from a pool with grainy pictures [N]; the recipe's share of them is always grainy."""
    grainy_indices = np.flatnonzero(grainy)
    choices = (
        grainy_indices if len(grainy_indices) and rng.random() < recipe.grainy else len(grainy)
        for _ in range(recipe.batch)
    )
    return [int(rng.choice(each)) for each in choices]


def crops(pool: Pool, recipe: Recipe, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Random crops with random mirroring and colour order, float [B, 3, crop, crop] in -1 ... 1; which are grainy."""
    out, which = np.empty((recipe.batch, recipe.crop, recipe.crop, 3), np.float32), pick(pool.grainy, recipe, rng)
    for row, index in zip(out, which, strict=True):
        picture = pool.pictures[index]
        top, left = rng.integers(0, picture.shape[0] - recipe.crop + 1, 2)
        cut = picture[
            top : top + recipe.crop, left : left + recipe.crop, rng.permutation(3) if rng.random() < 0.3 else [0, 1, 2]
        ]
        row[:] = cut[:, ::-1] if rng.random() < 0.5 else cut
    images = from_bytes(out)  # channels_last in memory
    return images, torch.from_numpy(pool.grainy[which])


def edge_error(error: Tensor) -> Tensor:
    """Mean absolute difference of neighbouring pixels, for an error [B, 3, H, W]: how wrong the edges are."""
    return error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()


def spectra(images: Tensor, side: int) -> Tensor:
    """images [B, 3, H, W] -> power of overlapping windows of `side` pixels [B, 3, h, w, F], at frequencies from 1/8 on.

    White noise of variance v has a mean power of v at every frequency.
    """
    hann = torch.hann_window(side + 2, periodic=False, device=images.device)[1:-1]
    window = hann[:, None] * hann
    windows = images.unfold(2, side, side // 2).unfold(3, side, side // 2) * window
    power = torch.fft.rfft2(windows).abs().square() / window.square().sum()
    across, down = torch.fft.rfftfreq(side), torch.fft.fftfreq(side)[:, None]
    return power[..., (torch.maximum(across, down.abs()) >= 1 / 8).to(images.device)]


def spectral_distance(decoded: Tensor, images: Tensor) -> Tensor:
    """Pictures [B, 3, H, W] -> how much their fine detail differs in strength, regardless of position.

    By frequency over the whole picture, which rules out patterns that repeat from cell to cell, and by place over all
    frequencies, which rules out lone dots. Logarithms of means: logarithms of single powers would make noise a third
    too weak, as their median is. Differences below one grey level are ignored.
    """
    distances = []
    for side, over in ((WIDE_WINDOW, (2, 3)), (NARROW_WINDOW, (4,))):
        ours, theirs = ((spectra(each, side).mean(over) + (1 / 127.5) ** 2).log() for each in (decoded, images))
        distances.append((ours - theirs).abs().mean())
    return torch.stack(distances).sum()


def patch_distance(decoded: Tensor, images: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures [B, 3, H, W] -> how far apart the distributions of their small patches are, in standard deviations.

    The sliced Wasserstein distance (arXiv 2006.07229) along random directions: net and worm patterns have the spectrum
    of noise but not its patches.
    """
    distances = []
    for side in (3, 5):
        filters = torch.randn(DIRECTIONS, 3, side, side, generator=generator).to(images.device)
        filters -= filters.mean((2, 3), keepdim=True)
        filters /= filters.square().sum((1, 2, 3), keepdim=True).sqrt()
        ours, theirs = (F.conv2d(each, filters).flatten(2).sort(-1).values for each in (decoded, images))
        distances.append(((ours - theirs).abs().mean(-1) / theirs.std(-1)).mean())
    return torch.stack(distances).mean()


def reconstruction_loss(
    decoded: Tensor, images: Tensor, grainy: Tensor, recipe: Recipe, generator: torch.Generator
) -> Tensor:
    """Pictures [B, 3, H, W], which of them are grainy [B] -> how far they are from their targets.

    With `texture`, grainy pictures are compared only at scales of five pixels and up: otherwise no grain would cost
    less than misplaced grain.
    """
    error = decoded - images
    if recipe.texture:
        coarse = F.avg_pool2d(error, 5, stride=1, padding=2, count_include_pad=False)
        error = torch.where(grainy[:, None, None, None], coarse, error)
    total = error.abs().mean() + recipe.squares * error.square().mean() + recipe.edges * edge_error(error)
    if recipe.texture:
        texture = spectral_distance(decoded, images)
        if grainy.any():
            texture = texture + PATCHES * grainy.float().mean() * patch_distance(
                decoded[grainy], images[grainy], generator
            )
        total = total + recipe.texture * texture
    return total


def loss(vae: QwenImageVAE, images: Tensor, grainy: Tensor, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """images [B, 3, H, W], which of them are grainy [B] -> the training loss.

    If only the decoder learns, the encoder merely supplies latents.
    """
    images, grainy, frozen = images.to(vae.mean.device), grainy.to(vae.mean.device), recipe.decoder
    with torch.set_grad_enabled(not frozen):
        mean, logvar = vae.moments(images)
    spread = vae.std if frozen else mean.detach().std(dim=(0, 2, 3), keepdim=True)
    z = mean + recipe.noise * spread * torch.randn(mean.shape, generator=generator).to(mean.device)
    total = reconstruction_loss(vae.reconstruct(z), images, grainy, recipe, generator)
    if not frozen:
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        total = total + recipe.kl * kl
    return total


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
def write_sheet(vae: QwenImageVAE, pictures: NDArray[np.uint8], path: Path) -> None:
    """Originals above their reconstructions, twelve per row."""
    images = torch.from_numpy(np.array(pictures)).permute(0, 3, 1, 2)
    decoded = (vae.decode(vae.encode(images / 127.5 - 1)) * 127.5 + 127.5).round().to(torch.uint8)
    rows = []
    for start in range(0, len(images) - 11, 12):
        rows += [torch.cat(list(images[start : start + 12]), -1), torch.cat(list(decoded[start : start + 12]), -1)]
    Image.fromarray(torch.cat(rows, 1).permute(1, 2, 0).numpy()).save(path)


@torch.no_grad()
def measure_latents(vae: QwenImageVAE, pictures: NDArray[np.uint8]) -> VAEConfig:
    """The configuration with the statistics of raw latents over complete pictures.

    Channels are only half equalised, by the geometric mean of their own deviation and the average one: with full
    equality a diffusion model would spend as much on the faintest detail as on what the picture shows.
    """
    means = []
    for start in range(0, len(pictures), 32):
        means.append(vae.moments(from_bytes(np.array(pictures[start : start + 32])))[0])
    std, mean = torch.std_mean(torch.cat(means), dim=(0, 2, 3))
    std = (std * std.mean()).sqrt()
    return replace(vae.config, latents_mean=tuple(mean.tolist()), latents_std=tuple(std.tolist()))


def write(vae: QwenImageVAE, path: Path, training: dict[str, Any], size: int) -> None:
    """Write the finished autoencoder as a checkpoint, for pictures of this size in px."""
    metadata = {"kind": "vae", "config": asdict(vae.config), "native": size, "training": training}
    save(path, vae.state_dict(), metadata)


class Stage(loop.Stage):
    """A stage whose model is an autoencoder."""

    recipe: Recipe
    narrow = False

    def muon(self, name: str, param: Tensor) -> bool:
        return param.ndim == 4 and param.shape[0] >= 8

    def pictures(self) -> int:
        return self.recipe.batch

    def compile(self) -> None:
        model.vae.norm_silu = torch.compile(model.vae.norm_silu, dynamic=True)


class AutoencoderStage(Stage):
    """The stage: both halves, or the decoder alone."""

    def __init__(self, recipe: Recipe, catalog: Catalog, pool: Pool):
        torch.manual_seed(recipe.seed)
        self.recipe = recipe
        self.pool, self.data = pool, fingerprint(catalog)
        if recipe.decoder:
            self.model: QwenImageVAE = load(BUNDLED / "mini-vae.safetensors")
        else:
            self.model = QwenImageVAE(MINI_CONFIG)
            init_linear(self.model, from_bytes(np.array(pool.pictures[:40])))
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def batch(self, step: int, part: int = 0) -> Batch:
        rng = np.random.default_rng(stable_seed(self.recipe.seed, self.recipe.name, step, part))
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        images, grainy = crops(self.pool, self.recipe, rng)
        return {"images": images, "grainy": grainy, "generator": generator}

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Any]]:
        return loss(self.model, batch["images"], batch["grainy"], self.recipe, batch["generator"]), {}

    def rate(self, name: str) -> float:
        return 0.0 if self.recipe.decoder and name.startswith(ENCODER_PREFIXES) else 1.0


def write_result(vae: QwenImageVAE, catalog: Catalog, recipe: Recipe, steps: int, report: Report) -> None:
    """Measure a finished autoencoder, and leave `vae.safetensors` and a sheet of held-out pictures in its folder."""
    folder = RUNS / recipe.name
    plain, media = (
        load_pool(catalog, "held-out", recipe.held_out, share, seed, folder).pictures
        for share, seed in ((1.0, 1), (0.0, 2))
    )
    scores = {"psnr_plain": round(psnr(vae, plain), 2), "psnr_media": round(psnr(vae, media), 2)}
    write(vae, folder / "vae.safetensors", {**asdict(recipe), "steps": steps, **scores}, recipe.size)
    write_sheet(vae, np.concatenate([plain[:24], media[:24]]), folder / "sheet.png")
    report(f"{recipe.name}: {scores['psnr_plain']} dB plain, {scores['psnr_media']} dB with media, held out")


def main(recipe: Recipe, device: str = "cpu", report: Report = print) -> loop.Run:
    """Train, measure, and leave `vae.safetensors` and a sheet of held-out pictures in the run's folder."""
    catalog, folder = Catalog(DATA, recipe.size), RUNS / recipe.name
    folder.mkdir(parents=True, exist_ok=True)
    trained_on = load_pool(catalog, "train", recipe.pictures, recipe.plain, recipe.seed, folder)
    stage = AutoencoderStage(recipe, catalog, trained_on)
    run = loop.train(loop.Run(stage, folder, device), report)
    vae = averaged_vae(run, stage.model.config)
    if not recipe.decoder:
        trained = vae.state_dict()
        vae = QwenImageVAE(measure_latents(vae, trained_on.pictures[:3000])).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        vae.load_state_dict(trained)
    write_result(vae, catalog, recipe, run.step, report)
    return run


def averaged_vae(run: loop.Run, config: VAEConfig, prefix: str = "") -> QwenImageVAE:
    """The autoencoder from a run's averaged weights whose names start with `prefix`."""
    vae = QwenImageVAE(config).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    vae.load_state_dict({k.removeprefix(prefix): v.cpu() for k, v in run.ema.items() if k.startswith(prefix)})
    return vae


def load(path: Path) -> QwenImageVAE:
    """A finished autoencoder from its checkpoint."""
    state, metadata = read(path)
    vae = QwenImageVAE(VAEConfig.from_dict(metadata["config"])).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    vae.load_state_dict(state)
    return vae
