"""Strange words: what people put around a subject, but no picture of the data set shows.

Captions follow a few rules. A network that has read nothing else takes every other word as meaningful, so some captions
are wrapped in words to ignore: qualities, activities, places, any words that are one token, others that the tokenizer
splits, and second things. A picture shows one thing, the one that all others are placed by: "a phone on a nightstand"
is a phone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence

import numpy as np

from model.library import BUNDLED
from model.train.data import Subject
from model.train.looks import DRAWINGS, MEDIA, PALETTES
from model.train.phrases import CAPTION_PARTS
from model.train.thesaurus import Thesaurus, find_name, pick_one, with_article

PROMPT_FRAMES = (  # further wrappers of prompts
    *("a photo of {}", "a picture of {}", "an image of {}", "a drawing of {}", "an illustration of {}", "{}, close up"),
    *("a portrait of {}", "{}, highly detailed", "{}, simple and clean", "{}, award winning", "beautiful {}", "{} art"),
    *("{}, centred", "{}, front view", "{}, side view", "a study of {}", "a render of {}", "{}, soft light", "my {}"),
    *("{}, dramatic", "{}, professional", "{}, 4k", "{}, in the style of a master", "one single {}", "detail of {}"),
    *("still life with {}", "a scene with {}", "macro of {}", "{}, shot from above", "{} in the foreground"),
)
RELATIONS = (  # of the main thing to a second one
    *("with", "on", "on top of", "in front of", "behind", "beside", "next to", "near", "under", "inside", "and"),
    *("holding", "above", "below", "against", "by", "full of", "outside", "looking at", "beneath", "leaning on"),
)


def look_words() -> set[str]:
    """Words that captions use for looks: these are meaningful."""
    told = [*DRAWINGS.values(), *MEDIA.values(), *PALETTES]
    phrases = [phrase for each in told for phrase in ([each] if isinstance(each, str) else each)]
    words = {
        word for phrase in [*phrases, *CAPTION_PARTS["colours"]] for word in phrase.replace("-", " ").lower().split()
    }
    return {word for word in words if len(word) > 3 or word == "ink"}


class StrangeWords:
    """Words around captions that name nothing a picture could show."""

    def __init__(self, subjects: Mapping[str, Subject], thesaurus: Thesaurus, second_things: bool = True):
        """second_things: whether some phrases name another subject; not where captions may ask for two."""
        self.second_things = second_things
        parts = {word for name in subjects for word in name.split() if len(word) > 2} - {"the"}
        known = look_words() | parts | {"background", "black", "dark"}

        def strange(part: str) -> bool:
            return "{" not in part and not known & set(part.replace("-", " ").split())

        self.qualities = [each for each in CAPTION_PARTS["qualities"] if strange(each)]
        self.activities = [each for each in CAPTION_PARTS["doings"] if strange(each)]
        self.places = [each for each in CAPTION_PARTS["grounds"] if strange(each) and each not in thesaurus.places]
        vocabulary = json.loads((BUNDLED / "mini-tokenizer.json").read_text("utf-8"))["model"]["vocab"]
        news = thesaurus.words()
        words = [each for each in vocabulary if re.fullmatch("[a-z]{4,}", each) and each not in news]
        self.words = [each for each in words if strange(each)]
        pieces = [each for each in vocabulary if re.fullmatch("[a-z]{2,4}", each) and each not in news]
        self.pieces = [each for each in pieces if strange(each)]
        self.vocabulary = set(vocabulary)
        self.things = [name for each in subjects.values() for name in (*each.words, *thesaurus.taught_names(each.name))]

    def strange(self, rng: np.random.Generator) -> str:
        """A meaningless word: one that is a single token or, one in five, one made of pieces."""
        while rng.random() < 0.2:
            made = "".join(pick_one(self.pieces, rng) for _ in range(int(rng.integers(2, 4))))
            if made not in self.vocabulary:
                return made
        return pick_one(self.words, rng)

    def second_thing(self, names: Sequence[str], rng: np.random.Generator) -> str:
        """A second thing and the relation of the first one to it: "on top of an old hotel"."""
        while (thing := pick_one(self.things, rng)) in names:
            pass
        relation, quality = pick_one(RELATIONS, rng), rng.random()
        if quality < 0.6:
            return f"{relation} {with_article(thing)}"
        word = pick_one(self.qualities, rng) if quality < 0.8 else self.strange(rng)
        return f"{relation} {pick_one(('a', 'the', 'some'), rng)} {word} {thing}"

    def several(self, least: int, most: int, rng: np.random.Generator) -> list[str]:
        """At least `least` meaningless words, and fewer than `most`."""
        return [self.strange(rng) for _ in range(int(rng.integers(least, most)))]

    def phrase(self, names: Sequence[str], rng: np.random.Generator) -> str:
        """A place, a second thing, or strange words after a preposition."""
        kind = rng.random()
        if kind < 0.3:
            return pick_one(self.places, rng)
        if kind < 0.7 and self.second_things:
            return self.second_thing(names, rng)
        return " ".join(
            (pick_one(("in", "on", "at", "near", "with", "from", "of", "under"), rng), *self.several(1, 4, rng))
        )

    def surround(self, caption: str, names: Sequence[str], rng: np.random.Generator) -> str:
        """A caption whose subject is next to a second thing; `names` are the subject's."""
        name = find_name(caption, names)
        return (
            caption
            if name is None
            else fix_articles(caption.replace(name, f"{name} {self.second_thing(names, rng)}", 1))
        )

    def insert(self, caption: str, names: Sequence[str], rng: np.random.Generator) -> str:
        """A caption with strange words in one place: before its subject or, more often, after it."""
        name = find_name(caption, names)
        if name is None:
            return caption
        if rng.random() < 0.25:
            before = pick_one(self.qualities, rng) if rng.random() < 0.5 else " ".join(self.several(1, 3, rng))
            return fix_articles(caption.replace(name, f"{before} {name}", 1))
        return fix_articles(caption.replace(name, f"{name} {self.phrase(names, rng)}", 1))

    def wrap(self, caption: str, names: Sequence[str], rng: np.random.Generator) -> str:
        """A caption among strange words; `names` are those of its subject."""
        name = find_name(caption, names)
        if name is None:
            return caption

        before = [pick_one(self.qualities, rng)] * int(rng.random() < 0.5) + self.several(0, 3, rng) * int(
            rng.random() < 0.6
        )
        after = [pick_one(self.activities, rng)] * int(rng.random() < 0.3)
        after += [self.phrase(names, rng)] * int(rng.random() < 0.5)
        head, *parts = caption.replace(name, " ".join((*before, name, *after)), 1).split(", ")
        if rng.random() < 0.3:
            head = head.removeprefix("an ").removeprefix("a ")
        if rng.random() < 0.4:
            head = pick_one(PROMPT_FRAMES, rng).format(head)
        for _ in range(int(rng.integers(0, 3))):
            extra = self.phrase(names, rng) if rng.random() < 0.5 else " ".join(self.several(1, 4, rng))
            parts.insert(int(rng.integers(len(parts) + 1)), extra)
        all_parts = [head, *parts]
        if rng.random() < 0.25:
            all_parts = [all_parts[i] for i in rng.permutation(len(all_parts))]
        return fix_articles(", ".join(all_parts))


def fix_articles(text: str) -> str:
    """A text with every "a" and "an" adapted to the next word."""
    return re.sub(r"\ban? (?=[a-z])", lambda found: "an " if found.string[found.end()] in "aeio" else "a ", text)


class CaptionWording:
    """Captions as people might say them."""

    def __init__(self, subjects: Mapping[str, Subject], second_things: bool = True):
        self.subjects, self.thesaurus = subjects, Thesaurus()
        self.strange_words = StrangeWords(subjects, self.thesaurus, second_things)

    def say(self, caption: str, subject: str, reworded: float, strangers: float, rng: np.random.Generator) -> str:
        """A caption of a subject, put in other words and among strange ones, each with a probability."""
        known = self.subjects[subject]
        names: Sequence[str] = known.words
        if rng.random() < reworded:
            caption, names = self.thesaurus.reword(caption, known, rng)
        return self.strange_words.wrap(caption, names, rng) if rng.random() < strangers else caption
