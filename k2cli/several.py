"""Several projects in one command: an error in one is reported for it, and does not stop the others."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from k2cli.commands import as_problem
from k2cli.console import Unwritable, among_others, for_shell, last_words, say, short_path, show_error
from k2cli.disk import DiskFull, ended_as_by_ctrl_c, undisturbed
from k2cli.folder import Folder, root_above
from k2cli.hands import Unreachable
from k2cli.outputs import Run, number_of
from k2cli.runs import Job, begin
from model.errors import USAGE, K2Error, count_of

One = TypeVar("One", bound=Folder | Job)
Gained = TypeVar("Gained")

LOCKED = 100  # runs kept locked until their turn: each needs an open file, and systems allow few
ENDS_ALL = (DiskFull, Unreachable, Unwritable)  # errors that any other job would meet, too
AGAIN = ", and try again."  # how a hint ends that says what to fix before resuming


class Several(K2Error):
    """An error after others that have been shown, carried along for whoever needs all of them at once."""

    def __init__(self, message: str, told: Sequence[K2Error], *, hint: str = "", code: int = 1):
        super().__init__(message, hint=hint, code=code)
        self.told = told


# ---- what is known before anything is rendered -------------------------------------------------------------------


def tried(asked: Sequence[One], do: Callable[[One], Gained]) -> tuple[list[Gained], list[K2Error]]:
    """The results for projects, or their jobs, and the errors of those that failed."""
    gained: list[Gained] = []
    wrong: list[tuple[Folder, K2Error]] = []
    for each in asked:
        try:
            gained.append(do(each))
        except Exception as error:
            problem = as_problem(error)
            if problem is None:
                raise
            wrong.append((home_of(each), problem))
    errors = [error for _, error in wrong]
    same = {(str(error), error.hint, error.code) for error in errors}
    of_all = len(errors) == len(asked) and len(same) == 1 and errors[0].code == USAGE
    if len(asked) > 1 and not of_all:  # else the command line itself is wrong
        errors = [said_of(home, error, list(map(home_of, asked))) for home, error in wrong]
    return gained, errors


def home_of(each: Folder | Job) -> Folder:
    return each.project if isinstance(each, Job) else each


def for_all(asked: Sequence[One], do: Callable[[One], Gained]) -> list[Gained]:
    """The result for each. Raises K2Error if any failed, once all errors are shown."""
    gained, wrong = tried(asked, do)
    refuse(wrong)
    return gained


def refuse(wrong: Sequence[K2Error]) -> None:
    """Raise the last of these errors, if any, after showing the others. Equal errors are shown once."""
    if not wrong:
        return
    *told, last = {(str(error), error.hint): error for error in wrong}.values()
    for error in told:
        show_error(error)
    raise Several(str(last), told, hint=last.hint, code=last.code) if told else last


def said_of(home: Folder, error: K2Error, among: Sequence[Folder]) -> K2Error:
    """The error with its project in front, unless it already names the project unambiguously."""
    root, said = home.root, str(error)
    named = [re.escape(f"{short_path(root)}/"), rf"{re.escape(str(root))}(?![\w.-])"]  # /s-models is not one called s
    if [each.root.name for each in among].count(root.name) == 1:
        named.append(re.escape(f"{root.name} has "))
    if re.search(rf"(?<![\w./-])(?:{'|'.join(named)})", said):  # but refs/a.png does not name one called s
        return error
    return K2Error(f"{among_others(root)}: {said}", hint=error.hint, code=error.code)


# ---- one after the other -----------------------------------------------------------------------------------------


class Turns:
    """Jobs rendered one after another. All runs are begun before the first is rendered, so that each can be resumed
    whatever ends them."""

    def __init__(self, jobs: Sequence[Job], *, quiet: bool):
        self.asked, self.quiet = jobs, quiet
        self.begun: list[Job] = []
        self.failed: list[tuple[Job, K2Error]] = []
        self.now: Job | None = None  # the begun job whose turn it is

    def begin(self) -> list[Job]:
        """Begin the runs of all jobs with something left to render. Raises K2Error."""
        with undisturbed():  # an interrupt takes effect once all are planned
            for job in self.asked:
                if not job.left and not job.lacks_sheet:
                    if not self.quiet:
                        say_finished(job)
                    continue
                with self.bearing(job):
                    begun = begin(job)
                    if begun.run and len(self.begun) >= LOCKED:
                        begun.run.unlock()
                    self.begun.append(begun)
        return self.begun

    @contextmanager
    def turn(self, job: Job) -> Iterator[None]:
        """The turn of a begun job. Raises K2Error if it is the only one, or if all would meet the same error."""
        self.now = job
        with self.bearing(job):
            yield

    @contextmanager
    def bearing(self, job: Job) -> Iterator[None]:
        """Report an error in one of several jobs, and let the others continue."""
        try:
            yield
        except ENDS_ALL:
            raise
        except Exception as error:
            problem = as_problem(error)
            if problem is None or len(self.asked) == 1:
                raise
            self.failed.append((job, said_of(job.project, problem, [each.project for each in self.asked])))
            show_error(self.failed[-1][1])
            if job.run:
                job.run.discard()

    @contextmanager
    def ending(self) -> Iterator[None]:
        """All turns. If they are cut short, say how to resume; else what failed. Raises K2Error.

        After Ctrl-C every run stays; after an error only if any has a picture, else all are discarded.
        """
        interrupted = False
        try:
            with ended_as_by_ctrl_c():
                yield
        except (KeyboardInterrupt, BrokenPipeError) as reason:
            interrupted = isinstance(reason, KeyboardInterrupt)
            if interrupted or not self.quiet:
                self.tell_end("Interrupted" if interrupted else "The pipe was closed")
            raise
        except Exception as error:  # of the only job, or one that all would meet
            problem = as_problem(error)
            left = self.left if self.came_to_something else []
            if problem is None or not left:
                raise
            if isinstance(error, ENDS_ALL) or problem.hint.endswith(AGAIN):  # then nothing else needs fixing
                first = problem.hint.removesuffix(AGAIN).removesuffix(".")
                problem.hint = f"{first}, then resume with: {go_on(left)}"
            else:
                what = "; finish" if problem.hint and problem.hint[-1] not in ".?!" else " Finish"
                problem.hint = f"{problem.hint}{what} the rest as planned: {go_on(left)}".lstrip()
            raise problem from None
        finally:
            stay = interrupted or self.came_to_something
            for run in (job.run for job in self.begun if job.run):
                if not stay:
                    run.discard()
                run.unlock()
        if self.failed:
            names = ", ".join(among_others(job.project.root) for job, _ in self.failed)
            which = f"{len(self.failed)} of {count_of(len(self.asked), 'project')}"
            others = "; the others are done" if len(self.failed) < len(self.asked) else ""
            more = f" Resume with: {go_on(self.left)}" if self.left else ""
            told = [error for _, error in self.failed]
            raise Several(f"{which} failed: {names}.", told, hint=f"The errors are above{others}.{more}")

    @property
    def came_to_something(self) -> bool:
        """Whether any picture exists, from this command or from a run that it resumes."""
        return any(job.run and (job.run.has_any or not job.run.made) for job in self.begun)

    @property
    def left(self) -> list[Job]:
        """The jobs that can be resumed."""
        there = (job for job in self.begun if job.run and job.run.planned)
        return [job for job in there if job.left or job.lacks_sheet]

    def tell_end(self, why: str) -> None:
        """Print how far the current job has come, and the command that resumes all that are left."""
        job = self.now or next(iter(self.begun), None)
        if job is None or job.run is None:
            return
        there = f"{len(job.shots) - len(job.left)} of {len(job.shots)} pictures are in {short_path(job.run.folder)}"
        left = self.left
        last_words(f"{why}: {there}.{f' Resume with: {go_on(left)}' if left else ''}")


def say_finished(job: Job) -> None:
    """Print that a run has nothing left to render."""
    say(f"{short_path(job.run.folder) if job.run else job.project.root.name}: the run is complete.")


def go_on(jobs: Sequence[Job]) -> str:
    """The shortest commands that finish these runs: one for all that are their project's last, and one for each of the
    others."""
    last, commands = [], []
    for job in jobs:
        assert job.run is not None
        newest = Run.last(job.project.outputs)
        if newest and newest.folder == job.run.folder:
            last.append(job)
        else:
            commands.append(resuming([job], number_of(job.run.folder)))
    return "; ".join([resuming(last), *commands] if last else commands)


def resuming(jobs: Sequence[Job], number: int | None = None) -> str:
    """The command for the last run of each job's project, or for the run with this number."""
    here, roots = root_above(Path.cwd()), [job.project.root for job in jobs]
    words = ["k2 render --resume"]
    words += [] if number is None else [f"--run {number}"]
    if len(roots) > 1:
        words += map(for_shell, roots)
    elif not (here and here.samefile(roots[0])):
        words += [f"--project {for_shell(roots[0])}"]
    words += ["--allow-outside"] if any(map(reaches_out, jobs)) else []
    return " ".join(words)


def reaches_out(job: Job) -> bool:
    """Whether a run uses files outside its project."""
    root, specs = job.project.root.resolve(), [shot.spec for shot in job.shots]
    begun = (path for spec in specs for path in (spec.init_image, spec.mask))
    files = [Path(job.model.name), *(path for path in begun if isinstance(path, Path))]
    outside = any(file.is_absolute() and not file.resolve().is_relative_to(root) for file in files)
    return job.project.allow_outside or outside
