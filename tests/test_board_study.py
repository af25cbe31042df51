"""The study of cohesion, creativity and moodboards, on a painter whose pictures are known."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from test_style_study import Drawings, Rims, colour, draw

from model.avoid import phrases_in
from model.colours import named_colours
from model.moodboard import Board, Look
from model.spec import Picture, RenderSpec
from model.train import board_study as module
from model.train.board_study import (
    Study,
    background_colours,
    cohesion,
    creativity,
    mean_distances,
    mean_likeness,
    member_accuracy,
)


class Judge(Rims):
    """Reads rims as looks and middles as subjects; its features combine both."""

    def trunk(self, pictures):
        return torch.cat(self(pictures), 1)


@dataclass
class Painter:
    """A picture's look is its rim: its seed's colour, moved towards its leader's by cohesion times `ties`."""

    ties: float = 1.0
    jumps: bool = False  # whether a picture at cohesion 0 depends on its batch
    text = SimpleNamespace(token_ids=str.split)

    def stream(self, specs: list[RenderSpec]):
        for spec in specs:
            rim, led = colour(spec.seed), spec.leader or spec
            rim = rim + spec.cohesion * self.ties * (colour(led.seed) - rim)
            picture = draw(rim, colour(subject_of(spec.prompt)))
            picture[80:90, 80:90] = spec.seed % 251
            if self.jumps:
                picture[0, 0] = len(specs) if spec.leader else 255
            yield Picture(Image.fromarray(picture), {"pixels": hashlib.sha256(picture.tobytes()).hexdigest()})


def subject_of(prompt: str) -> str:
    return prompt.split(",")[0].split(" on ")[0].split(" in ")[0].split(" ", 1)[1]


@pytest.fixture
def study(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(module, "BATCH", 4)

    def made(painter: Painter, count: int = 40) -> Study:
        return Study(painter, Judge(), Drawings(), tmp_path, None, count)  # type: ignore[arg-type]

    return made


def test_painter_with_cohesion_reaches_one_look(study):
    found = {scope: cohesion(study(Painter()), scope) for scope in ("prompt", "run")}
    for each in found.values():
        assert each["rho"]["value"] == pytest.approx(1) and each["rho"]["low"] > 0.99
        assert each["spread_of_zero"]["value"] < 0.01 and each["likeness"]["at_1"]["value"] > 0.99
        assert each["subject_of_zero"] == {"value": 1, "low": 1, "high": 1}
        assert 0 < each["pixels_of_zero"]["value"] < 1 and each["zero_is_exact"]
    assert found["run"]["pixels_of_zero"]["value"] > found["prompt"]["pixels_of_zero"]["value"]


def test_painter_without_cohesion_is_exposed(study):
    found = cohesion(study(Painter(ties=0.0)))
    assert found["rho"]["value"] == 0 and found["spread_of_zero"]["value"] == found["pixels_of_zero"]["value"] == 1


def test_differing_bits_at_zero_are_detected(study):
    class Nervous(Painter):
        def stream(self, specs):
            self.calls = getattr(self, "calls", 0) + 1
            for picture in super().stream(specs):
                yield Picture(picture.image, {"pixels": picture.record["pixels"] + str(self.calls)})

    assert not cohesion(study(Nervous()))["zero_is_exact"]


def test_creativity_levels_are_compared_with_raw(study):
    found = creativity(study(Painter()), seeds=2)
    assert found["high"]["subject_of_raw"]["value"] == 1
    assert found["raw"]["pixels"] == found["high"]["pixels"]  # this painter ignores them


def test_likeness_and_distance_are_means_over_pairs(study):
    one, same, other = study(Painter()).see([RenderSpec("a fox", seed=s) for s in (1, 252, 2)])
    same = same._replace(style=one.style, small=one.small, features=one.features)
    cosine = float(one.style @ other.style)
    assert mean_likeness([one, same, other]) == pytest.approx((1 + 2 * cosine) / 3)
    apart = float(np.sqrt(np.mean((one.small - other.small) ** 2)))
    assert mean_distances([one, same, other])[0] == pytest.approx(2 / 3 * apart, rel=1e-5)


def test_members_counts_pictures_in_looks_mostly_of_their_own():
    a, b = (module.Look("noto", medium) for medium in ("film", "neon"))
    paths = [Path(str(i)) for i in range(6)]
    truth = dict(zip(paths, [a, a, a, b, b, b], strict=True))

    def board(*looks: list[int]) -> Board:
        return Board(tuple(Look(tuple(paths[i] for i in look), 0.5, ()) for look in looks), (), (), (), "")

    assert member_accuracy(truth, board([0, 1, 2], [3, 4, 5])) == 1
    assert member_accuracy(truth, board([0, 1, 3], [2, 4, 5])) == pytest.approx(4 / 6)
    assert member_accuracy(truth, board([0, 1, 2, 3, 4, 5])) == 0.5


def test_grounds_are_read_from_the_rim(study):
    (seen,) = study(Painter()).see([RenderSpec("a fox", seed=3)])
    for name in ("orange", "night blue", "white"):
        picture = draw(np.array(named_colours()[name][0], float), np.zeros(3))
        assert background_colours([seen._replace(picture=picture)]) == [name]


def test_avoided_words_are_single_phrases():
    for words in module.MEDIA.values():
        assert not words or phrases_in(words[0]) == [words[0]]
