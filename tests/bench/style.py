"""What a style costs: a step with style tokens, and a batch with cached spliced references, against none.

`python tests/bench/style.py [--rounds 5] [--model mini] [--out .cache/bench/style] [--smoke]`. The two sides of a row
take turns in one process; figures are medians, ratios medians of the rounds' ratios: plain over styled, so 0.95 is 5 %
more time. Prompts are encoded before timing starts, as for all but the first picture of a batch; the splice's captures
are on disk and read again at every step. `--smoke` runs every row once at toy size, which shows only that it works.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from measure import HEAD, Row, interleaved, make_row, save
from PIL import Image

from model.pipeline import Pipeline
from model.spec import Reference, RenderSpec, Style
from model.splice import CaptureCache

BATCH = 8
TOKENS, SPLICE = 1 / 1.05, 1 / 1.4  # aims for a step with tokens and for a batch with a splice


def styled(spec: RenderSpec, method: str, references: list[Path]) -> RenderSpec:
    """The spec with one style of these pictures, at strength 1."""
    return replace(spec, styles=(Style("s", 1.0, tuple(map(Reference, references)), method=method),))


def pictures(folder: Path, count: int = 2) -> list[Path]:
    """References: their content does not matter here."""
    files = [folder / f"{index}.png" for index in range(count)]
    for index, file in enumerate(files):
        Image.effect_noise((128, 128), 40 + 60 * index).convert("RGB").save(file)
    return files


def rows(pipeline: Pipeline, folder: Path, rounds: int, smoke: bool) -> Iterator[Row]:
    """With guidance as the checkpoint recommends, and without, as for Turbo."""
    references = pictures(folder)
    pipeline.__dict__["_captures"] = CaptureCache(folder / "captures")
    base = RenderSpec("a red fox", 64, 64, steps=2) if smoke else RenderSpec("a red fox")
    steps = pipeline.resolve(base).steps

    @torch.inference_mode()
    def integrate(specs: list[RenderSpec]) -> None:
        for batch in pipeline._batches(map(pipeline.resolve, specs)):
            pipeline._latents(batch, (), None)

    for guidance in (pipeline.recommended["guidance"] or 2.5, 0.0):
        plain = [replace(base, seed=seed, guidance=guidance) for seed in range(BATCH)]
        about = f"guidance {guidance:g}, {BATCH} pictures, {steps} steps"
        with_tokens = [styled(spec, "tokens", references[:1]) for spec in plain]
        works = [lambda s=with_tokens: integrate(s), lambda p=plain: integrate(p)]
        yield make_row(f"steps with style tokens, {about}", *interleaved(works, rounds), aim=TOKENS)
        for count in (1, 2):
            spliced = [styled(spec, "splice", references[:count]) for spec in plain]
            works = [lambda s=spliced: pipeline.render(s), lambda p=plain: pipeline.render(p)]
            name = f"splice of {count}, {about}"
            yield make_row(name, *interleaved(works, rounds), aim=SPLICE if count == 1 else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path(".cache/bench/style"))
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()

    pipeline, found = Pipeline.load(options.model, device=options.device, filters=()), []
    print(HEAD)
    with tempfile.TemporaryDirectory() as scratch:
        for each in rows(pipeline, Path(scratch), 1 if options.smoke else options.rounds, options.smoke):
            found.append(each)
            print(each.line(), flush=True)
    missed = [each.name for each in found if each.aim and each.ratio < each.aim]
    facts = {"smoke": options.smoke, "rounds": options.rounds, "model": options.model, "missed": missed}
    save(options.out, f"what a style costs on {options.model}, {options.device}: plain over styled", found, **facts)


if __name__ == "__main__":
    main()
