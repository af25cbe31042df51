"""What studies of the model share: looks to study, pictures, the judge's view of them, statistics, sheets.

A study is a set of figures, each a function that renders, judges and counts. `run_study` runs them: every figure is
written as TOML when it is done, and all that exist as a table, `figures.md`. Intervals are 95 % bootstrap intervals.
"""

from __future__ import annotations

import argparse
import time
import tomllib
from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from model.pipeline import Pipeline
from model.spec import RenderSpec
from model.train.data import DATA, Catalog, Item, stable_seed
from model.train.encode import to_tensor
from model.train.judge import SIZE, Judge
from model.train.looks import Look

Floats = NDArray[np.floating[Any]]
Pixels = NDArray[np.uint8]  # [H, W, 3]

MAX_LOOKS = 20  # held-out looks that are studied
PROTOTYPE_PICTURES = 40  # real pictures whose mean stands for a look
SIDE = 128  # of a sheet's pictures, in px


@dataclass(frozen=True)
class SubjectStudy:
    """A study of `count` subjects, each requested once."""

    pipeline: Pipeline
    judge: Judge
    subjects: list[str]  # all subjects
    folder: Path
    steps: int | None
    count: int

    @property
    def chosen(self) -> list[str]:
        order = np.random.default_rng(5).permutation(len(self.subjects))
        return [self.subjects[index] for index in order[: self.count]]

    @classmethod
    def run(cls, options: argparse.Namespace, figures: Mapping[str, Callable[..., dict[str, Any]]]) -> None:
        """Compute the figures that the options ask for, over all subjects of the training."""

        def begin(pipeline: Pipeline, judge: Judge) -> SubjectStudy:
            subjects = list(Catalog(DATA, pipeline.native).subjects)
            return cls(pipeline, judge, subjects, options.out, options.steps, options.count)

        run_study(options, figures, begin)


# ---- looks and pictures ---------------------------------------------------------------------------------------------


def choose_looks(catalog: Catalog) -> list[Look]:
    """Permanently held-out looks, always the same ones."""
    held = {item.look for item in catalog.items("styles")}
    return sorted(held, key=lambda look: stable_seed("study", look))[:MAX_LOOKS]


def represents_look(item: Item) -> bool:
    """Whether a picture is in the half that makes its look's prototype; the others are references and the ceiling."""
    return stable_seed("prototype", item.pair) % 2 == 0


def prototype(judge: Judge, catalog: Catalog, look: Look) -> Floats:
    """The embedding of a held-out look: the mean style of real pictures, of unit length."""
    items = [item for item in catalog.items("styles") if item.look == look and represents_look(item)][
        :PROTOTYPE_PICTURES
    ]
    return unit_mean(embed(judge, [catalog.picture(item) for item in items])[1])


def unit_mean(styles: Floats) -> Floats:
    """The mean of unit vectors [N, D], of unit length."""
    centre = styles.mean(0)
    return centre / np.linalg.norm(centre)


def render_specs(pipeline: Pipeline, specs: Sequence[RenderSpec]) -> list[Pixels]:
    """Pictures of specs in order. Rendered by prompt length, so that prompts of one length share batches."""
    order = sorted(range(len(specs)), key=lambda index: len(pipeline.text.token_ids(specs[index].prompt)))
    made = pipeline.stream([specs[index] for index in order])
    found = {index: np.asarray(each.image.convert("RGB")) for index, each in zip(order, made, strict=True)}
    return [found[index] for index in range(len(specs))]


@torch.inference_mode()
def embed(judge: Judge, pictures: Sequence[Pixels]) -> tuple[Floats, Floats]:
    """Pictures of one size -> the judge's unit subject [N, 96] and style [N, 48] embeddings."""
    parts = [judge(to_tensor(list(pictures[start : start + 64]), SIZE)) for start in range(0, len(pictures), 64)]
    subject, style = (torch.cat(each).numpy() for each in zip(*parts, strict=True))
    return subject, style


@torch.inference_mode()
def embed_names(judge: Judge, subjects: Sequence[str]) -> Floats:
    """Subjects' names as the judge reads them [S, 96]."""
    return judge.read(subjects).numpy()


# ---- statistics -----------------------------------------------------------------------------------------------------


def ranks(values: Floats) -> Floats:
    """Ranks of values [n]; equal ones share their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


def spearman(x: Floats, y: Floats) -> float:
    """Spearman's rank correlation of x and y [n]; 0 if one of them is constant."""
    a, b = ranks(x) - ranks(x).mean(), ranks(y) - ranks(y).mean()
    size = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / size if size else 0.0


