"""Avoiding words without guidance: a direction is removed from the prompt's rows; without phrases nothing changes."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from tiny import tiny, tiny_box  # noqa: F401

from model.avoid import (
    MAX_WEIGHT,
    MEAN_SHARE,
    Direction,
    avoided_phrases,
    directions,
    negative_prompt,
    phrases_in,
    split_suffix,
    steer_away,
)
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


def middle(rows: torch.Tensor) -> torch.Tensor:
    return split_suffix(rows)[0].mean(1, keepdim=True)


def led(rows: torch.Tensor, weight: float) -> Direction:
    """A phrase given by its rows; their suffix is what it adds."""
    return Direction(*split_suffix(rows), weight)


# ---- the mathematics ----------------------------------------------------------------------------


def test_no_phrases_return_the_same_tensor(rows):
    assert steer_away(rows["fox"], [], rows["neutral"]) is rows["fox"]


def test_weight_one_neutralises_the_avoided_words(rows):
    """Rows of the phrase itself become neutral and rows orthogonal to it stay as they are; if no row is about it, they
    all move away by half its mean."""
    neutral = middle(rows["neutral"])
    fog = split_suffix(rows["fog"])[0]
    spanned = torch.linalg.qr(torch.cat((fog[0], torch.randn(1, 3, 16))).permute(1, 2, 0))[0]  # [N, E, 4]
    other = 0.1 * spanned[..., 3][None, None]
    said = torch.cat((neutral + other, neutral + fog, prompt(0, 7)), 1)
    phrase = Direction(neutral + fog, torch.zeros(1, SUFFIX_TOKENS, 3, 16), 1.0)

    gone = steer_away(said, [phrase], rows["neutral"])

    torch.testing.assert_close(gone[:, 1:4], neutral.expand(-1, 3, -1, -1), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(gone[:, :1], neutral + other, atol=1e-5, rtol=1e-4)
    alone = steer_away(torch.cat((neutral + other, prompt(0, 7)), 1), [phrase], rows["neutral"])
    torch.testing.assert_close(alone[:, :1], neutral + other - fog.mean(1, keepdim=True) / 2, atol=1e-5, rtol=1e-4)
    assert torch.equal(gone[:, 4:], said[:, 4:])


def test_partly_related_rows_lose_a_part(rows):
    """By the formula, for rows with 0.2 and 0.7 of their squared norm in the phrase's direction."""
    neutral = middle(rows["neutral"])
    of_it, other = torch.linalg.qr(torch.randn(3, 16, 2))[0].permute(2, 0, 1)  # [N, E]
    g = torch.tensor([0.2, 0.7])[:, None, None]
    said = 0.1 * (g.sqrt() * of_it + (1 - g).sqrt() * other)[None]
    phrase = Direction(neutral + 0.3 * of_it, torch.zeros(1, SUFFIX_TOKENS, 3, 16), 0.8)

    moved = steer_away(torch.cat((neutral + said, prompt(0, 7)), 1), [phrase], rows["neutral"])

    s = 3 * g**2 - 2 * g**3
    expected = neutral + said - 0.8 * (s * said + MEAN_SHARE * (1 - s[1]) * (1 - s) * 0.3 * of_it)
    torch.testing.assert_close(moved[:, :2], expected, atol=1e-5, rtol=1e-4)


def test_repeated_words_are_one_direction(rows):
    neutral, ink = middle(rows["neutral"]), split_suffix(rows["ink"])[0]
    adds = torch.zeros(1, SUFFIX_TOKENS, 3, 16)
    once, twice = (Direction(neutral + torch.cat([ink] * n, 1), adds, 1.0) for n in (1, 2))

    alike = [steer_away(rows["fox"], [phrase], rows["neutral"]) for phrase in (once, twice)]

    torch.testing.assert_close(*alike)


def test_steering_is_linear_while_small(rows):
    fox, neutral = rows["fox"], rows["neutral"]
    near = {
        name: torch.cat((middle(neutral) + 0.05 * split_suffix(rows[name])[0], split_suffix(rows[name])[1]), 1)
        for name in rows
    }
    fox = torch.cat((middle(neutral) + 0.05 * split_suffix(fox)[0], split_suffix(fox)[1]), 1)

    def shift(*parts: tuple[str, float]) -> torch.Tensor:
        return fox - steer_away(fox, [led(near[name], weight) for name, weight in parts], neutral)

    torch.testing.assert_close(shift(("ink", 0.8)), 2 * shift(("ink", 0.4)), atol=1e-6, rtol=1e-4)
    both = shift(("ink", 0.5), ("fog", 0.3))
    torch.testing.assert_close(both, shift(("ink", 0.5)) + shift(("fog", 0.3)), atol=1e-6, rtol=1e-4)


def test_phrase_order_is_irrelevant(rows):
    parts = [led(rows["ink"], 0.7), led(rows["fog"], 0.3), led(prompt(5, 9), 0.3)]
    first, second = (steer_away(rows["fox"], order, rows["neutral"]) for order in (parts, parts[::-1]))

    assert torch.equal(first, second)


def test_total_shift_is_capped(rows):
    fox = rows["fox"]
    moved = steer_away(fox, [led(5 * prompt(2, seed), 2.0) for seed in range(20)], rows["neutral"])

    before, after = split_suffix(fox)[0], split_suffix(moved)[0]
    room = torch.maximum(before.norm(dim=-1).mean(1, keepdim=True), (before - middle(rows["neutral"])).norm(dim=-1))
    torch.testing.assert_close((after - before).norm(dim=-1), room)
    assert moved.isfinite().all()


