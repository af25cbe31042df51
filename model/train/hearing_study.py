"""How prompts are understood, by the evaluation judge: `python -m model.train.hearing_study JUDGE OUT [--only …]`.

names      subjects by the data's own names, by other names that were taught, and by others that never were: is the
           subject the nearest among the names of all
looks      subjects in the look of a held-out picture, not described, in the data's words and in others: likeness of the
           judge's style embedding to that picture's
strangers  captions of held-out pictures as is, in other words, among strange ones too, or with another subject beside
           theirs: is the subject the nearest of the first hundred

Captions are the same for every checkpoint. Intervals are 95 %, by bootstrap: over subjects, looks, drawings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.errors import exit_on_error
from model.pipeline import Pipeline
from model.train.data import DATA, Catalog, phrase
from model.train.evaluate import candidate_subjects, held_out_prompts, make_specs, retrieval
from model.train.judge import Judge
from model.train.looks import DRAWINGS, MEDIA
from model.train.strangers import CaptionWording
from model.train.study import Floats, Pixels, embed, figure, mean, render_specs, run_study, study_parser
from model.train.thesaurus import pick_one, with_article
from model.vocabulary import held_out

WORDINGS = {"plain": (0.0, 0.0), "other words": (1.0, 0.0), "wrapped": (0.0, 1.0), "both": (1.0, 1.0)}


@dataclass(frozen=True)
class Study:
    """What all figures need."""

    pipeline: Pipeline
    judge: Judge
    catalog: Catalog
    wording: CaptionWording
    steps: int | None
    count: int

    def paint(self, captions: Sequence[str], seed: int) -> list[Pixels]:
        return render_specs(self.pipeline, make_specs(captions, seed, steps=self.steps))

    def recognised(self, captions: Sequence[str], subjects: Sequence[str], among: Sequence[str]) -> NDArray[np.bool_]:
        """Whether each caption's picture shows its subject."""
        return retrieval(self.judge, self.paint(captions, 2000), subjects, among)


def names(study: Study) -> dict[str, Any]:
    """Shares of subjects recognised, by kind of name."""
    rng = np.random.default_rng(3)
    known = study.wording.thesaurus.subjects
    others = [(subject, name) for subject in study.catalog.subjects for name in known.get(subject, ())]
    found: dict[str, Any] = {}
    for kind in ("taught", "untaught"):
        pairs = [pair for pair in others if held_out(*pair) == (kind == "untaught")]
        chosen = [pairs[i] for i in rng.permutation(len(pairs))[: study.count]]
        subjects, every = [subject for subject, _ in chosen], list(study.catalog.subjects)
        for label, captions in (
            (kind, [with_article(name) for _, name in chosen]),
            (f"own names of the {kind}", list(map(phrase, subjects))),
        ):
            found[label] = figure(mean, study.recognised(captions, subjects, every), groups=subjects)
            found[label]["of"] = len(chosen)
    return found


def looks(study: Study) -> dict[str, Any]:
    """Likeness to a held-out picture's look, by how it is described."""
    rng = np.random.default_rng(4)
    items = [item for item in study.catalog.items("held-out") if item.look.ground == "white"]
    chosen = [items[i] for i in rng.permutation(len(items))[: study.count]]
    captions: dict[str, list[str]] = {"unsaid": [], "own words": [], "other words": []}
    for item in chosen:
        subject = item.pair.subject
        own_words = pick_one(MEDIA[item.look.medium] or DRAWINGS[item.pair.drawing], rng)
        other = pick_one(study.wording.thesaurus.looks[own_words], rng)
        for label, look in zip(captions, ("", f", {own_words}", f", {other}"), strict=True):
            captions[label].append(phrase(subject) + look)
    real = embed(study.judge, [study.catalog.picture(item) for item in chosen])[1]
    kinds = [item.pair.drawing if item.look.medium == "plain" else item.look.medium for item in chosen]
    found: dict[str, Any] = {}
    for label, each in captions.items():
        likeness: Floats = (embed(study.judge, study.paint(each, 3000))[1] * real).sum(1)
        found[label] = figure(mean, likeness, groups=kinds)
    return found


def strangers(study: Study) -> dict[str, Any]:
    """Shares of subjects recognised, by captions as is, in other words, and among strange ones too."""
    prompts, among = held_out_prompts(study.catalog, study.count), candidate_subjects(study.catalog)
    subjects = [item.pair.subject for item, _ in prompts]
    found = {}
    for label, shares in (*WORDINGS.items(), ("crowded", None)):
        rng = np.random.default_rng(99)
        captions = [
            study.wording.say(caption, item.pair.subject, *shares, rng)
            if shares is not None
            else study.wording.strange_words.surround(caption, study.catalog.subjects[item.pair.subject].words, rng)
            for item, caption in prompts
        ]
        right = study.recognised(captions, subjects, among)
        found[label] = figure(mean, right, groups=[item.pair for item, _ in prompts])
    return found


FIGURES = {"names": names, "looks": looks, "strangers": strangers}


def main() -> None:
    options = study_parser(__doc__, list(FIGURES)).parse_args()

    def begin(pipeline: Pipeline, judge: Judge) -> Study:
        catalog = Catalog(DATA, pipeline.native)
        return Study(pipeline, judge, catalog, CaptionWording(catalog.subjects), options.steps, options.count)

    run_study(options, FIGURES, begin)


if __name__ == "__main__":
    with exit_on_error():
        main()
