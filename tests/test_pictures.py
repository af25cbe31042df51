"""Which pictures a path, a folder or a glob names: what Python's own `glob` finds, and no more than allowed."""

from __future__ import annotations

import glob
import sys
from pathlib import Path, PurePosixPath, PureWindowsPath

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from k2cli.pictures import (
    MAX_PATTERN_CHARS,
    MIN_SIDE,
    check_picture,
    find_pictures,
    folder_pictures,
    is_dark,
    picture_hint,
    picture_sides,
    split_anchor,
    walk_glob,
)
from model import picture_file
from model.errors import K2Error

NAMES = ["a.png", "b.jpg", ".c.png", "d", ".e", "[f]"]
TREE = [
    f"{a}{b}{c}" for a in ("", "d/", ".e/", "[f]/") for b in ("", "d/", ".e/") for c in ("a.png", "b.jpg", ".c.png")
]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    root = tmp_path_factory.mktemp("tree")
    for each in TREE:
        (root / each).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (MIN_SIDE, MIN_SIDE)).save(root / each)
    return root


PARTS = st.sampled_from([*NAMES, "*", "*.png", "?", ".*", ".e", "[ab]*", "[!a]*", "[[]f]", "**", "nothing", "d*"])


@given(st.lists(PARTS, min_size=1, max_size=4).filter(lambda parts: parts.count("**") < 2))
def test_a_glob_names_what_python_finds(tree, parts):
    """Python names the first of the folders that are found, too, and takes files for folders."""
    pattern = "/".join(parts)

    found = set(walk_glob(tree, pattern, lambda path, where: tree / path, "here"))

    theirs = glob.glob(pattern, root_dir=tree, recursive=True)
    files = {tree / each for each in theirs if (tree / each).is_file() and not each.endswith("/")}
    assert {path for path in found if path.is_file()} == files
    assert all(path.is_dir() for path in found - files)


def found_in(root: Path, pattern: str, most: int = 100) -> tuple[list[str], list[str]]:
    found, others = find_pictures(pattern, root, lambda path, where: root / path, "here", most)
    return [path.relative_to(root).as_posix() for path in found], sorted(path.name for path in others)


@pytest.mark.parametrize(
    ("pattern", "named"),
    [
        ("d", ["d/a.png", "d/b.jpg"]),
        ("[f]", ["[f]/a.png", "[f]/b.jpg"]),  # an existing folder is not a glob
        ("d/a.png", ["d/a.png"]),
        (".e/*.jpg", [".e/b.jpg"]),
        ("*/.e/.*", ["[f]/.e/.c.png", "d/.e/.c.png"]),
        ("gone.png", ["gone.png"]),  # reported by whoever opens it
        ("gone/*.png", []),
    ],
)
def test_a_folder_names_its_pictures_except_hidden_ones(tree, pattern, named):
    assert found_in(tree, pattern)[0] == named


@pytest.mark.parametrize(
    ("pattern", "start", "parts"),
    [
        (PurePosixPath("/pics/*.png"), "/", ("pics", "*.png")),
        (PurePosixPath("refs/./*.png"), "", ("refs", "*.png")),
        (PurePosixPath(r"a\*.png"), "", (r"a\*.png",)),
        (PureWindowsPath(r"refs\*.png"), "", ("refs", "*.png")),
        (PureWindowsPath("C:/pics/*.png"), "C:\\", ("pics", "*.png")),
        (PureWindowsPath("//server/share/*"), r"\\server\share" + "\\", ("*",)),
    ],
)
def test_globs_are_split_by_their_systems_rules(pattern, start, parts):
    assert split_anchor(pattern) == (start, parts)


def test_absolute_globs_are_allowed(tree):
    assert found_in(tree, f"{tree}/d/*.png")[0] == ["d/a.png"]


@pytest.mark.parametrize(("platform", "named"), [("linux", ["a.png"]), ("win32", ["B.PNG", "a.png"])])
def test_globs_ignore_case_on_windows(tree, tmp_path, monkeypatch, platform, named):
    for name in ("a.png", "B.PNG"):
        (tmp_path / name).write_bytes((tree / "a.png").read_bytes())
    monkeypatch.setattr(sys, "platform", platform)

    assert found_in(tmp_path, "*.png")[0] == named


def test_matches_that_are_not_pictures_are_listed(tree, tmp_path):
    for name in ("a.png", "notes.txt", "z.webp"):
        (tmp_path / name).write_bytes((tree / "a.png").read_bytes())
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/b.png").write_bytes((tree / "a.png").read_bytes())

    (tmp_path / "named.png").mkdir()
    (tmp_path / "gone.png").symlink_to("nowhere.png")

    none = ["gone.png", "named.png", "notes.txt"]
    assert found_in(tmp_path, "*") == (["a.png", "z.webp"], sorted([*none, "folder"]))
    assert found_in(tmp_path, "**") == (["a.png", "folder/b.png", "z.webp"], none)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (" ", "here: the path is empty."),
        ("**/d/**", "here: **/d/** has more than one **."),
        ("x" * (MAX_PATTERN_CHARS + 1), "here: the path has 1,001 characters."),
        ("**/*.png", "here: **/*.png matches more than 3 pictures."),
    ],
)
def test_patterns_that_name_nothing_or_too_much_are_refused(tree, pattern, message):
    with pytest.raises(K2Error) as error:
        found_in(tree, pattern, most=3)
    assert str(error.value) == message


