"""A project's folder: made whole or not at all, in an empty place, over nothing."""

from __future__ import annotations

import errno
import os
from contextlib import nullcontext
from pathlib import Path

import pytest
from conftest import tree

from k2cli.folder import Folder
from k2cli.project import Project
from model.errors import K2Error


def test_an_empty_folder_becomes_a_project_in_place(fake, tmp_path, monkeypatch):
    (tmp_path / "moody").mkdir()
    monkeypatch.chdir(tmp_path / "moody")

    Folder.create(Path("."))

    assert Project.find(Path.cwd()).name == "moody"
    assert sorted(path.name for path in Path(".").iterdir()) == ["k2.toml", "refs", "styles"]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("stuck", ["", "styles", "k2.toml"])
def test_an_empty_folder_may_be_a_mount_and_gets_all_or_nothing(fake, tmp_path, monkeypatch, stuck):
    folder = tmp_path / "moody"
    folder.mkdir()
    move = os.replace

    def replace(start: Path, end: Path) -> None:
        if not start.is_relative_to(folder):
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        if end == folder / (stuck or "nothing"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        move(start, end)

    monkeypatch.setattr(os, "replace", replace)

    with pytest.raises(K2Error, match="Input/output error") if stuck else nullcontext():
        Folder.create(folder)
    assert sorted(path.name for path in folder.iterdir()) == ([] if stuck else ["k2.toml", "refs", "styles"])


def test_a_new_project_never_overwrites(fake, tmp_path):
    (tmp_path / "moody").mkdir()
    (tmp_path / "moody" / "notes.txt").write_text("mine")
    before = tree(tmp_path)

    with pytest.raises(K2Error, match="not an empty folder"):
        Folder.create(tmp_path / "moody")
    assert tree(tmp_path) == before
