"""What a training step draws: pictures' latents, captions as text-encoder features, style references.

And the recipe for it: the keys shared by all stages that train the transformer on the data set.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.dit import PRESETS, DiTConfig
from model.errors import K2Error
from model.library import BUNDLED
from model.style import STYLE_ROWS, destroy_content
from model.text_encoder import TextEncoder
from model.train import recipe as recipes
from model.train.data import DATA, Catalog, Item, latents_file, stable_seed
from model.train.looks import DRAWINGS
from model.train.loop import Batch
from model.train.recipe import check_at_least, check_known, check_share
from model.train.shapes import Shape, indices_in_shape
from model.train.strangers import CaptionWording
from model.train.two_subjects import pictures_of_two

MAX_CAPTIONS = 20_000  # captions whose features are kept: most of a gigabyte; ten times as many on a GPU
UNCAPTIONED = 0.1  # share of the pictures shown without their caption, for guidance
TOKEN_MULTIPLE = 8  # captions are encoded in multiples of so many tokens


class Sampling(NamedTuple):
    """Sampler settings."""

    steps: int
    guidance: float
    mu: float | None = None  # shift of the noise levels; None: Raw's own for the picture's size


@dataclass(frozen=True, kw_only=True)
class Recipe(recipes.Recipe):
    """A run that learns from the data set: the recipe of pretraining, which other stages extend."""

    size: int  # px
    batch: int  # pictures per step
    repeats: int  # noise levels for each of them: the prompt's part is computed once for all
    mu: float  # shift of the training timesteps, sigma = sigmoid(mu + n)
    preset: str = "mini"
    network: dict[str, int] = field(default_factory=dict)  # differences from the preset, like width or blocks
    references: float = 0.5  # share of the steps that show a style reference
    white: float = 3.0  # frequency of plain pictures on white relative to media: subjects are learned there first
    grounds: float = 1.7  # the same for plain pictures on other grounds
    later: float = 0.0  # frequency of subjects marked `later` relative to the others; 0 leaves them out
    null: float = 0.1  # share of the pictures with style rows whose rows say nothing
    said: float = 0.5  # share of the others with style rows whose caption names the look too
    unasked: tuple[str, ...] = ()  # drawing sets that bare words may mean, without a medium; empty: any look
    forms: tuple[float, float, float] = (0.5, 0.4, 0.1)  # shares of short, medium and long captions
    reworded: float = 0.0  # share of the captions said in other words
    strangers: float = 0.0  # share of the captions wrapped in strange words
    style_loss: float = 0.05
    frozen: tuple[str, ...] = ()  # modules that stay unchanged, "style"
    align: float = 0.0  # weight of self-representation alignment, in the first epoch only
    shapes: tuple[str, ...] = ()  # other sizes of pictures, "320x192" ...
    shaped: float = 0.5  # ... and the share of the steps that use one of them, each as often
    two: float = 0.0  # share of the square pictures that show two subjects
    sheets: float = 0.0  # minutes between sheets of samples, drawn as runs are saved; 0 draws none
    recompute: bool = False  # recompute blocks in the backward pass instead of keeping them: less memory, more work
    rows: int = 8  # prompts are padded to make a stream a multiple of this: fewer lengths, and less to compile
    products: str = "wide"  # of the blocks' matrices: wide, or in 8 bits, by a name of `model/train/products.py`

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 1, "batch", "repeats", "rows")
        check_at_least(self, 0, "white", "grounds", "later", "style_loss", "align", "sheets")
        check_share(self, "references", "null", "said", "reworded", "strangers", "shaped", "two")
        check_known(self, self.unasked, DRAWINGS, "drawing set")
        if min(self.forms) < 0 or not math.isclose(sum(self.forms), 1, abs_tol=1e-8):
            raise K2Error(f'Recipe "{self.name}": forms must be three shares that sum to 1.')

    @property
    def config(self) -> DiTConfig:
        """The network's configuration. Raises K2Error if there is no such network."""
        where, known = f'Recipe "{self.name}"', [each.name for each in fields(DiTConfig)]
        if self.preset not in PRESETS:
            raise K2Error(f'{where}: there is no preset "{self.preset}".', hint=f"Choose one of {', '.join(PRESETS)}.")
        if unknown := [key for key in self.network if key not in known]:
            raise K2Error(f'{where}: a network has no "{unknown[0]}".', hint=f"It has {', '.join(known)}.")
        try:
            return replace(PRESETS[self.preset], **self.network)
        except ValueError as error:
            raise K2Error(f"{where}: there is no such network: {error}.") from None

    @property
    def sampling(self) -> Sampling:
        """Sampler settings of what it trains."""
        return Sampling(steps=16, guidance=2.5)

    def weight(self, item: Item, later: bool) -> float:
        """How often a picture is drawn, relative to one with a medium; `later`: whether its subject joined late."""
        share = self.later if later else 1.0
        if item.look.medium != "plain":
            return share
        return share * (self.white if item.look.ground == "white" else self.grounds)

    def form(self, item: Item, form: str) -> str:
        """The form of a caption that alone names the look: a look that bare words cannot mean is always named."""
        may_be_bare = not self.unasked or (item.look.medium == "plain" and item.pair.drawing in self.unasked)
        return form if may_be_bare or form != "short" else "medium"


