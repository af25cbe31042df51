"""Run folders and files: numbers never shared, files whole or absent."""

from __future__ import annotations

import errno
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
from conftest import tree

from k2cli.outputs import Run, dump, write
from model.errors import K2Error


def claim_many(outputs: Path, name: str, count: int) -> list[str]:
    return [Run.claim(outputs, name).folder.name for _ in range(count)]


def test_runs_count_up_past_what_is_there(tmp_path):
    for name in ("0007-fox", "12-no-run", "notes", "10000-late"):
        (tmp_path / name).mkdir()

    assert Run.claim(tmp_path, "owl").folder.name == "10001-owl"


def test_processes_never_share_a_number(tmp_path):
    with ProcessPoolExecutor(4) as pool:
        claimed = [name for names in pool.map(claim_many, [tmp_path] * 4, "abcd", [25] * 4) for name in names]

    assert sorted(int(name.split("-")[0]) for name in claimed) == list(range(1, 101))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(claimed)


def test_a_run_that_came_to_nothing_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), Run.claim(tmp_path / "outputs", "fox") as run:
        write({run["run.toml"]: b"planned"})
        raise ZeroDivisionError

    assert tree(tmp_path) == {}


def test_a_run_with_a_picture_stays(tmp_path):
    with pytest.raises(ZeroDivisionError), Run.claim(tmp_path / "outputs", "fox") as run:
        run.save("fox-7", b"picture", b"record")
        raise ZeroDivisionError

    assert tree(run.folder) == {"fox-7.png": b"picture", "fox-7.toml": b"record"}


@pytest.mark.parametrize(
    ("code", "message"),
    [(errno.ENOSPC, "disk is full"), (errno.EDQUOT, "disk is full"), (errno.EIO, "cannot be written")],
)
@pytest.mark.parametrize("failing", [0, 1])
def test_what_cannot_be_written_whole_is_not_there_at_all(tmp_path, monkeypatch, failing, code, message):
    (tmp_path / "a").write_bytes(b"old")
    calls = []

    def fsync(handle: int) -> None:
        calls.append(handle)
        if len(calls) == failing + 1:
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fsync)

    with pytest.raises(K2Error, match=message):
        write({tmp_path / "a": b"new", tmp_path / "b": b"new"})
    assert tree(tmp_path) == {"a": b"old"}


def test_a_folder_in_the_way_is_one_sentence(tmp_path):
    (tmp_path / "outputs").write_text("a file")

    with pytest.raises(K2Error, match=r"outputs.* cannot be written: Not a directory\."):
        Run.claim(tmp_path / "outputs", "fox")


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_folder_without_permission_is_one_sentence(tmp_path):
    tmp_path.chmod(0o500)

    with pytest.raises(K2Error, match="permission denied"):
        Run.claim(tmp_path / "outputs", "fox")


def test_a_run_is_resumed_by_one_process_at_a_time(tmp_path):
    run = Run.claim(tmp_path, "fox")
    (run.folder / ".fox-7.png.99.draft").write_bytes(b"half")
    with run:
        run.lock()
        assert not list(run.folder.iterdir())  # drafts of a dead process are swept
        with pytest.raises(K2Error, match="being rendered by another process"):
            Run(run.folder).lock()
    with Run(run.folder) as again:
        again.lock()


def test_nothing_is_left_out_of_toml_but_none():
    assert (
        dump({"a": 1, "b": None, "c": {"d": [1, 2], "e": None}}).decode() == "a = 1\n\n[c]\nd = [\n    1,\n    2,\n]\n"
    )
