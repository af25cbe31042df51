"""Atomic writes: files are written beside their place, flushed to disk, then moved into it."""

from __future__ import annotations

import glob
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

DRAFT_SUFFIX = ".draft"
DEAD_AFTER = 86_400  # seconds after which an unfinished draft's writer counts as killed


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A draft to write to: it becomes `path` when the block ends, and is removed if the block fails. Raises OSError.

    No other process or thread uses the same draft. It gets the permissions of any new file, whatever its writer sets:
    safetensors makes files private.
    """
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}{DRAFT_SUFFIX}")
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
    remove_drafts(path.parent, path.name)


def remove_drafts(folder: Path, name: str | None = None) -> None:
    """Remove drafts that killed processes left, of one file or of all."""
    for draft in folder.glob(f".{glob.escape(name) if name else '*'}.*{DRAFT_SUFFIX}"):
        try:
            if draft.stat().st_mtime < time.time() - DEAD_AFTER:
                draft.unlink()
        except OSError:  # another process was first
            continue
