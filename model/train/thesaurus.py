"""Other words for what captions say: people ask for a kitten, a 3d render, a pale blue backdrop.

The data's captions have one or two names for each subject and look. `thesaurus.toml` has other names that people use;
some of these are never taught, to tell understanding from memorising.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from model.train.data import Subject, phrase
from model.train.looks import PALETTES
from model.vocabulary import held_out, look_phrases

T = TypeVar("T")
THESAURUS_FILE = Path(__file__).with_suffix(".toml")


def find_name(caption: str, names: Iterable[str]) -> str | None:
    """The longest of a subject's names in a caption."""
    return max((each for each in names if each in caption), key=len, default=None)


def with_article(name: str) -> str:
    """A name with its article, if it takes one."""
    plural = name.endswith("s") and not name.endswith(("ss", "us"))
    return name if plural else phrase(name)


class Thesaurus:
    """Captions in other words."""

    def __init__(self) -> None:
        table: dict[str, dict[str, list[str]]] = tomllib.loads(THESAURUS_FILE.read_text())
        self.subjects = table["subjects"]
        self.looks = {phrase: others for key, others in table["looks"].items() for phrase in look_phrases(key)}
        self.palettes = table["palettes"]
        self._look_pattern = alternation(self.looks)
        colour = f"an? (?P<p>{'|'.join(PALETTES)})"
        self.places = {other for others in table["grounds"].values() for other in others}
        self._ground_patterns = {
            re.compile(f"{said.replace('a {p}', colour)}$"): each for said, each in table["grounds"].items()
        }

    def words(self) -> set[str]:
        """The words that mean something alone: the last of each name, and all colour words."""
        names = [name for table in (self.subjects, self.looks) for names in table.values() for name in names]
        last = {re.findall("[a-z0-9]+", name)[-1] for name in names}
        return last | {word for names in self.palettes.values() for name in names for word in name.split()}

    def taught_names(self, subject: str) -> list[str]:
        """A subject's other names, except those that are never taught."""
        return [each for each in self.subjects.get(subject, ()) if not held_out(subject, each)]

    def reword(self, caption: str, subject: Subject, rng: np.random.Generator) -> tuple[str, Sequence[str]]:
        """A caption with each part put in other words or not, and the names that its subject may have in it."""
        head, *rest = caption.split(", ")
        if rng.random() < 0.5:
            head = self._reword_ground(head, rng)
        names: Sequence[str] = subject.words
        if rng.random() < 0.6:
            head, names = self.rename(head, subject, rng)
        if rest and rng.random() < 0.6:
            rest = [self._reword_look(part, rng) for part in rest]
            if rng.random() < 0.35 and not rest[-1].startswith("made as"):
                front = rest.pop(int(rng.integers(len(rest))))
                head = f"{front} of {head}" if rng.random() < 0.5 else f"{front} {re.sub('^an? ', '', head)}"
        return ", ".join([head, *rest]), names

    def swap(self, caption: str, subject: Subject, rng: np.random.Generator) -> str:
        """A caption with one phrase in other words: its subject's name, or the look at its end."""
        start, comma, look = caption.rpartition(", ")
        if comma and rng.random() < 0.3:
            return start + comma + self._reword_look(look, rng)
        return self.rename(caption, subject, rng)[0]

    def rename(self, caption: str, subject: Subject, rng: np.random.Generator) -> tuple[str, Sequence[str]]:
        """A caption whose subject is renamed, and the names that it may have there."""
        name = find_name(caption, subject.words)
        others = self.taught_names(subject.name)
        if name is None or not others:
            return caption, subject.words
        other, said = pick_one(others, rng), phrase(name)
        return caption.replace(*((said, with_article(other)) if said in caption else (name, other)), 1), (other,)

    def _reword_look(self, part: str, rng: np.random.Generator) -> str:
        return self._look_pattern.sub(lambda found: pick_one(self.looks[found[0]], rng), part)

    def _reword_ground(self, head: str, rng: np.random.Generator) -> str:
        """The ground at the end of a caption's head in other words."""
        for pattern, others in self._ground_patterns.items():
            if found := pattern.search(head):
                colours = found.groupdict()
                if colours and rng.random() < 0.6:
                    colours = {"p": pick_one(self.palettes[colours["p"]], rng)}
                said = re.sub(r"\ba (?=[aeio])", "an ", pick_one(others, rng).format(**colours))
                return head[: found.start()] + said
        return head


def alternation(phrases: Iterable[str]) -> re.Pattern[str]:
    """A pattern for any of these phrases, longest first."""
    return re.compile("|".join(re.escape(each) for each in sorted(phrases, key=len, reverse=True)))


def pick_one(options: Sequence[T], rng: np.random.Generator) -> T:
    return options[int(rng.integers(len(options)))]
