"""Weights from the hub: only the files needed, disk space checked first, every byte verified, and never a pickle.

The hub's client lists the files and handles access, and its transport fetches the bytes. But it forgets an interrupted
download, and compares lengths although the hub gives hashes; with files of 26 GB both matter. So resuming, checking and
placing are done here, in the client's own cache and layout, where every tool that uses it finds the files too.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from k2cli import licence
from k2cli.disk import signals_as_ctrl_c
from k2cli.pull_errors import hub_errors
from k2cli.texts import UNPRINTABLE, WINDOWS_DEVICE, display_safe
from model import library
from model.atomic import atomic_write
from model.errors import K2Error, listed

NEEDED_FILES = (
    "*.safetensors",
    "*.gguf",
    "*.json",
    "*.jinja",
    "*merges.txt",
    "*vocab.txt",
)  # no pickle, no code, no pictures
LICENCE_FILES = ("LICEN[CS]E*", "NOTICE*")  # kept beside the weights
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
HASH = re.compile(r"[0-9a-f]{64}|[0-9a-f]{40}")  # sha256 of a large file, git's object id of a small one
UNSAFE_NAME = re.compile(rf"[\\\\:]|{UNPRINTABLE.pattern}")  # on Windows C:x is on another drive, joined or not
COMMIT = re.compile(r"[0-9a-f]{40}")
MIN_FREE_BYTES = 1 << 28  # bytes to leave free on the disk

OnProgress = Callable[[str, int], None]  # (what is being done, bytes of the whole pull present so far)


@dataclass(frozen=True)
class RepoFile:
    """A file in a repository. `etag` is its sha256, or git's object id if it is small."""

    name: str
    size: int
    etag: str

    def __post_init__(self) -> None:
        parts = self.name.split("/")
        strange = UNSAFE_NAME.search(self.name) or any(
            part in ("", ".", "..") or WINDOWS_DEVICE.match(part) for part in parts
        )
        if not HASH.fullmatch(self.etag) or strange:
            raise K2Error(f'The hub lists a file that does not belong in a repository: "{display_safe(self.name)}".')


@dataclass(frozen=True)
class PullPlan:
    """What to pull: these files of this commit."""

    repo: str
    revision: str  # as asked for: a branch, a tag or a commit
    commit: str
    licence: str | None  # as the model card names it
    files: tuple[RepoFile, ...]

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def folder(self) -> Path:
        return library.repo_folder(self.repo)

    @property
    def snapshot(self) -> Path:
        return self.folder / "snapshots" / self.commit


def plan_pull(name: str, revision: str | None = None, include: Sequence[str] = ()) -> PullPlan:
    """Ask the hub for its files, and choose. `name` is an official model's name or a hub id; K2Error if neither."""
    found = library.parse_hub_name(name)
    if found is None:
        known = ", ".join(library.OFFICIAL)
        raise K2Error(
            f'"{display_safe(name)}" is not the name of a model on the hub.', hint=f"Like ORG/NAME, or {known}."
        )
    repo, at, file = found
    revision = revision or at or "main"
    if ".." in revision or revision.startswith("/"):
        raise K2Error(
            f'"{display_safe(revision)}" is not the name of a revision.', hint="Give a branch, a tag or a commit."
        )
    with hub_errors(repo, revision):
        from huggingface_hub import HfApi, constants
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError

        try:
            api, wait = HfApi(library_name="k2"), constants.HF_HUB_ETAG_TIMEOUT  # seconds
            info = api.model_info(repo, revision=revision, files_metadata=True, timeout=wait)
            listed = {each.rfilename: each for each in info.siblings or []}
        except HFValidationError:
            raise K2Error(f'"{repo}" is not the name of a model on the hub.', hint="Names are like ORG/NAME.") from None
        except HfHubHTTPError:
            raise
        except UnicodeEncodeError:  # in a header, of which only the token comes from the user
            raise K2Error("HF_TOKEN contains a character that no token has.", hint="Copy it again.") from None
        except (ValueError, KeyError, TypeError):
            raise K2Error(f"{constants.ENDPOINT} does not answer like a hub.", hint="Check HF_ENDPOINT.") from None
    sizes = {each.rfilename: each.size or 0 for each in listed.values() if not is_manifest(each.rfilename)}
    chosen = choose_files(sizes, [file] if file else include, repo)
    if not COMMIT.fullmatch(info.sha or ""):
        raise K2Error(f"{constants.ENDPOINT} does not say which commit it serves.", hint="Check HF_ENDPOINT.")
    hashes = {name: each.lfs.sha256 if each.lfs else each.blob_id or "" for name, each in listed.items()}
    files = tuple(RepoFile(each, sizes[each], hashes[each]) for each in chosen)
    return PullPlan(repo, revision, info.sha or "", stated_licence(info), files)


