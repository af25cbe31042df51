"""The study of how well prompts are understood, with painters whose vocabulary is known."""

import sys

import numpy as np
import pytest
from PIL import Image
from test_style_study import Drawings, Painter, Rims, colour, draw

from model.spec import Picture
from model.train import hearing_study
from model.train.hearing_study import Study
from model.train.looks import DRAWINGS, MEDIA
from model.train.strangers import CaptionWording


class Listener(Painter):
    """Paints the subject and look named in the prompt: in the data's own words only, or in other words too."""

    def __init__(self, wide: bool):
        super().__init__()
        self.names = {name: name for name in Drawings().subjects}
        self.phrases = {phrase: key for key, each in (DRAWINGS | MEDIA).items() for phrase in each}
        if wide:
            thesaurus = CaptionWording(Drawings().subjects).thesaurus
            self.names |= {other: name for name in self.names for other in thesaurus.subjects[name]}
            self.phrases |= {
                other: self.phrases[phrase] for phrase, others in thesaurus.looks.items() for other in others
            }

    def render(self, specs):
        return [Picture(Image.fromarray(self.painting(spec.prompt)), {}) for spec in specs]

    def painting(self, prompt):
        return draw(look_colour(heard(prompt, self.phrases)), colour(heard(prompt, self.names)))


def heard(prompt, known):
    """What the first known phrase of a prompt means; of several that begin there, the longest."""
    words = f" {' '.join(prompt.replace(',', ' ').split())} "
    found = [each for each in known if f" {each} " in words]
    return known.get(min(found, key=lambda each: (words.index(f" {each} "), -len(each)), default=None), "?")


def look_colour(key):
    return colour(f"look {key}")


class Shown(Drawings):
    """Pictures whose rim is the colour of their medium or, if they have none, of their drawing set."""

    def picture(self, item):
        return draw(
            look_colour(item.pair.drawing if item.look.medium == "plain" else item.look.medium),
            colour(item.pair.subject),
        )


@pytest.fixture
def study():
    def made(wide: bool) -> Study:
        catalog = Shown()
        return Study(Listener(wide), Rims(), catalog, CaptionWording(catalog.subjects), None, 60)  # type: ignore[arg-type]

    return made


def test_painter_who_knows_all_words_scores_fully(study):
    found = hearing_study.names(study(True))
    assert all(each["value"] == 1 for each in found.values()) and found["taught"]["of"] > 20

    likeness = hearing_study.looks(study(True))
    assert likeness["own words"]["value"] == likeness["other words"]["value"] == pytest.approx(1)
    assert likeness["unsaid"]["value"] < 0.99


def test_other_words_expose_a_painter_who_knows_only_the_datas(study):
    found = hearing_study.names(study(False))
    for kind in ("taught", "untaught"):
        assert found[kind]["value"] < 0.5 and found[f"own names of the {kind}"]["value"] == 1

    likeness = hearing_study.looks(study(False))
    assert likeness["own words"]["value"] == pytest.approx(1)
    assert likeness["other words"]["value"] < 0.99


def test_all_kinds_of_captions_are_tested(study):
    wide, narrow = hearing_study.strangers(study(True)), hearing_study.strangers(study(False))
    assert narrow["plain"]["value"] == narrow["crowded"]["value"] == 1
    assert narrow["other words"]["value"] < 0.9 < wide["wrapped"]["value"]
    assert wide["plain"]["value"] == wide["other words"]["value"] == 1


def test_crowded_captions_expose_a_painter_of_the_last_subject(study, monkeypatch):
    def last(prompt, known):
        found = [each for each in known if f" {each} " in f" {prompt.replace(',', ' ')} "]
        return known.get(max(found, key=prompt.rindex, default=None), "?")

    monkeypatch.setattr(sys.modules[__name__], "heard", last)
    found = hearing_study.strangers(study(True))
    assert found["crowded"]["value"] < 0.8 < found["plain"]["value"]


class Company(Shown):
    """Two subjects are two squares of their colours: side by side, or one above the other."""

    def __init__(self):
        super().__init__()
        self.asked = {}

    def picture(self, item):
        return arrange(colour(item.pair.subject), colour(item.second.subject), item.beside)

    def caption(self, item, *args):
        caption = super().caption(item, *args)
        self.asked[caption] = item
        return caption


def arrange(first, second, beside):
    picture = np.full((128, 128, 3), 255, np.uint8)
    for at, middle in enumerate((first, second)):
        end = slice(64 * at + 10, 64 * at + 54)
        picture[(slice(42, 86), end) if beside else (end, slice(42, 86))] = middle.round()
    return picture


@pytest.mark.parametrize(
    ("paint", "both", "in_place"),
    [
        (lambda first, second, beside: arrange(first, second, beside), 1, 1),
        (lambda first, second, beside: arrange(second, first, beside), 1, 0),
        (lambda first, second, beside: arrange(first, first, beside), 0, 0),
        (lambda first, second, beside: draw(first, (first + second) / 2), 0, 0),
    ],
    ids=["as asked", "the other way round", "one of them twice", "a mixture"],
)
def test_two_subjects_are_found_where_the_caption_has_them(paint, both, in_place):
    catalog = Company()

    class Pairs(Listener):
        def painting(self, prompt):
            item = catalog.asked[prompt]
            return paint(*(colour(pair.subject) for pair in (item.pair, item.second)), item.beside)

    found = hearing_study.two(Study(Pairs(False), Rims(), catalog, CaptionWording(catalog.subjects), None, 40))  # type: ignore[arg-type]
    for kind in ("beside", "above"):
        real, rendered = found[f"{kind}, real"], found[f"{kind}, rendered"]
        assert real["both"]["value"] == real["both, in place"]["value"] == 1
        assert rendered["both"]["value"] == pytest.approx(both, abs=0.2)  # the judge reads bare ground as some subject
        assert rendered["both, in place"]["value"] == in_place
