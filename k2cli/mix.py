"""Previews of style mixes: parts and mix side by side, the path from one to another, the triangle of three."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import combinations
from math import comb

from k2cli.matrix import escape_braces, text_readings
from k2cli.project import Project
from k2cli.prompts import Prompt, numbered, slug
from k2cli.runs import Job, SheetLayout
from k2cli.settings import Settings
from k2cli.sheet import PER_GRID
from model.errors import K2Error

Weights = Mapping[str, float]


@dataclass(frozen=True)
class Point:
    """One picture on a sheet: the weight of each style, and the labels above its strip and below it."""

    weights: Weights
    caption: str
    row: str = ""


@dataclass(frozen=True)
class Layout:
    """Points in strips, one below another."""

    points: tuple[Point, ...]
    centred: bool = False


def preview(weights: Weights) -> Layout:
    """No style, each part by itself at its weight, and the mix."""
    parts = [Point({name: weight}, f"{name} {weight:g}") for name, weight in weights.items()]
    return Layout((Point({}, "no style"), *parts, *([Point(weights, "mix")] if len(parts) > 1 else [])))


def sweep(weights: Weights, steps: int) -> Layout:
    """From style to style in `steps` pictures; each style has its given weight where it is alone.

    Two styles make a path, three a triangle with `steps` pictures along each side, more a path for every pair. Raises
    K2Error if that is more than a sheet holds.
    """
    names = list(weights)
    if len(names) < 2:
        raise K2Error("A sweep goes from one style to another.", hint="Name two or more: dusk=1 riso=1")
    if steps < 2:
        raise K2Error(f"A sweep needs at least 2 pictures, not {steps}.", hint="Two are its ends.")
    count = steps * (steps + 1) // 2 if len(names) == 3 else steps * comb(len(names), 2)
    if count > PER_GRID:
        raise K2Error(
            f"A sweep of {steps} with {len(names)} styles makes {count} pictures; a sheet holds {PER_GRID}.",
            hint="Use fewer.",
        )

    def point(row: str, shares: Weights) -> Point:
        parts = {name: round(share * weights[name], 6) for name, share in shares.items()}
        caption = " · ".join(f"{name} {round(part, 2):g}" for name, part in parts.items() if part)
        return Point(parts, caption or "no style", row)

    last = steps - 1
    if len(names) == 3:
        first, second, third = names
        triangle = (
            point(
                f"{first} {round((last - down) * weights[first] / last, 2):g}",
                {first: 1 - down / last, second: (down - across) / last, third: across / last},
            )
            for down in range(steps)
            for across in range(down + 1)
        )
        return Layout(tuple(triangle), centred=True)
    paths = (
        point(f"{one} to {other}", {one: 1 - step / last, other: step / last})
        for one, other in combinations(names, 2)
        for step in range(steps)
    )
    return Layout(tuple(paths))


def plan_job(project: Project, settings: Settings, prompt: Prompt, layout: Layout) -> Job:
    """The run that renders a layout: one prompt, one seed, and only the layout's own styles."""
    text, _ = text_readings(prompt.text)[0]
    prompt = replace(prompt, text=escape_braces(text), settings={**prompt.settings, "batch": 1}, style={})
    without_board = replace(project, board=None)
    shots = []
    for index, point in enumerate(layout.points, 1):
        named = replace(prompt, name=numbered(prompt.name or slug(text), index, len(layout.points)))
        (shot,) = without_board.shots(settings, [named], dict.fromkeys(project.weights, 0.0) | dict(point.weights))
        shots.append(replace(shot, row=point.row, caption=point.caption))
    styles = dict.fromkeys(name for point in layout.points for name in point.weights)
    sheet = SheetLayout(columns=1, centred=layout.centred)
    return Job(project, shots, settings.model_spec(), folder_title=f"mix-{'-'.join(styles)}", sheet=sheet)
