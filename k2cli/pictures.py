"""Pictures that a project names: found by path or glob, and checked before anything decodes them."""

from __future__ import annotations

import difflib
import fnmatch
import glob
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePath

from PIL import Image

from k2cli.folder import spelled_on_disk
from k2cli.texts import check_printable, display_safe, fold_case, nfc, relative_path
from model import picture_file
from model.errors import K2Error, pluralise
from model.picture_file import MAX_PIXELS, MIN_SIDE, USE_OTHER_SIZE

MAX_GLOB_ENTRIES = 100_000  # names that a glob may look at
MAX_SIMILAR = 1000  # names in a folder that are searched for a similar one
MAX_PATTERN_CHARS = 1000  # characters of a pattern
DECODED: set[tuple[Path, int, int]] = set()  # files that decoded completely: path, bytes, time of last change

PathInside = Callable[[str, str], Path]  # (path, who asks): makes it absolute, refuses what lies outside the project


def find_pictures(pattern: str, root: Path, inside: PathInside, where: str, limit: int) -> tuple[list[Path], set[Path]]:
    """The pictures that a path, a folder or a glob matches, sorted; and what else it matches. Raises K2Error, also past
    `limit`.

    A path is used as is; of a folder or a glob, the files that are named like pictures and are not contact sheets.
    """
    if not pattern.strip():
        raise K2Error(f"{where}: the path is empty.", hint="Name a picture, a folder, or a glob of pictures.")
    if pattern.count("**") > 1:  # each further one multiplies the folders walked
        raise K2Error(f"{where}: {pattern} has more than one **.", hint="One covers all subfolders.")
    if len(pattern) > MAX_PATTERN_CHARS:
        raise K2Error(f"{where}: the path has {len(pattern):,} characters.", hint="Name the folder, or use a *.")
    is_glob = glob.has_magic(pattern) and not os.path.exists(root / pattern)
    base = inside(pattern.split("*")[0] if is_glob else pattern, where)
    if not is_glob and base.is_dir():
        pattern, is_glob = f"{glob.escape(pattern)}/*", True
    if not is_glob:
        return [base], set()
    found: set[Path] = set()
    others: set[Path] = set()
    for path in walk_glob(root, pattern, inside, where):
        if picture_file.has_picture_suffix(path) and os.path.isfile(path) and not picture_file.is_sheet(path):
            found.add(inside(relative_path(path, root), where))
            if len(found) > limit:
                raise K2Error(
                    f"{where}: {pattern} matches more than {limit} pictures.",
                    hint="Choose those that show the look best.",
                )
        else:
            others.add(path)
    return sorted(found), others - {path.parent for path in found}  # without subfolders that the glob walks, too


def check_label(label: str, where: str) -> None:
    """Refuse a picture whose name no record can hold; `label` is what messages and records call it."""
    check_printable(label, f"{where}: the name of {display_safe(label)}", "Rename the file.")


def walk_glob(root: Path, pattern: str, inside: PathInside, where: str) -> Iterator[Path]:
    """What a glob matches, like `glob.glob`. Every folder is visited once, so that links cannot form loops."""
    seen: set[tuple[int, int, tuple[str, ...]]] = set()
    start, parts = split_anchor(Path(pattern))
    entry_count, stack = 0, [(root / start, parts)]
    while stack:
        folder, (part, *rest) = stack.pop()
        if not glob.has_magic(part):
            path = spelled_on_disk(folder, part)
            if not rest and os.path.exists(path):
                yield path
            elif rest and path.is_dir():
                stack.append((inside(relative_path(path, root), where), tuple(rest)))
            continue
        stat = os.stat(folder)
        key = (stat.st_dev, stat.st_ino, (part, *rest))
        if key in seen:
            continue
        seen.add(key)
        if part == "**":  # which also matches no folder at all
            stack.append((folder, tuple(rest) or ("*",)))
        name_matches = re.compile(fnmatch.translate(nfc(part)), re.IGNORECASE if sys.platform == "win32" else 0).match
        for entry in scan_folder(folder):
            entry_count += 1
            if entry_count > MAX_GLOB_ENTRIES:
                raise K2Error(
                    f"{where}: {pattern} looks at more than {MAX_GLOB_ENTRIES:,} files.",
                    hint="Name a folder further down.",
                )
            if entry.name.startswith(".") and not part.startswith("."):
                continue
            deeper = (part, *rest) if part == "**" else tuple(rest)
            if part != "**" and not name_matches(nfc(entry.name)):
                continue
            if not deeper:
                yield folder / entry.name
            elif is_folder(entry):
                path = folder / entry.name
                stack.append((inside(relative_path(path, root), where) if entry.is_symlink() else path, deeper))