def figure(
    statistic: Callable[..., float], *columns: NDArray[Any], groups: Sequence[Hashable] = (), draws: int = 2000
) -> dict[str, float]:
    """A statistic of columns [trials, …] and its 95 % bootstrap interval over resampled trials.

    groups  of trials that are not independent, like pictures of one drawing: resampled as units
    """
    rng = np.random.default_rng(0)
    by_group: dict[Hashable, list[int]] = defaultdict(list)
    for index in range(len(columns[0])):
        by_group[groups[index] if groups else index].append(index)
    count, sizes = len(by_group), {len(each) for each in by_group.values()}
    drawn: Iterable[NDArray[np.integer]]
    if len(sizes) == 1:  # as when each is alone: several times as fast
        members = np.array(list(by_group.values()))
        drawn = (members[rng.integers(0, count, count)].ravel() for _ in range(draws))
    else:
        parts = [np.array(each) for each in by_group.values()]
        drawn = (np.concatenate([parts[i] for i in rng.integers(0, count, count)]) for _ in range(draws))
    low, high = np.nanquantile([statistic(*(c[index] for c in columns)) for index in drawn], (0.025, 0.975))
    return {"value": round(float(statistic(*columns)), 4), "low": round(float(low), 4), "high": round(float(high), 4)}


def mean(x: Floats) -> float:
    return float(x.mean())


def ratio(x: Floats, y: Floats) -> float:
    return float(x.mean() / y.mean()) if y.any() else float("nan")


def difference(x: Floats, y: Floats) -> float:
    return float(x.mean() - y.mean())


# ---- what is written ------------------------------------------------------------------------------------------------


def sheet(path: Path, titles: Sequence[str], rows: Sequence[Sequence[Pixels]], labels: Sequence[str] = ()) -> Path:
    """Pictures in rows under one line of heads, with a label before each row if there are labels."""
    margin = 46 if labels else 6
    page = Image.new("RGB", (margin + len(titles) * (SIDE + 6), len(rows) * (SIDE + 6) + 26), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(14)
    for column, head in enumerate(titles):
        draw.text((margin + 2 + column * (SIDE + 6), 5), head, "black", font)
    for row, pictures in enumerate(rows):
        top = 26 + row * (SIDE + 6)
        if labels:
            draw.text((8, top + SIDE // 2 - 9), labels[row], "black", ImageFont.load_default(16))
        for column, picture in enumerate(pictures):
            page.paste(Image.fromarray(picture).resize((SIDE, SIDE)), (margin + column * (SIDE + 6), top))
    page.save(path)
    return path


def table_rows(name: str, value: Any) -> list[str]:
    """A figure's numbers, one per line, under their dotted names."""
    if isinstance(value, dict) and "value" in value:
        label = f"{name}[{value['strength']:g}]" if "strength" in value else name
        return [f"| {label} | {value['value']:.3f} | {value['low']:.3f} … {value['high']:.3f} |"]
    if isinstance(value, dict):
        return [line for key, each in value.items() for line in table_rows(f"{name}.{key}", each)]
    if isinstance(value, list):
        return [line for i, each in enumerate(value) for line in table_rows(f"{name}.{i}", each)]
    return [f"| {name} | {value} | |"]


def write_table(folder: Path, names: Sequence[str]) -> None:
    """Write all figures in the folder as one table."""
    rows = ["| figure | value | 95 % |", "|---|---|---|"]
    for name in names:
        if (file := folder / f"{name}.toml").exists():
            rows += table_rows(name, tomllib.loads(file.read_text())["found"])
    (folder / "figures.md").write_text("\n".join(rows) + "\n")


def study_parser(about: str | None, figures: Sequence[str]) -> argparse.ArgumentParser:
    """The options of every study."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("judge", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--variant", choices=("raw", "turbo"))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    parser.add_argument("--steps", type=int, help="default: the checkpoint's own number")
    parser.add_argument("--count", type=int, default=200, help="pictures or trials per figure")
    parser.add_argument("--only", type=comma_list(figures), default=list(figures), help=f"of {','.join(figures)}")
    return parser


def comma_list(known: Collection[str]) -> Callable[[str], list[str]]:
    """Reads names separated by commas, each one of these."""

    def names(text: str) -> list[str]:
        chosen = text.split(",")
        for name in chosen:
            if name not in known:
                raise argparse.ArgumentTypeError(f'"{name}" is not one of {",".join(known)}')
        return chosen

    return names


def run_study(
    options: argparse.Namespace,
    figures: Mapping[str, Callable[..., dict[str, Any]]],
    make_study: Callable[[Pipeline, Judge], Any],
    *more: Any,
) -> None:
    """Compute the figures that the options ask for, each from the result of `make_study` and `more`, and write them."""
    options.out.mkdir(parents=True, exist_ok=True)
    pipeline = Pipeline.load(options.model, options.variant, dtype=options.dtype, filters=())
    study = make_study(pipeline, Judge.load(options.judge))
    for name in options.only:
        print(name, flush=True)
        started = time.monotonic()
        found = figures[name](study, *more)
        facts = {
            "model": {"name": options.model, "variant": pipeline.variant, "files": pipeline.hashes()},
            "dtype": pipeline.plan.dtype,
            "steps": pipeline.resolve(RenderSpec("", steps=options.steps)).steps,
            "guidance": pipeline.recommended["guidance"],
            "count": options.count,
            "judge": options.judge.name,
            "seconds": round(time.monotonic() - started, 1),
        }
        (options.out / f"{name}.toml").write_text(tomli_w.dumps(facts | {"found": found}))
        write_table(options.out, list(figures))
    print((options.out / "figures.md").read_text())