def is_manifest(name: str) -> bool:
    """Whether a file has the name of k2's manifest, ignoring case, as some file systems do."""
    return name.rpartition("/")[2].casefold() == library.MANIFEST


def choose_files(sizes: dict[str, int], include: Sequence[str], repo: str) -> list[str]:
    """The files to pull: those that match `include`, else a pipeline's folders, else the only weights present."""

    def any_of(name: str, patterns: Sequence[str]) -> bool:
        return any(fnmatch(name, pattern) for pattern in patterns)

    terms = [name for name in sizes if any_of(name, LICENCE_FILES)]
    safe = [name for name in sizes if any_of(name, NEEDED_FILES)]
    weights = [name for name in safe if name.endswith(library.WEIGHT_SUFFIXES)]
    listing = ", ".join(f"{name} ({format_size(sizes[name])})" for name in sorted(weights)[:12])
    if not weights:
        pickled = any(name.endswith(PICKLE_SUFFIXES) for name in sizes)
        raise K2Error(
            f"{repo} holds no .safetensors file{', only pickles, which can run code' if pickled else ''}.",
            hint="k2 reads weights from .safetensors and .gguf files only.",
        )
    if include:
        safe = [name for name in safe if any_of(name, include)]
        if not any(name in weights for name in safe):
            raise K2Error(f"{repo} has no weights that match {listed(list(include), 3)}.", hint=f"It has: {listing}.")
    elif "model_index.json" in sizes:  # weights outside the pipeline's folders duplicate the network
        safe = [name for name in safe if "/" in name or name not in weights]
    elif len({library.SHARD.sub("", name) for name in weights}) > 1:
        raise K2Error(f"{repo} holds several models.", hint=f"Choose with --include: {listing}.")
    return sorted({*terms, *safe})


def stated_licence(info: Any) -> str | None:
    """The licence that a model card states; Krea's if the weights are Krea's or derived from them."""
    card = info.card_data
    stated = getattr(card, "license_name", None) or getattr(card, "license", None)
    bases = getattr(card, "base_model", None) or []
    kin = {info.id, *([bases] if isinstance(bases, str) else bases)}
    return (
        library.KREA_2_LICENCE
        if kin & set(library.OFFICIAL.values())
        else display_safe(str(stated))
        if stated
        else None
    )


def fetch(plan: PullPlan, on_progress: OnProgress = lambda what, done: None) -> Path:
    """Fetch a plan's files, resuming an earlier pull. Returns the model's folder, or its single file.

    A file gets its name once its hash is right. When this raises K2Error, all intact data received so far is kept.
    """
    with hub_errors(plan.repo, plan.revision), exclusive(plan):
        check_disk_space(plan)
        write_manifest(plan)
        here = 0
        for file in plan.files:
            blob = plan.folder / "blobs" / file.etag
            if not (blob.exists() and matches_hash(blob, file, partial(on_progress, f"checking {file.name}", here))):
                blob.unlink(missing_ok=True)
                link_cached(blob, file)
                download(plan, file, blob, on_progress, here)
            link_blob(blob, plan.snapshot / file.name)
            here += file.size
            on_progress(file.name, here)
        if plan.revision != plan.commit:
            ref = plan.folder / "refs" / plan.revision
            ref.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(ref) as draft:
                draft.write_text(plan.commit, "utf-8")
    return library.main_weights(plan.snapshot)


def download(plan: PullPlan, file: RepoFile, blob: Path, on_progress: OnProgress, before: int) -> None:
    """Fetch one file into the cache, resuming from where an earlier try stopped."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    incomplete = partial_path(blob)
    received = incomplete.stat().st_size if incomplete.exists() else 0
    if received > file.size:
        incomplete.unlink()
        received = 0
    headers = build_hf_headers(library_name="k2") | {"Accept-Encoding": "identity"}
    with incomplete.open("ab") as out:
        counted: Any = ProgressFile(out, lambda size: on_progress(file.name, before + size))
        http_get(
            hf_hub_url(plan.repo, file.name, revision=plan.commit),
            counted,
            resume_size=received,
            headers=headers,
            expected_size=file.size,
        )
        out.flush()
        os.fsync(out.fileno())
    if not matches_hash(incomplete, file, partial(on_progress, f"checking {file.name}", before + file.size)):
        incomplete.unlink()
        raise K2Error(
            f"{file.name} arrived damaged and was deleted: its hash is not the one that the hub states.",
            hint="Pull again. If that fails too, HF_ENDPOINT or a proxy serves a different file.",
        )
    incomplete.replace(blob)


class ProgressFile:
    """A file that reports its size after every write."""

    def __init__(self, file: BinaryIO, on_size: Callable[[int], None]):
        self.file, self.on_size = file, on_size

    def write(self, data: bytes) -> int:
        written = self.file.write(data)
        self.on_size(self.file.tell())
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def matches_hash(path: Path, file: RepoFile, on_start: Callable[[], None]) -> bool:
    """Whether the bytes match the hub's hash: a sha256, or git's object id."""
    if path.stat().st_size != file.size:
        return False
    on_start()
    digest = hashlib.sha256() if len(file.etag) == 64 else hashlib.sha1(f"blob {file.size}\0".encode())
    with path.open("rb") as source:
        while chunk := source.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest() == file.etag


def partial_path(blob: Path) -> Path:
    return blob.with_name(f"{blob.name}.incomplete")


def cached_copies(file: RepoFile) -> Iterator[Path]:
    """The same file in other cached repositories: Raw and Turbo share everything but the transformer."""
    for path in library.hub_cache().glob(f"models--*/blobs/{file.etag}"):
        if path.is_file() and path.stat().st_size == file.size:
            yield path.resolve()


def link_cached(blob: Path, file: RepoFile) -> None:
    """Start from a twin's bytes, if there is one and the file system can share them."""
    if not partial_path(blob).exists():
        for twin in cached_copies(file):
            with suppress(OSError):
                os.link(twin, partial_path(blob))
                return


