"""The one place that opens untrusted picture files: files made to stall or flood a decoder are refused. No torch.

Pillow guards against pictures of too many pixels and texts that decompress to too much. But it walks a file's parts one
by one in Python, keeps those it does not know, and makes as many passes over a picture as a JPEG asks for.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from model.errors import pluralise
from model.headers import open_file

SUFFIXES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".jfif": "JPEG", ".webp": "WEBP"}  # .jfif on Windows
FORMATS = tuple(dict.fromkeys(SUFFIXES.values()))
UNSUPPORTED_SUFFIXES = (".avif", ".bmp", ".gif", ".heic", ".heif", ".jxl", ".psd", ".svg", ".tif", ".tiff")
MIN_SIDE, MAX_PIXELS = 8, 1 << 26  # smallest side and most pixels of a picture to decode
SHAPE_TOLERANCE = 0.02  # relative difference up to which proportions count as equal
USE_OTHER_SIZE = f"Use sides of at least {MIN_SIDE} pixels, and at most {MAX_PIXELS >> 20} megapixels."
MAX_BYTES = 256 << 20  # of a file
MAX_PARTS = 50_000  # chunks, segments: 256 MiB in PNG's usual pieces of 8 KiB are 32,768
MAX_METADATA = 32 << 20  # bytes of metadata
MAX_SCANS = 64  # passes over a JPEG; a progressive one takes about ten
ORIENTATION = 0x0112  # the EXIF tag
READ_BYTES = 1 << 20  # bytes read at once
OUTPUT_FOLDERS = ("outputs", "gallery")  # in a project's folder: outputs, not inputs
SHEET = re.compile(r"sheet(\.\d+)?\.png")  # beside a run's plan; its pictures are NAME-SEED
SHEET_KEY = "k2-sheet"  # key of a text in a contact sheet's file, which identifies it under any name
HEAD_BYTES = 1024  # first bytes of a sheet's file, which hold that text


def has_picture_suffix(path: Path) -> bool:
    """Whether a file has the name of a picture that k2 reads."""
    return path.suffix.lower() in SUFFIXES


def is_sheet(path: Path) -> bool:
    """Whether a file is a contact sheet of a k2 run: many pictures in one, so not one to learn a look from."""
    if SHEET.fullmatch(path.name) and path.with_name("run.toml").is_file():
        return True
    return path.suffix.lower() == ".png" and has_sheet_text(path)


def has_sheet_text(path: Path) -> bool:
    """Whether a PNG says so in a text before its pixels."""
    with suppress(OSError), open_file(path) as file:
        return f"tEXt{SHEET_KEY}\0".encode() in file.read(HEAD_BYTES)
    return False


def describe_skipped(paths: Iterable[Path]) -> str:
    """Sentences on what was skipped in a folder: pictures that k2 does not read, subfolders with pictures, and broken
    links to pictures; "" if there is none of these."""
    seen = sorted(path for path in paths if not path.name.startswith("."))
    others = [path.suffix.lower()[1:] for path in seen if path.suffix.lower() in UNSUPPORTED_SUFFIXES]
    kinds = ", ".join(sorted(set(others)))
    within = [path.name for path in seen if holds_pictures(path)]
    gone = [path.name for path in seen if has_picture_suffix(path) and path.is_symlink() and not os.path.exists(path)]
    folders, links = (", ".join(found[:3] + ["…"] * (len(found) > 3)) for found in (within, gone))
    sentences = [f"Passed over: {pluralise(len(others), 'picture')} ({kinds}); k2 reads png, jpg and webp."] * bool(
        others
    )
    sentences += [f"Passed over: pictures in subfolders ({folders}); name those folders too."] * bool(folders)
    sentences += [f"Passed over: broken links ({links})."] * bool(links)
    return " ".join(sentences)


def holds_pictures(path: Path) -> bool:
    """Whether a path is a folder that contains a picture."""
    with suppress(OSError):
        return path.is_dir() and any(has_picture_suffix(each) for each in path.iterdir())
    return False


def truncation_hint(error: Exception) -> str:
    """A hint if, by Pillow's error, a picture's end is missing; "" for other errors."""
    return "The file is truncated: fetch or export it again." if "truncated" in str(error).lower() else ""


@contextmanager
def open_picture(path: Path) -> Iterator[Image.Image]:
    """A picture, not decoded yet. Raises ValueError or OSError, and whatever else Pillow raises for a broken file.

    Pillow's warnings about sizes and broken tags are silenced; callers check what they need.
    """
    check_file(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(path, formats=FORMATS) as image:
            yield image


def displayed_size(image: Image.Image) -> tuple[int, int]:
    """Width and height of an opened picture as displayed: a camera's may be stored sideways."""
    lies = image.getexif().get(ORIENTATION) in (5, 6, 7, 8)  # other values do not swap sides
    return image.size[::-1] if lies else image.size


