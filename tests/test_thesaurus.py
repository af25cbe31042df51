"""Captions in other words keep their meaning."""

import re

import numpy as np
import pytest

from model.train.card import THESAURUS_WORDS, UNTRAINED_WORDS
from model.train.data import read_subjects
from model.train.looks import DRAWINGS, MEDIA, PALETTES
from model.train.strangers import CaptionWording
from model.train.thesaurus import Thesaurus, with_article
from model.vocabulary import held_out

SUBJECTS = {subject.name: subject for subject in read_subjects()}


@pytest.fixture(scope="module")
def thesaurus():
    return Thesaurus()


def test_every_alternative_name_means_exactly_one_subject(thesaurus):
    others = [name for names in thesaurus.subjects.values() for name in names]
    own = {word for subject in SUBJECTS.values() for word in subject.words}

    assert thesaurus.subjects.keys() <= SUBJECTS.keys()
    assert len(others) > 1000 and len(others) == len(set(others)) and not own & set(others)


def test_looks_grounds_and_palettes_have_other_words(thesaurus):
    spoken = {phrase for phrases in (*DRAWINGS.values(), *MEDIA.values()) for phrase in phrases}

    assert thesaurus.looks.keys() == spoken and thesaurus.palettes.keys() == PALETTES.keys()
    of_looks = [other for others in {id(each): each for each in thesaurus.looks.values()}.values() for other in others]
    assert len(of_looks) == len(set(of_looks))
    for subject, where in (("fox", "on a teal background"), ("fox", "on an orange gradient"), ("owl", "in the dark")):
        said = {thesaurus.reword(f"a {subject} {where}", SUBJECTS[subject], dice(n))[0] for n in range(60)}
        assert len({each for each in said if where not in each}) > 5, where


def test_reworded_caption_keeps_subject_ground_and_look(thesaurus):
    names = {"fox", "red fox", *thesaurus.subjects["fox"]}
    teal = ["teal", *thesaurus.palettes["teal"]]
    looks = ["pencil drawing", *thesaurus.looks["pencil drawing"]]

    for n in range(200):
        said, told = thesaurus.reword("a red fox on a teal background, pencil drawing", SUBJECTS["fox"], dice(n))
        assert any(name in said for name in told) and set(told) <= names
        assert any(colour in said for colour in teal) and any(look in said for look in looks)
        assert not re.search(r"\ba (?=[aeio])|\ban (?=[^aeiou])", said), said


def test_swap_changes_one_phrase(thesaurus):
    caption = "a red fox on a teal background, pencil drawing"
    looks = {f"a red fox on a teal background, {look}" for look in thesaurus.looks["pencil drawing"]}
    names = {f"{with_article(name)} on a teal background, pencil drawing" for name in thesaurus.subjects["fox"]}

    said = {thesaurus.swap(caption, SUBJECTS["fox"], dice(n)) for n in range(200)}
    assert said <= looks | names and said & looks and said & names


def test_some_names_are_never_taught(thesaurus):
    kept = {
        (subject, name) for subject, names in thesaurus.subjects.items() for name in names if held_out(subject, name)
    }
    assert 0.01 < len(kept) / sum(map(len, thesaurus.subjects.values())) < 0.05

    subject, name = min(kept)
    said = [thesaurus.reword(with_article(subject), SUBJECTS[subject], dice(n))[0] for n in range(300)]
    assert not any(each in (name, with_article(name)) for each in said)


def test_empty_and_plain_captions_stay_unchanged(thesaurus):
    assert thesaurus.reword("", SUBJECTS["fox"], dice(0))[0] == ""
    said = CaptionWording(SUBJECTS).say("a fox", "fox", 0.0, 0.0, dice(0))
    assert said == "a fox"


def test_alternative_names_are_not_strange_words(thesaurus):
    wording = CaptionWording(SUBJECTS)
    assert {"kitten", "cottage", "risograph", "azure"} <= thesaurus.words()
    assert not thesaurus.words() & set(wording.strange_words.words)
    assert "at night" not in wording.strange_words.places  # it means one of the data's grounds


def dice(seed):
    return np.random.default_rng(seed)


def test_model_cards_other_words_are_correct(thesaurus):
    for names, never_taught in ((UNTRAINED_WORDS, True), (THESAURUS_WORDS, False)):
        for name, subject in names.items():
            assert name in thesaurus.subjects[subject] and held_out(subject, name) is never_taught
