"""Run folders: numbers that two processes cannot share, and files that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import re
import secrets
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from k2cli.dialect import dump
from model.errors import K2Error

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

RUN = "run.toml"
SHEET = "sheet.png"
DRAFT = ".draft"
BLOCKED = ".blocked.toml"
PICTURES = (".png", ".webp", ".jpg")  # as a picture may be called that has a record beside it
PATIENCE = 10.0  # seconds to wait for another process that claims a number
NUMBER = re.compile(r"(\d{4,})(?:-|$)")
FOLDER = getattr(os, "O_DIRECTORY", 0)  # else opening a named pipe, laid where a folder should be, would wait for ever


class DiskFull(K2Error):
    """Something could not be written for want of room."""


class Exists(K2Error):
    """Something that was to be new has come to stand at `path`."""

    def __init__(self, path: Path):
        super().__init__(f"{path} exists already.", hint="Choose another name.")
        self.path = path


class Run:
    """outputs/0003-fox: claimed by one process, and gone again if nothing came of it.

    Used as a context manager. Left by an error with no picture saved, it removes the folder, and `outputs` if new.
    Left by Ctrl-C it keeps what has a plan, which can be gone on with.
    """

    def __init__(self, folder: Path, *, made: list[Path] | None = None):
        self.folder = folder
        self.made = made or []  # folders that claiming it created, outermost first
        self.handle: int | None = None

    @classmethod
    def claim(cls, outputs: Path, name: str, files: Mapping[str, bytes] | None = None) -> Run:
        """The next number's folder with these files in it, locked by this process. Raises K2Error.

        Creating NNNN is the claim, and the folder gets its name when the files are there: a process killed between
        the two leaves a bare number, which the next one clears away. Where file locks work, claims come one after the
        other. Where they do not, whoever holds NNNN looks once more for a named twin: a process that finds NNNN-other
        beside its own NNNN came second and moves on; one that finds none may rename.
        """
        run = cls(outputs)
        try:
            with undisturbed(), writing(outputs):
                if not outputs.exists():
                    outputs.mkdir(exist_ok=True)
                    run.made.append(outputs)
                with alone(outputs) as granted:
                    if granted:
                        clear(outputs)
                    bare = run.folder = next_number(outputs)
                    run.made.append(bare)
                    run.lock()
                    write({bare / file: data for file, data in (files or {}).items()})
                    run.folder = bare.rename(outputs / f"{bare.name}-{name}")
                    run.made[-1] = run.folder
        except BaseException as error:
            run.__exit__(type(error), error, None)
            raise
        return run

    @classmethod
    def last(cls, outputs: Path, number: int | None = None) -> Run | None:
        """The run with the highest number, or with this one, that a plan was written for."""
        runs = sorted(path.parent for path in outputs.glob(f"*-*/{RUN}") if NUMBER.match(path.parent.name))
        asked = [folder for folder in runs if number in (None, number_of(folder))]
        return cls(max(asked, key=number_of)) if asked else None

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if (
            kind is not None
            and self.made
            and not (issubclass(kind, KeyboardInterrupt) and self.planned)
            and not any(made for end in (*PICTURES, BLOCKED) for made in self.folder.glob(f"*{end}"))
        ):
            with suppress(OSError):
                (self.folder / RUN).unlink(missing_ok=True)
                for folder in reversed(self.made):
                    folder.rmdir()
        if self.handle is not None:
            os.close(self.handle)

    def lock(self) -> None:
        """Keep other processes from resuming this run; the lock ends with this process, however it ends."""
        if fcntl is None or self.handle is not None:
            return
        with writing(self.folder):
            self.handle = os.open(self.folder, os.O_RDONLY)
        if hold(self.handle) is False:
            raise K2Error(f"{self.folder} is being rendered by another process.", hint="Wait for it, or stop it.")
        sweep(self.folder)

    @property
    def busy(self) -> bool:
        """Whether another process renders it, as far as can be told."""
        if fcntl is None:
            return False
        with suppress(OSError), opened(self.folder, FOLDER) as handle:
            return hold(handle) is False
        return False

    def __getitem__(self, name: str) -> Path:
        return self.folder / name

    @property
    def planned(self) -> bool:
        """Whether it can be resumed: it has a plan, and its name."""
        return self[RUN].exists() and not self.folder.name.isdigit()

    def has(self, stem: str) -> bool:
        """A picture is done when both its files stand there, or was blocked; each of them is whole if it exists."""
        return (self.picture(stem).exists() and self[f"{stem}.toml"].exists()) or self[f"{stem}{BLOCKED}"].exists()

    def picture(self, stem: str) -> Path:
        """Where a picture stands, in whichever format; where there is none, where it would stand as a PNG."""
        names = [self[f"{stem}{suffix}"] for suffix in PICTURES]
        return next((path for path in names if path.exists()), names[0])

    def save(self, stem: str, picture: bytes, record: bytes, suffix: str = ".png") -> Path:
        """A picture and its record. The record takes its place first, so that no picture is ever without one."""
        path = self[f"{stem}{suffix}"]
        write({self[f"{stem}.toml"]: record, path: picture})
        return path

    def block(self, stem: str, record: bytes) -> Path:
        """The record alone, of a picture that an output filter keeps back."""
        path = self[f"{stem}{BLOCKED}"]
        write({path: record})
        return path


def next_number(outputs: Path) -> Path:
    """A new folder NNNN, which no other process has made or named."""
    number = max(numbers(outputs), default=0)
    while True:
        number += 1
        bare = outputs / f"{number:04d}"
        try:
            bare.mkdir()
        except FileExistsError:
            continue
        if numbers(outputs).count(number) == 1:
            return bare
        bare.rmdir()


def numbers(outputs: Path) -> list[int]:
    """The numbers of all run folders, one that is only just claimed included."""
    return [number_of(path) for path in outputs.iterdir() if NUMBER.match(path.name)]


def number_of(folder: Path) -> int:
    match = NUMBER.match(folder.name)
    assert match is not None, folder
    return int(match[1])


# ---- what a killed process leaves, and who may take it away -----------------------------------------------------


def clear(outputs: Path) -> None:
    """Drafts of dead processes in all runs, and numbers that they claimed without coming to name them.

    Only for whoever is `alone`: a living process that claims a number holds `outputs` until it has named it.
    """
    if fcntl is None:
        return
    for folder in [path for path in outputs.iterdir() if NUMBER.match(path.name) and not path.is_symlink()]:
        sweep(folder)
        if folder.name.isdigit():
            with suppress(OSError), opened(folder, FOLDER) as handle:
                if set(os.listdir(handle)) <= {RUN} and hold(handle):
                    (folder / RUN).unlink(missing_ok=True)
                    folder.rmdir()


def sweep(folder: Path) -> None:
    """Remove the drafts whose writers are dead: a living one holds the lock of its draft."""
    if fcntl is None:
        return
    with suppress(OSError):
        drafts = [entry.path for entry in os.scandir(folder) if entry.name.endswith(DRAFT)]
        for draft in drafts:
            with suppress(OSError), opened(draft, os.O_NOFOLLOW | os.O_NONBLOCK) as handle:
                if hold(handle):
                    os.unlink(draft)


@contextmanager
def opened(path: str | Path, flags: int = 0) -> Iterator[int]:
    """A file or folder, open for reading."""
    handle = os.open(path, os.O_RDONLY | flags)
    try:
        yield handle
    finally:
        os.close(handle)


@contextmanager
def alone(folder: Path) -> Iterator[bool]:
    """One process at a time -> whether it is so: not where locks do not work, nor past a holder that stands still."""
    if fcntl is None:
        yield False
        return
    deadline = time.monotonic() + PATIENCE
    with opened(folder, FOLDER) as handle:
        while (granted := hold(handle)) is False and time.monotonic() < deadline:
            time.sleep(0.01)
        yield bool(granted)


def hold(handle: int) -> bool | None:
    """Lock an open file or folder. False: another process has it; None: this file system knows no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if isinstance(error, BlockingIOError) else None
    return True


