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
import torch
from numpy.typing import NDArray
from PIL import Image

from model.spec import RenderSpec
from model.train.data import DATA, Catalog, Item
from model.train.encode import to_tensor
from model.train.judge import SIZE, Judge

if TYPE_CHECKING:
    from model.pipeline import Pipeline

Pictures = Sequence[NDArray[np.uint8]]
PROMPTS, SEEDS = 25, 4  # of which diversity is taken
GRAINY = 40  # pictures of which grain is taken


@torch.inference_mode()
def features(judge: Judge, pictures: Pictures) -> torch.Tensor:
    """Subject and style embeddings side by side, each of unit length [B, 96 + 48]."""
    parts = [judge(to_tensor(list(pictures[i : i + 64]), SIZE)) for i in range(0, len(pictures), 64)]
    return torch.cat([torch.cat(part, 1) for part in parts])


def nearest(judge: Judge, found: torch.Tensor, subjects: Sequence[str], among: Sequence[str]) -> NDArray[np.bool_]:
    """Whether each picture's own subject is its nearest name among the candidates; chance is 1 / len(among)."""
    with torch.inference_mode():
        names = judge.read(among)
    first = (found[:, : names.shape[1]] @ names.T).argmax(1).tolist()
    return np.array([among[n] == subject for n, subject in zip(first, subjects, strict=True)])


def retrieval(judge: Judge, pictures: Pictures, subjects: Sequence[str], among: Sequence[str]) -> NDArray[np.bool_]:
    """`nearest` of pictures."""
    return nearest(judge, features(judge, pictures), subjects, among)


def frechet(a: NDArray[np.floating[Any]], b: NDArray[np.floating[Any]]) -> float:
    """Fréchet distance between Gaussians fitted to two sets of features [N, D] (Heusel et al. 2017).

    |μ_a − μ_b|² + tr(A + B − 2 (A B)^½); the root's trace is the sum of the roots of the eigenvalues of A^½ B A^½.
    """
    a, b = a.astype(np.float64), b.astype(np.float64)
    first, second = np.cov(a.T), np.cov(b.T)
    values, vectors = np.linalg.eigh(first)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    between = np.sqrt(np.linalg.eigvalsh(root @ second @ root).clip(0)).sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(first) + np.trace(second) - 2 * between)


def spread(found: NDArray[np.floating[Any]], group: int) -> NDArray[np.floating[Any]]:
    """Mean distance between the members of each group of neighbours [N · group, D] -> [N]."""
    sets = found.reshape(-1, group, found.shape[1])
    apart = np.linalg.norm(sets[:, :, None] - sets[:, None], axis=-1)
    return apart.sum((1, 2)) / (group * (group - 1))


def top_octave(picture: NDArray[np.uint8]) -> float:
    """Power of the grey picture [H, W, 3] at more than half of the highest frequency of an axis."""
    grey = np.asarray(picture, np.float64).mean(-1)
    power = np.abs(np.fft.fft2(grey - grey.mean())) ** 2 / grey.size
    rows, columns = np.abs(np.fft.fftfreq(grey.shape[0])), np.abs(np.fft.fftfreq(grey.shape[1]))
    return float(power[np.maximum(rows[:, None], columns) > 0.25].mean())


def interval(values: NDArray, seed: int = 0, draws: int = 2000) -> tuple[float, float, float]:
    """Mean and its 95 % bootstrap interval."""
    rng = np.random.default_rng(seed)
    means = values[rng.integers(0, len(values), (draws, len(values)))].mean(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(values.mean()), float(low), float(high)


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


def render(pipeline: Pipeline, prompts: Sequence[str], seed: int) -> list[NDArray[np.uint8]]:
    """A picture of each prompt, each with a seed of its own, at the checkpoint's own settings."""
    specs = [RenderSpec(prompt=prompt, seed=seed + i) for i, prompt in enumerate(prompts)]
    return [np.asarray(picture.image.convert("RGB")) for picture in pipeline.stream(specs)]


def measure(
    judge: Judge, catalog: Catalog, pipeline: Pipeline, count: int, sheet: Path | None = None
) -> dict[str, Any]:
    """The figures of one checkpoint; each with what real pictures reach where that is known."""
    among, prompts = candidates(catalog), held_out_prompts(catalog, count)
    subjects = [item.pair.subject for item, _ in prompts]
    real = features(judge, [catalog.picture(item) for item, _ in prompts])
    pictures = render(pipeline, [caption for _, caption in prompts], seed=1000)
    made = features(judge, pictures)
    ours, theirs = (nearest(judge, found, subjects, among) for found in (made, real))

    first = list(dict.fromkeys(caption for _, caption in prompts))[:PROMPTS]
    alike = features(judge, render(pipeline, [caption for caption in first for _ in range(SEEDS)], seed=5000))
    grainy = [item for item in catalog.items("held-out") if item.look.medium == "film"][:GRAINY]
    rng = np.random.default_rng(7)
    grain = render(pipeline, [catalog.caption(item, rng, "medium") for item in grainy], seed=9000)
    power, wanted = (
        float(np.mean([top_octave(picture) for picture in side]))
        for side in (grain, [catalog.picture(item) for item in grainy])
    )
    if sheet is not None:
        small = [
            np.asarray(Image.fromarray(picture).resize((64, 64))) for picture in pictures[: len(pictures) // 20 * 20]
        ]
        rows = [np.concatenate(small[i : i + 20], 1) for i in range(0, len(small), 20)]
        Image.fromarray(np.concatenate(rows[:10])).save(sheet)
    return {
        "retrieval": {"rendered": list(interval(ours)), "real": list(interval(theirs)), "of": len(among)},
        "distance": {
            "rendered": frechet(made.numpy(), real.numpy()),
            "halves of real": frechet(real[::2].numpy(), real[1::2].numpy()),
        },
        "diversity": {"rendered": list(interval(spread(alike.numpy(), SEEDS)))},
        "grain": {"share of real": power / wanted},
    }


def main(judge_path: Path, count: int, variants: Sequence[str], out: Path) -> None:
    """Measure checkpoints of the box, print and keep what was found."""
    from model.pipeline import Pipeline

    catalog, judge = Catalog(DATA), Judge.load(judge_path)
    found: dict[str, Any] = {"count": count}
    out.parent.mkdir(parents=True, exist_ok=True)
    for variant in variants:
        pipeline = Pipeline.load("mini", variant=variant)
        found[variant] = measure(judge, catalog, pipeline, count, out.with_name(f"rendered-{variant}.png"))
        out.write_text(tomli_w.dumps(found))
        for name, values in found[variant].items():
            print(variant, name, *(f"{key} {shown(value)}" for key, value in values.items()), sep="  ", flush=True)


def shown(value: Any) -> str:
    """A number, or a mean with its interval."""
    return "{:.3f} ({:.3f} … {:.3f})".format(*value) if isinstance(value, list) else f"{value:.3f}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Measure the box's checkpoints by a judge.")
    parser.add_argument("judge", type=Path)
    parser.add_argument("count", type=int, nargs="?", default=500)
    parser.add_argument("--variant", nargs="+", default=["raw", "turbo"])
    parser.add_argument("--out", type=Path, default=Path(".runs/judge/figures.toml"))
    options = parser.parse_args()
    main(options.judge, options.count, options.variant, options.out)
