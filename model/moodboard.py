"""Moodboards: many pictures -> the looks among them, pictures that represent each look, colours, and words.

Pictures are compared by their style vectors (`model/style.py`). Everything here is deterministic.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from model.board_pictures import Pixels, StyleReader, read_all
from model.clusters import find_looks
from model.colours import Colour, colour_words, find_palette
from model.errors import K2Error
from model.expand import checked_answer, look_words
from model.language_model import LanguageModel
from model.references import from_bytes
from model.words import REBUILD, read_words

BATCH = 16  # pictures encoded together
MAX_REFERENCES = 10  # pictures that represent a board, at most three per look
MAX_SHOWN = 4  # of these, shown to a language model
CELLS = 16  # per side: to find copies, pictures are reduced to this many cells of one colour
# Root mean square over the cells, in levels of 255. Copies as JPEG or WebP of quality 60 and up, or of another size,
# differ by at most 1.4; other seeds of one prompt, small on white, by at least 5.6.
MAX_COPY_DISTANCE = 3.0
# How similar the detail inside the cells must be, as grain, hatching and halftone leave no trace in cell colours: a
# correlation, if the detail exceeds a few levels of 255. In brightness and at half the side, since JPEG loses the rest:
# copies of quality 60 and up, or of half the size, reach at least 0.66; another grain of 8 levels, 0.4 at most.
MIN_DETAIL_CORRELATION, MIN_DETAIL, DETAIL_SHRINK = 0.5, 3.0, 2

OnPicture = Callable[[int, int], None]  # (pictures seen, of how many)


@dataclass(frozen=True)
class Look:
    """Pictures of one look: a cluster of the board."""

    pictures: tuple[Path, ...]  # nearest to the look's centre first
    share: float  # of the board
    representatives: tuple[tuple[Path, float], ...]  # with weights that add up to 1 over the whole board
    words: Mapping[str, tuple[str, float]] = field(default_factory=dict)  # kind -> its likeliest word and share


@dataclass(frozen=True)
class Board:
    """The analysis of a board. `notes` are sentences about what was skipped or could not be determined."""

    looks: tuple[Look, ...]
    palette: tuple[Colour, ...]
    keywords: tuple[str, ...]
    avoids: tuple[str, ...]
    profile: str
    notes: tuple[str, ...] = ()
    told: str = ""  # the profile as written by a language model that saw the pictures
    unread: tuple[Path, ...] = ()  # pictures skipped because they cannot be read

    @property
    def representatives(self) -> list[tuple[Path, float]]:
        return [each for look in self.looks for each in look.representatives]

    @property
    def shown(self) -> list[Path]:
        """A few pictures for the whole board: the most central of each look first, the largest look leading."""
        ranks = zip_longest(*([path for path, _ in look.representatives] for look in self.looks))
        return [path for rank in ranks for path in rank if path][:MAX_SHOWN]


class BoardPictures(NamedTuple):
    """A board's readable pictures, without copies."""

    paths: list[Path]
    pictures: list[Pixels]
    vectors: NDArray[np.float64]  # [B, V] of unit length
    statistics: Tensor  # [B, F]
    notes: list[str]
    unreadable: list[Path]


def read_pictures(paths: Sequence[Path], reader: StyleReader, on_picture: OnPicture | None = None) -> BoardPictures:
    """Read every picture. Raises K2Error if none can be read; unreadable ones and copies become notes."""
    if not paths:
        raise K2Error("The moodboard holds no picture.", hint="Name png, jpg or webp files.")
    notes: list[str] = []
    unreadable: list[Path] = []
    fresh: list[tuple[Path, Pixels]] = []
    known = np.empty((len(paths), CELLS * CELLS * 3), np.float32)
    copies = 0
    for index, (path, picture) in enumerate(zip(paths, read_all(paths, reader.side), strict=True)):
        if isinstance(picture, K2Error):
            unreadable.append(path)
            notes.append(f"Left out: {picture} {picture.hint}".rstrip())
        elif is_copy(picture, cells := cells_of(picture), known[: len(fresh)], fresh):
            copies += 1
        else:
            known[len(fresh)] = cells
            fresh.append((path, picture))
        if on_picture:
            on_picture(index + 1, len(paths))
    if not fresh:
        raise K2Error("No picture of the moodboard can be read.", hint=notes[0])
    good, pictures = (list(each) for each in zip(*fresh, strict=True))
    if copies and len(good) == 1:
        notes.append(f"All {copies + 1} pictures are the same, so this is the look of one picture.")
    elif copies:
        are = "is a copy of another and counts" if copies == 1 else "are copies of others and count"
        notes.append(f"{copies} of them {are} once.")
    elif len(good) == 1:
        notes.append("One picture makes a thin moodboard: its look cannot be told apart from its subject.")
    parts = []
    for start in range(0, len(pictures), BATCH):
        parts.append(reader.encode(from_bytes(np.stack(pictures[start : start + BATCH]))))
    vectors, statistics = (torch.cat(each) for each in zip(*parts, strict=True))
    return BoardPictures(good, pictures, vectors.double().numpy(), statistics, notes, unreadable)


def is_copy(
    picture: Pixels, cells: NDArray[np.float32], known: NDArray[np.float32], fresh: Sequence[tuple[Path, Pixels]]
) -> bool:
    """Whether a picture is a copy of one already seen, whose cells are in `known`."""
    near = np.flatnonzero(np.square(known - cells).mean(1) < MAX_COPY_DISTANCE**2).tolist()
    return any(same_detail(picture, fresh[index][1]) for index in near)


