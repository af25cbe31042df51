"""A folder of the user's pictures as training data: captions and latents.

A caption is the text file of the same name beside a picture, or else the picture's file name as words.
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

from model.errors import K2Error, listed, pluralise
from model.hashes import sha256
from model.parts import Autoencoder
from model.picture_file import OUTPUT_FOLDERS, SUFFIXES, describe_skipped, has_picture_suffix, is_sheet
from model.references import fit_size, to_pixels
from model.spec import mentions

REPORT_EVERY = 20.0  # seconds
MAX_CAPTION = 1 << 16  # bytes of a caption file
CAPTION_SUFFIXES = (".txt", ".caption", ".captions", ".json", ".jsonl", ".csv", ".tsv")  # that tools write captions to
MEANINGLESS_STEM = re.compile(  # names that cameras, browsers and editors give
    r"(img|image|dsc[fn]?|dscn|pxl|mvimg|photo|picture|pic|screenshot|screen shot|untitled|download|unnamed|copy)"
    r"( ?(of|at|from|copy|\d+))*|[0-9a-f]{8}( ?[0-9a-f]{4}){3} ?[0-9a-f]{12}|",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class CaptionedPicture:
    """A picture's file and what it shows, in words; empty if nothing is known."""

    path: Path
    caption: str


def read_folder(folder: Path, trigger: str = "") -> list[CaptionedPicture]:
    """The pictures of a folder and its subfolders, by name, without contact sheets and hidden files. Raises K2Error if
    there are none.

    What k2 made there is left out: a project's pictures, and the curves and samples of training runs.

    trigger: words that end every caption, as they will end the prompts that ask for the look.
    """
    if not folder.is_dir():
        raise K2Error(f"There is no folder {folder}.", hint="Give a folder of pictures.")
    paths = [path for path in list_files(folder) if has_picture_suffix(path) and path.is_file() and not is_sheet(path)]
    if not paths:
        raise K2Error(f"{folder} holds no pictures.", hint=unused_files(folder) or f"k2 reads {', '.join(SUFFIXES)}.")
    return [CaptionedPicture(path, add_trigger(read_caption(path), trigger)) for path in paths]


def unused_files(folder: Path) -> str:
    """Sentences on what is skipped of a folder's content; "" if nothing is."""
    paths = list_files(folder)
    linked = [path.name for path in paths if path.is_dir()]
    links = f"Passed over: links to folders, which are not followed ({listed(linked, 3)})." if linked else ""
    return " ".join(filter(None, (describe_skipped(path for path in paths if not path.is_dir()), links)))


def list_files(folder: Path) -> list[Path]:
    """The files of a folder and its subfolders, except hidden ones and what k2 made there. Links to folders are not
    followed; they are listed themselves."""
    files = (path for path in folder.rglob("*") if not path.is_dir() or path.is_symlink())
    seen = (path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts))
    made = [folder / part for part in OUTPUT_FOLDERS if (folder / "k2.toml").is_file()]
    return sorted(path for path in seen if not any(map(path.is_relative_to, made)))


def describe_captions(folder: Path, pictures: Sequence[CaptionedPicture]) -> str:
    """How many captions come from which source, and which caption-like files belong to no picture."""
    files = {beside.with_suffix(".txt") for picture in pictures if (beside := caption_file(picture.path))}
    bare = [picture.path for picture in pictures if caption_file(picture.path) is None]
    named = sum(bool(words_from_stem(path.stem)) for path in bare)
    counts = {"from text files": len(pictures) - len(bare), "from file names": named, "empty": len(bare) - named}
    counted = [f"{pluralise(count, 'caption')} {kind}" for kind, count in counts.items() if count]
    caption_like = [path for path in list_files(folder) if path.suffix.lower() in CAPTION_SUFFIXES]
    others = [path.name for path in caption_like if path.with_suffix(path.suffix.lower()) not in files]
    return ", ".join(counted) + f"; not read as captions: {listed(others, 3)}" * bool(others)


