"""Rendering a project: plan, claim a folder, render, save, and resume an earlier run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from k2cli import metadata, models, records
from k2cli.disk import uninterrupted, write_files
from k2cli.facts import steps_and_guidance
from k2cli.fast_toml import dump, parse_long
from k2cli.folder import Folder
from k2cli.formats import SUFFIXES
from k2cli.history import MadePicture
from k2cli.outputs import PLAN_FILE, SHEET_FILE, Run, run_number
from k2cli.pictures import check_picture
from k2cli.project import MAX_PLAN, Project, Shot
from k2cli.prompts import prompt_name
from k2cli.sheet import SheetEntry, contact_sheets
from k2cli.toml_tables import Place, Toml, between, read_table
from k2cli.workers import OnStep, WorkerPool, distribute, render_here
from model.errors import K2Error
from model.spec import Picture

MAX_TITLE = 50  # characters


@dataclass(frozen=True)
class SheetLayout:
    """How a run's contact sheet is laid out."""

    columns: int | None = between(None, 1, 1000)  # of strips; default: as many as suit the sheet
    centred: bool = False  # the strips, as in a triangle


@dataclass(frozen=True)
class Job:
    """One run of one project: what to render, with which weights."""

    project: Project
    shots: Sequence[Shot]
    model: models.ModelSpec
    run: Run | None = None  # its folder, once begun; or an earlier run to resume
    folder_title: str = ""  # the folder's title, if not from the prompts' names
    sheet: SheetLayout = SheetLayout()
    embed: bool = True  # metadata into the pictures

    @property
    def remaining(self) -> list[Shot]:
        """The pictures still to render."""
        return [shot for shot in self.shots if self.run is None or not self.run.is_done(shot.stem)]

    @property
    def needs_sheet(self) -> bool:
        """Whether an earlier run was stopped between its last picture and its contact sheet."""
        if self.run is None or len(self.shots) < 2 or self.run[SHEET_FILE].exists():
            return False
        return any(self.run.picture_path(shot.stem).exists() for shot in self.shots)

    @property
    def title(self) -> str:
        """What the run's folder is called after its number."""
        if self.folder_title:
            return self.folder_title[:MAX_TITLE]
        names = list(dict.fromkeys(shot.name for shot in self.shots))
        return names[0] if len(names) == 1 else f"{names[0]}-and-{len(names) - 1}-more"


@dataclass(frozen=True)
class Saved:
    """A picture on disk, and its record."""

    path: Path  # if it was blocked, of its record, which is then alone
    record: Mapping[str, Any]
    stem: str  # of the file as planned


def begin_job(job: Job) -> Job:
    """The job with its run: a new one, claimed and planned, or its earlier one; locked by this process. Raises
    K2Error."""
    if job.run:
        job.run.lock()
        return job
    planned = dump(plan_table(job))
    if len(planned) > MAX_PLAN:
        raise K2Error("The run is too large to plan.", hint="Render the prompts in several runs: --only")
    return replace(job, run=Run.claim(job.project.outputs, job.title, {PLAN_FILE: planned}))


def render(
    job: Job, wanted: Sequence[Shot], *, on_step: OnStep | None = None, pool: WorkerPool | None = None
) -> Iterator[Saved]:
    """Render a begun job's pictures that are still missing, out of those `wanted`; each is on disk with its record
    before it is yielded.

    Ctrl-C while a picture is being written takes effect once the caller has received it. A pool's pictures come as they
    are finished. The run is unlocked in the end; if nothing came of it, the caller should discard it.
    """
    run = job.run
    assert run is not None
    try:
        run.lock()  # it may have been unlocked until its turn came
        if remaining := [shot for shot in wanted if not run.is_done(shot.stem)]:
            for shot, picture in render_remaining(job, remaining, on_step, pool):
                record = records.finished_record(shot, picture, job.project.root)
                with uninterrupted():
                    yield Saved(save_picture(run, shot, picture, record, embed=job.embed), record, shot.stem)
        if len(job.shots) > 1:
            pages = enumerate(render_sheets(job, run))
            # names that no picture has: those are NAME-SEED
            files = {run[SHEET_FILE if i == 0 else f"sheet.{i + 1}.png"]: png for i, png in pages}
            write_files(dict(reversed(files.items())))  # the first is written last, so if it exists, all do
    finally:
        run.unlock()