def test_empty_prompt_still_moves(rows):
    empty = prompt(0, 5)
    moved = steer_away(empty, [led(rows["ink"], 1.0)], rows["neutral"])

    assert moved.shape == empty.shape and moved.isfinite().all() and not torch.equal(moved, empty)


@pytest.mark.parametrize(
    ("text", "with_it", "without"),
    [
        ("a fox", "a fox, ink on fog", "a fox"),
        ("a fox, ink on fog", "a fox, ink on fog", "a fox"),
        ("Ink on fog, a fox", "Ink on fog, a fox", ", a fox"),
        ("a fox in ink on foggy days", "a fox in ink on foggy days, ink on fog", "a fox in ink on foggy days"),
        ("", "ink on fog", ""),
    ],
)
def test_phrase_direction_is_relative_to_the_prompt(text, with_it, without):
    asked = []

    def encode(words: str) -> torch.Tensor:
        asked.append(words)
        return prompt(2, len(words))

    ((rows, adds, weight),) = directions(encode, lambda text: 0, text, (("ink on fog", 0.5),))

    assert asked == [with_it, without, "ink on fog"] and weight == 0.5
    assert torch.equal(rows, split_suffix(prompt(2, 10))[0])
    suffixes = [split_suffix(prompt(2, len(words)).double())[1] for words in (with_it, without)]
    assert torch.equal(adds, suffixes[0] - suffixes[1])


@pytest.mark.parametrize("text", ["a fox " * 300, "a fox " * 300 + ", ink", "a fox " * 253])
def test_phrase_still_counts_with_a_too_long_prompt(tiny, text):  # noqa: F811
    speaks = Pipeline.load("tiny", filters=()).text

    def adds(prompt: str) -> float:
        (led,) = directions(lambda words: speaks.encode([words])[0], speaks.truncated, prompt, (("ink", 1.0),))
        return led.suffix_delta.abs().max().item()

    assert speaks.truncated(f"{text}, ink") and adds(text) > 0.1 * adds("a fox")


# ---- phrases and weights ------------------------------------------------------------------------


def test_weights_come_from_styles_else_are_one():
    dusk = Style("dusk", 0.6, keywords=("ink",), avoids=("glossy", "fog, snow"))
    turned = Style("riso", -0.3, keywords=("riso print", "fog"), avoids=("ink",))
    spec = replace(FOX, negative="rain, glossy", styles=(dusk, turned))

    assert avoided_phrases(spec) == (
        ("fog", 0.6 + 0.3),
        ("glossy", 0.6),
        ("rain", 1.0),
        ("riso print", 0.3),
        ("snow", 0.6),
    )
    strong = tuple(Style(name, 1.5, avoids=("fog",)) for name in ("a", "b", "c"))
    assert avoided_phrases(replace(FOX, styles=strong)) == (("fog", MAX_WEIGHT),)


def test_prompts_own_phrase_weighs_at_least_one():
    faint = Style("x", 0.05, avoids=("glossy",))
    assert avoided_phrases(replace(FOX, negative="glossy, glossy", styles=(faint,))) == (("glossy", 1.0),)
    assert avoided_phrases(replace(FOX, negative="glossy, glossy", styles=(replace(faint, strength=1.5),)))[0][1] == 1.5
    assert avoided_phrases(replace(FOX, negative="glossy, glossy", styles=(faint, replace(faint, name="y")))) == (
        ("glossy", 1.0),
    )


def test_guidance_uses_the_styles_avoids(tiny):  # noqa: F811
    dusk, turned = Style("dusk", 0.6, avoids=("fog, snow",)), Style("riso", -0.3, keywords=("ink",))
    assert negative_prompt(replace(FOX, negative="rain,  snow", styles=(dusk, turned))) == "rain,  snow, fog, ink"
    assert negative_prompt(replace(FOX, negative="fog, snow", styles=(dusk,))) == "fog, snow"

    pipeline = Pipeline.load("tiny", device="cpu")
    spec = RenderSpec("a red fox", seed=7, guidance=2.0)
    whole = replace(dusk, strength=1.0)
    said, worn, plain, half = (
        pipeline.render([each])[0].record["pixels"]
        for each in (replace(spec, negative="fog, snow"), *(replace(spec, styles=s) for s in ((whole,), (), (dusk,))))
    )
    assert said == worn and len({said, plain, half}) == 3


@pytest.mark.parametrize("guidance", [0.0, 2.0])
def test_style_order_does_not_change_avoids(guidance):
    words = (("a", 0.1, ("snow", "fog")), ("b", 0.2, ("ink", "fog")), ("c", 0.3, ("fog", "glossy")))
    styles = [Style(name, strength, avoids=avoids) for name, strength, avoids in words]
    specs = [replace(FOX, guidance=guidance, styles=order) for order in itertools.permutations(styles)]
    assert len({(avoided_phrases(spec), negative_prompt(spec)) for spec in specs}) == 1


def test_guidance_uses_the_negative_prompt_instead():
    assert avoided_phrases(replace(FOX, guidance=2.0, negative="fog")) == ()
    assert avoided_phrases(FOX) == () and phrases_in(" , a  b,,c ") == ["a b", "c"]


# ---- in pictures --------------------------------------------------------------------------------


def test_unguided_pictures_are_steered_away(tiny):  # noqa: F811
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
