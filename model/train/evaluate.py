"""How good the pictures are, by a judge that no training has used and beside real pictures.

`python -m model.train.evaluate JUDGE [COUNT] [--variant raw turbo] [--out FILE]` renders captions of pictures that were
never trained on, and says for each checkpoint in the box:

retrieval  is the subject that was asked for the nearest among the names of all candidates
distance   Fréchet distance to real pictures in the judge's features; its floor is that between two halves of real ones
diversity  mean distance between pictures of one prompt and different seeds, in the same features
grain      power in the top octave of the spectrum of the film-grain look, as a share of real pictures'
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tomli_w
from numpy.typing import NDArray
from PIL import Image

from model.spec import RenderSpec
from model.train.data import DATA, Catalog, Item
from model.train.encode import resize, scale
from model.train.judge import Judge
from model.train.rewards import top_octave
from model.train.study import Floats, Pixels, embed, figure, lines_of, mean, names_of, paint, ratio

if TYPE_CHECKING:
    from model.pipeline import Pipeline

PROMPTS, SEEDS = 25, 4  # of which diversity is taken
GRAINY = 40  # pictures of which grain is taken


def nearest(judge: Judge, found: Floats, subjects: Sequence[str], among: Sequence[str]) -> NDArray[np.bool_]:
    """Whether each subject embedding [N, 96] has its own subject's name nearest; chance is 1 / len(among)."""
    first = (found @ names_of(judge, among).T).argmax(1).tolist()
    return np.array([among[n] == subject for n, subject in zip(first, subjects, strict=True)])


def retrieval(
    judge: Judge, pictures: Sequence[Pixels], subjects: Sequence[str], among: Sequence[str]
) -> NDArray[np.bool_]:
    """`nearest` of pictures."""
    return nearest(judge, embed(judge, pictures)[0], subjects, among)


def frechet(a: Floats, b: Floats) -> float:
    """Fréchet distance between Gaussians fitted to two sets of features [N, D] (Heusel et al. 2017).

    |μ_a − μ_b|² + tr(A + B − 2 (A B)^½); the root's trace is the sum of the roots of the eigenvalues of A^½ B A^½.
    """
    a, b = a.astype(np.float64), b.astype(np.float64)
    first, second = np.cov(a.T), np.cov(b.T)
    values, vectors = np.linalg.eigh(first)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    between = np.sqrt(np.linalg.eigvalsh(root @ second @ root).clip(0)).sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(first) + np.trace(second) - 2 * between)


def spread(found: Floats, group: int) -> Floats:
    """Mean distance between the members of each group of neighbours [N · group, D] -> [N]."""
    sets = found.reshape(-1, group, found.shape[1])
    apart = np.linalg.norm(sets[:, :, None] - sets[:, None], axis=-1)
    return apart.sum((1, 2)) / (group * (group - 1))


def held_out_prompts(catalog: Catalog, count: int, subjects: int = 100, seed: int = 5) -> list[tuple[Item, str]]:
    """Captions of pictures that were never trained on, in medium form: subject, ground and style words."""
    rng = np.random.default_rng(seed)
    names = set(candidates(catalog, subjects))
    items = [item for item in catalog.items("held-out") if item.pair.subject in names]
    chosen = rng.permutation(len(items)).tolist()
    while len(chosen) < count:
        chosen += rng.permutation(len(items)).tolist()
    return [(items[i], catalog.caption(items[i], rng, "medium")) for i in chosen[:count]]


def candidates(catalog: Catalog, count: int = 100) -> list[str]:
    """The first subjects of the list."""
    return list(catalog.subjects)[:count]


def specs_of(captions: Sequence[str], seed: int) -> list[RenderSpec]:
    """A picture of each, each with a seed of its own, at the checkpoint's own settings."""
    return [RenderSpec(prompt=caption, seed=seed + index) for index, caption in enumerate(captions)]


def measure(judge: Judge, catalog: Catalog, pipeline: Pipeline, count: int, sheet: Path) -> dict[str, Any]:
    """The figures of one checkpoint; each with what real pictures reach where that is known."""
    among, prompts = candidates(catalog), held_out_prompts(catalog, count)
    subjects = [item.pair.subject for item, _ in prompts]
    pictures = paint(pipeline, specs_of([caption for _, caption in prompts], seed=1000))
    made, real = embed(judge, pictures), embed(judge, [catalog.picture(item) for item, _ in prompts])
    right = [nearest(judge, found[0], subjects, among) for found in (made, real)]
    features, wanted = (np.concatenate(found, 1) for found in (made, real))

    first = list(dict.fromkeys(caption for _, caption in prompts))[:PROMPTS]
    alike = paint(pipeline, specs_of([caption for caption in first for _ in range(SEEDS)], seed=5000))
    grainy = [item for item in catalog.items("held-out") if item.look.medium == "film"][:GRAINY]
    rng = np.random.default_rng(7)
    grain = paint(pipeline, specs_of([catalog.caption(item, rng, "medium") for item in grainy], seed=9000))
    power, theirs = (
        top_octave(scale(np.stack(side))).numpy() for side in (grain, [catalog.picture(item) for item in grainy])
    )
    small = [resize(picture, 64) for picture in pictures[:200]]
    rows = [np.concatenate(small[i : i + 20], 1) for i in range(0, len(small) - 19, 20)]
    Image.fromarray(np.concatenate(rows)).save(sheet)
    return {
        "retrieval": {"rendered": figure(mean, right[0]), "real": figure(mean, right[1]), "of": len(among)},
        "distance": {"rendered": frechet(features, wanted), "halves of real": frechet(wanted[::2], wanted[1::2])},
        "diversity": {"rendered": figure(mean, spread(np.concatenate(embed(judge, alike), 1), SEEDS))},
        "grain": {"share of real": figure(ratio, power, theirs)},
    }


def main(judge_path: Path, count: int, variants: Sequence[str], out: Path, dtype: str | None = None) -> None:
    """Measure checkpoints of the box, print and keep what was found."""
    from model.pipeline import Pipeline

    catalog, judge = Catalog(DATA), Judge.load(judge_path)
    found: dict[str, Any] = {"count": count}
    out.parent.mkdir(parents=True, exist_ok=True)
    for variant in variants:
        pipeline = Pipeline.load("mini", variant=variant, dtype=dtype, filters=())
        found["dtype"] = pipeline.plan.dtype
        found[variant] = measure(judge, catalog, pipeline, count, out.with_name(f"rendered-{variant}.png"))
        out.write_text(tomli_w.dumps(found))
        print(*lines_of(variant, found[variant]), sep="\n", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Measure the box's checkpoints by a judge.")
    parser.add_argument("judge", type=Path)
    parser.add_argument("count", type=int, nargs="?", default=500)
    parser.add_argument("--variant", nargs="+", default=["raw", "turbo"])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    parser.add_argument("--out", type=Path, default=Path(".runs/judge/figures.toml"))
    options = parser.parse_args()
    main(options.judge, options.count, options.variant, options.out, options.dtype)
