"""Pulling from a server on this machine that talks like the hub and misbehaves like a network."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import StringIO
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
from huggingface_hub import constants
from rich.console import Console
from tiny import tiny, tiny_box  # noqa: F401

from k2cli import expander, hub, licence, moodboard
from model import library
from model.moodboard import Board

REPO = "krea/Krea-2-Turbo"
SHARDS = [f"transformer/diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
MAIN, OLD = "a" * 40, "b" * 40


def weights(seed: int, size: int = 200_000) -> bytes:
    """A safetensors file of noise."""
    header = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    return len(header).to_bytes(8, "little") + header + Random(seed).randbytes(size)


def etag(content: bytes) -> str:
    """The hub's id of a file: the sha256 of large ones, git's object id of small ones."""
    if len(content) > 1000:
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


PIPELINE = {
    "README.md": b"# A card",
    "LICENSE.pdf": b"%PDF the licence",
    "model_index.json": b'{"_class_name": "Krea2Pipeline", "is_distilled": true}',
    "transformer/config.json": b'{"_class_name": "Krea2Transformer2DModel"}',
    SHARDS[0]: weights(1),
    SHARDS[1]: weights(2),
    "text_encoder/model.safetensors": weights(3),
    "text_encoder/pytorch_model.bin": b"\x80\x02a pickle",
    "tokenizer/merges.txt": b"a b\n",
    "vae/helper.py": b"print('code')",
    "turbo.safetensors": weights(1, 400_000),  # the transformer once more
}
NEEDED = {"LICENSE.pdf", "model_index.json", "transformer/config.json", *SHARDS} | {
    "text_encoder/model.safetensors",
    "tokenizer/merges.txt",
}


@dataclass
class Hub:
    """The repositories that a server offers, how it behaves, and what it was asked for."""

    url: str = ""
    repos: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)  # repo -> commit -> name -> bytes
    refs: dict[str, str] = field(default_factory=lambda: {"main": MAIN, "v1": OLD})
    card: dict[str, Any] = field(default_factory=dict)
    cut: Counter[str] = field(default_factory=Counter)  # file -> how many answers break off halfway
    damaged: set[str] = field(default_factory=set)
    refuse: Callable[[str], tuple[int, dict[str, str]] | None] = lambda path: None
    asked: list[tuple[str, str, str]] = field(default_factory=list)  # (path, Range, Authorization)

    def gets(self, name: str) -> list[str]:
        """The ranges in which a file was requested."""
        return [span for path, span, _ in self.asked if path.endswith(f"/{name}") and "/resolve/" in path]

    @property
    def files(self) -> set[str]:
        return {path.split("/", 5)[5] for path, _, _ in self.asked if "/resolve/" in path}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        hub = self.hub
        hub.asked.append((path, self.headers.get("Range", ""), self.headers.get("Authorization", "")))
        if refusal := hub.refuse(path):
            return self.answer(refusal[0], b'{"error": "no"}', refusal[1])
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            whole = "blobs" in urlsplit(self.path).query
            return self.info("/".join(parts[2:4]), parts[5] if parts[4:5] == ["revision"] else "main", whole)
        if parts[2:3] == ["resolve"]:
            repo, name = "/".join(parts[:2]), "/".join(parts[4:])
            commit = hub.refs.get(parts[3], parts[3])
            content = hub.repos[repo][commit][name]
            about = {"X-Repo-Commit": commit, "ETag": f'"{etag(content)}"'}
            if len(content) > 1000:  # large files are on another host, which must not get the token
                other = f"http://localhost:{self.server.server_address[1]}/cdn/{etag(content)}/{name}"
                about |= {"X-Linked-Etag": about["ETag"], "X-Linked-Size": str(len(content)), "Location": other}
                return self.answer(302, b"", about)
            return self.send(name, content, about)
        if parts[:1] == ["cdn"]:
            contents = [each for commits in hub.repos.values() for files in commits.values() for each in files.values()]
            return self.send("/".join(parts[2:]), next(each for each in contents if etag(each) == parts[1]), {})
        self.answer(404, b"{}")

    do_HEAD = do_GET

    def info(self, repo: str, revision: str, whole: bool) -> None:
        """The list of files; sizes and hashes only if `whole`."""
        commits = self.hub.repos.get(repo)
        if commits is None:
            return self.answer(401, b"{}", {"X-Error-Code": "RepoNotFound"})
        commit = self.hub.refs.get(revision, revision)
        if commit not in commits:
            return self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        siblings = []
        for name, content in commits[commit].items():
            entry: dict[str, Any] = {"rfilename": name}
            if whole:
                entry |= {"size": len(content), "blobId": etag(content)}
            if whole and len(content) > 1000:
                entry["lfs"] = {"size": len(content), "sha256": etag(content), "pointerSize": 134}
            siblings.append(entry)
        about = {"id": repo, "sha": commit, "siblings": siblings, "cardData": self.hub.card, "tags": []}
        self.answer(200, json.dumps(about).encode(), {"Content-Type": "application/json"})

    def send(self, name: str, content: bytes, about: dict[str, str]) -> None:
        if name in self.hub.damaged:
            content = content[:-1] + bytes([content[-1] ^ 1])
        span = self.headers.get("Range")
        start = int(span.removeprefix("bytes=").rstrip("-")) if span else 0
        body = content[start:]
        headers = about | {"Content-Length": str(len(body))}
        if span:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        if self.hub.cut[name] > 0:
            self.hub.cut[name] -= 1
            body = body[: len(body) // 2]
            self.close_connection = True
        self.answer(206 if span else 200, body, headers)

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    state = Hub(repos={REPO: {MAIN: dict(PIPELINE), OLD: PIPELINE | {SHARDS[0]: weights(9)}}})
    handler = type("Bound", (Handler,), {"hub": state})
    running = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    running.daemon_threads = True
    monkeypatch.setattr(running, "handle_error", lambda *_: None)  # of clients that hang up
    threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    state.url = f"http://127.0.0.1:{running.server_address[1]}"
    yield state
    running.shutdown()
    running.server_close()


@pytest.fixture
def hf(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """This process's hub client, pointed at the server and at a cache of its own; the licence is accepted."""
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 12)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between attempts
    for name, value in environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    licence.accept(licence.KREA_2)
    return server


