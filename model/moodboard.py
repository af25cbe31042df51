"""Moodboards: many pictures -> the looks among them, pictures that stand for each, colours, and words.

A picture's style vector (`model/style.py`) says which others look like it. Words come from a table beside the weights,
`NAME-words.safetensors`: linear discriminants over the statistics of the style encoder's last feature map, measured on
training pictures by `model/train/words.py`. A word is said only where its kind was right on looks that the table had
never seen, and only of pictures that lie as near to the table's as those did. Everything here is deterministic.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from model import library
from model.checkpoint import open_checkpoint
from model.errors import K2Error
from model.expand import vocabulary
from model.parts import helpers, load_style, load_vae, sha256
from model.style import StyleEncoder

Array = NDArray[np.float64]

FORMATS = ("PNG", "JPEG", "WEBP")
LEAST_SIDE, MOST_FILE_PIXELS = 8, 1 << 26
AT_ONCE = 16  # pictures through the encoders together
MOST_LOOKS = 8
APART = 0.25  # silhouette below which a split is no structure (Kaufman & Rousseeuw 1990)
ONE_LOOK = 0.5  # cosine of two middles from which they are one look: a silhouette alone knows no scale and splits any
# tight group; with this, 99 in 100 looks of the training data stay whole, and nine in ten pairs of them come apart
LEAST_LOOK = 0.05  # share of a board that makes a look of its own, and never a single picture
REFERENCES = 10  # pictures that stand for a board, at most three of a look
COLOURS = 6
SAME_COLOUR = 0.06  # OKLab distance below which two colours are one swatch
TRUSTED = 0.5  # how often a kind of words must have been right on unseen looks
SAID, UNSAID = 0.3, 0.05  # share of a board from which a word is a keyword; chance under which it is never seen
KEYWORDS, AVOIDS = 2, 2  # words of each kind
AGAIN = "python -m model.train.words"

OnPicture = Callable[[int, int], None]  # (pictures seen, of how many)


@dataclass(frozen=True)
class Look:
    """Pictures of one look: a cluster of the board."""

    pictures: tuple[Path, ...]  # nearest to its middle first
    share: float  # of the board
    representatives: tuple[tuple[Path, float], ...]  # with their weights; over the whole board these add up to 1
    words: Mapping[str, tuple[str, float]] = field(default_factory=dict)  # kind -> its likeliest word, how much of it


@dataclass(frozen=True)
class Colour:
    rgb: tuple[int, int, int]
    share: float
    name: str

    @property
    def hex(self) -> str:
        return "#{:02x}{:02x}{:02x}".format(*self.rgb)


@dataclass(frozen=True)
class Board:
    """What a board comes to. `notes` are sentences about what was left out, or could not be said."""

    looks: tuple[Look, ...]
    palette: tuple[Colour, ...]
    keywords: tuple[str, ...]
    avoids: tuple[str, ...]
    profile: str
    notes: tuple[str, ...] = ()

    @property
    def representatives(self) -> list[tuple[Path, float]]:
        return [each for look in self.looks for each in look.representatives]


# ---- seeing -----------------------------------------------------------------------------------------------------


class Eye:
    """A style encoder with the autoencoder that it looks through, and its words where it has any."""

    def __init__(self, encoder: StyleEncoder, vae: torch.nn.Module, side: int, words: Words | None, why: str = ""):
        self.encoder, self.vae, self.side, self.words, self.why = encoder, vae, side, words, why

    @classmethod
    def load(cls, name: str = "mini", device: str = "cpu") -> Eye:
        """The eye of a model in the box. Raises K2Error where it has none."""
        _, vae, style = helpers(name)
        if style is None:
            raise K2Error(f"{name} has no style encoder, and moodboards are read by it.", hint="mini has one.")
        where = torch.device(device)
        side = int(open_checkpoint(style).metadata.get("native", 128))
        words, why = None, f"{library.BOX / f'{name}-words.safetensors'} is missing"
        if (table := library.BOX / f"{name}-words.safetensors").is_file():
            words = Words.load(table)
            if words.made_for != {"style": sha256(style), "vae": sha256(vae)}:
                words, why = None, f"{table.name} was measured for another style encoder"
        return cls(load_style(style, where), load_vae(vae, where, torch.float32), side, words, why)  # type: ignore[arg-type]

    @torch.inference_mode()
    def see(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """pixels [B, 3, S, S] in −1 … 1 -> unit style vectors [B, V], feature statistics [B, 2·width]."""
        latents = self.vae.encode(pixels)  # type: ignore[operator]
        features = self.encoder.blocks(self.encoder.inward(latents.float())).flatten(2)
        return self.encoder(latents.float())[1], torch.cat((features.mean(-1), features.std(-1)), -1)


def read_picture(path: Path, side: int) -> NDArray[np.uint8]:
    """A picture's middle square, uint8 RGB [side, side, 3], on white where transparent. Raises K2Error.

    JPEGs are decoded at a fraction of their size where that is enough: a board may hold hundreds of photographs.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MOST_FILE_PIXELS or min(image.size) < LEAST_SIDE:
                raise K2Error(f"{path.name} has {image.width} x {image.height} pixels.")
            image.draft("RGB", (2 * side, 2 * side))
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I"):  # 16-bit greys, which Pillow would cut off at 255
                upright = upright.convert("I").point(lambda grey: grey * (1 / 257)).convert("L")
            if upright.mode not in ("RGB", "RGBA"):
                upright = upright.convert("RGBA")
            small = ImageOps.fit(upright, (side, side)).convert("RGBA")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        raise K2Error(f"{path.name} cannot be read as a picture.") from None
    return np.asarray(Image.alpha_composite(Image.new("RGBA", small.size, "white"), small).convert("RGB"))


