"""The study of hearing, on painters whose hearing is known."""

import sys

import pytest
from PIL import Image
from test_style_study import Drawings, Painter, Rims, colour, draw

from model.spec import Picture
from model.train import hearing_study
from model.train.hearing_study import Study
from model.train.looks import DRAWINGS, MEDIA
from model.train.strangers import Wording


class Listener(Painter):
    """Paints the subject and the look that it hears of: by the data's own words, or by other words too."""

    def __init__(self, wide: bool):
        super().__init__()
        self.names = {name: name for name in Drawings().subjects}
        self.phrases = {phrase: key for key, each in (DRAWINGS | MEDIA).items() for phrase in each}
        if wide:
            thesaurus = Wording(Drawings().subjects).thesaurus
            self.names |= {other: name for name in self.names for other in thesaurus.subjects[name]}
            self.phrases |= {
                other: self.phrases[phrase] for phrase, others in thesaurus.looks.items() for other in others
            }

    def render(self, specs):
        return [Picture(Image.fromarray(self.painting(spec.prompt)), {}) for spec in specs]

    def painting(self, prompt):
        return draw(look_colour(heard(prompt, self.phrases)), colour(heard(prompt, self.names)))


def heard(prompt, known):
    """What the first known phrase of a prompt means, the longest that begins there."""
    words = f" {' '.join(prompt.replace(',', ' ').split())} "
    found = [each for each in known if f" {each} " in words]
    return known.get(min(found, key=lambda each: (words.index(f" {each} "), -len(each)), default=None), "?")


def look_colour(key):
    return colour(f"look {key}")


class Shown(Drawings):
    """Pictures whose rim is the colour of their medium, or of their drawing set where they have none."""

    def picture(self, item):
        return draw(
            look_colour(item.pair.drawing if item.look.medium == "plain" else item.look.medium),
            colour(item.pair.subject),
        )


@pytest.fixture
def study():
    def made(wide: bool) -> Study:
        catalog = Shown()
        return Study(Listener(wide), Rims(), catalog, Wording(catalog.subjects), None, 60)  # type: ignore[arg-type]

    return made


def test_who_hears_all_words_draws_all_subjects_and_looks(study):
    found = hearing_study.names(study(True))
    assert all(each["value"] == 1 for each in found.values()) and found["taught"]["of"] > 20

    likeness = hearing_study.looks(study(True))
    assert likeness["own words"]["value"] == likeness["other words"]["value"] == pytest.approx(1)
    assert likeness["unsaid"]["value"] < 0.99


def test_who_knows_the_datas_words_only_is_told_by_the_others(study):
    found = hearing_study.names(study(False))
    for kind in ("taught", "untaught"):
        assert found[kind]["value"] < 0.5 and found[f"own names of the {kind}"]["value"] == 1

    likeness = hearing_study.looks(study(False))
    assert likeness["own words"]["value"] == pytest.approx(1)
    assert likeness["other words"]["value"] < 0.99


def test_captions_of_all_kinds_are_asked_for(study):
    wide, narrow = hearing_study.strangers(study(True)), hearing_study.strangers(study(False))
    assert narrow["plain"]["value"] == narrow["crowded"]["value"] == 1
    assert narrow["other words"]["value"] < 0.9 < wide["wrapped"]["value"]
    assert wide["plain"]["value"] == wide["other words"]["value"] == 1


def test_who_hears_the_last_thing_is_told_by_crowded_captions(study, monkeypatch):
    def last(prompt, known):
        found = [each for each in known if f" {each} " in f" {prompt.replace(',', ' ')} "]
        return known.get(max(found, key=prompt.rindex, default=None), "?")

    monkeypatch.setattr(sys.modules[__name__], "heard", last)
    found = hearing_study.strangers(study(True))
    assert found["crowded"]["value"] < 0.8 < found["plain"]["value"]