def render_remaining(
    job: Job, remaining: Sequence[Shot], on_step: OnStep | None, pool: WorkerPool | None
) -> Iterator[tuple[Shot, Picture]]:
    """The remaining pictures of a job, as they are finished."""
    specs = [shot.spec for shot in job.shots]
    stems = {shot.stem for shot in remaining}
    wanted = {index for index, shot in enumerate(job.shots) if shot.stem in stems}
    if pool is None:
        rendered = render_here(job.model, specs, wanted, on_step)
        yield from ((job.shots[index], picture) for index, picture in rendered)
        return
    pool.begin_run(specs)
    try:
        for index, picture in distribute(pool, job.model, wanted):
            yield job.shots[index], picture
    except BaseException:
        pool.close()  # its workers still hold work for a run that will not finish
        raise


def save_picture(run: Run, shot: Shot, picture: Picture, record: Mapping[str, Any], *, embed: bool) -> Path:
    """Save a picture and its record, or only the record if an output filter blocked it."""
    if record["blocked"]:
        return run.save_blocked(shot.stem, dump(record))
    file = metadata.encode(picture.image, record, embed=embed, format=shot.format)
    return run.save(shot.stem, file, dump(record), SUFFIXES[shot.format])


def render_sheets(job: Job, run: Run) -> Iterator[bytes]:
    """The contact sheets of a finished run, with all pictures that no filter blocked. Raises K2Error.

    In a resumed run the pictures may come from anywhere, so they are checked like references.
    """
    shots = [shot for shot in job.shots if run.picture_path(shot.stem).is_file()]
    if not shots:
        return iter(())
    for shot in shots:
        path = run.picture_path(shot.stem)
        check_picture(job.project.path_inside(path), run.folder.name, path.name)
    prompts = Counter(given for given, _ in {(shot.given, prompt_name(shot.name, shot.caption)) for shot in shots})
    entries = []
    for shot in shots:
        name, label = prompt_name(shot.name, shot.caption), shot.given
        if shot.row:
            label = f"{shot.row} · {label}"  # first, as a long label is cut at its end
        if prompts[shot.given] > 1:
            label = f"{name}: {label}"
        entries.append(SheetEntry(run.picture_path(shot.stem), label, shot.caption or f"seed {shot.spec.seed}", name))
    common = common_facts(job.project, run, shots)
    return contact_sheets(entries, job.project.name, common, columns=job.sheet.columns, centred=job.sheet.centred)


def common_facts(project: Project, run: Run, shots: Sequence[Shot]) -> str:
    """A line on what a run's pictures have in common, from the record of the first. Raises K2Error."""
    file = run[f"{shots[0].stem}.toml"]
    toml = Toml.read(file, shots[0].stem)
    record = records.parse(toml, project.root.joinpath)  # files may be anywhere, as none is opened
    spec, created = record.shot.spec, MadePicture(file, toml.table).local_time
    steps, guidance = steps_and_guidance(vars(spec))
    weights = [{style.name: style.strength for style in shot.spec.styles} for shot in shots]

    def is_common(*keys: str) -> bool:
        return len({tuple(getattr(shot.spec, key) for key in keys) for shot in shots}) == 1

    facts = [
        f"run {run_number(run.folder):04d}",
        f"{Path(record.model.name).stem} {record.model.variant or ''}".strip(),
        *([steps] if is_common("steps", "sampler") else []),
        *([guidance] if is_common("guidance", "guidance_until") else []),
        *([f"init image {spec.init_image.name}"] if spec.init_image and is_common("init_image") else []),
        *([f"mask {Path(spec.mask).name}"] if spec.mask and is_common("mask") else []),  # its file, or its region
        *([f"denoise {spec.denoise:g}"] if spec.denoise and is_common("denoise") else []),
        *([f"cohesion {spec.cohesion:g}"] if spec.cohesion and is_common("cohesion") else []),
        *(f"{name} {own:g}" for name, own in weights[0].items() if all(each.get(name) == own for each in weights)),
        *([f"seed {spec.seed}"] if shots[0].caption and is_common("seed") else []),  # else it is below each picture
        f"{created or datetime.now():%Y-%m-%d}",
    ]
    return " · ".join(filter(None, facts))


