"""A study's pictures as the evaluation judge sees them, rendered when a figure first asks for them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from model.moodboard import Board
from model.pipeline import Pipeline
from model.spec import RenderSpec
from model.train.data import Catalog, Item, stable_seed
from model.train.encode import to_tensor
from model.train.evaluate import candidate_subjects
from model.train.judge import SIZE, Judge
from model.train.looks import Look
from model.train.study import Floats, Pixels, embed_names, render_specs, unit_mean


class JudgeView(NamedTuple):
    """The judge's view of one picture."""

    picture: Pixels  # [H, W, 3]
    subject: Floats  # [96], unit
    style: Floats  # [48], unit
    features: Floats  # [F]
    small: Floats  # [3 · 64 · 64]


class Study:
    """Renders what figures ask for, each picture once, and shows it to the judge."""

    def __init__(self, pipeline: Pipeline, judge: Judge, catalog: Catalog, folder: Path, steps: int | None, count: int):
        self.pipeline, self.judge, self.catalog, self.folder = pipeline, judge, catalog, folder
        self.steps, self.count = steps, count
        self.subjects = candidate_subjects(catalog)
        self.names = embed_names(judge, self.subjects)
        self.seen: dict[RenderSpec, JudgeView] = {}
        self.boards: dict[tuple[Look, ...], tuple[dict[Path, Look], Board]] = {}

    def spec(self, text: str, seed: int, **changes: Any) -> RenderSpec:
        return RenderSpec(text, seed=seed, steps=self.steps, **changes)

    @torch.inference_mode()
    def look_at(self, pictures: Sequence[Pixels]) -> list[JudgeView]:
        found: list[JudgeView] = []
        for start in range(0, len(pictures), 64):
            part = list(pictures[start : start + 64])
            pixels = to_tensor(part, SIZE)
            parts = (*self.judge(pixels), self.judge.trunk(pixels).flatten(1), pixels.flatten(1))
            found += [JudgeView(*each) for each in zip(part, *(x.numpy() for x in parts), strict=True)]
        return found

    def see(self, specs: Sequence[RenderSpec]) -> list[JudgeView]:
        """Each spec's picture as the judge sees it; rendered when first asked for."""
        new = list(dict.fromkeys(spec for spec in specs if spec not in self.seen))
        self.seen |= zip(new, self.look_at(render_specs(self.pipeline, new)), strict=True)
        return [self.seen[spec] for spec in specs]

    def recognised(self, seen: Sequence[JudgeView], subjects: Sequence[str]) -> Floats:
        """1 if the requested subject is the nearest of all candidates, else 0."""
        nearest = (np.stack([each.subject for each in seen]) @ self.names.T).argmax(1)
        return np.array([self.subjects[n] == name for n, name in zip(nearest, subjects, strict=True)], float)

    def nearest_media(self, seen: Sequence[JudgeView]) -> list[str]:
        """The medium of each picture: that of the nearest training look."""
        looks, centres = self._looks
        return [looks[n].medium for n in (np.stack([each.style for each in seen]) @ centres.T).argmax(1)]

    @cached_property
    def _looks(self) -> tuple[list[Look], Floats]:
        """Training looks, and the mean style of eight real pictures of each."""
        by_look = pictures_by_look(self.catalog)
        looks = sorted(by_look, key=repr)
        centres = [
            style_centre(self.look_at([self.catalog.picture(item) for item in shuffled(by_look[look])[:8]]))
            for look in looks
        ]
        return looks, np.stack(centres)


def pictures_by_look(catalog: Catalog) -> dict[Look, list[Item]]:
    """The pictures of every training look."""
    found: dict[Look, list[Item]] = {}
    for item in catalog.items("train"):
        found.setdefault(item.look, []).append(item)
    return found


def shuffled(items: Sequence[Item]) -> list[Item]:
    return sorted(items, key=lambda item: stable_seed("board", item.pair, item.look))


def style_centre(seen: Sequence[JudgeView]) -> Floats:
    """The mean style, of unit length."""
    return unit_mean(np.stack([each.style for each in seen]))


def mean_likeness(seen: Sequence[JudgeView]) -> float:
    """Mean cosine of styles over all pairs."""
    style = np.stack([each.style for each in seen])
    pairs = np.triu_indices(len(seen), 1)
    return float((style @ style.T)[pairs].mean())


def mean_distances(seen: Sequence[JudgeView]) -> tuple[float, float]:
    """Mean distance over all pairs: of pixels, of features."""
    pairs = list(combinations(seen, 2))
    pixels = [np.sqrt(np.mean((a.small - b.small) ** 2)) for a, b in pairs]
    return float(np.mean(pixels)), float(np.mean([np.linalg.norm(a.features - b.features) for a, b in pairs]))
