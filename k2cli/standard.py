"""Standard streams that suit a command, whatever this process was started with."""

from __future__ import annotations

import codecs
import io
import os
import sys
from contextlib import suppress
from typing import Any


def settle() -> None:
    """Give every stream that was closed a place to go, standard output a sign for every byte, and let standard error
    keep nobody from anything."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by whoever started this
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        codecs.register_error("k2", as_it_came)
        sys.stdout.reconfigure(errors="k2")
    said = sys.__stderr__
    if said is None or said is not sys.stderr:
        return
    if isinstance(getattr(said.buffer, "raw", said.buffer), io.FileIO):  # which Windows' console is not
        words = io.BufferedWriter(Words(said.fileno(), "w", closefd=False))
        sys.stderr = io.TextIOWrapper(words, said.encoding, said.errors, line_buffering=True)


class Words(io.FileIO):
    """What people read: of a full disk, or where nobody is left to read, it is lost, and the pictures are made."""

    def write(self, data: Any) -> int:
        written: int | None = None  # as of a stream that is full for now and does not wait
        with suppress(OSError):
            written = super().write(data)
        return len(data) if written is None else written


def as_it_came(error: UnicodeError) -> tuple[str | bytes, int]:
    """What an encoding has no sign for: of a path, which need not be text, its bytes; else a character's number."""
    assert isinstance(error, UnicodeEncodeError)
    start = error.start
    byte = "\udc80" <= error.object[start] <= "\udcff"
    one = UnicodeEncodeError(error.encoding, error.object, start, start + 1, error.reason)
    return codecs.lookup_error("surrogateescape" if byte else "backslashreplace")(one)
