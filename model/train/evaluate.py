"""Quality of pictures, by a judge that no training used and relative to real pictures.

`python -m model.train.evaluate JUDGE [COUNT] [--variant raw turbo] [--out FILE]` renders captions of pictures that were
never trained on, and reports for each bundled checkpoint:

retrieval  is the requested subject the nearest among the names of all candidates
distance   Fréchet distance to as many real pictures in the judge's features, comparable only for equal numbers
kernel     squared kernel distance in the same features: 0 if there is no difference, whatever the number
diversity  mean distance between pictures of one prompt with different seeds, in the same features
grain      power in the top octave of the spectrum of the film-grain look, relative to real pictures

Intervals of retrieval are over drawings (a subject in a drawing set), which held-out pictures share.
"""

from __future__ import annotations

import argparse
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tomli_w
from numpy.typing import NDArray
from PIL import Image

from model.errors import exit_on_error
from model.pipeline import Pipeline
from model.plan import PRECISIONS
from model.references import from_bytes
from model.spec import RenderSpec
from model.train.data import DATA, Catalog, Item, Pair
from model.train.judge import Judge
from model.train.looks import resize
from model.train.rewards import top_octave
from model.train.study import Floats, Pixels, embed, embed_names, figure, mean, ratio, render_specs, table_rows

DIVERSITY_PROMPTS, DIVERSITY_SEEDS = 25, 4  # to measure diversity on
MAX_GRAINY = 40  # pictures to measure grain on, at most


def is_recognised(judge: Judge, found: Floats, subjects: Sequence[str], among: Sequence[str]) -> NDArray[np.bool_]:
    """Whether each subject embedding [N, 96] has its own subject's name nearest; chance is 1 / len(among)."""
    best = (found @ embed_names(judge, among).T).argmax(1).tolist()
    return np.array([among[n] == subject for n, subject in zip(best, subjects, strict=True)])


def retrieval(
    judge: Judge, pictures: Sequence[Pixels], subjects: Sequence[str], among: Sequence[str]
) -> NDArray[np.bool_]:
    """`is_recognised` of pictures."""
    return is_recognised(judge, embed(judge, pictures)[0], subjects, among)


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


def kernel_distance(a: Floats, b: Floats) -> float:
    """Squared maximum mean discrepancy of two sets of features [N, D], unbiased (Bińkowski et al. 2018).

    With the kernel (a·b / D + 1)³ of features scaled to a mean square of 1. Its expectation is 0 for two sets from one
    distribution, however small; the Fréchet distance's is not, and grows as sets shrink. Row i of both has the same
    caption, so this pair is excluded like a picture with itself: the two are alike without being the same.
    """
    dim = a.shape[1]
    a, b = (each.astype(np.float64) * np.sqrt(dim / np.square(a).sum(1).mean()) for each in (a, b))

    def kernel(x: Floats, y: Floats) -> Floats:
        return (x @ y.T / dim + 1) ** 3

    def mean_kernel(x: Floats, y: Floats) -> float:
        of = kernel(x, y)
        return float((of.sum() - np.trace(of)) / (len(x) * (len(x) - 1)))

    return mean_kernel(a, a) + mean_kernel(b, b) - 2 * mean_kernel(a, b)


def group_spread(found: Floats, group: int) -> Floats:
    """Mean distance between the members of each group of neighbours [N · group, D] -> [N]."""
    sets = found.reshape(-1, group, found.shape[1])
    apart = np.linalg.norm(sets[:, :, None] - sets[:, None], axis=-1)
    return apart.sum((1, 2)) / (group * (group - 1))


def held_out_prompts(catalog: Catalog, count: int) -> list[tuple[Item, str]]:
    """Captions of pictures that were never trained on, in medium form: subject, ground and style words."""
    rng = np.random.default_rng(5)
    names = set(candidate_subjects(catalog))
    items = [item for item in catalog.items("held-out") if item.pair.subject in names]
    chosen = rng.permutation(len(items)).tolist()
    while len(chosen) < count:
        chosen += rng.permutation(len(items)).tolist()
    return [(items[i], catalog.caption(items[i], rng, "medium")) for i in chosen[:count]]


def candidate_subjects(catalog: Catalog, count: int = 100) -> list[str]:
    """The first subjects of the list."""
    return list(catalog.subjects)[:count]


def make_specs(captions: Sequence[str], seed: int, **settings: Any) -> list[RenderSpec]:
    """A picture of each, each with its own seed; other settings default to the checkpoint's own."""
    return [RenderSpec(prompt=caption, seed=seed + index, **settings) for index, caption in enumerate(captions)]


