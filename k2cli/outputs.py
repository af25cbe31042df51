"""Run folders: numbers that no two processes share, and which of a run's pictures are done."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

from k2cli.disk import HAS_LOCKS, O_DIRECTORY, opened, remove_dead_drafts, try_lock, uninterrupted, write_files, writing
from k2cli.texts import display_safe
from model.errors import K2Error

PLAN_FILE = "run.toml"
SHEET_FILE = "sheet.png"
BLOCKED_SUFFIX = ".blocked.toml"
PICTURE_SUFFIXES = (".png", ".webp", ".jpg")  # suffixes of pictures with a record beside them
LOCK_TIMEOUT = 10.0  # seconds to wait for another process that claims a number
SWEPT_OUTPUTS: set[Path] = set()  # outputs already searched for drafts
RUN_NUMBER = re.compile(r"(\d{4,})(?:-|$)")


class Run:
    """outputs/0003-fox: claimed by one process, and removed again if nothing came of it.

    A context manager. Left by an error with no picture saved, it removes the folder, and `outputs` if new. Left by
    Ctrl-C it keeps a folder with a plan, which can be resumed.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.created: list[Path] = []  # folders that claiming it created, outermost first
        self.handle: int | None = None

    @classmethod
    def claim(cls, outputs: Path, name: str, files: Mapping[str, bytes] | None = None) -> Run:
        """The next number's folder with these files in it, locked by this process. Raises K2Error.

        Creating NNNN is the claim, and the folder gets its name once the files are there: a process killed in between
        leaves a bare number, which the next one clears away. Where file locks work, claims are made one at a time.
        Where they do not, the holder of NNNN looks once more for a named twin: a process that finds NNNN-other beside
        its own NNNN came second and moves on; one that finds none may rename.
        """
        run = cls(outputs)
        try:
            with uninterrupted(), writing(outputs):
                if not outputs.exists():
                    check_link(outputs)
                    outputs.mkdir(exist_ok=True)
                    run.created.append(outputs)
                with exclusive(outputs) as granted:
                    if granted:
                        remove_dead_claims(outputs)
                    bare = run.folder = claim_number(outputs)
                    run.created.append(bare)
                    run.lock()
                    write_files({bare / file: data for file, data in (files or {}).items()})
                    run.folder = bare.rename(outputs / f"{bare.name}-{name}")
                    run.created[-1] = run.folder
        except BaseException as error:
            run.__exit__(type(error), error, None)
            raise
        return run

    @classmethod
    def last(cls, outputs: Path, number: int | None = None) -> Run | None:
        """The planned run with the highest number, or with this one."""
        matching = [run for run in cls.planned_in(outputs) if number in (None, run_number(run.folder))]
        return matching[-1] if matching else None

    @classmethod
    def planned_in(cls, outputs: Path) -> list[Run]:
        """The runs that have a plan, by number. Links are skipped, as in `history.run_folders`. Raises K2Error like
        `check_link`."""
        check_link(outputs)
        folders = sorted(path.parent for path in outputs.glob(f"*-*/{PLAN_FILE}"))
        found = [folder for folder in folders if RUN_NUMBER.match(folder.name) and not folder.is_symlink()]
        return [cls(folder) for folder in sorted(found, key=run_number)]

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and not (issubclass(kind, KeyboardInterrupt) and self.is_planned):
            self.discard()
        self.unlock()

    def discard(self) -> None:
        """Remove its folder if claiming created it, nothing came of it, and no other process has resumed it."""
        if self.created and not self.has_results:
            with suppress(OSError, K2Error):
                self.lock()
                folders, self.created = self.created, []  # once: later its name may be another process's
                (self.folder / PLAN_FILE).unlink(missing_ok=True)
                for folder in reversed(folders):
                    folder.rmdir()

    def lock(self) -> None:
        """Keep other processes from resuming this run; the lock ends with this process, however that ends."""
        if not HAS_LOCKS or self.handle is not None:
            return
        with writing(self.folder):
            self.handle = os.open(self.folder, os.O_RDONLY)
        if try_lock(self.handle) is False:
            self.unlock()
            raise K2Error(f"{self.folder} is being rendered by another process.", hint="Wait for it, or stop it.")
        remove_dead_drafts(self.folder)

    def unlock(self) -> None:
        """Release it to others."""
        if self.handle is not None:
            os.close(self.handle)
            self.handle = None

    @property
    def is_busy(self) -> bool:
        """Whether another process is rendering it, as far as can be known."""
        if not HAS_LOCKS:
            return False
        with suppress(OSError), opened(self.folder, O_DIRECTORY) as handle:
            return try_lock(handle) is False
        return False

    def __getitem__(self, name: str) -> Path:
        return self.folder / name

    @property
    def is_planned(self) -> bool:
        """Whether it can be resumed: it has a plan and its final name."""
        return self[PLAN_FILE].exists() and not self.folder.name.isdigit()

    @property
    def has_results(self) -> bool:
        """Whether any picture exists or was blocked."""
        return any(made for end in (*PICTURE_SUFFIXES, BLOCKED_SUFFIX) for made in self.folder.glob(f"*{end}"))

    def is_done(self, stem: str) -> bool:
        """Whether a picture is done: both its files exist, or it was blocked. A file that exists is complete."""
        return (self.picture_path(stem).exists() and self[f"{stem}.toml"].exists()) or self[
            f"{stem}{BLOCKED_SUFFIX}"
        ].exists()

    def picture_path(self, stem: str) -> Path:
        """A picture's path, in whichever format; if there is none, its path as a PNG."""
        names = [self[f"{stem}{suffix}"] for suffix in PICTURE_SUFFIXES]
        return next((path for path in names if path.exists()), names[0])

    def save(self, stem: str, picture: bytes, record: bytes, suffix: str = ".png") -> Path:
        """Save a picture and its record. The record appears first, so that no picture is ever without one."""
        path = self[f"{stem}{suffix}"]
        write_files({self[f"{stem}.toml"]: record, path: picture})
        return path

    def save_blocked(self, stem: str, record: bytes) -> Path:
        """Save the record alone, of a picture that an output filter blocked."""
        path = self[f"{stem}{BLOCKED_SUFFIX}"]
        write_files({path: record})
        return path