def environment(folder: Path) -> dict[str, str]:
    return {"HF_HOME": str(folder / "hf"), "XDG_CONFIG_HOME": str(folder / "config"), "HF_TOKEN": "hf_secret"}


def cached(repo: str = REPO) -> list[str]:
    """The suffixes of what a repository's cache holds under blobs."""
    return sorted(path.name.partition(".")[2] for path in (library.repo_folder(repo) / "blobs").iterdir())


def test_pull_fetches_only_what_is_needed(hf: Hub, k2):
    result = k2("models", "pull", "krea-2-turbo")

    snapshot = Path(result.stdout.strip())
    assert snapshot == library.locate("krea-2-turbo") == library.locate("krea-2") == library.locate(REPO)
    assert hf.files == NEEDED
    assert {str(path.relative_to(snapshot)) for path in snapshot.rglob("*") if path.is_file()} == NEEDED | {
        library.MANIFEST
    }
    assert all((snapshot / name).read_bytes() == PIPELINE[name] for name in NEEDED)
    manifest = library.read_manifest(snapshot)
    assert (manifest["commit"], manifest["revision"], manifest["licence"]) == (MAIN, "main", library.KREA_2_LICENCE)
    assert manifest["files"][SHARDS[0]]["sha256"] == etag(PIPELINE[SHARDS[0]])
    model = library.find("krea-2-turbo")
    assert (model.variant, model.revision, model.licence) == ("turbo", MAIN, library.KREA_2_LICENCE)
    assert [each.name for each in library.list_models() if each.source == "hub"] == ["krea-2-turbo"]


def test_token_goes_only_to_the_hub(hf: Hub, k2):
    k2("models", "pull", "krea-2-turbo")

    tokens = {path.startswith("/cdn/"): token for path, _, token in hf.asked}
    assert tokens == {False: "Bearer hf_secret", True: ""}


def test_other_tools_find_pulled_files(hf: Hub, k2):
    k2("models", "pull", "krea-2-turbo")

    cache = library.hub_cache()
    found = huggingface_hub.hf_hub_download(REPO, SHARDS[1], cache_dir=cache, local_files_only=True)
    assert Path(found).read_bytes() == PIPELINE[SHARDS[1]]
    (repo,) = huggingface_hub.scan_cache_dir(cache).repos
    assert [(revision.commit_hash, revision.refs) for revision in repo.revisions] == [(MAIN, {"main"})]


