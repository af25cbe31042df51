"""Files that are there whole or not at all: written beside their place, flushed to disk, then moved into it."""

from __future__ import annotations

import glob
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

DRAFT = ".draft"
DEAD = 86_400  # seconds; whoever has not finished a draft by then was killed over it


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A draft to write `path` into: in its place once the block is through, and gone if that fails. Raises OSError.

    No other process or thread has the same draft. It gets the rights that any new file gets, whatever its writer gives
    it: safetensors' keeps what it writes to its owner.
    """
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}{DRAFT}")
    handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        rights = os.fstat(handle).st_mode & 0o777
        os.close(handle)
        yield draft
        draft.chmod(rights)
        with draft.open("rb+") as file:
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    sweep(path.parent, path.name)


def sweep(folder: Path, name: str | None = None) -> None:
    """Remove what killed processes left of a file, or of any."""
    for draft in folder.glob(f".{glob.escape(name) if name else '*'}.*{DRAFT}"):
        try:
            if draft.stat().st_mtime < time.time() - DEAD:
                draft.unlink()
        except OSError:  # another process was first
            continue
