"""A project's folder on disk: created, found, and never left, whatever its k2.toml says."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from k2cli import template
from k2cli.disk import DRAFT_SUFFIX, uninterrupted, writing
from k2cli.texts import check_path, check_printable, nfc
from model.errors import K2Error

PROJECT_FILE = "k2.toml"
GITIGNORE = ".gitignore"


class OutsideProject(K2Error):
    """A project's file is outside its folder; the hint is for commands that have --allow-outside."""


@dataclass(frozen=True, kw_only=True)
class Folder:
    """A project's folder, whatever its k2.toml says."""

    root: Path
    allow_outside: bool = False

    @classmethod
    def at(cls, folder: Path, *, allow_outside: bool = False) -> Folder:
        """The folder of that name, or of that k2.toml. Raises K2Error if it is no project."""
        if folder.is_file() and folder.name == PROJECT_FILE:
            folder = folder.parent
        if not folder.exists():
            raise K2Error(f"There is no folder {folder}.", hint="Create a project: k2 new NAME")
        if not folder.is_dir():
            raise K2Error(f"{folder} is not a project: it is a file.", hint=project_hint(folder))
        if not (folder / PROJECT_FILE).is_file():
            raise K2Error(f"{folder} is not a project: it has no {PROJECT_FILE}.", hint=project_hint(folder))
        plain = Path(os.path.abspath(folder))  # readable, without ".."; behind a link that may be another folder
        root = plain if plain.exists() and plain.samefile(folder) else folder.absolute()
        return Folder(root=root, allow_outside=allow_outside)

    @classmethod
    def find(cls, start: Path, *, allow_outside: bool = False) -> Folder:
        """The project of a folder, or of the nearest one above it. Raises K2Error if there is none."""
        if root := find_root(start):
            return cls.at(root, allow_outside=allow_outside)
        raise K2Error(
            f"There is no {PROJECT_FILE} in {start.absolute()} or above it.", hint="Create a project: k2 new NAME"
        )

    @property
    def outputs(self) -> Path:
        return self.path_inside("outputs")

    def path_inside(self, path: str | Path, where: str = "") -> Path:
        """A path of the project, absolute. Links count as the places they lead to."""
        prefix = f"{where}: " if where else ""
        check_path(path, prefix)
        full = spelled_on_disk(self.root, path)
        if is_link_loop(full):
            raise K2Error(f"{prefix}{path} is a link that leads back to itself.", hint="Fix the link.")
        if not self.allow_outside and not full.resolve().is_relative_to(self.root.resolve()):
            raise OutsideProject(
                f"{prefix}{path} lies outside the project.",
                hint="Copy it into the project, or allow it: --allow-outside",
            )
        return full

    def recorded_path(self, path: str | Path) -> Path:
        """The same for a path in a record or a plan, which keeps naming it wherever its file is copied."""
        try:
            full = self.path_inside(path)
        except OutsideProject as error:
            raise OutsideProject(str(error), hint="Allow it: --allow-outside") from None
        return full.resolve() if ".." in full.parts else full  # kept readable

    @staticmethod
    def create(folder: Path, compose: Callable[[str], str] | None = None) -> Path:
        """Create a project that renders as is; it appears complete or not at all, and replaces nothing.

        compose  gives k2.toml for a project of this name, instead of the template and its style
        """
        folder = Path(os.path.abspath(folder))
        name = " ".join(check_printable(folder.name, "The project's name").split())
        if folder.exists() and not folder.is_dir():
            raise K2Error(f"{folder} exists already and is not a folder.", hint="Choose another name.")
        exists = folder.exists()  # perhaps a mount, into which nothing can be moved from beside it
        # the project's name may be as long as names can be
        short = f".{os.getpid()}-{secrets.token_hex(4)}{DRAFT_SUFFIX}"
        draft = (folder if exists else folder.parent) / short
        try:
            with writing(folder):
                for part in ("refs", "styles"):
                    (draft / part).mkdir(parents=True)
                quoted = name.replace("\\", "\\\\").replace('"', '\\"')
                text = compose(name) if compose else template.PROJECT_TOML.format(name=quoted)
                (draft / PROJECT_FILE).write_text(text, "utf-8")
                if not compose:
                    (draft / "styles" / "sticker.toml").write_text(template.STYLE_TOML, "utf-8")
                if not os.path.lexists(folder / GITIGNORE):
                    (draft / GITIGNORE).write_text(template.GITIGNORE_TEXT, "utf-8")
                if exists:  # it may be a shell's current folder, so it stays, and k2.toml moves in last
                    move_parts(draft, folder, parts_to_move(draft, folder, ("refs", "styles", GITIGNORE, PROJECT_FILE)))
                else:
                    os.replace(draft, folder)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        return folder