def test_files_pulled_by_other_tools_are_found(hf: Hub, k2):
    assert library.find(REPO) is None
    for name in ("model_index.json", SHARDS[0], SHARDS[1]):
        huggingface_hub.hf_hub_download(REPO, name, cache_dir=library.hub_cache())

    model = library.find("krea-2-turbo")
    assert model is not None and model.path.name == MAIN and model.licence == library.KREA_2_LICENCE


@pytest.mark.parametrize("name", [library.MANIFEST, library.MANIFEST.upper().replace("JSON", "json")])
@pytest.mark.parametrize("pulled", [True, False])
def test_manifest_in_a_repository_is_ignored(hf: Hub, k2, name, pulled):
    """It could claim any licence and any hashes."""
    forged = json.dumps({"repo": REPO, "commit": MAIN, "licence": "mit", "files": {}}).encode()
    hf.repos[REPO][MAIN][name] = forged
    if pulled:
        k2("models", "pull", "krea-2-turbo")
        manifest = library.read_manifest(library.repo_folder(REPO) / "snapshots" / MAIN)
        assert set(manifest["files"]) == NEEDED
    else:
        for each in ("model_index.json", name, *SHARDS):
            huggingface_hub.hf_hub_download(REPO, each, cache_dir=library.hub_cache())

    assert library.find("krea-2-turbo").licence == library.KREA_2_LICENCE


def test_the_bar_counts_bytes(monkeypatch):
    screen = Console(file=StringIO(), force_terminal=True, width=120)
    monkeypatch.setattr("k2cli.console.console", screen)

    with hub.progress_bar(2_000_000, quiet=False) as watch:
        watch("[bold]turbo.safetensors", 1_000_000)

    assert "1.0/2.0 MB" in screen.file.getvalue() and "[bold]turbo.safetensors" in screen.file.getvalue()


def test_progress_covers_the_whole_pull(hf: Hub):
    plan, seen = hub.plan_pull("krea-2-turbo"), []
    hub.fetch(plan, lambda what, done: seen.append(done))

    assert seen == sorted(seen) and seen[-1] == plan.size == sum(len(PIPELINE[name]) for name in NEEDED)
    assert len(set(seen)) > 2 * len(NEEDED)  # not only at the ends of files


def test_second_pull_only_repairs_damage(hf: Hub, k2):
    snapshot = Path(k2("models", "pull", "krea-2-turbo").stdout.strip())
    hf.asked.clear()
    assert k2("models", "pull", "krea-2-turbo").stdout.strip() == str(snapshot)
    assert hf.files == set()

    blob = (snapshot / SHARDS[0]).resolve()
    blob.write_bytes(bytes(len(PIPELINE[SHARDS[0]])))
    k2("models", "pull", "krea-2-turbo")
    assert hf.files == {SHARDS[0]}
    assert (snapshot / SHARDS[0]).read_bytes() == PIPELINE[SHARDS[0]]


def test_dropped_connection_is_resumed(hf: Hub, k2):
    hf.cut[SHARDS[0]] = 2

    k2("models", "pull", "krea-2-turbo")

    first, second, third = hf.gets(SHARDS[0])
    assert first == "" and 0 < int(second[6:-1]) < int(third[6:-1]) < len(PIPELINE[SHARDS[0]])
    assert library.locate("krea-2-turbo").joinpath(SHARDS[0]).read_bytes() == PIPELINE[SHARDS[0]]


def test_interrupted_pull_is_resumed_by_the_next(hf: Hub, k2):
    hf.cut[SHARDS[1]] = 1
    hf.refuse = lambda path: (503, {}) if path.endswith(SHARDS[1]) and len(hf.gets(SHARDS[1])) > 1 else None

    result = k2("models", "pull", "krea-2-turbo", code=1)

    assert "reports an error (503)" in result.stderr and "What has arrived is kept" in result.stderr
    assert library.locate("krea-2-turbo") is None
    assert all(model.source == "box" for model in library.list_models())
    (partial,) = library.repo_folder(REPO).glob("blobs/*.incomplete")
    have = partial.stat().st_size
    assert 0 < have < len(PIPELINE[SHARDS[1]])

    hf.refuse = lambda path: None
    hf.asked.clear()
    k2("models", "pull", "krea-2-turbo")
    assert hf.gets(SHARDS[1]) == [f"bytes={have}-"]
    assert SHARDS[0] not in hf.files
    assert library.locate("krea-2-turbo").joinpath(SHARDS[1]).read_bytes() == PIPELINE[SHARDS[1]]
    assert "incomplete" not in cached()


