"""One more scale for a small autoencoder: a latent cell grows from 8 to 16 pixels and keeps its meaning.

`k2 train finer` uses a finished autoencoder, the teacher, and twins of every picture: 256 px to encode and decode, and
128 px as the teacher saw them. The new encoder learns to give for the fine twin the latents that the teacher gives for
the coarse one, the new decoder to draw the fine twin from them. So whatever was trained on the teacher's latents works
as is, with four times the pixels for the same work.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor

from model.atomic import atomic_write
from model.errors import K2Error
from model.references import from_bytes
from model.train import autoencoder, data, looks, loop
from model.train.autoencoder import GRAINY_MEDIUM, reconstruction_loss
from model.train.data import DATA, Catalog, Item, fingerprint, stable_seed
from model.train.loop import Batch, Report
from model.train.recipe import reject
from model.train.states import RUNS
from model.vae import QwenImageVAE

NEW_SCALE_WIDTH = 1  # in `base_dim`s: only as wide as the next scale, as it works on four times as many pixels
Pixels = NDArray[np.uint8]
INPUT_LAYER, OUTPUT_LAYERS = "encoder.conv_in.", ("decoder.norm_out.", "decoder.conv_out.")
DOWN_BLOCK = re.compile(r"(encoder\.down_blocks\.)(\d+)\.")


@dataclass(frozen=True, kw_only=True)
class Recipe(autoencoder.Recipe):
    """A run that adds one more scale."""

    stage: str = "finer"
    size: int = data.NATIVE  # px of the fine twins
    teacher: str = "autoencoder"  # the run that trained the teacher
    crop: int = 128  # px of the fine twin, a multiple of 16
    pictures: int = 2000
    match: float = 0.3  # weight of the squared error of latents, in deviations of the teacher's

    def __post_init__(self) -> None:
        super().__post_init__()
        reject(self, "decoder", "kl")


# ---- twins ----------------------------------------------------------------------------------------------------------


class RecordedRNG:
    """A generator that records what it draws, so that a twin of half the side can be made with the same draws."""

    def __init__(self, rng: Generator):
        self.rng, self.recorded = rng, []  # type: tuple[Generator, list[Any]]

    def __getattr__(self, name: str) -> Any:
        def draw(*wanted: Any) -> Any:
            self.recorded.append((name, getattr(self.rng, name)(*wanted)))
            return self.recorded[-1][1]

        return draw

    def coarse(self) -> Generator:
        """A generator that replays the draws, with per-pixel noise averaged over 2 x 2 cells at the same strength."""
        remaining = iter(self.recorded)

        def draw(name: str, *wanted: Any) -> Any:
            recorded_name, value = next(remaining)
            assert recorded_name == name
            if np.ndim(value) < 2 or value.shape == wanted[0]:
                return value
            middle = 0.5 if name == "random" else 0.0
            axes = [axis for axis, side in enumerate(value.shape) if side > 3]
            cells = value - middle
            for axis in axes:
                cells = cells.reshape(*cells.shape[:axis], -1, 2, *cells.shape[axis + 1 :]).mean(axis + 1)
            wide = middle + 2 * cells  # a mean of four has half the deviation
            return wide.clip(0, 1) if name == "random" else wide

        return cast(Generator, ReplayedRNG(draw))


class ReplayedRNG:
    def __init__(self, draw: Any):
        self.draw = draw

    def __getattr__(self, name: str) -> Any:
        return lambda *wanted: self.draw(name, *wanted)


def halve_resolution(picture: NDArray[Any]) -> NDArray[Any]:
    """[H, W, C] -> the means of 2 x 2 cells."""
    height, width, channels = picture.shape
    return picture.reshape(height // 2, 2, width // 2, 2, channels).mean((1, 3))


def picture_pair(catalog: Catalog, item: Item) -> tuple[Pixels, Pixels]:
    """An item's picture, and the same at half the side, with grain of the same strength in its own pixels."""
    rng = np.random.default_rng(stable_seed("picture", item.pair, item.look))
    placed = looks.place_subject(np.asarray(catalog.renders[item.row]), item.look, rng)
    tape = RecordedRNG(rng)
    fine = looks.apply_medium(placed, item.look, cast(Generator, tape))
    return fine, looks.apply_medium(halve_resolution(placed).astype(np.float32), item.look, tape.coarse())


class Pool(NamedTuple):
    """Twins of composed pictures."""

    fine: Pixels  # [N, 256, 256, 3]
    coarse: Pixels  # [N, 128, 128, 3]
    grainy: NDArray[np.bool_]  # [N]


def load_pool(catalog: Catalog, recipe: Recipe, folder: Path) -> Pool:
    """A fixed random choice of twins of the train split, made once and kept in `folder`."""
    rng = np.random.default_rng(recipe.seed)
    chosen = autoencoder.sample_items(catalog.items("train"), recipe.pictures, recipe.plain, rng)
    about = f"{recipe.pictures}-{recipe.plain:g}-{recipe.seed}-{catalog.size}-{fingerprint(catalog)[:12]}"
    files = [folder / f"{kind}-{about}.npy" for kind in ("fine", "coarse")]
    if not all(file.exists() for file in files):
        made = [picture_pair(catalog, item) for item in chosen]
        for file, pictures in zip(files, zip(*made, strict=True), strict=True):
            with atomic_write(file) as draft, draft.open("wb") as target:
                np.save(target, np.stack(pictures))
    fine, coarse = (np.load(file, mmap_mode="r") for file in files)
    return Pool(fine, coarse, np.array([item.look.medium == GRAINY_MEDIUM for item in chosen]))


# ---- the network ----------------------------------------------------------------------------------------------------


