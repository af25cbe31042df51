"""Creativity: the model's own words fill in what a prompt leaves open, and what it says stays."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.expand import LEVELS, MAX_CHARS, clash, expand, expand_by_language, instruction, look_words, mention_any
from model.train.looks import DRAWINGS, MEDIA, PALETTES, Look

WORDS = look_words()
FOX = "a fox"


def names(slot: str, text: str) -> bool:
    """Whether the text contains a word of the slot."""
    return mention_any([text], [word for told in WORDS[slot].values() for word in told])


# ---- the words ----------------------------------------------------------------------------------


def test_words_come_from_the_training_data():
    assert {name: tuple(told) for name, told in WORDS["drawing"].items()} == DRAWINGS
    assert {name: tuple(told) for name, told in WORDS["medium"].items()} | {"plain": ()} == MEDIA
    colours = {name: tuple("#{:02x}{:02x}{:02x}".format(*rgb) for rgb in pair) for name, pair in PALETTES.items()}
    assert {name: tuple(told) for name, told in WORDS["palette"].items()} == colours
    for kind, (coloured, _) in WORDS["ground"].items():
        assert coloured.format("teal") == Look("noto", ground=kind, palette="teal").ground_words


@pytest.mark.parametrize("slot", ["drawing", "medium", "ground", "palette"])
def test_slots_recognise_their_own_words(slot):
    """So what was added once is never extended again."""
    told = WORDS[slot] if slot == "palette" else [w.format("teal") for ws in WORDS[slot].values() for w in ws]
    kind = "colour" if slot == "palette" else slot

    assert [word for word in told if not mention_any([word], WORDS["named"][kind])] == []


# ---- expanding ----------------------------------------------------------------------------------


@given(st.text(), st.integers(0, 2**63 - 1), st.lists(st.text()), st.lists(st.text()))
def test_raw_leaves_the_prompt_unchanged(prompt, seed, styles, avoids):
    assert expand(prompt, "raw", seed, styles=styles, avoids=avoids) == prompt


@given(st.text(), st.sampled_from(sorted(LEVELS)), st.integers(0, 2**63 - 1))
def test_subject_stays_as_written(prompt, level, seed):
    assert expand(prompt, level, seed).startswith(prompt)


def test_same_seed_gives_same_expansion_in_every_process():
    code = (
        "from model.expand import expand; import sys; print(expand('a fox', 'high', 7)); print('torch' in sys.modules)"
    )
    run = [sys.executable, "-c", code]
    first, second = (subprocess.run(run, check=True, capture_output=True, text=True).stdout for _ in range(2))

    assert first == second == f"{expand(FOX, 'high', 7)}\nFalse\n"


def test_each_level_extends_the_previous_one():
    for seed in range(40):
        low, medium, high = (expand(FOX, level, seed).split(", ") for level in ("low", "medium", "high"))
        dark = [w for name in WORDS["own_ground"]["media"] for w in WORDS["medium"][name]]  # instead of a ground

        assert mention_any(medium, dark) or (medium[:-1] == low and len(medium) == len(low) + 1)
        if mention_any(high, dark) and not mention_any(medium, dark):
            assert set(high[:-1]) < set(medium)
        else:
            assert set(medium) < set(high) and len(high) == len(medium) + 1
        assert names("drawing", medium[-1]) != names("medium", medium[-1])
        assert names("drawing", high[-2]) and names("medium", high[-1])


def test_medium_alternates_between_drawing_and_medium():
    for first in range(0, 40, 2):
        texts = [expand(FOX, "medium", seed) for seed in (first, first + 1)]
        assert sorted(names("drawing", text) for text in texts) == [False, True]
    for seed in range(40):  # if one is settled, the other
        assert names("drawing", expand("a fox, watercolour", "medium", seed)[len("a fox, watercolour") :])


def test_variety_grows_with_the_level():
    def variety(level: str) -> float:
        """Mean number of words in which two seeds differ."""
        told = [set(expand(FOX, level, seed).replace(",", "").split()) for seed in range(60)]
        pairs = list(itertools.combinations(told, 2))
        return sum(len(a ^ b) for a, b in pairs) / len(pairs)

    levels = [variety(level) for level in LEVELS]
    assert levels == sorted(levels) and len(set(levels)) == 4
    assert len({expand(FOX, "high", seed) for seed in range(60)}) > 50


@pytest.mark.parametrize(
    ("prompt", "slot"),
    [
        ("a fox, watercolour", "medium"),
        ("a fox in neon", "medium"),
        ("a fox, glossy 3D", "drawing"),
        ("a pixelated fox", "medium"),
        ("a Photograph of a fox", "drawing"),
        ("a fox on a table", "ground"),
        ("a fox at night", "ground"),
        ("a red fox", "palette"),
    ],
)
def test_what_the_prompt_specifies_is_left_alone(prompt, slot):
    told = WORDS[slot] if slot == "palette" else [w.replace("{}", "") for ws in WORDS[slot].values() for w in ws]
    for seed in range(40):
        added = expand(prompt, "high", seed)[len(prompt) :]
        assert not mention_any([added], told) and ("  " not in added)


def test_dark_media_get_no_ground():
    for seed in range(60):
        text = expand(FOX, "high", seed)
        if mention_any([text], ["low-key light"]):
            assert not mention_any([text], ["background", "gradient", "landscape", "floor"])
        assert not mention_any([expand("a red fox", "high", seed)], ["neon", "low-key light"])


def test_batch_repeats_no_expansion_before_it_must():
    left_out = [*WORDS["asked_only"]["medium"], *WORDS["own_ground"]["media"]]  # a colour is named: nothing dark
    media = {name: told for name, told in WORDS["medium"].items() if name not in left_out}
    for first in range(0, 10 * len(media), len(media)):
        texts = [expand("a red fox", "high", seed) for seed in range(first, first + len(media))]
        assert {name for text in texts for name, told in media.items() if mention_any([text], told)} == set(media)


def test_looks_that_cost_the_subject_are_never_added_unasked():
    poor = [word for slot, looks in WORDS["asked_only"].items() for look in looks for word in WORDS[slot][look]]
    assert "neon on black" in poor and "black ink stencil" in poor
    for seed in range(200):
        assert not mention_any([expand(FOX, "high", seed)], poor)


def test_styles_and_their_pictures_settle_the_look():
    for seed in range(40):
        by_words = expand(FOX, "high", seed, styles=["pencil hatching", "flat design"])
        by_pictures = expand(FOX, "high", seed, look=True)

        assert not names("drawing", by_words) and not names("medium", by_words)
        assert not names("drawing", by_pictures) and not names("medium", by_pictures)
        assert by_pictures != FOX


def test_avoided_words_are_never_added():
    avoids = ["film grain", "glossy", "teal", "landscape"]
    for seed in range(80):
        added = expand(FOX, "high", seed, avoids=avoids)[len(FOX) :]
        assert not mention_any([added], ["grainy film", "film grain", "glossy 3d", "teal", "landscape"])
    everything = [word for slot in ("drawing", "medium", "ground") for told in WORDS[slot].values() for word in told]
    assert expand(FOX, "high", 1, avoids=everything) == FOX
    assert clash(["film grain"], ["grainy film"]) and not clash(["on a plain background"], ["on a table"])


def test_orange_gets_the_right_article():
    texts = [expand(FOX, "low", seed) for seed in range(200)]

    assert any("on an orange" in text for text in texts) and not any(" a orange" in text for text in texts)


# ---- with a language model ----------------------------------------------------------------------


def by_language(answer: str, prompt: str = FOX, level: str = "high", **words) -> str:
    return expand_by_language(lambda asked, seed: answer, prompt, level, 7, **words)


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ("A fox in a birch wood, gouache, soft light", "A fox in a birch wood, gouache, soft light"),
        ('  "A fox\nin the snow"\n', "A fox in the snow"),
        ("Description: a fox in the snow", "a fox in the snow"),
        ("<think>The user wants a fox.</think>\na fox in the snow", "a fox in the snow"),
    ],
)
def test_good_answer_is_used(answer, told):
    assert by_language(answer) == told


@pytest.mark.parametrize(
    "answer",
    [
        "", "  \n", '""', "<think>A fox, a fox …",
        "I'm sorry, but I can't help with a fox.", "I’m sorry, a fox is beyond me.", "As an AI, I cannot draw a fox",
        "What kind of a fox?", "a dog in the snow", "a fox " * MAX_CHARS,
    ],
)  # fmt: skip
def test_refusals_and_non_expansions_leave_the_prompt(answer):
    assert by_language(answer) == FOX


def test_answer_with_an_avoided_word_is_rejected():
    assert by_language("a fox on film grain", avoids=["film grain"]) == FOX


def test_raw_never_asks_the_language_model():
    def fail(asked: str, seed: int) -> str:
        raise AssertionError(asked)

    assert expand_by_language(fail, FOX, "raw", 7) == FOX


def test_instruction_holds_prompt_styles_avoids_and_seed():
    seen = []
    expand_by_language(
        lambda asked, seed: seen.append((asked, seed)) or "", FOX, "low", 7, styles=["ink"], avoids=["fog"]
    )

    ((asked, seed),) = seen
    assert asked == instruction(FOX, "low", ["ink"], ["fog"]) and seed == 7
    assert '"a fox"' in asked and "ink" in asked and "Never mention: fog." in asked


def test_only_a_setting_is_requested_when_pictures_settle_the_look():
    assert instruction(FOX, "high", look=True) == instruction(FOX, "low")
