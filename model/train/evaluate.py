"""How good the pictures are, by a judge that no training has used and beside real pictures.

`retrieval`: is the subject that was asked for the nearest among the names of all candidates?
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from model.spec import RenderSpec
from model.train.data import DATA, Catalog, Item
from model.train.encode import to_tensor
from model.train.judge import SIZE, Judge


@torch.inference_mode()
def retrieval(
    judge: Judge, pictures: Sequence[NDArray[np.uint8]], subjects: Sequence[str], among: Sequence[str]
) -> NDArray[np.bool_]:
    """Whether each picture's own subject is its nearest name among the candidates; chance is 1 / len(among)."""
    embedded = torch.cat([judge(to_tensor(list(pictures[i : i + 64]), SIZE))[0] for i in range(0, len(pictures), 64)])
    nearest = (embedded @ judge.read(among).T).argmax(1).tolist()
    return np.array([among[n] == subject for n, subject in zip(nearest, subjects, strict=True)])


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


def main(judge_path: Path, count: int = 500) -> None:
    """Top-1 retrieval of rendered pictures of held-out pairs beside real pictures of the same pairs."""
    from model.pipeline import Pipeline

    catalog, judge = Catalog(DATA), Judge.load(judge_path)
    among = candidates(catalog)
    prompts = held_out_prompts(catalog, count)
    subjects = [item.pair.subject for item, _ in prompts]
    real = retrieval(judge, [catalog.picture(item) for item, _ in prompts], subjects, among)
    specs = [RenderSpec(prompt=caption, seed=1000 + i) for i, (_, caption) in enumerate(prompts)]
    pictures = [np.asarray(p.image.convert("RGB")) for p in Pipeline.load("mini").stream(specs)]
    made = retrieval(judge, pictures, subjects, among)
    for name, values in (("real", real), ("rendered", made)):
        print(f"{name:9} top-1 of {len(among)}: {'{:.3f} ({:.3f} … {:.3f})'.format(*interval(values))}")
    print(f"ratio {made.mean() / real.mean():.3f}")
    tiles = [
        np.concatenate([np.asarray(Image.fromarray(p).resize((64, 64))) for p in pictures[i : i + 20]], 1)
        for i in range(0, min(len(pictures), 200) // 20 * 20, 20)
    ]
    Image.fromarray(np.concatenate(tiles)).save(judge_path.parent / "rendered.png")


if __name__ == "__main__":
    import sys

    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 500)
