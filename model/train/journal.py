"""A run's log: a line of figures now and then, cut back when the run resumes, and drawn as curves."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from pathlib import Path

from PIL import Image, ImageDraw

COLOURS = ("#1f6feb", "#d1242f", "#1a7f37", "#9a6700", "#8250df", "#57606a")
LEFT_OUT = ("step", "seconds", "lr", "norm")  # figures that no curve is drawn of


class Journal:
    """`log.csv` of a run: `step`, `seconds`, then the stage's figures."""

    def __init__(self, path: Path, step: int = 0):
        """Go on after `step`; lines beyond it are of a past that was not saved."""
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        kept = [line for line in lines if not (cell := line.split(",")[0]).isdigit() or int(cell) <= step]
        if kept != lines:
            path.write_text("".join(line + "\n" for line in kept))

    def add(self, row: Mapping[str, float]) -> None:
        new = not self.path.exists() or not self.path.stat().st_size
        with self.path.open("a", newline="") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow(row)
            writer.writerow(row.values())

    def read(self) -> dict[str, list[float]]:
        """Columns by name; none where the log has no names."""
        if not self.path.exists():
            return {}
        with self.path.open(newline="") as file:
            rows = list(csv.reader(file))
        if len(rows) < 2 or rows[0][0] != "step":
            return {}
        full = [row for row in rows[1:] if len(row) == len(rows[0])]
        return {name: [float(row[i]) for row in full] for i, name in enumerate(rows[0])}

    def draw(self, size: tuple[int, int] = (900, 300)) -> None:
        """`curves.png` beside the log: every figure over the steps, each on its own scale, its range in the legend."""
        columns = self.read()
        if len(columns.get("step", ())) < 2:
            return
        width, height = size
        picture = Image.new("RGB", size, "white")
        pen = ImageDraw.Draw(picture)
        steps = columns["step"]
        drawn = [(name, values) for name, values in columns.items() if name not in LEFT_OUT]
        drawn = [(name, values) for name, values in drawn if any(map(math.isfinite, values))]
        for index, (name, values) in enumerate(drawn[: len(COLOURS)]):
            known = [(x, y) for x, y in zip(steps, values, strict=True) if math.isfinite(y)]
            low, high = min(y for _, y in known), max(y for _, y in known)
            across, up = max(steps[-1] - steps[0], 1), (high - low) or 1
            points = [
                (10 + (width - 20) * (x - steps[0]) / across, height - 12 - (height - 60) * (y - low) / up)
                for x, y in known
            ]
            pen.line(points, COLOURS[index], 2)
            pen.text((12 + 145 * index, 8), f"{name} {low:.3g} … {high:.3g}", COLOURS[index])
        pen.text((12, 24), f"steps {steps[0]:g} … {steps[-1]:g}", "#57606a")
        picture.save(self.path.with_name("curves.png"))
