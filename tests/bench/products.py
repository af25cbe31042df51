"""8-bit products in training: seconds per step against bf16, and the loss curves in one plot.

`python tests/bench/products.py [--rounds 5] [--steps 500] [--batch 32] [--blocks 8] [--compile] [--smoke]`.
A step is two blocks of the transformer, forward, backward and AdamW, on 4,096 tokens; bf16 is autocast as in training
(fp32 if the processor has no bf16). The curves are pretraining at 64 px from one seed on the data set in `.data`, made
by `python -m model.train.data` and `python -m model.train.encode 64`; `--smoke` uses a toy that needs none. Above a
ratio of 1, 8-bit products pay off; below, a recipe should leave `products` at "wide".
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import mean

import torch
from measure import HEAD, INK, Row, draw_bars, interleaved, make_row, write_toml
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from model.dit import PRESETS, DiTConfig, Krea2, SingleStreamBlock
from model.library import BUNDLED
from model.plan import native_bf16
from model.text_encoder import TextEncoder
from model.train import loop
from model.train.data import DATA, Catalog
from model.train.pretrain import PretrainStage, Recipe
from model.train.products import PRODUCT_NAMES, WIDE, parse_products, supports_fp8, use_8_bit_products
from model.train.training_set import TrainingSet

WIDTHS, BLOCKS, TOKENS = (384, 1024, 2048), 2, 4096  # as many tokens as in a step of pretraining
AIM = 1.15  # from width 2048 up
COLOURS = {WIDE: "#1d1d1f", "int8-tensorwise": "#c9722f", "int8-rowwise": "#2f6f5e", "fp8-tensorwise": "#8250df"}
SMOOTHING_STEPS = 25  # steps averaged per point of a curve


def make_step(config: DiTConfig, name: str, tokens: int, device: str, compiled: bool) -> Callable[[], None]:
    """A training step of a stack of blocks, on four pictures with `tokens` tokens in total."""
    torch.manual_seed(0)
    blocks = nn.ModuleList(SingleStreamBlock(config) for _ in range(BLOCKS)).to(device)
    use_8_bit_products(blocks, parse_products(name, device))
    if compiled:
        for block in blocks:
            block.compile(dynamic=False)
    optimiser = torch.optim.AdamW(blocks.parameters(), 1e-4, fused=True)
    side, width = tokens // 4, config.width
    with torch.device("meta"):
        network = Krea2(config)
    network.first = nn.Linear(1, 1, device=device)  # sets the device and dtype of the angles
    rope = network.rope(0, (side // 16, 16))
    x = torch.randn(4, side, width, device=device)
    time = torch.randn(4, 1, 6 * width, device=device)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=native_bf16(device)):
            y = x
            for block in blocks:
                y = block(y, time, rope, None)
        y.float().square().mean().backward()
        optimiser.step()
        optimiser.zero_grad()

    return step


def time_steps(
    names: list[str], widths: tuple[int, ...], tokens: int, rounds: int, device: str, compiled: bool
) -> list[Row]:
    """A row for each kind of product at each width, timed in turn with wide products."""
    rows = []
    print(HEAD)
    for width in widths:
        config = replace(
            PRESETS["medium"], width=width, heads=width // 64, kv_heads=max(1, width // 256), blocks=BLOCKS
        )
        times = interleaved([make_step(config, name, tokens, device, compiled) for name in (WIDE, *names)], rounds)
        for name, ours in zip(names, times[1:], strict=True):
            label = f"width {width}, {name}{', compiled' * compiled}"
            rows.append(make_row(label, ours, times[0], aim=AIM if width >= 2048 else None))
            print(rows[-1].line(), flush=True)
    return rows


def loss_curve(name: str, recipe: Recipe, data: TrainingSet | None, device: str) -> list[float]:
    """The loss of every step of a run; all runs see the same pictures, captions and noise."""
    stage = PretrainStage(replace(recipe, products=name), looks=200, data=data, device=device)
    with tempfile.TemporaryDirectory() as folder:
        run = loop.Run(stage, Path(folder), device)
        return [run.advance(stage.batch(step) if data else toy_batch(step))["loss"] for step in range(recipe.steps)]


def toy_batch(step: int) -> loop.Batch:
    """A batch of noise in place of pictures and words."""
    generator = torch.Generator().manual_seed(step)
    c = PRESETS["mini"]
    embeds = torch.randn(4, 8, c.text_taps, c.text_width, generator=generator)
    return {
        "latents": torch.randn(4, c.channels, 8, 8, generator=generator),
        "embeds": embeds,
        "mask": torch.ones(4, 8, dtype=torch.bool),
        "references": None,
        "null": torch.zeros(4, dtype=torch.bool),
        "looks": torch.zeros(4, dtype=torch.long),
        "generator": generator,
    }


def smoothed(values: list[float]) -> list[float]:
    return [mean(values[max(0, i - SMOOTHING_STEPS + 1) : i + 1]) for i in range(len(values))]


def draw_curves(path: Path, curves: dict[str, list[float]], size: tuple[int, int] = (900, 420)) -> None:
    """All curves on one pair of axes."""
    image = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    shown = {name: smoothed(values) for name, values in curves.items()}
    low, high = (edge(map(edge, shown.values())) for edge in (min, max))
    for index, (name, values) in enumerate(shown.items()):
        across = (size[0] - 80) / max(len(values) - 1, 1)
        points = [
            (60 + i * across, 50 + (size[1] - 80) * (high - y) / ((high - low) or 1)) for i, y in enumerate(values)
        ]
        pen.line(points, COLOURS.get(name, "#57606a"), 2)
        pen.text((60 + 200 * index, 12), f"{name}: {values[-1]:.4f}", COLOURS.get(name, "#57606a"), font)
    pen.text((8, 44), f"{high:.2f}", INK, font)
    pen.text((8, size[1] - 38), f"{low:.2f}", INK, font)
    image.save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--blocks", type=int, default=PRESETS["mini"].blocks, help="of the network of the curves")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(".cache/bench/products"))
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ends = ("int8", "fp8") if supports_fp8(torch.device(device)) else ("int8",)
    names = [name for name in PRODUCT_NAMES if name.rpartition("-")[0] in ends]

    rounds, widths, steps = (1, (64,), 4) if options.smoke else (options.rounds, WIDTHS, options.steps)
    tokens = 256 if options.smoke else TOKENS
    rows = time_steps(names, widths, tokens, rounds, device, options.compile)
    small = {"width": 64, "heads": 1, "kv_heads": 1, "blocks": 1} if options.smoke else {"blocks": options.blocks}
    recipe = Recipe(
        name="products", size=64, steps=steps, batch=options.batch, repeats=2, lr=1.5e-3, muon_lr=4e-3, mu=0.2,
        decay=0.2, network=small, references=0.0,
    )  # fmt: skip
    text = TextEncoder.load(BUNDLED / "mini-text.safetensors", device)
    data = None if options.smoke else TrainingSet(Catalog(DATA), text, recipe)
    curves = {name: loss_curve(name, recipe, data, device) for name in (WIDE, *names)}
    last = {name: mean(values[-max(1, steps // 10) :]) for name, values in curves.items()}
    for name, loss in last.items():
        print(f"{name:<20} loss over the last tenth {loss:.4f} ({loss - last[WIDE]:+.4f})")

    options.out.parent.mkdir(parents=True, exist_ok=True)
    draw_bars(options.out.with_suffix(".png"), f"a training step with 8-bit products on {device}, against bf16", rows)
    draw_curves(options.out.with_name(f"{options.out.stem}-curves.png"), curves)
    found = [{key: value for key, value in vars(each).items() if value is not None} for each in rows]
    write_toml(options.out.with_suffix(".toml"), row=found, loss=last, curve=curves, smoke=options.smoke)


if __name__ == "__main__":
    main()
