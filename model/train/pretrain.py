"""Pretraining: the transformer and the style encoder together, from words and reference pictures to latents.

`python -m model.train.pretrain RECIPE.toml` runs one stage; it resumes from `.runs/NAME/state.safetensors` when that
exists, on the CPU to the last bit. Every step's pictures, captions, references and noise follow from the recipe's seed
and the step's number.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
import tomllib
from collections import defaultdict
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from model.checkpoint import read
from model.dit import PRESETS, DiTConfig, Krea2
from model.errors import K2Error
from model.latents import patchify
from model.plan import native_bf16
from model.style import STYLE_ROWS, StyleConfig, StyleEncoder, destroy_content
from model.text_encoder import TextEncoder
from model.train.data import DATA, Catalog, Item, stable_seed
from model.train.optim import Muon, split_parameters, warmup_stable_decay

RUNS = Path(".runs")
BOX = Path(__file__).parents[1] / "weights"
ROUND = 8  # prompts are padded to multiples of it, so that few shapes are compiled


@dataclass(frozen=True)
class Recipe:
    """One stage of pretraining, as its TOML file says it."""

    name: str
    size: int  # px
    minutes: float
    batch: int  # pictures a step
    repeats: int  # noise levels for each of them: the prompt's part is computed once for all
    lr: float  # of AdamW
    muon_lr: float  # of the matrices inside the blocks; updates have the size of AdamW's, but bear more
    mu: float  # shift of the training timesteps, sigma = sigmoid(mu + n)
    decay: float = 0.0  # share of the run over which the learning rate falls to zero
    warmup_steps: int = 50
    weight_decay: float = 0.01
    preset: str = "mini"
    network: dict[str, int] = field(default_factory=dict)  # what differs from the preset, as width or blocks
    seed: int = 1
    init: str = ""  # a run whose weights this one starts from, or "box": those of the package
    fresh: tuple[str, ...] = ()  # modules that begin anew all the same
    references: float = 0.5  # share of the steps that show a style reference
    white: float = 3.0  # how much oftener than media plain pictures on white come: subjects are learned there first
    grounds: float = 1.7  # the same for plain pictures on other grounds
    forms: tuple[float, float, float] = (0.5, 0.4, 0.1)  # shares of short, medium and long captions
    style_loss: float = 0.05

    @classmethod
    def read(cls, path: Path) -> Recipe:
        table: dict[str, Any] = tomllib.loads(path.read_text())
        unknown = set(table) - {f.name for f in fields(cls)}
        if unknown:
            raise K2Error(f"{path} has unknown keys: {', '.join(sorted(unknown))}.")
        lists = {key: tuple(value) for key, value in table.items() if isinstance(value, list)}
        return cls(**table | lists)

    @property
    def config(self) -> DiTConfig:
        return replace(PRESETS[self.preset], **self.network)

    def weight(self, item: Item) -> float:
        """How often a picture is drawn, next to one with a medium."""
        if item.look.medium != "plain":
            return 1.0
        return self.white if item.look.ground == "white" else self.grounds


class TrainingSet:
    """Everything that a step draws from: latents, captions and style references of the train split."""

    def __init__(self, catalog: Catalog, text: TextEncoder, recipe: Recipe):
        self.catalog = catalog
        self.items = catalog.items("train")
        self.latents = torch.from_numpy(np.load(catalog.folder / f"latents-{recipe.size}.npy"))
        assert len(self.latents) == len(self.items), "latents and catalog differ; encode again"
        self.text = text
        self.features: dict[str, Tensor] = {}
        self.by_look: dict[Any, list[int]] = defaultdict(list)
        for index, item in enumerate(self.items):
            self.by_look[item.look].append(index)
        self.looks = list(self.by_look)
        self.look_index = {look: i for i, look in enumerate(self.looks)}
        trained = {name for name, subject in catalog.subjects.items() if subject.trained}
        weights = np.array([recipe.weight(item) * (item.pair.subject in trained) for item in self.items])
        self.weights = weights / weights.sum()

    def embed(self, captions: list[str], more: int = 0) -> tuple[Tensor, Tensor]:
        """Right-padded text features [B, T, N, E] and their mask [B, T]; repeated captions are encoded once.

        T is such that `more` rows after it make a multiple of `ROUND`.
        """
        new = sorted(set(captions) - self.features.keys())
        if new:
            embeds, mask = self.text.encode(new, at_once=64)
            for caption, rows, real in zip(new, embeds, mask, strict=True):
                self.features[caption] = rows[real].half().cpu()
        rows = [self.features[caption].float() for caption in captions]
        length = -(-(max(map(len, rows)) + more) // ROUND) * ROUND - more
        padded = torch.stack([F.pad(each, (0, 0, 0, 0, 0, length - len(each))) for each in rows])
        return padded, torch.arange(length) < torch.tensor([len(each) for each in rows])[:, None]

    def batch(self, recipe: Recipe, step: int) -> dict[str, Any]:
        """The pictures, prompts and references of one step."""
        rng = np.random.default_rng(stable_seed(recipe.seed, recipe.name, step))
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        chosen = rng.choice(len(self.items), recipe.batch, p=self.weights)
        with_reference = rng.random() < recipe.references
        form = str(rng.choice(("short", "medium", "long"), p=recipe.forms))
        captions = []
        for index in chosen:
            style = not with_reference or rng.random() < 0.5
            caption = self.catalog.caption(self.items[index], rng, form, style)
            captions.append("" if rng.random() < 0.1 else caption)
        embeds, mask = self.embed(captions, STYLE_ROWS if with_reference else 0)
        latents = self.latents[chosen].float()
        references = None
        if with_reference:
            others = [self._other(index, rng) for index in chosen]
            tile = 2 * int(rng.integers(1, 3)) * latents.shape[-1] // 16
            references = destroy_content(self.latents[others].float(), max(tile, 2), generator)
        return {
            "latents": latents,
            "embeds": embeds,
            "mask": mask,
            "references": references,
            "null": torch.from_numpy(rng.random(recipe.batch) < 0.1),
            "looks": torch.tensor([self.look_index[self.items[i].look] for i in chosen]),
            "generator": generator,
        }

    def _other(self, index: int, rng: np.random.Generator) -> int:
        """A picture in the same look of another subject."""
        peers = self.by_look[self.items[index].look]
        other = peers[int(rng.integers(len(peers)))]
        return other if other != index or len(peers) == 1 else peers[(peers.index(other) + 1) % len(peers)]


class Trainee(nn.Module):
    """What is trained together: transformer, style encoder, and a head that tells looks apart by the style vector."""

    def __init__(self, config: DiTConfig, looks: int):
        super().__init__()
        self.dit = Krea2(config)
        self.style = StyleEncoder(StyleConfig(text_width=config.text_width, text_taps=config.text_taps))
        self.look_head = nn.Linear(self.style.config.vector, looks)
        self.dit.initialise()
        self.style.initialise()

    def compile(self) -> None:
        """Compile the blocks, where nearly all the work is; they share what is compiled."""
        torch._dynamo.config.recompile_limit = 64
        for block in (*self.dit.blocks, *self.dit.txtfusion.layerwise_blocks, *self.dit.txtfusion.refiner_blocks):
            block.compile(dynamic=False)

    def losses(self, batch: dict[str, Any], recipe: Recipe) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Flow-matching loss of each noised picture [B·R], their noise levels [B·R], style classification loss, and
        how far the prompts' contexts differ, as a share of their size: near zero means that words are not heard."""
        device, generator, repeats = self.look_head.weight.device, batch["generator"], recipe.repeats
        batch = {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}
        latents, embeds, mask = batch["latents"], batch["embeds"], batch["mask"]
        style_loss = torch.zeros((), device=device)
        if batch["references"] is not None:
            rows, vectors = self.style(batch["references"])
            style_loss = F.cross_entropy(10 * self.look_head(vectors), batch["looks"])
            rows = torch.where(batch["null"][:, None, None, None], self.style.null, rows)
            embeds = torch.cat((embeds, rows), 1)
            mask = F.pad(mask, (0, rows.shape[1]), value=True)
        context = self.dit.encode_text(embeds, mask)
        apart = (context - context.mean(0)).detach().norm() / context.detach().norm()
        context = context.repeat_interleave(repeats, 0)
        mask = mask.repeat_interleave(repeats, 0)

        image = patchify(latents, self.dit.config.patch).repeat_interleave(repeats, 0)
        noise = torch.randn(image.shape, generator=generator).to(device)
        # stratified over the step, so that no step sees only easy or only hard noise levels
        count = len(image)
        spread = (torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)) / count
        sigma = torch.sigmoid(recipe.mu + torch.special.ndtri(spread.clamp(1e-4, 1 - 1e-4))).to(device)
        noised = torch.lerp(image, noise, sigma[:, None, None])
        side = latents.shape[-1] // self.dit.config.patch
        rope = self.dit.rope(context.shape[1], (side, side))
        velocity = self.dit.velocity(noised, context, self.dit.modulate(sigma), rope, mask)
        return (velocity.float() - (noise - image)).square().mean((1, 2)), sigma, style_loss, apart


