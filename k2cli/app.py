"""The commands: parse arguments, call, print. Each command does its own heavy imports."""

from __future__ import annotations

import errno
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from k2cli import stdio
from k2cli.commands import CommandApp, CommandGroup
from k2cli.completion import complete_weight
from k2cli.history_app import gallery, log, rerun, show
from k2cli.locate import find_file, find_project_of, open_projects
from k2cli.models_app import models_app
from k2cli.options import (
    OUTSIDE_ENV,
    AvoidOption,
    BatchOption,
    CreativityOption,
    DenoiseOption,
    DeviceOption,
    EmbedOption,
    FormatOption,
    GuidanceOption,
    GuidanceUntilOption,
    InitImageOption,
    JsonOption,
    MaskOption,
    ModelOption,
    OffloadOption,
    OnlyOption,
    OutsideOption,
    PrecisionOption,
    ProjectOption,
    QuietOption,
    SamplerOption,
    ScopeOption,
    SizeOption,
    StepsOption,
    StyleGuidanceOption,
    TurboOption,
    parse_matrix,
    parse_seed,
    parse_style_weight,
    variant_from,
)
from k2cli.style_app import mix_styles, moodboard_app, style_app
from k2cli.train import train
from k2cli.watch import watch
from model.errors import K2Error

if TYPE_CHECKING:
    from k2cli.prompts import Prompt
    from k2cli.runs import Job, Saved
    from k2cli.workers import WorkerPool


# In the order a new user needs them; anything not listed comes last.
COMMAND_ORDER = (
    *("new", "render", "watch", "log", "show", "rerun", "gallery"),
    *("style", "mix-styles", "moodboard", "models", "train", "doctor"),
)


class RootGroup(CommandGroup):
    def list_commands(self, ctx: typer.Context) -> list[str]:  # type: ignore[override]
        return sorted(super().list_commands(ctx), key=lambda name: (*COMMAND_ORDER, name).index(name))


# Typer's rich help costs more than the rest of `k2 --help` together, so help is plain.
app = CommandApp(
    cls=RootGroup,
    invoke_without_command=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},  # of every command below, too
)
app.add_typer(models_app, name="models", help="Weights: list, fetch, export.")
app.add_typer(style_app, name="style", help="The project's styles: add, list, show.")
app.add_typer(moodboard_app, name="moodboard", help="Make a style from many pictures.")


def main() -> None:
    """Run the command line, with environment and streams set up for it."""
    # Before torch: threads that spin while waiting are several times slower on a busy machine, no faster on an idle.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    stdio.prepare_streams()
    try:
        app(prog_name="k2")
    except OSError as error:  # in output that no command writes: help, the version
        if error.errno != errno.ENOSPC:
            raise
        from k2cli.console import show_error, unwritable_error

        show_error(unwritable_error(error))
        sys.exit(1)


def show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"k2 {version('k2')}")
        raise typer.Exit()


