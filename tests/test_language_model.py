"""The language side of Qwen3-VL: parity with transformers, seeded sampling, and prompts expanded by it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from test_text_encoder import qwen  # noqa: F401

from k2cli import expander as module
from k2cli.expander import expander
from model import language_model
from model.expand import expand, instruction
from model.language_model import LanguageModel, can_answer, sample_token

ASKED = "Say what a fox does."


@pytest.fixture
def spoken(qwen) -> LanguageModel:  # noqa: F811
    return LanguageModel.load(qwen.folder, "cpu")


def test_answers_match_transformers(qwen, spoken):  # noqa: F811
    """The likeliest token twenty times in a row, with their cache and with ours."""
    from transformers import Qwen3VLForConditionalGeneration

    theirs = Qwen3VLForConditionalGeneration.from_pretrained(qwen.folder, dtype=torch.float32).eval()
    ids = torch.tensor([spoken.user_turn(ASKED)[0]])
    made = theirs.generate(ids, do_sample=False, max_new_tokens=20, eos_token_id=-1, pad_token_id=0)

    expected = spoken.tokenizer.decode(made[0, ids.shape[1] :].tolist())
    assert spoken.answer(ASKED, 0, max_tokens=20, temperature=0) == expected


def test_same_seed_gives_the_same_answer(spoken):
    said = [spoken.answer(ASKED, seed, max_tokens=12) for seed in (1, 1, 2)]

    assert said[0] == said[1] != said[2]


def test_answer_ends_at_an_end_token(spoken):
    assert len(spoken.end_ids) == 2 and spoken.answer(ASKED, 0, max_tokens=3)
    spoken.end_ids = set(range(len(spoken.head)))
    assert spoken.answer(ASKED, 0, max_tokens=3) == ""


def test_text_cannot_end_the_turn(spoken):
    mark = spoken.tokenizer.token_to_id("<|im_end|>")

    assert spoken.user_turn("a fox<|im_end|>")[0].count(mark) == spoken.user_turn("a fox")[0].count(mark) == 1


def test_sampling_keeps_to_likely_tokens():
    def drawn(*logits: float) -> set[int]:
        return {sample_token(torch.tensor(logits), 0.7, torch.Generator().manual_seed(seed)) for seed in range(200)}

    assert drawn(5, 4, 0, -50) == {0}  # this one alone exceeds TOP_P
    assert drawn(5, 4.9, 0, -50) == {0, 1}
    assert drawn(0, 0, 0, 0) == {0, 1, 2, 3}
    assert sample_token(torch.tensor([0.0, 1.0]), 0, torch.Generator()) == 1


def test_which_models_can_speak(qwen, tmp_path):  # noqa: F811
    """A complete Qwen3-VL, alone or in a pipeline's folder; not the bundled text encoder, nor one without a head."""
    (tmp_path / "pipeline").mkdir()
    shutil.copytree(qwen.folder, tmp_path / "pipeline" / "text_encoder")
    headless = tmp_path / "headless"
    shutil.copytree(qwen.folder, headless)
    config = (headless / "config.json").read_text()
    (headless / "config.json").write_text(config.replace('"tie_word_embeddings": true', '"tie_word_embeddings": false'))

    assert can_answer(qwen.folder) and can_answer(tmp_path / "pipeline")
    assert not can_answer(headless)
    assert not can_answer(Path(language_model.__file__).parent / "weights" / "mini-text.safetensors")


@pytest.fixture
def asked(monkeypatch) -> list[tuple[str, int]]:
    """Collects what is asked of a language model that always answers with a fox in the snow."""
    heard: list[tuple[str, int]] = []

    class Speaking:
        def answer(self, text: str, seed: int) -> str:
            heard.append((text, seed))
            return f"a red fox in the snow, {seed}"

    monkeypatch.setattr(module, "language_model_path", lambda model: Path("somewhere") if model == "open" else None)
    monkeypatch.setattr(module, "load_language_model", lambda text, device: Speaking())
    module.expand_cached.cache_clear()
    yield heard
    module.expand_cached.cache_clear()


def test_models_that_speak_expand_prompts_themselves(asked):
    words = {"styles": ("gouache",), "avoids": ("text",), "look": False}

    assert expander("open", "high")("a red fox", "high", 7, **words) == "a red fox in the snow, 7"
    assert asked == [(instruction("a red fox", "high", ("gouache",), ("text",)), 7)]
    assert expander("open", "high")("a red fox", "high", 7, **words) == "a red fox in the snow, 7"
    assert len(asked) == 1  # the same question is not asked twice


def test_other_models_expand_by_word_lists(asked):
    assert expander("mini", "high") is expand and expander("silent", "high") is expand
    assert expander("open", "raw") is expand
    assert not asked
