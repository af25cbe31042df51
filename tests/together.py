"""What one of several processes does: `torchrun … together.py FOLDER STEPS STAGE …`.

Losses go to FOLDER/STAGE/losses.json.

In fp32 throughout: what is compared is the mathematics, and bf16 would round differently where a sum's order differs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import nn

from model.dit import PRESETS, DiTConfig
from model.train import loop, optim, parallel, pretrain
from model.train.loop import Batch, Run, Stage

TINY = DiTConfig(width=32, heads=2, kv_heads=1, blocks=2, text_width=32, text_taps=2, text_heads=2)
RECIPE = pretrain.Recipe(
    name="together", size=64, steps=20, batch=4, repeats=2, lr=4e-3, muon_lr=4e-3, mu=0.0, preset="tiny",
    warmup_steps=1, accumulate=4, every=5, decay=0.5,
)  # fmt: skip


def generator_of(step: int, part: int) -> torch.Generator:
    """Three steps' worth of data, again and again, so that there is something to learn."""
    return torch.Generator().manual_seed(1000 * (step % 3) + part)


class Pretraining(pretrain.PretrainStage):
    """The real stage on random latents and words; two of three steps show references, and in those the style learns."""

    def batch(self, step: int, part: int = 0) -> Batch:
        generator = generator_of(step, part)
        mask = torch.ones(4, 5, dtype=torch.bool)
        mask[1, 3:] = False
        return {
            "latents": torch.randn(4, 16, 4, 4, generator=generator),
            "embeds": torch.randn(4, 5, 2, 32, generator=generator),
            "mask": mask,
            "references": torch.randn(4, 16, 4, 4, generator=generator) if step % 3 else None,
            "null": torch.tensor([True, False, False, False]),
            "looks": torch.tensor([0, 1, 2, 1]),
            "generator": generator,
        }


class Branches(Stage):
    """A stage that cannot be sharded: each process holds all of it, and some train a branch that others do not."""

    def __init__(self, recipe: pretrain.Recipe):
        torch.manual_seed(recipe.seed)
        self.recipe = recipe
        self.model = nn.ModuleDict({"one": nn.Linear(3, 2), "two": nn.Linear(3, 2), "never": nn.Linear(3, 2)})

    def batch(self, step: int, part: int = 0) -> Batch:
        return {"x": torch.randn(8, 3, generator=generator_of(step, part)), "branch": "two" if part == 3 else "one"}

    def loss(self, batch: Batch):
        return (self.model[batch["branch"]](batch["x"]) - batch["x"][:, :2].flip(1)).square().mean(), {}


def run(kind: str, folder: Path) -> Run:
    """A run of either stage, in fp32."""
    PRESETS["tiny"] = TINY
    loop.native_bf16 = optim.native_bf16 = lambda device: False
    made = Run(Pretraining(RECIPE, 3) if kind == "sharded" else Branches(RECIPE), folder)
    assert not made.bf16
    return made


def losses(made: Run, until: int) -> list[float]:
    found = []
    while made.step < until:
        found.append(made.advance(*(made.stage.batch(made.step, part) for part in made.parts))["loss"])
    return found


def main(folder: Path, steps: int, kinds: list[str]) -> None:
    parallel.join_group("cpu")
    for kind in kinds:
        made = run(kind, folder / kind)
        found = losses(made, steps // 2)
        made.save()
        found += losses(made, steps)
        if made.world.is_main:
            shares = [param.to_local().numel() for param in made.model.parameters()] if made.sharded else []
            record = {"losses": found, "held": sum(shares), "step": made.step}
            (folder / kind / "losses.json").write_text(json.dumps(record))
    parallel.exit_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
