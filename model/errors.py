"""The one error class for problems that users can fix, and helpers that build messages."""

import difflib
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

USAGE = 2  # an exit code


class K2Error(Exception):
    """A problem the user can fix; `hint` says how. Anything else is a bug and keeps its traceback.

    code   the command's exit code: 1, or USAGE for a wrong option
    """

    def __init__(self, message: str, *, hint: str = "", code: int = 1):
        super().__init__(message)
        self.hint, self.code = hint, code


class TooLittleMemory(K2Error):
    """Not enough memory for this request; a smaller one may fit."""


@contextmanager
def exit_on_error() -> Iterator[None]:
    """For scripts run as modules: within the context a K2Error, or a file that cannot be opened, prints its message
    (and hint) and exits with code 1."""
    try:
        yield
    except K2Error as error:
        sys.exit(f"Error: {error}" + (f"\nHint:  {error.hint}" if error.hint else ""))
    except OSError as error:
        if error.filename is not None:
            sys.exit(f"Error: {error.filename}: {error.strerror}.")
        if isinstance(error, FileNotFoundError):  # from safetensors, which names the file only in its message
            sys.exit(f"Error: {error}.")
        raise


def brief(error: object, max_chars: int = 200) -> str:
    """A library's message on one line, cut to a readable length: names in it may be a megabyte long."""
    text = " ".join(str(error).split())
    return text if len(text) <= max_chars else f"{text[:max_chars]}…"


def pluralise(number: object, word: str) -> str:
    """ "1 picture", "2 pictures"."""
    return f"{number} {word}{'' if str(number) == '1' else 's'}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint for an unknown name: the closest known one; "" if none is close."""
    found = difflib.get_close_matches(name, list(known), 1, 0.6)
    return f'Did you mean "{found[0]}"?' if found else ""


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for an unknown name: the closest known one, else all known names, or the first ten of more than twenty."""
    known = list(known)
    return did_you_mean(name, known) or (f"Known: {listed(known, 20 if len(known) <= 20 else 10)}." if known else "")


def listed(names: Sequence[str], limit: int = 8) -> str:
    """ "fox, owl and 3 more"."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
