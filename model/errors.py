"""The one kind of error that a user can act on, and what messages are put together with."""

import difflib
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

USAGE = 2  # an exit code


class K2Error(Exception):
    """A problem the user can fix; `hint` says how. Anything else is a bug and keeps its traceback.

    code   that a command exits with: 1, or USAGE where an option says what it may not
    """

    def __init__(self, message: str, *, hint: str = "", code: int = 1):
        super().__init__(message)
        self.hint, self.code = hint, code


class TooLittleMemory(K2Error):
    """There is not enough memory for what was asked; for less of it there may be."""


@contextmanager
def reported() -> Iterator[None]:
    """A context around what is run as a module: a K2Error ends in its sentence, its hint and exit code 1, and so does a
    file that cannot be had."""
    try:
        yield
    except K2Error as error:
        sys.exit(f"Error: {error}" + (f"\nHint:  {error.hint}" if error.hint else ""))
    except OSError as error:
        if error.filename is not None:
            sys.exit(f"Error: {error.filename}: {error.strerror}.")
        if isinstance(error, FileNotFoundError):  # of safetensors, which names the file in its message alone
            sys.exit(f"Error: {error}.")
        raise


def brief(error: object, most: int = 200) -> str:
    """What a library says of a file, on one line and cut where nobody reads on: names in it may be a megabyte long."""
    text = " ".join(str(error).split())
    return text if len(text) <= most else f"{text[:most]}…"


def count_of(number: object, word: str) -> str:
    """ "1 picture", "2 pictures"."""
    return f"{number} {word}{'' if str(number) == '1' else 's'}"


def close_to(name: str, known: Iterable[str]) -> str:
    """A hint at the known name that one which does not exist is closest to; "" where it is close to none."""
    found = difflib.get_close_matches(name, list(known), 1, 0.6)
    return f'Did you mean "{found[0]}"?' if found else ""


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for a name that does not exist: the closest known one, or those there are, of many the first ten."""
    known = list(known)
    return close_to(name, known) or (f"Known: {listed(known, 20 if len(known) <= 20 else 10)}." if known else "")


def listed(names: Sequence[str], most: int = 8) -> str:
    """ "fox, owl and 3 more"."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
