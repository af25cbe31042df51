"""One modulation for all blocks against one per block: parameters, and loss after equal steps.

`python tests/bench/modulation.py [--seeds 3] [--steps N] [--out .cache/bench/modulation] [--smoke]`. Pretrains with
the recipe `modulation.toml` on the data set in `.data`; both kinds see the same pictures, captions and noise at every
step, with several seeds each. The result is the loss over the last tenth of the steps: the mean difference between the
kinds, compared with the spread between seeds. `--smoke` needs no data set.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev

import torch
import torch.nn.functional as F
from measure import write_toml
from products import draw_curves, toy_batch
from torch import Tensor, nn

from model.dit import Attend, DiTConfig, Krea2, SingleStreamBlock
from model.library import BUNDLED
from model.text_encoder import TextEncoder
from model.train import loop
from model.train.cost_model import parameters, unshared_parameters
from model.train.data import DATA, Catalog
from model.train.pretrain import PretrainStage, Recipe
from model.train.training_set import TrainingSet

RECIPE = Path(__file__).with_name("modulation.toml")


class OwnBlock(SingleStreamBlock):
    """Projects the time embedding with its own matrix; the block's own vector becomes its bias."""

    def __init__(self, config: DiTConfig):
        super().__init__(config)
        self.own = nn.Sequential(nn.GELU("tanh"), nn.Linear(config.width, 6 * config.width, bias=False))

    def forward(
        self, x: Tensor, time_mod: Tensor, rope: Tensor, mask: Tensor | None, attend: Attend | None = None
    ) -> Tensor:
        """time_mod [B, 1, 6D]: the time embedding in its first D numbers."""
        return super().forward(x, self.own(time_mod[..., : x.shape[-1]]), rope, mask, attend)


class OwnModulation(Krea2):
    """The same network with modulation as in DiT (arXiv 2212.09748): a projection in every block."""

    def __init__(self, config: DiTConfig):
        super().__init__(config)
        self.blocks = nn.ModuleList(OwnBlock(config) for _ in range(config.blocks))
        self.tproj = nn.Identity()

    def modulate(self, sigmas: Tensor) -> Tensor:
        time = super().modulate(sigmas)[..., -self.config.width :]
        return torch.cat((F.pad(time, (0, 5 * self.config.width)), time), -1)

    def initialise(self) -> None:
        width = self.config.width
        self.tproj = nn.Sequential(nn.GELU("tanh"), nn.Linear(width, 6 * width))  # the base class initialises it
        super().initialise()
        self.tproj = nn.Identity()
        for block in self.blocks:
            nn.init.normal_(block.own[1].weight, std=0.1 * width**-0.5)


def losses(own: bool, recipe: Recipe, data: TrainingSet | None, device: str) -> list[float]:
    """The loss of every step of a run."""
    stage = PretrainStage(recipe, looks=200, data=data, device=device)
    if own:
        torch.manual_seed(recipe.seed)
        stage.model.dit = OwnModulation(recipe.config)
        stage.model.dit.initialise()
    with tempfile.TemporaryDirectory() as folder:
        run = loop.Run(stage, Path(folder), device)
        return [run.advance(stage.batch(step) if data else toy_batch(step))["loss"] for step in range(recipe.steps)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--out", type=Path, default=Path(".cache/bench/modulation"))
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    recipe = Recipe.read(RECIPE)
    if options.smoke:
        recipe = replace(recipe, steps=4, network={"width": 64, "heads": 1, "kv_heads": 1, "blocks": 1})
    elif options.steps:
        recipe = replace(recipe, steps=options.steps)
    text = TextEncoder.load(BUNDLED / "mini-text.safetensors", device)
    data = None if options.smoke else TrainingSet(Catalog(DATA), text, recipe)

    counts = {"shared": parameters(recipe.config).total, "own": unshared_parameters(recipe.config)}
    tail, curves, ends = max(1, recipe.steps // 10), {}, {"shared": [], "own": []}
    for seed in range(1, options.seeds + 1):
        for kind, found in ends.items():
            curve = losses(kind == "own", replace(recipe, seed=seed), data, device)
            curves[f"{kind}, seed {seed}"] = curve
            found.append(mean(curve[-tail:]))
            print(f"{kind:<8}seed {seed}: loss over the last {tail} steps {found[-1]:.4f}", flush=True)
    apart = [own - shared for own, shared in zip(ends["own"], ends["shared"], strict=True)]
    noise = stdev(ends["shared"]) if options.seeds > 1 else float("nan")
    print(f"parameters {counts['shared']:,} and {counts['own']:,}: {1 - counts['shared'] / counts['own']:.0%} saved")
    print(f"own − shared {mean(apart):+.4f}; spread between seeds {noise:.4f}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    draw_curves(options.out.with_suffix(".png"), curves)
    write_toml(
        options.out.with_suffix(".toml"), parameters=counts, ends=ends, apart=apart, noise=noise,
        curve=curves, smoke=options.smoke,
    )  # fmt: skip


if __name__ == "__main__":
    main()
