"""The data set of the bundled model: open vector art from the npm registry, rendered, composed and captioned by rule.

`python -m model.train.data` rebuilds it bit for bit: it fetches pinned packages with npm, renders the subjects of
`subjects.toml` at 128 px, writes the renders with a manifest of hashes, and renders the same drawings at 256 px beside
them; `python -m model.train.data SIZE` adds another size. Pictures are composed on demand (`Catalog.picture`), each
from a generator seeded by its content, so that a picture is the same whenever and wherever it is made.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import subprocess
import tarfile
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
from numpy.typing import NDArray
from PIL import Image

from model.atomic import atomic_write
from model.errors import K2Error, exit_on_error
from model.hashes import sha256
from model.library import BUNDLED
from model.train.looks import DRAWINGS, MEDIA, Array, Look, apply_medium, place_subject, resize, split_looks

PACKAGES = {  # npm package -> version; licences of the art: NOTICE
    "noto": "1.2.9",
    "noto-v1": "1.2.5",
    "fxemoji": "1.2.2",
    "fluent-emoji": "1.2.7",
    "fluent-emoji-flat": "1.2.6",
    "fluent-emoji-high-contrast": "1.2.6",
    "twemoji": "1.2.5",
    "emojione": "1.2.3",
    "emojione-monotone": "1.2.1",
}
HERE = Path(__file__).parent
DATA = Path(".data/mini")
AUTOENCODER = BUNDLED / "mini-vae.safetensors"
SIZE = 128  # px of the renders that define which drawings exist
NATIVE = 256  # px of the model's pictures


def stable_seed(*parts: object) -> int:
    """A 64-bit number that depends only on the parts: the same on every machine and in every process."""
    return int.from_bytes(hashlib.sha256("\0".join(map(str, parts)).encode()).digest()[:8], "little")


@dataclass(frozen=True)
class Subject:
    name: str
    icons: tuple[str, ...]  # names in the vector sets; the first that a set has is used
    words: tuple[str, ...]  # names in captions, the plain one first
    later: bool = False  # joined after the others were learned


@dataclass(frozen=True)
class Pair:
    """One subject in one drawing set: a row of the renders."""

    subject: str
    drawing: str

    @property
    def held_out(self) -> bool:
        """Two in a hundred drawings of a subject are never trained on, in any look."""
        return stable_seed("pair", self.subject, self.drawing) % 50 == 0


@dataclass(frozen=True)
class Item:
    """One picture of the data set: a pair in a look."""

    row: int
    pair: Pair
    look: Look

    @property
    def held_out(self) -> bool:
        """Whether its pair is held out, or it is one of two in a hundred single pictures."""
        return self.pair.held_out or stable_seed("item", self.pair, self.look) % 50 == 0

    @property
    def subjects(self) -> tuple[str, ...]:
        """What it shows."""
        return (self.pair.subject,)

    @property
    def seed(self) -> int:
        """Of the generator that its picture is made with."""
        return stable_seed("picture", self.pair, self.look)

    def place(self, renders: NDArray[np.uint8], rng: np.random.Generator, shape: tuple[int, int] | None) -> Array:
        """The picture before its medium; `renders` are those of all pairs."""
        return place_subject(np.asarray(renders[self.row]), self.look, rng, shape)

    def draw_name(self, subjects: Mapping[str, Subject], rng: np.random.Generator) -> str:
        """One of the names for what it shows."""
        words = subjects[self.pair.subject].words
        return words[0] if rng.random() < 0.7 else str(rng.choice(words))

    def with_article(self, name: str, rng: np.random.Generator) -> str:
        """That name as captions say it: mostly with its article."""
        return phrase(name) if rng.random() < 0.8 else name


def read_subjects() -> list[Subject]:
    """The subjects in the order of the file."""
    table: dict[str, dict[str, Any]] = tomllib.loads((HERE / "subjects.toml").read_text())["subjects"]
    return [
        Subject(
            name,
            (entry["icon"], *entry.get("other", ())),
            (name, *entry.get("words", ())),
            entry.get("later", False),
        )
        for name, entry in table.items()
    ]


class Catalog:
    """The rendered subjects, their looks and captions, and the splits."""

    def __init__(self, folder: Path = DATA, size: int = SIZE):
        """`size`: of its pictures in px. Sizes above `SIZE` need their own renders, or a `K2Error` is raised."""
        manifest = folder / "manifest.toml"
        if not manifest.exists():
            raise K2Error(f"There is no data set in {folder}.", hint="Build it with: python -m model.train.data")
        self.folder = folder
        self.manifest = tomllib.loads(manifest.read_text())
        self.subjects = {subject.name: subject for subject in read_subjects()}
        self.size = size
        self.pairs = [Pair(*pair) for pair in json.loads((folder / "pairs.json").read_text())]
        self.renders = read_renders(folder, max(size, SIZE), len(self.pairs))
        self.looks = {drawing: split_looks(drawing) for drawing in DRAWINGS}

    def items(self, split: str) -> list[Item]:
        """The pictures of a split, in a fixed order.

        train     known looks of known pairs
        held-out  the same looks, of pairs and single pictures never trained on
        styles    looks never trained on, of known pairs
        """
        if split == "styles":
            return [
                Item(row, pair, look)
                for row, pair in enumerate(self.pairs)
                if not pair.held_out
                for look in self.looks[pair.drawing][1]
            ]
        every = [Item(row, pair, look) for row, pair in enumerate(self.pairs) for look in self.looks[pair.drawing][0]]
        return [item for item in every if item.held_out == (split == "held-out")]

    def picture(self, item: Item, shape: tuple[int, int] | None = None) -> NDArray[np.uint8]:
        """The picture of an item, uint8 RGB [H, W, 3], always the same; shape: (H, W), by default `size` both."""
        rng = np.random.default_rng(item.seed)
        picture = apply_medium(item.place(self.renders, rng, shape), item.look, rng)
        return resize(picture, self.size) if self.size < SIZE else picture

    def caption(self, item: Item, rng: np.random.Generator, form: str = "short", style: bool = True) -> str:
        """A caption in short, medium or long form; with style=False it names only the content.

        Some short captions have no style words either, so that a bare subject means any look.
        """
        name = item.draw_name(self.subjects, rng)
        drawing, medium = DRAWINGS[item.pair.drawing], MEDIA[item.look.medium]
        words = [str(rng.choice(medium))] if medium else []
        if not words or rng.random() < 0.6:
            words.append(str(rng.choice(drawing)))
        subject_words = item.with_article(name, rng)
        where = item.look.ground_words
        if not style:
            bare = form == "short" or item.look.medium != "plain"
            return subject_words if bare else f"{subject_words} {where}"
        if form == "short":
            return ", ".join([subject_words, *words[: int(rng.integers(0, 3))]])
        if form == "medium":
            return ", ".join([f"{subject_words} {where}", *words])
        manner = " and ".join(words)
        return f"a picture of {subject_words} in the middle {where}, made as {manner}"


def renders_path(folder: Path, size: int) -> Path:
    """The file with the renders of a size."""
    return folder / ("renders.npy" if size == SIZE else f"renders-{size}.npy")


def latents_file(folder: Path, size: object, two: bool = False) -> Path:
    """The file with the latents of a size, or of its pictures of two subjects; those of other autoencoders, useless to
    this one, have other names."""
    return folder / f"latents-{size}{'-two' if two else ''}-{sha256(AUTOENCODER)[:8]}.npy"


def read_renders(folder: Path, size: int, count: int) -> NDArray[np.uint8]:
    """RGBA [count, size, size, 4], read from disk on access. Raises `K2Error` if there are none."""
    path, hint = renders_path(folder, size), f"Make them with: python -m model.train.data {size}"
    if not path.exists():
        raise K2Error(f"There are no renders of {size} px in {folder}.", hint=hint)
    renders: NDArray[np.uint8] = np.load(path, mmap_mode="r")
    if len(renders) != count:
        raise K2Error(f"{path} holds {len(renders)} renders, but the data set has {count}.", hint=hint)
    return renders


BARE_NAMES = """
glasses scissors books cherries grapes fries bread corn cheese fire dice prints coral wood firewood wheat bacon
chocolate curry custard pudding milk honey pancakes peanuts popcorn spaghetti pasta noodles sushi ramen whisky sake
beans blueberries broccoli butter garlic lettuce peas salt ginger fireworks fuji saturn earth lightning pins skis
headphones keys maracas bags money chains bricks swords chopsticks soap dna lips shoes jeans gloves socks shorts
eyeglasses sunglasses goggles dolls yarn paper masks footprints claus
"""  # last words of names without an article
BARE_WORDS = frozenset(BARE_NAMES.split())
WITH_THE = ("sun", "moon", "statue of liberty", "tokyo tower", "planet earth")


def article(name: str) -> str:
    """The article of a subject's name with its space; empty if the name has none."""
    if name in WITH_THE:
        return "the "
    if name.split()[-1] in BARE_WORDS and " of " not in name:
        return ""
    vowel = (name[0] in "aeiou" and not name.startswith(("uni", "ufo"))) or name.startswith("hour")
    return "an " if vowel else "a "