def read_all(paths: Sequence[Path], side: int) -> Iterator[NDArray[np.uint8] | K2Error]:
    """Every picture, or what is wrong with it; files are decoded beside each other."""

    def one(path: Path) -> NDArray[np.uint8] | K2Error:
        try:
            return read_picture(path, side)
        except K2Error as error:
            return error

    with ThreadPoolExecutor(4) as pool:
        yield from pool.map(one, paths)


# ---- words ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Words:
    """Linear discriminants of one kind of words each, over standardised statistics x: p = softmax(W x + b).

    `middle` and `precision` hold the classes of the medium and their shared precision: how far a picture lies from
    everything that the table was measured on. `unseen` is the share of right answers on looks never measured.
    """

    names: Mapping[str, tuple[str, ...]]
    weight: Mapping[str, Tensor]  # kind -> [words, F]
    offset: Mapping[str, Tensor]  # kind -> [words]
    mean: Tensor  # [F]
    deviation: Tensor  # [F]
    middle: Tensor  # [classes, F]
    precision: Tensor  # [F, F]
    furthest: float  # squared distance within which pictures are known
    unseen: Mapping[str, float]
    made_for: Mapping[str, str]

    @classmethod
    def load(cls, path: Path) -> Words:
        """Raises K2Error where the file is no table of words."""
        checkpoint = open_checkpoint(path)
        about = checkpoint.metadata
        if about.get("kind") != "words":
            raise K2Error(f"{path} is no table of words.", hint=f"Make it again: {AGAIN}")
        state = {name: tensor.double() for name, tensor in checkpoint.read()}
        kinds = about["names"]
        return cls(
            {kind: tuple(names) for kind, names in kinds.items()},
            {kind: state[f"{kind}.weight"] for kind in kinds},
            {kind: state[f"{kind}.offset"] for kind in kinds},
            state["mean"],
            state["deviation"],
            state["middle"],
            state["precision"],
            about["furthest"],
            about["unseen"],
            about["made_for"],
        )

    def read(self, statistics: Tensor) -> tuple[dict[str, Array], NDArray[np.bool_]]:
        """statistics [B, F] -> kind -> chances [B, words], and which pictures are known well enough to speak of."""
        x = (statistics.double() - self.mean) / self.deviation
        chances = {k: torch.softmax(x @ self.weight[k].T + self.offset[k], 1).numpy() for k in self.names}
        away = x[:, None] - self.middle
        distance = ((away @ self.precision) * away).sum(-1).min(1).values
        return chances, (distance <= self.furthest).numpy()

    def trusted(self, kind: str) -> bool:
        return self.unseen.get(kind, 0.0) >= TRUSTED


