"""Who leads a prompt further: the word lists of the model in the box, or the language side of a text encoder.

A language model is large, and what it says is the same for the same words: it is loaded for what has not been asked
before, and let go when the planning is over. Neither it nor torch is imported for word lists.
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
    """What expands prompts for a resolved model: Qwen3-VL where it is the text encoder, else the words of the box."""
    if level == "raw" or model in library.box() or (text := language_of(model)) is None:
        return expand
    return partial(said, text, device)


@cache
def language_of(model: str) -> Path | None:
    """The text encoder of a model, if it can answer. Raises K2Error where the model's licence is not accepted."""
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
    """One expansion, asked for once."""
    return expand_by_language(
        lambda asked, number: speaker(text, device).answer(asked, number), prompt, level, seed, **words
    )


@lru_cache(maxsize=1)
def speaker(text: Path, device: str | None) -> Speaker:
    """The language model; one at a time."""
    from model.speaker import Speaker

    say("Asking the language side of the text encoder.", "dim")
    return Speaker.load(text, device)


def forget() -> None:
    """Let the language model go; what it has said stays."""
    speaker.cache_clear()
