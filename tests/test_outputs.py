"""Run folders and files: numbers never shared, files whole or absent."""

from __future__ import annotations

import errno
import multiprocessing
import os
import secrets
import signal
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
from conftest import tree

from k2cli.outputs import Exists, Run, dump, new_draft, next_number, undisturbed, write
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


def test_an_interrupted_run_keeps_its_plan(tmp_path):
    with pytest.raises(KeyboardInterrupt), Run.claim(tmp_path / "outputs", "fox", {"run.toml": b"planned"}) as run:
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt), Run.claim(tmp_path / "outputs", "owl"):
        raise KeyboardInterrupt

    assert tree(tmp_path / "outputs") == {"0001-fox": None, "0001-fox/run.toml": b"planned"}
    Run(run.folder).lock()


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


@pytest.mark.parametrize("links", [True, False])
def test_what_is_to_be_new_replaces_nothing(tmp_path, monkeypatch, links):
    def link(start: Path, end: Path) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", os.link if links else link)
    write({tmp_path / "b": b"mine"}, new=True)

    with pytest.raises(Exists, match="b exists already"):
        write({tmp_path / "a": b"new", tmp_path / "b": b"new"}, new=True)
    assert tree(tmp_path) == {"b": b"mine"}


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
    with Run.claim(tmp_path, "fox") as run, pytest.raises(K2Error, match="being rendered by another process"):
        Run(run.folder).lock()
    with Run(run.folder) as again:
        again.lock()


def test_a_plan_is_there_as_soon_as_its_run_has_a_name(tmp_path, monkeypatch):
    seen = []
    rename = Path.rename

    def spy(path: Path, target: Path) -> Path:
        seen.append(tree(path))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", spy)
    with Run.claim(tmp_path, "fox", {"run.toml": b"planned"}) as run:
        assert seen == [{"run.toml": b"planned"}] == [tree(run.folder)]


def leave_behind(outputs: Path, half: Path) -> None:
    """A process that dies between claiming a number and naming its run, with a file half written elsewhere."""
    draft, handle = new_draft(half)
    os.write(handle, b"half")
    assert next_number(outputs).is_dir() and draft.exists()
    os._exit(9)


def test_what_a_dead_process_left_is_gone_at_the_next_start_and_the_living_keep_theirs(tmp_path):
    run = Run.claim(tmp_path, "fox")
    mine, handle = new_draft(run.folder)
    dead = multiprocessing.get_context("fork").Process(target=leave_behind, args=(tmp_path, run.folder))
    dead.start()
    dead.join()
    assert dead.exitcode == 9 and len(list(run.folder.iterdir())) == 2 and (tmp_path / "0002").exists()

    second = Run.claim(tmp_path, "owl")

    assert list(run.folder.iterdir()) == [mine]
    assert {path.name for path in tmp_path.iterdir()} == {"0001-fox", "0002-owl"} and second.folder.is_dir()
    os.close(handle)


def test_a_folder_with_a_number_and_content_is_left_alone(tmp_path):
    (tmp_path / "0003").mkdir()
    (tmp_path / "0003" / "notes.txt").write_text("mine")

    assert Run.claim(tmp_path, "fox").folder.name == "0004-fox"
    assert (tmp_path / "0003" / "notes.txt").read_text() == "mine"


def test_no_draft_follows_a_link(tmp_path, monkeypatch):
    """A folder from a stranger may hold links under any name that could be guessed."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    names = iter(["guessed", "fresh"])
    monkeypatch.setattr(secrets, "token_hex", lambda count: next(names))
    (tmp_path / f".{os.getpid()}-guessed.draft").symlink_to(victim)

    write({tmp_path / "a": b"new"})

    assert victim.read_text() == "precious" and (tmp_path / "a").read_bytes() == b"new"


class TestUndisturbed:
    """Ctrl-C while files are written."""

    def test_it_waits_until_they_are_in_place(self, tmp_path, monkeypatch):
        replace = os.replace

        def press(draft: Path, path: Path) -> None:
            signal.raise_signal(signal.SIGINT)
            replace(draft, path)

        monkeypatch.setattr(os, "replace", press)
        with pytest.raises(KeyboardInterrupt):
            write({tmp_path / "a.png": b"picture"})

        assert tree(tmp_path) == {"a.png": b"picture"}
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    def test_twice_insists(self):
        done = []
        with pytest.raises(KeyboardInterrupt), undisturbed():
            signal.raise_signal(signal.SIGINT)
            done.append(1)
            signal.raise_signal(signal.SIGINT)
            done.append(2)

        assert done == [1]

    def test_it_passes_from_the_inner_to_the_outer(self):
        done = []
        with pytest.raises(KeyboardInterrupt), undisturbed():
            with undisturbed():
                signal.raise_signal(signal.SIGINT)
                done.append(1)
            done.append(2)

        assert done == [1, 2]


def test_nothing_is_left_out_of_toml_but_none():
    assert (
        dump({"a": 1, "b": None, "c": {"d": [1, 2], "e": None}}).decode() == "a = 1\n\n[c]\nd = [\n    1,\n    2,\n]\n"
    )
