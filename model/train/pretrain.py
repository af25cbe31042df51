"""Pretraining: the transformer and the style encoder together, from words and reference pictures to latents.

`python -m model.train.pretrain RECIPE.toml` runs one stage by the loop of `model/train/loop.py`. Every step's pictures,
captions, references and noise follow from the recipe's seed and the step's number.
"""

from __future__ import annotations

import argparse
import hashlib
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.dit import PRESETS, DiTConfig, Krea2
from model.errors import K2Error
from model.latents import grid_of, patchify
from model.library import BOX
from model.style import STYLE_ROWS, StyleConfig, StyleEncoder, destroy_content
from model.text_encoder import TextEncoder
from model.train import loop, states
from model.train.alignment import CLEANER, Pupil, Teacher
from model.train.data import DATA, Catalog, Item, stable_seed
from model.train.loop import Batch, Report
from model.train.products import convert, parse
from model.train.recipe import at_least
from model.train.rollout import noised, with_rows
from model.train.shapes import Shape, of_shape
from model.train.states import RUNS
from model.train.strangers import Wording

KEPT = 20_000  # captions whose features are kept: most of a gigabyte; ten times as many on a card
UNSAID = 0.1  # share of the pictures that are shown without their caption, for guidance
WIDTHS = 8  # tokens that captions are encoded in multiples of


class Sampling(NamedTuple):
    """How pictures are drawn."""

    steps: int
    guidance: float
    mu: float | None = None  # shift of the noise levels; none: Raw's own for the picture's size


@dataclass(frozen=True, kw_only=True)
class Recipe(loop.Recipe):
    """One stage of pretraining, as its TOML file says it."""

    size: int  # px
    batch: int  # pictures a step
    repeats: int  # noise levels for each of them: the prompt's part is computed once for all
    mu: float  # shift of the training timesteps, sigma = sigmoid(mu + n)
    preset: str = "mini"
    network: dict[str, int] = field(default_factory=dict)  # what differs from the preset, as width or blocks
    references: float = 0.5  # share of the steps that show a style reference
    white: float = 3.0  # how much oftener than media plain pictures on white come: subjects are learned there first
    grounds: float = 1.7  # the same for plain pictures on other grounds
    later: float = 0.0  # how much oftener than the others the subjects marked so come; 0 leaves them out
    null: float = 0.1  # share of the pictures with style rows whose rows say nothing
    said: float = 0.5  # share of the others with style rows whose caption says the look too
    unasked: tuple[str, ...] = ()  # drawing sets that bare words may mean, without a medium; empty: any look
    forms: tuple[float, float, float] = (0.5, 0.4, 0.1)  # shares of short, medium and long captions
    reworded: float = 0.0  # share of the captions that are said in other words
    strangers: float = 0.0  # share of the captions that strange words are put around
    style_loss: float = 0.05
    frozen: tuple[str, ...] = ()  # modules that stay as they are, "style"
    align: float = 0.0  # weight of self-representation alignment, which the first epoch has and no other
    shapes: tuple[str, ...] = ()  # other sizes of pictures, "320x192" ...
    shaped: float = 0.5  # ... and the share of the steps that have one of them, each as often
    sheets: float = 0.0  # minutes from one sheet of samples to the next, as runs are saved; 0 draws none
    recompute: bool = False  # work blocks out again on the way back instead of keeping them: less memory, more work
    rows: int = 8  # prompts are padded until a stream is a multiple of it: fewer lengths, and less is compiled
    products: str = "wide"  # of the blocks' matrices: wide, or 8 bits as `model/train/products.py` names them

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "batch", "repeats", "rows")
        if min(self.forms) < 0 or not math.isclose(sum(self.forms), 1, abs_tol=1e-8):
            raise K2Error(f'Recipe "{self.name}": forms are three shares, whose sum is 1.')

    @property
    def config(self) -> DiTConfig:
        """Of the network. Raises K2Error where there is none such."""
        where, known = f'Recipe "{self.name}"', [each.name for each in fields(DiTConfig)]
        if self.preset not in PRESETS:
            raise K2Error(f'{where}: there is no preset "{self.preset}".', hint=f"Choose of {', '.join(PRESETS)}.")
        if unknown := [key for key in self.network if key not in known]:
            raise K2Error(f'{where}: a network has no "{unknown[0]}".', hint=f"It has {', '.join(known)}.")
        try:
            return replace(PRESETS[self.preset], **self.network)
        except ValueError as error:
            raise K2Error(f"{where}: there is no such network: {error}.") from None

    @property
    def sampling(self) -> Sampling:
        """How samples are drawn by what it trains."""
        return Sampling(steps=16, guidance=2.5)

    def weight(self, item: Item, later: bool) -> float:
        """How often a picture is drawn, next to one with a medium; `later` says whether its subject joined late."""
        share = self.later if later else 1.0
        if item.look.medium != "plain":
            return share
        return share * (self.white if item.look.ground == "white" else self.grounds)

    def form(self, item: Item, form: str) -> str:
        """The form of a caption that alone says the look: a look that nobody gets unasked is always asked for."""
        tasteful = not self.unasked or (item.look.medium == "plain" and item.pair.drawing in self.unasked)
        return form if tasteful or form != "short" else "medium"