def picture_for(file: Path) -> Path:
    """The picture itself, or the one beside a record."""
    return Run(file.parent).picture_path(file.stem) if file.suffix == ".toml" else file


def row_label(row: str, prompt: str) -> str:
    """A sheet's row without the prompt: in older plans it is the prompt, or starts with it."""
    return "" if row == prompt else row.removeprefix(f"{prompt} · ")


def check_link(outputs: Path) -> None:
    """Raises K2Error if it is a broken link, as to an unmounted drive, which may hold earlier runs."""
    with suppress(OSError):  # no permission, which is reported on listing it
        if outputs.is_symlink() and not outputs.exists():
            target = display_safe(os.readlink(outputs))
            raise K2Error(f"{outputs} links to {target}, which does not exist.", hint="Is its drive mounted?")


def claim_number(outputs: Path) -> Path:
    """A new folder NNNN, which no other process has made or named."""
    number = max(run_numbers(outputs), default=0)
    while True:
        number += 1
        bare = outputs / f"{number:04d}"
        try:
            bare.mkdir()
        except FileExistsError:
            continue
        if run_numbers(outputs).count(number) == 1:
            return bare
        bare.rmdir()


def run_numbers(outputs: Path) -> list[int]:
    """The numbers of all run folders, including one just claimed."""
    return [run_number(path) for path in outputs.iterdir() if RUN_NUMBER.match(path.name)]


def run_number(folder: Path) -> int:
    match = RUN_NUMBER.match(folder.name)
    assert match is not None, folder
    return int(match[1])


# ---- what a killed process leaves, and who may remove it ---------------------------------------------------------


def remove_dead_claims(outputs: Path) -> None:
    """Remove numbers that dead processes claimed but never named, and, once per process, their drafts in all runs:
    a process that claims run after run would otherwise search thousands of folders for each.

    Only while `exclusive`: a living process that claims a number holds `outputs` until it has named it.
    """
    if not HAS_LOCKS:
        return
    swept = outputs in SWEPT_OUTPUTS
    SWEPT_OUTPUTS.add(outputs)
    names = [name for name in os.listdir(outputs) if RUN_NUMBER.match(name) and not (swept and "-" in name)]
    for folder in [path for name in names if not (path := outputs / name).is_symlink()]:
        remove_dead_drafts(folder)
        if folder.name.isdigit():
            with suppress(OSError), opened(folder, O_DIRECTORY) as handle:
                if set(os.listdir(handle)) <= {PLAN_FILE} and try_lock(handle):
                    (folder / PLAN_FILE).unlink(missing_ok=True)
                    folder.rmdir()


@contextmanager
def exclusive(folder: Path) -> Iterator[bool]:
    """One process at a time -> whether that is granted: not where locks do not work, nor if the holder hangs."""
    if not HAS_LOCKS:
        yield False
        return
    deadline = time.monotonic() + LOCK_TIMEOUT
    with opened(folder, O_DIRECTORY) as handle:
        while (granted := try_lock(handle)) is False and time.monotonic() < deadline:
            time.sleep(0.01)
        yield bool(granted)
