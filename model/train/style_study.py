"""What style control does, by the evaluation judge: `python -m model.train.style_study JUDGE OUT [--only agreement …]`.

Every trial is a prompt that names a subject but no look, and a reference picture of another subject in a look that
neither generator nor judge was trained on. Figures lie between a floor, the same prompts without a reference, and a
ceiling, real pictures in the reference's look; intervals are 95 %, by bootstrap over looks: trials of one look are
alike. Two are less strict: those of a mix are all over its first looks, also for likeness to the second; that of five
references is over groups that share looks, though no trial.

agreement  is the reference's look the nearest of twenty; is the prompt's subject still the nearest of its names; is
           the reference's subject seen more often than without it (leakage)
strength   likeness to the reference's look over strengths
mixing     likeness to both looks on the way from one to the other
exact      strength 0 and any order of the styles: the same bits
strips     pictures of both strengths and mixes, to look at

Output: see `study.py`; what the judge saw of each picture is stored too, so that a run resumes. A likeness is the
cosine between the judge's style embedding of a picture and the mean of real ones in the look.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import permutations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from model.atomic import atomic_write
from model.errors import exit_on_error
from model.hashes import sha256
from model.pipeline import Pipeline
from model.spec import Reference, RenderSpec, Style
from model.train.data import DATA, Catalog, Item, phrase
from model.train.evaluate import candidate_subjects
from model.train.judge import Judge
from model.train.looks import Look
from model.train.study import (
    Floats,
    Pixels,
    choose_looks,
    comma_list,
    difference,
    embed,
    embed_names,
    figure,
    mean,
    prototype,
    ratio,
    render_specs,
    represents_look,
    run_study,
    sheet,
    spearman,
    study_parser,
)

STRENGTHS = (-1.0, -0.5, 0.0, 0.25, 0.5, 0.75, 1.0, 1.5)
MIX_STEPS = 10
MAX_FIVES = 40  # mixes of five references, at most
METHOD_VARIANTS: dict[str, dict[str, Any]] = {  # name -> the style's method, the spec's leak guard
    "tokens": {"method": "tokens"},
    "damping": {"method": "splice", "leak_guard": "damping"},
    "shift": {"method": "splice", "leak_guard": "shift"},
    "both": {"method": "splice", "leak_guard": "both"},
    "none": {"method": "splice", "leak_guard": "none"},
}


# ---- trials ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """A prompt of one subject beside a reference of another."""

    subject: str
    seed: int
    look: int  # of the reference, in the study's list
    reference: Item
    real: Item  # another picture in that look, of the prompt's subject if there is one: the ceiling

    @property
    def prompt(self) -> str:
        return phrase(self.subject)


def draw_trials(catalog: Catalog, looks: Sequence[Look], count: int) -> list[Trial]:
    """Trials that cycle through the looks; subjects are drawn freely, but a reference's is never the prompt's."""
    rng = np.random.default_rng(11)
    subjects = candidate_subjects(catalog)
    pictures: dict[Look, list[Item]] = {look: [] for look in looks}
    for item in catalog.items("styles"):
        if item.look in pictures and not represents_look(item):
            pictures[item.look].append(item)
    trials = []
    for index in range(count):
        which = index % len(looks)
        subject = str(rng.choice(subjects))
        others = [item for item in pictures[looks[which]] if item.pair.subject != subject]
        reference = others[int(rng.integers(len(others)))]
        same = [item for item in pictures[looks[which]] if item.pair.subject == subject]
        real = same[0] if same else others[(others.index(reference) + 1) % len(others)]
        trials.append(Trial(subject, 4000 + index, which, reference, real))
    return trials


# ---- seeing ---------------------------------------------------------------------------------------------------------


CACHED_ARRAYS = ("key", "subject", "style")
PICTURES_PER_SAVE = 32  # pictures between two saves


class JudgeView(NamedTuple):
    """The judge's view of one picture: unit embeddings."""

    subject: Floats  # [96]
    style: Floats  # [48]