@contextmanager
def undisturbed() -> Iterator[None]:
    """Ctrl-C waits until what is in hand is finished; pressed once more, it does not."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pressed: list[tuple[int, FrameType | None]] = []

    def later(number: int, frame: FrameType | None) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append((number, frame))

    before = signal.signal(signal.SIGINT, later)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if pressed and callable(before):
            before(*pressed[0])
        elif pressed and before == signal.SIG_DFL:
            signal.raise_signal(signal.SIGINT)


# ---- files ------------------------------------------------------------------------------------------------------


def write(files: Mapping[Path, bytes], *, new: bool = False) -> None:
    """Write files so that each is whole or absent: drafts, flushed to disk, all put in place once all are there.

    Raises K2Error. Where they are to be `new`, nothing is replaced: Exists is raised, and none of them is there. Ctrl-C
    during it comes afterwards.
    """
    drafts: dict[Path, Path] = {}
    placed: list[Path] = []
    handles: list[int] = []
    with undisturbed():
        try:
            for path, data in files.items():
                with writing(path):
                    drafts[path], handle = new_draft(path.parent)
                    handles.append(handle)
                    with open(handle, "wb", closefd=False) as file:
                        file.write(data)
                        file.flush()
                        os.fsync(handle)
            if fcntl is None:  # Windows moves no open file
                close(handles)
            for path, draft in drafts.items():
                with writing(path):
                    place(draft, path, new=new)
                placed.append(path)
            for folder in {path.parent for path in files}:
                settle(folder)
        except K2Error:
            for path in placed if new else ():
                with suppress(OSError):
                    path.unlink()
            raise
        finally:
            for draft in drafts.values():
                with suppress(OSError):
                    draft.unlink(missing_ok=True)
            close(handles)


def place(draft: Path, path: Path, *, new: bool) -> None:
    """Give a draft its name; what is to be new gets it by a link, which never replaces anything."""
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
    """A new file, locked until it is closed, and never one that was there: that might be a link to anywhere."""
    while True:
        draft = folder / f".{os.getpid()}-{secrets.token_hex(4)}{DRAFT}"
        try:
            handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        except FileExistsError:
            continue
        if fcntl is None or (hold(handle) is not False and os.fstat(handle).st_nlink):
            return draft, handle
        os.close(handle)  # swept away in the instant before it was locked


def close(handles: list[int]) -> None:
    while handles:
        os.close(handles.pop())


def settle(folder: Path) -> None:
    """Names are part of a folder: what was put in place stays there when the power goes."""
    with suppress(OSError), opened(folder) as handle:
        os.fsync(handle)


def write_toml(path: Path, table: Mapping[str, Any]) -> None:
    write({path: dump(table)})


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the file system refuses into one sentence."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(f"The disk is full: {path} was not written.", hint="Make room, and try again.") from None
        reason = {errno.EACCES: "permission denied", errno.EROFS: "the file system is read-only"}.get(error.errno or 0)
        raise K2Error(
            f"{path} cannot be written: {reason or error.strerror}.", hint="Check the folder's permissions."
        ) from None
