"""What the bundled weights can draw, and the words for it: the lists they were trained on.

They know some five hundred subjects and two dozen looks. They ignore anything else in a prompt, so a prompt without any
of these words gets a picture of something else.
"""

from __future__ import annotations

import hashlib
import re
import tomllib
from collections.abc import Iterator
from functools import cache, cached_property
from pathlib import Path
from typing import NamedTuple

TRAIN_FOLDER = Path(__file__).parent / "train"
PLURAL = "(?:s|es)?"  # allowed after a subject's name
JOINED = re.compile(r"[\s-]+(?:of\s+)?")  # between the words of one thing: "toy car", "bowl of ramen"
OWN_PHRASE = re.compile(  # the beginning of a noun phrase, up to its noun
    r"(?i)\b(?:an?|the|his|her|its|their|my|your|some|many|two|three|four|five|and|with)\s+(?:[\w-]+\s+){0,2}\Z"
)
HELD_OUT_EVERY = 40  # one alternative name in this many is held out, to tell understanding from memorising

DRAWINGS: dict[str, tuple[str, ...]] = {  # vector set -> words that captions use for its manner of drawing
    "noto": ("soft shaded vector", "noto style"),
    "noto-v1": ("rounded blob cartoon", "blob style"),
    "fxemoji": ("bold outline sticker", "sticker style"),
    "fluent-emoji": ("glossy 3d", "glossy 3d style"),
    "fluent-emoji-flat": ("modern flat design", "flat design"),
    "fluent-emoji-high-contrast": ("black ink stencil", "stencil style"),
    "twemoji": ("simple flat vector", "flat vector style"),
    "emojione": ("bright cartoon vector", "bright cartoon"),
    "emojione-monotone": ("one colour pictogram", "pictogram style"),
}
MEDIA: dict[str, tuple[str, ...]] = {
    "plain": (),
    "film": ("grainy film", "film grain"),
    "halftone": ("halftone print", "halftone dots"),
    "pixel": ("pixel art",),
    "hatching": ("pencil hatching", "pencil drawing"),
    "watercolour": ("watercolour", "watercolour painting"),
    "riso": ("two-colour riso print", "riso print"),
    "neon": ("neon on black", "neon lines"),
    "lowkey": ("low-key light", "cinematic low-key light"),
}


def look_phrases(phrase: str) -> tuple[str, ...]:
    """All phrases that captions use for the drawing set or medium that this phrase names."""
    return next(phrases for phrases in (*DRAWINGS.values(), *MEDIA.values()) if phrase in phrases)


def held_out(subject: str, name: str) -> bool:
    """Whether an alternative name of a subject is held out of training."""
    digest = hashlib.sha256("\0".join(("name", subject, name)).encode()).digest()
    return int.from_bytes(digest[:8], "little") % HELD_OUT_EVERY == 0


class Entry(NamedTuple):
    """One thing that can be asked for."""

    kind: str  # subject, look, ground or colour
    name: str
    others: tuple[str, ...]  # words that mean the same

    @property
    def words(self) -> tuple[str, ...]:
        return self.name, *self.others


class Vocabulary:
    """Everything that the bundled weights can be asked for."""

    def __init__(self, entries: list[Entry]):
        self.entries = entries

    @cached_property
    def _subjects(self) -> re.Pattern[str]:
        return re.compile(rf"(?<!\w)(?:{self._names_pattern('subject')}){PLURAL}(?!\w)", re.IGNORECASE)

    @cached_property
    def _looks(self) -> re.Pattern[str]:
        manners = self._names_pattern("look", "ground").replace("COLOUR", f"(?:{self._names_pattern('colour')})")
        return re.compile(rf"(?<!\w)(?:{manners})(?!\w)", re.IGNORECASE)

    def _names_pattern(self, *kinds: str) -> str:
        """A pattern for the names of these kinds, the longest first."""
        names = {words for entry in self.entries if entry.kind in kinds for words in entry.words}
        return "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))

    def can_draw(self, prompt: str) -> bool:
        """Whether a prompt names anything that can be drawn."""
        return bool(self._subjects.search(prompt))

    def subjects(self, prompt: str) -> list[str]:
        """The different things that a prompt asks to be drawn, in its words: the first, and whatever has a noun phrase
        of its own. Words of looks ("pencil drawing") and in front of another noun ("toy car") do not count."""
        text = self._looks.sub(lambda manner: "," * len(manner.group()), prompt)
        found: dict[str, str] = {}
        for match in self._subjects.finditer(text):
            after = JOINED.match(text, match.end())
            if text[match.end() :].startswith("-") or (after and self._subjects.match(text, after.end())):
                continue
            if not found or OWN_PHRASE.search(text, 0, match.start()):
                found.setdefault(self.look_up(match.group())[0].name, match.group())
        return list(found.values())

    def look_up(self, words: str) -> list[Entry]:
        """What some words mean: the entries of that name, else the subjects whose plural they are."""
        query = " ".join(words.lower().split())
        exact = [entry for entry in self.entries if query in (each.lower() for each in entry.words)]
        return exact or [
            entry
            for entry in self.entries
            if entry.kind == "subject"
            and any(re.fullmatch(re.escape(each.lower()) + PLURAL, query) for each in entry.words)
        ]


@cache
def vocabulary() -> Vocabulary:
    """The vocabulary of the bundled weights."""
    return Vocabulary(list(read_entries()))


def read_entries() -> Iterator[Entry]:
    """Subjects in training order, then looks, grounds and colours."""
    subjects = tomllib.loads((TRAIN_FOLDER / "subjects.toml").read_text("utf-8"))["subjects"]
    others = tomllib.loads((TRAIN_FOLDER / "thesaurus.toml").read_text("utf-8"))
    for name, entry in subjects.items():
        taught = (other for other in others["subjects"].get(name, ()) if not held_out(name, other))
        yield Entry("subject", name, (*entry.get("words", ()), *taught))
    for name, more in others["looks"].items():
        yield Entry("look", name, (*(said for said in look_phrases(name) if said != name), *more))
    for kind, table in (("ground", "grounds"), ("colour", "palettes")):
        for name, more in others[table].items():
            yield Entry(kind, name.replace("{p}", "COLOUR"), tuple(each.replace("{p}", "COLOUR") for each in more))
