"""A run's log: a line of figures now and then, truncated when the run resumes, and drawn as curves."""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from model.atomic import atomic_write

COLOURS = (
    *("#1f6feb", "#d1242f", "#1a7f37", "#9a6700", "#8250df", "#57606a"),
    *("#54aeff", "#ff8182", "#4ac26b", "#d4a72c", "#d8b9ff", "#afb8c1"),
)
COLUMNS = 6  # figures in a row of the legend
NOT_DRAWN = ("step", "seconds", "lr", "norm")  # figures without a curve


class Journal:
    """`log.csv` of a run: `step`, `seconds`, then the stage's figures."""

    def __init__(self, path: Path, step: int = 0):
        """Continue after `step`; later lines are of steps that were not saved, and are removed."""
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        kept = [line for line in lines if not (cell := line.split(",")[0]).isdigit() or int(cell) <= step]
        if kept != lines:
            with atomic_write(path) as draft:
                draft.write_text("".join(line + "\n" for line in kept))

    def add(self, row: Mapping[str, float]) -> None:
        """Add a line; new figures get columns of their own, missing ones stay empty."""
        names = self._names()
        new_names = [name for name in row if name not in names]
        if not new_names:
            with self.path.open("a", newline="") as file:
                csv.DictWriter(file, names).writerow(row)
            return
        _, rows = self._table()
        with atomic_write(self.path) as draft, draft.open("w", newline="") as file:
            writer = csv.DictWriter(file, names + new_names)
            writer.writeheader()
            writer.writerows([*rows, row])

    def _names(self) -> list[str]:
        """Names of the log's columns; the rest of the file, which may be long, is not read."""
        if not self.path.exists():
            return []
        with self.path.open(newline="") as file:
            return next(csv.reader(file), [])

    def _table(self) -> tuple[list[str], list[dict[str, str]]]:
        """Names and rows of the log."""
        if not self.path.exists():
            return [], []
        with self.path.open(newline="") as file:
            reader = csv.DictReader(file)
            return list(reader.fieldnames or ()), list(reader)

    def read(self) -> dict[str, list[float]]:
        """Columns by name, NaN where a figure is missing; none if the log has no names."""
        names, rows = self._table()
        if not rows or names[0] != "step":
            return {}
        return {name: [float(row[name] or "nan") for row in rows] for name in names}

    def draw(self, size: tuple[int, int] = (900, 300)) -> None:
        """`curves.png` beside the log: every figure over the steps, each on its own scale, its range in the legend."""
        columns = self.read()
        if len(columns.get("step", ())) < 2:
            return
        width, height = size
        picture = Image.new("RGB", size, "white")
        pen = ImageDraw.Draw(picture)
        steps = columns["step"]
        drawn = [(name, values) for name, values in columns.items() if name not in NOT_DRAWN]
        drawn = [(name, values) for name, values in drawn if any(map(math.isfinite, values))]
        rows = -(-len(drawn) // COLUMNS)
        top = 32 + 16 * rows
        for index, (name, values) in enumerate(drawn):
            colour = COLOURS[index % len(COLOURS)]
            finite = [(x, y) for x, y in zip(steps, values, strict=True) if math.isfinite(y)]
            low, high = min(y for _, y in finite), max(y for _, y in finite)
            across, up = max(steps[-1] - steps[0], 1), (high - low) or 1
            points = [
                (10 + (width - 20) * (x - steps[0]) / across, height - 12 - (height - 12 - top) * (y - low) / up)
                for x, y in finite
            ]
            pen.line(points, colour, 2)
            row, place = divmod(index, COLUMNS)
            pen.text((12 + 145 * place, 8 + 16 * row), f"{name} {low:.3g} … {high:.3g}", colour)
        pen.text((12, 8 + 16 * rows), f"steps {steps[0]:g} … {steps[-1]:g}", "#57606a")
        picture.save(self.path.with_name("curves.png"))


def mean_figures(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Each figure's mean over the rows that have it, as a number."""
    known: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        for key, value in row.items():
            known[key] += [] if math.isnan(value) else [value]
    return {key: sum(values) / len(values) if values else math.nan for key, values in known.items()}
