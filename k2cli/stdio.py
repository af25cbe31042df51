"""Standard streams fit for a command, whatever this process was started with."""

from __future__ import annotations

import codecs
import io
import os
import sys
from contextlib import suppress
from typing import Any


def prepare_streams() -> None:
    """Reopen closed streams on the null device, let standard output encode everything, and let no failure of standard
    error stop a command."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by the parent process
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        codecs.register_error("k2", escape_unencodable)
        sys.stdout.reconfigure(errors="k2")
    stderr = sys.__stderr__
    if stderr is None or stderr is not sys.stderr:
        return
    if isinstance(getattr(stderr.buffer, "raw", stderr.buffer), io.FileIO):  # Windows' console is not
        buffered = io.BufferedWriter(LossyWriter(stderr.fileno(), "w", closefd=False))
        sys.stderr = io.TextIOWrapper(buffered, stderr.encoding, stderr.errors, line_buffering=True)


class LossyWriter(io.FileIO):
    """Messages for people: on a full disk, or with no reader left, they are lost, and rendering continues."""

    def write(self, data: Any) -> int:
        written: int | None = None  # as from a non-blocking stream that is full for now
        with suppress(OSError):
            written = super().write(data)
        return len(data) if written is None else written


def escape_unencodable(error: UnicodeError) -> tuple[str | bytes, int]:
    """Encode what an encoding lacks: a byte of a path, which need not be text, as is; a character as its number."""
    assert isinstance(error, UnicodeEncodeError)
    start = error.start
    is_byte = "\udc80" <= error.object[start] <= "\udcff"
    one = UnicodeEncodeError(error.encoding, error.object, start, start + 1, error.reason)
    return codecs.lookup_error("surrogateescape" if is_byte else "backslashreplace")(one)