@app.callback()
def k2(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Render batches of pictures that share a look, on this machine.

    A project is a folder with a k2.toml: prompts, styles, settings.
    Every picture gets a record from which k2 can reproduce it.

    \b
    Start:
      k2 new moody && cd moody
      k2 render
      k2 render -p "a red fox" --batch 4

    Without a command, inside a project, k2 says where you are and what to do next.
    """
    if context.invoked_subcommand is None:
        from k2cli.console import print_result
        from k2cli.folder import OutsideProject
        from k2cli.status import project_status

        try:
            # as Typer reads it
            allowed = os.environ.get(OUTSIDE_ENV, "").lower() in ("1", "true", "t", "yes", "y", "on")
            print_result(project_status(allow_outside=allowed) or context.get_help())
        except OutsideProject as error:  # its hint names an option that bare `k2` lacks
            allow = f"set {OUTSIDE_ENV}=1 in the environment"
            hint = f"Replace the link with its target, or allow it for all commands: {allow}"
            raise K2Error(str(error), hint=hint) from None


@app.command()
def new(
    folder: Annotated[str, typer.Argument(metavar="NAME", help="Folder to create; its name is the project's.")],
    more: Annotated[list[Path] | None, typer.Argument(metavar="PICTURE", help="More pictures for --from.")] = None,
    pictures: Annotated[
        list[Path] | None,
        typer.Option(
            "--from",
            metavar="PICTURE",
            help="Reuse the prompts, seeds and shapes of a picture or folder; repeatable.",
        ),
    ] = None,
    quiet: QuietOption = False,
) -> None:
    """Create a project, ready to render.

    With --from, its prompts come from the metadata of pictures made by A1111, ComfyUI, InvokeAI, Midjourney, mflux or
    k2.

    \b
    Examples:
      k2 new moody
      k2 new taken --from *.png
      k2 new taken --from outputs/0001-fox
    """
    from k2cli.console import for_shell, print_result, say, short_path
    from k2cli.folder import PROJECT_FILE, Folder, git_tracks_outputs

    if not folder:  # as a path it would be the current folder
        raise K2Error("The project's name is empty.", hint="Example: k2 new moody")
    root = Path(os.path.abspath(folder))
    next_step = f"cd {for_shell(root)} && k2 render" if root != Path.cwd() else "k2 render"
    if os.path.isfile(root / PROJECT_FILE):
        hint = f"Choose another folder, or continue with this one: {next_step}"
        raise K2Error(f"{root} is already a k2 project.", hint=hint)
    compose, notes = None, []
    if more and not pictures:
        raise typer.BadParameter("quote a name of several words; pictures need --from", param_hint="NAME")
    if pictures:
        from functools import partial

        from k2cli import from_pictures
        from k2cli.pictures import without_sheets

        named, sheets = without_sheets([*pictures, *(more or [])])
        origins, skipped = from_pictures.gather_origins(named)
        compose = partial(from_pictures.project_toml, origins=list(origins.values()))
        notes = [*filter(None, [sheets]), *from_pictures.import_notes(origins, skipped)]
    created = Folder.create(Path(folder), compose)
    print_result(short_path(created))
    if not quiet:
        for note in notes:
            say(note, "yellow")
        if git_tracks_outputs(created):
            say("Git may track every picture: add outputs/, gallery/ and .runs/ to .gitignore.", "yellow")
        say(f"Next: {next_step}", "dim")


@app.command()
def render(
    context: typer.Context,
    projects: Annotated[
        list[str] | None,
        typer.Argument(metavar="PROJECT", help="Project folders; - reads prompts from standard input, one per line."),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", "-p", metavar="TEXT", help="Render this instead of the project's prompts."),
    ] = None,
    only: OnlyOption = None,
    avoid: AvoidOption = None,
    like: Annotated[
        Path | None,
        typer.Option(
            "--like", metavar="PICTURE", help="Reuse this picture's settings, styles and, without -p, its prompt."
        ),
    ] = None,
    turbo: TurboOption = None,
    style: Annotated[
        list[str] | None,
        typer.Option(
            "--style",
            metavar="NAME=W",
            help="Weight of a style, −2 … 2; 0 turns it off.",
            autocompletion=complete_weight,
        ),
    ] = None,
    moodboard: Annotated[
        float | None,
        typer.Option("--moodboard", metavar="S", help="Strength of [moodboard], −0.5 … 1.5; 0 turns it off."),
    ] = None,
    matrix: Annotated[
        list[str] | None,
        typer.Option(
            "--matrix",
            metavar="KEY=V,V",
            help="Render every combination, one picture each or --batch of each. Keys: style.NAME, seed, size, steps, "
            "guidance, guidance_until, sampler, creativity, denoise.",
        ),
    ] = None,
    batch: BatchOption = None,
    seed: Annotated[str | None, typer.Option("--seed", metavar="N", help="Picture i uses N + i; or random.")] = None,
    size: SizeOption = None,
    aspect: Annotated[
        str | None, typer.Option("--aspect", metavar="W:H", help="Aspect ratio, like 3:2, instead of --size.")
    ] = None,
    resolution: Annotated[
        str | None,
        typer.Option("--resolution", metavar="R", help="With --aspect: 1K, 2K, or the side of a square of equal area."),
    ] = None,
    init_image: InitImageOption = None,
    denoise: DenoiseOption = None,
    mask: MaskOption = None,
    steps: StepsOption = None,
    guidance: GuidanceOption = None,
    guidance_until: GuidanceUntilOption = None,
    sampler: SamplerOption = None,
    style_guidance: StyleGuidanceOption = None,
    cohesion: Annotated[
        float | None,
        typer.Option("--cohesion", metavar="C", help="0: independent pictures … 1: all share the look of the first."),
    ] = None,
    scope: ScopeOption = None,
    creativity: CreativityOption = None,
    model: ModelOption = None,
    device: DeviceOption = None,
    precision: PrecisionOption = None,
    offload: OffloadOption = None,
    format: FormatOption = None,
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, max=256, metavar="N", help="Render in N processes at once.")
    ] = None,
    ray: Annotated[
        str | None, typer.Option("--ray", metavar="ADDRESS", help="Render on a Ray cluster: HOST:PORT, or auto.")
    ] = None,
    project: ProjectOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="Finish the project's last run as it was planned.")] = False,
    run: Annotated[
        int | None, typer.Option("--run", min=1, metavar="N", help="With --resume: the run with this number.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be rendered.")] = False,
    stream: Annotated[
        bool, typer.Option("--stream", help="Render each line of standard input as it arrives, as its own run.")
    ] = False,
    no_embed: EmbedOption = False,
    allow_outside: OutsideOption = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Render a project, or single prompts, into its outputs folder.

    Prints the path of each picture as soon as it is on disk. -p, --only, --style and --matrix are repeatable.
    Exits with 1 if any line of --stream fails.

    \b
    Examples:
      k2 render                             the current project
      k2 render -p "a red fox" --batch 4    one prompt, four seeds
      k2 render --style dusk=0.6 --seed 40
      k2 render --only fox --init-image sketch.png --denoise 0.6
      cat prompts.txt | k2 render - --json
      tail -f wishes.txt | k2 render --stream
      k2 render -p "a {red|green} apple" --matrix style.dusk=0,0.5,1
      k2 render --like outputs/0001-fox/fox-7.png --batch 8
      k2 render --resume                    finish an interrupted run
    """
    from k2cli.cluster import RayPool
    from k2cli.console import say, show_error
    from k2cli.execute import execute, say_if_unchanged, show_plan
    from k2cli.like import Example, note_on_project
    from k2cli.matrix import fixed_axes
    from k2cli.multi_project import raise_all, run_each, try_each
    from k2cli.planning import Request
    from k2cli.prompts import typed_prompt
    from k2cli.runs import resume as last_run
    from k2cli.stdin_prompts import prompts_given, render_lines
    from k2cli.workers import ProcessPool, load_pipeline

    folders, from_stdin = [name for name in projects or [] if name != "-"], stream or "-" in (projects or [])
    if like is not None:
        like = find_file(like, project)
        if not (folders or project) and (home := find_project_of(like, project, allow_outside)):
            folders = [str(home.root)]
            if not quiet and (elsewhere := note_on_project(like, home.root)):
                say(elsewhere, "yellow")
        if len(folders) > 1:
            raise typer.BadParameter("it works with one project at a time", param_hint="--like")
    opened = open_projects(folders, project, allow_outside, prompt or ())
    options = {
        "batch": batch, "seed": parse_seed(seed), "size": size, "aspect": aspect, "resolution": resolution,
        "steps": steps, "guidance": guidance, "guidance_until": guidance_until, "style_guidance": style_guidance,
        "model": model, "device": device, "variant": variant_from(turbo), "sampler": sampler,
        "cohesion": cohesion, "scope": scope, "creativity": creativity, "precision": precision, "offload": offload,
        "format": format, "init_image": init_image and str(init_image), "denoise": denoise,
        "mask": mask, "avoid": ", ".join(avoid) if avoid else None,
    }  # fmt: skip
    settings = {key: value for key, value in options.items() if value is not None}
    pool: WorkerPool | None = ProcessPool(workers) if workers and workers > 1 else None
    if ray is not None:
        pool = RayPool(ray, workers)
    if pool:
        context.call_on_close(pool.close)

    def run_jobs(jobs: list[Job]) -> None:
        if dry_run:
            show_plan(jobs, as_json=json, quiet=quiet)
        else:
            pixel_hashes: dict[Path, str] = {}

            def note(saved: Saved) -> None:
                pixel_hashes[saved.path] = saved.record["pixels"]

            execute(jobs, embed=not no_embed, as_json=json, quiet=quiet, pool=pool, on_saved=note)
            if not (quiet or resume):
                say_if_unchanged(pixel_hashes, with_project=len(jobs) > 1)

    if resume:
        if any((prompt, only, like, style, matrix, from_stdin, settings)) or moodboard is not None:
            raise typer.BadParameter(
                "a run resumes as it was planned, so no other setting can be given", param_hint="--resume"
            )
        resumed, errors = try_each(opened, lambda each: last_run(each, run))
        if not resumed:
            raise_all(errors)
        for error in errors:
            show_error(error)
        run_jobs(resumed)
        if errors:
            raise typer.Exit(1)
        return
    if run is not None:
        raise typer.BadParameter("it selects the run to resume, so it needs --resume", param_hint="--run")
    if only and (prompt or from_stdin):
        raise typer.BadParameter("it selects project prompts, so no others can be given", param_hint="--only")
    if stream and prompt:
        raise typer.BadParameter(
            "its prompts come from standard input, so no others can be given", param_hint="--stream"
        )
    weights = dict(map(parse_style_weight, style or []))
    matrices = [parse_matrix(matrix, fixed_axes(settings, weights))] if matrix else []
    prompts = [typed_prompt("anything")] if stream else prompts_given(prompt or [], stdin=from_stdin)
    example = Example.read(like, opened[0]) if like else None
    request = Request(settings, prompts, only or [], weights, matrices, moodboard, example)
    # what no line of a stream could put right is refused before the first
    several = len(opened) > 1
    jobs = run_each(opened, lambda each: request.job(each, quiet=quiet or stream, with_project=several))
    if not quiet:
        request.warn_if_changed(jobs[0])
    if not stream:
        return run_jobs(jobs)
    if not (dry_run or pool):
        load_pipeline(jobs[0].model)  # while waiting for the first line

    def render_line(one: Prompt) -> None:
        """Render a line, with the projects as they are now."""
        line_request = replace(request, prompts=[one])
        there = open_projects(folders, project, allow_outside)
        run_jobs(run_each(there, lambda each: line_request.job(each, quiet=quiet, with_project=several)))

    if render_lines(render_line, as_json=json):
        raise typer.Exit(1)


app.command("mix-styles")(mix_styles)
app.command("train")(train)
app.command()(watch)
app.command()(log)
app.command()(gallery)
app.command()(show)
app.command()(rerun)


@app.command()
def doctor(project: ProjectOption = None, json: JsonOption = False) -> None:
    """Check this installation.

    Reports device, memory, models, versions, and what will be slow and why. Exits with 1 if something is broken.
    """
    from k2cli.console import print_result, screen_width, to_json
    from k2cli.doctor import describe, examine

    report = examine(project)
    print_result(to_json(report) if json else describe(report, screen_width()))
    if report["problems"]:
        raise typer.Exit(1)
