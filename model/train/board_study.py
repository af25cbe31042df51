"""What moodboards and the like do, by the evaluation judge: `python -m model.train.board_study JUDGE OUT [--only …]`.

cohesion    batches of eight, of one prompt and of a run of eight: likeness of looks over the dial, how much of subjects
            and variety remains, and whether 0 is bit for bit the independent picture
moodboard   boards of thirty pictures in permanently held-out looks: are two looks found as two, one as one, with the
            right members; are pictures closer to a board with it than without; seconds for 300 pictures
creativity  variety of a prompt's pictures, and subjects kept, level by level
avoids      without guidance: how often an avoided medium or colour is recognised although the prompt asks for it
sheets      a ladder of cohesion, and boards before and after, to look at

Output: see `study.py`. A likeness is the cosine of the judge's style embeddings; a spread is one minus its mean over
pairs. Distances between pictures are of pixels at 64 px (root mean square) and of the judge's last feature map.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from model.avoid import phrases_in
from model.board_pictures import StyleReader
from model.colours import named_colours, oklab
from model.errors import exit_on_error
from model.expand import LEVELS, expand
from model.moodboard import Board, analyse
from model.pipeline import Pipeline
from model.spec import Reference, RenderSpec, Style, tie_to_lead
from model.train.data import DATA, Catalog, Item, phrase, stable_seed
from model.train.judge import Judge
from model.train.looks import MEDIA, PALETTES, Look
from model.train.study import (
    choose_looks,
    figure,
    mean,
    ratio,
    run_study,
    sheet,
    spearman,
    study_parser,
)
from model.train.viewing import (
    JudgeView,
    Study,
    mean_distances,
    mean_likeness,
    pictures_by_look,
    shuffled,
    style_centre,
)

BATCH = 8
COHESION_LEVELS = (0.0, 0.25, 0.5, 0.75, 1.0)
BOARD_SIZE = 30  # pictures of a board
BOARD_STRENGTH = 0.35  # the default of [moodboard]
PER_BOARD = 10  # pictures rendered with each


# ---- cohesion -------------------------------------------------------------------------------------------------------


def cohesion(study: Study, scope: str = "prompt") -> dict[str, Any]:
    """The dial over batches of one prompt or over runs of eight; real pictures of one look are the ceiling."""
    real = [[study.catalog.picture(item) for item in items] for items in real_looks(study.catalog)]
    levels, batches = np.array(COHESION_LEVELS), draw_batches(study, scope)
    # [batches, levels, 4]
    table = np.array([[measure_batch(study, batch, c) for c in COHESION_LEVELS] for batch in batches])
    alike, right, pixels, features = np.moveaxis(table, 2, 0)
    found: dict[str, Any] = {
        "rho": figure(lambda x: spearman(levels, x.mean(0)), alike),
        "spread_of_zero": figure(ratio, 1 - alike[:, -1], 1 - alike[:, 0]),
        "subject_of_zero": figure(ratio, right[:, -1], right[:, 0]),
        "pixels_of_zero": figure(ratio, pixels[:, -1], pixels[:, 0]),
        "features_of_zero": figure(ratio, features[:, -1], features[:, 0]),
        "zero_is_exact": is_exact(study, batches[0]),
        "likeness_ceiling": figure(mean, np.array([mean_likeness(study.look_at(each)) for each in real])),
    }
    for name, values in (("likeness", alike), ("subject", right), ("pixels", pixels), ("features", features)):
        found[name] = {f"at_{c:g}": figure(mean, values[:, i]) for i, c in enumerate(COHESION_LEVELS)}
    return found


def draw_batches(study: Study, scope: str) -> list[list[str]]:
    """Subjects of batches of eight: all the same, or all different."""
    rng = np.random.default_rng(stable_seed("cohesion", scope))
    batches = []
    for _ in range(max(1, study.count // BATCH)):
        names = [str(name) for name in rng.choice(study.subjects, BATCH, replace=False)]
        batches.append(names if scope == "run" else names[:1] * BATCH)
    return batches


def cohesion_specs(study: Study, batch: Sequence[str], level: float) -> list[RenderSpec]:
    first = 1000 + stable_seed(*batch) % 100_000
    return tie_to_lead([study.spec(phrase(name), first + i) for i, name in enumerate(batch)], level)


def measure_batch(study: Study, batch: Sequence[str], level: float) -> tuple[float, float, float, float]:
    """Likeness of looks, share of correct subjects, distance of pixels, of features."""
    seen = study.see(cohesion_specs(study, batch, level))
    return mean_likeness(seen), float(study.recognised(seen, batch).mean()), *mean_distances(seen)


def is_exact(study: Study, batch: Sequence[str]) -> bool:
    """Whether a batch at 0 is, bit for bit, the same as pictures without cohesion."""
    free = [study.spec(spec.prompt, spec.seed) for spec in cohesion_specs(study, batch, 0.0)]
    pairs = zip(study.pipeline.stream(free), study.pipeline.stream(cohesion_specs(study, batch, 0.0)), strict=True)
    return all(one.record["pixels"] == other.record["pixels"] for one, other in pairs)


def real_looks(catalog: Catalog) -> list[list[Item]]:
    """Eight real pictures each of twenty-five training looks."""
    by_look = pictures_by_look(catalog)
    looks = sorted(by_look, key=lambda look: stable_seed("eight", look))[:25]
    return [shuffled(by_look[look])[:BATCH] for look in looks]


# ---- moodboards -----------------------------------------------------------------------------------------------------


def moodboard(study: Study) -> dict[str, Any]:
    """Boards in held-out looks: their analysis, and pictures rendered with them."""
    eye = StyleReader.load("mini")
    looks = choose_looks(study.catalog)
    two, right = [], []
    for pair in look_pairs(looks):
        truth, board = make_board(study, pair, eye)
        two.append(float(len(board.looks) == 2))
        right.append(member_accuracy(truth, board))
    one = [float(len(make_board(study, [look], eye)[1].looks) == 1) for look in looks]
    found: dict[str, Any] = {
        "two_read_as_two": figure(mean, np.array(two)),
        "members_right": figure(mean, np.array(right)),
        "one_read_as_one": figure(mean, np.array(one)),
        "seconds_of_300": time_analysis(study, eye),
    }
    likenesses: dict[str, list[float]] = {"with": [], "without": [], "right": [], "right_without": [], "real": []}
    for index in range(max(1, study.count // PER_BOARD)):
        look = looks[index % len(looks)]
        truth, board = make_board(study, [look], eye)
        centre = style_centre(study.look_at([np.asarray(Image.open(path)) for path in truth]))
        others = [item for item in study.catalog.items("styles") if item.look == look]
        real = study.look_at(
            [study.catalog.picture(item) for item in shuffled(others)[BOARD_SIZE : BOARD_SIZE + PER_BOARD]]
        )
        likenesses["real"].append(float(np.mean([seen.style @ centre for seen in real])))
        for way, style in (("with", board_style(board)), ("without", None)):
            subjects, specs = board_specs(study, style, index)
            seen = study.see(specs)
            likenesses[way].append(float(np.mean([each.style @ centre for each in seen])))
            likenesses["right" if way == "with" else "right_without"].append(
                float(study.recognised(seen, subjects).mean())
            )
    values = {name: np.array(each) for name, each in likenesses.items()}
    return found | {
        "likeness": {name: figure(mean, values[name]) for name in ("without", "with", "real")},
        "nearer": figure(mean, values["with"] - values["without"]),
        "subject_of_without": figure(ratio, values["right"], values["right_without"]),
    }


def look_pairs(looks: Sequence[Look]) -> list[tuple[Look, Look]]:
    """Twenty pairs of looks in different media and drawing sets, always the same ones."""
    apart = [(a, b) for a, b in combinations(looks, 2) if a.medium != b.medium and a.drawing != b.drawing]
    return sorted(apart, key=lambda pair: stable_seed("pair", *pair))[:20]


def make_board(study: Study, looks: Sequence[Look], eye: StyleReader) -> tuple[dict[Path, Look], Board]:
    """A board of `BOARD_SIZE` real pictures in equal parts, as files, and its analysis."""
    if tuple(looks) in study.boards:
        return study.boards[tuple(looks)]
    folder = study.folder / "boards" / "-and-".join(f"{look.drawing}-{look.medium}" for look in looks)
    folder.mkdir(parents=True, exist_ok=True)
    truth: dict[Path, Look] = {}
    for look in looks:
        items = [item for item in study.catalog.items("styles") if item.look == look]
        for item in shuffled(items)[: BOARD_SIZE // len(looks)]:
            path = folder / f"{look.drawing}-{look.medium}-{item.pair.subject}.png".replace(" ", "-")
            if not path.exists():
                Image.fromarray(study.catalog.picture(item)).save(path)
            truth[path] = look
    study.boards[tuple(looks)] = truth, analyse(sorted(truth), eye)
    return study.boards[tuple(looks)]


def member_accuracy(truth: dict[Path, Look], board: Board) -> float:
    """The share of pictures assigned to a look that is mostly their own."""
    agree = sum(Counter(truth[path] for path in look.pictures).most_common(1)[0][1] for look in board.looks)
    return agree / len(truth)


def time_analysis(study: Study, eye: StyleReader) -> float:
    """Seconds for a board of 300 pictures."""
    folder = study.folder / "boards" / "large"
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for index, item in enumerate(shuffled(study.catalog.items("styles"))[:300]):
        paths.append(folder / f"{index}.png")
        if not paths[-1].exists():
            Image.fromarray(study.catalog.picture(item)).save(paths[-1])
    started = time.perf_counter()
    analyse(paths, eye)
    return round(time.perf_counter() - started, 1)


def board_style(board: Board) -> Style:
    """A board as a style, as the command line makes it."""
    references = tuple(Reference(path, weight) for path, weight in board.representatives)
    return Style("moodboard", BOARD_STRENGTH, references, board.keywords, board.avoids)


def board_specs(study: Study, style: Style | None, index: int) -> tuple[list[str], list[RenderSpec]]:
    """Subjects and specs of the pictures for one board; the same ones without it."""
    rng = np.random.default_rng(stable_seed("board", index))
    subjects = [str(name) for name in rng.choice(study.subjects, PER_BOARD, replace=False)]
    return subjects, [board_spec(study, name, 5000 + PER_BOARD * index + i, style) for i, name in enumerate(subjects)]


def board_spec(study: Study, name: str, seed: int, style: Style | None) -> RenderSpec:
    """A subject with a board's pictures and words, or without."""
    if style is None:
        return study.spec(phrase(name), seed)
    prompt, negative = ", ".join([phrase(name), *style.keywords]), ", ".join(style.avoids)
    return study.spec(prompt, seed, styles=(style,), negative=negative)


