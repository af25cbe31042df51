"""Specs with values of the wrong type: one sentence names the field, before anything is rendered."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import tiny, tiny_box  # noqa: F401

from model.errors import K2Error
from model.pipeline import Pipeline
from model.spec import Leader, Lora, Reference, RenderSpec, Style
from model.type_checks import check_types


def style(**said):
    return {"styles": (Style(**{"name": "dusk", "strength": 1.0, **said}),)}


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        ({"prompt": None}, "RenderSpec.prompt must be a text, not None."),
        ({"negative": None}, "RenderSpec.negative must be a text, not None."),
        ({"width": 64.0}, "RenderSpec.width must be a whole number or None, not 64.0."),
        ({"width": np.int64(64)}, "RenderSpec.width must be a whole number or None, not np.int64(64)."),
        ({"cohesion": np.float32(1)}, "RenderSpec.cohesion must be a number, not np.float32(1.0)."),
        ({"seed": True}, "RenderSpec.seed must be a whole number, not True."),
        ({"guidance": "2"}, "RenderSpec.guidance must be a number or None, not '2'."),
        ({"vision_rows": "no"}, "RenderSpec.vision_rows must be True or False or None, not 'no'."),
        ({"init_image": "fox.png"}, "RenderSpec.init_image must be a Path or None, not 'fox.png'."),
        ({"mask": (0, 0, 8, 8)}, "RenderSpec.mask must be a Path or a text or None, not (0, 0, 8, 8)."),
        ({"styles": "dusk"}, "RenderSpec.styles must be a tuple of Style, not 'dusk'."),
        ({"styles": ("dusk",)}, "RenderSpec.styles must be a tuple of Style, not ('dusk',)."),
        ({"loras": (Lora("a.safetensors"),)}, "Lora.path must be a Path, not 'a.safetensors'."),
        ({"leader": Leader("a fox", "7")}, "Leader.seed must be a whole number, not '7'."),
        (style(strength="1"), "Style.strength must be a number, not '1'."),
        (style(keywords="film"), "Style.keywords must be a tuple of texts, not 'film'."),
        (style(references=(Reference("a.png"),)), "Reference.image must be a Path, not 'a.png'."),
    ],
)
def test_wrong_type_names_the_field(said, problem):
    with pytest.raises(K2Error) as caught:
        check_types(RenderSpec(**{"prompt": "a fox", **said}), RenderSpec)
    assert str(caught.value) == problem
    assert caught.value.hint.startswith("Like ")


@pytest.mark.parametrize(
    ("said", "hint"),
    [
        ({"init_image": "fox.png"}, "Like Path('fox.png')."),
        ({"init_image": 5}, 'Like Path("fox.png").'),
        (style(keywords="film"), 'Like ("a fox",).'),
        ({"styles": "dusk"}, "Like (Style(...),)."),
    ],
)
def test_hint_shows_an_example(said, hint):
    with pytest.raises(K2Error) as caught:
        check_types(RenderSpec(**{"prompt": "a fox", **said}), RenderSpec)
    assert caught.value.hint == hint


def test_long_values_are_shortened():
    with pytest.raises(K2Error) as caught:
        check_types(RenderSpec("a fox", init_image=Image.new("RGB", (8, 8))), RenderSpec)
    assert len(str(caught.value)) < 130


def test_compatible_types_are_accepted():
    """Integers for floats, lists for tuples, and every field at its default."""
    look = Style("dusk", 1, references=[Reference(Path("a.png"), 1)], keywords=["film"])
    leader = Leader("a fox", 7)
    for spec in (
        RenderSpec("a fox"),
        RenderSpec("a fox", width=64, height=64, guidance=2, mu=np.float64(1), styles=[look], leader=leader),
        RenderSpec("a fox", init_image=Path("a.png"), mask=Path("b.png"), vision_rows=False),
        RenderSpec("a fox", init_image=Path("a.png"), mask="8x8+0+0"),
    ):
        check_types(spec, RenderSpec)


@pytest.mark.parametrize("asked", ["a fox", None, RenderSpec("a fox"), ["a fox"], [{"prompt": "a fox"}], 5])
def test_pipeline_says_what_it_accepts(tiny, asked):  # noqa: F811
    pipeline = Pipeline.load("tiny", device="cpu")

    for ask in (pipeline.render, pipeline.batches, lambda specs: list(pipeline.stream(specs))):
        with pytest.raises(K2Error, match=r"from a list of specs|Expected a RenderSpec"):
            ask(asked)
