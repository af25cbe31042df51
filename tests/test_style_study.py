"""The study of style control, on painters whose style control is known: perfect, deaf, or copying."""

from __future__ import annotations

import hashlib
import tomllib
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from model.spec import Picture, RenderSpec, Style
from model.train import style_study
from model.train.data import Catalog, Pair, Subject
from model.train.looks import DRAWINGS, split_looks
from model.train.study import choose_looks, figure, mean, represents_look, spearman
from model.train.style_study import Study, draw_trials

SUBJECTS = ("cat", "fox", "car", "tree", "house", "rose")


@cache
def colour(name: object) -> np.ndarray:
    """The colour of a subject or a look, derived from its name."""
    return 20 + 200 * np.random.default_rng(list(repr(name).encode())).random(3)


def draw(rim: np.ndarray, middle: np.ndarray) -> np.ndarray:
    """A picture whose rim's colour is its look and whose middle's colour is its subject."""
    picture = np.empty((128, 128, 3), np.uint8)
    picture[:] = rim.round()
    picture[32:96, 32:96] = middle.round()
    return picture


class Drawings(Catalog):
    """A catalogue without files."""

    def __init__(self) -> None:
        self.subjects = {name: Subject(name, (name,), (name,)) for name in SUBJECTS}
        pairs = [Pair(name, drawing) for drawing in DRAWINGS for name in SUBJECTS]
        self.pairs = [pair for pair in pairs if not pair.held_out]
        self.looks = {drawing: split_looks(drawing) for drawing in DRAWINGS}

    def picture(self, item):
        return draw(colour(item.look), colour(item.pair.subject))


class Rims:
    """A judge that always reads such pictures correctly."""

    def __call__(self, pictures):
        x = pictures.double() * 127.5 + 127.5
        unit = torch.nn.functional.normalize
        return unit(x[:, :, 28:36, 28:36].mean((2, 3)), dim=1), unit(x[:, :, :8].mean((2, 3)), dim=1)

    def read(self, names):
        return torch.nn.functional.normalize(torch.from_numpy(np.stack([colour(name) for name in names])), dim=1)


@dataclass
class Painter:
    """Paints a prompt; `hears` is how much of a reference's rim it adopts, `copies` whether it copies the middle."""

    hears: float = 1.0
    copies: bool = False
    exact: bool = True
    painted: int = 0
    native = 128
    plan = SimpleNamespace(dtype="float32")
    text = SimpleNamespace(token_ids=str.split)

    def hashes(self):
        return {"mini-raw.safetensors": "1"}

    def stream(self, specs):
        yield from self.render(specs)

    def render(self, specs: list[RenderSpec]) -> list[Picture]:
        made = []
        self.painted += len(specs)
        for spec in specs:
            middle = colour(spec.prompt.split(" ", 1)[1])
            rim = colour(spec.seed) if self.hears < 1 else np.full(3, 128.0)
            styles = sorted(spec.styles, key=lambda style: style.references[0].image)
            for style in styles:
                reference = np.asarray(Image.open(style.references[0].image)).astype(float)
                rim = rim + self.hears * min(style.strength, 1) * (reference[0, 0] - 128)
                middle = reference[64, 64] if self.copies else middle
            picture = draw(rim.clip(0, 255), middle)
            if not self.exact:  # one pixel reveals which style came first, and whether there is one at all
                picture[0, 0] = [round(50 * style.strength + 100) for style in (*spec.styles, *[Style("", -2)] * 3)[:3]]
            made.append(Picture(Image.fromarray(picture), {"pixels": hashlib.sha256(picture.tobytes()).hexdigest()}))
        return made


@pytest.fixture
def study(tmp_path: Path):
    def made(painter: Painter, count: int = 60, judged_by: str = "") -> Study:
        options = {"steps": None, "count": count, "judged_by": judged_by}
        return Study(painter, Rims(), Drawings(), tmp_path, **options)  # type: ignore[arg-type]

    return made


