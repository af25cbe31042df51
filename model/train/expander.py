"""Which looks creativity may add: `python -m model.train.expander JUDGE` measures them on a bundled checkpoint.

A look that loses the subject is not worth adding. Every drawing set is rendered in every medium, by its words, each
with its own subjects and seeds; a judge reads the subjects. Drawing sets and media with fewer than three in four
correct are left to prompts that ask for them: `asked_only` in `looks.toml`, whose lines are printed. Use the judge of
the rewards, so that the evaluation judge has no part in the choice. Five minutes on one core.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from model.errors import exit_on_error
from model.pipeline import Pipeline
from model.train.data import DATA, Catalog, phrase, stable_seed
from model.train.evaluate import candidate_subjects, make_specs, retrieval
from model.train.judge import Judge
from model.train.looks import DRAWINGS, MEDIA
from model.train.study import Floats, render_specs

MIN_CORRECT = 0.75  # share of correct subjects
FIRST_SEED = 900_000  # far from those of the studies


def measure(pipeline: Pipeline, judge: Judge, catalog: Catalog, count: int) -> Floats:
    """Shares of correct subjects among `count` pictures, [drawings, media] in the data set's order."""
    among = candidate_subjects(catalog)
    table = np.zeros((len(DRAWINGS), len(MEDIA)))
    for i, (drawing, drawing_words) in enumerate(DRAWINGS.items()):
        for j, (medium, medium_words) in enumerate(MEDIA.items()):
            rng = np.random.default_rng(stable_seed("expander", drawing, medium))
            subjects = [str(name) for name in rng.choice(among, count, replace=False)]
            texts = [", ".join([phrase(name), drawing_words[0], *medium_words[:1]]) for name in subjects]
            first = FIRST_SEED + count * (i * len(MEDIA) + j)
            table[i, j] = retrieval(judge, render_specs(pipeline, make_specs(texts, first)), subjects, among).mean()
    return table


def asked_only(table: Floats) -> dict[str, list[str]]:
    """Drawing sets, by their mean over media, and media, by theirs over drawing sets, that lose too many subjects."""
    slots = {"drawing": (DRAWINGS, table.mean(1)), "medium": (MEDIA, table.mean(0))}
    return {
        slot: [name for name, share in zip(names, shares, strict=True) if share < MIN_CORRECT and name != "plain"]
        for slot, (names, shares) in slots.items()
    }


def main(judge: Path, variant: str, count: int, dtype: str | None) -> None:
    """Measure, and print the table and the lines for `looks.toml`."""
    pipeline = Pipeline.load("mini", variant, dtype=dtype, filters=())
    table = measure(pipeline, Judge.load(judge), Catalog(DATA, pipeline.native), count)
    print(f"{'':<28}", *(f"{medium[:8]:>9}" for medium in MEDIA), f"{'mean':>9}")
    for drawing, shares in zip(DRAWINGS, table, strict=True):
        print(f"{drawing:<28}", *(f"{share:9.2f}" for share in (*shares, shares.mean())))
    print(f"{'mean':<28}", *(f"{share:9.2f}" for share in table.mean(0)))
    print("\n[asked_only]")
    for slot, names in asked_only(table).items():
        print(f"{slot} = {json.dumps(names)}")


if __name__ == "__main__":
    with exit_on_error():
        parser = argparse.ArgumentParser(description="Measure which looks creativity may add.")
        parser.add_argument("judge", type=Path)
        parser.add_argument("--variant", default="turbo")
        parser.add_argument("--count", type=int, default=12, help="pictures of each drawing in each medium")
        parser.add_argument("--dtype", choices=("float32", "bfloat16"))
        options = parser.parse_args()
        main(options.judge, options.variant, options.count, options.dtype)