def link_blob(blob: Path, path: Path) -> None:
    """Give a verified file its name, as the hub's client does: by a link if the file system has links."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and path.samefile(blob):
        return
    path.unlink(missing_ok=True)
    try:
        path.symlink_to(os.path.relpath(blob, path.parent))
    except OSError:
        try:
            os.link(blob, path)
        except OSError:
            shutil.copyfile(blob, path)


def write_manifest(plan: PullPlan) -> None:
    """List what the snapshot will hold; files from an earlier pull of the same commit stay listed."""
    table = {
        "repo": plan.repo,
        "revision": plan.revision,
        "commit": plan.commit,
        "licence": plan.licence,
        "pulled": datetime.now(UTC).isoformat(timespec="seconds"),
        "files": library.read_manifest(plan.snapshot).get("files", {})
        | {
            file.name: {"bytes": file.size, "sha256" if len(file.etag) == 64 else "git": file.etag}
            for file in plan.files
        },
    }
    for folder in (plan.snapshot, plan.folder / "blobs"):
        folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(plan.snapshot / library.MANIFEST) as draft:
        draft.write_text(json.dumps(table, indent=1), "utf-8")


def check_disk_space(plan: PullPlan) -> None:
    """Refuse a pull that does not fit on the disk before its first byte. Data from an earlier try counts as present."""
    need = 0
    for file in plan.files:
        blob = plan.folder / "blobs" / file.etag
        here = (path for path in (blob, partial_path(blob), *cached_copies(file)) if path.exists())
        have = next((path.stat().st_size for path in here), 0)
        need += max(file.size - have, 0)
    disk = next(path for path in (plan.folder, *plan.folder.parents) if path.exists())
    free = shutil.disk_usage(disk).free
    if need and need + MIN_FREE_BYTES > free:
        raise K2Error(
            f"{plan.repo} needs {format_size(need)} more, but the disk of {disk} has {format_size(free)} free.",
            hint="Free some space, or set HF_HOME to a folder on a larger disk.",
        )


@contextmanager
def exclusive(plan: PullPlan) -> Iterator[None]:
    """Keep two pulls from writing to the same file."""
    from filelock import FileLock, Timeout

    path = library.hub_cache() / ".locks" / plan.folder.name / "k2-pull.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise K2Error(f"Another process is pulling {plan.repo}.", hint="Wait for it, or stop it.") from None
    try:
        yield
    finally:
        lock.release()


def is_offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def pull(
    name: str, revision: str | None = None, include: Sequence[str] = (), *, accept: bool = False, quiet: bool = False
) -> library.Model:
    """`k2 models pull`: from the licence to the last byte, with a bar on a terminal. Raises K2Error."""
    full_name = f"{name}@{revision}" if revision else name
    if is_offline() and (cached := library.find(full_name)):
        licence.require_accepted(cached.licence, name, yes=accept)
        return cached
    plan = plan_pull(name, revision, include)
    licence.require_accepted(plan.licence, name, yes=accept)
    with signals_as_ctrl_c(), progress_bar(plan.size, quiet=quiet) as on_progress:
        path = fetch(plan, on_progress)
    manifest = library.read_manifest(plan.snapshot)
    return library.Model(name, path, "hub", library.detect_variant(path), plan.commit, manifest)


@contextmanager
def progress_bar(total: int, *, quiet: bool) -> Iterator[OnProgress]:
    """Progress in bytes over the whole pull, on a terminal only."""
    from k2cli.console import console

    if quiet or not console.is_terminal:
        yield lambda what, done: None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(28), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(compact=True))
    with Progress(
        *columns, TextColumn("{task.description}", markup=False), console=console, transient=True
    ) as progress:
        task = progress.add_task("", total=total)
        yield lambda what, done: progress.update(task, description=what, completed=done)


def format_size(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
