"""From planned jobs to pictures on disk: show the plan, or carry it out and report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

from k2cli import history, licence
from k2cli.console import among_others, meter, result, results, say, short_path, to_json
from k2cli.doubts import Doubts
from k2cli.expander import forget
from k2cli.facts import course
from k2cli.hands import Crew, check_device
from k2cli.models import recommended, way_of
from k2cli.outputs import Run, number_of
from k2cli.pictures import check_picture
from k2cli.project import Shot
from k2cli.records import portable, request
from k2cli.runs import Job, Saved, render
from k2cli.several import Turns, for_all, say_finished
from k2cli.texts import relative
from model import library
from model.errors import K2Error, count_of
from model.lora_file import check_kind
from model.other_files import check_transformer
from model.picture_file import is_sheet
from model.spec import Style, denoise_of
from model.weighed import check_references


def show_plan(jobs: Sequence[Job], *, as_json: bool, quiet: bool) -> None:
    """Show what a run would render: a line or an object per picture, the model's own settings filled in."""
    for_all(jobs, check_files)
    lefts = [job.left for job in jobs]
    for job, left, of in zip(jobs, lefts, places(lefts), strict=True):
        if not left and not quiet:
            say_finished(job)
        doubts = Doubts(job)
        if not quiet:
            doubts.say(named=len(jobs) > 1)
        own = recommended(job.model.name, job.model.variant) if left else {}
        folder = f"{short_path(job.project.root)}/" if len(jobs) > 1 else ""
        rows = []
        for shot, place in zip(left, of, strict=True):
            asked = request(shot, job.project.root)
            said = {key: value for key, value in asked["settings"].items() if value is not None}
            asked["settings"] |= own | said
            if asked["init_image"]:
                asked["settings"]["denoise"] = denoise_of(said.get("denoise"), masked=bool(asked["mask"]))
            if as_json:
                about = {"file": shot.file, "project": str(job.project.root), "variant": job.model.variant}
                used = {"name": portable(job.model.name, job.project.root), "variant": job.model.variant}
                told = {"of": place, "warnings": doubts.of(shot)}
                result(to_json(about | asked | {"model": used, **told}))
            else:
                made = asked["settings"]
                size = f"{made['width']}x{made['height']}"
                facts = [*course(made)]
                facts += [f"{style.name}={style.strength:g}" for style in shot.spec.styles if style.strength]
                facts += [f"cohesion {made['cohesion']:g}"] * bool(made["cohesion"])
                facts += [f"init image {begun['image']}"] if (begun := asked["init_image"]) else []
                facts += [f"denoise {made['denoise']:g}"] if made.get("denoise") is not None else []
                facts += [f"mask {mask.get('region') or mask['image']}"] if (mask := asked["mask"]) else []
                row = [f"{folder}{shot.file}", size, f"seed {made['seed']}", ", ".join(facts), shot.spec.prompt]
                rows.append(row)
        results(rows)


def carry_out(
    jobs: Sequence[Job],
    *,
    embed: bool,
    as_json: bool,
    quiet: bool,
    crew: Crew | None = None,
    on_saved: Callable[[Saved], object] | None = None,
) -> list[Path]:
    """Render jobs, print each picture's path, and report to people -> the runs' folders.

    Nothing is rendered if any of them has a problem that can be known beforehand. Raises K2Error.
    """
    forget()
    for_all(jobs, check_licence_and_files)
    if crew is None or crew.here:
        check_devices([job for job in jobs if job.left])
    folders: list[Path] = []
    turns = Turns([replace(job, embed=job.embed and embed) for job in jobs], quiet=quiet)
    with turns.ending():
        begun = turns.begin()
        lefts = [job.left for job in begun]  # numbering is fixed here, whatever is deleted later
        for job, left, of in zip(begun, lefts, places(lefts), strict=True):
            with turns.turn(job):
                doubts = Doubts(job)
                if not quiet:
                    doubts.say(named=len(jobs) > 1)
                folder = carry(job, left, doubts, of, as_json=as_json, quiet=quiet, crew=crew, on_saved=on_saved)
                folders += [folder] if folder is not None else []
    return folders


def check_licence_and_files(job: Job) -> None:
    licence.require_for(job.model.name, job.model.variant)
    check_files(job)


def check_devices(jobs: Sequence[Job]) -> None:
    """Refuse devices that are not here; only once if all jobs have the same, whoever set it."""
    if len({job.model.device for job in jobs}) == 1:
        check_device(jobs[0].model)
    else:
        for_all(jobs, lambda job: check_device(job.model))


def check_files(job: Job) -> None:
    """Refuse, before weights are read, those that are no transformer or have no matching text encoder, references that
    cannot be read, and files that are no LoRA for them. Raises K2Error."""
    if model := library.find(job.model.name, job.model.variant):
        if model.path.is_file():
            check_transformer(model.path)
        library.refuse_unheard(model)
    check_ways(job)
    for style in dict.fromkeys(style for shot in job.left for style in shot.spec.styles if style.strength):
        where = f'Style "{style.name}"'
        for each in style.references:
            if each.weight:
                check_picture(each.image, where, relative(each.image, job.project.root), whole=True)
        if style.lora:
            try:
                check_kind(style.lora)
            except K2Error as error:
                raise K2Error(f"{where}: {error}", hint=error.hint) from None


