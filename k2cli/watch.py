"""`k2 watch`: re-render a project as its files change, but only the pictures that the change affects."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import cache, partial
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from k2cli.commands import as_user_error
from k2cli.locate import find_project
from k2cli.options import (
    BatchOption,
    DeviceOption,
    EmbedOption,
    JsonOption,
    OnlyOption,
    OutsideOption,
    ProjectOption,
    QuietOption,
    SizeOption,
    TurboOption,
    variant_from,
)
from model.errors import K2Error

if TYPE_CHECKING:
    from k2cli.models import ModelSpec
    from k2cli.outputs import Run
    from k2cli.project import Project, Shot
    from k2cli.runs import Job, Saved

POLL_SECONDS = 0.4  # seconds between two looks at the files
WEIGHT_SUFFIXES = (".safetensors", ".gguf", ".json")  # and what says how a model is built
MAX_RUNS = 50  # runs searched for pictures that need not be made
DELETED = (0, 0)  # the stamp of a deleted file

Stamps = Mapping[str, tuple[int, int]]


def watch(
    folder: Annotated[
        Path | None, typer.Argument(metavar="PROJECT", help="The project; default: that of the current folder.")
    ] = None,
    only: OnlyOption = None,
    turbo: TurboOption = None,
    batch: BatchOption = None,
    steps: Annotated[
        int | None, typer.Option("--steps", metavar="N", help="Denoising steps; fewer give a quicker look.")
    ] = None,
    size: SizeOption = None,
    device: DeviceOption = None,
    project: ProjectOption = None,
    no_embed: EmbedOption = False,
    allow_outside: OutsideOption = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Render, then render again whenever the project's files change.

    Watches k2.toml, styles and references. A change renders only the pictures that it may affect and that recent runs
    have not made. Deleted pictures stay deleted until something about them changes. The weights stay in memory. An
    error in a file is reported, and k2 waits for the next change. Ctrl-C ends it.

    \b
    Examples:
      k2 watch
      k2 watch moody --turbo --only fox --batch 1
    """
    from k2cli.console import Unwritable, console, say, say_at_exit, show_error
    from k2cli.execute import execute
    from k2cli.folder import Folder
    from k2cli.settings import draw_seed

    if folder and project:
        raise typer.BadParameter("name the project as an argument or with --project, not both", param_hint="--project")
    settings = {"variant": variant_from(turbo), "batch": batch, "steps": steps, "size": size, "device": device}
    check_options(settings)
    path = folder or project
    root = (Folder.at(path) if path else Folder.find(Path.cwd())).root
    pictures = recent_pictures(root, allow_outside)
    keys: dict[str, str] = {}
    stamps: Stamps = {}
    seed = draw_seed()  # once: else a random seed would change every picture on any change
    try:
        while True:
            stamps = project_stamps(root, stamps)
            try:
                job, keys, input_files = plan_missing(
                    find_project(root, allow_outside), only, settings, pictures, keys, seed
                )
                stamps = {**file_stamps(files_outside(input_files, stamps)), **stamps}
                if job.shots:
                    saved = partial(remember, pictures, keys)
                    execute([job], embed=not no_embed, as_json=json, quiet=quiet, on_saved=saved)
                elif not quiet:
                    say("No picture changes.", "dim")
            except Unwritable:  # no change of a file fixes that
                raise
            except Exception as error:
                problem = as_user_error(error)
                if problem is None:
                    raise
                show_error(problem)
            if not quiet:
                say("Waiting for a change; Ctrl-C ends.", "dim")
            wait_for_change(root, stamps)
    except KeyboardInterrupt:
        if console.is_terminal:
            say_at_exit("")  # the terminal shows ^C, and the shell continues on that line
        raise


def check_options(settings: Mapping[str, Any]) -> None:
    """Refuse options that no change of a file could fix. Raises K2Error."""
    from k2cli.settings import Settings
    from k2cli.sizes import STEP, parse_size
    from k2cli.toml_tables import Option, error_context

    Settings().override(**settings)
    if settings["size"] is not None:
        with error_context(Option("--size")) as said:
            parse_size(settings["size"], said, STEP)
    if settings["device"] is not None:
        from model.parts import pick_device

        pick_device(settings["device"])


def recent_pictures(root: Path, allow_outside: bool) -> dict[str, Path]:
    """The pictures of the project's last runs that still exist, by key."""
    from k2cli.outputs import Run

    try:
        project = find_project(root, allow_outside)
        runs = Run.planned_in(project.outputs)[-MAX_RUNS:]
    except K2Error:  # it is reported when the project is rendered
        return {}
    weights_for = cache(WeightsUsed.for_model)  # many runs have the same weights
    return {key: path for run in runs for key, path in planned_pictures(run, project, weights_for) if path.is_file()}


def planned_pictures(
    run: Run, project: Project, weights_for: Callable[[ModelSpec], WeightsUsed]
) -> Iterator[tuple[str, Path]]:
    """The pictures in a run's plan, with their keys; none if it is no longer readable."""
    from k2cli.runs import planned_model, read_plan

    with suppress(K2Error):
        toml, planned = read_plan(project, run)
        weights = weights_for(planned_model(toml, project))
        for shot, hashes in planned:
            yield picture_key(weights, shot, project.root, hashes.__getitem__), run[shot.file]


