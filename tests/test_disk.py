"""Files whole or absent, and Ctrl-C while they are written."""

from __future__ import annotations

import errno
import multiprocessing
import os
import secrets
import signal
from pathlib import Path

import pytest
from conftest import tree

from k2cli.disk import Ended, Exists, ended_as_by_ctrl_c, new_draft, sweep, undisturbed, write, writing
from model.errors import K2Error
from model.whole import whole


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.ENOSPC, "disk is full"),
        (errno.EDQUOT, "disk is full"),
        (errno.EIO, "cannot be written"),
        (errno.EROFS, "the file system is read-only"),
    ],
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


def test_what_was_replaced_is_not_taken_away_by_what_could_not_be(tmp_path, monkeypatch):
    replace = os.replace

    def fail_at_b(draft: Path, path: Path) -> None:
        if path.name == "b":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        replace(draft, path)

    monkeypatch.setattr(os, "replace", fail_at_b)

    with pytest.raises(K2Error, match="cannot be written"):
        write({tmp_path / "a": b"new", tmp_path / "b": b"new"})
    assert tree(tmp_path) == {"a": b"new"}


def test_a_folder_that_is_gone_is_not_blamed_on_permissions(tmp_path):
    with pytest.raises(K2Error, match="cannot be written") as caught:
        write({tmp_path / "gone" / "a": b"new"})
    assert caught.value.hint == "Its folder was deleted or moved."


@pytest.mark.parametrize(
    ("code", "hint"),
    [
        (errno.EACCES, "Check the folder's permissions."),
        (errno.EROFS, "Choose another disk, or remount this one for writing."),
        (errno.ENAMETOOLONG, "Choose a shorter name."),
        (errno.EIO, ""),
        (errno.EMFILE, ""),
    ],
)
def test_permissions_are_blamed_for_what_they_keep_from(tmp_path, code, hint):
    with pytest.raises(K2Error, match="cannot be written") as caught, writing(tmp_path):
        raise OSError(code, os.strerror(code))
    assert caught.value.hint == hint


def test_names_are_flushed_to_disk_after_the_files(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda handle: flushed.append(os.fstat(handle).st_ino))

    write({tmp_path / "a": b"new"})

    assert flushed == [(tmp_path / "a").stat().st_ino, tmp_path.stat().st_ino]


@pytest.mark.parametrize("links", [True, False])
def test_what_is_to_be_new_replaces_nothing(tmp_path, monkeypatch, links):
    def link(start: Path, end: Path) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", os.link if links else link)
    write({tmp_path / "b": b"mine"}, new=True)

    with pytest.raises(Exists, match="b exists already"):
        write({tmp_path / "a": b"new", tmp_path / "b": b"new"}, new=True)
    assert tree(tmp_path) == {"b": b"mine"}


def test_no_draft_follows_a_link(tmp_path, monkeypatch):
    """A folder from a stranger may hold links under any name that could be guessed."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    names = iter(["guessed", "fresh"])
    monkeypatch.setattr(secrets, "token_hex", lambda count: next(names))
    (tmp_path / f".{os.getpid()}-guessed.draft").symlink_to(victim)

    write({tmp_path / "a": b"new"})

    assert victim.read_text() == "precious" and (tmp_path / "a").read_bytes() == b"new"


def test_of_the_dead_only_ones_own_drafts_are_swept(tmp_path):
    """The others' lock none while they write, for as long as weights take; or they are somebody's own files."""
    (tmp_path / "mine.draft").touch()
    draft, handle = new_draft(tmp_path)
    with whole(tmp_path / "weights.safetensors") as weights:
        weights.write_text("whole")
        sweep(tmp_path)
        assert draft.exists()
        os.close(handle)
        sweep(tmp_path)

    assert sorted(os.listdir(tmp_path)) == ["mine.draft", "weights.safetensors"]


def press_by_default() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    with undisturbed():
        signal.raise_signal(signal.SIGINT)


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

    def test_it_ends_a_process_that_has_no_handler_of_its_own(self):
        process = multiprocessing.get_context("fork").Process(target=press_by_default)
        process.start()
        process.join()

        assert process.exitcode == -signal.SIGINT

    def test_it_passes_from_the_inner_to_the_outer(self):
        done = []
        with pytest.raises(KeyboardInterrupt), undisturbed():
            with undisturbed():
                signal.raise_signal(signal.SIGINT)
                done.append(1)
            done.append(2)

        assert done == [1, 2]

    def test_what_counts_as_it_waits_too(self):
        done = []
        with pytest.raises(Ended) as caught, ended_as_by_ctrl_c(), undisturbed():
            signal.raise_signal(signal.SIGTERM)
            done.append(1)

        assert done == [1] and caught.value.code == 143
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL

    def test_what_a_process_was_told_to_ignore_it_does(self):
        """As nohup tells it."""
        before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
        try:
            with ended_as_by_ctrl_c(), undisturbed():
                signal.raise_signal(signal.SIGTERM)
        finally:
            signal.signal(signal.SIGTERM, before)