class Run:
    """A stage under way: modules, optimisers, averaged weights, and the place where it stands."""

    def __init__(self, recipe: Recipe, looks: int, device: str = "cpu"):
        torch.manual_seed(recipe.seed)
        self.recipe, self.device = recipe, torch.device(device)
        self.folder = RUNS / recipe.name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.model = Trainee(recipe.config, looks).to(self.device)
        inside, rest = split_parameters(self.model.dit)
        rest += [*self.model.style.parameters(), *self.model.look_head.parameters()]
        self.muon = Muon(inside, recipe.muon_lr, weight_decay=recipe.weight_decay, steps=4)
        self.adamw = torch.optim.AdamW(rest, recipe.lr, betas=(0.9, 0.98), weight_decay=recipe.weight_decay, fused=True)
        self.ema = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.step, self.seconds = 0, 0.0
        self.bf16 = native_bf16(self.device)
        if (self.folder / "state.safetensors").exists():
            self.load(self.folder / "state.safetensors")
        elif recipe.init:
            parent = box() if recipe.init == "box" else averages(RUNS / recipe.init / "state.safetensors")
            begin = self.model.state_dict()
            for name, value in begin.items():
                if name in parent and not name.startswith(recipe.fresh or "-"):
                    value.copy_(parent[name])
            self.ema = {name: value.clone() for name, value in begin.items()}

    def advance(self, batch: dict[str, Any]) -> dict[str, float]:
        """One step of both optimisers."""
        recipe = self.recipe
        factor = min(1.0, (self.step + 1) / recipe.warmup_steps) * warmup_stable_decay(
            self.seconds, recipe.minutes * 60, warmup=0, decay=recipe.decay
        )
        self.muon.param_groups[0]["lr"] = recipe.muon_lr * factor
        self.adamw.param_groups[0]["lr"] = recipe.lr * factor
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            flow, sigma, style, apart = self.model.losses(batch, recipe)
        (flow.mean() + recipe.style_loss * style).backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 2.0)
        for optimiser in (self.muon, self.adamw):
            optimiser.step()
            optimiser.zero_grad()
        self.step += 1
        decay = min(0.998, (self.step + 1) / (self.step + 20))
        torch._foreach_lerp_(list(self.ema.values()), list(self.model.state_dict().values()), 1 - decay)
        flow = flow.detach()
        return {
            "loss": flow.mean().item(),
            "low": flow[sigma < 0.4].mean().item(),
            "high": flow[sigma > 0.7].mean().item(),
            "style": style.item(),
            "apart": apart.item(),
            "norm": norm.item(),
            "lr": factor * recipe.lr,
        }

    def save(self) -> None:
        """The whole state, replaced in one move."""
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"ema.{k}": v for k, v in self.ema.items()}
        for name, optimiser in (("muon", self.muon), ("adamw", self.adamw)):
            for index, state in optimiser.state_dict()["state"].items():
                tensors |= {f"{name}.{index}.{key}": value for key, value in state.items()}
        place = {"step": self.step, "seconds": self.seconds, "recipe": asdict(self.recipe)}
        draft = self.folder / "state.draft"
        save_file({k: v.contiguous() for k, v in tensors.items()}, draft, {"place": json.dumps(place)})
        draft.replace(self.folder / "state.safetensors")

    def load(self, path: Path) -> None:
        """Back to where `save` was called, to the last bit."""
        with safe_open(path, "pt") as file:
            place = json.loads(file.metadata()["place"])
        tensors = load_file(path, str(self.device))
        self.step, self.seconds = place["step"], place["seconds"]
        self.model.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
        self.ema = {name: tensors[f"ema.{name}"] for name in self.ema}
        for name, optimiser in (("muon", self.muon), ("adamw", self.adamw)):
            states: dict[int, dict[str, Tensor]] = defaultdict(dict)
            for key, value in tensors.items():
                if key.startswith(f"{name}."):
                    _, index, slot = key.split(".")
                    states[int(index)][slot] = value
            optimiser.load_state_dict({"state": dict(states), "param_groups": optimiser.state_dict()["param_groups"]})


