"""How the time for pictures grows with their size, number, steps and prompt, compared with the operations it takes.

`python tests/bench/growth.py [--model mini] [--rounds 5] [--out .cache/bench/growth] [--smoke]`. Each point is a
median; the points of a panel are measured in turns. The operations are those of the transformer, of the text encoder,
and, as counted by PyTorch, of the autoencoder. Nothing should grow faster than its operations; what grows more slowly
has a fixed cost that dominates at the small end.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import cache
from pathlib import Path
from statistics import median

import torch
from measure import Panel, draw_growth, interleaved, stream_operations, tower_operations, write_toml
from torch.utils.flop_counter import FlopCounterMode

from model.pipeline import Pipeline
from model.spec import RenderSpec
from model.text_encoder import PREFIX_TOKENS

WORDS = "a red fox curled up asleep under a tall green tree at night in the snow beside a small wooden house " * 8
AXES = {  # axis: its points, and those of a smoke test
    "side in pixels": ((256, 384, 512, 768, 1024), (64, 96)),
    "pictures at once": ((1, 2, 4, 8, 16, 32), (1, 2)),
    "steps": ((4, 8, 16, 32), (1, 2)),
    "words of the prompt": ((2, 8, 32, 128), (2, 8)),
}
SLACK = 1.1  # factor by which a point may outgrow its operations from the point before: clocks are not exact


def specs_at(axis: str, x: int, smoke: bool) -> list[RenderSpec]:
    """The pictures of one point, each with its own seed; guidance is off so that there is only one prompt length."""
    small = 64 if smoke else 128
    base = RenderSpec("a red fox", small, small, steps=1 if smoke else 4, guidance=0.0)
    if axis == "side in pixels":
        return [replace(base, width=x, height=x)]
    if axis == "pictures at once":
        return [replace(base, seed=seed) for seed in range(x)]
    if axis == "steps":
        return [replace(base, steps=x)]
    return [replace(base, prompt=" ".join(WORDS.split()[:x]))]


class Growth:
    def __init__(self, pipeline: Pipeline):
        self.pipeline = pipeline

    def render(self, specs: list[RenderSpec]) -> None:
        self.pipeline.forget()  # otherwise only the first round would encode the prompts
        self.pipeline.render(specs)

    def operations(self, specs: list[RenderSpec]) -> float:
        total, tower = 0.0, self.pipeline.text.tower.config
        for prompt in {spec.prompt for spec in specs}:
            total += tower_operations(tower, self.prompt_tokens(prompt), max(tower.taps), PREFIX_TOKENS)
        for spec in map(self.pipeline.resolve, specs):
            assert spec.width and spec.height and spec.steps
            image = spec.width * spec.height // (self.pipeline.vae.factor * self.pipeline.dit.config.patch) ** 2
            total += spec.steps * stream_operations(self.pipeline.dit.config, self.prompt_tokens(spec.prompt), image)
            total += self.decode_operations(spec.width, spec.height)
        return total

    def prompt_tokens(self, prompt: str) -> int:
        return len(self.pipeline.text.token_ids(prompt))

    @cache  # noqa: B019, the only instance lives as long as the program
    def decode_operations(self, width: int, height: int) -> float:
        shape = (1, self.pipeline.dit.config.channels, *(side // self.pipeline.vae.factor for side in (height, width)))
        latents = torch.zeros(shape, device=self.pipeline.device, dtype=self.pipeline.dtype)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            self.pipeline.vae.decode(latents)
        return counter.get_total_flops()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(".cache/bench/growth"))
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()

    bench, panels, tables = Growth(Pipeline.load(options.model, filters=())), [], []
    for axis, (full, toy) in AXES.items():
        xs = toy if options.smoke else full
        points = [specs_at(axis, x, options.smoke) for x in xs]
        times = interleaved([lambda p=p: bench.render(p) for p in points], 1 if options.smoke else options.rounds)
        panel = Panel(axis, list(map(float, xs)), [median(each) for each in times], list(map(bench.operations, points)))
        panels.append(panel)
        grown = [
            (b / a) / (after / before)
            for a, b, before, after in zip(
                panel.measured, panel.measured[1:], panel.operations, panel.operations[1:], strict=False
            )
        ]
        verdict = "faster than its operations" if max(grown) > SLACK else "no faster than its operations"
        print(f"{axis:<22}" + "  ".join(f"{x}: {s:.3g} s" for x, s in zip(xs, panel.measured, strict=True)))
        print(f"{'':<22}grows {verdict} (at most {max(grown):.2f} of them from point to point)", flush=True)
        tables.append({**vars(panel), "grown": grown})
    path = options.out
    draw_growth(path.with_suffix(".png"), f"{options.model} on {bench.pipeline.device}: seconds, log by log", panels)
    write_toml(path.with_suffix(".toml"), panel=tables, smoke=options.smoke, model=options.model)
    print(f"written to {path.with_suffix('.toml')} and .png")


if __name__ == "__main__":
    main()