def split_anchor(pattern: PurePath) -> tuple[str, tuple[str, ...]]:
    """A glob's anchor (root or drive), "" if it starts from the project; and its parts."""
    return pattern.anchor, pattern.parts[bool(pattern.anchor) :]


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder or links to one; a link to itself is none."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def scan_folder(folder: Path) -> list[os.DirEntry[str]]:
    """The entries of a folder; none if it may not be read."""
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError:
        return []


def check_picture(path: Path, where: str, label: str, *, complete: bool = False) -> str:
    """Refuse what is not a picture -> png, jpg or webp, by its content. It is decoded only if it must be
    `complete`."""
    try:
        with picture_file.open_picture(path) as image:
            width, height, kind = *image.size, str(image.format)
            if complete and width * height <= MAX_PIXELS:
                decode_once(image, path)
    except FileNotFoundError:
        hint = picture_hint(path, label) or "Paths are relative to the project."
        raise K2Error(f"{where}: there is no picture {label}.", hint=hint) from None
    except Image.DecompressionBombError:
        raise K2Error(f"{where}: {label} is far too large.", hint="Scale it down.") from None
    except Exception as error:  # Pillow's decoders raise anything over a broken file
        hint = picture_file.truncation_hint(error) or "Use png, jpg or webp."
        raise K2Error(f"{where}: {label} is not a readable picture.", hint=hint) from None
    if width * height > MAX_PIXELS or min(width, height) < MIN_SIDE:
        raise K2Error(f"{where}: {label} has {width} x {height} pixels.", hint=USE_OTHER_SIZE)
    return {"PNG": "png", "JPEG": "jpg", "MPO": "jpg", "WEBP": "webp"}[kind]  # MPO: a JPEG followed by further ones


def picture_hint(path: Path, label: str) -> str:
    """A hint at a picture with nearly the name of a missing one, or the same but for capitals; "" if there is none.
    `label` is what messages call the path."""
    candidates = [entry.name for entry in scan_folder(path.parent) if picture_file.has_picture_suffix(Path(entry.name))]
    candidates = [name for name in candidates if name != path.name]  # a broken link
    same_folded = [name for name in candidates if fold_case(name) == fold_case(path.name)]
    found = same_folded or difflib.get_close_matches(path.name, candidates[:MAX_SIMILAR], 1, 0.6)
    return f"Did you mean {display_safe((Path(label).parent / found[0]).as_posix())}?" if found else ""


def decode_once(image: Image.Image, path: Path) -> None:
    """Decode a file once for as long as it stays unchanged. Raises whatever the decoder does."""
    stat = path.stat()
    key = (path, stat.st_size, stat.st_mtime_ns)
    if key not in DECODED:
        image.draft(None, (1, 1))  # a JPEG at an eighth, in half the time; no effect on others
        image.load()
        DECODED.add(key)


def picture_sides(path: Path) -> tuple[int, int]:
    """Width and height of a picture as displayed."""
    with picture_file.open_picture(path) as image:
        return picture_file.displayed_size(image)


def is_dark(path: Path) -> bool:
    """Whether no part of a picture is lighter than half, as masks count it: transparency on black."""
    with picture_file.open_picture(path) as image:
        rgba = picture_file.to_eight_bits(image).convert("RGBA")
    opaque = Image.new("RGB", rgba.size)
    opaque.paste(rgba, mask=rgba)
    lightest = opaque.convert("L", (1 / 3, 1 / 3, 1 / 3, 0)).getextrema()[1]  # their mean; to the eye green is lighter
    return isinstance(lightest, int) and lightest < 128


def folder_pictures(folder: Path) -> list[Path]:
    """The pictures in a folder, sorted by name; no contact sheets and nothing hidden, as with a glob."""
    named = (path for path in folder.iterdir() if picture_file.has_picture_suffix(path) and path.is_file())
    return sorted(path for path in named if not picture_file.is_sheet(path) and not path.name.startswith("."))


def without_sheets(files: Sequence[Path]) -> tuple[list[Path], str]:
    """The typed files without k2's contact sheets, which a shell's * finds beside a run's pictures; and a sentence on
    those. Raises K2Error if nothing else is left."""
    kept = [file for file in files if not picture_file.is_sheet(file)]
    if files and not kept:
        hint = "Name the pictures that it shows, or their folder."
        raise K2Error(f"{display_safe(str(files[0]))} is a contact sheet.", hint=hint)
    sheets = len(files) - len(kept)
    return kept, f"Passed over: {pluralise(sheets, 'contact sheet')}." if sheets else ""