def test_wrong_hash_is_discarded_and_reported(hf: Hub, k2):
    hf.damaged = {SHARDS[0]}

    result = k2("models", "pull", "krea-2-turbo", code=1)

    assert f"{SHARDS[0]} arrived damaged" in result.stderr and "Pull again" in result.stderr
    assert library.locate("krea-2-turbo") is None and "incomplete" not in cached()
    hf.damaged = set()
    k2("models", "pull", "krea-2-turbo")
    assert library.locate("krea-2-turbo")


def test_damaged_partial_file_is_detected(hf: Hub, k2):
    """An .incomplete file need not be the beginning of this one."""
    partial = library.repo_folder(REPO) / "blobs" / f"{etag(PIPELINE[SHARDS[0]])}.incomplete"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(b"x" * 1000)

    assert "arrived damaged" in k2("models", "pull", "krea-2-turbo", code=1).stderr
    k2("models", "pull", "krea-2-turbo")
    assert hf.gets(SHARDS[0]) == ["bytes=1000-", ""]


def test_overlong_partial_file_is_discarded(hf: Hub, k2):
    partial = library.repo_folder(REPO) / "blobs" / f"{etag(PIPELINE[SHARDS[0]])}.incomplete"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(bytes(len(PIPELINE[SHARDS[0]]) + 1))

    k2("models", "pull", "krea-2-turbo")
    assert hf.gets(SHARDS[0]) == [""]


def test_small_files_are_checked_too(hf: Hub, k2):
    hf.damaged = {"model_index.json"}

    assert "model_index.json arrived damaged" in k2("models", "pull", "krea-2-turbo", code=1).stderr


