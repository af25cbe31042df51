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
    from model.speaker import Speaker

Expand = Callable[..., str]  # as `model.expand.expand`


def expander(model: str, level: str, device: str | None = None) -> Expand:
    """What expands prompts for a resolved model: Qwen3-VL if that is its text encoder, else the bundled word lists."""
    if level == "raw" or model in library.box() or (text := language_of(model)) is None:
        return expand
    return partial(said, text, device)


@cache
def language_of(model: str) -> Path | None:
    """The text encoder of a model, if it can answer. Raises K2Error if the model's licence is not accepted."""
    found = library.find(model)
    if found is None:
        return None
    from model.speaker import speaks

    text = library.find_parts(found).text
    if not speaks(text):
        return None
    licence.require_for(model)
    return text


@cache
def said(text: Path, device: str | None, prompt: str, level: str, seed: int, **words: Any) -> str:
    """One expansion, cached."""
    return expand_by_language(
        lambda asked, number: speaker(text, device).answer(asked, number), prompt, level, seed, **words
    )


@lru_cache(maxsize=1)
def speaker(text: Path, device: str | None) -> Speaker:
    """The language model; one at a time."""
    from model.speaker import Speaker

    say("Expanding prompts with the text encoder's language model.", "dim")
    return Speaker.load(text, device)


def forget() -> None:
    """Release the language model; its answers stay cached."""
    speaker.cache_clear()
