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
from k2cli.outputs import Run, run_number
from k2cli.runs import Job, begin_job
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


def try_each(targets: Sequence[Target], action: Callable[[Target], Result]) -> tuple[list[Result], list[K2Error]]:
    """The results for projects, or their jobs, and the errors of those that failed."""
    results: list[Result] = []
    failures: list[tuple[Folder, K2Error]] = []
    for each in targets:
        try:
            results.append(action(each))
        except Exception as error:
            problem = as_user_error(error)
            if problem is None:
                raise
            failures.append((target_project(each), problem))
    errors = [error for _, error in failures]
    same = {(str(error), error.hint, error.code) for error in errors}
    is_usage_error = len(errors) == len(targets) and len(same) == 1 and errors[0].code == USAGE
    if len(targets) > 1 and not is_usage_error:  # else the command line itself is wrong
        errors = [name_project(home, error, list(map(target_project, targets))) for home, error in failures]
    return results, errors


def target_project(each: Folder | Job) -> Folder:
    return each.project if isinstance(each, Job) else each


def run_each(targets: Sequence[Target], action: Callable[[Target], Result]) -> list[Result]:
    """The result for each. Raises K2Error if any failed, once all errors are shown."""
    results, errors = try_each(targets, action)
    raise_all(errors)
    return results


def raise_all(errors: Sequence[K2Error]) -> None:
    """Raise the last of these errors, if any, after showing the others. Equal errors are shown once."""
    if not errors:
        return
    *earlier, last = {(str(error), error.hint): error for error in errors}.values()
    for error in earlier:
        show_error(error)
    raise MultipleErrors(str(last), earlier, hint=last.hint, code=last.code) if earlier else last


def name_project(home: Folder, error: K2Error, projects: Sequence[Folder]) -> K2Error:
    """The error with its project in front, unless it already names the project unambiguously."""
    root, message = home.root, str(error)
    whole_path = rf"{re.escape(str(root))}(?![\w.-])"  # /s-models is not one called s
    patterns = [re.escape(f"{short_path(root)}/"), whole_path]
    if [each.root.name for each in projects].count(root.name) == 1:
        patterns.append(re.escape(f"{root.name} has "))
    if re.search(rf"(?<![\w./-])(?:{'|'.join(patterns)})", message):  # but refs/a.png does not name one called s
        return error
    return K2Error(f"{name_among_several(root)}: {message}", hint=error.hint, code=error.code)


# ---- one after the other -----------------------------------------------------------------------------------------


class JobQueue:
    """Jobs rendered one after another. All runs are begun before the first is rendered, so that each can be resumed
    whatever ends them."""

    def __init__(self, jobs: Sequence[Job], *, quiet: bool):
        self.jobs, self.quiet = jobs, quiet
        self.started: list[Job] = []
        self.failed: list[tuple[Job, K2Error]] = []
        self.current: Job | None = None  # the begun job whose turn it is

    def begin(self) -> list[Job]:
        """Begin the runs of all jobs with something left to render. Raises K2Error."""
        with uninterrupted():  # an interrupt takes effect once all are planned
            for job in self.jobs:
                if not job.remaining and not job.needs_sheet:
                    if not self.quiet:
                        say_finished(job)
                    continue
                with self.tolerating(job):
                    started_job = begin_job(job)
                    if started_job.run and len(self.started) >= MAX_LOCKED:
                        started_job.run.unlock()
                    self.started.append(started_job)
        return self.started

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
            if problem is None or len(self.jobs) == 1:
                raise
            self.failed.append((job, name_project(job.project, problem, [each.project for each in self.jobs])))
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
            resumable = self.resumable if self.rendered_any else []
            if problem is None or not resumable:
                raise
            if isinstance(error, FATAL) or problem.hint.endswith(RETRY):  # then nothing else needs fixing
                first = problem.hint.removesuffix(RETRY).removesuffix(".")
                problem.hint = f"{first}, then resume with: {resume_commands(resumable)}"
            else:
                what = "; finish" if problem.hint and problem.hint[-1] not in ".?!" else " Finish"
                problem.hint = f"{problem.hint}{what} the rest as planned: {resume_commands(resumable)}".lstrip()
            raise problem from None
        finally:
            keep = interrupted or self.rendered_any
            for run in (job.run for job in self.started if job.run):
                if not keep:
                    run.discard()
                run.unlock()
        if self.failed:
            names = ", ".join(name_among_several(job.project.root) for job, _ in self.failed)
            which = f"{len(self.failed)} of {pluralise(len(self.jobs), 'project')}"
            others = "; the others are done" if len(self.failed) < len(self.jobs) else ""
            more = f" Resume with: {resume_commands(self.resumable)}" if self.resumable else ""
            errors = [error for _, error in self.failed]
            raise MultipleErrors(f"{which} failed: {names}.", errors, hint=f"The errors are above{others}.{more}")

    @property
    def rendered_any(self) -> bool:
        """Whether any picture exists, from this command or from a run that it resumes."""
        return any(job.run and (job.run.has_results or not job.run.created) for job in self.started)

    @property
    def resumable(self) -> list[Job]:
        """The jobs that can be resumed."""
        planned = (job for job in self.started if job.run and job.run.is_planned)
        return [job for job in planned if job.remaining or job.needs_sheet]

    def report_end(self, reason: str) -> None:
        """Print how far the current job has come, and the command that resumes all that are left."""
        job = self.current or next(iter(self.started), None)
        if job is None or job.run is None:
            return
        progress = (
            f"{len(job.shots) - len(job.remaining)} of {len(job.shots)} pictures are in {short_path(job.run.folder)}"
        )
        resumable = self.resumable
        say_at_exit(f"{reason}: {progress}.{f' Resume with: {resume_commands(resumable)}' if resumable else ''}")


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
            commands.append(resume_command([job], run_number(job.run.folder)))
    return "; ".join([resume_command(last), *commands] if last else commands)


def resume_command(jobs: Sequence[Job], number: int | None = None) -> str:
    """The command for the last run of each job's project, or for the run with this number."""
    current, roots = find_root(Path.cwd()), [job.project.root for job in jobs]
    parts = ["k2 render --resume"]
    parts += [] if number is None else [f"--run {number}"]
    if len(roots) > 1:
        parts += map(for_shell, roots)
    elif not (current and current.samefile(roots[0])):
        parts += [f"--project {for_shell(roots[0])}"]
    parts += ["--allow-outside"] if any(map(uses_outside_files, jobs)) else []
    return " ".join(parts)


def uses_outside_files(job: Job) -> bool:
    """Whether a run uses files outside its project."""
    root, specs = job.project.root.resolve(), [shot.spec for shot in job.shots]
    init_files = (path for spec in specs for path in (spec.init_image, spec.mask))
    files = [Path(job.model.name), *(path for path in init_files if isinstance(path, Path))]
    outside = any(file.is_absolute() and not file.resolve().is_relative_to(root) for file in files)
    return job.project.allow_outside or outside