def check_ways(job: Job) -> None:
    """Refuse methods of reading references that the model has no part for, more references than it takes at once, and
    a splice in one step. Raises K2Error."""
    looks: dict[tuple[tuple[Style, ...], int | None], str] = {}
    for shot in job.left:
        looks.setdefault((shot.spec.styles, shot.spec.steps), shot.name)
    referring = [look for look in looks if any(style.strength and style.references for style in look[0])]
    if not referring:  # saves reading the model's headers
        return
    name, variant = job.model.name, job.model.variant
    way, own = way_of(name, variant), recommended(name, variant)["steps"]
    for styles, steps in referring:
        weighing = [way(style) for style in styles if style.strength]
        try:
            check_references(weighing, own if steps is None else steps)
        except K2Error as error:
            whose = f'"{looks[styles, steps]}": ' if len(looks) > 1 else ""
            raise K2Error(f"{whose}{error}", hint=error.hint) from None


def places(lefts: Sequence[Sequence[Shot]]) -> list[list[list[int]]]:
    """For each job, its pictures' numbers out of the total, so that readers know which is the last: [1, 2], [2, 2]."""
    number, total = count(1), sum(map(len, lefts))
    return [[[next(number), total] for _ in left] for left in lefts]


def carry(
    job: Job,
    left: Sequence[Shot],
    doubts: Doubts,
    of: Sequence[list[int]],
    *,
    as_json: bool,
    quiet: bool,
    crew: Crew | None,
    on_saved: Callable[[Saved], object] | None,
) -> Path | None:
    """Render what was left of a job when it began -> the run's folder, if it gained a picture."""
    total, done, kept_back, folder = len(left), 0, 0, None
    told: set[str] = set()  # prompts
    shots = {shot.stem: shot for shot in left}
    before = "" if crew else "loading the model"  # which reports no steps
    with meter(total, quiet=quiet, before=before) as bar:
        for saved in render(job, left, on_step=bar.step, crew=crew):
            done, folder = done + 1, saved.path.parent
            bar.saved(done)
            if on_saved:
                on_saved(saved)
            if done == 1 and not quiet:
                loras = {matched(lora): is_doubtful(lora) for lora in saved.record.get("lora") or ()}
                for line, doubtful in loras.items():  # once, though several styles share it
                    say(line, "yellow" if doubtful else "dim")
            doubted = doubts.of(shots[saved.stem]) if as_json else []
            tell(saved, told, of[done - 1], doubted, as_json=as_json, quiet=quiet)
            kept_back += bool(saved.record["blocked"])
    if not quiet and total - kept_back > 1 and folder is not None:
        sheets = sum(map(is_sheet, folder.iterdir()))
        beside = count_of(sheets, "contact sheet") if sheets > 1 else "a contact sheet"
        more = " more" if total < len(job.shots) else ""
        say(f"{total - kept_back}{more} pictures and {beside} in {short_path(folder)}", "dim")
    return folder


def tell(saved: Saved, told: set[str], of: list[int], doubted: Sequence[str], *, as_json: bool, quiet: bool) -> None:
    """Print a picture's line of results, and its warnings; those of its prompt once, tracked in `told`. A blocked
    picture is reported even with --quiet: its line is missing."""
    asked, blocked = saved.record["prompt"], saved.record["blocked"]
    unread = ""
    if asked["unread"]:
        unread = f'Prompt "{asked["name"]}" is too long: its last {asked["unread"]} tokens go unread.'
    if unread and not quiet and asked["text"] not in told:
        told.add(asked["text"])
        say(unread, "yellow")
    if blocked:
        say(f'Blocked by the output filter "{blocked["filter"]}": {short_path(saved.path)}', "yellow")
    if as_json:
        loras = {f"{matched(lora)}.": None for lora in saved.record.get("lora") or () if is_doubtful(lora)}
        beside = {"of": of, "warnings": [*doubted, *loras, *filter(None, [unread])]}
        result(to_json({"file": None if blocked else short_path(saved.path), **saved.record, **beside}))
    elif not blocked:
        result(short_path(saved.path))


def matched(lora: Mapping[str, Any]) -> str:
    """How much of a LoRA is in use, by a picture's record of it."""
    idle = ", but it changes nothing: it is all zeros" if lora.get("idle") else ""
    return f"{lora['file']}: {lora['matched']} of {lora['modules']} modules matched{idle}"


def is_doubtful(lora: Mapping[str, Any]) -> bool:
    """Whether it changes nothing, or most of it is for another network or in an unknown layout."""
    return bool(lora.get("idle")) or 2 * lora["matched"] < lora["modules"]


def say_again(made: Mapping[Path, str], *, named: bool) -> None:
    """Say if all pictures of a run equal those of the run before it, naming the project if there are several.

    made  the pictures of finished runs, and the hashes of their pixels
    """
    runs: dict[Path, dict[str, str]] = {}
    for path, pixels in made.items():
        runs.setdefault(path.parent, {})[path.stem] = pixels
    for run, hashes in runs.items():
        folders = [each.folder for each in Run.planned_in(run.parent)]  # a run may have been given another name
        before = [each for each in folders if number_of(each) < number_of(run)]
        if before and holds(before[-1], hashes):
            which = "picture" if len(hashes) == 1 else "pictures"
            whose = f"{among_others(run.parent.parent)}: " if named else ""
            same = f"The same {which} as run {number_of(before[-1]):04d}"
            say(f"{whose}{same}; for others: --seed N or --seed random", "dim")


def holds(run: Path, hashes: Mapping[str, str]) -> bool:
    """Whether a run has pictures of these stems, with these pixels; stops at the first that differs."""
    return all((history.load(run / f"{stem}.toml") or {}).get("pixels") == sha for stem, sha in hashes.items())
