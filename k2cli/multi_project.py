"""Several projects in one command: an error in one is reported for it, and does not stop the others."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from k2cli.commands import as_user_error
from k2cli.console import Unwritable, for_shell, name_among_several, say, say_at_exit, short_path, show_error
from k2cli.disk import DiskFull, signals_as_ctrl_c, uninterrupted
from k2cli.folder import Folder, find_root
from k2cli.outputs import Run, number_of
from k2cli.runs import Job, begin
from k2cli.workers import Unreachable
from model.errors import USAGE, K2Error, pluralise

Target = TypeVar("Target", bound=Folder | Job)
Result = TypeVar("Result")

MAX_LOCKED = 100  # runs kept locked until their turn: each needs an open file, and systems allow few
FATAL = (DiskFull, Unreachable, Unwritable)  # errors that any other job would meet, too
RETRY = ", and try again."  # how a hint ends that says what to fix before resuming


class MultipleErrors(K2Error):
    """An error after others that have been shown, carried along for whoever needs all of them at once."""

    def __init__(self, message: str, shown: Sequence[K2Error], *, hint: str = "", code: int = 1):
        super().__init__(message, hint=hint, code=code)
        self.shown = shown


# ---- what is known before anything is rendered -------------------------------------------------------------------


def try_each(asked: Sequence[Target], do: Callable[[Target], Result]) -> tuple[list[Result], list[K2Error]]:
    """The results for projects, or their jobs, and the errors of those that failed."""
    gained: list[Result] = []
    wrong: list[tuple[Folder, K2Error]] = []
    for each in asked:
        try:
            gained.append(do(each))
        except Exception as error:
            problem = as_user_error(error)
            if problem is None:
                raise
            wrong.append((home_of(each), problem))
    errors = [error for _, error in wrong]
    same = {(str(error), error.hint, error.code) for error in errors}
    of_all = len(errors) == len(asked) and len(same) == 1 and errors[0].code == USAGE
    if len(asked) > 1 and not of_all:  # else the command line itself is wrong
        errors = [name_project(home, error, list(map(home_of, asked))) for home, error in wrong]
    return gained, errors


def home_of(each: Folder | Job) -> Folder:
    return each.project if isinstance(each, Job) else each


def for_all(asked: Sequence[Target], do: Callable[[Target], Result]) -> list[Result]:
    """The result for each. Raises K2Error if any failed, once all errors are shown."""
    gained, wrong = try_each(asked, do)
    raise_all(wrong)
    return gained


def raise_all(wrong: Sequence[K2Error]) -> None:
    """Raise the last of these errors, if any, after showing the others. Equal errors are shown once."""
    if not wrong:
        return
    *told, last = {(str(error), error.hint): error for error in wrong}.values()
    for error in told:
        show_error(error)
    raise MultipleErrors(str(last), told, hint=last.hint, code=last.code) if told else last


def name_project(home: Folder, error: K2Error, among: Sequence[Folder]) -> K2Error:
    """The error with its project in front, unless it already names the project unambiguously."""
    root, said = home.root, str(error)
    named = [re.escape(f"{short_path(root)}/"), rf"{re.escape(str(root))}(?![\w.-])"]  # /s-models is not one called s
    if [each.root.name for each in among].count(root.name) == 1:
        named.append(re.escape(f"{root.name} has "))
    if re.search(rf"(?<![\w./-])(?:{'|'.join(named)})", said):  # but refs/a.png does not name one called s
        return error
    return K2Error(f"{name_among_several(root)}: {said}", hint=error.hint, code=error.code)


# ---- one after the other -----------------------------------------------------------------------------------------


class JobQueue:
    """Jobs rendered one after another. All runs are begun before the first is rendered, so that each can be resumed
    whatever ends them."""

    def __init__(self, jobs: Sequence[Job], *, quiet: bool):
        self.asked, self.quiet = jobs, quiet
        self.begun: list[Job] = []
        self.failed: list[tuple[Job, K2Error]] = []
        self.current: Job | None = None  # the begun job whose turn it is

    def begin(self) -> list[Job]:
        """Begin the runs of all jobs with something left to render. Raises K2Error."""
        with uninterrupted():  # an interrupt takes effect once all are planned
            for job in self.asked:
                if not job.remaining and not job.needs_sheet:
                    if not self.quiet:
                        say_finished(job)
                    continue
                with self.tolerating(job):
                    begun = begin(job)
                    if begun.run and len(self.begun) >= MAX_LOCKED:
                        begun.run.unlock()
                    self.begun.append(begun)
        return self.begun

    @contextmanager
    def turn(self, job: Job) -> Iterator[None]:
        """The turn of a begun job. Raises K2Error if it is the only one, or if all would meet the same error."""
        self.current = job
        with self.tolerating(job):
            yield

    @contextmanager
    def tolerating(self, job: Job) -> Iterator[None]:
        """Report an error in one of several jobs, and let the others continue."""
        try:
            yield
        except FATAL:
            raise
        except Exception as error:
            problem = as_user_error(error)
            if problem is None or len(self.asked) == 1:
                raise
            self.failed.append((job, name_project(job.project, problem, [each.project for each in self.asked])))
            show_error(self.failed[-1][1])
            if job.run:
                job.run.discard()

    @contextmanager
    def running(self) -> Iterator[None]:
        """All turns. If they are cut short, say how to resume; else what failed. Raises K2Error.

        After Ctrl-C every run stays; after an error only if any has a picture, else all are discarded.
        """
        interrupted = False
        try:
            with signals_as_ctrl_c():
                yield
        except (KeyboardInterrupt, BrokenPipeError) as reason:
            interrupted = isinstance(reason, KeyboardInterrupt)
            if interrupted or not self.quiet:
                self.report_end("Interrupted" if interrupted else "The pipe was closed")
            raise
        except Exception as error:  # of the only job, or one that all would meet
            problem = as_user_error(error)
            left = self.resumable if self.rendered_any else []
            if problem is None or not left:
                raise
            if isinstance(error, FATAL) or problem.hint.endswith(RETRY):  # then nothing else needs fixing
                first = problem.hint.removesuffix(RETRY).removesuffix(".")
                problem.hint = f"{first}, then resume with: {resume_commands(left)}"
            else:
                what = "; finish" if problem.hint and problem.hint[-1] not in ".?!" else " Finish"
                problem.hint = f"{problem.hint}{what} the rest as planned: {resume_commands(left)}".lstrip()
            raise problem from None
        finally:
            stay = interrupted or self.rendered_any
            for run in (job.run for job in self.begun if job.run):
                if not stay:
                    run.discard()
                run.unlock()
        if self.failed:
            names = ", ".join(name_among_several(job.project.root) for job, _ in self.failed)
            which = f"{len(self.failed)} of {pluralise(len(self.asked), 'project')}"
            others = "; the others are done" if len(self.failed) < len(self.asked) else ""
            more = f" Resume with: {resume_commands(self.resumable)}" if self.resumable else ""
            told = [error for _, error in self.failed]
            raise MultipleErrors(f"{which} failed: {names}.", told, hint=f"The errors are above{others}.{more}")

    @property
    def rendered_any(self) -> bool:
        """Whether any picture exists, from this command or from a run that it resumes."""
        return any(job.run and (job.run.has_any or not job.run.created) for job in self.begun)

    @property
    def resumable(self) -> list[Job]:
        """The jobs that can be resumed."""
        there = (job for job in self.begun if job.run and job.run.is_planned)
        return [job for job in there if job.remaining or job.needs_sheet]

    def report_end(self, why: str) -> None:
        """Print how far the current job has come, and the command that resumes all that are left."""
        job = self.current or next(iter(self.begun), None)
        if job is None or job.run is None:
            return
        there = (
            f"{len(job.shots) - len(job.remaining)} of {len(job.shots)} pictures are in {short_path(job.run.folder)}"
        )
        left = self.resumable
        say_at_exit(f"{why}: {there}.{f' Resume with: {resume_commands(left)}' if left else ''}")


def say_finished(job: Job) -> None:
    """Print that a run has nothing left to render."""
    say(f"{short_path(job.run.folder) if job.run else job.project.root.name}: the run is complete.")


def resume_commands(jobs: Sequence[Job]) -> str:
    """The shortest commands that finish these runs: one for all that are their project's last, and one for each of the
    others."""
    last, commands = [], []
    for job in jobs:
        assert job.run is not None
        newest = Run.last(job.project.outputs)
        if newest and newest.folder == job.run.folder:
            last.append(job)
        else:
            commands.append(resume_command([job], number_of(job.run.folder)))
    return "; ".join([resume_command(last), *commands] if last else commands)


def resume_command(jobs: Sequence[Job], number: int | None = None) -> str:
    """The command for the last run of each job's project, or for the run with this number."""
    here, roots = find_root(Path.cwd()), [job.project.root for job in jobs]
    words = ["k2 render --resume"]
    words += [] if number is None else [f"--run {number}"]
    if len(roots) > 1:
        words += map(for_shell, roots)
    elif not (here and here.samefile(roots[0])):
        words += [f"--project {for_shell(roots[0])}"]
    words += ["--allow-outside"] if any(map(uses_outside_files, jobs)) else []
    return " ".join(words)


def uses_outside_files(job: Job) -> bool:
    """Whether a run uses files outside its project."""
    root, specs = job.project.root.resolve(), [shot.spec for shot in job.shots]
    begun = (path for spec in specs for path in (spec.init_image, spec.mask))
    files = [Path(job.model.name), *(path for path in begun if isinstance(path, Path))]
    outside = any(file.is_absolute() and not file.resolve().is_relative_to(root) for file in files)
    return job.project.allow_outside or outside
