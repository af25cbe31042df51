"""The hashes by which records identify files, each computed once, and the folders that cache them. Needs no torch."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import cache
from pathlib import Path
from stat import S_ISDIR
from typing import TYPE_CHECKING

from model.atomic import atomic_write
from model.errors import K2Error

if TYPE_CHECKING:
    from model.spec import RenderSpec

PEFT_WEIGHTS, PEFT_SETTINGS = "adapter_model.safetensors", "adapter_config.json"
MIN_CACHED_SIZE = 1 << 28  # file size from which a hash is worth caching on disk


class Hashes:
    """sha256 of a model's files as loaded, computed in the background; the first record waits for them."""

    def __init__(self, files: Iterable[Path], roots: Sequence[Path]):
        """roots: the model's folder, then that of the other parts; names are relative to the first with the file."""
        under = ((next(root for root in (*roots, file.parent) if file.is_relative_to(root)), file) for file in files)
        self._files = {file.relative_to(root).as_posix(): file for root, file in under}
        self._watched = HeldFiles(self._files)
        self._found: Future[dict[str, str]] = Future()
        threading.Thread(target=self._work, daemon=True).start()  # a pool's thread would keep the process alive

    def _work(self) -> None:
        try:
            self._found.set_result({name: sha256(file) for name, file in self._files.items()})
        except BaseException as error:
            self._found.set_exception(error)

    def by_name(self) -> dict[str, str]:
        """File name -> hash. Raises K2Error if a file could not be read, or was overwritten in place, since its pages
        may be mapped. Replacing the file is fine: the old one stays open."""
        found = self._found.result()
        for name in self._watched.changed():
            if sha256(file := self._files[name]) != found[name]:
                raise K2Error(f"{file} was overwritten after it had been loaded.", hint="Start again.")
        return dict(found)


class HeldFiles:
    """Files kept open, so that each stays the same file even if its path gets another."""

    def __init__(self, files: Mapping[str, Path]):
        self._open: dict[str, int] = {}
        weakref.finalize(self, close, self._open)
        for name, path in files.items():
            with suppress(OSError):
                self._open[name] = os.open(path, os.O_RDONLY)
        self._stamps = {name: stamp(file) for name, file in self._open.items()}

    def changed(self) -> Iterator[str]:
        """Those that seem to have been written to."""
        return (name for name, file in self._open.items() if stamp(file) != self._stamps[name])


def close(files: Mapping[str, int]) -> None:
    for file in files.values():
        os.close(file)


def stamp(file: int) -> tuple[int, int]:
    """Size and modification time, which change when an open file is written to."""
    stat = os.fstat(file)
    return stat.st_size, stat.st_mtime_ns


def sha256(path: Path) -> str:
    """A file's hash, cached while the file is unchanged. Raises K2Error."""
    try:
        stat = path.stat()
        return _sha256(path, stat.st_size, stat.st_mtime_ns)
    except OSError as error:
        raise K2Error(f"{path} cannot be read: {error.strerror}.") from None


def identity(path: Path) -> str:
    """What identifies a file's part in a picture: its hash; for an adapter with settings beside it, the hash of both
    hashes. Raises K2Error."""
    settings = peft_settings_file(path)
    if settings is None:
        return sha256(path)
    return hashlib.sha256(f"{sha256(path)} {sha256(settings)}".encode()).hexdigest()


def peft_settings_file(path: Path) -> Path | None:
    """PEFT's adapter_config.json, which states the scale of the weights beside it."""
    file = path.with_name(PEFT_SETTINGS)
    return file if path.name == PEFT_WEIGHTS and file.is_file() else None


def spec_files(spec: RenderSpec) -> set[Path]:
    """The files a picture depends on, besides the model: references, init image, mask, and adapters with their
    settings."""
    found = {reference.image for style in spec.styles for reference in style.references}
    found |= {path for path in (spec.init_image, spec.mask) if isinstance(path, Path)}
    adapters = {style.lora for style in spec.styles if style.lora} | {lora.path for lora in spec.loras}
    return found | adapters | {settings for path in adapters if (settings := peft_settings_file(path))}


@cache
def _sha256(path: Path, size: int, changed: int) -> str:
    if size < MIN_CACHED_SIZE:
        return digest(path)
    key, known = f"{path.resolve()} {size} {changed}", read_cache()
    if key not in known:
        known[key] = digest(path)
        write_cache(known)
    return known[key]


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cache_folder() -> Path:
    """Where k2 caches what takes time to compute again."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "k2"
    except RuntimeError:  # a user without name or home, as in a container run by user id
        return temporary_folder()


@cache
def temporary_folder() -> Path:
    """A private folder of this user in the shared temporary folder; if another user owns it, one for this run only."""
    user = os.getuid() if hasattr(os, "getuid") else 0
    folder = Path(tempfile.gettempdir()) / f"k2-{user}"
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    about = folder.lstat()
    private = S_ISDIR(about.st_mode) and about.st_uid == user and not about.st_mode & 0o077
    return folder if private else Path(tempfile.mkdtemp(prefix="k2-"))


def cache_file() -> Path:
    """The file that caches hashes of large files between runs."""
    return cache_folder() / "sha256.json"


def read_cache() -> dict[str, str]:
    try:
        known = json.loads(cache_file().read_text("utf-8"))
        return known if isinstance(known, dict) else {}
    except (OSError, ValueError):
        return {}


def write_cache(known: dict[str, str]) -> None:
    """Best effort: an unwritable home only costs time."""
    path = cache_file()
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as draft:
            draft.write_text(json.dumps(known), "utf-8")