def averages(path: Path) -> dict[str, Tensor]:
    """The averaged weights of a run."""
    return {name[4:]: tensor for name, tensor in load_file(path).items() if name.startswith("ema.")}


def box() -> dict[str, Tensor]:
    """The weights of the package, under a trainee's names; the head that tells looks apart is not among them."""
    parts = {"dit.": "mini-raw", "style.": "mini-style"}
    states = ((prefix, read(BOX / f"{name}.safetensors")[0]) for prefix, name in parts.items())
    return {prefix + name: tensor for prefix, state in states for name, tensor in state.items()}


def main(recipe: Recipe, device: str = "cpu") -> Run:
    """Run a stage to its end, from where it stands."""
    text = TextEncoder.load(BOX / "mini-text.safetensors", device)
    data = TrainingSet(Catalog(DATA), text, recipe)
    run = Run(recipe, len(data.looks), device)
    if recipe.minutes > 2:  # compiling takes one
        run.model.compile()
    log = run.folder / "log.csv"
    print(f"{recipe.name}: from step {run.step}, {len(data.items)} pictures, {len(data.looks)} looks", flush=True)
    last_save = started = time.monotonic()
    before = run.seconds
    window: list[dict[str, float]] = []
    while run.seconds < recipe.minutes * 60:
        window.append(run.advance(data.batch(recipe, run.step)))
        run.seconds = before + time.monotonic() - started
        if run.step % 25 == 0:
            row: dict[str, Any] = {"step": run.step, "seconds": round(run.seconds, 1)}
            row |= {key: round(float(np.nanmean([w[key] for w in window])), 4) for key in window[0]}
            seen = run.step * recipe.batch * recipe.repeats
            print(row, f"{seen / run.seconds:.1f} noised pictures/s", flush=True)
            with log.open("a", newline="") as file:
                csv.writer(file).writerow(row.values())
            window = []
        if time.monotonic() - last_save > 180:
            run.save()
            last_save = time.monotonic()
    run.save()
    return run


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Run one stage of pretraining.")
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    main(Recipe.read(options.recipe), options.device)