def plan_table(job: Job) -> dict[str, Any]:
    """run.toml: everything a run will be, so that another process can finish it."""
    return {
        "schema": records.SCHEMA,
        "started": datetime.now(UTC).replace(microsecond=0),
        "project": job.project.name,
        "embed": job.embed,
        "sheet": vars(job.sheet),
        "model": vars(job.model) | {"name": records.portable_name(job.model.name, job.project.root)},
        "picture": [{"file": shot.file, **records.planned_record(shot, job.project.root)} for shot in job.shots],
    }


def resume(project: Project, number: int | None = None) -> Job:
    """A project's last run, or the one with this number, as planned.

    Raises K2Error if there is none, or if weights or references have changed.
    """
    run = Run.last(project.outputs, number)
    if run is None:
        which = "run" if number is None else f"run {number:04d}"
        hint = "Start one with: k2 render" if number is None else "To list the runs: k2 log"
        raise K2Error(f"{project.root.name} has no {which} to resume.", hint=hint)
    toml, entries = read_plan(project, run)
    model = planned_model(toml, project)
    sheet = read_table(SheetLayout, toml.table.get("sheet", {}), Place(toml).below("sheet"))
    for _, hashes in entries:
        records.verify_files(hashes)
    shots = [shot for shot, _ in entries]
    model = model_as_started(project, run, shots, model)
    return Job(project, shots, model, run=run, sheet=sheet, embed=toml.table.get("embed", True) is True)


def planned_model(toml: Toml, project: Project) -> models.ModelSpec:
    """The weights that a plan names, as far as it does. Raises K2Error if they are not here."""
    model = records.parse_part(models.ModelSpec, toml.table, "model", Place(toml))
    return replace(model, name=models.resolve(model.name, project.recorded_path, model.variant))


def model_as_started(project: Project, run: Run, shots: Sequence[Shot], planned: models.ModelSpec) -> models.ModelSpec:
    """A run's weights, held as for its first picture: what the plan left open is decided the same way again.

    Raises K2Error if they, or the picture's references, have changed.
    """
    for shot in shots:
        if run.is_done(shot.stem) and project.path_inside(run[f"{shot.stem}.toml"]).is_file():
            label = f"{run.folder.name}/{shot.stem}.toml"
            record = records.parse(Toml.read(run[f"{shot.stem}.toml"], label), project.recorded_path)
            records.locate_model(record, project.recorded_path)
            return replace(record.model, **{key: value for key, value in vars(planned).items() if value is not None})
    return planned


def read_plan(project: Folder, run: Run) -> tuple[Toml, list[tuple[Shot, dict[Path, str]]]]:
    """A run's plan, and the pictures in it with the hashes of their references. Raises K2Error."""
    project.path_inside(run.folder)
    toml = Toml.read(run[PLAN_FILE], f"{run.folder.name}/{PLAN_FILE}", limit=MAX_PLAN, parse=parse_long)
    if toml.table.get("schema") != records.SCHEMA or not isinstance(toml.table.get("picture"), list):
        raise K2Error(
            f"{toml.label} is not a plan that this version of k2 can read.", hint="Start a new run with: k2 render"
        )
    entries = enumerate(toml.table["picture"])
    return toml, [
        records.parse_shot(entry, Place(toml).below("picture", i), project.recorded_path) for i, entry in entries
    ]