def phrase(name: str) -> str:
    """A subject's name with its article, as in short captions."""
    return f"{article(name)}{name}"


def fetch_archive(package: str, version: str, folder: Path) -> Path:
    """The registry's tarball of a package, fetched into a folder by npm. Raises K2Error."""
    archive = folder / f"{package.lstrip('@').replace('/', '-')}-{version}.tgz"
    if not archive.exists():
        command = ["npm", "pack", "--silent", f"{package}@{version}"]
        try:
            subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
        except FileNotFoundError as error:
            raise K2Error("npm is not installed.", hint="Install it: art and words come from its registry.") from error
        except subprocess.CalledProcessError as error:
            raise K2Error(f"npm could not fetch {package}: {error.stderr.strip()[-200:]}") from error
    return archive


def load_icons(package: str, version: str, folder: Path) -> dict[str, Any]:
    """The icons of one set."""
    with tarfile.open(fetch_archive(f"@iconify-json/{package}", version, folder)) as tar:
        member = tar.extractfile("package/icons.json")
        assert member is not None
        return json.load(member)


def render_icon(icons: dict[str, Any], name: str, size: int) -> NDArray[np.uint8] | None:
    """Render one icon as RGBA [size, size, 4]; None if the set does not have it."""
    import resvg_py

    by_plain_name = {key.replace("-", ""): key for key in (*icons["icons"], *icons.get("aliases", {}))}
    key = by_plain_name.get(name.replace("-", ""))
    if key is None:
        return None
    while key in icons.get("aliases", {}):
        key = icons["aliases"][key]["parent"]
    icon = icons["icons"][key]
    box = [
        icon.get(side, icons.get(side, default))
        for side, default in zip(("left", "top", "width", "height"), (0, 0, 16, 16), strict=True)
    ]
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" color="#1e1e22" '
        f'viewBox="{" ".join(map(str, box))}" width="{size}" height="{size}">{icon["body"]}</svg>'
    )
    png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True)
    picture = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    if picture.size != (size, size):
        square = Image.new("RGBA", (size, size))
        square.paste(picture, ((size - picture.width) // 2, (size - picture.height) // 2))
        picture = square
    return np.asarray(picture)


def fingerprint(catalog: Catalog) -> str:
    """The hash of the data set's manifest."""
    return sha256(catalog.folder / "manifest.toml")


def build(folder: Path = DATA) -> None:
    """Fetch, render, drop exact duplicates, write the renders and their manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    renders: list[NDArray[np.uint8]] = []
    pairs: list[tuple[str, str]] = []
    seen: dict[str, tuple[str, str]] = {}
    repeats: list[str] = []
    asked = [(package, subject) for package in PACKAGES for subject in read_subjects()]
    for (package, subject), picture in zip(asked, render_all(folder, asked, SIZE), strict=True):
        if picture is None or picture[..., 3].mean() < 5:
            continue
        digest = hashlib.md5(picture.tobytes()).hexdigest()
        if digest in seen:
            repeats.append(f"{subject.name}/{package} repeats {'/'.join(seen[digest])}")
            continue
        seen[digest] = (subject.name, package)
        renders.append(picture)
        pairs.append((subject.name, package))
    stacked = np.stack(renders)
    write_renders(folder, stacked)
    (folder / "pairs.json").write_text(json.dumps(pairs))
    manifest = {
        "packages": PACKAGES,
        "archives": {p: sha256(folder / f"iconify-json-{p}-{v}.tgz") for p, v in PACKAGES.items()},
        "renders": {"count": len(pairs), "size": SIZE, "sha256": hashlib.sha256(stacked.tobytes()).hexdigest()},
        "repeats": repeats,
    }
    (folder / "manifest.toml").write_text(tomli_w.dumps(manifest))


def render_at_size(size: int, folder: Path = DATA) -> None:
    """Render the drawings of the data set at another size."""
    catalog = Catalog(folder)
    asked = [(pair.drawing, catalog.subjects[pair.subject]) for pair in catalog.pairs]
    drawn = [picture for picture in render_all(folder, asked, size) if picture is not None]
    assert len(drawn) == len(asked)  # else the pair would not exist
    write_renders(folder, np.stack(drawn))


def render_all(folder: Path, asked: Sequence[tuple[str, Subject]], size: int) -> Iterator[NDArray[np.uint8] | None]:
    """Subjects, each in a drawing set, in order; drawn on all cores."""
    for package, version in PACKAGES.items():
        fetch_archive(f"@iconify-json/{package}", version, folder)
    packages, subjects = zip(*asked, strict=True)
    with ProcessPoolExecutor() as pool:
        yield from pool.map(render_subject, repeat(folder), packages, subjects, repeat(size), chunksize=32)


@cache
def cached_icons(folder: Path, package: str) -> dict[str, Any]:
    return load_icons(package, PACKAGES[package], folder)


def render_subject(folder: Path, package: str, subject: Subject, size: int) -> NDArray[np.uint8] | None:
    """A subject in a drawing set, RGBA [size, size, 4]; None if the set has none of its icons."""
    icons = cached_icons(folder, package)
    found = (render_icon(icons, name, size) for name in subject.icons)
    return next((picture for picture in found if picture is not None), None)


def write_renders(folder: Path, renders: NDArray[np.uint8]) -> None:
    with atomic_write(renders_path(folder, renders.shape[1])) as draft, draft.open("wb") as file:
        np.save(file, renders)


if __name__ == "__main__":
    with exit_on_error():
        parser = argparse.ArgumentParser(description="Build the data set, or render it at another size.")
        parser.add_argument("size", type=int, nargs="?")
        size = parser.parse_args().size
        if size is not None:
            render_at_size(size)
        else:
            build()
            render_at_size(NATIVE)
        catalog = Catalog()
        print(f"{len(catalog.pairs)} renders of {len(catalog.subjects)} subjects")
        print(
            *(f"{split}: {len(catalog.items(split))} pictures" for split in ("train", "held-out", "styles")), sep="\n"
        )