# ---- creativity -----------------------------------------------------------------------------------------------------


def creativity(study: Study, seeds: int = 4) -> dict[str, Any]:
    """Prompts of a bare subject at every level, each with several seeds."""
    rng = np.random.default_rng(stable_seed("creativity"))
    names = [str(name) for name in rng.choice(study.subjects, max(2, study.count // seeds))]
    table = np.array(
        [[measure_level(study, name, level, seeds, 100 * i) for level in LEVELS] for i, name in enumerate(names)]
    )
    right, pixels, features, spread = np.moveaxis(table, 2, 0)  # [prompts, levels] each
    order = np.arange(float(len(LEVELS)))
    found: dict[str, Any] = {
        "rho_of_pixels": figure(lambda x: spearman(order, x.mean(0)), pixels),
        "rho_of_spread": figure(lambda x: spearman(order, x.mean(0)), spread),
    }
    for i, level in enumerate(LEVELS):
        found[level] = {
            "pixels": figure(mean, pixels[:, i]),
            "features": figure(mean, features[:, i]),
            "spread": figure(mean, spread[:, i]),
            "subject_of_raw": figure(ratio, right[:, i], right[:, 0]),
        }
    return found


def measure_level(study: Study, name: str, level: str, seeds: int, first: int) -> tuple[float, float, float, float]:
    """Correct subjects, distance of pixels, of features, and spread of looks of a prompt's pictures."""
    text = phrase(name)
    seen = study.see([study.spec(expand(text, level, seed), seed) for seed in range(first, first + seeds)])
    return float(study.recognised(seen, [name] * seeds).mean()), *mean_distances(seen), 1 - mean_likeness(seen)


# ---- avoids ---------------------------------------------------------------------------------------------------------


def avoids(study: Study) -> dict[str, Any]:
    """Pictures without guidance whose prompt asks for what is avoided: how often it is recognised with and without.

    The ceiling is pictures that only ask for it, the floor pictures that do not ask for it.
    """
    media = {told: (name, told) for name, told in ((name, words[0]) for name, words in MEDIA.items() if words)}
    colours = {f"on a {name} background": (name, name) for name in PALETTES if name[0] not in "aeiou"}
    found: dict[str, Any] = {}
    for kind, asked, read in (("media", media, study.nearest_media), ("colours", colours, background_colours)):
        each = max(2, study.count // len(asked))
        rows = [
            column for i, words in enumerate(asked) for column in avoid_word(study, words, *asked[words], each, i, read)
        ]
        names, before, after, right, right_before, floor = (np.array(column) for column in zip(*rows, strict=True))
        found[kind] = {
            "read": figure(mean, before.astype(float)),
            "read_when_avoided": figure(mean, after.astype(float)),
            "read_of_asked": figure(ratio, after.astype(float), before.astype(float)),
            "subject_of_asked": figure(ratio, right.astype(float), right_before.astype(float)),
            "read_unasked": figure(mean, floor.astype(float)),
            "each": {
                name: {"read": float(before[names == name].mean()), "avoided": float(after[names == name].mean())}
                for name in dict.fromkeys(names.tolist())
            },
        }
    return found


def avoid_word(
    study: Study,
    words: str,
    name: str,
    avoided_phrase: str,
    count: int,
    index: int,
    read: Callable[[Sequence[JudgeView]], list[str]],
) -> list[tuple[str, bool, bool, float, float, bool]]:
    """One avoided phrase on several subjects."""
    rng = np.random.default_rng(stable_seed("avoid", words))
    subjects = [str(subject) for subject in rng.choice(study.subjects, count, replace=False)]
    separator = " " if words.startswith("on ") else ", "
    assert phrases_in(avoided_phrase) == [avoided_phrase]

    def view_pictures(with_words: bool, negative: str) -> list[JudgeView]:
        texts = [f"{phrase(subject)}{separator}{words}" if with_words else phrase(subject) for subject in subjects]
        specs = [study.spec(t, 7000 + 100 * index + i, guidance=0.0, negative=negative) for i, t in enumerate(texts)]
        return study.see(specs)

    asked, avoided, bare = view_pictures(True, ""), view_pictures(True, avoided_phrase), view_pictures(False, "")
    right, before = study.recognised(avoided, subjects), study.recognised(asked, subjects)
    readings = zip(read(asked), read(avoided), right, before, read(bare), strict=True)
    return [(name, a == name, b == name, float(r), float(rb), c == name) for a, b, r, rb, c in readings]


def background_colours(seen: Sequence[JudgeView]) -> list[str]:
    """The named colour nearest to the median of each picture's left, right and upper edge."""
    names, colours = zip(*((name, c) for name, each in named_colours().items() for c in each), strict=True)
    known = oklab(np.array(colours) / 255)
    found = []
    for each in seen:
        rims = [
            each.picture[:6].reshape(-1, 3),
            each.picture[:, :6].reshape(-1, 3),
            each.picture[:, -6:].reshape(-1, 3),
        ]
        ground = oklab(np.median(np.concatenate(rims), 0) / 255)
        found.append(names[int(np.linalg.norm(known - ground, axis=1).argmin())])
    return found


# ---- for the eye ----------------------------------------------------------------------------------------------------


def sheets(study: Study) -> dict[str, Any]:
    """A ladder of cohesion, one row a level, of a prompt and of a run; boards before and after."""
    ladder = {"prompt": ["owl"] * BATCH, "run": ["fox", "owl", "car", "house", "rose", "rocket", "guitar", "frog"]}
    files = []
    for scope, batch in ladder.items():
        rows = [[each.picture for each in study.see(cohesion_specs(study, batch, level))] for level in COHESION_LEVELS]
        heads = ["lead picture" if i == 0 else f"seed +{i}" if scope == "prompt" else batch[i] for i in range(BATCH)]
        files.append(sheet(study.folder / f"cohesion-{scope}.png", heads, rows, [f"{c:g}" for c in COHESION_LEVELS]))
    eye, subjects = StyleReader.load("mini"), ("fox", "house", "guitar")
    rows = []
    for look in choose_looks(study.catalog)[:4]:
        truth, board = make_board(study, [look], eye)
        ways = (None, board_style(board))
        specs = [board_spec(study, name, 40 + i, way) for way in ways for i, name in enumerate(subjects)]
        shown = [np.asarray(Image.open(path).convert("RGB")) for path in sorted(truth)[:3]]
        rows.append([*shown, *(each.picture for each in study.see(specs))])
    heads = ["on the board", "", "", "without", "", "", "with the board", "", ""]
    files.append(sheet(study.folder / "board.png", heads, rows))
    return {"files": [file.name for file in files]}


# ---- what is written ------------------------------------------------------------------------------------------------

FIGURES: dict[str, Callable[[Study], dict[str, Any]]] = {
    "cohesion": cohesion,
    "cohesion_run": partial(cohesion, scope="run"),
    "moodboard": moodboard,
    "creativity": creativity,
    "avoids": avoids,
    "sheets": sheets,
}


def main() -> None:
    options = study_parser(__doc__, list(FIGURES)).parse_args()

    def begin(pipeline: Pipeline, judge: Judge) -> Study:
        return Study(pipeline, judge, Catalog(DATA, pipeline.native), options.out, options.steps, options.count)

    run_study(options, FIGURES, begin)


if __name__ == "__main__":
    with exit_on_error():
        main()
