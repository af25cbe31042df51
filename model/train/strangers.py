"""Strange words: what people put around a subject, and no picture of the data set shows.

Captions come from a few rules. A network that has read nothing else takes every other word for news, so some captions
are wrapped in words that are not: qualities, doings, places, and any words that the tokenizer has whole.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence

import numpy as np

from model.library import BOX
from model.train.data import Subject
from model.train.looks import DRAWINGS, MEDIA, PALETTES
from model.train.phrases import PARTS
from model.train.thesaurus import Thesaurus, named, one

FRAMES = (  # what prompts are wrapped in besides
    *("a photo of {}", "a picture of {}", "an image of {}", "a drawing of {}", "an illustration of {}", "{}, close up"),
    *("a portrait of {}", "{}, highly detailed", "{}, simple and clean", "{}, award winning", "beautiful {}", "{} art"),
    *("{}, centred", "{}, front view", "{}, side view", "a study of {}", "a render of {}", "{}, soft light", "my {}"),
    *("{}, dramatic", "{}, professional", "{}, 4k", "{}, in the style of a master", "one single {}", "detail of {}"),
)


def known_words() -> set[str]:
    """Words that captions use for looks: they are news indeed."""
    told = [*DRAWINGS.values(), *MEDIA.values(), *PALETTES]
    phrases = [phrase for each in told for phrase in ([each] if isinstance(each, str) else each)]
    words = {word for phrase in [*phrases, *PARTS["colours"]] for word in phrase.replace("-", " ").lower().split()}
    return {word for word in words if len(word) > 3 or word == "ink"}


class Wilderness:
    """Words around captions that say nothing a picture could show."""

    def __init__(self, subjects: Sequence[str], thesaurus: Thesaurus):
        named = {word for name in subjects for word in name.split() if len(word) > 2} - {"the"}
        known = known_words() | named | {"background", "black", "dark"}

        def strange(part: str) -> bool:
            return "{" not in part and not known & set(part.replace("-", " ").split())

        self.qualities = [each for each in PARTS["qualities"] if strange(each)]
        self.doings = [each for each in PARTS["doings"] if strange(each)]
        self.places = [each for each in PARTS["grounds"] if strange(each) and each not in thesaurus.places]
        vocabulary = json.loads((BOX / "mini-tokenizer.json").read_text("utf-8"))["model"]["vocab"]
        news = thesaurus.words()
        words = [each for each in vocabulary if re.fullmatch("[a-z]{4,}", each) and each not in news]
        self.words = [each for each in words if strange(each)]

    def wild(self, caption: str, names: Sequence[str], rng: np.random.Generator) -> str:
        """A caption among strange words; `names` are those of its subject."""
        name = named(caption, names)
        if name is None:
            return caption

        def phrase() -> str:
            """A place, or strange words behind a preposition."""
            if rng.random() < 0.5:
                return one(self.places, rng)
            return " ".join((one(("in", "on", "at", "near", "with", "from", "of", "under"), rng), *some(1, 4)))

        def some(least: int, most: int) -> list[str]:
            return [one(self.words, rng) for _ in range(int(rng.integers(least, most)))]

        before = [one(self.qualities, rng)] * int(rng.random() < 0.5) + some(0, 3) * int(rng.random() < 0.6)
        after = [one(self.doings, rng)] * int(rng.random() < 0.3) + [phrase()] * int(rng.random() < 0.4)
        head, *parts = caption.replace(name, " ".join((*before, name, *after)), 1).split(", ")
        if rng.random() < 0.3:
            head = head.removeprefix("an ").removeprefix("a ")
        if rng.random() < 0.4:
            head = one(FRAMES, rng).format(head)
        for _ in range(int(rng.integers(0, 3))):
            extra = phrase() if rng.random() < 0.5 else " ".join(some(1, 4))
            parts.insert(int(rng.integers(len(parts) + 1)), extra)
        whole = [head, *parts]
        if rng.random() < 0.25:
            whole = [whole[i] for i in rng.permutation(len(whole))]
        return re.sub(
            r"\ban? (?=[a-z])", lambda found: "an " if found.string[found.end()] in "aeio" else "a ", ", ".join(whole)
        )


class Wording:
    """Captions as people might have said them."""

    def __init__(self, subjects: Mapping[str, Subject]):
        self.subjects, self.thesaurus = subjects, Thesaurus()
        self.wilderness = Wilderness(list(subjects), self.thesaurus)

    def say(self, caption: str, subject: str, reworded: float, strangers: float, rng: np.random.Generator) -> str:
        """A caption of a subject, in other words and among strange ones, each with a probability."""
        known = self.subjects[subject]
        names: Sequence[str] = known.words
        if rng.random() < reworded:
            caption, names = self.thesaurus.reword(caption, known, rng)
        return self.wilderness.wild(caption, names, rng) if rng.random() < strangers else caption