def speak(
    words: Words | None, chances: Mapping[str, Array], known: NDArray[np.bool_]
) -> tuple[list[str], list[str], dict[str, tuple[str, float]]]:
    """Keywords, avoids, and of each kind the likeliest name with its share, of pictures [B] whose chances were read.

    A keyword's chance makes up `SAID` of the known pictures; an avoided word stays under `UNSAID` in nearly all of
    them, and those that are furthest from it come first.
    """
    keywords: list[str] = []
    avoids: list[str] = []
    told: dict[str, tuple[str, float]] = {}
    if words is None or 2 * known.sum() < len(known):
        return keywords, avoids, told
    table = vocabulary()
    for kind in filter(words.trusted, words.names):
        names, seen = words.names[kind], chances[kind][known]
        shares = seen.mean(0)
        best = int(shares.argmax())
        told[kind] = (names[best], float(shares[best]))
        if kind not in ("medium", "drawing"):
            continue
        order = sorted(range(len(names)), key=lambda i: (-shares[i], names[i]))
        keywords += [
            table[kind][names[i]][0] for i in order[:KEYWORDS] if shares[i] >= SAID and names[i] in table[kind]
        ]
        never = np.quantile(seen, 0.95, axis=0) < UNSAID
        far = sorted(range(len(names)), key=lambda i: (np.log(seen[:, i] + 1e-12).mean(), names[i]))
        avoids += [table[kind][names[i]][0] for i in far if never[i] and names[i] in table[kind]][:AVOIDS]
    return keywords, avoids, told


# ---- looks ------------------------------------------------------------------------------------------------------