def to_eight_bits(image: Image.Image) -> Image.Image:
    """Pillow clips 16-bit greys at 255 when converting, so nearly all would be white; scale them instead."""
    if not image.mode.startswith("I"):
        return image
    return image.convert("I").point(lambda grey: grey * (1 / 257)).convert("L")


def same_shape(one: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether two pictures of these sides have the same proportions, whatever their size."""
    return abs(one[0] / one[1] * other[1] / other[0] - 1) <= SHAPE_TOLERANCE


def check_file(path: Path) -> None:
    """Check a file's structure without decoding it. Raises OSError, and ValueError for what no camera writes."""
    with open_file(path) as file:
        check_parts(file)


def check_parts(file: BinaryIO) -> None:
    size = os.fstat(file.fileno()).st_size
    if size > MAX_BYTES:
        raise ValueError(f"it is larger than {MAX_BYTES >> 20} MB")
    head = file.read(12)
    parts: Iterator[tuple[bytes, int]]
    pixels: tuple[bytes, ...] = ()
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        parts, pixels = png_chunks(file, size), (b"IDAT", b"fdAT")
    elif head.startswith(b"\xff\xd8"):
        parts = jpeg_segments(file, size)
    elif head.startswith(b"RIFF") and head.endswith(b"WEBP"):
        parts, pixels = webp_chunks(file, size), (b"VP8 ", b"VP8L", b"ANMF", b"ALPH")
    else:
        return
    metadata = 0
    for number, (kind, length) in enumerate(parts):
        metadata += length if kind not in pixels else 0
        if number == MAX_PARTS or metadata > MAX_METADATA:
            raise ValueError("most of it is not a picture")
    if head.startswith(b"\xff\xd8") and count_scans(file) > MAX_SCANS:
        raise ValueError(f"it needs more than {MAX_SCANS} decoding passes")


def png_chunks(file: BinaryIO, size: int) -> Iterator[tuple[bytes, int]]:
    """Kind and length of every chunk."""
    place = 8
    while place + 8 <= size:
        file.seek(place)
        about = file.read(8)
        length = int.from_bytes(about[:4])
        yield about[4:], length
        place += 12 + length


def jpeg_segments(file: BinaryIO, size: int) -> Iterator[tuple[bytes, int]]:
    """Kind and length of every segment before the first scan."""
    place = 2
    while place + 4 <= size:
        file.seek(place)
        about = file.read(4)
        if about[0] != 0xFF or about[1] == 0xDA:
            return
        alone = about[1] in (0x01, 0xFF) or 0xD0 <= about[1] <= 0xD8  # markers without a length, and padding
        length = 0 if alone else int.from_bytes(about[2:])
        yield about[1:2], length
        place += (1 if about[1] == 0xFF else 2) + length


def webp_chunks(file: BinaryIO, size: int) -> Iterator[tuple[bytes, int]]:
    """Kind and length of every chunk."""
    place = 12
    while place + 8 <= size:
        file.seek(place)
        about = file.read(8)
        length = int.from_bytes(about[4:], "little")
        yield about[:4], length
        place += 8 + length + length % 2


def count_scans(file: BinaryIO) -> int:
    """The number of scans in a JPEG. Within a scan's data, FF is never followed by DA."""
    file.seek(0)
    count, last = 0, b""
    while block := file.read(READ_BYTES):
        count += (last + block).count(b"\xff\xda")
        last = block[-1:]
    return count