class Study:
    """Renders what figures ask for, each picture once, and shows it to the judge."""

    def __init__(
        self,
        pipeline: Pipeline,
        judge: Judge,
        catalog: Catalog,
        folder: Path,
        *,
        steps: int | None,
        count: int,
        judged_by: str = "",
    ):
        """`judged_by`: hash of the judge's file."""
        self.pipeline, self.judge, self.catalog, self.folder, self.steps = pipeline, judge, catalog, folder, steps
        self.looks = choose_looks(catalog)
        self.trials = draw_trials(catalog, self.looks, count)
        self.prototypes = np.stack([prototype(judge, catalog, look) for look in self.looks])  # [looks, 48]
        self.seen: dict[str, JudgeView] = {}  # by `key`
        self.cache_context = repr((pipeline.hashes(), pipeline.plan.dtype, judged_by))
        if (kept := folder / "seen.npz").exists():
            with np.load(kept) as file:
                self.seen = {k: JudgeView(*pair) for k, *pair in zip(*(file[n] for n in CACHED_ARRAYS), strict=True)}

    def look_at(self, pictures: Sequence[Pixels]) -> list[JudgeView]:
        return [JudgeView(*pair) for pair in zip(*embed(self.judge, pictures), strict=True)] if pictures else []

    def see_real(self) -> list[JudgeView]:
        return self.look_at([self.catalog.picture(trial.real) for trial in self.trials])

    def reference_file(self, item: Item) -> Path:
        """A reference picture on disk."""
        name = f"{item.pair.drawing}-{item.look.medium}-{item.pair.subject}".replace(" ", "-")
        path = self.folder / "references" / f"{name}.png"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(self.catalog.picture(item)).save(path)
        return path

    def spec(self, trial: Trial, weights: Sequence[tuple[Item, float]], way: str = "tokens") -> RenderSpec:
        """A trial's prompt with references at strengths."""
        how = dict(METHOD_VARIANTS[way])
        method = how.pop("method")
        styles = tuple(
            Style(f"s{i}", weight, (Reference(self.reference_file(item)),), method=method)
            for i, (item, weight) in enumerate(weights)
            if weight
        )
        return RenderSpec(trial.prompt, seed=trial.seed, steps=self.steps, styles=styles, **(how if styles else {}))

    def key(self, spec: RenderSpec) -> str:
        """A picture's key: its spec, the weights that render it, and the judge that sees it."""
        return hashlib.sha256(f"{self.cache_context}{spec}".encode()).hexdigest()

    def see(self, specs: Sequence[RenderSpec]) -> list[JudgeView]:
        """Each spec's picture as the judge sees it; rendered when first asked for."""
        new = [spec for spec in dict.fromkeys(specs) if self.key(spec) not in self.seen]
        started = time.monotonic()
        for start in range(0, len(new), PICTURES_PER_SAVE):
            part = new[start : start + PICTURES_PER_SAVE]
            self.seen |= zip(map(self.key, part), self.look_at(render_specs(self.pipeline, part)), strict=True)
            self.save_cache()
            done = start + len(part)
            print(f"  {done} of {len(new)}, {(time.monotonic() - started) / done:.2f} s each", flush=True)
        return [self.seen[self.key(spec)] for spec in specs]

    def save_cache(self) -> None:
        columns: dict[str, Any] = dict(
            zip(CACHED_ARRAYS, (list(self.seen), *zip(*self.seen.values(), strict=True)), strict=True)
        )
        with atomic_write(self.folder / "seen.npz") as draft, draft.open("wb") as file:
            np.savez(file, **columns)

    def likeness(self, seen: Sequence[JudgeView], looks: Sequence[int]) -> Floats:
        """Likeness of each picture to its look, [n]."""
        return np.array([s.style @ self.prototypes[look] for s, look in zip(seen, looks, strict=True)])


# ---- figures --------------------------------------------------------------------------------------------------------


