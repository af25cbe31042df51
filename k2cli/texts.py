"""Texts, names and paths from users: what may be shown, what may name a file, and how messages write paths."""

from __future__ import annotations

import os
import re
import shlex
import sys
import unicodedata
from pathlib import Path

from model.errors import K2Error

MAX_NAME = 60
MAX_PATH, MAX_PATH_PART = 2000, 255  # characters, and bytes between slashes
UNPRINTABLE = re.compile(  # terminal controls; surrogates, in which Python keeps undecodable bytes; non-characters
    r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)
WINDOWS_DEVICE = re.compile(r"(?i)(con|prn|aux|nul|com[0-9]|lpt[0-9])(\.|$)")  # device names on Windows, in any folder
COMBINING_ACCENTS = re.compile(r"[\u0300-\u036f]")  # combining accents
INVISIBLE = dict.fromkeys(map(ord, "\u200c\u200d\ufe0e\ufe0f"))  # joiners and variation selectors
USE_UTF_8 = "Use a UTF-8 locale: export LC_ALL=C.UTF-8"


def check_line(text: str, place: str) -> str:
    """The text on one line; refuses control characters, which could garble a terminal or a file name."""
    return check_printable(" ".join(text.split()), place)


def check_printable(text: str, place: str, hint: str = "Type the text again, without escapes.") -> str:
    """The text as is; refuses control characters, and bytes that the encoding here cannot decode."""
    if found := UNPRINTABLE.search(text):
        encoding = sys.getfilesystemencoding()
        foreign = encoding != "utf-8"
        if "\ud800" <= found[0] <= "\udfff" or (foreign and "\x80" <= found[0] <= "\x9f"):
            raise K2Error(f"{place} is not text in the encoding here, {encoding}.", hint=USE_UTF_8 if foreign else hint)
        raise K2Error(f"{place} contains a control character.", hint=hint)
    return text


def display_safe(text: str) -> str:
    """The text for display, with a ? for every control character."""
    return UNPRINTABLE.sub("?", text)


def shell_quote(word: str) -> str:
    """A word of a command, quoted for a shell. Windows' shells share double quotes, not single ones, and need none for
    a backslash; backslashes before a double quote are doubled."""
    if sys.platform != "win32":
        return shlex.quote(word)
    escaped = re.sub(r'(\\+)(?="|\Z)', r"\1\1", word).replace('"', r"\"")
    return word if re.fullmatch(r"[\w+=:./\\~-]+", word) else f'"{escaped}"'


def is_combining(char: str) -> bool:
    """Whether a character combines with the letter before it: accents, and the vowels of many scripts. `re` has no
    class for these."""
    return unicodedata.category(char) in ("Mn", "Mc")


def nfc(name: str) -> str:
    """A name with its accents composed; some file systems store them apart."""
    return unicodedata.normalize("NFC", name)


def fold_case(text: str) -> str:
    """A text for comparison: accents composed, no capitals."""
    return nfc(text).casefold()


def search_form(text: str) -> str:
    """A text for searching: like `fold_case`, without accents that cannot be composed, such as the stress marks of
    Russian words."""
    return COMBINING_ACCENTS.sub("", nfc(fold_case(text)))


def as_name(text: str, besides: str = "") -> str:
    """A text as part of a file name: letters with their marks, digits, _ and the characters in `besides`; else -."""
    chars: list[str] = []
    for char in nfc(text.translate(INVISIBLE)):
        follows_letter = bool(chars) and chars[-1] not in f"-_{besides}"  # those are stripped from names
        belongs = is_combining(char) and follows_letter
        chars.append(char if belongs or char.isalnum() or char in f"_{besides}" else "-")
    return re.sub("-+", "-", "".join(chars))


def check_name(name: str, where: str, *, whole_name: bool = False) -> str:
    """The name, accents composed. Refuses what cannot name a file on every system: by itself and as a folder if
    `whole_name`, else followed by a - and more."""
    name = nfc(name)
    bare = name[:1] + "".join(sign for sign in name[1:] if not is_combining(sign))
    if not re.fullmatch(r"\w[\w.-]*", bare) or len(name) > MAX_NAME:
        said = f'"{name}"' if len(name) <= MAX_NAME else f"a name of {len(name):,} characters"
        hint = f"Use letters, digits, - and _, at most {MAX_NAME}."
        raise K2Error(f"{where}: {said} cannot be a file name.", hint=hint)
    if WINDOWS_DEVICE.match(name if whole_name else f"{name}-") or (whole_name and name.endswith(".")):
        raise K2Error(f'{where}: "{name}" cannot be a file name on Windows.', hint="Choose another name.")
    return name


def check_path(path: str | Path, prefix: str = "") -> None:
    """Refuse a path too long for any file system before it is looked up. `prefix` begins the message."""
    if len(str(path)) > MAX_PATH or any(len(os.fsencode(part)) > MAX_PATH_PART for part in Path(path).parts):
        raise K2Error(f"{prefix}no file can have a name that long: {str(path)[:40]}…", hint="Check the name.")


def cwd_relative(path: Path) -> str:
    """A path relative to the current folder if it is below it, else absolute."""
    full = Path(os.path.abspath(path))
    return str(full.relative_to(Path.cwd())) if full.is_relative_to(Path.cwd()) else str(full)


def relative_path(path: Path, root: Path) -> str:
    """A path relative to the project's folder, or to the target of a link to it, from which ".." goes up. With slashes
    on every system; on another Windows drive absolute."""
    try:
        return Path(os.path.relpath(path, root if path.is_relative_to(root) else root.resolve())).as_posix()
    except ValueError:
        return path.as_posix()


def file_label(root: Path, file: str) -> str:
    """What messages call a project's file: its name within the project, or its path from outside the project."""
    return file if Path.cwd().is_relative_to(root.absolute()) else cwd_relative(root / file)
