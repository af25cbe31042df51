"""What `k2 render` is asked for: it turns projects into planned runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from k2cli.console import name_among_several, say
from k2cli.job_warnings import (
    equal_step_counts,
    missing_init_image,
    missing_lead,
    unsuitable_init_images,
    unused_settings,
)
from k2cli.like import Example
from k2cli.matrix import Matrix
from k2cli.project import Project, Shot
from k2cli.prompts import Prompt
from k2cli.runs import Job, SheetLayout
from k2cli.settings import Settings
from model.errors import listed


@dataclass(frozen=True)
class Request:
    """What a command line says about pictures, which replaces what their projects say."""

    settings: Mapping[str, Any]  # by their keys in [render]
    prompts: Sequence[Prompt] | None  # instead of the projects' own
    only: Sequence[str]  # names of the projects' own
    weights: Mapping[str, float]  # of styles, on top of the projects'
    matrices: Sequence[Matrix]
    moodboard: float | None  # its strength
    example: Example | None  # the picture of --like

    def job(self, project: Project, *, quiet: bool, with_project: bool) -> Job:
        """Plan a project's run, with warnings about what may not be meant, prefixed with the project's name if several
        are asked for. Raises K2Error."""
        prompts, weights = self.prompts, self.weights
        if self.example:
            reuse_prompt = prompts is None and not self.only
            said = {**self.settings, **(self.matrices[0].axes if self.matrices else {})}
            prompts = prompts and [self.example.with_own_settings(prompt, project.settings, said) for prompt in prompts]
            project, weights = self.example.apply_to(project, said, weights, self.moodboard, reuse_prompt=reuse_prompt)
            prompts = [self.example.prompt()] if reuse_prompt else prompts
        elif self.moodboard is not None:
            project = project.with_board(self.moodboard)
        wanted = project.choose_prompts(self.only) if prompts is None and self.only else prompts
        matrices = self.matrices or (project.matrices_for(wanted) if prompts is None and not self.example else ())
        settings = project.resolve_settings(**self.settings)
        return plan_project(project, settings, wanted, weights, matrices, quiet=quiet, with_project=with_project)

    def warn_if_changed(self, job: Job) -> None:
        """Warn if the look of the --like picture has changed since."""
        if self.example and (changed := self.example.describe_changes(job)):
            say(changed, "yellow")


def plan_project(
    project: Project,
    settings: Settings,
    prompts: Sequence[Prompt] | None,
    styles: Mapping[str, float],
    matrices: Sequence[Matrix],
    *,
    quiet: bool,
    with_project: bool,
) -> Job:
    """The run of a project, as `Project.shots` plans it, with warnings about what may not be meant."""
    project_name = name_among_several(project.root) if with_project else project.root.name
    prefix = f"{project_name}: " if with_project else ""
    planned_prompts = project.prompts if prompts is None else prompts
    if not quiet and (beyond := settings.stronger_than_turbo([prompt.settings for prompt in planned_prompts])):
        say(f"{project_name} has {beyond}", "yellow")
    shots = project.shots(settings, prompts, styles, matrices)
    if not quiet and (names := project.uncompared(prompts, matrices)):
        they, name = ("it is", names[0]) if len(names) == 1 else ("they are", "NAME")
        left = f"{they} rendered only by name: --only {name}"
        say(f"{project_name}: no [[matrix]] covers {listed(names)}, so {left}", "yellow")
    job = plan_job(project, settings, shots, compared=bool(matrices))
    if not quiet:
        unused = *missing_init_image(job, settings, planned_prompts, matrices), *unused_settings(settings, shots)
        for warning in (
            *unused,
            *missing_lead(settings, shots),
            *unsuitable_init_images(job),
            *equal_step_counts(job, matrices),
        ):
            say(f"{prefix}{warning}", "yellow")
    return job


def plan_job(project: Project, settings: Settings, shots: Sequence[Shot], *, compared: bool) -> Job:
    """The run of these pictures; the sheet of a matrix shows its rows below one another."""
    job = Job(project, shots, settings.model_spec())
    if not (compared and shots):
        return job
    return replace(job, folder_title=f"matrix-{shots[0].name.rpartition('-')[0]}", sheet=SheetLayout(columns=1))