def find_looks(vectors: Array) -> list[list[int]]:
    """Unit vectors [B, V] -> clusters of their indices, the largest first, each nearest to its middle first.

    Spherical k-means for every number of looks up to `MOST_LOOKS`; of the splits into looks that are apart and no
    strays, the highest mean silhouette wins, and one look is the answer where none reaches `APART`.
    """
    best, labels = APART, np.zeros(len(vectors), int)
    for count in range(2, min(MOST_LOOKS, len(vectors) // 2) + 1):
        found = spherical_kmeans(vectors, count)
        if separate(vectors, found) and (score := silhouette(vectors, found)) > best + 1e-9:
            best, labels = score, found
    looks = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        middle = vectors[members].mean(0)
        looks.append([int(i) for i in sorted(members, key=lambda i: (-(vectors[i] @ middle).round(9), i))])
    return sorted(looks, key=lambda look: (-len(look), min(look)))


def separate(vectors: Array, labels: NDArray[np.intp]) -> bool:
    """Whether every cluster is large enough for a look, and no two of them are one."""
    names, counts = np.unique(labels, return_counts=True)
    middles = np.stack([vectors[labels == name].mean(0) for name in names])
    middles /= np.maximum(np.linalg.norm(middles, axis=1, keepdims=True), 1e-12)
    nearest = (middles @ middles.T - 3 * np.eye(len(names))).max()
    return bool(counts.min() >= max(2, LEAST_LOOK * len(labels)) and nearest < ONE_LOOK)


def spherical_kmeans(vectors: Array, count: int, rounds: int = 50) -> NDArray[np.intp]:
    """Unit vectors [B, V] -> labels [B]. Begins with the vector nearest to the mean, then whatever is furthest."""
    chosen = [int((vectors @ vectors.mean(0)).argmax())]
    while len(chosen) < count:
        chosen.append(int((vectors @ vectors[chosen].T).max(1).argmin()))
    centres, labels = vectors[chosen], np.full(len(vectors), -1)
    for _ in range(rounds):
        nearest = (vectors @ centres.T).argmax(1)
        if (nearest == labels).all():
            break
        labels = nearest
        sums = np.stack([vectors[labels == k].sum(0) if (labels == k).any() else centres[k] for k in range(count)])
        centres = sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-12)
    return labels


def silhouette(vectors: Array, labels: NDArray[np.intp]) -> float:
    """Mean of (b − a) / max(a, b): a the mean cosine distance to one's own cluster, b to the nearest other one.

    A cluster of one counts 0 (Rousseeuw 1987).
    """
    distances = 1 - vectors @ vectors.T
    names, counts = np.unique(labels, return_counts=True)
    if len(names) < 2:
        return 0.0
    sums = np.stack([distances[:, labels == name].sum(1) for name in names], 1)  # [B, clusters]
    own = np.searchsorted(names, labels)
    row = np.arange(len(labels))
    within = sums[row, own] / np.maximum(counts[own] - 1, 1)
    means = sums / counts
    means[row, own] = np.inf
    beyond = means.min(1)
    scores = (beyond - within) / np.maximum(np.maximum(within, beyond), 1e-12)
    return float(np.where(counts[own] > 1, scores, 0.0).mean())


# ---- colours ----------------------------------------------------------------------------------------------------

NEUTRALS = {"white": (252, 252, 252), "black": (16, 16, 18), "dark grey": (80, 82, 86)}
BASIC = {  # what the palettes of the data lack; the text encoder knows them all
    "red": (214, 36, 40), "green": (70, 160, 60), "blue": (40, 90, 200), "purple": (120, 60, 160),
    "brown": (120, 76, 44), "yellow": (250, 214, 50),
}  # fmt: skip


def oklab(rgb: Array) -> Array:
    """sRGB in 0 … 1, [..., 3] -> OKLab, [..., 3] (Ottosson 2020): distances in it are as the eye sees them."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    cones = linear @ np.array(
        [
            [0.4122214708, 0.2119034982, 0.0883024619],
            [0.5363325363, 0.6806995451, 0.2817188376],
            [0.0514459929, 0.1073969566, 0.6299787005],
        ]
    )
    return np.cbrt(cones) @ np.array(
        [
            [0.2104542553, 1.9779984951, 0.0259040371],
            [0.7936177850, -2.4285922050, 0.7827717662],
            [-0.0040720468, 0.4505937099, -0.8086757660],
        ]
    )


def named_colours() -> dict[str, list[tuple[int, int, int]]]:
    """Colour names -> the colours that go by them: the data's palettes, both colours of each, and basic ones."""
    known = {
        name: [(int(code[1:3], 16), int(code[3:5], 16), int(code[5:7], 16)) for code in codes]
        for name, codes in vocabulary()["palette"].items()
    }
    return known | {name: [rgb] for name, rgb in (NEUTRALS | BASIC).items()}


def name_of(rgb: Iterable[int]) -> str:
    """The nearest named colour."""
    lab = oklab(np.array(list(rgb)) / 255)
    entries = [(name, colour) for name, colours in named_colours().items() for colour in colours]
    distances = np.linalg.norm(oklab(np.array([colour for _, colour in entries]) / 255) - lab, axis=1)
    return entries[int(distances.argmin())][0]


def find_palette(pictures: Sequence[NDArray[np.uint8]]) -> tuple[Colour, ...]:
    """Dominant colours of pictures, uint8 [H, W, 3], the most of it first: k-means over a histogram in OKLab."""
    pixels = np.concatenate([picture[::2, ::2].reshape(-1, 3) for picture in pictures])
    bins = (pixels >> 4).astype(np.int64) @ np.array([256, 16, 1])
    counts = np.bincount(bins, minlength=4096).astype(float)
    sums = np.stack([np.bincount(bins, pixels[:, c], 4096) for c in range(3)], 1)
    used = counts > 0
    colours, counts = sums[used] / counts[used, None], counts[used]
    labs = oklab(colours / 255)
    centres = labs[[int(counts.argmax())]]
    while len(centres) < COLOURS:
        away = np.linalg.norm(labs[:, None] - centres, axis=-1).min(1)
        if away.max() < SAME_COLOUR:
            break
        centres = np.vstack([centres, labs[int((away * np.sqrt(counts)).argmax())]])
    for _ in range(30):
        label = np.linalg.norm(labs[:, None] - centres, axis=-1).argmin(1)
        full = [k for k in range(len(centres)) if (label == k).any()]
        moved = np.stack([np.average(labs[label == k], axis=0, weights=counts[label == k]) for k in full])
        if moved.shape == centres.shape and np.abs(moved - centres).max() < 1e-6:
            break
        centres = moved
    label = np.linalg.norm(labs[:, None] - centres, axis=-1).argmin(1)
    found = []
    for k in np.unique(label):
        mean = np.average(colours[label == k], axis=0, weights=counts[label == k]).round().astype(int)
        share = counts[label == k].sum() / counts.sum()
        found.append(Colour((int(mean[0]), int(mean[1]), int(mean[2])), float(share), name_of(mean)))
    return tuple(sorted(found, key=lambda colour: (-colour.share, colour.rgb)))


def swatches(palette: Sequence[Colour], width: int = 480, height: int = 96) -> Image.Image:
    """The palette as a strip; a colour is as wide as its share, but never too narrow to see."""
    shares = np.maximum([colour.share for colour in palette], 0.04)
    edges = [0, *(np.cumsum(shares / shares.sum()) * width).round().astype(int)]
    strip = Image.new("RGB", (width, height))
    for colour, left, right in zip(palette, edges, edges[1:], strict=False):
        strip.paste(colour.rgb, (int(left), 0, int(right), height))
    return strip


def colour_words(palette: Sequence[Colour]) -> tuple[list[str], list[str]]:
    """The data's colour names that make up much of a board, and the one that is furthest from all its colours."""
    shares: dict[str, float] = {}
    for colour in palette:
        shares[colour.name] = shares.get(colour.name, 0.0) + colour.share
    names = vocabulary()["palette"]
    wanted = [
        name for name, share in sorted(shares.items(), key=lambda x: (-x[1], x[0])) if share >= SAID and name in names
    ]
    here = oklab(np.array([colour.rgb for colour in palette if colour.share > 0.005]) / 255)
    known = named_colours()

    def away(name: str) -> float:
        return float(np.linalg.norm(oklab(np.array(known[name]) / 255)[:, None] - here, axis=-1).min())

    furthest = max(sorted(names), key=away)
    return wanted[:1], [furthest] if away(furthest) > 3 * SAME_COLOUR else []


# ---- the whole --------------------------------------------------------------------------------------------------


def analyse(paths: Sequence[Path], eye: Eye, on_picture: OnPicture | None = None) -> Board:
    """A board's pictures -> its looks, colours and words. Raises K2Error where no picture can be read.

    Pictures that cannot be read, and second copies, are left out with a note.
    """
    if not paths:
        raise K2Error("The board holds no picture.", hint="Name png, jpg or webp files.")
    notes: list[str] = []
    good: list[Path] = []
    pictures: list[NDArray[np.uint8]] = []
    first: dict[bytes, Path] = {}
    vectors: list[Tensor] = []
    statistics: list[Tensor] = []
    copies = 0

    def look_at(fresh: Sequence[NDArray[np.uint8]]) -> None:
        batch = torch.from_numpy(np.stack(fresh)).permute(0, 3, 1, 2).float() / 127.5 - 1
        for kept, seen in zip((vectors, statistics), eye.see(batch), strict=True):
            kept.append(seen)

    for index, (path, picture) in enumerate(zip(paths, read_all(paths, eye.side), strict=True)):
        if isinstance(picture, K2Error):
            notes.append(f"Left out: {picture}")
        elif (digest := hashlib.sha256(picture.tobytes()).digest()) in first:
            copies += 1
        else:
            first[digest] = path
            good.append(path)
            pictures.append(picture)
            if len(pictures) % AT_ONCE == 0:
                look_at(pictures[-AT_ONCE:])
        if on_picture:
            on_picture(index + 1, len(paths))
    if not good:
        raise K2Error("No picture of the board can be read.", hint=notes[0])
    if rest := len(pictures) % AT_ONCE:
        look_at(pictures[-rest:])
    unit, features = torch.cat(vectors).double().numpy(), torch.cat(statistics)
    if copies and len(good) == 1:
        notes.append(f"All {copies + 1} pictures are the same one, so this is the look of one picture.")
    elif copies:
        notes.append(f"{copies} of them are copies of others and count once.")
    elif len(good) == 1:
        notes.append("One picture makes a thin board: its subject cannot be told from its look.")

    chances, known = eye.words.read(features) if eye.words else ({}, np.zeros(len(good), bool))
    if eye.words is None:
        notes.append(f"No keywords and no avoids of manner: {eye.why}. Make it with: {AGAIN}")
    elif 2 * known.sum() < len(good):
        notes.append("Most pictures are unlike all that the words were measured on, so only colours have words.")
    looks = []
    found = find_looks(unit)
    each = max(1, min(3, REFERENCES // len(found)))
    for members in found:
        share = len(members) / len(good)
        chosen = members[:each]
        told = speak(eye.words, {k: c[members] for k, c in chances.items()}, known[members])[2]
        looks.append(
            Look(
                tuple(good[i] for i in members),
                share,
                tuple((good[i], round(share / len(chosen), 4)) for i in chosen),
                told,
            )
        )
    palette = find_palette(pictures)
    keywords, avoids, _ = speak(eye.words, chances, known)
    colours, foreign = colour_words(palette)
    keywords, avoids = [*keywords, *colours], [*avoids, *foreign]
    return Board(
        tuple(looks),
        palette,
        tuple(keywords),
        tuple(avoids),
        describe(looks, palette, len(good), keywords, avoids),
        tuple(notes),
    )


def describe(
    looks: Sequence[Look], palette: Sequence[Colour], count: int, keywords: Sequence[str], avoids: Sequence[str]
) -> str:
    """The taste profile: sentences over what was measured."""
    number = ("", "one look", "two looks", "three looks", "four looks")
    pictures = "1 picture" if count == 1 else f"{count} pictures"
    many = number[len(looks)] if len(looks) < len(number) else f"{len(looks)} looks"
    parts = [f"{pictures} in {many}"]
    if len(looks) > 1:
        parts[0] += ": " + "; ".join(f"{len(look.pictures)} {manner(look)}" for look in looks)
    elif looks[0].words:
        parts[0] += f", {manner(looks[0])}"
    colours = list(dict.fromkeys(colour.name for colour in palette if colour.share >= 0.05))
    parts.append(f"Colours: {', '.join(colours)}" if colours else "")
    parts.append(f"Drawn to {', '.join(keywords)}" if keywords else "")
    parts.append(f"Far from {', '.join(avoids)}" if avoids else "")
    return ". ".join(filter(None, parts)) + "."


def manner(look: Look) -> str:
    """A look's likeliest words, those that make up at least half of it."""
    table = vocabulary()
    said = []
    for kind in ("medium", "drawing", "ground"):
        name, share = look.words.get(kind, ("", 0.0))
        if share < 0.5:
            continue
        if kind == "ground":
            told = {"white": "on white", "dark": "on black"}
            said.append(told.get(name) or table["ground"][name][1])
        elif name in table[kind]:
            said.append(table[kind][name][0])
    return ", ".join(said) or "of a manner that has no word"