class TrainingSet:
    """Everything that a step draws from: latents, captions and style references of the train split.

    All of it is on the network's device, random generators too: a step transfers nothing but its captions.
    """

    def __init__(self, catalog: Catalog, text: TextEncoder, recipe: Recipe):
        self.catalog = catalog
        single = catalog.items("train")
        pairs = pictures_of_two(catalog) if recipe.two else []
        self.items: list[Item] = [*single, *pairs]
        self.text, self.rows = text, recipe.rows
        self.wording = CaptionWording(catalog.subjects, second_things=not pairs)
        self.device = text.prefix_ids.device
        self.max_cached, self.encode_batch = (
            (MAX_CAPTIONS, 16) if self.device.type == "cpu" else (10 * MAX_CAPTIONS, 64)
        )
        latents = read_latents(catalog.folder, recipe.size, len(single))
        if pairs:
            latents = np.concatenate((latents, read_latents(catalog.folder, recipe.size, len(pairs), two=True)))
        self.latents = torch.from_numpy(latents).to(self.device)
        self.cells = self.latents.shape[-1]  # along a side
        self.side = self.cells // recipe.config.patch  # of the square, in tokens: other shapes are centred on it
        self.shape_subsets = [self._read_shape(single, Shape.parse(shape)) for shape in recipe.shapes]
        self.features: dict[str, Tensor] = {}
        self.embed_lock = Lock()  # batches are made in a thread of their own while a step validates in another
        self.by_look: dict[Any, list[int]] = defaultdict(list)
        for index, item in enumerate(single):  # style references show one subject
            self.by_look[item.look].append(index)
        self.looks = list(self.by_look)
        self.look_index = {look: i for i, look in enumerate(self.looks)}
        subjects = catalog.subjects
        weights = np.array([recipe.weight(item, subjects[item.pair.subject].later) for item in self.items])
        shares = [(weights[: len(single)], 1 - recipe.two), (weights[len(single) :], recipe.two)]
        self.weights = np.concatenate([share * part / part.sum() for part, share in shares if len(part)])

    def _read_shape(self, items: Sequence[Item], shape: Shape) -> ShapeSubset:
        """The pictures that come in a shape."""
        indices = indices_in_shape(items, shape)
        latents = read_latents(self.catalog.folder, shape, len(indices))
        return ShapeSubset(np.array(indices), torch.from_numpy(latents).to(self.device))

    def draw_pictures(self, recipe: Recipe, step: int, rng: np.random.Generator) -> tuple[NDArray[np.integer], Tensor]:
        """The pictures of a batch, all of one size: their indices and their latents [B, C, h, w]."""
        step_rng = np.random.default_rng(stable_seed(recipe.seed, recipe.name, step, "shape"))  # per step, not per part
        if not recipe.shapes or step_rng.random() >= recipe.shaped:
            chosen = rng.choice(len(self.items), recipe.batch, p=self.weights)
            return chosen, self.latents[chosen].float()
        indices, latents = self.shape_subsets[int(step_rng.integers(len(self.shape_subsets)))]
        odds = self.weights[indices]
        places = rng.choice(len(indices), recipe.batch, p=odds / odds.sum())
        return indices[places], latents[places].float()

    def embed(self, captions: list[str], extra_rows: int = 0) -> tuple[Tensor, Tensor]:
        """Right-padded text features [B, T, N, E] and their mask [B, T]; repeated captions are encoded once.

        T plus `extra_rows` is a multiple of the recipe's `rows`.
        """
        with self.embed_lock:
            self._encode(caption for caption in set(captions) if caption not in self.features)
            rows = [self.features[caption] for caption in captions]
            padded = pad_features(rows, -(-(max(map(len, rows)) + extra_rows) // self.rows) * self.rows - extra_rows)
            if self.device.type == "cuda":  # each thread has its own stream, and both use the features
                torch.cuda.current_stream(self.device).synchronize()
            for caption in list(islice(self.features, max(0, len(self.features) - self.max_cached))):
                del self.features[caption]
        return padded

    def _encode(self, captions: Iterable[str]) -> None:
        """Add the features of captions that have none yet.

        A caption's features are the same bits in any batch, so that a resumed run sees what it would have seen: they
        are computed in shapes that depend on its length alone, in full batches of captions about as long.
        """
        alike = defaultdict(list)
        for caption in sorted(captions):
            alike[-(-len(self.text.token_ids(caption)) // TOKEN_MULTIPLE)].append(caption)
        for new in alike.values():
            for start in range(0, len(new), self.encode_batch):
                some = new[start : start + self.encode_batch]
                full = some + some[:1] * (self.encode_batch - len(some))
                embeds, mask = self.text.encode(full, batch_size=self.encode_batch, pad_to_multiple_of=TOKEN_MULTIPLE)
                for caption, rows, length in zip(full, embeds.half(), mask.sum(1).tolist(), strict=True):
                    self.features[caption] = rows[:length].clone()

    def batch(self, recipe: Recipe, step: int, part: int = 0) -> Batch:
        """The pictures, prompts and references of one step or one of its parts."""
        rng = np.random.default_rng(stable_seed(recipe.seed, recipe.name, step, *([part] if part else [])))
        generator = torch.Generator(self.device).manual_seed(int(rng.integers(2**62)))
        chosen, latents = self.draw_pictures(recipe, step, rng)
        with_reference = rng.random() < recipe.references
        if recipe.accumulate > 1:  # parts may be on several processes, which must agree on references
            shared = np.random.default_rng(stable_seed(recipe.seed, recipe.name, step, "references"))
            with_reference = shared.random() < recipe.references
        form = str(rng.choice(("short", "medium", "long"), p=recipe.forms))
        null = rng.random(recipe.batch) < recipe.null
        captions = []
        for index, silent in zip(chosen, null, strict=True):
            # rows that say nothing come with the captions used without rows, so that both mean the same
            style = not with_reference or silent or rng.random() < recipe.said
            item = self.items[index]
            caption = self.catalog.caption(item, rng, recipe.form(item, form) if style else form, style)
            if recipe.reworded or recipe.strangers:
                caption = self.wording.say(caption, item.pair.subject, recipe.reworded, recipe.strangers, rng)
            captions.append("" if rng.random() < UNCAPTIONED else caption)
        image_tokens = latents[0, 0].numel() // recipe.config.patch**2
        embeds, mask = self.embed(captions, image_tokens + (STYLE_ROWS if with_reference else 0))
        references = None
        if with_reference:
            others = [self._same_look(index, rng) for index in chosen]
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

    def _same_look(self, index: int, rng: np.random.Generator) -> int:
        """A picture of another subject in the same look."""
        item = self.items[index]
        peers = self.by_look[item.look]
        start = int(rng.integers(len(peers)))
        in_turn = (*peers[start:], *peers[:start])
        return next((each for each in in_turn if self.items[each].pair.subject not in item.subjects), in_turn[0])


class ShapeSubset(NamedTuple):
    """The pictures of the train split that come in a shape."""

    indices: NDArray[np.integer]  # among all pictures
    latents: Tensor  # float16 [pictures, C, h, w]


def pad_features(rows: Sequence[Tensor], length: int) -> tuple[Tensor, Tensor]:
    """Text features of several lengths, [T, N, E] each -> fp32 [B, length, N, E], zeros at the end, and their mask."""
    device = rows[0].device
    real = torch.arange(length) < torch.tensor([len(each) for each in rows])[:, None]
    padded = torch.zeros(real.numel(), *rows[0].shape[1:], device=device)
    padded[real.flatten().nonzero()[:, 0].to(device)] = torch.cat(list(rows)).float()
    return padded.unflatten(0, real.shape), real.to(device)


def load_training_set(recipe: Recipe, device: str) -> TrainingSet:
    """The data set with the bundled text encoder, as a recipe draws from them."""
    return TrainingSet(Catalog(DATA), TextEncoder.load(BUNDLED / "mini-text.safetensors", device), recipe)


def read_latents(folder: Path, size: int | Shape, count: int, two: bool = False) -> NDArray[np.float16]:
    """The train split's latents at a size, or those of the pictures of two subjects: float16 [count, C, H/f, W/f].

    Raises K2Error if they are missing or too few.
    """
    kind, flag = (" of two subjects", " --two") if two else ("", "")
    path, hint = latents_file(folder, size, two), f"Encode them with: python -m model.train.encode {size}{flag}"
    if not path.exists():
        raise K2Error(f"There are no latents of {size} px{kind} by the bundled autoencoder in {folder}.", hint=hint)
    latents = np.load(path)
    if len(latents) != count:
        raise K2Error(f"{path} holds {len(latents)} pictures, but the data set has {count}.", hint=hint)
    return latents