def agreement(study: Study, ways: Sequence[str]) -> dict[str, Any]:
    """Agreement, content kept and leakage of each way at strength 1, with floor and ceiling."""
    trials, judge = study.trials, study.judge
    asked = candidate_subjects(study.catalog)
    every = list(study.catalog.subjects)
    names = {"asked": embed_names(judge, asked), "every": embed_names(judge, every)}
    looks, references = [t.look for t in trials], [t.reference.pair.subject for t in trials]

    by_look = partial(figure, groups=looks)

    def read(seen: Sequence[JudgeView]) -> dict[str, Floats]:
        """Right or wrong of every trial."""
        style, subject = np.stack([s.style for s in seen]), np.stack([s.subject for s in seen])
        nearest = (style @ study.prototypes.T).argmax(1)
        named, leaked = (subject @ names["asked"].T).argmax(1), (subject @ names["every"].T).argmax(1)
        return {
            "agreement": (nearest == looks).astype(float),
            "content": np.array([asked[n] == t.subject for n, t in zip(named, trials, strict=True)], float),
            "leaked": np.array([every[n] == shown for n, shown in zip(leaked, references, strict=True)], float),
            "likeness": study.likeness(seen, looks),
        }

    floor = read(study.see([study.spec(trial, []) for trial in trials]))
    ceiling = read(study.see_real())
    found: dict[str, Any] = {
        "floor": {key: by_look(mean, floor[key]) for key in ("agreement", "content", "leaked", "likeness")},
        "ceiling": {key: by_look(mean, ceiling[key]) for key in ("agreement", "likeness")},
    }
    for way in ways:
        print(way, flush=True)
        got = read(study.see([study.spec(trial, [(trial.reference, 1.0)], way) for trial in trials]))
        found[way] = {
            "agreement": by_look(mean, got["agreement"]),
            "agreement_of_ceiling": by_look(ratio, got["agreement"], ceiling["agreement"]),
            "agreement_over_floor": by_look(difference, got["agreement"], floor["agreement"]),
            "content": by_look(mean, got["content"]),
            "content_kept": by_look(ratio, got["content"], floor["content"]),
            "leakage": by_look(difference, got["leaked"], floor["leaked"]),
            "likeness": by_look(mean, got["likeness"]),
        }
    return found


def strength(study: Study, ways: Sequence[str]) -> dict[str, Any]:
    """Mean likeness to the reference's look at every strength."""
    found: dict[str, Any] = {}
    trials, levels = study.trials, np.array(STRENGTHS)
    by_look = partial(figure, groups=[trial.look for trial in trials])
    zero = STRENGTHS.index(0.0)
    for way in ways:
        print(way, flush=True)
        curves = []
        for level in STRENGTHS:
            seen = study.see([study.spec(trial, [(trial.reference, level)], way) for trial in trials])
            curves.append(study.likeness(seen, [trial.look for trial in trials]))
        curve = np.stack(curves, 1)  # [trials, strengths]
        found[way] = {
            "rho": by_look(lambda c: spearman(levels, c.mean(0)), curve),
            "below_zero": [by_look(difference, curve[:, i], curve[:, zero]) for i in range(zero)],
            "strengths": [{"strength": s, **by_look(mean, curve[:, i])} for i, s in enumerate(STRENGTHS)],
        }
    return found


def mix_pairs(study: Study) -> list[tuple[Trial, Trial]]:
    """Each trial with another whose look has another medium: the two ends of a mix."""
    found = []
    for index, trial in enumerate(study.trials):
        medium = study.looks[trial.look].medium
        others = [
            other
            for other in (*study.trials[index + 1 :], *study.trials[:index])
            if study.looks[other.look].medium != medium and other.reference.pair.subject != trial.subject
        ]
        found.append((trial, others[0]))
    return found


def mixing(study: Study, ways: Sequence[str]) -> dict[str, Any]:
    """Mean likeness to both looks over ten steps from one reference to another."""
    found: dict[str, Any] = {}
    pairs = mix_pairs(study)
    by_look = partial(figure, groups=[trial.look for trial, _ in pairs])
    shares = np.linspace(0, 1, MIX_STEPS + 1)
    for way in ways:
        print(way, flush=True)
        to_one, to_other = [], []
        for t in shares.round(6).tolist():
            specs = [study.spec(a, [(a.reference, round(1 - t, 6)), (b.reference, t)], way) for a, b in pairs]
            seen = study.see(specs)
            to_one.append(study.likeness(seen, [a.look for a, _ in pairs]))
            to_other.append(study.likeness(seen, [b.look for _, b in pairs]))
        one, other, middle = np.stack(to_one, 1), np.stack(to_other, 1), MIX_STEPS // 2  # [trials, points]
        found[way] = {
            "rho_of_first": by_look(lambda c: spearman(shares, c.mean(0)), one),
            "rho_of_second": by_look(lambda c: spearman(shares, c.mean(0)), other),
            "middle_over_other_end_of_first": by_look(difference, one[:, middle], one[:, -1]),
            "middle_over_other_end_of_second": by_look(difference, other[:, middle], other[:, 0]),
            "points": [
                {"second": round(t, 2), "to_first": by_look(mean, one[:, i]), "to_second": by_look(mean, other[:, i])}
                for i, t in enumerate(shares.tolist())
            ],
            "five": mix_of_five(study, way),
        }
    return found


