"""Before and after a training stage: paired figures with known results, and the whole study at smoke-test size."""

import tomllib
from dataclasses import asdict

import numpy as np
import pytest
from test_stages import base
from workshop import enlarge, with_box, workshop  # noqa: F401

from model.errors import K2Error
from model.library import BUNDLED
from model.spec import RenderSpec
from model.train import ablation, evaluate, states
from model.train.ablation import Checkpoint, Scores, figure_changes
from model.train.data import DATA, Catalog
from model.train.pretrain import Recipe
from model.train.states import RUNS

RNG = np.random.default_rng(0)
COLUMNS = ("subject", "style", "whole", "diversity")


def scores(columns, features, real, power, real_power):
    return Scores(dict(zip(COLUMNS, columns, strict=True)), range(len(features)), features, real, power, real_power)


def test_changes_are_measured_per_picture():
    """Pictures differ a lot, but each changes by 0.1: the interval is that of the change, not of the pictures."""
    before, real, right = RNG.normal(0, 1, (4, 200)), RNG.standard_normal((200, 3)), np.array([2.0, 0, 0])
    features, power = RNG.standard_normal((200, 3)) + right, RNG.random(40)
    first = scores(before, features, real, power, np.full(40, 2.0))
    second = scores(before + 0.1, features - right, real, power + 0.5, np.full(40, 2.0))
    found = figure_changes(first, second)

    for name in COLUMNS:
        assert found[name] == {"value": 0.1, "low": 0.1, "high": 0.1}
    assert found["grain"]["value"] == pytest.approx(0.25)
    assert found["distance"] == pytest.approx(-4, abs=0.8), "the mean moved by 2 onto that of real pictures"
    assert found["kernel"] < 0


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("raw", ("raw", None, None)),
        ("a-run:8", ("a-run", 8, None)),
        ("raw:8:0", ("raw", 8, 0.0)),
        ("x::2.5", ("x", None, 2.5)),
    ],
)
def test_checkpoint_names_may_carry_settings(said, meant):
    assert Checkpoint.parse(said) == meant


@pytest.mark.parametrize("said", ["raw:eight", "raw:8:2:1", "raw:8:much"])
def test_invalid_settings_are_refused(said):
    with pytest.raises(K2Error, match="NAME:STEPS:GUIDANCE"):
        Checkpoint.parse(said)


def test_before_and_after_from_the_command_line(workshop, monkeypatch):  # noqa: F811
    enlarge(workshop / DATA)
    base()
    monkeypatch.setattr(evaluate, "DIVERSITY_PROMPTS", 2)
    monkeypatch.setattr(evaluate, "MAX_GRAINY", 2)
    items = Catalog.items
    monkeypatch.setattr(Catalog, "items", lambda self, split: items(self, "train"))  # too few items to hold any out
    judge = RUNS / "judge" / "judge-3.safetensors"
    ablation.main(judge, RUNS / "study", ["raw:2", "base:2", "raw:2"], 6, "float32")

    found = tomllib.loads((RUNS / "study" / "ablation.toml").read_text())
    assert (RUNS / "study" / "ablation.png").exists()
    assert {*COLUMNS, "distance", "kernel", "grain"} < found["base:2"].keys()
    assert found["base:2"]["change"]["style"]["value"] != 0
    same = found["raw:2"]["change"]
    assert all(same[name] == {"value": 0, "low": 0, "high": 0} for name in (*COLUMNS, "grain"))


def test_training_run_renders_as_it_would_after_release(workshop, monkeypatch):  # noqa: F811
    """The bundled weights saved as a training run: the same pictures, as they go through 8 bits and back."""
    with_box(BUNDLED, monkeypatch)
    weights = {f"ema.{name}": tensor for name, tensor in states.bundled_state().items()}
    place = {
        "step": 1,
        "seconds": 1.0,
        "recipe": asdict(Recipe(name="again", size=256, batch=1, repeats=1, mu=0.0, lr=0.0, muon_lr=0.0, steps=1)),
    }
    states.write_state(RUNS / "again", weights, place, {})
    spec = RenderSpec("a fox", seed=3, steps=2, guidance=0.0)
    again, box = (Checkpoint(name).load("float32").render([spec])[0].image for name in ("again", "raw"))

    difference = np.abs(np.asarray(again, float) - np.asarray(box, float))
    assert difference.max() <= 3
