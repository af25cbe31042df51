"""Files that appear complete or not at all, and locks that end with the process that holds them, however it ends."""

from __future__ import annotations

import errno
import os
import re
import secrets
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from model.errors import K2Error

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

HAS_LOCKS = fcntl is not None  # else files are complete all the same, but nobody is locked out
DRAFT_SUFFIX = ".draft"
OWN_DRAFT = re.compile(rf"\.\d+-[0-9a-f]+{re.escape(DRAFT_SUFFIX)}")  # as `new_draft` names them
O_DIRECTORY = getattr(os, "O_DIRECTORY", 0)  # else opening a named pipe in place of a folder would block for ever

PERMISSION_HINT = "Check the folder's permissions."
NOT_A_FOLDER_HINT = "A file is where a folder belongs: move it away."
HINTS = {  # what to do about an error of the file system
    errno.EACCES: PERMISSION_HINT,
    errno.EPERM: PERMISSION_HINT,
    errno.EROFS: "Choose another disk, or remount this one for writing.",
    errno.ENOTDIR: NOT_A_FOLDER_HINT,
    errno.EEXIST: NOT_A_FOLDER_HINT,
    errno.ENOENT: "Its folder was deleted or moved.",
    errno.ENAMETOOLONG: "Choose a shorter name.",
    errno.EFBIG: "The disk cannot hold a file this large: choose another.",
}


TERMINATION_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))


class Terminated(KeyboardInterrupt):
    """A signal asks this process to end; it then exits with the code by which shells know that signal."""

    def __init__(self, number: int):
        super().__init__()
        self.code = 128 + number


class DiskFull(K2Error):
    """Something could not be written for lack of space."""


class Exists(K2Error):
    """Something that was to be new already exists at `path`."""

    def __init__(self, path: Path):
        super().__init__(f"{path} exists already.", hint="Choose another name.")
        self.path = path


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C, and signals treated like it, wait until the block is finished; pressed once more, it does not wait."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pending: list[tuple[int, FrameType | None]] = []

    def defer(number: int, frame: FrameType | None) -> None:
        if pending:
            raise KeyboardInterrupt
        pending.append((number, frame))

    handled = (signal.SIGINT, *(number for number in TERMINATION_SIGNALS if callable(signal.getsignal(number))))
    handlers = {number: signal.signal(number, defer) for number in handled}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if pending:
            handler = handlers[signal.Signals(pending[0][0])]
            if callable(handler):
                handler(*pending[0])
            elif handler == signal.SIG_DFL:
                signal.raise_signal(signal.SIGINT)


@contextmanager
def signals_as_ctrl_c() -> Iterator[None]:
    """A signal to end this process, or a closed terminal, acts like Ctrl-C: Ended is raised. Signals that the process
    was told to ignore, as under nohup, stay ignored."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def raise_terminated(number: int, frame: FrameType | None) -> None:
        raise Terminated(number)

    ours = [number for number in TERMINATION_SIGNALS if signal.getsignal(number) == signal.SIG_DFL]
    for number in ours:
        signal.signal(number, raise_terminated)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


def write_files(files: Mapping[Path, bytes], *, new: bool = False) -> None:
    """Write files so that each is complete or absent: as drafts, flushed to disk, all put in place once all exist.

    Raises K2Error. If they are to be `new`, nothing is replaced: Exists is raised, and none of them is left. Ctrl-C
    meanwhile takes effect afterwards.
    """
    drafts: dict[Path, Path] = {}
    placed: list[Path] = []
    handles: list[int] = []
    with uninterrupted():
        try:
            for path, data in files.items():
                with writing(path):
                    drafts[path], handle = new_draft(path.parent)
                    handles.append(handle)
                    with open(handle, "wb", closefd=False) as file:
                        file.write(data)
                        file.flush()
                        os.fsync(handle)
            if not HAS_LOCKS:  # Windows moves no open file
                close_all(handles)
            for path, draft in drafts.items():
                with writing(path):
                    publish_draft(draft, path, new=new)
                placed.append(path)
            for folder in {path.parent for path in files}:
                flush_folder(folder)
        except K2Error:
            for path in placed if new else ():
                with suppress(OSError):
                    path.unlink()
            raise
        finally:
            for draft in drafts.values():
                with suppress(OSError):
                    draft.unlink(missing_ok=True)
            close_all(handles)


def publish_draft(draft: Path, path: Path, *, new: bool) -> None:
    """Give a draft its name; a new file gets it by a link, which never replaces anything."""
    if new:
        try:
            os.link(draft, path)
            return
        except FileExistsError:
            raise Exists(path) from None
        except OSError:  # a file system without links
            if path.exists():
                raise Exists(path) from None
    os.replace(draft, path)


def new_draft(folder: Path) -> tuple[Path, int]:
    """A new file, locked until it is closed; never an existing one, which might be a link to anywhere."""
    while True:
        draft = folder / f".{os.getpid()}-{secrets.token_hex(4)}{DRAFT_SUFFIX}"
        try:
            handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        except FileExistsError:
            continue
        if not HAS_LOCKS or (try_lock(handle) is not False and os.fstat(handle).st_nlink):
            return draft, handle
        os.close(handle)  # swept away in the instant before it was locked


def close_all(handles: list[int]) -> None:
    while handles:
        os.close(handles.pop())


def flush_folder(folder: Path) -> None:
    """Flush a folder, which holds the names: what was put in place then survives a power cut."""
    with suppress(OSError), opened(folder) as handle:
        os.fsync(handle)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn errors of the file system into one sentence."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(
                f"The disk is full: {path} was not written.", hint="Free some space, and try again."
            ) from None
        reason = {errno.EACCES: "permission denied", errno.EROFS: "the file system is read-only"}.get(error.errno or 0)
        hint = HINTS.get(error.errno or 0, "")
        raise K2Error(f"{path} cannot be written: {reason or error.strerror}.", hint=hint) from None


# ---- locks, and what a killed process leaves ---------------------------------------------------------------------


@contextmanager
def opened(path: str | Path, flags: int = 0) -> Iterator[int]:
    """A file or folder, open for reading."""
    handle = os.open(path, os.O_RDONLY | flags)
    try:
        yield handle
    finally:
        os.close(handle)


def try_lock(handle: int) -> bool | None:
    """Lock an open file or folder. False: another process holds it; None: this file system has no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if isinstance(error, BlockingIOError) else None
    return True


def remove_dead_drafts(folder: Path) -> None:
    """Remove the drafts whose writers are dead: a live writer holds the lock of its draft. Drafts with other names are
    somebody else's, such as those of `model/atomic.py`, which are not locked."""
    if not HAS_LOCKS:
        return
    with suppress(OSError):
        drafts = [entry.path for entry in os.scandir(folder) if OWN_DRAFT.fullmatch(entry.name)]
        for draft in drafts:
            with suppress(OSError), opened(draft, os.O_NOFOLLOW | os.O_NONBLOCK) as handle:
                if try_lock(handle):
                    os.unlink(draft)
