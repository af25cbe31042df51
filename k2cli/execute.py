"""From planned jobs to pictures on disk: show the plan, or carry it out and report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

from k2cli import history, licence
from k2cli.console import meter, name_among_several, print_result, print_results, say, short_path, to_json
from k2cli.expander import release_language_model
from k2cli.facts import steps_and_guidance
from k2cli.job_warnings import JobWarnings
from k2cli.models import method_resolver, recommended_settings
from k2cli.multi_project import JobQueue, run_each, say_finished
from k2cli.outputs import Run, run_number
from k2cli.pictures import check_picture
from k2cli.project import Shot
from k2cli.records import planned_record, portable_name
from k2cli.runs import Job, Saved, render
from k2cli.texts import relative_path
from k2cli.workers import WorkerPool, check_device
from model import library
from model.errors import K2Error, pluralise
from model.foreign_weights import check_transformer
from model.lora_file import check_kind
from model.picture_file import is_sheet
from model.reference_weights import check_references
from model.spec import Style, resolve_denoise


def show_plan(jobs: Sequence[Job], *, as_json: bool, quiet: bool) -> None:
    """Show what a run would render: a line or an object per picture, the model's own settings filled in."""
    run_each(jobs, check_files)
    remaining = [job.remaining for job in jobs]
    for job, left, numbers in zip(jobs, remaining, number_pictures(remaining), strict=True):
        if not left and not quiet:
            say_finished(job)
        warnings = JobWarnings(job)
        if not quiet:
            warnings.say(with_project=len(jobs) > 1)
        defaults = recommended_settings(job.model.name, job.model.variant) if left else {}
        folder = f"{short_path(job.project.root)}/" if len(jobs) > 1 else ""
        rows = []
        for shot, number in zip(left, numbers, strict=True):
            record = planned_record(shot, job.project.root)
            given = {key: value for key, value in record["settings"].items() if value is not None}
            record["settings"] |= defaults | given
            if record["init_image"]:
                record["settings"]["denoise"] = resolve_denoise(given.get("denoise"), masked=bool(record["mask"]))
            if as_json:
                about = {"file": shot.file, "project": str(job.project.root), "variant": job.model.variant}
                used = {"name": portable_name(job.model.name, job.project.root), "variant": job.model.variant}
                extra = {"of": number, "warnings": warnings.about(shot)}
                print_result(to_json(about | record | {"model": used, **extra}))
            else:
                settings = record["settings"]
                size = f"{settings['width']}x{settings['height']}"
                facts = [*steps_and_guidance(settings)]
                facts += [f"{style.name}={style.strength:g}" for style in shot.spec.styles if style.strength]
                facts += [f"cohesion {settings['cohesion']:g}"] * bool(settings["cohesion"])
                facts += [f"init image {init_image['image']}"] if (init_image := record["init_image"]) else []
                facts += [f"denoise {settings['denoise']:g}"] if settings.get("denoise") is not None else []
                facts += [f"mask {mask.get('region') or mask['image']}"] if (mask := record["mask"]) else []
                row = [f"{folder}{shot.file}", size, f"seed {settings['seed']}", ", ".join(facts), shot.spec.prompt]
                rows.append(row)
        print_results(rows)


def execute(
    jobs: Sequence[Job],
    *,
    embed: bool,
    as_json: bool,
    quiet: bool,
    pool: WorkerPool | None = None,
    on_saved: Callable[[Saved], object] | None = None,
) -> list[Path]:
    """Render jobs, print each picture's path, and report to people -> the runs' folders.

    Nothing is rendered if any of them has a problem that can be known beforehand. Raises K2Error.
    """
    release_language_model()
    run_each(jobs, check_licence_and_files)
    if pool is None or pool.is_local:
        check_devices([job for job in jobs if job.remaining])
    folders: list[Path] = []
    queue = JobQueue([replace(job, embed=job.embed and embed) for job in jobs], quiet=quiet)
    with queue.running():
        started = queue.begin()
        remaining = [job.remaining for job in started]  # numbering is fixed here, whatever is deleted later
        for job, left, numbers in zip(started, remaining, number_pictures(remaining), strict=True):
            with queue.turn(job):
                warnings = JobWarnings(job)
                if not quiet:
                    warnings.say(with_project=len(jobs) > 1)
                folder = render_job(
                    job, left, warnings, numbers, as_json=as_json, quiet=quiet, pool=pool, on_saved=on_saved
                )
                folders += [folder] if folder is not None else []
    return folders


