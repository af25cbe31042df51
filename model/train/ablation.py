"""What a stage of post-training changes, by a judge that no training used: before and after, picture by picture.

`python -m model.train.ablation JUDGE OUT BEFORE AFTER…` renders the same captions of pictures that were never trained
on, from the same seeds, by each checkpoint: `raw` and `turbo` are the bundled ones, anything else a run in `.runs`,
quantised to 8 bits as for release. `NAME:STEPS:GUIDANCE` replaces the checkpoint's own settings.

subject    share of pictures whose subject is the nearest of 100 names
style      cosine of the judge's style embedding to that of real pictures in the requested look
whole      the critic's probability that nothing in a picture is broken
diversity  mean distance between pictures of one prompt with different seeds, in the judge's features
distance   Fréchet distance to as many real pictures, in the same features
kernel     squared kernel distance to them, whose expectation is 0 if there is no difference
grain      power in the top octave of the spectrum of the film-grain look, relative to real pictures

Real pictures of the same captions are measured too where that makes sense. Changes are after − before, with intervals
over drawings, which held-out pictures share; distances have none, since a resample of a sample is further away.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tomli_w
import torch

from model.errors import K2Error, exit_on_error
from model.pipeline import Pipeline
from model.train import release
from model.train.data import DATA, Catalog
from model.train.encode import to_tensor
from model.train.evaluate import Task, frechet, kernel_distance, render_task
from model.train.judge import SIZE, Critic, Judge
from model.train.study import (
    PROTOTYPE_PICTURES,
    Floats,
    Pixels,
    difference,
    embed,
    figure,
    mean,
    ratio,
    sheet,
    table_rows,
    unit_mean,
)
from model.train.viewing import pictures_by_look

MAX_SHOWN = 12  # pictures of each checkpoint on the sheet


class Checkpoint(NamedTuple):
    """What to render with: a name, and settings that differ from the checkpoint's own."""

    name: str
    steps: int | None = None
    guidance: float | None = None

    @classmethod
    def parse(cls, text: str) -> Checkpoint:
        """From NAME, NAME:STEPS or NAME:STEPS:GUIDANCE."""
        name, *numbers = text.split(":")
        try:
            steps, guidance, *more = (*numbers, *("",) * (2 - len(numbers)))
            if more:
                raise ValueError
            return cls(name, int(steps) if steps else None, float(guidance) if guidance else None)
        except ValueError:
            raise K2Error(f'"{text}" is not NAME, NAME:STEPS or NAME:STEPS:GUIDANCE.') from None

    def load(self, dtype: str | None) -> Pipeline:
        """Its pipeline; a run's transformer is used with the other bundled parts."""
        if self.name in ("raw", "turbo"):
            return Pipeline.load("mini", self.name, dtype=dtype, filters=())
        with tempfile.TemporaryDirectory() as folder:
            release.main(self.name, Path(folder))
            file = next(
                path for name in ("turbo", "raw") if (path := Path(folder, f"mini-{name}.safetensors")).exists()
            )
            return Pipeline.load(str(file), dtype=dtype, filters=())


@torch.inference_mode()
def critic_scores(critic: Critic, pictures: Sequence[Pixels]) -> Floats:
    """The critic's rating of each picture, 0 … 1."""
    parts = [pictures[start : start + 64] for start in range(0, len(pictures), 64)]
    return torch.cat([critic(to_tensor(list(part), SIZE)).sigmoid() for part in parts]).numpy()


def look_embeddings(task: Task, judge: Judge, catalog: Catalog) -> Floats:
    """The embedding of each requested picture's look: the mean style of real ones of the train split."""
    known, wanted = pictures_by_look(catalog), {item.look for item in task.items}
    real = {look: [catalog.picture(item) for item in known[look][:PROTOTYPE_PICTURES]] for look in wanted}
    centres = {look: unit_mean(embed(judge, pictures)[1]) for look, pictures in real.items()}
    return np.stack([centres[item.look] for item in task.items])


