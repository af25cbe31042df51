"""What expands a prompt: the bundled model's word lists, or the language model of a text encoder.

A language model is large, and always answers the same words alike: it is loaded only for what has not been asked
before, and released when planning is over. For word lists, neither it nor torch is imported.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from k2cli import licence
from k2cli.console import say
from model import library
from model.expand import expand, expand_by_language

if TYPE_CHECKING:
    from model.language_model import LanguageModel

Expand = Callable[..., str]  # as `model.expand.expand`


def expander(model: str, level: str, device: str | None = None) -> Expand:
    """What expands prompts for a resolved model: Qwen3-VL if that is its text encoder, else the bundled word lists."""
    if level == "raw" or model in library.bundled_models() or (text_encoder := language_model_path(model)) is None:
        return expand
    return partial(expand_cached, text_encoder, device)


@cache
def language_model_path(model: str) -> Path | None:
    """The text encoder of a model, if it can answer. Raises K2Error if the model's licence is not accepted."""
    found = library.find(model)
    if found is None:
        return None
    from model.language_model import can_answer

    text_encoder = library.find_parts(found).text
    if not can_answer(text_encoder):
        return None
    licence.require_for_model(model)
    return text_encoder


@cache
def expand_cached(text_encoder: Path, device: str | None, prompt: str, level: str, seed: int, **words: Any) -> str:
    """One expansion, cached."""
    return expand_by_language(
        lambda asked, number: load_language_model(text_encoder, device).answer(asked, number),
        prompt,
        level,
        seed,
        **words,
    )


@lru_cache(maxsize=1)
def load_language_model(text_encoder: Path, device: str | None) -> LanguageModel:
    """The language model; one at a time."""
    from model.language_model import LanguageModel

    say("Expanding prompts with the text encoder's language model.", "dim")
    return LanguageModel.load(text_encoder, device)


def release_language_model() -> None:
    """Release the language model; its answers stay cached."""
    load_language_model.cache_clear()