def git_tracks_outputs(folder: Path) -> bool:
    """Whether .gitignore, which may be the user's own, has no line for the outputs or the pictures in them."""
    with suppress(OSError):
        lines = (folder / GITIGNORE).read_text("utf-8", "replace").splitlines()
        return not any(map(ignores_outputs, lines))
    return False


def ignores_outputs(line: str) -> bool:
    """Whether a line of a .gitignore matches them: a name in any folder, or a path if it contains a slash."""
    pattern = line.rstrip().removesuffix("/").replace("[^", "[!")
    parts = pattern.removeprefix("/").split("/") if "/" in pattern else ["**", pattern]
    picture = ("outputs", "0001-x", "x-1.png")
    matched = {0}  # how many of its parts the pattern so far may match; a folder includes its contents
    for number, part in enumerate(parts, 1):
        if part == "**":
            least = number == len(parts)  # at the end it matches what is inside, not the folder itself
            matched = {end for start in matched for end in range(start + least, len(picture) + 1)}
        else:
            matched = {at + 1 for at in matched if at < len(picture) and fnmatch(picture[at], part)}
    return bool(matched - ({0, len(picture)} if line.rstrip().endswith("/") else {0}))  # a picture is no folder


def parts_to_move(source: Path, target: Path, parts: Sequence[str]) -> list[str]:
    """Parts of a folder that are to be moved into another; for a folder that both have, its contents. Raises K2Error if
    one exists there already."""
    found: list[str] = []
    for part in (part for part in parts if (source / part).exists()):
        inside = [f"{part}/{name}" for name in os.listdir(source / part)] if (source / part).is_dir() else None
        linked = inside and (target / part).is_symlink()  # to a place where a project writes nothing
        new = [part] if inside is None or linked or not (target / part).is_dir() else inside
        for name in new:
            if os.path.lexists(target / name):
                raise K2Error(
                    f"{target} already contains {name}.", hint="Nothing is overwritten: choose another folder."
                )
        found += new
    return found


def move_parts(source: Path, target: Path, parts: Sequence[str]) -> None:
    """Move parts of a folder into another, or none of them."""
    moved: list[str] = []
    with uninterrupted():
        try:
            for part in parts:
                os.replace(source / part, target / part)
                moved.append(part)
        except OSError:
            for part in moved:
                os.replace(target / part, source / part)
            raise


def list_names(folder: Path) -> list[str]:
    """The names in a folder; none if it does not exist. Raises K2Error if it cannot be read."""
    try:
        return os.listdir(folder) if folder.is_dir() else []  # a glob would silently skip what it may not read
    except OSError as error:
        raise K2Error(f"{folder} cannot be read: {error.strerror}.", hint="Check its permissions.") from None


def spelled_on_disk(root: Path, path: str | Path) -> Path:
    """A path below a folder, spelt as on disk: some systems store accents apart from their letters."""
    full = root / path
    if str(path).isascii() or os.path.lexists(full):
        return full
    anchor = Path(path).anchor
    found = root / anchor
    for part in Path(path).parts[bool(anchor) :]:
        if not os.path.lexists(found / part):
            with suppress(OSError):
                part = next((name for name in os.listdir(found) if nfc(name) == nfc(part)), part)
        found /= part
    return found


def is_link_loop(path: Path) -> bool:
    """Whether links on the way lead back to themselves: not every Python's `resolve` reports it."""
    try:
        os.stat(path)
    except OSError as error:
        return error.errno == errno.ELOOP
    return False


def project_hint(folder: Path) -> str:
    """A hint for a path given as a project's folder: it may be a picture, a run, the outputs, or a new project."""
    from k2cli.console import for_shell
    from k2cli.outputs import RUN_NUMBER, picture_for, run_number
    from model.picture_file import has_picture_suffix

    full = Path(os.path.abspath(folder))
    if full.exists() and not full.is_dir():
        picture = picture_for(full)  # itself, or the one beside a record
        of_one = has_picture_suffix(picture) and picture.is_file()
        more = f" To see what a picture was made from: k2 show {for_shell(folder)}" if of_one else ""
        return f"A project is a folder with a {PROJECT_FILE}.{more}"
    if RUN_NUMBER.match(full.name) and (full.parent.parent / PROJECT_FILE).is_file():
        return f"It is a run; k2 log and k2 gallery select it with: --run {run_number(full)}"
    if full.name == "outputs" and (full.parent / PROJECT_FILE).is_file():
        return f"It holds a project's pictures; the project itself is {for_shell(full.parent)}"
    return f"Create one: k2 new {for_shell(folder)}"


def find_root(folder: Path) -> Path | None:
    """The nearest folder with a k2.toml, this one or above it; whether that can be read is another question."""
    folders = (folder.absolute(), *folder.absolute().parents)
    return next((each for each in folders if (each / PROJECT_FILE).is_file()), None)
