"""File hashes: computed once, and again when the file has changed; processes share those of large files."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

import pytest

from model import hashes
from model.errors import K2Error
from model.hashes import Hashes, sha256


@pytest.mark.parametrize("large", [1 << 28, 1])
def test_a_changed_file_is_hashed_again(tmp_path, monkeypatch, large):
    """Even if its size is the same."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(hashes, "MIN_CACHED_SIZE", large)
    path = tmp_path / "a.png"
    path.write_bytes(b"one")
    before = sha256(path)
    path.write_bytes(b"two")
    os.utime(path, (1, 1))

    assert before == hashlib.sha256(b"one").hexdigest()
    assert sha256(path) == hashlib.sha256(b"two").hexdigest()


def test_the_next_process_knows_the_hash_of_a_large_file(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(hashes, "MIN_CACHED_SIZE", 1)
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"weights")
    known = sha256(path)
    read: list[object] = []
    monkeypatch.setattr(hashes, "digest", read.append)
    hashes._sha256.cache_clear()

    assert sha256(path) == known and not read


def test_an_unreadable_file_gives_one_error_message(tmp_path):
    with pytest.raises(K2Error, match="cannot be read: No such file or directory"):
        sha256(tmp_path / "none.png")


def test_loaded_weights_may_be_replaced_but_not_overwritten(tmp_path):
    """What is loaded may be the pages of the file itself: if they change, no record can name it any more."""
    path = tmp_path / "mini.safetensors"
    path.write_bytes(b"raw")
    held = Hashes([path], [tmp_path])
    known = held.by_name()

    (tmp_path / "other").write_bytes(b"turbo")
    os.replace(tmp_path / "other", path)
    assert held.by_name() == known == {"mini.safetensors": hashlib.sha256(b"raw").hexdigest()}

    held = Hashes([path], [tmp_path])
    known = held.by_name()
    path.unlink()  # the next file may get the same place on the disk
    path.write_bytes(b"raw")
    assert held.by_name() == known

    held = Hashes([path], [tmp_path])
    known = held.by_name()
    os.utime(path, (1, 1))
    assert held.by_name() == known
    path.write_bytes(b"turbo")
    with pytest.raises(K2Error, match="was overwritten after it had been loaded"):
        held.by_name()


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="users have no numbers here")
def test_a_user_without_a_home_has_a_private_cache(tmp_path, monkeypatch):
    """As in a container run under a numeric user id; what another user put in its place is not used."""

    def expanduser(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "expanduser", expanduser)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = tmp_path / f"k2-{os.getuid()}"
    for _ in range(2):
        hashes.temporary_folder.cache_clear()
        assert hashes.cache_folder() == folder and folder.stat().st_mode & 0o777 == 0o700

    folder.chmod(0o777)
    hashes.temporary_folder.cache_clear()
    other = hashes.cache_folder()
    assert other.parent == tmp_path and other != folder and other == hashes.cache_folder()
    folder.rmdir()
    folder.symlink_to(other)
    hashes.temporary_folder.cache_clear()
    assert hashes.cache_folder() not in (folder, other)
    hashes.temporary_folder.cache_clear()
