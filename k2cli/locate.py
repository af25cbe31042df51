"""Which project is meant: the one named, that of a picture, or that of the current folder. Heavy imports are local."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from model.errors import K2Error

if TYPE_CHECKING:
    from k2cli.folder import Folder
    from k2cli.project import Project


def prompt_hint(word: str, words: Sequence[str], prompts: Sequence[str]) -> str:
    """A hint for a word given where a project's folder belongs: it may be a prompt, known or new, or the rest of one.

    words    all that were given there
    prompts  those of -p
    """
    from k2cli.project import Project
    from k2cli.texts import shell_quote

    if any(prompt.split() != [prompt] for prompt in prompts):  # that one was quoted, so this word is another
        return f"Each prompt needs its own -p. To create a project: k2 new {shell_quote(word)}"
    if len(prompts) == 1:
        there = "".join(f"{shell_quote(each)} " for each in words if os.path.exists(each))
        whole = " ".join([*prompts, *(each for each in words if not os.path.exists(each))])
        return f"Put a prompt of several words in quotes: k2 render {there}-p {shell_quote(whole)}"
    if (above := os.path.dirname(word)) and (word.split() == [word] or os.path.isdir(above)):
        return "Check the path."
    with suppress(K2Error):
        if (here := Project.find_or_none(Path.cwd())) and here.choose_prompts([word]):
            return f"To render the prompt of that name: k2 render --only {shell_quote(word)}"
    return f"Give a prompt with -p: k2 render -p {shell_quote(word)}"


def find_file(file: Path, project: Path | None) -> Path:
    """A picture or a record by its path: relative to the current folder, else to the project that is named."""
    from k2cli.folder import Folder

    if project is None:
        return file
    there = Folder.at(project).root / file
    return there if not os.path.exists(file) and os.path.exists(there) else file


def find_project_of(file: Path, project: Path | None, allow_outside: bool) -> Folder | None:
    """A picture's project: the one named, else the nearest above the picture, else above the current folder. Its
    k2.toml is not read: the picture exists, whatever that says by now."""
    from k2cli.folder import Folder, find_root

    root = project or find_root(file.absolute().parent) or find_root(Path.cwd())
    return Folder.at(root, allow_outside=allow_outside) if root else None


def find_project(project: Path | None, allow_outside: bool = False) -> Project:
    from k2cli.project import Project

    at = Project.open if project else Project.find
    return at(project or Path.cwd(), allow_outside=allow_outside)


def open_projects(
    folders: Sequence[str], project: Path | None, allow_outside: bool, prompts: Sequence[str] = ()
) -> list[Project]:
    """The projects named, each once, however it is spelt; or the one that the current folder belongs to. Raises
    K2Error if anything is wrong with any, after reporting all of it.

    prompts  those of -p, for a hint about words that name no folder
    """
    from k2cli.multi_project import raise_all, try_each
    from k2cli.project import Project

    missing = [name for name in folders if not os.path.exists(name)]  # what most people type first
    said = ((name, name if len(name) < 80 else f"{name[:80]}…") for name in missing)
    errors = [
        K2Error(f'There is no project "{short}".', hint=prompt_hint(name, folders, prompts)) for name, short in said
    ]
    if missing and len(missing) == len(folders):
        raise errors[0]
    found, no_projects = find_folders([name for name in folders if name not in missing], project, allow_outside)
    opened, failed = try_each(found, lambda each: Project.open(each.root, allow_outside=allow_outside))
    raise_all([*errors, *no_projects, *failed])
    return opened


def find_folders(
    folders: Sequence[str], project: Path | None, allow_outside: bool
) -> tuple[list[Folder], list[K2Error]]:
    """The same without reading their k2.toml, and what is wrong with names that are no projects."""
    from k2cli.folder import Folder

    if folders and project:
        raise typer.BadParameter("name projects as arguments or with --project, not both", param_hint="--project")
    if not folders:
        at = Folder.at if project else Folder.find
        return [at(project or Path.cwd(), allow_outside=allow_outside)], []
    found: dict[Path, Folder] = {}
    errors = []
    for name in folders:
        try:
            each = Folder.at(Path(name), allow_outside=allow_outside)
            found.setdefault(each.root.resolve(), each)
        except K2Error as error:
            errors.append(error)
    return list(found.values()), errors
