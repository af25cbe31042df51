"""Words avoided without guidance: a direction taken out of the prompt's rows, and nothing where nothing is avoided."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import tiny, tiny_box  # noqa: F401

from model.avoid import avoided, phrases, steer_away
from model.pipeline import Pipeline
from model.spec import RenderSpec, Style
from model.text_encoder import SUFFIX_TOKENS

FOX = RenderSpec("a red fox", guidance=0.0)


def prompt(length: int, seed: int) -> torch.Tensor:
    """Rows of a prompt, [1, T, N, E]."""
    return torch.randn(1, length + SUFFIX_TOKENS, 3, 16, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def rows() -> dict[str, torch.Tensor]:
    return {"fox": prompt(4, 0), "neutral": prompt(2, 1), "ink": 0.1 * prompt(1, 2), "fog": 0.1 * prompt(3, 3)}


# ---- the mathematics ----------------------------------------------------------------------------


def test_without_phrases_it_is_the_very_same_tensor(rows):
    assert steer_away(rows["fox"], [], rows["neutral"]) is rows["fox"]


def test_at_weight_one_the_avoided_phrase_says_nothing(rows):
    """Its own mean row becomes the neutral mean row, its suffix the neutral suffix."""
    ink = rows["neutral"][:, :-SUFFIX_TOKENS].mean(1, keepdim=True) + 0.1 * prompt(1, 2)

    gone = steer_away(ink, [(ink, 1.0)], rows["neutral"])

    neutral = rows["neutral"]
    torch.testing.assert_close(gone[:, :1], neutral[:, :-SUFFIX_TOKENS].mean(1, keepdim=True))


def test_it_is_linear_while_it_is_small(rows):
    fox, neutral = rows["fox"], rows["neutral"]
    near = {name: neutral.mean(1, keepdim=True) + 0.05 * rows[name] for name in ("ink", "fog")}
    flat = neutral.mean(1, keepdim=True).expand_as(neutral)

    def shift(*parts: tuple[str, float]) -> torch.Tensor:
        return fox - steer_away(fox, [(near[name], weight) for name, weight in parts], flat)

    torch.testing.assert_close(shift(("ink", 0.8)), 2 * shift(("ink", 0.4)), atol=1e-6, rtol=1e-4)
    both = shift(("ink", 0.5), ("fog", 0.3))
    torch.testing.assert_close(both, shift(("ink", 0.5)) + shift(("fog", 0.3)), atol=1e-6, rtol=1e-4)


def test_the_order_means_nothing(rows):
    parts = [(rows["ink"], 0.7), (rows["fog"], 0.3), (prompt(5, 9), 0.3)]
    first, second = (steer_away(rows["fox"], order, rows["neutral"]) for order in (parts, parts[::-1]))

    assert torch.equal(first, second)


def test_many_phrases_move_no_further_than_the_rows_are_long(rows):
    fox = rows["fox"]
    moved = steer_away(fox, [(5 * prompt(2, seed), 2.0) for seed in range(20)], rows["neutral"])

    own = slice(None, -SUFFIX_TOKENS)
    assert (moved - fox)[:, own].norm(dim=-1).max() <= fox[:, own].norm(dim=-1).mean(1).max() + 1e-5
    assert moved.isfinite().all()


def test_a_prompt_without_words_of_its_own_still_moves(rows):
    empty = prompt(0, 5)
    moved = steer_away(empty, [(rows["ink"], 1.0)], rows["neutral"])

    assert moved.shape == empty.shape and moved.isfinite().all() and not torch.equal(moved, empty)


# ---- what is avoided ----------------------------------------------------------------------------


def test_weights_come_from_the_styles_and_are_one_elsewhere():
    dusk = Style("dusk", 0.6, keywords=("ink",), avoids=("glossy", "fog, snow"))
    turned = Style("riso", -0.3, keywords=("riso print", "fog"), avoids=("ink",))
    spec = replace(FOX, negative="rain, glossy", styles=(dusk, turned))

    assert avoided(spec) == (("fog", 0.6 + 0.3), ("glossy", 0.6), ("rain", 1.0), ("riso print", 0.3), ("snow", 0.6))


def test_with_guidance_the_negative_prompt_does_it():
    assert avoided(replace(FOX, guidance=2.0, negative="fog")) == ()
    assert avoided(FOX) == () and phrases(" , a  b,,c ") == ["a b", "c"]


# ---- in pictures --------------------------------------------------------------------------------


def test_pictures_without_guidance_are_led_away(tiny):  # noqa: F811
    """Bit-identical without avoids and at strength 0; different, and stronger with strength, with them."""
    pipeline = Pipeline.load("tiny", variant="turbo", device="cpu")

    def image(strength: float | None, negative: str = "") -> torch.Tensor:
        styles = () if strength is None else (Style("x", strength, avoids=("pixel art",)),)
        (picture,) = pipeline.render([RenderSpec("a red fox", seed=7, negative=negative, styles=styles)])
        return torch.frombuffer(bytearray(picture.image.tobytes()), dtype=torch.uint8).float()

    plain, some, more = image(None), image(0.4), image(1.0)

    assert torch.equal(image(0.0), plain)
    assert 0 < (some - plain).norm() < (more - plain).norm()
    assert torch.equal(image(None, "pixel art"), more) and torch.equal(image(1.0, "pixel art"), more)
