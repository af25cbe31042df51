"""Standard streams fit for a command, whatever this process was started with."""

from __future__ import annotations

import codecs
import io
import os
import sys
from contextlib import suppress
from typing import Any


def settle() -> None:
    """Reopen closed streams on the null device, let standard output encode everything, and let no failure of standard
    error stop a command."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by the parent process
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        codecs.register_error("k2", as_it_came)
        sys.stdout.reconfigure(errors="k2")
    said = sys.__stderr__
    if said is None or said is not sys.stderr:
        return
    if isinstance(getattr(said.buffer, "raw", said.buffer), io.FileIO):  # Windows' console is not
        words = io.BufferedWriter(Words(said.fileno(), "w", closefd=False))
        sys.stderr = io.TextIOWrapper(words, said.encoding, said.errors, line_buffering=True)


class Words(io.FileIO):
    """Messages for people: on a full disk, or with no reader left, they are lost, and rendering continues."""

    def write(self, data: Any) -> int:
        written: int | None = None  # as from a non-blocking stream that is full for now
        with suppress(OSError):
            written = super().write(data)
        return len(data) if written is None else written


def as_it_came(error: UnicodeError) -> tuple[str | bytes, int]:
    """Encode what an encoding lacks: a byte of a path, which need not be text, as is; a character as its number."""
    assert isinstance(error, UnicodeEncodeError)
    start = error.start
    byte = "\udc80" <= error.object[start] <= "\udcff"
    one = UnicodeEncodeError(error.encoding, error.object, start, start + 1, error.reason)
    return codecs.lookup_error("surrogateescape" if byte else "backslashreplace")(one)