def test_trials_keep_subjects_and_looks_apart():
    catalog = Drawings()
    chosen = choose_looks(catalog)
    trials = draw_trials(catalog, chosen, 100)

    trained = {item.look for item in catalog.items("train")}
    assert len(set(chosen)) == 20 and not trained & set(chosen)
    assert {trial.look for trial in trials} == set(range(20))
    for trial in trials:
        assert trial.reference.look == trial.real.look == chosen[trial.look]
        assert trial.reference.pair.subject != trial.subject
        assert trial.real != trial.reference
        assert not represents_look(trial.reference) and not represents_look(trial.real)
    assert draw_trials(catalog, chosen, 100) == trials


def test_rank_correlation():
    x = np.arange(8.0)
    swapped = x[[0, 1, 3, 2, 4, 5, 6, 7]]
    assert spearman(x, x**3) == pytest.approx(1) and spearman(x, -x) == pytest.approx(-1)
    assert spearman(x, swapped) == pytest.approx(1 - 6 * 2 / (8 * 63))
    assert spearman(x, np.zeros(8)) == 0
    assert spearman(np.array([1.0, 2, 3]), np.array([1.0, 1, 2])) == pytest.approx(3**0.5 / 2)


def test_intervals_contain_the_mean_and_narrow():
    rng = np.random.default_rng(3)
    few, many = (figure(mean, (rng.random(n) < 0.7).astype(float)) for n in (50, 5000))

    for found in (few, many):
        assert found["low"] < 0.7 < found["high"]
    assert many["high"] - many["low"] < 0.3 * (few["high"] - few["low"])


def test_dependent_trials_are_resampled_as_groups():
    """Twenty each of ten kinds, identical within a kind, are as uncertain as ten."""
    kinds = np.random.default_rng(3).normal(size=10)
    alone, alike = figure(mean, kinds), figure(mean, kinds.repeat(20), groups=np.arange(10).repeat(20).tolist())
    apart = figure(mean, kinds.repeat(20))

    assert alike["high"] - alike["low"] == pytest.approx(alone["high"] - alone["low"], rel=0.1)
    assert apart["high"] - apart["low"] < 0.4 * (alike["high"] - alike["low"])


def test_perfect_painter_reaches_the_ceiling(study):
    perfect = study(Painter())

    found = style_study.agreement(perfect, ["tokens"])
    assert found["ceiling"]["agreement"]["value"] == found["tokens"]["agreement"]["value"] == 1
    assert found["floor"]["agreement"]["value"] < 0.2
    assert found["tokens"]["agreement_of_ceiling"]["value"] == found["tokens"]["content_kept"]["value"] == 1
    assert found["tokens"]["leakage"] == {"value": 0, "low": 0, "high": 0}

    curve = style_study.strength(perfect, ["tokens"])["tokens"]
    assert curve["rho"]["value"] > 0.95 and all(each["high"] < 0 for each in curve["below_zero"])
    mix = style_study.mixing(perfect, ["tokens"])["tokens"]
    assert mix["rho_of_first"]["value"] < -0.95 and mix["rho_of_second"]["value"] > 0.95
    assert mix["middle_over_other_end_of_first"]["low"] > 0 and mix["middle_over_other_end_of_second"]["low"] > 0
    assert mix["five"]["low"] > 0
    assert style_study.exact(study(Painter(), 9), ["tokens"])["tokens"] == {"strength_zero": True, "any_order": True}


def test_deaf_painter_stays_at_the_floor(study):
    deaf = study(Painter(hears=0.0))

    found = style_study.agreement(deaf, ["tokens"])
    assert found["tokens"]["agreement_over_floor"] == {"value": 0, "low": 0, "high": 0}
    assert found["tokens"]["agreement_of_ceiling"]["high"] < 0.3
    assert style_study.strength(deaf, ["tokens"])["tokens"]["rho"]["value"] == 0
    assert style_study.mixing(deaf, ["tokens"])["tokens"]["middle_over_other_end_of_first"]["value"] == 0


