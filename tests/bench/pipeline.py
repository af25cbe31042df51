"""How long pictures take: ours beside diffusers' Krea2Pipeline on the same weights, and beside the arithmetic limit.

`python tests/bench/pipeline.py [--model mini] [--turbo] [--size 128] [--steps 28] [--pictures 4] [--rounds 3]`. Both
are loaded and warm; they render the same prompts in turn, so that whatever else the machine does falls on both. The
limit is the time that the network's products alone would take at the speed of a large one.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from model.dit import DiTConfig, hidden_width
from model.pipeline import Pipeline
from model.spec import RenderSpec

PROMPTS = ("a red fox", "an owl on a night blue background", "a sailboat at sunset, paper cut", "a green apple")


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def products(c: DiTConfig, text: int, image: int) -> float:
    """Multiplications and additions of one evaluation of the stream, for one picture."""
    tokens = text + image
    matrices = c.width * (2 * c.width + 2 * c.kv_heads * c.head_dim + c.width + 3 * hidden_width(c.width, c.multiplier))
    attention = 2 * tokens * c.width
    ends = 2 * image * c.token_dim * c.width
    return 2 * (c.blocks * tokens * (matrices + attention) + ends)


def speed(dtype: torch.dtype, device: torch.device, side: int = 2048) -> float:
    """Operations a second of a large product."""
    a, b = torch.randn(2, side, side, dtype=dtype, device=device)

    def multiply() -> float:
        return (a @ b).sum().item()

    multiply()
    return 2 * side**3 / min(seconds(multiply) for _ in range(3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--turbo", action="store_true")
    parser.add_argument("--size", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--pictures", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()

    import diffusers

    pipeline = Pipeline.load(options.model, "turbo" if options.turbo else None)
    with tempfile.TemporaryDirectory() as folder:
        pipeline.export(Path(folder) / "model")
        other = diffusers.Krea2Pipeline.from_pretrained(Path(folder) / "model", torch_dtype=pipeline.dtype)
    other.to(pipeline.device).set_progress_bar_config(disable=True)

    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(options.pictures)]
    specs = [
        pipeline.resolve(RenderSpec(prompt, options.size, options.size, seed=i, steps=options.steps))
        for i, prompt in enumerate(prompts)
    ]
    first = specs[0]

    def theirs() -> None:
        other(
            prompts,
            height=first.height,
            width=first.width,
            num_inference_steps=first.steps,
            guidance_scale=first.guidance,
        )

    pipeline.render(specs)
    theirs()
    rounds = [(seconds(lambda: pipeline.render(specs)), seconds(theirs)) for _ in range(options.rounds)]

    assert first.height and first.width and first.steps
    image = first.height * first.width // (8 * pipeline.dit.config.patch) ** 2
    lengths = [len(pipeline.text.token_ids(prompt)) for prompt in prompts]
    empty = [len(pipeline.text.token_ids(""))] * len(prompts) if first.guidance else []
    work = first.steps * sum(products(pipeline.dit.config, length, image) for length in lengths + empty)
    limit = work / speed(pipeline.dtype, pipeline.device)
    ours = median(a for a, _ in rounds)
    print(f"{options.model} {pipeline.variant}, {first.width}x{first.height}, {first.steps} steps, {pipeline.device}")
    print(f"ours       {ours / len(specs):8.3f} s a picture")
    print(f"diffusers  {median(b for _, b in rounds) / len(specs):8.3f} s a picture")
    print(f"diffusers / ours  {median(b / a for a, b in rounds):.2f}")
    print(f"ours / the products' limit  {ours / limit:.2f}")


if __name__ == "__main__":
    main()