def check_licence_and_files(job: Job) -> None:
    licence.require_for_model(job.model.name, job.model.variant)
    check_files(job)


def check_devices(jobs: Sequence[Job]) -> None:
    """Refuse devices that are not here; only once if all jobs have the same, whoever set it."""
    if len({job.model.device for job in jobs}) == 1:
        check_device(jobs[0].model)
    else:
        run_each(jobs, lambda job: check_device(job.model))


def check_files(job: Job) -> None:
    """Refuse, before weights are read, those that are no transformer or have no matching text encoder, references that
    cannot be read, and files that are no LoRA for them. Raises K2Error."""
    if model := library.find(job.model.name, job.model.variant):
        if model.path.is_file():
            check_transformer(model.path)
        library.check_text_encoder(model)
    check_style_methods(job)
    for style in dict.fromkeys(style for shot in job.remaining for style in shot.spec.styles if style.strength):
        where = f'Style "{style.name}"'
        for each in style.references:
            if each.weight:
                check_picture(each.image, where, relative_path(each.image, job.project.root), complete=True)
        if style.lora:
            try:
                check_kind(style.lora)
            except K2Error as error:
                raise K2Error(f"{where}: {error}", hint=error.hint) from None


def check_style_methods(job: Job) -> None:
    """Refuse methods of reading references that the model has no part for, more references than it takes at once, and
    a splice in one step. Raises K2Error."""
    looks: dict[tuple[tuple[Style, ...], int | None], str] = {}
    for shot in job.remaining:
        looks.setdefault((shot.spec.styles, shot.spec.steps), shot.name)
    with_references = [look for look in looks if any(style.strength and style.references for style in look[0])]
    if not with_references:  # saves reading the model's headers
        return
    name, variant = job.model.name, job.model.variant
    resolve_method, default_steps = method_resolver(name, variant), recommended_settings(name, variant)["steps"]
    for styles, steps in with_references:
        weighted = [resolve_method(style) for style in styles if style.strength]
        try:
            check_references(weighted, default_steps if steps is None else steps)
        except K2Error as error:
            prefix = f'"{looks[styles, steps]}": ' if len(looks) > 1 else ""
            raise K2Error(f"{prefix}{error}", hint=error.hint) from None


def number_pictures(remaining: Sequence[Sequence[Shot]]) -> list[list[list[int]]]:
    """For each job, its pictures' numbers out of the total, so that readers know which is the last: [1, 2], [2, 2]."""
    number, total = count(1), sum(map(len, remaining))
    return [[[next(number), total] for _ in left] for left in remaining]