REFUSALS = {
    "gated, no token": ("/resolve/", 401, {"X-Error-Code": "GatedRepo"}, "does not know who you are", "set HF_TOKEN"),
    "gated, no access": ("/resolve/", 403, {"X-Error-Code": "GatedRepo"}, "no access (403)", "Accept its licence"),
    "bad token": (
        "/api/",
        401,
        {"X-Error-Message": "Invalid credentials in Authorization header"},
        "refuses the token",
        "Check HF_TOKEN",
    ),
    "narrow token": ("/resolve/", 403, {}, "refuses the token", "Check HF_TOKEN"),
    "no repository": (
        "/api/",
        404,
        {"X-Error-Code": "RepoNotFound"},
        "has no model krea/Krea-2-Turbo",
        "Check the name",
    ),
    "file gone": ("/resolve/", 404, {"X-Error-Code": "EntryNotFound"}, "file that it lists", "mirror"),
    "server error": ("/api/", 500, {}, "reports an error (500)", "Try again later"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_are_one_sentence(hf: Hub, k2, case: str):
    where, status, headers, sentence, hint = REFUSALS[case]
    hf.refuse = lambda path: (status, headers) if where in path else None

    result = k2("models", "pull", "krea-2-turbo", code=1)

    error, advice = result.stderr.strip().splitlines()[-2:]
    assert error.startswith("Error: ") and sentence in error
    assert advice.startswith("Hint: ") and hint in advice
    assert result.stdout == "" and "Traceback" not in result.stderr
    assert library.locate("krea-2-turbo") is None


def test_invalid_token_is_reported(hf: Hub, k2, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_…")

    assert "HF_TOKEN contains a character that no token has." in k2("models", "pull", "krea-2-turbo", code=1).stderr


def test_unknown_names_and_revisions(hf: Hub, k2):
    assert "has no model acme/nothing" in k2("models", "pull", "acme/nothing", code=1).stderr
    assert 'has no revision "v9"' in k2("models", "pull", "krea-2-turbo", "--revision", "v9", code=1).stderr
    assert "krea-2-turbo, krea-2-raw" in k2("models", "pull", "turbo", code=1).stderr
    assert k2("models", "pull", "krea-2-turbo", "--revision", "../../main", code=1)


def test_revision_is_pinned(hf: Hub, k2):
    old = Path(k2("models", "pull", "krea-2-turbo", "--revision", "v1").stdout.strip())
    assert library.locate("krea-2-turbo") == old  # the only one there is

    new = Path(k2("models", "pull", "krea-2-turbo").stdout.strip())
    assert (old.name, new.name) == (OLD, MAIN)
    assert library.locate("krea-2-turbo") == library.locate(f"krea-2-turbo@{MAIN}") == new
    assert library.locate("krea-2-turbo@v1") == library.locate(f"{REPO}@{OLD[:8]}") == old
    assert library.locate("krea-2-turbo@v2") is None
    assert (old / SHARDS[0]).read_bytes() == weights(9)
    assert (old / SHARDS[1]).resolve() == (new / SHARDS[1]).resolve()
    assert {each.name for each in library.list_models()} >= {"krea-2-turbo", f"krea-2-turbo@{OLD[:12]}"}


def test_same_file_in_another_repository_is_not_fetched_again(hf: Hub, k2):
    hf.repos["krea/Krea-2-Raw"] = {MAIN: PIPELINE | {SHARDS[0]: weights(4), SHARDS[1]: weights(5)}}
    k2("models", "pull", "krea-2-turbo")
    hf.asked.clear()

    k2("models", "pull", "krea-2-raw")

    assert hf.files == set(SHARDS)
    assert library.locate("krea-2-raw").joinpath("text_encoder/model.safetensors").read_bytes() == weights(3)


def test_disk_space_is_checked_before_the_first_byte(hf: Hub, k2, monkeypatch):
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda path: SimpleNamespace(free=300_000_000))
    monkeypatch.setattr(hub, "MIN_FREE_BYTES", 300_000_000)

    result = k2("models", "pull", "krea-2-turbo", code=1)

    assert "needs 0.6 MB more" in result.stderr and "0.3 GB free" in result.stderr and "HF_HOME" in result.stderr
    assert hf.files == set()


def test_present_files_need_no_space(hf: Hub, k2, monkeypatch):
    snapshot = k2("models", "pull", "krea-2-turbo").stdout
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    assert k2("models", "pull", "krea-2-turbo").stdout == snapshot


@pytest.mark.parametrize(
    ("trouble", "code", "words"),
    [
        (OSError(errno.ENOSPC, "No space"), 1, "is full"),
        (KeyboardInterrupt(), 130, "Interrupted; what has arrived is kept"),
        (signal.SIGTERM, 143, "Interrupted; what has arrived is kept"),
    ],
)
def test_interrupted_download_keeps_its_bytes(hf: Hub, k2, monkeypatch, trouble: Any, code: int, words: str):
    write = hub.ProgressFile.write

    def stop(self: Any, data: bytes) -> int:
        if self.file.tell() > 100_000:
            if isinstance(trouble, BaseException):
                raise trouble
            signal.raise_signal(trouble)
        return write(self, data)

    monkeypatch.setattr(hub.ProgressFile, "write", stop)
    assert words in k2("models", "pull", "krea-2-turbo", code=code).stderr
    assert library.locate("krea-2-turbo") is None

    monkeypatch.setattr(hub.ProgressFile, "write", write)
    hf.asked.clear()
    k2("models", "pull", "krea-2-turbo")
    assert int(hf.gets("text_encoder/model.safetensors")[0][6:-1]) > 100_000


@pytest.mark.parametrize("written", [0, 1], ids=["manifest", "ref"])
def test_full_disk_leaves_no_partial_small_file(hf: Hub, k2, monkeypatch, written):
    """Neither of the manifest nor of the ref that pins a name to a commit."""
    write, before = Path.write_text, iter(range(10))

    def full(self: Path, text: str, *how: Any) -> int:
        if next(before) < written:
            return write(self, text, *how)
        write(self, text[:10], *how)
        raise OSError(errno.ENOSPC, "No space")

    monkeypatch.setattr(Path, "write_text", full)
    assert "is full" in k2("models", "pull", "krea-2-turbo", code=1).stderr

    assert not [path for path in library.hub_cache().rglob("*") if path.is_file() and path.suffix == ".draft"]
    assert len([*library.hub_cache().rglob(library.MANIFEST)]) == written
    assert not [path for path in library.hub_cache().rglob("refs/*") if path.is_file()]


def test_offline_uses_local_files_and_reports_missing_ones(hf: Hub, k2, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in k2("models", "pull", "krea-2-turbo", code=1).stderr

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    snapshot = k2("models", "pull", "krea-2-turbo").stdout
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hf.asked.clear()
    assert k2("models", "pull", "krea-2-turbo").stdout == snapshot
    licence.record_file().unlink()
    assert "has not been accepted" in k2("models", "pull", "krea-2-turbo", code=1).stderr
    assert hf.asked == []


def test_no_network(hf: Hub, k2, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")

    assert "The connection to http://127.0.0.1:9 failed" in k2("models", "pull", "krea-2-turbo", code=1).stderr


def test_non_hub_server_is_recognised(hf: Hub, k2, monkeypatch):
    monkeypatch.setattr(Handler, "info", lambda self, *_: self.answer(200, b"<html>Welcome to this hotel</html>"))

    assert "does not answer like a hub" in k2("models", "pull", "krea-2-turbo", code=1).stderr


def test_pickles_are_never_pulled(hf: Hub, k2):
    hf.repos["acme/old"] = {MAIN: {"pytorch_model.bin": b"\x80\x02", "config.json": b"{}"}}

    assert "only pickles" in k2("models", "pull", "acme/old", code=1).stderr
    assert hf.files == set()


def test_one_of_several_models_must_be_chosen(hf: Hub, k2):
    files = {f"models/k2_{name}.safetensors": weights(i) for i, name in enumerate(("fp8", "bf16"))}
    hf.repos["acme/all"] = {MAIN: files}

    result = k2("models", "pull", "acme/all", code=1)
    assert "several models" in result.stderr and "models/k2_fp8.safetensors" in result.stderr
    assert "no weights that match" in k2("models", "pull", "acme/all", "--include", "*.gguf", code=1).stderr

    path = Path(k2("models", "pull", "acme/all", "--include", "*fp8*").stdout.strip())
    assert path.name == "k2_fp8.safetensors" and library.locate("acme/all") == path
    k2("models", "pull", "acme/all/models/k2_bf16.safetensors")
    assert library.locate("acme/all/models/k2_bf16.safetensors").read_bytes() == weights(1)
    assert library.locate("acme/all/models/k2_fp8.safetensors") == path


@pytest.mark.parametrize(
    "name",
    [
        "../outside.json", "/etc/outside.json", "a//b.json", "a\\..\\b.json",
        "C:/Users/outside.json", "a:stream.json", "b/con.json", "a\x1b[31m.json",
    ],
)  # fmt: skip
def test_files_stay_in_the_cache(hf: Hub, k2, name: str):
    hf.repos["acme/evil"] = {MAIN: {"model.safetensors": weights(1), name: b"{}"}}

    assert "does not belong in a repository" in k2("models", "pull", "acme/evil", code=1).stderr
    assert hf.files == set()


def test_two_pulls_do_not_write_the_same_file(hf: Hub, k2):
    with hub.exclusive(hub.plan_pull("krea-2-turbo")):
        assert "Another process is pulling" in k2("models", "pull", "krea-2-turbo", code=1).stderr


def test_licence_comes_first(hf: Hub, k2):
    licence.record_file().unlink()

    result = k2("models", "pull", "krea-2-turbo", code=1)
    for words in ("Krea 2 Community License", "revenue", "filter", "made by AI", licence.KREA_2.url):
        assert words in result.stderr
    assert "has not been accepted" in result.stderr and "--accept-licence" in result.stderr
    assert hf.files == set()

    k2("models", "pull", "krea-2-turbo", "--accept-licence")
    assert licence.KREA_2.name in licence.read_accepted()
    assert "Community License" not in k2("models", "pull", "krea-2-turbo").stderr


def test_render_requires_the_licence(hf: Hub, moody: Path, k2):
    k2("models", "pull", "krea-2-turbo")
    licence.record_file().unlink()
    command = ("render", "--model", "krea-2-turbo", "-p", "tea", "--no-embed")

    result = k2(*command, code=1)
    assert "has not been accepted" in result.stderr and "k2 models info krea-2-turbo --accept-licence" in result.stderr
    assert not (moody / "outputs").exists()

    about = k2("models", "info", "krea-2-turbo", "--accept-licence", "--json").stdout.splitlines()
    assert {json.loads(line)["sha256"] for line in about} >= {etag(PIPELINE[name]) for name in SHARDS}
    assert k2(*command).stdout == "outputs/0001-tea/tea-7.png\n"


def test_export_requires_the_licence(hf: Hub, moody: Path, k2, fake):
    k2("models", "pull", "krea-2-turbo")
    licence.record_file().unlink()

    assert "has not been accepted" in k2("models", "export", "krea-2-turbo", "out", code=1).stderr
    assert not fake.loaded


def test_language_model_requires_the_licence(hf: Hub, moody: Path, k2, monkeypatch):
    k2("models", "pull", "krea-2-turbo")
    licence.record_file().unlink()
    loaded = []
    speaking = SimpleNamespace(answer=lambda *_: "a cup of tea on a table", vision_checkpoint=False)
    monkeypatch.setattr("model.language_model.can_answer", lambda text: True)
    monkeypatch.setattr("model.language_model.LanguageModel.load", lambda *_: loaded.append(1) or speaking)
    find_parts = library.find_parts
    monkeypatch.setattr(
        "model.library.find_parts", lambda found: replace(find_parts(found), text=found.path / "text_encoder")
    )
    monkeypatch.setattr("model.moodboard.describe_by_language", lambda board, speaker: "Quiet.")
    expander.language_model_path.cache_clear()
    command = ("render", "--model", "krea-2-turbo", "-p", "tea", "--creativity", "high", "--dry-run")
    board = Board((), (), (), (), "")

    assert "has not been accepted" in k2(*command, code=1).stderr
    assert "has not been accepted" in moodboard.describe_taste(board, "krea-2-turbo").notes[0]
    assert not loaded

    licence.accept(licence.KREA_2)
    assert "on a table" in k2(*command).stdout and moodboard.describe_taste(board, "krea-2-turbo").told == "Quiet."
    expander.language_model_path.cache_clear()


def test_derived_weights_require_the_licence(hf: Hub, k2):
    licence.record_file().unlink()
    hf.repos["acme/tuned"] = {MAIN: {"model.safetensors": weights(1)}}

    hf.card = {"license": "mit"}
    k2("models", "pull", "acme/tuned")
    assert library.find("acme/tuned").licence == "mit"

    hf.card = {"license": "other", "base_model": ["krea/Krea-2-Raw"]}
    assert "has not been accepted" in k2("models", "pull", "acme/tuned", code=1).stderr


def test_pulled_model_renders(hf: Hub, k2, tiny, tmp_path: Path):  # noqa: F811
    """A whole pipeline in diffusers' layout, from the hub to a picture: the same one as from the bundled model."""
    from model.pipeline import Pipeline
    from model.spec import RenderSpec

    boxed = Pipeline.load("tiny", variant="turbo", device="cpu", filters=[])
    boxed.export(folder := tmp_path / "exported")
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    hf.repos[REPO] = {MAIN: files | {"turbo.safetensors": weights(1)}}

    k2("models", "pull", "krea-2-turbo")

    pulled = Pipeline.load("krea-2-turbo", device="cpu", filters=[])
    spec = RenderSpec("a red fox", width=64, height=64, seed=7, steps=2)
    (ours,), (theirs,) = boxed.render([spec]), pulled.render([spec])
    assert pulled.variant == "turbo" and ours.image.tobytes() == theirs.image.tobytes()
    assert pulled.recommended == library.RECOMMENDED["turbo"] | boxed.recommended


def test_environment_variables_are_honoured(server: Hub, tmp_path: Path):
    """HF_ENDPOINT, HF_HOME, HF_TOKEN as a user sets them; the process does not import torch."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("HF_")} | environment(tmp_path)
    code = """if True:
        import sys
        from k2cli.app import app
        try:
            app(["models", "pull", "krea-2-turbo", "--accept-licence", "--json"])
        except SystemExit as end:
            sys.exit(end.code or ("torch" in sys.modules and "torch was imported") or 0)
    """
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=env | {"HF_ENDPOINT": server.url}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    about = json.loads(done.stdout)
    assert about["commit"] == MAIN and Path(about["path"]).is_relative_to(tmp_path / "hf" / "hub")
    assert set(about["files"]) == NEEDED
    assert {token for path, _, token in server.asked if path.startswith("/api/models/")} == {"Bearer hf_secret"}
