"""What a stage of post-training changes, by a judge that no training has used: before and after, picture by picture.

`python -m model.train.ablation JUDGE OUT BEFORE AFTER…` renders the same captions of pictures that were never trained
on, from the same seeds, by each checkpoint: `raw` and `turbo` are those of the box, anything else a run of `.runs`, put
into 8 bits as it would be shipped. `NAME:STEPS:GUIDANCE` renders by other settings than the checkpoint's own.

subject    share of pictures whose subject is the nearest of 100 names
style      cosine of the judge's style embedding to that of real pictures in the look that was asked for
whole      the critic's probability that nothing in a picture is broken
diversity  mean distance between pictures of one prompt and different seeds, in the judge's features
distance   Fréchet distance to real pictures, in the same features
grain      power in the top octave of the spectrum of the film-grain look, as a share of real pictures'

Real pictures of the same captions stand beside them where that has a meaning. Changes are after − before, with
intervals drawn over pairs of pictures.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tomli_w
import torch

from model.errors import K2Error
from model.pipeline import Pipeline
from model.train import release
from model.train.data import DATA, Catalog
from model.train.encode import to_tensor
from model.train.evaluate import Painted, frechet, paint_all
from model.train.judge import SIZE, Critic, Judge
from model.train.study import PROTOTYPE, Floats, Pixels, difference, embed, figure, lines_of, mean, middle, ratio, sheet

SHOWN = 12  # pictures of each checkpoint on the sheet


class Checkpoint(NamedTuple):
    """What to render by: a name, and settings where they are not the checkpoint's own."""

    name: str
    steps: int | None = None
    guidance: float | None = None

    @classmethod
    def of(cls, said: str) -> Checkpoint:
        """From NAME, NAME:STEPS or NAME:STEPS:GUIDANCE."""
        name, *numbers = said.split(":")
        try:
            steps, guidance, *more = (*numbers, *("",) * (2 - len(numbers)))
            if more:
                raise ValueError
            return cls(name, int(steps) if steps else None, float(guidance) if guidance else None)
        except ValueError:
            raise K2Error(f'"{said}" is not NAME, NAME:STEPS or NAME:STEPS:GUIDANCE.') from None

    def load(self, dtype: str | None) -> Pipeline:
        """Its pipeline; a run's transformer is joined by the box's other parts."""
        if self.name in ("raw", "turbo"):
            return Pipeline.load("mini", self.name, dtype=dtype, filters=())
        with tempfile.TemporaryDirectory() as folder:
            release.main(self.name, Path(folder))
            file = next(
                path for name in ("turbo", "raw") if (path := Path(folder, f"mini-{name}.safetensors")).exists()
            )
            return Pipeline.load(str(file), dtype=dtype, filters=())


def likeness(judge: Judge, catalog: Catalog, painted: Painted) -> Floats:
    """How like each picture's style is to what stands for its look: the mean of real pictures of the train split."""
    looks = {item.look for item, _ in painted.prompts}
    known = {look: [item for item in catalog.items("train") if item.look == look][:PROTOTYPE] for look in looks}
    centres = {look: middle(embed(judge, [catalog.picture(i) for i in items])[1]) for look, items in known.items()}
    return (painted.style * np.stack([centres[item.look] for item, _ in painted.prompts])).sum(1)


@torch.inference_mode()
def wholeness(critic: Critic, pictures: Sequence[Pixels]) -> Floats:
    """What the critic makes of each picture, 0 … 1."""
    parts = [pictures[start : start + 64] for start in range(0, len(pictures), 64)]
    return torch.cat([critic(to_tensor(list(part), SIZE)).sigmoid() for part in parts]).numpy()


class Scores(NamedTuple):
    """What the judge and the critic make of a checkpoint."""

    painted: Painted
    columns: dict[str, Floats]  # of the figures that are means over pictures or prompts


def score(judge: Judge, critic: Critic, catalog: Catalog, painted: Painted) -> Scores:
    columns = {
        "subject": painted.right.astype(float),
        "style": likeness(judge, catalog, painted),
        "whole": wholeness(critic, painted.pictures),
        "diversity": painted.apart,
    }
    return Scores(painted, columns)


def itself(scores: Scores) -> dict[str, Any]:
    """A checkpoint's own figures."""
    painted = scores.painted
    return {name: figure(mean, column) for name, column in scores.columns.items()} | {
        "distance": round(frechet(painted.features, painted.real_features), 4),
        "grain": figure(ratio, painted.power, painted.real_power),
    }


def changes(before: Scores, after: Scores) -> dict[str, Any]:
    """after − before of every figure, over the same pictures."""
    a, b = after.painted, before.painted

    def distance(x: Floats, y: Floats, real: Floats) -> float:
        return frechet(x, real) - frechet(y, real)

    def grain(x: Floats, y: Floats, real: Floats) -> float:
        return ratio(x, real) - ratio(y, real)

    return {name: figure(difference, after.columns[name], before.columns[name]) for name in before.columns} | {
        "distance": figure(distance, a.features, b.features, a.real_features, draws=200),
        "grain": figure(grain, a.power, b.power, a.real_power),
    }


def main(judge_path: Path, out: Path, names: Sequence[str], count: int, dtype: str | None = None) -> dict[str, Any]:
    """Measure checkpoints and what lies between the first and each of the others; print it, and keep it in `out`."""
    judge = Judge.load(judge_path)
    critic = Critic.load(judge_path.with_name(judge_path.name.replace("judge", "critic")))
    out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"count": count, "judge": judge_path.name}
    scores: list[Scores] = []
    rows = []
    for name in names:
        chosen = Checkpoint.of(name)
        pipeline = chosen.load(dtype)
        catalog = Catalog(DATA, pipeline.native)
        painted = paint_all(judge, catalog, pipeline, count, steps=chosen.steps, guidance=chosen.guidance)
        rows.append(painted.pictures[:SHOWN])
        if not scores:
            real = [catalog.picture(item) for item, _ in painted.prompts]
            found["real"] = {
                "subject": figure(mean, painted.real_right),
                "whole": figure(mean, wholeness(critic, real)),
            }
            print(*lines_of("real", found["real"]), sep="\n", flush=True)
        scores.append(score(judge, critic, catalog, painted))
        found[name] = itself(scores[-1])
        if len(scores) > 1:
            found[name]["change"] = changes(scores[0], scores[-1])
        found["dtype"] = pipeline.plan.dtype
        (out / "ablation.toml").write_text(tomli_w.dumps(found))
        sheet(out / "ablation.png", [""] * SHOWN, rows)
        print(*lines_of(name, found[name]), sep="\n", flush=True)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Measure checkpoints before and after a stage.")
    parser.add_argument("judge", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("checkpoints", nargs="+", metavar="NAME[:STEPS[:GUIDANCE]]")
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    options = parser.parse_args()
    main(options.judge, options.out, options.checkpoints, options.count, options.dtype)
