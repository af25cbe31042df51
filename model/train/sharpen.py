"""The decoder trained on what the network draws, with a critic: clean edges, and flat colours that are flat.

A diffusion model's latents are not an encoder's. They are wrong where it was unsure, and a decoder that never saw such
latents draws an average of everything they could mean. `k2 train sharpen` continues the bundled autoencoder, with wider
scales if the recipe says so; the encoder is unchanged, so that latents keep their meaning. Turbo draws the latents:

asked  a picture's own latents, slightly noised: to be decoded as that picture, as before
begun  the same, noised and denoised by the network in its last steps: still that picture, as the network has it
free   what the network makes of the picture's caption. There is no target for it; its large forms stay as the decoder
       drew them before, and a critic judges how real its fine detail looks

Meanwhile the critic learns to tell crops of the latter two from crops of real pictures, by the hinge loss (arXiv
1705.02894), place by place (1611.07004), each from 54 px around it. Drawing comes on top of a run's minutes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call

from model.atomic import atomic_write
from model.errors import K2Error
from model.hashes import sha256
from model.library import BUNDLED
from model.pipeline import Pipeline
from model.references import from_bytes
from model.train import autoencoder, data, loop
from model.train.autoencoder import ENCODER_PREFIXES, reconstruction_loss
from model.train.data import AUTOENCODER, DATA, Catalog, Item, fingerprint, stable_seed
from model.train.loop import Batch, Report
from model.train.recipe import check_at_least, reject
from model.train.rollout import sample
from model.train.states import RUNS
from model.vae import QwenImageVAE

LARGE_FORM = 8  # px from which forms count as large: the critic sees what is finer
KINDS = ("asked", "begun", "free")
RENDERERS = ("turbo", "text", "vae")  # bundled files that latents depend on
DRAW_BATCH, FILE_PICTURES = 16, 160  # pictures encoded and drawn together; pictures kept in one file


@dataclass(frozen=True, kw_only=True)
class Recipe(autoencoder.Recipe):
    """The training of the decoder on drawn latents."""

    stage: str = "sharpen"
    decoder: bool = True
    batch: int = 4  # crops of each kind
    size: int = data.NATIVE
    crop: int = 128  # px, a multiple of the latents' factor
    pictures: int = 2400
    plain: float = 0.5
    widths: tuple[int, ...] = (16, 16, 32, 48, 96)  # channels of each scale, outermost first
    begun: float = 0.5  # weight of the error of begun pictures
    taken: tuple[int, ...] = (2, 3)  # steps, of eight, in which the network denoises them; one of these each time
    hold: float = 1.0  # weight of the change in large forms of free pictures
    critic: float = 0.05  # weight of the critic's opinion ...
    trusted: int = 300  # ... from this step on; before, less
    critic_rate: float = 0.6  # learning rate of the critic, relative to the decoder's

    def __post_init__(self) -> None:
        super().__post_init__()
        reject(self, "decoder", "kl")
        check_at_least(self, 1, "trusted")
        check_at_least(self, autoencoder.WIDE_WINDOW, "crop")
        for key in ("widths", "taken"):
            if min(getattr(self, key), default=0) < 1:
                raise K2Error(f'Recipe "{self.name}": {key} must be a list of numbers from 1 up.')
        if self.crop > self.size:
            raise K2Error(f'Recipe "{self.name}": crop must be at most size, {self.size}.')
        check_at_least(self, 0, "begun", "hold", "critic", "critic_rate")


# ---- latents ----------------------------------------------------------------------------------------------------


class Pool(NamedTuple):
    """Composed pictures, with latents that encode them or were drawn for their captions."""

    pictures: NDArray[np.uint8]  # [N, size, size, 3]
    grainy: NDArray[np.bool_]  # [N]
    asked: NDArray[np.float16]  # [N, 1, C, h, w], normalised
    begun: NDArray[np.float16]  # [N, len(taken), C, h, w]
    free: NDArray[np.float16]  # [N, 1, C, h, w]


def load_pool(catalog: Catalog, recipe: Recipe, folder: Path, pipeline: Pipeline, report: Report = print) -> Pool:
    """A fixed random choice of pictures of the train split and their latents, made once and kept in `folder`; kept in
    parts, so that an interrupted run resumes."""
    about = (catalog, "train", recipe.pictures, recipe.plain, recipe.seed)
    items, pictures = autoencoder.choose_items(*about), autoencoder.load_pool(*about, folder)
    drawn_with = hashlib.sha256(
        "".join(sha256(BUNDLED / f"mini-{part}.safetensors") for part in RENDERERS).encode()
    ).hexdigest()
    key = [
        recipe.pictures,
        f"{recipe.plain:g}",
        recipe.seed,
        recipe.size,
        fingerprint(catalog)[:12],
        drawn_with[:12],
        FILE_PICTURES,
    ]
    parts = folder / "-".join(map(str, ["latents", *key, *recipe.taken]))
    parts.mkdir(exist_ok=True)
    paths = {start: parts / f"{start:06d}.npz" for start in range(0, len(items), FILE_PICTURES)}
    for start, path in paths.items():
        if not path.exists():
            report(f"{recipe.name}: {start} of {len(items)} pictures drawn")
            some = slice(start, start + FILE_PICTURES)
            latents = draw_latents(pipeline, catalog, items[some], pictures.pictures[some], recipe, start)
            with atomic_write(path) as draft, draft.open("wb") as file:
                np.savez(file, **latents)  # type: ignore[arg-type]
    kept = [np.load(path) for path in paths.values()]
    return Pool(*pictures, *(np.concatenate([part[kind] for part in kept]) for kind in KINDS))


@torch.inference_mode()
def draw_latents(
    pipeline: Pipeline,
    catalog: Catalog,
    items: Sequence[Item],
    pictures: NDArray[np.uint8],
    recipe: Recipe,
    first: int,
) -> dict[str, NDArray[np.float16]]:
    """Latents of each kind for pictures [N, size, size, 3] of items; `first` is the index of the first among all."""
    steps, mu = int(pipeline.recommended["steps"]), float(pipeline.recommended["mu"])
    rng = np.random.default_rng(stable_seed(recipe.seed, recipe.name, "captions", first))
    captions = [catalog.caption(item, rng, "medium") for item in items]
    side = recipe.size // pipeline.vae.factor
    found: dict[str, list[NDArray[np.float16]]] = {kind: [] for kind in KINDS}
    for start in range(0, len(items), DRAW_BATCH):
        some = captions[start : start + DRAW_BATCH]
        asked = pipeline.vae.encode(
            from_bytes(np.array(pictures[start : start + DRAW_BATCH])).to(pipeline.device)
        ).float()
        drawn = []
        for begun in (*((asked, count) for count in recipe.taken), None):
            seed = stable_seed(recipe.seed, first + start, begun and begun[1]) % 2**62
            drawn.append(sample(pipeline.dit, pipeline.text.encode, some, side, steps, 0.0, seed, mu, begun))
        for kind, latents in zip(KINDS, ([asked], drawn[:-1], drawn[-1:]), strict=True):
            found[kind].append(torch.stack(latents, 1).half().cpu().numpy())
    return {kind: np.concatenate(parts) for kind, parts in found.items()}


# ---- the networks -------------------------------------------------------------------------------------------------


def widen(vae: QwenImageVAE, widths: Sequence[int]) -> QwenImageVAE:
    """The same function with these numbers of channels per scale (Net2WiderNet, arXiv 1511.05641). Raises K2Error.

    Every channel is copied 2, 4, … times, and whatever reads it takes a share of each copy: in the encoder, which
    stays unchanged, equal shares, which even bf16 holds exactly; in the decoder, shares that differ from weight to
    weight, so that copies diverge. The innermost scale keeps its width: its attention is scaled by the width's root.
    """
    old = vae.config
    old_widths = [old.base_dim * times for times in old.dim_mult]
    refusal = K2Error(
        f"Scales of {old_widths} channels cannot be widened to {list(widths)}.",
        hint="Use 2, 4, … times as many in all but the innermost; some only together with their neighbours.",
    )
    if len(widths) != len(old_widths) or widths[-1] != old_widths[-1] or any(width % widths[0] for width in widths):
        raise refusal
    if any(new % now or (new // now).bit_count() != 1 for new, now in zip(widths, old_widths, strict=True)):
        raise refusal
    shape = replace(old, base_dim=widths[0], dim_mult=tuple(width // widths[0] for width in widths))
    wide, generator = QwenImageVAE(shape), torch.Generator().manual_seed(0)
    weights, moved = vae.state_dict(), {}
    if wide.state_dict().keys() != weights.keys():  # shortcuts would come or go
        raise refusal
    for name, like in wide.state_dict().items():
        copies = [new // now for new, now in zip(like.shape, weights[name].shape, strict=True)]
        moved[name] = weights[name].repeat(*copies)
        if like.ndim == 4:  # [O, I, k, k]
            shares = torch.ones(len(like), copies[1], like.shape[1] // copies[1])
            if not name.startswith(ENCODER_PREFIXES):
                shares.uniform_(0.5, 1.5, generator=generator)
            moved[name] *= (shares / shares.sum(1, keepdim=True)).flatten(1)[..., None, None]
    wide.load_state_dict(moved)
    return wide.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


class Critic(nn.Module):
    """Pictures [B, 3, H, W] -> how real each place in them looks [B, 1, H/8, W/8].

    It sees pictures without their large forms, which are not in question; so it learns faster.
    """

    def __init__(self, width: int = 32):
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Conv2d(3, width, 4, 2, padding=1), nn.LeakyReLU(0.2)),
            *(nn.Conv2d(width, 2 * width, 4, 2, padding=1), nn.LeakyReLU(0.2)),
            *(nn.Conv2d(2 * width, 4 * width, 4, 2, padding=1), nn.LeakyReLU(0.2)),
            *(nn.Conv2d(4 * width, 4 * width, 3, padding=1), nn.LeakyReLU(0.2)),
            nn.Conv2d(4 * width, 1, 3, padding=1),
        )
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, pictures: Tensor) -> Tensor:
        large = F.interpolate(F.avg_pool2d(pictures, LARGE_FORM), scale_factor=float(LARGE_FORM), mode="bilinear")
        return self.layers(pictures - large)


class VAEWithCritic(nn.Module):
    """The autoencoder and its critic."""

    def __init__(self, vae: QwenImageVAE):
        super().__init__()
        self.vae, self.critic = vae, Critic()


# ---- the stage ----------------------------------------------------------------------------------------------------


class SharpenStage(autoencoder.Stage):
    """The stage: the decoder learns from all three kinds, the critic from begun and free pictures and the real ones."""

    recipe: Recipe
    model: VAEWithCritic

    def __init__(self, recipe: Recipe, catalog: Catalog, pool: Pool, before: QwenImageVAE):
        torch.manual_seed(recipe.seed)
        self.recipe, self.pool, self.data = recipe, pool, fingerprint(catalog)
        self.original = self.frozen = before.requires_grad_(False)
        self.model = VAEWithCritic(widen(before, recipe.widths))

    def batch(self, step: int, part: int = 0) -> Batch:
        """Crops of latents and of the pictures that they belong to, the same number of each kind."""
        recipe, factor = self.recipe, self.original.factor
        rng = np.random.default_rng(stable_seed(recipe.seed, recipe.name, step, part))
        cells, side = self.pool.asked.shape[-1], recipe.crop // factor
        latents, images, grainy = [], [], []
        for kind in KINDS:
            for index in autoencoder.pick(self.pool.grainy, recipe, rng):
                versions = getattr(self.pool, kind)[index]
                top, left = rng.integers(0, cells - side + 1, 2)
                latents.append(versions[rng.integers(len(versions)), :, top : top + side, left : left + side])
                y, x = factor * top, factor * left
                images.append(self.pool.pictures[index, y : y + recipe.crop, x : x + recipe.crop])
                grainy.append(bool(self.pool.grainy[index]))
        return {
            "latents": torch.from_numpy(np.stack(latents)).float(),
            "images": from_bytes(np.stack(images)),
            "grainy": torch.tensor(grainy),
            "trust": min(step / recipe.trusted, 1.0),
            "generator": torch.Generator().manual_seed(int(rng.integers(2**62))),
        }

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Any]]:
        vae, critic, recipe, generator = self.model.vae, self.model.critic, self.recipe, batch["generator"]
        latents, images, grainy = (batch[name].to(vae.mean.device) for name in ("latents", "images", "grainy"))
        count = recipe.batch
        noise = torch.randn(latents[:count].shape, generator=generator).to(latents.device)
        latents = torch.cat((latents[:count] + recipe.noise * noise, latents[count:]))
        latents = (latents * vae.std + vae.mean).contiguous(memory_format=torch.channels_last)
        drawn = vae.reconstruct(latents)
        with torch.no_grad():
            before = self.original.to(latents.device).reconstruct(latents[2 * count :])
        asked_error, begun_error = (
            reconstruction_loss(drawn[some], images[some], grainy[some], recipe, generator)
            for some in (slice(count), slice(count, 2 * count))
        )
        drift = F.avg_pool2d(drawn[2 * count :] - before, LARGE_FORM).abs().mean()
        theirs, ours = images[count:], drawn[count:]
        critic_loss = F.relu(1 - critic(theirs)).mean() + F.relu(1 + critic(ours.detach())).mean()
        opinion = functional_call(critic, {name: p.detach() for name, p in critic.named_parameters()}, ours).mean()
        total = (
            asked_error + recipe.begun * begun_error + recipe.hold * drift - recipe.critic * batch["trust"] * opinion
        )
        figures = {"off": asked_error, "begun": begun_error, "moved": drift, "critic": critic_loss, "opinion": opinion}
        return total + critic_loss, {name: figure.detach() for name, figure in figures.items()}

    def compile(self) -> None:
        torch._dynamo.config.recompile_limit = 8 * len(self.recipe.widths)  # widths of both, learning and not
        super().compile()

    def muon(self, name: str, param: Tensor) -> bool:
        return name.startswith("vae.") and super().muon(name, param)

    def rate(self, name: str) -> float:
        if name.startswith("critic."):
            return self.recipe.critic_rate
        return 0.0 if name.removeprefix("vae.").startswith(ENCODER_PREFIXES) else 1.0

    def pictures(self) -> int:
        return len(KINDS) * self.recipe.batch


def main(recipe: Recipe, device: str = "cpu", report: Report = print) -> loop.Run:
    """Train, and leave `vae.safetensors` and a sheet of held-out pictures in the run's folder."""
    catalog, folder = Catalog(DATA, recipe.size), RUNS / recipe.name
    before = autoencoder.load(AUTOENCODER)
    wide = widen(before, recipe.widths).config  # before anything is drawn
    if recipe.crop % before.factor or recipe.size % before.factor:
        raise K2Error(f'Recipe "{recipe.name}": crop and size must be multiples of {before.factor}.')
    pipeline = Pipeline.load("mini", variant="turbo", device=device, dtype="float32", filters=())
    if max(recipe.taken) > (steps := int(pipeline.recommended["steps"])):
        raise K2Error(f'Recipe "{recipe.name}": taken must be at most {steps}, the steps of Turbo.')
    folder.mkdir(parents=True, exist_ok=True)
    stage = SharpenStage(recipe, catalog, load_pool(catalog, recipe, folder, pipeline, report), before)
    run = loop.train(loop.Run(stage, folder, device), report)
    autoencoder.write_result(autoencoder.averaged_vae(run, wide, "vae."), catalog, recipe, run.step, report)
    return run
