"""The Turbo stage: a recipe's `method` says which half of `model/train/distill.py` it runs.

The teacher is a frozen Raw checkpoint with guidance; the student starts from `init` and never sees guidance again.
Prompts are those of the train split, with and without style rows, whose strengths are drawn from the range open to
users, so that the student keeps the teacher's response to every strength.

In a trajectory step the fake score learns together with the student, from two points of the walk at five times the
rate, where others take five steps of it per student step: the walk is the expensive part, and serves both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from model.dit import Krea2
from model.errors import K2Error
from model.latents import patchify, token_grid
from model.sampler import apply_guidance, shifted_sigmas
from model.style import StyleEncoder
from model.train import loop, pretrain
from model.train.data import fingerprint
from model.train.distill import Draws, fake_loss, follow, student_loss
from model.train.loop import Batch, Report
from model.train.pretrain import TrainedModel
from model.train.recipe import check_at_least, check_positive, check_share, reject
from model.train.rollout import add_noise, append_rows, conditioned_velocity
from model.train.states import RUNS
from model.train.training_set import Sampling, TrainingSet, load_training_set

METHODS = ("guidance", "trajectory")


@dataclass(frozen=True, kw_only=True)
class Recipe(pretrain.Recipe):
    """The recipe of one half of the distillation."""

    stage: str = "turbo"
    method: str
    teacher: str = "box"  # a run, or the bundled Raw weights
    guidance: float = 2.5  # of the teacher, which the student absorbs
    walk_steps: int = 8  # of the student
    walk_mu: float = 0.5  # shift of their noise levels
    fakes: int = 2  # points of the walk that the fake score learns from, per point for the student
    fake_rate: float = 5.0  # learning rate of the fake score, relative to the student's
    strengths: tuple[float, float] = (-1.0, 1.5)  # range for style rows, if there are any ...
    untouched: float = 0.5  # ... except this share of them, which stays at 1, as nearly every style does
    repeats: int = 1

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.walk_steps, 0.0, self.walk_mu)

    def __post_init__(self) -> None:
        super().__post_init__()
        reject(self, "style_loss", "frozen", "align", "recompute", "products", "repeats")
        check_at_least(self, 1, "walk_steps", "fakes")
        check_at_least(self, 0, "guidance")
        check_positive(self, "fake_rate")
        check_share(self, "untouched")
        if self.method not in METHODS:
            raise K2Error(
                f'Recipe "{self.name}": there is no method "{self.method}".', hint=f"Choose {' or '.join(METHODS)}."
            )
        if self.method == "guidance":
            reject(self, "fakes", "fake_rate")


class StudentAndFake(nn.Module):
    """The student, under the transformer's usual name, and the fake score if there is one."""

    def __init__(self, recipe: Recipe):
        super().__init__()
        self.dit = Krea2(recipe.config)
        self.fake = Krea2(recipe.config) if recipe.method == "trajectory" else None


class TurboStage(pretrain.RenderingStage):
    """Distillation of a frozen teacher into a student that needs few steps and no guidance."""

    recipe: Recipe
    model: StudentAndFake

    def __init__(self, recipe: Recipe, data: TrainingSet | None, teacher: TrainedModel, empty: Tensor):
        """`empty` [1, T, N, E]: text features of the empty prompt. Raises if the teacher has another shape."""
        torch.manual_seed(recipe.seed)
        self.recipe, self.set, self.teacher, self.empty = recipe, data, teacher.eval(), empty
        self.frozen = teacher.dit
        self.model = StudentAndFake(recipe)
        for network in (self.model.dit, self.model.fake):
            if network is not None:
                network.load_state_dict(teacher.dit.state_dict())
        if data is not None:
            self.data = fingerprint(data.catalog)
            for network in (self.model.dit, self.model.fake, teacher.dit):
                if network is not None:
                    network.side = data.side

    def batch(self, step: int, part: int = 0) -> Batch:
        assert self.set is not None
        return self.set.batch(self.recipe, step, part)

    def rate(self, name: str) -> float:
        return self.recipe.fake_rate if name.startswith("fake.") else 1.0

    def compile(self) -> None:
        networks = (self.model.dit, self.model.fake, self.teacher.dit)
        pretrain.compile_blocks(self.recipe, *(network for network in networks if network is not None))

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Any]]:
        generator, device = batch["generator"], self.empty.device
        tensors = {k: v.to(device) for k, v in batch.items() if isinstance(v, Tensor)}
        patch = self.recipe.config.patch
        image, grid = patchify(tensors["latents"], patch), token_grid(tensors["latents"], patch)
        embeds, mask = self.prompts(tensors, generator)

        student = conditioned_velocity(self.model.dit, embeds, mask, grid)
        with torch.no_grad():
            with_prompt = conditioned_velocity(self.teacher.dit, embeds, mask, grid)
            without = conditioned_velocity(self.teacher.dit, self.empty, None, grid)

        def teacher(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            return with_prompt(x, t), without(x, t)

        if self.model.fake is None:
            x, _, sigma = add_noise(image, self.recipe.mu, generator)
            with torch.no_grad():
                target = apply_guidance(*teacher(x, sigma), self.recipe.guidance)
            error = (student(x, sigma) - target).square().mean()
            return error, {"share": (error / target.square().mean()).detach()}

        noise = torch.randn(image.shape, generator=generator, device=generator.device).to(device)
        times = shifted_sigmas(self.recipe.walk_steps, self.recipe.walk_mu)
        fake = conditioned_velocity(self.model.fake, embeds, mask, grid)
        trajectory = follow(student, noise, times)
        torch.clear_autocast_cache()  # else weights first cast without gradient stay without
        draws = [Draws.draw(self.recipe.walk_steps, noise, generator) for _ in range(1 + self.recipe.fakes)]
        fake_term = torch.cat([fake_loss(fake, trajectory, chance) for chance in draws[1:]]).mean()
        student_term = student_loss(student, fake, teacher, trajectory, draws[0], self.recipe.guidance).mean()
        endpoints = trajectory.points[-1] - times[-2] * trajectory.velocities[-1]
        return student_term + fake_term, {
            "move": student_term.detach(),
            "fake": fake_term.detach(),
            "spread": endpoints.std() / image.std(),
        }

    @torch.no_grad()
    def prompts(self, tensors: dict[str, Tensor], generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Text features followed by style rows, each at its own strength, and the mask."""
        embeds, mask = tensors["embeds"], tensors["mask"]
        references = tensors.get("references")
        if references is None:
            return embeds, mask
        style: StyleEncoder = self.teacher.style
        low, high = self.recipe.strengths
        rng_options: dict[str, Any] = {"generator": generator, "device": generator.device}
        strength = low + (high - low) * torch.rand(len(embeds), 1, 1, 1, **rng_options)
        strength = torch.where(torch.rand(strength.shape, **rng_options) < self.recipe.untouched, 1.0, strength)
        rows = torch.lerp(style.null, style(references)[0].float(), strength.to(embeds.device))
        return append_rows(embeds, mask, rows)


def main(recipe: Recipe, device: str = "cpu", report: Report = print) -> loop.Run:
    """Run a stage to its end from where it stands."""
    data = load_training_set(recipe, device)
    teacher = pretrain.load_teacher(recipe, recipe.teacher, len(data.looks), device)
    run = loop.Run(TurboStage(recipe, data, teacher, data.text.encode([""])[0]), RUNS / recipe.name, device)
    report(f"{recipe.name}: from step {run.step}, {recipe.method}")
    return loop.train(run, report)