class TrainingSet:
    """Everything that a step draws from: latents, captions and style references of the train split.

    All of it lies where the network is, and so do the dice: a step carries nothing over but its captions.
    """

    def __init__(self, catalog: Catalog, text: TextEncoder, recipe: Recipe):
        self.catalog = catalog
        self.items = catalog.items("train")
        self.text, self.rows = text, recipe.rows
        self.wording = Wording(catalog.subjects)
        self.device = text.prefix_ids.device
        self.kept, self.at_once = (KEPT, 16) if self.device.type == "cpu" else (10 * KEPT, 64)
        self.latents = torch.from_numpy(read_latents(catalog.folder, recipe.size, len(self.items))).to(self.device)
        self.cells = self.latents.shape[-1]  # along a side
        self.side = self.cells // recipe.config.patch  # of the square, in tokens: other shapes are laid around it
        self.shaped = [self._shaped(Shape.of(shape)) for shape in recipe.shapes]
        self.features: dict[str, Tensor] = {}
        self.embedding = Lock()  # batches are made in a thread of their own while a step validates in another
        self.by_look: dict[Any, list[int]] = defaultdict(list)
        for index, item in enumerate(self.items):
            self.by_look[item.look].append(index)
        self.looks = list(self.by_look)
        self.look_index = {look: i for i, look in enumerate(self.looks)}
        subjects = catalog.subjects
        weights = np.array([recipe.weight(item, subjects[item.pair.subject].later) for item in self.items])
        self.weights = weights / weights.sum()

    def _shaped(self, shape: Shape) -> Shaped:
        """The pictures that come in a shape."""
        indices = of_shape(self.items, shape)
        latents = read_latents(self.catalog.folder, shape, len(indices))
        return Shaped(np.array(indices), torch.from_numpy(latents).to(self.device))

    def draw(self, recipe: Recipe, step: int, rng: np.random.Generator) -> tuple[NDArray[np.integer], Tensor]:
        """The pictures of a batch, all of one size: which they are, and their latents [B, C, h, w]."""
        dice = np.random.default_rng(stable_seed(recipe.seed, recipe.name, step, "shape"))  # of a step, not of its part
        if not recipe.shapes or dice.random() >= recipe.shaped:
            chosen = rng.choice(len(self.items), recipe.batch, p=self.weights)
            return chosen, self.latents[chosen].float()
        indices, latents = self.shaped[int(dice.integers(len(self.shaped)))]
        odds = self.weights[indices]
        places = rng.choice(len(indices), recipe.batch, p=odds / odds.sum())
        return indices[places], latents[places].float()

    def embed(self, captions: list[str], more: int = 0) -> tuple[Tensor, Tensor]:
        """Right-padded text features [B, T, N, E] and their mask [B, T]; repeated captions are encoded once.

        T is such that `more` rows after it make a multiple of the recipe's `rows`.
        """
        with self.embedding:
            self._encode(caption for caption in set(captions) if caption not in self.features)
            rows = [self.features[caption] for caption in captions]
            padded = pad(rows, -(-(max(map(len, rows)) + more) // self.rows) * self.rows - more)
            if self.device.type == "cuda":  # each thread has a stream of its own, and features are for both
                torch.cuda.current_stream(self.device).synchronize()
            for caption in list(islice(self.features, max(0, len(self.features) - self.kept))):
                del self.features[caption]
        return padded

    def _encode(self, captions: Iterable[str]) -> None:
        """Put in the features of captions that there are none of.

        A caption's are the same bits in any company, so that a run that goes on sees what it would have seen: they are
        worked out in shapes that depend on its own length alone, full batches of captions that are about as long.
        """
        alike = defaultdict(list)
        for caption in sorted(captions):
            alike[-(-len(self.text.token_ids(caption)) // WIDTHS)].append(caption)
        for new in alike.values():
            for start in range(0, len(new), self.at_once):
                some = new[start : start + self.at_once]
                full = some + some[:1] * (self.at_once - len(some))
                embeds, mask = self.text.encode(full, at_once=self.at_once, multiple=WIDTHS)
                for caption, rows, length in zip(full, embeds.half(), mask.sum(1).tolist(), strict=True):
                    self.features[caption] = rows[:length].clone()

    def batch(self, recipe: Recipe, step: int, part: int = 0) -> Batch:
        """The pictures, prompts and references of one step, or of one of its parts."""
        rng = np.random.default_rng(stable_seed(recipe.seed, recipe.name, step, *([part] if part else [])))
        generator = torch.Generator(self.device).manual_seed(int(rng.integers(2**62)))
        chosen, latents = self.draw(recipe, step, rng)
        with_reference = rng.random() < recipe.references
        if recipe.accumulate > 1:  # parts may lie on several processes, which must agree on what takes part
            shared = np.random.default_rng(stable_seed(recipe.seed, recipe.name, step, "references"))
            with_reference = shared.random() < recipe.references
        form = str(rng.choice(("short", "medium", "long"), p=recipe.forms))
        null = rng.random(recipe.batch) < recipe.null
        captions = []
        for index, silent in zip(chosen, null, strict=True):
            # rows that say nothing come with the captions of no rows, so that both mean the same
            style = not with_reference or silent or rng.random() < recipe.said
            item = self.items[index]
            caption = self.catalog.caption(item, rng, recipe.form(item, form) if style else form, style)
            if recipe.reworded or recipe.strangers:
                caption = self.wording.say(caption, item.pair.subject, recipe.reworded, recipe.strangers, rng)
            captions.append("" if rng.random() < UNSAID else caption)
        image_tokens = latents[0, 0].numel() // recipe.config.patch**2
        embeds, mask = self.embed(captions, image_tokens + (STYLE_ROWS if with_reference else 0))
        references = None
        if with_reference:
            others = [self._other(index, rng) for index in chosen]
            tile = 2 * int(rng.integers(1, 3)) * self.cells // 16
            references = destroy_content(self.latents[others].float(), max(tile, 2), generator)
        return {
            "captions": captions,
            "subjects": [self.items[i].pair.subject for i in chosen],
            "latents": latents,
            "embeds": embeds,
            "mask": mask,
            "references": references,
            "null": torch.from_numpy(null).to(self.device),
            "looks": torch.tensor([self.look_index[self.items[i].look] for i in chosen]).to(self.device),
            "generator": generator,
        }

    def _other(self, index: int, rng: np.random.Generator) -> int:
        """A picture in the same look of another subject."""
        peers = self.by_look[self.items[index].look]
        other = peers[int(rng.integers(len(peers)))]
        return other if other != index or len(peers) == 1 else peers[(peers.index(other) + 1) % len(peers)]


class Shaped(NamedTuple):
    """The pictures of the train split that come in a shape."""

    indices: NDArray[np.integer]  # among all
    latents: Tensor  # float16 [pictures, C, h, w]


def pad(rows: Sequence[Tensor], length: int) -> tuple[Tensor, Tensor]:
    """Text features of several lengths, [T, N, E] each -> fp32 [B, length, N, E], zeros at the end, and their mask."""
    device = rows[0].device
    real = torch.arange(length) < torch.tensor([len(each) for each in rows])[:, None]
    padded = torch.zeros(real.numel(), *rows[0].shape[1:], device=device)
    padded[real.flatten().nonzero()[:, 0].to(device)] = torch.cat(list(rows)).float()
    return padded.unflatten(0, real.shape), real.to(device)


def training_set(recipe: Recipe, device: str) -> TrainingSet:
    """The package's data and text encoder, as a recipe draws from them."""
    return TrainingSet(Catalog(DATA), TextEncoder.load(BOX / "mini-text.safetensors", device), recipe)


def read_latents(folder: Path, size: int | Shape, count: int) -> NDArray[np.float16]:
    """The train split's latents at a size, float16 [count, C, H/f, W/f]."""
    path, hint = folder / f"latents-{size}.npy", f"encode them with: python -m model.train.encode {size}"
    if not path.exists():
        raise K2Error(f"there are no latents of {size} px in {folder}.", hint=hint)
    latents = np.load(path)
    if len(latents) != count:
        raise K2Error(f"{path} holds {len(latents)} pictures, the data set {count}.", hint=hint)
    return latents


class Losses(NamedTuple):
    """What a step amounts to."""

    flow: Tensor  # [B·R] the flow-matching loss of each noised picture
    sigma: Tensor  # [B·R] their noise levels
    style: Tensor  # of telling looks apart by the style vector
    apart: Tensor  # how far the prompts' contexts differ, as a share of their size: near zero, words are not heard
    align: Tensor  # distance of an early block's view from the teacher's


class Trainee(nn.Module):
    """What is trained together: transformer, style encoder, and a head that tells looks apart by the style vector.

    align: with a head that foretells a teacher's view
    """

    def __init__(self, config: DiTConfig, looks: int, align: bool = False):
        super().__init__()
        self.dit = Krea2(config)
        self.style = StyleEncoder(StyleConfig(text_width=config.text_width, text_taps=config.text_taps))
        self.look_head = nn.Linear(self.style.config.vector, looks)
        self.dit.initialise()
        self.style.initialise()
        self.pupil = Pupil(self.dit) if align else None

    def losses(self, batch: dict[str, Any], recipe: Recipe, teacher: Teacher | None = None) -> Losses:
        """All losses of a batch; with a teacher also the distance of its view."""
        device, generator, repeats = self.look_head.weight.device, batch["generator"], recipe.repeats
        batch = {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}
        latents, embeds, mask = batch["latents"], batch["embeds"], batch["mask"]
        style_loss = align = torch.zeros((), device=device)
        if batch["references"] is not None:
            rows, vectors = self.style(batch["references"])
            style_loss = F.cross_entropy(10 * self.look_head(vectors), batch["looks"])
            rows = torch.where(batch["null"][:, None, None, None], self.style.null, rows)
            embeds, mask = with_rows(embeds, mask, rows)
        context = self.dit.encode_text(embeds, mask)
        apart = (context - context.mean(0)).detach().norm() / context.detach().norm()
        context = context.repeat_interleave(repeats, 0)
        every = mask.repeat_interleave(repeats, 0)

        image = patchify(latents, self.dit.config.patch).repeat_interleave(repeats, 0)
        tokens, noise, sigma = noised(image, recipe.mu, generator)
        grid = grid_of(latents, self.dit.config.patch)
        rope = self.dit.rope(context.shape[1], grid)
        velocity = self.dit.velocity(tokens, context, self.dit.modulate(sigma), rope, every)
        if teacher is not None and self.pupil is not None:
            lag = torch.rand(sigma.shape, generator=generator, device=generator.device).to(device)
            cleaner = (sigma - CLEANER * lag).clamp_min(0)
            tokens = torch.lerp(image, noise, cleaner[:, None, None])
            align = self.pupil.distance(teacher.see(tokens, cleaner, embeds.detach(), mask, grid))
        flow = (velocity.float() - (noise - image)).square().mean((1, 2))
        return Losses(flow, sigma, style_loss, apart, align)


def compile_blocks(recipe: Recipe, *networks: Krea2) -> None:
    """Compile the blocks, where nearly all the work is; they share what is compiled, for every length of a stream anew
    unless shapes make these many.

    A card is done with the prompts before compiling for them would pay.
    """
    torch._dynamo.config.recompile_limit = 64
    for dit in networks:
        prompts = (*dit.txtfusion.layerwise_blocks, *dit.txtfusion.refiner_blocks)
        for block in (*dit.blocks, *(() if dit.first.weight.is_cuda else prompts)):
            block.compile(dynamic=bool(recipe.shapes))


def recompute(dit: Krea2) -> None:
    """Keep each block's input only, and work the block out again on the way back: a third more work, for memory that
    grows with one block instead of all."""
    for block in dit.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def fingerprint(catalog: Catalog) -> str:
    """The hash of the data set's manifest."""
    return hashlib.sha256((catalog.folder / "manifest.toml").read_bytes()).hexdigest()


def trainee(recipe: Recipe, looks: int, device: str = "cpu") -> Trainee:
    """What a recipe trains, as its seed begins it."""
    torch.manual_seed(recipe.seed)
    made = Trainee(recipe.config, looks, align=recipe.align > 0)
    convert(made.dit.blocks, parse(recipe.products, device))
    if recipe.recompute:
        recompute(made.dit)
    return made


def taught_by(recipe: Recipe, name: str, looks: int, device: str = "cpu") -> Trainee:
    """A teacher: a run, or the package. Raises K2Error where it cannot read the references that it is shown."""
    made, weights = Trainee(recipe.config, looks).to(device), states.parent(name, RUNS)
    if recipe.references and "style.null" not in weights:
        hint = "Name a run that has one, as of pretraining, or show it none: references = 0.0."
        raise K2Error(f'The teacher "{name}" has no style encoder to read references with.', hint=hint)
    states.start(made, weights)
    return made


class Drawing(loop.Stage):
    """A stage whose transformer draws: sheets of samples show how it comes along."""

    recipe: Recipe

    def sheets(self) -> float:
        return self.recipe.sheets

    def sheet(self) -> Path:
        from model.train import samples  # its autoencoder is trained beside what is here

        return samples.main(self.recipe.name)


class Pretraining(Drawing):
    """The stage: all of the trainee learns, from the train split."""

    entry = ("losses",)

    def __init__(self, recipe: Recipe, looks: int, data: TrainingSet | None = None, device: str = "cpu"):
        self.recipe: Recipe = recipe
        self.model: Trainee = trainee(recipe, looks, device)
        for key in ("frozen", "fresh"):
            for module in getattr(recipe, key):
                if not any(f"{name}.".startswith(f"{module}.") for name in self.model.state_dict()):
                    hint = f"Like {', '.join(name for name, _ in self.model.named_children())}, or a part of them."
                    raise K2Error(f'Recipe "{recipe.name}": {key} names no module "{module}".', hint=hint)
        self.teacher: Teacher | None = None
        self.averages: Mapping[str, Tensor] = {}
        self.set = data
        if data is not None:
            self.data = fingerprint(data.catalog)
            self.model.dit.side = data.side

    def batch(self, step: int, part: int = 0) -> Batch:
        assert self.set is not None
        seen = step * self.recipe.accumulate * self.recipe.batch
        return self.set.batch(self.recipe, step, part) | {"first": seen < len(self.set.items)}

    def begin(self, averages: Mapping[str, Tensor]) -> None:
        self.averages = averages

    def taught(self, batch: Batch) -> Teacher | None:
        """The teacher as it is now, in the first epoch of a run that has one."""
        if not (self.recipe.align and batch.get("first")):
            self.teacher = None
        else:
            self.teacher = self.teacher or Teacher(self.model.dit)
            self.teacher.follow(self.averages)
        return self.teacher

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Any]]:
        teacher = self.taught(batch)
        flow, sigma, style, apart, align = self.model.losses(batch, self.recipe, teacher)
        seen = flow.detach()
        figures = {"loss": seen.mean(), "low": seen[sigma < 0.4].mean(), "high": seen[sigma > 0.7].mean()}
        figures |= {"style": style.detach(), "apart": apart}
        total = flow.mean() + self.recipe.style_loss * style
        if teacher is not None:
            total, figures = total + self.recipe.align * align, figures | {"align": align.detach()}
        return total, figures

    def rate(self, name: str) -> float:
        return float(not name.startswith(tuple(f"{module}." for module in self.recipe.frozen)))

    def pictures(self) -> int:
        return self.recipe.batch * self.recipe.repeats

    def compile(self) -> None:
        compile_blocks(self.recipe, self.model.dit)


class Run(loop.Run):
    """Pretraining under way."""

    stage: Pretraining

    def __init__(self, recipe: Recipe, looks: int, device: str = "cpu", data: TrainingSet | None = None):
        super().__init__(Pretraining(recipe, looks, data, device), RUNS / recipe.name, device)


def main(recipe: Recipe, device: str = "cpu", report: Report = print) -> Run:
    """Run a stage to its end, from where it stands."""
    data = training_set(recipe, device)
    run = Run(recipe, len(data.looks), device, data)
    report(f"{recipe.name}: from step {run.step}, {len(data.items)} pictures, {len(data.looks)} looks")
    loop.train(run, report)
    return run


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Run one stage of pretraining.")
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    main(Recipe.read(options.recipe), options.device)
