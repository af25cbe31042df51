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
from model.errors import reported
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
    parser_of,
    ratio,
    run_study,
    sheet,
    spearman,
)
from model.train.viewing import Seen, Study, centre_of, distances, likeness, pictures_of_looks, shuffled

BATCH = 8
COHESION_LEVELS = (0.0, 0.25, 0.5, 0.75, 1.0)
BOARD = 30  # pictures of a board
BOARD_STRENGTH = 0.35  # the default of [moodboard]
PER_BOARD = 10  # pictures rendered with each


# ---- cohesion -------------------------------------------------------------------------------------------------------


def cohesion(study: Study, scope: str = "prompt") -> dict[str, Any]:
    """The dial over batches of one prompt or over runs of eight; real pictures of one look are the ceiling."""
    real = [[study.catalog.picture(item) for item in items] for items in looks_of_eight(study.catalog)]
    levels, drawn = np.array(COHESION_LEVELS), draw_batches(study, scope)
    table = np.array([[measure(study, batch, c) for c in COHESION_LEVELS] for batch in drawn])  # [batches, levels, 4]
    alike, right, pixels, features = np.moveaxis(table, 2, 0)
    found: dict[str, Any] = {
        "rho": figure(lambda x: spearman(levels, x.mean(0)), alike),
        "spread_of_zero": figure(ratio, 1 - alike[:, -1], 1 - alike[:, 0]),
        "subject_of_zero": figure(ratio, right[:, -1], right[:, 0]),
        "pixels_of_zero": figure(ratio, pixels[:, -1], pixels[:, 0]),
        "features_of_zero": figure(ratio, features[:, -1], features[:, 0]),
        "zero_is_exact": is_exact(study, drawn[0]),
        "likeness_ceiling": figure(mean, np.array([likeness(study.look_at(each)) for each in real])),
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


def specs_of(study: Study, batch: Sequence[str], level: float) -> list[RenderSpec]:
    first = 1000 + stable_seed(*batch) % 100_000
    return tie_to_lead([study.spec(phrase(name), first + i) for i, name in enumerate(batch)], level)


def measure(study: Study, batch: Sequence[str], level: float) -> tuple[float, float, float, float]:
    """Likeness of looks, share of correct subjects, distance of pixels, of features."""
    seen = study.see(specs_of(study, batch, level))
    return likeness(seen), float(study.right(seen, batch).mean()), *distances(seen)


def is_exact(study: Study, batch: Sequence[str]) -> bool:
    """Whether a batch at 0 is, bit for bit, the same as pictures without cohesion."""
    free = [study.spec(spec.prompt, spec.seed) for spec in specs_of(study, batch, 0.0)]
    pairs = zip(study.pipeline.stream(free), study.pipeline.stream(specs_of(study, batch, 0.0)), strict=True)
    return all(one.record["pixels"] == other.record["pixels"] for one, other in pairs)


def looks_of_eight(catalog: Catalog) -> list[list[Item]]:
    """Eight real pictures each of twenty-five training looks."""
    by_look = pictures_of_looks(catalog)
    looks = sorted(by_look, key=lambda look: stable_seed("eight", look))[:25]
    return [shuffled(by_look[look])[:BATCH] for look in looks]


# ---- moodboards -----------------------------------------------------------------------------------------------------


def moodboard(study: Study) -> dict[str, Any]:
    """Boards in held-out looks: their analysis, and pictures rendered with them."""
    eye = StyleReader.load("mini")
    looks = choose_looks(study.catalog)
    two, right = [], []
    for pair in pairs_of(looks):
        truth, board = lay_out(study, pair, eye)
        two.append(float(len(board.looks) == 2))
        right.append(members(truth, board))
    one = [float(len(lay_out(study, [look], eye)[1].looks) == 1) for look in looks]
    found: dict[str, Any] = {
        "two_read_as_two": figure(mean, np.array(two)),
        "members_right": figure(mean, np.array(right)),
        "one_read_as_one": figure(mean, np.array(one)),
        "seconds_of_300": seconds_of(study, eye),
    }
    nearer: dict[str, list[float]] = {"with": [], "without": [], "right": [], "right_without": [], "real": []}
    for index in range(max(1, study.count // PER_BOARD)):
        look = looks[index % len(looks)]
        truth, board = lay_out(study, [look], eye)
        centre = centre_of(study.look_at([np.asarray(Image.open(path)) for path in truth]))
        others = [item for item in study.catalog.items("styles") if item.look == look]
        real = study.look_at([study.catalog.picture(item) for item in shuffled(others)[BOARD : BOARD + PER_BOARD]])
        nearer["real"].append(float(np.mean([seen.style @ centre for seen in real])))
        for way, style in (("with", style_of(board)), ("without", None)):
            subjects, specs = styled_spec(study, style, index)
            seen = study.see(specs)
            nearer[way].append(float(np.mean([each.style @ centre for each in seen])))
            nearer["right" if way == "with" else "right_without"].append(float(study.right(seen, subjects).mean()))
    values = {name: np.array(each) for name, each in nearer.items()}
    return found | {
        "likeness": {name: figure(mean, values[name]) for name in ("without", "with", "real")},
        "nearer": figure(mean, values["with"] - values["without"]),
        "subject_of_without": figure(ratio, values["right"], values["right_without"]),
    }


def pairs_of(looks: Sequence[Look]) -> list[tuple[Look, Look]]:
    """Twenty pairs of looks in different media and drawing sets, always the same ones."""
    apart = [(a, b) for a, b in combinations(looks, 2) if a.medium != b.medium and a.drawing != b.drawing]
    return sorted(apart, key=lambda pair: stable_seed("pair", *pair))[:20]


def lay_out(study: Study, looks: Sequence[Look], eye: StyleReader) -> tuple[dict[Path, Look], Board]:
    """A board of `BOARD` real pictures in equal parts, as files, and its analysis."""
    if tuple(looks) in study.boards:
        return study.boards[tuple(looks)]
    folder = study.folder / "boards" / "-and-".join(f"{look.drawing}-{look.medium}" for look in looks)
    folder.mkdir(parents=True, exist_ok=True)
    truth: dict[Path, Look] = {}
    for look in looks:
        items = [item for item in study.catalog.items("styles") if item.look == look]
        for item in shuffled(items)[: BOARD // len(looks)]:
            path = folder / f"{look.drawing}-{look.medium}-{item.pair.subject}.png".replace(" ", "-")
            if not path.exists():
                Image.fromarray(study.catalog.picture(item)).save(path)
            truth[path] = look
    study.boards[tuple(looks)] = truth, analyse(sorted(truth), eye)
    return study.boards[tuple(looks)]


def members(truth: dict[Path, Look], board: Board) -> float:
    """The share of pictures assigned to a look that is mostly their own."""
    agree = sum(Counter(truth[path] for path in look.pictures).most_common(1)[0][1] for look in board.looks)
    return agree / len(truth)


def seconds_of(study: Study, eye: StyleReader) -> float:
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


def style_of(board: Board) -> Style:
    """A board as a style, as the command line makes it."""
    references = tuple(Reference(path, weight) for path, weight in board.representatives)
    return Style("moodboard", BOARD_STRENGTH, references, board.keywords, board.avoids)


def styled_spec(study: Study, style: Style | None, index: int) -> tuple[list[str], list[RenderSpec]]:
    """Subjects and specs of the pictures for one board; the same ones without it."""
    rng = np.random.default_rng(stable_seed("board", index))
    subjects = [str(name) for name in rng.choice(study.subjects, PER_BOARD, replace=False)]
    return subjects, [styled(study, name, 5000 + PER_BOARD * index + i, style) for i, name in enumerate(subjects)]


def styled(study: Study, name: str, seed: int, style: Style | None) -> RenderSpec:
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
        [[level_change(study, name, level, seeds, 100 * i) for level in LEVELS] for i, name in enumerate(names)]
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


def level_change(study: Study, name: str, level: str, seeds: int, first: int) -> tuple[float, float, float, float]:
    """Correct subjects, distance of pixels, of features, and spread of looks of a prompt's pictures."""
    text = phrase(name)
    seen = study.see([study.spec(expand(text, level, seed), seed) for seed in range(first, first + seeds)])
    return float(study.right(seen, [name] * seeds).mean()), *distances(seen), 1 - likeness(seen)


# ---- avoids ---------------------------------------------------------------------------------------------------------


def avoids(study: Study) -> dict[str, Any]:
    """Pictures without guidance whose prompt asks for what is avoided: how often it is recognised with and without.

    The ceiling is pictures that only ask for it, the floor pictures that do not ask for it.
    """
    media = {told: (name, told) for name, told in ((name, words[0]) for name, words in MEDIA.items() if words)}
    colours = {f"on a {name} background": (name, name) for name in PALETTES if name[0] not in "aeiou"}
    found: dict[str, Any] = {}
    for kind, asked, read in (("media", media, study.media), ("colours", colours, grounds)):
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
    study: Study, words: str, name: str, away: str, count: int, index: int, read: Callable[[Sequence[Seen]], list[str]]
) -> list[tuple[str, bool, bool, float, float, bool]]:
    """One avoided phrase on several subjects."""
    rng = np.random.default_rng(stable_seed("avoid", words))
    subjects = [str(subject) for subject in rng.choice(study.subjects, count, replace=False)]
    joint = " " if words.startswith("on ") else ", "
    assert phrases_in(away) == [away]

    def made(with_words: bool, negative: str) -> list[Seen]:
        texts = [f"{phrase(subject)}{joint}{words}" if with_words else phrase(subject) for subject in subjects]
        specs = [study.spec(t, 7000 + 100 * index + i, guidance=0.0, negative=negative) for i, t in enumerate(texts)]
        return study.see(specs)

    asked, avoided, bare = made(True, ""), made(True, away), made(False, "")
    right, before = study.right(avoided, subjects), study.right(asked, subjects)
    readings = zip(read(asked), read(avoided), right, before, read(bare), strict=True)
    return [(name, a == name, b == name, float(r), float(rb), c == name) for a, b, r, rb, c in readings]


def grounds(seen: Sequence[Seen]) -> list[str]:
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
        rows = [[each.picture for each in study.see(specs_of(study, batch, level))] for level in COHESION_LEVELS]
        heads = ["lead picture" if i == 0 else f"seed +{i}" if scope == "prompt" else batch[i] for i in range(BATCH)]
        files.append(sheet(study.folder / f"cohesion-{scope}.png", heads, rows, [f"{c:g}" for c in COHESION_LEVELS]))
    eye, subjects = StyleReader.load("mini"), ("fox", "house", "guitar")
    rows = []
    for look in choose_looks(study.catalog)[:4]:
        truth, board = lay_out(study, [look], eye)
        ways = (None, style_of(board))
        specs = [styled(study, name, 40 + i, way) for way in ways for i, name in enumerate(subjects)]
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
    options = parser_of(__doc__, list(FIGURES)).parse_args()

    def begin(pipeline: Pipeline, judge: Judge) -> Study:
        return Study(pipeline, judge, Catalog(DATA, pipeline.native), options.out, options.steps, options.count)

    run_study(options, FIGURES, begin)


if __name__ == "__main__":
    with reported():
        main()