def test_copier_leaks_and_loses_the_subject(study):
    found = style_study.agreement(study(Painter(copies=True)), ["tokens"])["tokens"]

    assert found["leakage"]["value"] == 1 and found["content_kept"]["value"] == 0


def test_pictures_are_cached_within_and_between_runs(study):
    first, second = Painter(), Painter()

    found = style_study.agreement(study(first, 40), ["tokens"])
    again = style_study.agreement(study(second, 40), ["tokens"])

    assert (first.painted, second.painted) == (80, 0) and again == found

    style_study.agreement(study(second, 40, "another judge"), ["tokens"])
    assert second.painted == 80


@pytest.mark.parametrize("taken", [style_study.agreement, style_study.strength, style_study.mixing])
def test_intervals_are_over_looks(study, monkeypatch, taken):
    """Trials of one look are not independent: their references are alike."""
    grouped = []

    def figure_of(statistic, *columns, groups=()):
        grouped.append(list(groups))
        return figure(statistic, *columns, groups=groups, draws=2)

    monkeypatch.setattr(style_study, "figure", figure_of)
    monkeypatch.setattr(style_study, "mix_of_five", lambda *_: {})  # its trials have five looks each
    small = study(Painter(), 24)
    taken(small, ["tokens"])

    assert grouped and all(groups == [trial.look for trial in small.trials] for groups in grouped)


def test_differing_bits_are_detected(study):
    found = style_study.exact(study(Painter(exact=False), 9), ["tokens"])["tokens"]

    assert found == {"strength_zero": False, "any_order": False}


def test_from_the_command_line(tmp_path, monkeypatch):
    """Figures and sheets are written to the folder as they are finished, and the table lists all that are there."""

    class Loaded(Painter):
        variant = "raw"
        recommended = {"guidance": 2.5}  # noqa: RUF012

        @cached_property
        def resolve(self):
            return lambda spec: RenderSpec(spec.prompt, steps=28)

    monkeypatch.setattr(style_study.Pipeline, "load", lambda *args, **kwargs: Loaded())
    monkeypatch.setattr(style_study.Judge, "load", lambda path: Rims())
    (tmp_path / "judge.safetensors").touch()
    monkeypatch.setattr(style_study, "Catalog", lambda path, size: Drawings())
    for only in ("agreement", "strips,exact"):
        arguments = [
            "style_study",
            str(tmp_path / "judge.safetensors"),
            str(tmp_path / "out"),
            "--count",
            "24",
            "--ways",
            "tokens",
        ]
        monkeypatch.setattr("sys.argv", [*arguments, "--only", only])
        style_study.main()

    table = (tmp_path / "out" / "figures.md").read_text()
    assert (
        "| agreement.tokens.leakage | 0.000 | 0.000 … 0.000 |" in table and "| exact.tokens.any_order | True |" in table
    )
    facts = tomllib.loads((tmp_path / "out" / "agreement.toml").read_text())
    assert facts["count"] == 24 and facts["steps"] == 28 and facts["model"]["variant"] == "raw"
    with Image.open(tmp_path / "out" / "strength-tokens.png") as sheet:
        assert sheet.size == (9 * 134 + 6, 4 * 134 + 26)


@pytest.mark.parametrize("option", ["--only", "--ways"])
def test_unknown_figures_and_ways_are_refused_before_loading(monkeypatch, tmp_path, capsys, option):
    monkeypatch.setattr(style_study.Pipeline, "load", lambda *args, **kwargs: pytest.fail("loaded"))
    monkeypatch.setattr("sys.argv", ["style_study", "judge.safetensors", str(tmp_path / "out"), option, "splice"])

    with pytest.raises(SystemExit):
        style_study.main()

    assert f'argument {option}: "splice" is not one of ' in capsys.readouterr().err
