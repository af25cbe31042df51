"""Atomic writes: files are there whole or not at all."""

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.atomic import DEAD_AFTER, atomic_write


def test_file_appears_once_it_is_complete(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")

    with atomic_write(path) as draft:
        draft.write_text("new")
        assert path.read_text() == "old" and draft.parent == tmp_path

    assert path.read_text() == "new" and os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_failure_leaves_only_the_old_file(tmp_path, error):
    path = tmp_path / "a.json"
    path.write_text("old")

    with pytest.raises(error), atomic_write(path) as draft:
        draft.write_text("ne")
        raise error

    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.json"]


@pytest.mark.skipif(os.name == "nt", reason="has no such permissions")
@pytest.mark.parametrize("mask", [0o022, 0o077, 0o027])
def test_file_gets_default_permissions(tmp_path, mask):
    """Whatever the writer, and without touching the process's umask, on which other threads' files depend."""
    before = os.umask(mask)
    try:
        (tmp_path / "any").touch()
        with atomic_write(tmp_path / "a.safetensors") as draft:
            save_file({"a": torch.ones(2)}, draft)
    finally:
        os.umask(before)

    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "any").stat().st_mode
    assert load_file(tmp_path / "a.safetensors")["a"].tolist() == [1, 1]


def test_concurrent_writers_share_no_draft(tmp_path):
    both = threading.Barrier(2)

    def write(text):
        with atomic_write(tmp_path / "a") as draft:
            draft.write_text(text)
            both.wait(10)
            assert draft.read_text() == text

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(write, ("one", "another")))
    assert (tmp_path / "a").read_text() in ("one", "another") and os.listdir(tmp_path) == ["a"]


def test_stale_draft_is_removed_by_the_next_write(tmp_path):
    old, new, others = (tmp_path / name for name in (".a[1].0.draft", ".a[1].1.draft", ".b.0.draft"))
    for draft in (old, new, others):
        draft.write_text("half")
    for draft in (old, others):
        os.utime(draft, (0, time.time() - DEAD_AFTER - 9))

    with atomic_write(tmp_path / "a[1]") as draft:
        draft.write_text("new")

    assert {path.name for path in tmp_path.iterdir()} == {"a[1]", new.name, others.name}
