"""A folder of one's own pictures as training data: what each is called, and its latents.

A caption is the text file of the same name beside a picture; without one the picture's own file name, as words.
"""

from __future__ import annotations

import re
import time
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from model.errors import K2Error, count_of, listed
from model.hashes import sha256
from model.parts import Autoencoder
from model.picture_file import MADE, SUFFIXES, is_named_so, is_sheet, passed_over
from model.references import fitting, to_pixels
from model.spec import says

SAY_EVERY = 20.0  # seconds
MOST_TEXT = 1 << 16  # bytes of a caption's file
CAPTIONS = (".txt", ".caption", ".captions", ".json", ".jsonl", ".csv", ".tsv")  # that tools write captions into
SAYS_NOTHING = re.compile(  # names that cameras, browsers and editors give
    r"(img|image|dsc[fn]?|dscn|pxl|mvimg|photo|picture|pic|screenshot|screen shot|untitled|download|unnamed|copy)"
    r"( ?(of|at|from|copy|\d+))*|[0-9a-f]{8}( ?[0-9a-f]{4}){3} ?[0-9a-f]{12}|",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Captioned:
    """A picture's file and what it shows, in words; empty where nothing is known."""

    path: Path
    caption: str


def read_folder(folder: Path, trigger: str = "") -> list[Captioned]:
    """The pictures of a folder and of all below it, by name; no contact sheets, and nothing hidden. Raises K2Error
    where there is none.

    What was made in it is left out: of a project its pictures, and of training the curves and samples of its runs.

    trigger: words that end every caption, as they will end the prompts that ask for the look.
    """
    if not folder.is_dir():
        raise K2Error(f"There is no folder {folder}.", hint="Give a folder of pictures.")
    paths = [path for path in files_below(folder) if is_named_so(path) and path.is_file() and not is_sheet(path)]
    if not paths:
        raise K2Error(f"{folder} holds no pictures.", hint=not_learned(folder) or f"Known are {', '.join(SUFFIXES)}.")
    return [Captioned(path, join(caption_of(path), trigger)) for path in paths]


def not_learned(folder: Path) -> str:
    """Sentences on what of a folder's content nothing is learned from; "" where there is no such thing."""
    paths = files_below(folder)
    linked = [path.name for path in paths if path.is_dir()]
    links = f"Passed over: links to folders, which are not followed ({listed(linked, 3)})." if linked else ""
    return " ".join(filter(None, (passed_over(path for path in paths if not path.is_dir()), links)))


def files_below(folder: Path) -> list[Path]:
    """The files of a folder and of all below it, but for what is hidden and what was made in it. Links to folders are
    not followed and stand for themselves."""
    files = (path for path in folder.rglob("*") if not path.is_dir() or path.is_symlink())
    seen = (path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts))
    made = [folder / part for part in MADE if (folder / "k2.toml").is_file()]
    return sorted(path for path in seen if not any(map(path.is_relative_to, made)))


def about_captions(folder: Path, pictures: Sequence[Captioned]) -> str:
    """How many captions come from where, and which files that look like some are none's."""
    files = {beside.with_suffix(".txt") for picture in pictures if (beside := text_beside(picture.path))}
    bare = [picture.path for picture in pictures if text_beside(picture.path) is None]
    named = sum(bool(words_of(path.stem)) for path in bare)
    counts = {"from text files": len(pictures) - len(bare), "from file names": named, "empty": len(bare) - named}
    told = [f"{count_of(count, 'caption')} {kind}" for kind, count in counts.items() if count]
    like_some = [path for path in files_below(folder) if path.suffix.lower() in CAPTIONS]
    others = [path.name for path in like_some if path.with_suffix(path.suffix.lower()) not in files]
    return ", ".join(told) + f"; not read as captions: {listed(others, 3)}" * bool(others)


def text_beside(path: Path) -> Path | None:
    """The file of a picture's caption."""
    return next((each for each in map(path.with_suffix, (".txt", ".TXT")) if each.is_file()), None)


def caption_of(path: Path) -> str:
    """The text beside a picture, on one line, else its file name as words. Raises K2Error."""
    beside = text_beside(path)
    if beside is None:
        return words_of(path.stem)
    try:
        if beside.stat().st_size > MOST_TEXT:
            raise K2Error(f"{beside} is no caption: it has {beside.stat().st_size:,} bytes.", hint="Say it shorter.")
        return " ".join(beside.read_text("utf-8-sig").split())
    except (OSError, UnicodeDecodeError) as error:
        raise K2Error(f"{beside} cannot be read: {error}.", hint="Captions are text in UTF-8.") from None


def words_of(stem: str) -> str:
    """A file's name as words: "red-fox_03 (2)" is "red fox"; what only counts or names a camera is nothing."""
    words = " ".join(re.sub(r"[-_.,+()\[\]\s]+", " ", stem).split())
    words = re.sub(r"( \d+)+$", "", words)
    return "" if SAYS_NOTHING.fullmatch(words) or not re.search(r"[^\W\d_]", words) else words


def join(caption: str, trigger: str) -> str:
    """As a style's trigger joins a prompt; one that the caption has already, as words, is not said twice."""
    if not trigger or says(caption, trigger):
        return caption
    return ", ".join(part for part in (caption.rstrip(", "), trigger) if part)


def shortened(caption: str, trigger: str, unread: Callable[[str], int]) -> str:
    """A caption of which all is read, the trigger too: words are left out before it.

    unread: how many tokens at a text's end are too many
    """
    words = caption.removesuffix(f", {trigger}").split(" ")

    def first(count: int) -> str:
        return join(" ".join(words[:count]), trigger)

    return first(bisect_left(range(1, len(words) + 1), True, key=lambda count: unread(first(count)) > 0))


@torch.inference_mode()
def encode(
    pictures: Sequence[Captioned],
    vae: Autoencoder,
    size: int,
    unit: int,
    *,
    mirrored: bool = False,
    report: Callable[[str], None] = lambda line: None,
) -> dict[tuple[int, int], tuple[Tensor, list[int]]]:
    """Latents of pictures, each in about its own proportions, sorted by shape. Raises K2Error for broken ones.

    size      side of a square of as many pixels as a picture gets
    unit      what its sides are multiples of
    mirrored  each once more, left to right
    report    gets a line now and then
    returns   (rows, columns) -> latents [n, C, rows, columns], fp32 on the CPU, and the index of each in `pictures`
    """
    device, dtype = next((p.device, p.dtype) for p in vae.parameters())
    found: dict[tuple[int, int], list[tuple[Tensor, int]]] = defaultdict(list)
    said = time.monotonic()
    for index, picture in enumerate(pictures):
        if time.monotonic() - said > SAY_EVERY:
            report(f"{index} of {len(pictures)} pictures encoded")
            said = time.monotonic()
        pixels = to_pixels(picture.path, *fitting(picture.path, size**2, unit)).to(device, dtype)
        for each in (pixels, pixels.flip(-1)) if mirrored else (pixels,):
            latents = vae.encode(each).float().cpu()
            found[latents.shape[-2], latents.shape[-1]].append((latents, index))
    return {
        shape: (torch.cat([latents for latents, _ in group]).clone(), [index for _, index in group])
        for shape, group in found.items()
    }


def manifest(pictures: Sequence[Captioned]) -> list[dict[str, str]]:
    """What a run learned from, for its record."""
    return [{"file": p.path.name, "caption": p.caption, "sha256": sha256(p.path)} for p in pictures]