def grow(teacher: QwenImageVAE) -> QwenImageVAE:
    """The teacher with one more scale outside all others; new parts are initialised at random."""
    old = teacher.config
    vae = QwenImageVAE(
        replace(old, dim_mult=(NEW_SCALE_WIDTH, *old.dim_mult), temporal_downsample=(False, *old.temporal_downsample))
    )
    layers = old.num_res_blocks + 1  # of an encoder scale
    moved = {}
    for name, tensor in teacher.state_dict().items():
        if not name.startswith((INPUT_LAYER, *OUTPUT_LAYERS)):  # now a scale further out
            moved[DOWN_BLOCK.sub(lambda found: f"{found[1]}{int(found[2]) + layers}.", name)] = tensor
    entry = f"encoder.down_blocks.{layers}."  # its input is the new scale's channels, the old ones first
    outside, inside = NEW_SCALE_WIDTH * old.base_dim, old.base_dim * old.dim_mult[0]
    for name in (f"{entry}norm1.gamma", f"{entry}conv1.weight"):  # [C, 1, 1] and [O, C, 3, 3], C the channels taken
        moved[name] = F.pad(moved[name], (0, 0, 0, 0, 0, outside - old.base_dim))
    moved[f"{entry}norm1.gamma"] *= (old.base_dim / outside) ** 0.5  # as if the others were zero
    if outside != inside:
        moved[f"{entry}conv_shortcut.weight"] = torch.eye(inside, outside)[..., None, None]
        moved[f"{entry}conv_shortcut.bias"] = torch.zeros(inside)
    vae.load_state_dict(vae.state_dict() | moved)
    return vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


class GrowStage(autoencoder.Stage):
    """The stage: both halves at once, each by the teacher's latents of the coarse twin."""

    recipe: Recipe

    def __init__(self, recipe: Recipe, catalog: Catalog, pool: Pool, teacher: QwenImageVAE):
        torch.manual_seed(recipe.seed)
        self.recipe = recipe
        self.pool, self.data, self.teacher = pool, fingerprint(catalog), teacher.requires_grad_(False)
        self.frozen = teacher
        self.model: QwenImageVAE = grow(teacher)
        layers = teacher.config.num_res_blocks + 1
        self.new_layers = (INPUT_LAYER, *(f"encoder.down_blocks.{i}." for i in range(layers)), *OUTPUT_LAYERS)
        last = len(teacher.config.dim_mult)
        self.new_layers += (f"decoder.up_blocks.{last}.", f"decoder.up_blocks.{last - 1}.upsamplers.")

    def batch(self, step: int, part: int = 0) -> Batch:
        """Crops of twins, sometimes mirrored or with the colours in another order."""
        recipe = self.recipe
        rng = np.random.default_rng(stable_seed(recipe.seed, recipe.name, step, part))
        grainy, every = np.flatnonzero(self.pool.grainy), len(self.pool.fine)
        fine: list[Pixels] = []
        coarse: list[Pixels] = []
        which: list[bool] = []
        for _ in range(recipe.batch):
            index = int(rng.choice(grainy if len(grainy) and rng.random() < recipe.grainy else every))
            top, left = 8 * rng.integers(0, (recipe.size - recipe.crop) // 16 + 1, 2)
            order = rng.permutation(3) if rng.random() < 0.3 else np.arange(3)
            flip = slice(None, None, -1 if rng.random() < 0.5 else 1)
            for out, pictures, scale in ((fine, self.pool.fine, 2), (coarse, self.pool.coarse, 1)):
                side = recipe.crop // 2 * scale
                cut = pictures[index, scale * top : scale * top + side, scale * left : scale * left + side]
                out.append(cut[:, flip, order])
            which.append(bool(self.pool.grainy[index]))
        return {
            "fine": from_bytes(np.stack(fine)),
            "coarse": from_bytes(np.stack(coarse)),
            "grainy": torch.tensor(which),
            "generator": torch.Generator().manual_seed(int(rng.integers(2**62))),
        }

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Any]]:
        vae, recipe, generator = self.model, self.recipe, batch["generator"]
        fine, coarse, grainy = (batch[name].to(vae.mean.device) for name in ("fine", "coarse", "grainy"))
        with torch.no_grad():
            target = self.teacher.to(vae.mean.device).moments(coarse)[0]
        latents = vae.moments(fine)[0]
        latent_error = ((latents - target) / vae.std).square().mean()
        noisy = target + recipe.noise * vae.std * torch.randn(target.shape, generator=generator).to(target.device)
        image_error = reconstruction_loss(vae.reconstruct(noisy), fine, grainy, recipe, generator)
        return image_error + recipe.match * latent_error, {"drawn": image_error.detach(), "off": latent_error.detach()}

    def rate(self, name: str) -> float:
        return 1.0 if name.startswith(self.new_layers) else 0.3


def main(recipe: Recipe, device: str = "cpu", report: Report = print) -> loop.Run:
    """Train, and leave `vae.safetensors` and a sheet of held-out pictures in the run's folder."""
    source = RUNS / recipe.teacher / "vae.safetensors"
    if not source.exists():
        raise K2Error(f'The run "{recipe.teacher}" has no autoencoder.', hint="Train one first: k2 train autoencoder")
    catalog, folder = Catalog(DATA, recipe.size), RUNS / recipe.name
    folder.mkdir(parents=True, exist_ok=True)
    stage = GrowStage(recipe, catalog, load_pool(catalog, recipe, folder), autoencoder.load(source))
    run = loop.train(loop.Run(stage, folder, device), report)
    autoencoder.write_result(autoencoder.averaged_vae(run, stage.model.config), catalog, recipe, run.step, report)
    return run
