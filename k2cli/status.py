"""`k2` alone, inside a project: where you are, and what to do next."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from k2cli import history
from k2cli.console import aligned, sanitize, screen_width
from k2cli.outputs import PLAN_FILE, SHEET_FILE, Run
from k2cli.project import MAX_PLAN, Project
from k2cli.prompts import name_files
from k2cli.texts import shell_quote
from k2cli.toml_tables import Place
from model.errors import K2Error, listed, pluralise
from model.headers import open_file

PLANNED_PICTURE = re.compile(  # in a plan as k2 writes it
    rb'^\[\[picture\]\]\nfile = "([^"\\/\n]+)\.\w+"$', re.MULTILINE
)


def project_status(*, allow_outside: bool = False) -> str:
    """The project around the current folder in a few lines, and what to do next; "" if there is none.

    Raises K2Error if its k2.toml, or a style that it uses, cannot be read.
    """
    project = Project.find_or_none(Path.cwd(), allow_outside=allow_outside)
    if project is None:
        return ""
    names = [name for _, name in name_files(project.prompts)]
    outputs, lost = project.outputs, ""
    try:
        runs, last = history.run_folders(outputs), Run.last(outputs)
    except K2Error as error:  # of an unmounted drive, say: the rest can still be shown
        runs, last, lost = [], None, f"{error} {error.hint}"
    newest = next((made[-1] for run in reversed(runs) if (made := history.read_run(run))), None)
    done, planned = run_progress(last) if last and last.folder in runs else (0, 0)
    when = f", the last {newest.run}, {time_ago(newest.created, datetime.now(UTC))}" if newest else ""
    facts = [
        ("  prompts", listed(names) or "none yet: add a [[prompt]] to k2.toml"),
        ("  styles", listed(describe_styles(project)) or "none"),
        ("  model", f"{model_label(project)}, {pluralise(project.settings.batch, 'picture')} per prompt"),
        *([("  together", describe_cohesion(project))] if project.settings.cohesion else []),
        ("  runs", lost or f"{len(runs) or 'none yet'}{when}"),
    ]
    steps = {}
    if last and done < planned:
        there = f"{last.folder.name} has {done} of {pluralise(planned, 'picture')}"
        if last.is_busy:
            there += " and is being rendered"
        else:
            steps["k2 render --resume"] = "render the rest"
        facts.append(("  runs", there))
    steps |= {"k2 render": "render the pictures"} if names else {'k2 render -p "a red fox"': "render a picture"}
    if newest:
        shown = newest.path.relative_to(project.root) if Path.cwd() == project.root else newest.path
        steps |= {
            f"k2 show {shell_quote(str(shown))}": "show what it was made from",
            "k2 log": "list all pictures",
            "k2 gallery": "make a web page of them",
        }
    else:
        steps |= {"k2 render --dry-run": "show what would be rendered"}
    steps |= {"k2 --help": "everything else"}
    commands = aligned([(f"  {step}", what) for step, what in steps.items()], 23)
    return sanitize(f"{project.name}  ({project.root})\n{aligned(facts, 12, screen_width())}\n\n{commands}")


def model_label(project: Project) -> str:
    """The model, and which of its checkpoints if the project names one."""
    return " ".join(filter(None, (project.settings.model, project.settings.variant)))


def describe_cohesion(project: Project) -> str:
    """How much pictures share, and with which one."""
    whose = "the prompt's first picture" if project.settings.scope == "prompt" else "the run's first picture"
    return f"cohesion {project.settings.cohesion:g}, with {whose}"


def describe_styles(project: Project) -> list[str]:
    """The project's moodboard and styles: those with weights, those of single prompts, and those that are off. Raises
    K2Error for a missing one."""
    board = [f"moodboard {project.board.strength:g}"] if project.board and project.board.strength else []
    project.styles.resolve(dict.fromkeys(project.weights, 0.0), Place(project.toml, ("style",)))
    for prompt in project.prompts:
        project.styles.resolve(dict.fromkeys(prompt.style, 0.0), partial(prompt.where, "style"))
    weights = [f"{name} {weight:g}" for name, weight in project.weights.items() if weight]
    others = {name: describe_weight(project, name) for name in project.styles.names if not project.weights.get(name)}
    unused = [f"{name} (off)" for name, weight in others.items() if weight == "off"]
    return [*board, *weights, *(f"{name} ({weight})" for name, weight in others.items() if weight != "off"), *unused]


def describe_weight(project: Project, style: str) -> str:
    """A style's weight in the project, or that only some prompts give it one, or that it is off."""
    if weight := project.weights.get(style):
        return f"weight {weight:g}"
    return "some prompts" if any(prompt.style.get(style) for prompt in project.prompts) else "off"


def run_progress(run: Run) -> tuple[int, int]:
    """How many of a run's pictures exist, and how many are planned; 0 of 0 if its plan cannot be read, or if the run
    has its contact sheet: whatever is missing then was deleted since.

    A plan may be megabytes long: it is searched for names, and the rest is not parsed.
    """
    if run[SHEET_FILE].exists():
        return 0, 0
    try:
        with open_file(run[PLAN_FILE]) as file:
            stems = [stem.decode() for stem in PLANNED_PICTURE.findall(file.read(MAX_PLAN))]
        return sum(map(run.is_done, stems)), len(stems)
    except (OSError, ValueError):
        return 0, 0


def first_command(outputs: Path) -> str:
    """The command that makes a project's first pictures; it resumes a run that was stopped before it had any. Files
    outside the project that such a run needs are reported, for the user to allow, when it is tried: the plan may be a
    stranger's."""
    last = Run.last(outputs)
    done, planned = run_progress(last) if last else (0, 0)
    return "k2 render --resume" if last and done < planned and not last.is_busy else "k2 render"


def time_ago(moment: datetime | None, now: datetime) -> str:
    """ "5 minutes ago"."""
    if moment is None:
        return "some time ago"
    seconds = int((now - moment).total_seconds())
    for unit, length in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= length:
            return f"{pluralise(seconds // length, unit)} ago"
    return "just now"