def cells_of(picture: Pixels) -> NDArray[np.float32]:
    """A picture's mean colour per cell, [CELLS · CELLS · 3]."""
    return np.asarray(Image.fromarray(picture).resize((CELLS, CELLS), Image.Resampling.BOX), np.float32).ravel()


def same_detail(one: Pixels, other: Pixels) -> bool:
    """Whether two pictures have the same detail inside their cells."""
    a, b = map(cell_detail, (one, other))
    if max(a.std(), b.std()) < MIN_DETAIL:
        return True
    return float((a * b).mean()) > MIN_DETAIL_CORRELATION * float(a.std() * b.std())


def cell_detail(picture: Pixels) -> NDArray[np.float32]:
    """A picture's brightness minus that of its cells."""
    size = picture.shape[1] // DETAIL_SHRINK, picture.shape[0] // DETAIL_SHRINK
    grey = Image.fromarray(picture).convert("L").resize(size, Image.Resampling.BOX)
    means = grey.resize((CELLS, CELLS), Image.Resampling.BOX).resize(size, Image.Resampling.BOX)
    return np.asarray(grey, np.float32) - np.asarray(means, np.float32)


def analyse(paths: Sequence[Path], reader: StyleReader, on_picture: OnPicture | None = None) -> Board:
    """A board's pictures -> its looks, colours and words. Raises K2Error if no picture can be read.

    Unreadable pictures and copies are skipped with a note.
    """
    good, pictures, vectors, statistics, notes, unreadable = read_pictures(paths, reader, on_picture)
    probabilities, known = reader.words.predict(statistics) if reader.words else ({}, np.zeros(len(good), bool))
    if reader.words is None:
        notes.append(f"No keywords or avoids for the style: {reader.words_problem}. Create it with: {REBUILD}")
    elif 2 * known.sum() < len(good):
        notes.append("Most pictures are unlike those that the words were measured on, so only colours have words.")
    looks = []
    found = find_looks(vectors)
    each = max(1, min(3, MAX_REFERENCES // len(found)))
    for members in found:
        share = len(members) / len(good)
        weight = round(share / len(members[:each]), 4)
        likeliest = read_words(
            reader.words, {kind: chance[members] for kind, chance in probabilities.items()}, known[members]
        )[2]
        chosen = tuple((good[i], weight) for i in members[:each])
        looks.append(Look(tuple(good[i] for i in members), share, chosen, likeliest))
    palette = find_palette(pictures)
    keywords, avoids, _ = read_words(reader.words, probabilities, known)
    colours, foreign = colour_words(palette)
    keywords, avoids = [*keywords, *colours], [*avoids, *foreign]
    profile = describe(looks, palette, len(good), keywords, avoids)
    return Board(
        looks=tuple(looks),
        palette=palette,
        keywords=tuple(keywords),
        avoids=tuple(avoids),
        profile=profile,
        notes=tuple(notes),
        unread=tuple(unreadable),
    )


def describe(
    looks: Sequence[Look], palette: Sequence[Colour], count: int, keywords: Sequence[str], avoids: Sequence[str]
) -> str:
    """The taste profile: sentences about what was measured."""
    number = ("", "one look", "two looks", "three looks", "four looks")
    pictures = "1 picture" if count == 1 else f"{count} pictures"
    many = number[len(looks)] if len(looks) < len(number) else f"{len(looks)} looks"
    parts = [f"{pictures} in {many}"]
    if len(looks) > 1:
        parts[0] += ": " + "; ".join(f"{len(look.pictures)} {likely_words(look)}" for look in looks)
    elif looks[0].words:
        parts[0] += f", {likely_words(looks[0])}"
    colours = list(dict.fromkeys(colour.name for colour in palette if colour.share >= 0.05))
    parts.append(f"Colours: {', '.join(colours)}" if colours else "")
    parts.append(f"Drawn to {', '.join(keywords)}" if keywords else "")
    parts.append(f"Far from {', '.join(avoids)}" if avoids else "")
    return ". ".join(filter(None, parts)) + "."


def instruction(board: Board, *, sees: bool) -> str:
    """The instruction that asks a language model for a board's taste profile."""
    lines = [
        "These pictures stand for a moodboard." if sees else "",
        f"Measured over the whole moodboard: {board.profile}",
        "Write its taste profile in two sentences: manner of drawing or medium, light, colours, mood.",
        "Say nothing of what is shown. Answer with the profile alone.",
    ]
    return "\n".join(filter(None, lines))


def describe_by_language(board: Board, language_model: LanguageModel) -> str:
    """The taste profile in complete sentences by a language model; "" if its answer cannot be trusted."""
    pictures = [language_model.load_picture(path) for path in board.shown] if language_model.vision_checkpoint else []
    answer = checked_answer(language_model.answer(instruction(board, sees=bool(pictures)), 0, pictures))
    return answer[: max(answer.rfind(sign) for sign in ".!") + 1]


def likely_words(look: Look) -> str:
    """A look's likeliest words, those with a share of at least half."""
    table = look_words()
    phrases = []
    for kind in ("medium", "drawing", "ground"):
        name, share = look.words.get(kind, ("", 0.0))
        if share < 0.5:
            continue
        if kind == "ground":
            grounds = {"white": "on white", "dark": "on black"}
            phrases.append(grounds.get(name) or table["ground"][name][1])
        elif name in table[kind]:
            phrases.append(table[kind][name][0])
    return ", ".join(phrases) or "in a look without a name"
