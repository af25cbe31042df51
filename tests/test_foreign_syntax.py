"""Syntax of other tools is found in prompts, and plain text is not mistaken for it."""

from __future__ import annotations

import time

import pytest

from k2cli.foreign_syntax import find_syntax, foreign_syntax_warning


@pytest.mark.parametrize(
    ("prompt", "sign", "advice"),
    [
        ("a (fox:1.4) in snow", "(fox:1.4)", "words have no weights"),
        ("a (fox : 1.4) in snow", "(fox : 1.4)", "words have no weights"),
        ("a fox <lora:ink:0.8>", "<lora:ink:0.8>", "a style can name a LoRA"),
        ("a fox, embedding:easy", "embedding:easy", "a style can name a LoRA"),
        ("a __colors__ fox", "__colors__", "choices go in braces"),
        ("a ${colour} fox", "${colour}", "k2 has no variables"),
        ("a 2$$red fox", "2$$", "a prompt of each"),
        ("a 0.5::red fox", "0.5::", "a prompt of each"),
        ("a ((red)) fox", "((red))", "words have no weights"),
        ("a [snowy] hill", "[snowy]", "words have no weights"),
        ("a [red:1.3] fox", "[red:1.3]", "words have no weights"),
        ("a [cat:dog:0.5]", "[cat:dog:0.5]", "words cannot change"),
        ("a [cat|dog]", "[cat|dog]", "choices go in braces"),
        ("a red+++ fox", "red+++", "words have no weights"),
        ("a (red fox)++", "(red fox)++", "words have no weights"),
        ("a fox BREAK a hill", "BREAK", "read as a whole"),
        ("masterpiece, HDR BREAK red dress", "BREAK", "read as a whole"),
        ("8K BREAK a fox", "BREAK", "read as a whole"),
        ("a fox, 4K BREAK blue", "BREAK", "read as a whole"),
        ("a fox, NSFW BREAK blue", "BREAK", "read as a whole"),
        ("a TV, BREAK blue", "BREAK", "read as a whole"),
        ("a fox, BREAK", "BREAK", "read as a whole"),
        ("a fox AND a hill", "AND", "read as a whole"),
        (r"a fox \(animal\)", r"\(animal\)", "need no backslash"),
        ("a teapot::2 on a hill", "teapot::2", "words have no weights"),
        ("a fox --ar 3:2", "--ar 3:2", "--aspect goes after the prompt"),
        ("a fox —ar 3:2", "—ar 3:2", "--aspect goes after the prompt"),
        ("a fox --no text", "--no text", "--avoid goes after the prompt"),
        ("a fox --seed 3", "--seed 3", "--seed goes after the prompt"),
        ("a fox --cfg-scale 7", "--cfg-scale 7", "--guidance goes after the prompt"),
        ("a fox --iw 2", "--iw 2", "--denoise goes after the prompt"),
        ("a fox --v 6", "--v 6", "k2 models list"),
        ("a fox --version 6", "--version 6", "k2 models list"),
        ("a fox --niji", "--niji", "k2 models list"),
        ("a fox --s 250", "--s 250", "weight of its style"),
        ("a fox --stylize 250", "--stylize 250", "weight of its style"),
        ("a fox --chaos 10", "--chaos 10", "--creativity high"),
        ("a fox --sref a.png", "--sref a.png", "k2 style add NAME PICTURE"),
        ("a {red|green apple", "{", "need two braces"),
        ("a red|green} cat", "}", "need two braces"),
    ],
)
def test_foreign_syntax_is_found_with_advice(prompt, sign, advice):
    ((found, told),) = find_syntax(prompt).items()
    assert found == sign and advice in told


def test_option_without_a_value_hides_no_other():
    told = find_syntax("a fox --tile --ar 3:2 --niji --no text")
    assert list(told) == ["--tile", "--ar 3:2", "--niji", "--no text"]


@pytest.mark.parametrize(
    "prompt",
    [
        "a cat (asleep)",
        "rock and roll",
        "SALT AND PEPPER",
        "a sign that says BREAK THE RULES",
        "COFFEE BREAK",
        "TAKE A BREAK",
        "a shop sign that says TEA BREAK in red",
        "BIG BREAK, a film poster",
        "I NEED A BREAK, on a mug",
        "a LUNCHRAW BREAK sticker",
        "LUNCH BREAK, a sign on a door",
        "a sign: TAKE A BREAK!",
        "a sign that says BREAK!",
        "the word “BREAK”",
        "a mug that says 'BREAK'",
        "a [sic] sign",
        "a door, '[EXIT]' on it",
        "a cat (:3)",
        'the word "__init__"',
        "notepad++ on a screen",
        'a shop, "[open]" on its door',
        "a book on C++",
        "a clock (at 12:30)",
        "the board says (Ajax 3:2)",
        "page [3]",
        "std::vector on a screen",
        "a fox -- no, a dog",
        "a fox—no, a dog",
        "a fashion show —model and all",
        "a well--known fox",
        "a fox --of all things",
        "snake_case and _emphasis_",
        "it costs 2$",
        "{curly} braces",
        "{curly} braces | ink",
        "a :} smile",
    ],
)
def test_plain_text_is_not_flagged(prompt):
    assert find_syntax(prompt) == {}


def test_similar_syntax_is_reported_together():
    told = foreign_syntax_warning(["((a)) ((b)) ((c))", "((d)) ((a))", f"(({'e' * 99}))"])
    assert told.startswith("Read as words: ((a)), ((b)), ((c)) and 2 more (words have no weights") and len(told) < 120


@pytest.mark.parametrize("bit", ["(", "[", "_", "__a", "a", "a::", "[a:", "(a", "\\(", "1", "--a", "$", "+", "<lora:"])
def test_search_is_fast_on_any_text(bit):
    started = time.perf_counter()
    find_syntax(bit * (20_000 // len(bit)))
    assert time.perf_counter() - started < 1