class Scores(NamedTuple):
    """A checkpoint's numbers: a column for each figure that is a mean, and the data for the others."""

    columns: dict[str, Floats]
    drawings: Sequence[Hashable]  # of the pictures; each prompt for diversity has its own
    features: Floats
    real_features: Floats
    power: Floats
    real_power: Floats

    def groups(self, name: str) -> Sequence[Hashable]:
        """The groups that a figure's rows are resampled by."""
        return () if name == "diversity" else self.drawings


def checkpoint_figures(scores: Scores) -> dict[str, Any]:
    """A checkpoint's own figures."""
    return {name: figure(mean, column, groups=scores.groups(name)) for name, column in scores.columns.items()} | {
        "distance": round(frechet(scores.features, scores.real_features), 4),
        "kernel": round(kernel_distance(scores.features, scores.real_features), 5),
        "grain": figure(ratio, scores.power, scores.real_power),
    }


def figure_changes(before: Scores, after: Scores) -> dict[str, Any]:
    """after − before of every figure, over the same pictures."""
    a, b = after, before

    def grain(x: Floats, x_real: Floats, y: Floats, y_real: Floats) -> float:
        return ratio(x, x_real) - ratio(y, y_real)

    return (
        {name: figure(difference, a.columns[name], b.columns[name], groups=b.groups(name)) for name in b.columns}
        | {
            name: round(metric(a.features, a.real_features) - metric(b.features, b.real_features), 5)
            for name, metric in (("distance", frechet), ("kernel", kernel_distance))
        }
        | {
            "grain": figure(grain, a.power, a.real_power, b.power, b.real_power),
        }
    )


def main(judge_path: Path, out: Path, names: Sequence[str], count: int, dtype: str | None = None) -> dict[str, Any]:
    """Measure checkpoints and the change from the first to each of the others; print it, and store it in `out`."""
    checkpoints = [Checkpoint.parse(name) for name in names]
    judge = Judge.load(judge_path)
    critic = Critic.load(judge_path.with_name(judge_path.name.replace("judge", "critic")))
    out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"count": count, "judge": judge_path.name}
    tasks: dict[int, tuple[Task, Floats]] = {}  # by the checkpoints' size
    before: Scores | None = None
    rows = []
    for name, checkpoint in zip(names, checkpoints, strict=True):
        pipeline = checkpoint.load(dtype)
        if pipeline.native not in tasks:
            catalog = Catalog(DATA, pipeline.native)
            task = Task.prepare(judge, catalog, count)
            tasks[pipeline.native] = task, look_embeddings(task, judge, catalog)
            real = {
                name: figure(mean, column, groups=task.drawings)
                for name, column in (("subject", task.recognised), ("whole", critic_scores(critic, task.pictures)))
            }
            found[f"real {pipeline.native}"] = real
            print(*table_rows(f"real {pipeline.native}", real), sep="\n")
        task, looks = tasks[pipeline.native]
        measured = render_task(task, judge, pipeline, steps=checkpoint.steps, guidance=checkpoint.guidance)
        columns = {
            "subject": measured.recognised.astype(float),
            "style": (measured.style * looks).sum(1),
            "whole": critic_scores(critic, measured.pictures),
            "diversity": measured.distances,
        }
        scores = Scores(columns, task.drawings, measured.features, task.features, measured.power, task.power)
        found[name] = checkpoint_figures(scores) | ({"change": figure_changes(before, scores)} if before else {})
        before = before or scores
        found["dtype"] = pipeline.plan.dtype
        rows.append(measured.pictures[:MAX_SHOWN])
        (out / "ablation.toml").write_text(tomli_w.dumps(found))
        sheet(out / "ablation.png", [""] * MAX_SHOWN, rows)
        print(*table_rows(name, found[name]), sep="\n", flush=True)
    return found


if __name__ == "__main__":
    with exit_on_error():
        parser = argparse.ArgumentParser(description="Measure checkpoints before and after a stage.")
        parser.add_argument("judge", type=Path)
        parser.add_argument("out", type=Path)
        parser.add_argument("checkpoints", nargs="+", metavar="NAME[:STEPS[:GUIDANCE]]")
        parser.add_argument("--count", type=int, default=300)
        parser.add_argument("--dtype", choices=("float32", "bfloat16"))
        options = parser.parse_args()
        main(options.judge, options.out, options.checkpoints, options.count, options.dtype)
