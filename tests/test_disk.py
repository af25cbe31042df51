"""Files are written completely or not at all, and Ctrl-C waits for them."""

from __future__ import annotations

import errno
import multiprocessing
import os
import secrets
import signal
from pathlib import Path

import pytest
from conftest import tree

from k2cli.disk import (
    Exists,
    Terminated,
    new_draft,
    remove_dead_drafts,
    signals_as_ctrl_c,
    uninterrupted,
    write_files,
    writing,
)
from model.atomic import atomic_write
from model.errors import K2Error


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
def test_failed_writes_change_nothing(tmp_path, monkeypatch, failing, code, message):
    (tmp_path / "a").write_bytes(b"old")
    calls = []

    def fsync(handle: int) -> None:
        calls.append(handle)
        if len(calls) == failing + 1:
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fsync)

    with pytest.raises(K2Error, match=message):
        write_files({tmp_path / "a": b"new", tmp_path / "b": b"new"})
    assert tree(tmp_path) == {"a": b"old"}


def test_a_replaced_file_survives_a_later_failure(tmp_path, monkeypatch):
    replace = os.replace

    def fail_at_b(draft: Path, path: Path) -> None:
        if path.name == "b":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        replace(draft, path)

    monkeypatch.setattr(os, "replace", fail_at_b)

    with pytest.raises(K2Error, match="cannot be written"):
        write_files({tmp_path / "a": b"new", tmp_path / "b": b"new"})
    assert tree(tmp_path) == {"a": b"new"}


def test_a_missing_folder_is_not_blamed_on_permissions(tmp_path):
    with pytest.raises(K2Error, match="cannot be written") as caught:
        write_files({tmp_path / "gone" / "a": b"new"})
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
def test_write_errors_give_a_fitting_hint(tmp_path, code, hint):
    with pytest.raises(K2Error, match="cannot be written") as caught, writing(tmp_path):
        raise OSError(code, os.strerror(code))
    assert caught.value.hint == hint


def test_the_folder_is_flushed_after_its_files(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda handle: flushed.append(os.fstat(handle).st_ino))

    write_files({tmp_path / "a": b"new"})

    assert flushed == [(tmp_path / "a").stat().st_ino, tmp_path.stat().st_ino]


@pytest.mark.parametrize("links", [True, False])
def test_new_files_replace_nothing(tmp_path, monkeypatch, links):
    def link(start: Path, end: Path) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", os.link if links else link)
    write_files({tmp_path / "b": b"mine"}, new=True)

    with pytest.raises(Exists, match="b exists already"):
        write_files({tmp_path / "a": b"new", tmp_path / "b": b"new"}, new=True)
    assert tree(tmp_path) == {"b": b"mine"}


def test_drafts_do_not_follow_links(tmp_path, monkeypatch):
    """A folder from a stranger may contain links under any name that can be guessed."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    names = iter(["guessed", "fresh"])
    monkeypatch.setattr(secrets, "token_hex", lambda count: next(names))
    (tmp_path / f".{os.getpid()}-guessed.draft").symlink_to(victim)

    write_files({tmp_path / "a": b"new"})

    assert victim.read_text() == "precious" and (tmp_path / "a").read_bytes() == b"new"


def test_sweep_removes_only_our_own_abandoned_drafts(tmp_path):
    """Other drafts are not locked while they are written, however long weights take, or are somebody's own files."""
    (tmp_path / "mine.draft").touch()
    draft, handle = new_draft(tmp_path)
    with atomic_write(tmp_path / "weights.safetensors") as weights:
        weights.write_text("whole")
        remove_dead_drafts(tmp_path)
        assert draft.exists()
        os.close(handle)
        remove_dead_drafts(tmp_path)

    assert sorted(os.listdir(tmp_path)) == ["mine.draft", "weights.safetensors"]


def press_by_default() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    with uninterrupted():
        signal.raise_signal(signal.SIGINT)


class TestUndisturbed:
    """Ctrl-C while files are written."""

    def test_ctrl_c_waits_until_the_files_are_in_place(self, tmp_path, monkeypatch):
        replace = os.replace

        def press(draft: Path, path: Path) -> None:
            signal.raise_signal(signal.SIGINT)
            replace(draft, path)

        monkeypatch.setattr(os, "replace", press)
        with pytest.raises(KeyboardInterrupt):
            write_files({tmp_path / "a.png": b"picture"})

        assert tree(tmp_path) == {"a.png": b"picture"}
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    def test_a_second_ctrl_c_interrupts_at_once(self):
        done = []
        with pytest.raises(KeyboardInterrupt), uninterrupted():
            signal.raise_signal(signal.SIGINT)
            done.append(1)
            signal.raise_signal(signal.SIGINT)
            done.append(2)

        assert done == [1]

    def test_ctrl_c_ends_a_process_without_its_own_handler(self):
        process = multiprocessing.get_context("fork").Process(target=press_by_default)
        process.start()
        process.join()

        assert process.exitcode == -signal.SIGINT

    def test_ctrl_c_waits_for_the_outermost_block(self):
        done = []
        with pytest.raises(KeyboardInterrupt), uninterrupted():
            with uninterrupted():
                signal.raise_signal(signal.SIGINT)
                done.append(1)
            done.append(2)

        assert done == [1, 2]

    def test_signals_treated_like_ctrl_c_wait_too(self):
        done = []
        with pytest.raises(Terminated) as caught, signals_as_ctrl_c(), uninterrupted():
            signal.raise_signal(signal.SIGTERM)
            done.append(1)

        assert done == [1] and caught.value.code == 143
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL

    def test_ignored_signals_stay_ignored(self):
        """As under nohup."""
        before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
        try:
            with signals_as_ctrl_c(), uninterrupted():
                signal.raise_signal(signal.SIGTERM)
        finally:
            signal.signal(signal.SIGTERM, before)