def mix_of_five(study: Study, way: str) -> dict[str, float]:
    """How much closer a mix of five references in equal parts is to their looks than a picture without."""
    # none share a trial: the interval treats them as independent
    starts = range(0, len(study.trials) - 4, 5)[:MAX_FIVES]
    groups = [study.trials[start : start + 5] for start in starts]
    mixed = study.see([study.spec(group[0], [(t.reference, 0.2) for t in group], way) for group in groups])
    plain = study.see([study.spec(group[0], []) for group in groups])
    gain = [
        study.likeness([with_all] * 5, [t.look for t in group]) - study.likeness([without] * 5, [t.look for t in group])
        for with_all, without, group in zip(mixed, plain, groups, strict=True)
    ]
    return figure(mean, np.stack(gain).mean(1))


def exact(study: Study, ways: Sequence[str]) -> dict[str, Any]:
    """For a few trials, bit for bit: strength 0 against no style, and three styles in all six orders."""
    found: dict[str, Any] = {}

    def pixels(spec: RenderSpec) -> str:
        return study.pipeline.render([spec])[0].record["pixels"]

    for way in ways:
        same_at_zero, same_in_any_order = [], []
        for trial, *others in (
            study.trials[start : start + 3] for start in range(0, min(len(study.trials) - 2, 12), 3)
        ):
            style = Style(
                "s", 0.0, (Reference(study.reference_file(trial.reference)),), method=METHOD_VARIANTS[way]["method"]
            )
            bare = study.spec(trial, [])
            zero = RenderSpec(bare.prompt, seed=bare.seed, steps=bare.steps, styles=(style,))
            same_at_zero.append(pixels(bare) == pixels(zero))
            mix = list(zip((t.reference for t in (trial, *others)), (0.6, 0.3, -0.4), strict=True))
            same_in_any_order.append(len({pixels(study.spec(trial, order, way)) for order in permutations(mix)}) == 1)
        found[way] = {"strength_zero": all(same_at_zero), "any_order": all(same_in_any_order)}
    return found


# ---- for the eye ----------------------------------------------------------------------------------------------------


def strips(study: Study, ways: Sequence[str]) -> dict[str, Any]:
    """Sheets of four looks over all strengths, and of four mixes, with the references at the ends."""
    pairs: dict[str, tuple[Trial, Trial]] = {}
    for pair in mix_pairs(study):
        pairs.setdefault(study.looks[pair[0].look].medium, pair)
    chosen = list(pairs.values())[:4]
    files = []
    for way in ways:
        rows = []
        for trial, _ in chosen:
            specs = [study.spec(trial, [(trial.reference, level)], way) for level in STRENGTHS]
            rows.append([study.catalog.picture(trial.reference), *render_specs(study.pipeline, specs)])
        files.append(sheet(study.folder / f"strength-{way}.png", ["reference", *(f"{s:g}" for s in STRENGTHS)], rows))
        rows, points = [], [round(i / MIX_STEPS, 2) for i in range(MIX_STEPS + 1)]
        for a, b in chosen:
            specs = [study.spec(a, [(a.reference, round(1 - t, 2)), (b.reference, t)], way) for t in points]
            ends = [study.catalog.picture(each.reference) for each in (a, b)]
            rows.append([ends[0], *render_specs(study.pipeline, specs), ends[1]])
        files.append(sheet(study.folder / f"mixing-{way}.png", ["first", *(f"{t:g}" for t in points), "second"], rows))
    return {"files": [file.name for file in files]}


# ---- what is written ------------------------------------------------------------------------------------------------

FIGURES = {"agreement": agreement, "strength": strength, "mixing": mixing, "exact": exact, "strips": strips}


def main() -> None:
    parser = study_parser(__doc__, list(FIGURES))
    default = ["tokens", "damping", "shift"]
    parser.add_argument(
        "--ways", type=comma_list(METHOD_VARIANTS), default=default, help=f"of {','.join(METHOD_VARIANTS)}"
    )
    options = parser.parse_args()

    def begin(pipeline: Pipeline, judge: Judge) -> Study:
        catalog, judged_by = Catalog(DATA, pipeline.native), sha256(options.judge)
        return Study(
            pipeline, judge, catalog, options.out, steps=options.steps, count=options.count, judged_by=judged_by
        )

    run_study(options, FIGURES, begin, options.ways)


if __name__ == "__main__":
    with exit_on_error():
        main()