def plan_missing(
    project: Project,
    only: list[str] | None,
    settings: Mapping[str, object],
    pictures: Mapping[str, Path],
    last_keys: Mapping[str, str],
    seed: int = 0,
) -> tuple[Job, dict[str, str], set[Path]]:
    """The run of what is not made yet; the key of each picture of the project, by stem; and the files they are made
    from. `last_keys`: those of the last look; a picture that was made and is gone is rendered again only if its key is
    not among them, as otherwise somebody deleted it. `seed`: the seed, if it is random."""
    from k2cli.planning import plan_job
    from model.hashes import identity, spec_files

    resolved = replace(project.resolve_settings(**settings), drawn_seed=seed)
    prompts = project.choose_prompts(only) if only else None
    matrices = project.matrices_for(prompts)
    shots = project.shots(resolved, prompts, None, matrices)
    weights = WeightsUsed.for_model(resolved.model_spec())
    by_key = {picture_key(weights, shot, project.root, identity): shot for shot in shots}
    new = by_key.keys() - set(last_keys.values())
    missing = [
        shot for key, shot in by_key.items() if key not in pictures or (key in new and not pictures[key].exists())
    ]
    keys = {shot.stem: key for key, shot in by_key.items()}
    input_files = {path for shot in shots for path in spec_files(shot.spec)}
    return plan_job(project, resolved, missing, compared=bool(matrices)), keys, input_files


def remember(pictures: dict[str, Path], keys: Mapping[str, str], saved: Saved) -> None:
    """Note that a picture is made, and where, so that an error in a later one does not make it again."""
    pictures[keys[saved.stem]] = saved.path


class WeightsUsed(NamedTuple):
    """The weights that pictures are made with, as far as known, and their defaults."""

    weights: Mapping[str, Any]
    defaults: Mapping[str, Any]

    @classmethod
    def for_model(cls, model: ModelSpec) -> WeightsUsed:
        """Reads their headers, which takes a moment. Raises K2Error."""
        from k2cli.models import recommended_settings
        from model.library import find
        from model.parts import pick_device

        found = find(model.name, model.variant)
        chosen = {"variant": found and found.variant, "device": str(pick_device(model.device))}
        if found and found.source == "box":  # small, and held as is by default
            chosen |= {"precision": model.precision or "native", "offload": model.offload or "none"}
        return cls(vars(model) | chosen, recommended_settings(model.name, model.variant))


def picture_key(used: WeightsUsed, shot: Shot, root: Path, hash_of: Callable[[Path], str]) -> str:
    """A picture's key: a hash of everything that goes into it, except what would change nothing."""
    from k2cli.console import to_json
    from k2cli.records import planned_record
    from model.spec import STYLE_SETTINGS, Leader, resolve_denoise

    spec = shot.spec
    if spec.leader == Leader(spec.prompt, spec.seed, spec.negative):  # the lead picture is what it would be alone
        shot = replace(shot, spec=replace(spec, cohesion=0.0, leader=None))
    record = planned_record(shot, root, hash_of)
    settings = record["settings"]
    settings |= {key: own for key, own in used.defaults.items() if settings[key] is None}
    settings |= {"guidance": float(settings["guidance"]), "sampler": settings["sampler"] or "euler"}
    until = settings["guidance_until"]
    settings["guidance_until"] = float(until) if settings["guidance"] and until not in (None, 1) else None
    if record["init_image"]:
        settings["denoise"] = float(resolve_denoise(settings["denoise"], masked=bool(record["mask"])))
    if not any(style["reference"] for style in record["style"] or ()):
        settings |= dict.fromkeys(STYLE_SETTINGS)
    return sha256(to_json([used.weights, shot.format, record]).encode()).hexdigest()


def project_stamps(root: Path, before: Iterable[str] = ()) -> dict[str, tuple[int, int]]:
    """The time of change and size of each file that a picture could be made from, and of each that counted before.

    No others: the output of `k2 watch` itself may go to a file in the project, which would change forever.
    """
    from model.picture_file import OUTPUT_FOLDERS, has_picture_suffix

    found: dict[str, tuple[int, int]] = {}
    for folder, folders, names in os.walk(root):
        top = Path(folder) == root
        folders[:] = [name for name in folders if not name.startswith(".") and not (top and name in OUTPUT_FOLDERS)]
        paths = (Path(folder, name) for name in names if not name.startswith("."))  # hidden ones are editors' own
        found |= file_stamps(
            path for path in paths if has_picture_suffix(path) or path.suffix in (".toml", *WEIGHT_SUFFIXES)
        )
    others = file_stamps(files_outside(map(Path, before), found))
    return {**dict.fromkeys(before, DELETED), **found, **others}


def files_outside(files: Iterable[Path], found: Container[str]) -> set[Path]:
    """The files that were not found in the project, as behind a link to a folder, and the pictures beside them, as a
    new one may count, too."""
    from model.picture_file import has_picture_suffix

    others = {path for path in files if str(path) not in found}
    for folder in {path.parent for path in others}:
        with suppress(OSError):
            others.update(
                path for path in folder.iterdir() if has_picture_suffix(path) and not path.name.startswith(".")
            )
    return others


def file_stamps(files: Iterable[Path]) -> dict[str, tuple[int, int]]:
    """The stamps of these files, without those that are gone."""
    found = {}
    for path in files:
        with suppress(OSError):
            about = path.stat()
            found[str(path)] = (about.st_mtime_ns, about.st_size)
    return found


def wait_for_change(root: Path, before: Stamps) -> None:
    """Wait until a file changes, and then until the writing has stopped."""
    now = before
    while now == before:
        time.sleep(POLL_SECONDS)
        now = project_stamps(root, before)
    while True:
        time.sleep(POLL_SECONDS)
        later = project_stamps(root, before)
        if later == now:
            return
        now = later