def render_job(
    job: Job,
    remaining: Sequence[Shot],
    warnings: JobWarnings,
    numbers: Sequence[list[int]],
    *,
    as_json: bool,
    quiet: bool,
    pool: WorkerPool | None,
    on_saved: Callable[[Saved], object] | None,
) -> Path | None:
    """Render what was left of a job when it began -> the run's folder, if it gained a picture."""
    total, done, blocked, folder = len(remaining), 0, 0, None
    warned: set[str] = set()  # prompts
    shots = {shot.stem: shot for shot in remaining}
    before = "" if pool else "loading the model"  # which reports no steps
    with meter(total, quiet=quiet, before=before) as bar:
        for saved in render(job, remaining, on_step=bar.step, pool=pool):
            done, folder = done + 1, saved.path.parent
            bar.saved(done)
            if on_saved:
                on_saved(saved)
            if done == 1 and not quiet:
                loras = {describe_match(lora): is_poor_match(lora) for lora in saved.record.get("lora") or ()}
                for line, doubtful in loras.items():  # once, though several styles share it
                    say(line, "yellow" if doubtful else "dim")
            picture_warnings = warnings.about(shots[saved.stem]) if as_json else []
            report(saved, warned, numbers[done - 1], picture_warnings, as_json=as_json, quiet=quiet)
            blocked += bool(saved.record["blocked"])
    if not quiet and total - blocked > 1 and folder is not None:
        sheets = sum(map(is_sheet, folder.iterdir()))
        beside = pluralise(sheets, "contact sheet") if sheets > 1 else "a contact sheet"
        more = " more" if total < len(job.shots) else ""
        say(f"{total - blocked}{more} pictures and {beside} in {short_path(folder)}", "dim")
    return folder


def report(
    saved: Saved, warned: set[str], number: list[int], warnings: Sequence[str], *, as_json: bool, quiet: bool
) -> None:
    """Print a picture's line of results, and its warnings; those of its prompt once, tracked in `warned`. A blocked
    picture is reported even with --quiet: its line is missing."""
    prompt, blocked = saved.record["prompt"], saved.record["blocked"]
    unread = ""
    if prompt["unread"]:
        unread = f'Prompt "{prompt["name"]}" is too long: its last {prompt["unread"]} tokens go unread.'
    if unread and not quiet and prompt["text"] not in warned:
        warned.add(prompt["text"])
        say(unread, "yellow")
    if blocked:
        say(f'Blocked by the output filter "{blocked["filter"]}": {short_path(saved.path)}', "yellow")
    if as_json:
        loras = {f"{describe_match(lora)}.": None for lora in saved.record.get("lora") or () if is_poor_match(lora)}
        extra = {"of": number, "warnings": [*warnings, *loras, *filter(None, [unread])]}
        print_result(to_json({"file": None if blocked else short_path(saved.path), **saved.record, **extra}))
    elif not blocked:
        print_result(short_path(saved.path))


def describe_match(lora: Mapping[str, Any]) -> str:
    """How much of a LoRA is in use, by a picture's record of it."""
    idle = ", but it changes nothing: it is all zeros" if lora.get("idle") else ""
    return f"{lora['file']}: {lora['matched']} of {lora['modules']} modules matched{idle}"


def is_poor_match(lora: Mapping[str, Any]) -> bool:
    """Whether it changes nothing, or most of it is for another network or in an unknown layout."""
    return bool(lora.get("idle")) or 2 * lora["matched"] < lora["modules"]


def say_if_unchanged(pixel_hashes: Mapping[Path, str], *, with_project: bool) -> None:
    """Say if all pictures of a run equal those of the run before it, naming the project if there are several.

    pixel_hashes: of the pictures of finished runs
    """
    runs: dict[Path, dict[str, str]] = {}
    for path, pixels in pixel_hashes.items():
        runs.setdefault(path.parent, {})[path.stem] = pixels
    for run, hashes in runs.items():
        folders = [each.folder for each in Run.planned_in(run.parent)]  # a run may have been given another name
        before = [each for each in folders if run_number(each) < run_number(run)]
        if before and has_pictures(before[-1], hashes):
            which = "picture" if len(hashes) == 1 else "pictures"
            prefix = f"{name_among_several(run.parent.parent)}: " if with_project else ""
            same = f"The same {which} as run {run_number(before[-1]):04d}"
            say(f"{prefix}{same}; for others: --seed N or --seed random", "dim")


def has_pictures(run: Path, hashes: Mapping[str, str]) -> bool:
    """Whether a run has pictures of these stems, with these pixels; stops at the first that differs."""
    return all((history.load_record(run / f"{stem}.toml") or {}).get("pixels") == sha for stem, sha in hashes.items())
