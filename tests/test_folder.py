"""A project's folder: created completely or not at all, without overwriting anything."""

from __future__ import annotations

import errno
import os
import re
from contextlib import nullcontext
from pathlib import Path

import pytest
from conftest import tree

from k2cli.folder import Folder
from k2cli.project import Project
from model.errors import K2Error
from model.picture_file import OUTPUT_FOLDERS


def test_empty_folder_becomes_a_project_in_place(fake, tmp_path, monkeypatch):
    (tmp_path / "moody").mkdir()
    monkeypatch.chdir(tmp_path / "moody")

    Folder.create(Path("."))

    assert Project.find(Path.cwd()).name == "moody"
    assert sorted(path.name for path in Path(".").iterdir()) == [".gitignore", "k2.toml", "refs", "styles"]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    assert tuple(re.findall(r"(?m)^/(.+)/$", Path(".gitignore").read_text())) == (*OUTPUT_FOLDERS, ".runs")


@pytest.mark.parametrize("stuck", ["", "styles", ".gitignore", "k2.toml"])
def test_empty_mount_gets_all_files_or_none(fake, tmp_path, monkeypatch, stuck):
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
    assert sorted(path.name for path in folder.iterdir()) == (
        [] if stuck else [".gitignore", "k2.toml", "refs", "styles"]
    )


def test_existing_files_stay_when_a_project_is_created(fake, tmp_path):
    """As with `git init`: reference pictures, styles and notes stay, and so does an existing .gitignore."""
    folder = tmp_path / "moody"
    for name in ("refs/fox.png", "styles/dusk.toml", ".gitignore", ".git/HEAD", "notes.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine")
    before = tree(folder)

    Folder.create(folder)

    after = tree(folder)
    assert after.items() >= before.items() and after.keys() - before.keys() == {"k2.toml", "styles/sticker.toml"}
    assert len(Project.open(folder).prompts) == 3


@pytest.mark.parametrize(
    ("ignored", "told"),
    [
        (None, False),
        ("/outputs/\n", False),
        ("*.pyc\n# no outputs\n!outputs/\n", True),
        ("", True),
        ("*\n", False),
        ("my_outputs.txt\n", True),
        *((line, False) for line in ("**/outputs/", "outputs/**", "/outputs/*", "out*", "*.png", "**/*.png")),
        *((line, False) for line in ("outputs/**/*.png", "/*/*/*.png", "**/outputs/**/x-*", "**")),
        ("[^a]utputs", False),
        *((line, True) for line in (" outputs", "outputs//")),
        *((line, True) for line in ("put*", "old/outputs/", "/refs/*.png", "*.toml", "outputs/*.toml")),
        *(
            (line, True)
            for line in (
                "/*.png",
                "outputs/*.png",
                "/**/outputs/*.png",
                "0001-x/*.png",
                "old/**",
                "**/x-1.png/**",
                "*.png/",
            )
        ),
    ],
)
def test_warns_if_git_would_track_outputs(fake, k2, tmp_path, ignored, told):
    """An existing .gitignore stays as it is."""
    folder = tmp_path / "moody"
    folder.mkdir()
    if ignored is not None:
        (folder / ".gitignore").write_text(ignored)

    said = k2("new", folder).stderr

    assert ("Git may track every picture: add outputs/" in said) is told
    assert ignored is None or (folder / ".gitignore").read_text() == ignored


def test_hints_for_generated_folders_name_the_project(moody, k2, monkeypatch):
    """However the folder is written."""
    run = Path(k2("render", "--only", "fox", "--batch", "1").stdout.strip()).absolute().parent
    assert "the project itself is .\n" in k2("render", "outputs", code=1).stderr
    monkeypatch.chdir(run)
    assert "It is a run; k2 log and k2 gallery select it with: --run 1\n" in k2("log", ".", code=1).stderr
    assert f"the project itself is {moody}\n" in k2("log", "..", code=1).stderr


def test_root_path_is_shown_without_detours(moody, k2, tmp_path, monkeypatch):
    """After a link, ".." may lead elsewhere; then the path stays as typed."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (moody / "bad.safetensors").write_bytes(b"hello")
    (moody / "styles").mkdir()
    (moody / "styles" / "bad.toml").write_text('lora = "bad.safetensors"\n')
    (moody / "refs" / "deep").mkdir(parents=True)
    Path("link").symlink_to(moody / "refs" / "deep")

    said = k2("render", "--project", f"../{moody.name}", "--style", "bad=1", code=1).stderr
    assert f"{moody / 'bad.safetensors'} is not a safetensors file" in said

    assert Folder.at(Path("link/../..")).root.samefile(moody)


def test_hint_for_a_file_or_picture_in_place_of_a_project(moody, k2):
    picture = k2("render", "--only", "fox", "--batch", "1").stdout.strip()
    for file in (picture, picture.replace(".png", ".toml")):
        for command in ("log", "gallery"):
            told = k2(command, file, code=1).stderr
            assert f"{file} is not a project: it is a file." in told and "k2 new" not in told
            assert (
                f"A project is a folder with a k2.toml. To see what a picture was made from: k2 show {file}\n" in told
            )
        assert picture.rpartition("/")[2] in k2("show", file, "--json").stdout
    (moody / "notes.txt").touch()
    for file in ("notes.txt", os.devnull):
        assert "A project is a folder with a k2.toml.\n" in k2("log", file, code=1).stderr


def test_longest_allowed_name_works(fake, tmp_path):
    Folder.create(tmp_path / ("m" * 255))

    assert Project.open(tmp_path / ("m" * 255)).name == "m" * 255
    assert not [*tmp_path.glob(".*")]


@pytest.mark.parametrize("name", ["k2.toml", "styles/sticker.toml", "refs", "styles"])
def test_new_project_never_overwrites(fake, tmp_path, name):
    (tmp_path / "moody" / name).parent.mkdir(parents=True)
    (tmp_path / "moody" / name).write_text("mine")
    before = tree(tmp_path)

    with pytest.raises(K2Error, match="already"):
        Folder.create(tmp_path / "moody")
    assert tree(tmp_path) == before


def test_new_project_follows_no_links(fake, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "moody").mkdir()
    (tmp_path / "moody" / "styles").symlink_to(tmp_path / "other")

    with pytest.raises(K2Error, match="already contains styles"):
        Folder.create(tmp_path / "moody")
    assert [*(tmp_path / "other").iterdir()] == []
