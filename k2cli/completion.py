"""What the shell offers after Tab: names, and the values of options. It never complains and never loads anything."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import typer  # Typer resolves the annotations below

from k2cli.texts import UNPRINTABLE

if TYPE_CHECKING:
    from k2cli.project import Project

SHELL_SPECIAL = re.compile(rf"^[-=~]|[\s\"'`$\\|&;<>(){{}}\[\]*?!#^]|{UNPRINTABLE.pattern}")  # what shells interpret


def current_project(context: typer.Context | None) -> Project | None:
    """The project that the command line so far refers to; None if it cannot be read."""
    from k2cli.project import Project

    params = context.params if context else {}
    folder = params.get("project") or next(iter(params.get("projects") or ()), None)
    with suppress(Exception):  # a shell in the middle of a line is no place for messages
        return Project.open(Path(folder)) if folder else Project.find(Path.cwd())
    return None


def complete_style(context: typer.Context, incomplete: str) -> list[str]:
    """Style names."""
    project = current_project(context)
    with suppress(Exception):  # of a folder that may not be read
        return matching(project.styles.names if project else (), incomplete)
    return []


def complete_weight(context: typer.Context, incomplete: str) -> list[str]:
    """NAME= for NAME=WEIGHT; the user types the weight."""
    return [f"{name}=" for name in complete_style(context, incomplete)]


def complete_prompt(context: typer.Context, incomplete: str) -> list[str]:
    """Names of the project's prompts, for --only."""
    from k2cli.prompts import name_files

    project = current_project(context)
    return matching([name for _, name in name_files(project.prompts)] if project else (), incomplete)


def complete_run(context: typer.Context, incomplete: str) -> list[str]:
    """Folders of the project's runs."""
    from k2cli.history import run_folders

    project = current_project(context)
    with suppress(Exception):  # of a folder that may not be read
        return matching([run.name for run in run_folders(project.outputs)] if project else (), incomplete)
    return []


def complete_recipe(incomplete: str) -> list[str]:
    """Bundled recipes, and folders, which may hold pictures."""
    from model.train import recipe

    above = incomplete[: incomplete.rfind("/") + 1]
    with suppress(Exception):
        inside = sorted(path.name for path in Path(above or ".").expanduser().iterdir() if path.is_dir())
        folders = [f"{above}{name}/" for name in inside if not name.startswith(".")]
        return matching([*recipe.names(), *folders], incomplete)
    return []


def complete_model(incomplete: str) -> list[str]:
    """Bundled models, and those that were pulled."""
    from model import library

    with suppress(Exception):
        return matching(sorted({model.name for model in library.list_models()}), incomplete)
    return []


def complete_setting(key: str) -> Callable[[str], list[str]]:
    """The values of a setting that has only certain ones."""

    def complete(incomplete: str) -> list[str]:
        from k2cli.settings import FIELDS

        return matching(FIELDS[key].metadata["choices"], incomplete)

    return complete


def complete_method(incomplete: str) -> list[str]:
    """Methods of reading a style's pictures."""
    from model.spec import METHODS

    return matching(METHODS, incomplete)


def matching(names: Iterable[str], incomplete: str) -> list[str]:
    """Names with this prefix. Shells insert them as is, and zsh even runs what some contain: a stranger's project may
    hold a style or a run of any name, so names that need quotes are not offered."""
    return [name for name in names if name.startswith(incomplete) and not SHELL_SPECIAL.search(name)]