def test_the_limits_themselves_are_allowed(tree):
    assert len(found_in(tree, "**/a.png", most=5)[0]) == 5
    assert found_in(tree, "." + "/" * (MAX_PATTERN_CHARS - 6) + "a.png")[0] == ["a.png"]


def test_format_is_told_by_content_and_truncation_by_decoding(tmp_path):
    Image.effect_noise((64, 64), 60).convert("RGB").save(tmp_path / "a.jpg")
    cut = tmp_path / "cut.png"
    cut.write_bytes((tmp_path / "a.jpg").read_bytes()[:-300])

    assert check_picture(tmp_path / "a.jpg", "here", "a", complete=True) == "jpg"
    assert check_picture(cut, "here", "cut") == "jpg"
    with pytest.raises(K2Error, match="here: cut is not a readable picture"):
        check_picture(cut, "here", "cut", complete=True)


def test_a_picture_is_opened_once_to_check_and_decode_it(tmp_path, monkeypatch):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    opened: list[Path] = []
    monkeypatch.setattr(picture_file, "check_file", opened.append)

    check_picture(tmp_path / "a.png", "here", "a", complete=True)

    assert opened == [tmp_path / "a.png"]


@pytest.mark.parametrize(("size", "fine"), [((MIN_SIDE, MIN_SIDE), True), ((MIN_SIDE - 1, 64), False)])
def test_pictures_that_are_too_small_are_refused(tmp_path, size, fine):
    Image.new("RGB", size).save(tmp_path / "a.png")
    if fine:
        assert check_picture(tmp_path / "a.png", "here", "a") == "png"
        return
    with pytest.raises(K2Error, match=f"a has {size[0]} x {size[1]} pixels"):
        check_picture(tmp_path / "a.png", "here", "a")


def test_sides_follow_the_exif_orientation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # on its side
    Image.new("RGB", (40, 30)).save(tmp_path / "a.jpg", exif=exif)
    assert picture_sides(tmp_path / "a.jpg") == (30, 40)


@pytest.mark.parametrize(("kind", "value"), [(2, b"6"), (7, b"\x06"), (3, b"\x09"), (3, b"\x05"), (3, b"\x08")])
def test_sides_match_decoding_for_odd_exif_orientations(tmp_path, kind, value):
    """A picture's sides are those that it is decoded with, whatever its orientation tag contains."""
    entry = b"\x12\x01" + kind.to_bytes(2, "little") + (1).to_bytes(4, "little") + value.ljust(4, b"\0")
    exif = b"Exif\0\0II*\0" + (8).to_bytes(4, "little") + b"\x01\0" + entry + bytes(4)
    Image.new("RGB", (40, 30)).save(tmp_path / "a.jpg", exif=exif)

    with Image.open(tmp_path / "a.jpg") as image:
        assert picture_sides(tmp_path / "a.jpg") == ImageOps.exif_transpose(image).size


@pytest.mark.parametrize(
    ("mode", "colour", "dark"),
    [
        ("L", 127, True),
        ("L", 128, False),
        ("RGB", (0, 255, 0), True),  # a third of white, whatever the eye sees
        ("RGBA", (255, 255, 255, 120), True),
        ("RGBA", (255, 255, 255, 140), False),
        ("LA", (255, 0), True),
        ("I;16", 128 * 257 - 200, True),
        ("I;16", 128 * 257 + 200, False),
    ],
)
def test_masks_that_paint_nothing_are_dark(tmp_path, mode, colour, dark):
    Image.new(mode, (20, 20), colour).save(tmp_path / "a.png")
    assert is_dark(tmp_path / "a.png") == dark


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("LA.png", "Did you mean refs/la.png?"),
        ("la.jpg", "Did you mean refs/la.png?"),
        ("harbor.jpeg", "Did you mean refs/harbour.jpeg?"),
        ("gone.png", ""),  # a link, which is not suggested for itself
        ("nothing.png", ""),
        ("deep/la.png", ""),
    ],
)
def test_missing_pictures_get_a_hint_at_a_similar_name(tmp_path, name, hint):
    for there in ("la.png", "harbour.jpeg", "nothing.txt"):
        (tmp_path / there).write_bytes(b"")
    (tmp_path / "gone.png").symlink_to("nowhere.png")

    assert picture_hint(tmp_path / name, f"refs/{name}") == hint


def test_in_folder_skips_hidden_files_and_folders(tree, tmp_path):
    assert [path.name for path in folder_pictures(tree / "d")] == ["a.png", "b.jpg"]
    (tmp_path / "folder.png").mkdir()
    assert folder_pictures(tmp_path) == []
