"""How prompts are understood, by the evaluation judge: `python -m model.train.hearing_study JUDGE OUT [--only …]`.

names      subjects by the data's own names, by other names that were taught, and by others that never were: is the
           subject the nearest among the names of all
looks      subjects in the look of a held-out picture, not described, in the data's words and in others: likeness of the
           judge's style embedding to that picture's
strangers  captions of held-out pictures as is, in other words, among strange ones too, or with another subject beside
           theirs: is the subject the nearest of the first hundred
two        captions of two subjects, of pictures that no training has, side by side or one above the other: is either's
           name the nearest of the first hundred in some part of the picture, and is the first one left of the second
           or above it; beside the same of real pictures

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
from model.train.study import Floats, Pixels, embed, embed_names, figure, mean, render_specs, run_study, study_parser
from model.train.thesaurus import pick_one, with_article
from model.train.two_subjects import pictures_of_two
from model.vocabulary import held_out

PART = 0.54  # of a picture's side: one of two subjects with a little margin
PARTS = ((0.5, 0), (0.5, 1), (0, 0.5), (1, 0.5), (0.85, 0), (0.85, 1))  # where they stand; the last on the ground
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


def two(study: Study) -> dict[str, Any]:
    """Shares of pictures that show both subjects, and show them where the caption says, by arrangement."""
    rng, among = np.random.default_rng(6), candidate_subjects(study.catalog)
    names = embed_names(study.judge, among)
    every = [item for item in pictures_of_two(study.catalog, split="held-out") if set(item.subjects) <= set(among)]
    found: dict[str, Any] = {}
    for kind, beside in (("beside", True), ("above", False)):
        items = [item for item in every if item.beside == beside][: study.count]
        wanted = np.array([list(map(among.index, item.subjects)) for item in items])
        captions = [study.catalog.caption(item, rng, "medium") for item in items]
        real = [study.catalog.picture(item) for item in items]
        for label, pictures in (("rendered", study.paint(captions, 4000)), ("real", real)):
            shown, placed = find_both(study.judge, pictures, wanted, names, beside)
            first, second = shown.T
            found[f"{kind}, {label}"] = {
                "first": figure(mean, first),
                "second": figure(mean, second),
                "both": figure(mean, first & second),
                "both, in place": figure(mean, first & second & placed),
            }
    return found


def find_both(
    judge: Judge, pictures: Sequence[Pixels], wanted: NDArray[np.integer], names: Floats, beside: bool
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which of two subjects pictures show, and whether they are in the order of the caption.

    wanted   [N, 2] of the names
    names    [S, 96] as the judge reads them
    returns  whether the name of each is the nearest in some part of the picture [N, 2]; whether the first is left of
             the second, or above it [N]
    """
    likeness = np.stack([embed(judge, [part(each, *at) for each in pictures])[0] @ names.T for at in PARTS])
    best = likeness.argmax(-1)  # [parts, N]
    shown = (best[:, :, None] == wanted).any(0)
    axis = 1 if beside else 0
    sides = [np.array([at[axis] == end for at in PARTS]) for end in (0, 1)]
    one, other = (likeness[:, np.arange(len(wanted)), column] for column in wanted.T)
    near, far = ([each[side].max(0) for each in (one, other)] for side in sides)
    return shown, near[0] + far[1] > far[0] + near[1]


def part(picture: Pixels, down: float, across: float) -> Pixels:
    """A square part of a picture [H, W, 3] that holds one of two subjects; 0 … 1 from its one end to the other."""
    side = round(PART * len(picture))
    top, left = (round(each * (len(picture) - side)) for each in (down, across))
    return picture[top : top + side, left : left + side]


FIGURES = {"names": names, "looks": looks, "strangers": strangers, "two": two}


def main() -> None:
    options = study_parser(__doc__, list(FIGURES)).parse_args()

    def begin(pipeline: Pipeline, judge: Judge) -> Study:
        catalog = Catalog(DATA, pipeline.native)
        return Study(pipeline, judge, catalog, CaptionWording(catalog.subjects), options.steps, options.count)

    run_study(options, FIGURES, begin)


if __name__ == "__main__":
    with exit_on_error():
        main()
