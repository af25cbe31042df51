"""Texts, names and paths from people: what may be shown, what may name a file, and what paths are called."""

from __future__ import annotations

import os
import re
import shlex
import sys
import unicodedata
from pathlib import Path

from model.errors import K2Error

LONGEST_NAME = 60
LONGEST_PATH, LONGEST_PART = 2000, 255  # characters, and bytes between slashes
UNPRINTABLE = re.compile(  # what terminals obey; surrogates, as which Python keeps bytes that are no text; no letters
    r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)
DEVICE = re.compile(r"(?i)(con|prn|aux|nul|com[0-9]|lpt[0-9])(\.|$)")  # what Windows takes for one in any folder
APART = re.compile(r"[\u0300-\u036f]")  # accents that no letter is joined to
UNSEEN = dict.fromkeys(map(ord, "\u200c\u200d\ufe0e\ufe0f"))  # signs that say how those beside them are drawn
USE_UTF_8 = "Use a locale of UTF-8: export LC_ALL=C.UTF-8"


def plain(text: str, place: str) -> str:
    """The text on one line; refuses control characters, which could rewrite a terminal or a file name."""
    return printable(" ".join(text.split()), place)


def printable(text: str, place: str, hint: str = "Type the text again, without escapes.") -> str:
    """The text as it is; refuses control characters, and what bytes come to that the encoding here has no sign for."""
    if found := UNPRINTABLE.search(text):
        encoding = sys.getfilesystemencoding()
        foreign = encoding != "utf-8"
        if "\ud800" <= found[0] <= "\udfff" or (foreign and "\x80" <= found[0] <= "\x9f"):
            raise K2Error(f"{place} is no text in the encoding here, {encoding}.", hint=USE_UTF_8 if foreign else hint)
        raise K2Error(f"{place} holds a control character.", hint=hint)
    return text


def masked(text: str) -> str:
    """The text to be shown: with a ? for every control character."""
    return UNPRINTABLE.sub("?", text)


def quote(word: str) -> str:
    """A word of a command, to be typed into a shell. Those of Windows know double quotes alike, not single ones, and
    need none for a backslash, of which those before a double quote count half."""
    if sys.platform != "win32":
        return shlex.quote(word)
    escaped = re.sub(r'(\\+)(?="|\Z)', r"\1\1", word).replace('"', r"\"")
    return word if re.fullmatch(r"[\w+=:./\\~-]+", word) else f'"{escaped}"'


def is_mark(sign: str) -> bool:
    """Whether a sign belongs to the letter before it: accents, and the vowels of many scripts. `re` knows no such."""
    return unicodedata.category(sign) in ("Mn", "Mc")


def composed(name: str) -> str:
    """A name, accents that stand apart joined to their letters: of some file systems they come so."""
    return unicodedata.normalize("NFC", name)


def folded(text: str) -> str:
    """A text as it is compared with another: accents joined to their letters, and no capitals."""
    return composed(text).casefold()


def sought(text: str) -> str:
    """The same of a text that is searched: an accent that there is no joined letter for, as the stress of Russian
    words, counts for nothing."""
    return APART.sub("", composed(folded(text)))


def as_name(text: str, besides: str = "") -> str:
    """A text as a part of a file name: letters with their marks, digits, _ and what is let in besides; else -."""
    signs: list[str] = []
    for sign in composed(text.translate(UNSEEN)):
        belongs = is_mark(sign) and bool(signs) and signs[-1] not in f"-_{besides}"  # at which names are stripped
        signs.append(sign if belongs or sign.isalnum() or sign in f"_{besides}" else "-")
    return re.sub("-+", "-", "".join(signs))


def check_name(name: str, where: str, *, alone: bool = False) -> str:
    """The name, accents that stand apart joined to their letters. Refuses what cannot name files everywhere: `alone`,
    a folder too, else followed by a - and more."""
    name = composed(name)
    bare = name[:1] + "".join(sign for sign in name[1:] if not is_mark(sign))
    if not re.fullmatch(r"\w[\w.-]*", bare) or len(name) > LONGEST_NAME:
        said = f'"{name}"' if len(name) <= LONGEST_NAME else f"a name of {len(name):,} characters"
        hint = f"Use letters, digits, - and _, at most {LONGEST_NAME}."
        raise K2Error(f"{where}: {said} cannot name files.", hint=hint)
    if DEVICE.match(name if alone else f"{name}-") or (alone and name.endswith(".")):
        raise K2Error(f'{where}: "{name}" cannot name files on Windows.', hint="Choose another name.")
    return name


def check_path(path: str | Path, asked: str = "") -> None:
    """Refuse what no file system takes for a path, before it is looked for. `asked` says by whom, with its colon."""
    if len(str(path)) > LONGEST_PATH or any(len(os.fsencode(part)) > LONGEST_PART for part in Path(path).parts):
        raise K2Error(f"{asked}no file can have a name that long: {str(path)[:40]}…", hint="Check the name.")


def from_here(path: Path) -> str:
    """A path from the current folder on where it lies below it, else the whole."""
    full = Path(os.path.abspath(path))
    return str(full.relative_to(Path.cwd())) if full.is_relative_to(Path.cwd()) else str(full)


def relative(path: Path, root: Path) -> str:
    """A path from the project's folder on, or from where a link to that leads: ".." goes up from there. With slashes,
    wherever it is written; of another drive (Windows has such) the whole."""
    try:
        return Path(os.path.relpath(path, root if path.is_relative_to(root) else root.resolve())).as_posix()
    except ValueError:
        return path.as_posix()


def label_of(root: Path, file: str) -> str:
    """What messages call a file of a project: its name in there; from outside of the project, its path."""
    return file if Path.cwd().is_relative_to(root.absolute()) else from_here(root / file)
