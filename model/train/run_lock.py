"""Only one process at a time trains in a run's folder: two would overwrite each other's states and mix their logs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from model.errors import K2Error

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Within the context no other process trains in a run's folder. Raises K2Error if one does.

    The lock ends with the process that holds it, however that ends; systems without locks keep nobody out.
    """
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise K2Error(
                f"Another process is training in {folder}.", hint="Wait for it, or give this run another name."
            ) from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(handle)
