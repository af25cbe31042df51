"""Pretraining: the transformer and the style encoder together, from words and reference pictures to latents.

Every step's pictures, captions, references and noise depend only on the recipe's seed and the step's number.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.dit import DiTConfig, Krea2
from model.errors import K2Error
from model.latents import patchify, token_grid
from model.style import StyleConfig, StyleEncoder
from model.train import loop, samples, states
from model.train.alignment import MAX_SIGMA_GAP, AlignmentHead, Teacher
from model.train.data import fingerprint
from model.train.loop import Batch, Report
from model.train.products import parse_products, use_8_bit_products
from model.train.rollout import add_noise, append_rows
from model.train.states import RUNS
from model.train.training_set import Recipe, TrainingSet, load_training_set


class Losses(NamedTuple):
    """The losses of a step."""

    flow: Tensor  # [B·R] the flow-matching loss of each noised picture
    sigma: Tensor  # [B·R] their noise levels
    style: Tensor  # of telling looks apart by the style vector
    apart: Tensor  # how far the prompts' contexts differ, relative to their size: near zero, words have no effect
    align: Tensor  # distance of an early block's view from the teacher's


class TrainedModel(nn.Module):
    """What is trained together: transformer, style encoder, and a head that tells looks apart by the style vector.

    align: with a head that predicts a teacher's view
    """

    def __init__(self, config: DiTConfig, looks: int, align: bool = False):
        super().__init__()
        self.dit = Krea2(config)
        self.style = StyleEncoder(StyleConfig(text_width=config.text_width, text_taps=config.text_taps))
        self.look_head = nn.Linear(self.style.config.vector, looks)
        self.dit.initialise()
        self.style.initialise()
        self.pupil = AlignmentHead(self.dit) if align else None

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
            embeds, mask = append_rows(embeds, mask, rows)
        context = self.dit.encode_text(embeds, mask)
        apart = (context - context.mean(0)).detach().norm() / context.detach().norm()
        context = context.repeat_interleave(repeats, 0)
        repeated_mask = mask.repeat_interleave(repeats, 0)

        image = patchify(latents, self.dit.config.patch).repeat_interleave(repeats, 0)
        tokens, noise, sigma = add_noise(image, recipe.mu, generator)
        grid = token_grid(latents, self.dit.config.patch)
        rope = self.dit.rope(context.shape[1], grid)
        velocity = self.dit.velocity(tokens, context, self.dit.modulate(sigma), rope, repeated_mask)
        if teacher is not None and self.pupil is not None:
            lag = torch.rand(sigma.shape, generator=generator, device=generator.device).to(device)
            cleaner = (sigma - MAX_SIGMA_GAP * lag).clamp_min(0)
            tokens = torch.lerp(image, noise, cleaner[:, None, None])
            align = self.pupil.distance(teacher.features(tokens, cleaner, embeds.detach(), mask, grid))
        flow = (velocity.float() - (noise - image)).square().mean((1, 2))
        return Losses(flow, sigma, style_loss, apart, align)


def compile_blocks(recipe: Recipe, *networks: Krea2) -> None:
    """Compile the blocks, where nearly all the work is. They share the compiled code, which is built for every length
    of a stream, unless shapes make these many.

    Blocks for prompts are not compiled on a GPU: they run too fast there for it to pay.
    """
    torch._dynamo.config.recompile_limit = 64
    for dit in networks:
        prompts = (*dit.txtfusion.layerwise_blocks, *dit.txtfusion.refiner_blocks)
        for block in (*dit.blocks, *(() if dit.first.weight.is_cuda else prompts)):
            block.compile(dynamic=bool(recipe.shapes))


def checkpoint_blocks(dit: Krea2) -> None:
    """Keep only each block's input, and recompute the block in the backward pass: a third more work, but memory grows
    with one block instead of all."""
    for block in dit.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def build_model(recipe: Recipe, looks: int, device: str = "cpu") -> TrainedModel:
    """What a recipe trains, initialised by its seed."""
    torch.manual_seed(recipe.seed)
    model = TrainedModel(recipe.config, looks, align=recipe.align > 0)
    use_8_bit_products(model.dit.blocks, parse_products(recipe.products, device))
    if recipe.recompute:
        checkpoint_blocks(model.dit)
    return model


def load_teacher(recipe: Recipe, name: str, looks: int, device: str = "cpu") -> TrainedModel:
    """A teacher: a run or the bundled weights. Raises K2Error if it cannot read the references that it is shown."""
    model, weights = TrainedModel(recipe.config, looks).to(device), states.parent_weights(name, RUNS)
    if recipe.references and "style.null" not in weights:
        hint = "Name a run that has one, such as pretraining, or show no references: references = 0.0."
        raise K2Error(f'The teacher "{name}" has no style encoder to read references with.', hint=hint)
    states.init_from(model, weights)
    return model


class RenderingStage(loop.Stage):
    """A stage whose transformer, the model's `dit`, draws: sheets of samples show its progress."""

    recipe: Recipe

    def pictures(self) -> float:
        return self.recipe.batch * self.recipe.repeats

    def sheets(self) -> float:
        return self.recipe.sheets

    def sheet(self) -> Path:
        return samples.main(self.recipe.name, str(self.model.get_parameter("dit.first.weight").device))


class PretrainStage(RenderingStage):
    """The stage: the whole trainee learns from the train split."""

    entry = ("losses",)

    def __init__(self, recipe: Recipe, looks: int, data: TrainingSet | None = None, device: str = "cpu"):
        self.recipe: Recipe = recipe
        self.model: TrainedModel = build_model(recipe, looks, device)
        states.check_modules(self.model, recipe.name, "frozen", recipe.frozen)
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

    def current_teacher(self, batch: Batch) -> Teacher | None:
        """The current teacher, in the first epoch of a run that has one."""
        if not (self.recipe.align and batch.get("first")):
            self.teacher = None
        elif self.teacher is None:
            self.teacher = Teacher(self.model.dit)
            self.teacher.update(self.averages)
        return self.teacher

    def after(self, step: int) -> None:
        if self.teacher is not None:
            self.teacher.update(self.averages)

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Any]]:
        teacher = self.current_teacher(batch)
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

    def compile(self) -> None:
        compile_blocks(self.recipe, self.model.dit)


def main(recipe: Recipe, device: str = "cpu", report: Report = print) -> loop.Run:
    """Run a stage to its end from where it stands."""
    data = load_training_set(recipe, device)
    run = loop.Run(PretrainStage(recipe, len(data.looks), data, device), RUNS / recipe.name, device)
    report(f"{recipe.name}: from step {run.step}, {len(data.items)} pictures, {len(data.looks)} looks")
    loop.train(run, report)
    return run
