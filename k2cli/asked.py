"""What `k2 render` is asked for: projects in, their runs out, planned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from k2cli.console import among_others, say
from k2cli.doubts import idle, led_apart, misbegun, same_steps, unbegun
from k2cli.like import Example
from k2cli.matrix import Matrix
from k2cli.project import Project, Shot
from k2cli.prompts import Prompt
from k2cli.runs import Job, SheetForm
from k2cli.settings import Settings
from model.errors import listed


@dataclass(frozen=True)
class Asked:
    """What a command line says of pictures, in the place of what their projects say."""

    settings: Mapping[str, Any]  # by their names below [render]
    prompts: Sequence[Prompt] | None  # in the place of the projects' own
    only: Sequence[str]  # names of the projects' own
    weights: Mapping[str, float]  # of styles, on top of the projects'
    compared: Sequence[Matrix]
    moodboard: float | None  # its strength
    example: Example | None  # a picture that others are to be like

    def job(self, project: Project, *, quiet: bool, named: bool) -> Job:
        """A project's run, planned; what may not be meant is told, with the project's name in front where several are
        asked for. Raises K2Error."""
        prompts, weights = self.prompts, self.weights
        if self.example:
            own = prompts is None and not self.only
            said = {**self.settings, **(self.compared[0].axes if self.compared else {})}
            prompts = prompts and [self.example.freed(prompt, project.settings, said) for prompt in prompts]
            project, weights = self.example.within(project, said, weights, self.moodboard, own_prompt=own)
            prompts = [self.example.prompt()] if own else prompts
        elif self.moodboard is not None:
            project = project.with_board(self.moodboard)
        wanted = project.choose(self.only) if prompts is None and self.only else prompts
        matrices = self.compared or (project.comparing(wanted) if prompts is None and not self.example else ())
        settings = project.settle(**self.settings)
        return plan_project(project, settings, wanted, weights, matrices, quiet=quiet, named=named)

    def tell_changed(self, job: Job) -> None:
        """That the look of the picture that others are to be like is another by now."""
        if self.example and (changed := self.example.changed(job)):
            say(changed, "yellow")


def plan_project(
    project: Project,
    settings: Settings,
    prompts: Sequence[Prompt] | None,
    styles: Mapping[str, float],
    matrices: Sequence[Matrix],
    *,
    quiet: bool,
    named: bool,
) -> Job:
    """The run of a project, as `Project.shots` plans it; what may not be meant is told."""
    called = among_others(project.root) if named else project.root.name
    whose = f"{called}: " if named else ""
    asked = project.prompts if prompts is None else prompts
    if not quiet and (beyond := settings.beyond([prompt.settings for prompt in asked])):
        say(f"{called} has {beyond}", "yellow")
    shots = project.shots(settings, prompts, styles, matrices)
    if not quiet and (names := project.uncompared(prompts, matrices)):
        they, name = ("it is", names[0]) if len(names) == 1 else ("they are", "NAME")
        left = f"{they} not rendered; alone {they}: --only {name}"
        say(f"{called}: no [[matrix]] is about {listed(names)}: {left}", "yellow")
    job = plan_job(project, settings, shots, compared=bool(matrices))
    if not quiet:
        void = *unbegun(job, settings, asked, matrices), *idle(settings, shots)
        for doubt in (*void, *led_apart(settings, shots), *misbegun(job), *same_steps(job, matrices)):
            say(f"{whose}{doubt}", "yellow")
    return job


def plan_job(project: Project, settings: Settings, shots: Sequence[Shot], *, compared: bool) -> Job:
    """The run of these pictures; those that a matrix compares stand row below row on their sheet."""
    job = Job(project, shots, settings.held())
    if not (compared and shots):
        return job
    return replace(job, called=f"matrix-{shots[0].name.rpartition('-')[0]}", sheet=SheetForm(columns=1))