class Task(NamedTuple):
    """What every checkpoint of one size has to render, and what the judge sees in the real pictures."""

    items: list[Item]
    captions: list[str]
    subjects: list[str]  # requested
    among: list[str]  # candidates whose names are compared
    grainy: list[str]  # captions of film grain
    pictures: list[Pixels]  # real ones of the items
    recognised: NDArray[np.bool_]  # whether the subject's name is the nearest
    features: Floats  # [N, 144]: the judge's two views of a picture
    power: Floats  # [MAX_GRAINY] of the top octave, in the real pictures of film grain

    @property
    def drawings(self) -> list[Pair]:
        """The drawing of each picture: pictures of one drawing are not independent trials."""
        return [item.pair for item in self.items]

    @classmethod
    def prepare(cls, judge: Judge, catalog: Catalog, count: int) -> Task:
        """`count` captions of pictures that were never trained on."""
        among, prompts = candidate_subjects(catalog), held_out_prompts(catalog, count)
        items, captions = [item for item, _ in prompts], [caption for _, caption in prompts]
        subjects, pictures = [item.pair.subject for item in items], [catalog.picture(item) for item in items]
        rng = np.random.default_rng(7)
        film = [item for item in catalog.items("held-out") if item.look.medium == "film"]  # drawing set by drawing set
        grainy = [film[i] for i in rng.permutation(len(film))[:MAX_GRAINY]]
        seen = embed(judge, pictures)
        return cls(
            items,
            captions,
            subjects,
            among,
            [catalog.caption(item, rng, "medium") for item in grainy],
            pictures,
            is_recognised(judge, seen[0], subjects, among),
            np.concatenate(seen, 1),
            top_octave(from_bytes(np.stack([catalog.picture(item) for item in grainy]))).numpy(),
        )


class Measured(NamedTuple):
    """A checkpoint's pictures of a task, and what the judge sees in them."""

    pictures: list[Pixels]
    recognised: NDArray[np.bool_]
    style: Floats  # [N, 48], unit
    features: Floats
    distances: Floats  # [DIVERSITY_PROMPTS] mean distance between pictures of one prompt
    power: Floats


def render_task(task: Task, judge: Judge, pipeline: Pipeline, **settings: Any) -> Measured:
    """Render all captions once, some of them several times, and those of film grain; always from the same seeds."""
    pictures = render_specs(pipeline, make_specs(task.captions, seed=1000, **settings))
    first = list(dict.fromkeys(task.captions))[:DIVERSITY_PROMPTS]
    repeated = render_specs(
        pipeline, make_specs([each for each in first for _ in range(DIVERSITY_SEEDS)], seed=5000, **settings)
    )
    grain = render_specs(pipeline, make_specs(task.grainy, seed=9000, **settings))
    seen = embed(judge, pictures)
    return Measured(
        pictures,
        is_recognised(judge, seen[0], task.subjects, task.among),
        seen[1],
        np.concatenate(seen, 1),
        group_spread(np.concatenate(embed(judge, repeated), 1), DIVERSITY_SEEDS),
        top_octave(from_bytes(np.stack(grain))).numpy(),
    )


def measure(
    judge: Judge, catalog: Catalog, pipeline: Pipeline, count: int, sheet: Path, **settings: Any
) -> dict[str, Any]:
    """The figures of one checkpoint, each beside that of real pictures if known."""
    task = Task.prepare(judge, catalog, count)
    measured = render_task(task, judge, pipeline, **settings)
    small = [resize(picture, 64) for picture in measured.pictures[:200]]
    rows = [np.concatenate(small[i : i + 20], 1) for i in range(0, len(small) - 19, 20)]
    Image.fromarray(np.concatenate(rows)).save(sheet)
    real = task.features
    return {
        "retrieval": {
            "rendered": figure(mean, measured.recognised, groups=task.drawings),
            "real": figure(mean, task.recognised, groups=task.drawings),
            "of": len(task.among),
        },
        "distance": {"rendered": frechet(measured.features, real)},
        "kernel": {"rendered": kernel_distance(measured.features, real)},
        "diversity": {"rendered": figure(mean, measured.distances)},
        "grain": {"share of real": figure(ratio, measured.power, task.power)},
    }


def main(
    judge_path: Path,
    count: int,
    variants: Sequence[str],
    out: Path,
    dtype: str | None = None,
    precision: str | None = None,
    **settings: Any,
) -> None:
    """Measure bundled checkpoints, print and store the figures; `settings` of specs default to the checkpoint's
    own."""
    judge = Judge.load(judge_path)
    found: dict[str, Any] = {"count": count, **settings}
    out.parent.mkdir(parents=True, exist_ok=True)
    for variant in variants:
        pipeline = Pipeline.load("mini", variant=variant, dtype=dtype, precision=precision, filters=())
        found |= {"dtype": pipeline.plan.dtype, "precision": pipeline.plan.precision}
        sheet = out.with_name(f"rendered-{variant}.png")
        found[variant] = measure(judge, Catalog(DATA, pipeline.native), pipeline, count, sheet, **settings)
        out.write_text(tomli_w.dumps(found))
        print(*table_rows(variant, found[variant]), sep="\n", flush=True)


if __name__ == "__main__":
    with exit_on_error():
        parser = argparse.ArgumentParser(description="Measure bundled checkpoints by a judge.")
        parser.add_argument("judge", type=Path)
        parser.add_argument("count", type=int, nargs="?", default=500)
        parser.add_argument("--variant", nargs="+", default=["raw", "turbo"])
        parser.add_argument("--dtype", choices=("float32", "bfloat16"))
        parser.add_argument("--precision", choices=PRECISIONS)
        parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help='as TOML: sampler="ab2"')
        parser.add_argument("--out", type=Path, default=Path(".runs/judge/figures.toml"))
        options = parser.parse_args()
        main(
            options.judge,
            options.count,
            options.variant,
            options.out,
            options.dtype,
            options.precision,
            **tomllib.loads("\n".join(options.set)),
        )
