"""Run folders: numbers that two processes cannot share, and files that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from model.errors import K2Error

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

RUN = "run.toml"
DRAFT = ".draft"
BLOCKED = ".blocked.toml"
NUMBER = re.compile(r"(\d{4,})(?:-|$)")


class Run:
    """outputs/0003-fox: claimed by one process, and gone again if nothing came of it.

    Used as a context manager. Left by an error with no picture saved, it removes the folder, and `outputs` if new.
    """

    def __init__(self, folder: Path, *, made: list[Path] | None = None):
        self.folder = folder
        self.made = made or []  # folders that claiming it created, outermost first
        self.handle: int | None = None

    @classmethod
    def claim(cls, outputs: Path, name: str) -> Run:
        """The next number's folder. Creating NNNN is the lock; whoever holds it looks once more for a named twin.

        A process that finds NNNN-other beside its own NNNN came second and moves on; one that finds none may rename.
        """
        made = []
        with writing(outputs):
            if not outputs.exists():
                outputs.mkdir()
                made.append(outputs)
            number = max(numbers(outputs), default=0)
            while True:
                number += 1
                lock = outputs / f"{number:04d}"
                try:
                    lock.mkdir()
                except FileExistsError:
                    continue
                if numbers(outputs).count(number) == 1:
                    break
                lock.rmdir()
            folder = outputs / f"{number:04d}-{name}"
            lock.rename(folder)
        return cls(folder, made=[*made, folder])

    @classmethod
    def last(cls, outputs: Path) -> Run | None:
        """The run with the highest number that a plan was written for."""
        runs = sorted(path.parent for path in outputs.glob(f"*/{RUN}") if NUMBER.match(path.parent.name))
        return cls(max(runs, key=number_of)) if runs else None

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.handle is not None:
            os.close(self.handle)
        if kind is not None and self.made and not any((*self.folder.glob("*.png"), *self.folder.glob(f"*{BLOCKED}"))):
            with suppress(OSError):
                (self.folder / RUN).unlink(missing_ok=True)
                for folder in reversed(self.made):
                    folder.rmdir()

    def lock(self) -> None:
        """Keep other processes from resuming this run; the lock ends with this process, however it ends."""
        if fcntl is None:
            return
        self.handle = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(self.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise K2Error(
                f"{self.folder} is being rendered by another process.", hint="Wait for it, or stop it."
            ) from None
        self.sweep()

    def __getitem__(self, name: str) -> Path:
        return self.folder / name

    def has(self, stem: str) -> bool:
        """A picture is done when both its files stand there, or was blocked; each of them is whole if it exists."""
        return (self[f"{stem}.png"].exists() and self[f"{stem}.toml"].exists()) or self[f"{stem}{BLOCKED}"].exists()

    def save(self, stem: str, picture: bytes, record: bytes) -> Path:
        """A picture and its record. The record takes its place first, so that no picture is ever without one."""
        path = self[f"{stem}.png"]
        write({self[f"{stem}.toml"]: record, path: picture})
        return path

    def block(self, stem: str, record: bytes) -> Path:
        """The record alone, of a picture that an output filter keeps back."""
        path = self[f"{stem}{BLOCKED}"]
        write({path: record})
        return path

    def sweep(self) -> None:
        """Drafts that an interrupted write left behind."""
        with suppress(OSError):
            for draft in self.folder.glob(f".*{DRAFT}"):
                draft.unlink(missing_ok=True)


def numbers(outputs: Path) -> list[int]:
    """The numbers of all run folders, one that is only just claimed included."""
    return [number_of(path) for path in outputs.iterdir() if NUMBER.match(path.name)]


def number_of(folder: Path) -> int:
    match = NUMBER.match(folder.name)
    assert match is not None, folder
    return int(match[1])


def write(files: Mapping[Path, bytes]) -> None:
    """Write files so that each is whole or absent: drafts, flushed to disk, all put in place once all are there."""
    drafts = {path: path.with_name(f".{path.name}.{os.getpid()}{DRAFT}") for path in files}
    try:
        for path, data in files.items():
            with writing(path), drafts[path].open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        for path, draft in drafts.items():
            with writing(path):
                os.replace(draft, path)
    finally:
        for draft in drafts.values():
            with suppress(OSError):
                draft.unlink(missing_ok=True)


def write_toml(path: Path, table: Mapping[str, Any]) -> None:
    write({path: dump(table)})


def dump(table: Mapping[str, Any]) -> bytes:
    """TOML of plain values; what is None is left out, as TOML knows no nothing."""
    import tomli_w

    def clean(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(key): clean(each) for key, each in value.items() if each is not None}
        return [clean(each) for each in value] if isinstance(value, list | tuple) else value

    return tomli_w.dumps(clean(table)).encode()


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the file system refuses into one sentence."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise K2Error(
                f"The disk is full: {path} was not written.", hint="Make room, then go on with: k2 render --resume"
            ) from None
        reason = {errno.EACCES: "permission denied", errno.EROFS: "the file system is read-only"}.get(error.errno or 0)
        raise K2Error(
            f"{path} cannot be written: {reason or error.strerror}.", hint="Check the folder's permissions."
        ) from None