def caption_file(path: Path) -> Path | None:
    """A picture's caption file."""
    return next((each for each in map(path.with_suffix, (".txt", ".TXT")) if each.is_file()), None)


def read_caption(path: Path) -> str:
    """The text beside a picture, on one line, else its file name as words. Raises K2Error."""
    text_file = caption_file(path)
    if text_file is None:
        return words_from_stem(path.stem)
    try:
        if text_file.stat().st_size > MAX_CAPTION:
            raise K2Error(
                f"{text_file} is too long for a caption: {text_file.stat().st_size:,} bytes.", hint="Shorten it."
            )
        return " ".join(text_file.read_text("utf-8-sig").split())
    except (OSError, UnicodeDecodeError) as error:
        raise K2Error(f"{text_file} cannot be read: {error}.", hint="Captions must be UTF-8 text.") from None


def words_from_stem(stem: str) -> str:
    """A file's name as words: "red-fox_03 (2)" is "red fox"; bare numbers and camera names give nothing."""
    words = " ".join(re.sub(r"[-_.,+()\[\]\s]+", " ", stem).split())
    words = re.sub(r"( \d+)+$", "", words)
    return "" if MEANINGLESS_STEM.fullmatch(words) or not re.search(r"[^\W\d_]", words) else words


def add_trigger(caption: str, trigger: str) -> str:
    """Append a trigger as to a prompt; one that the caption already contains, as words, is not repeated."""
    if not trigger or mentions(caption, trigger):
        return caption
    return ", ".join(part for part in (caption.rstrip(", "), trigger) if part)


def shorten_caption(caption: str, trigger: str, truncated: Callable[[str], int]) -> str:
    """A caption short enough to be read completely, trigger included: words before the trigger are dropped.

    truncated: the number of tokens at a text's end that are too many
    """
    words = caption.removesuffix(f", {trigger}").split(" ")

    def first(count: int) -> str:
        return add_trigger(" ".join(words[:count]), trigger)

    return first(bisect_left(range(1, len(words) + 1), True, key=lambda count: truncated(first(count)) > 0))


@torch.inference_mode()
def encode(
    pictures: Sequence[CaptionedPicture],
    vae: Autoencoder,
    size: int,
    unit: int,
    *,
    mirrored: bool = False,
    report: Callable[[str], None] = lambda line: None,
) -> dict[tuple[int, int], tuple[Tensor, list[int]]]:
    """Latents of pictures, each in about its own proportions, grouped by shape. Raises K2Error for broken ones.

    size      side of a square with as many pixels as each picture gets
    unit      sides are multiples of this
    mirrored  add each picture mirrored left to right
    report    gets a line now and then
    returns   (rows, columns) -> latents [n, C, rows, columns], fp32 on the CPU, and the index of each in `pictures`
    """
    device, dtype = next((p.device, p.dtype) for p in vae.parameters())
    found: dict[tuple[int, int], list[tuple[Tensor, int]]] = defaultdict(list)
    reported_at = time.monotonic()
    for index, picture in enumerate(pictures):
        if time.monotonic() - reported_at > REPORT_EVERY:
            report(f"{index} of {len(pictures)} pictures encoded")
            reported_at = time.monotonic()
        pixels = to_pixels(picture.path, *fit_size(picture.path, size**2, unit)).to(device, dtype)
        for each in (pixels, pixels.flip(-1)) if mirrored else (pixels,):
            latents = vae.encode(each).float().cpu()
            found[latents.shape[-2], latents.shape[-1]].append((latents, index))
    return {
        shape: (torch.cat([latents for latents, _ in group]).clone(), [index for _, index in group])
        for shape, group in found.items()
    }


def manifest(pictures: Sequence[CaptionedPicture]) -> list[dict[str, str]]:
    """What a run learned from, for its record."""
    return [{"file": p.path.name, "caption": p.caption, "sha256": sha256(p.path)} for p in pictures]
