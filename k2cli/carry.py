"""From what a command asks for to pictures on disk: jobs planned, shown, or carried out and told of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import typer

from k2cli import history, licence
from k2cli.console import meter, near, result, results, say, typed
from k2cli.disk import DiskFull
from k2cli.expander import forget
from k2cli.facts import course
from k2cli.folder import root_above
from k2cli.hands import Crew, Unreachable
from k2cli.matrix import Matrix
from k2cli.models import grid, reads_styles, recommended
from k2cli.options import to_json
from k2cli.outputs import Run, number_of
from k2cli.pictures import sides_of
from k2cli.project import Project, Shot
from k2cli.prompts import Prompt
from k2cli.records import portable, request
from k2cli.runs import Job, Saved, SheetForm, render
from k2cli.settings import NONE, Settings
from k2cli.signs import read_as_words
from k2cli.tables import listed
from model.errors import K2Error, count_of
from model.picture_file import is_sheet, passed_over
from model.region import Region
from model.spec import Leader, denoise_of, steps_guided, steps_taken
from model.vocabulary import vocabulary
from model.weighed import check_number

CUT = 0.1  # of an initial picture, beyond which it is told; less comes of sides that are multiples of a token's
LEAST, MOST = 0.5, 1.5  # of the area that a model was trained for, what it still paints whole ...
FURTHEST = 1.1  # ... and of the largest of several: a model that was led so far goes hardly further


def plan_project(
    project: Project,
    settings: Settings,
    prompts: Sequence[Prompt] | None,
    styles: Mapping[str, float],
    matrices: Sequence[Matrix],
    *,
    quiet: bool,
) -> Job:
    """The run of a project, as `Project.shots` plans it; what may not be meant is told."""
    of_prompts = [prompt.settings for prompt in (project.prompts if prompts is None else prompts)]
    if not quiet and (beyond := settings.beyond(of_prompts)):
        say(f"{project.name} has {beyond}", "yellow")
    shots = project.shots(settings, prompts, styles, matrices)
    if not quiet and (names := project.uncompared(prompts, matrices)):
        say(f"{project.name}: no [[matrix]] is about {listed(names)}.", "yellow")
    if not quiet and not any(shot.spec.init_image for shot in shots):
        theirs = of_prompts if settings.init_image != NONE else ()
        said = [vars(settings), *theirs, *(matrix.axes for matrix in matrices)]
        if any(each.get("denoise") is not None for each in said):
            say("Nothing begins with a picture, so that denoise changes nothing.", "yellow")
    job = plan_job(project, settings, shots, compared=bool(matrices))
    if not quiet:
        for doubt in (*idle(settings, shots), *misbegun(job), *same_steps(job, matrices)):
            say(doubt, "yellow")
    return job


def idle(settings: Settings, shots: Sequence[Shot]) -> Iterator[str]:
    """Of settings that were typed for this run: that they change nothing in it."""
    specs, here = [shot.spec for shot in shots], settings.elsewhere
    lead = all(spec.leader == Leader(spec.prompt, spec.seed, spec.negative) for spec in specs)
    if "cohesion" in here and settings.cohesion and lead:
        yield "Every picture is the first of its own, so that cohesion changes nothing."
    guided = "style_guidance" in here and settings.style_guidance is not None  # as a picture's own none
    if guided and not any(style.references for spec in specs for style in spec.styles):
        yield "No style has reference pictures, so that style_guidance changes nothing."


def plan_job(project: Project, settings: Settings, shots: Sequence[Shot], *, compared: bool) -> Job:
    """The run of these pictures; those that a matrix compares stand row below row on their sheet."""
    job = Job(project, shots, settings.held())
    if not (compared and shots):
        return job
    return replace(job, called=f"matrix-{shots[0].name.rpartition('-')[0]}", sheet=SheetForm(columns=1))


def misbegun(job: Job) -> Iterator[str]:
    """Of pictures that begin with one: that nothing stays of it though something is to, that much of it is cut off,
    that what stays is scaled, or that a region is too narrow to be painted."""
    begun = [shot.spec for shot in job.shots if shot.spec.init_image]
    if not begun:  # nor need the model's headers be read
        return
    own = recommended(job.model.name, job.model.variant)["steps"]
    for mask, denoise, steps in {(spec.mask, spec.denoise, spec.steps or own): None for spec in begun}:
        part = denoise_of(denoise, masked=bool(mask))
        if not mask and part < 1 and steps_taken(part, steps) == steps:
            yield f"Of {count_of(steps, 'step')} denoise {part:g} takes all: nothing of the initial picture stays."
    framed = {(spec.init_image, spec.width, spec.height, bool(spec.mask)): None for spec in begun}
    for path, width, height, masked in framed:
        if not (path and width and height):
            continue
        sides = sides_of(path)
        was, shape = "x".join(map(str, sides)), width / height * sides[1] / sides[0]
        if (cut := 1 - min(shape, 1 / shape)) > CUT:
            yield f"{path.name} is {was} and fills {width}x{height}: {cut:.0%} of it is cut off, at its ends."
        if masked and sides != (width, height):
            yield f"{path.name} is {was} and becomes {width}x{height}, so that what a mask keeps of it is scaled, too."
    step = grid(job.model.name, job.model.variant).step
    for region in {Region.read(spec.mask): None for spec in begun if isinstance(spec.mask, str)}:
        if region and min(region.width, region.height) < step:
            yield f"The region {region} is narrower than {step} pixels: expect little to change in it, or nothing."


def same_steps(job: Job, matrices: Sequence[Matrix]) -> Iterator[str]:
    """Of shares of the steps that a matrix compares: that several come to as many."""
    axes = {key for matrix in matrices for key in ("denoise", "guidance_until") if key in matrix.axes}
    if not axes:  # nor need the model's headers be read
        return
    own = recommended(job.model.name, job.model.variant)
    shares: dict[tuple[str, str, int, int], dict[str, None]] = {}
    for shot in job.shots:
        spec = shot.spec
        steps = taken = spec.steps or own["steps"]
        if spec.init_image:
            denoise = denoise_of(spec.denoise, masked=bool(spec.mask))
            taken = steps_taken(denoise, steps)
            shares.setdefault((shot.given, "denoise", steps, taken), {})[f"{denoise:g}"] = None
        if spec.guidance_until and (own["guidance"] if spec.guidance is None else spec.guidance):
            guided = steps_guided(spec.guidance_until, taken)
            shares.setdefault((shot.given, "guidance_until", taken, guided), {})[f"{spec.guidance_until:g}"] = None
    told: dict[str, None] = {}
    for (_, key, steps, count), (*values, last) in shares.items():
        if key in axes and values:
            how = f"{'is' if count == 1 else 'are'} {'taken' if key == 'denoise' else 'guided'}"
            those = f"{key} {', '.join(values)} and {last}"
            told[f"Of {count_of(steps, 'step')} {count} {how} by {those}: these pictures are the same."] = None
    yield from told


def show_plan(jobs: Sequence[Job], *, as_json: bool, quiet: bool) -> None:
    """What a run would make: a line or an object for each picture, the model's own settings filled in."""
    of = places(jobs)
    for job in jobs:
        left = job.left
        if not left and not quiet:
            say_finished(job)
        check_references(job)
        if not quiet:
            say_doubts(job)
        own = recommended(job.model.name, job.model.variant) if left else {}
        folder = f"{near(job.project.root)}/" if len(jobs) > 1 else ""
        rows = []
        for shot in left:
            asked = request(shot, job.project.root)
            said = {key: value for key, value in asked["settings"].items() if value is not None}
            asked["settings"] |= own | said
            if asked["init_image"]:
                asked["settings"]["denoise"] = denoise_of(said.get("denoise"), masked=bool(asked["mask"]))
            if as_json:
                about = {"file": shot.file, "project": str(job.project.root), "variant": job.model.variant}
                used = {"name": portable(job.model.name, job.project.root), "variant": job.model.variant}
                doubts = {"of": next(of), "warnings": doubts_of(shot, job)}
                result(to_json(about | asked | {"model": used, **doubts}))
            else:
                made = asked["settings"]
                size = f"{made['width']}x{made['height']}"
                facts = [*course(made)]
                facts += [f"{style.name}={style.strength:g}" for style in shot.spec.styles if style.strength]
                facts += [f"cohesion {made['cohesion']:g}"] * bool(made["cohesion"])
                facts += [f"begun with {begun['image']}"] if (begun := asked["init_image"]) else []
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
    """Render jobs, print each picture's path, and tell people how it went -> the runs' folders."""
    folders: list[Path] = []
    of = places(jobs)
    forget()
    for job in jobs:
        licence.require_for(job.model.name, job.model.variant)
        check_references(job)
    for job in jobs:
        if not job.left and not job.lacks_sheet:
            if not quiet:
                say_finished(job)
            continue
        if not quiet:
            say_doubts(job)
        job = replace(job, embed=job.embed and embed)
        folder = carry(job, as_json=as_json, quiet=quiet, crew=crew, on_saved=on_saved, of=of)
        folders += [folder] if folder is not None else []
    return folders


def check_references(job: Job) -> None:
    """Refuse more reference pictures than a model takes at once, before its weights are read. Raises K2Error."""
    looks = {shot.spec.styles for shot in job.left if any(style.references for style in shot.spec.styles)}
    auto = "tokens" if looks and reads_styles(job.model.name, job.model.variant) else "splice"
    for styles in looks:
        check_number([replace(style, method=auto) if style.method == "auto" else style for style in styles])


def places(jobs: Sequence[Job]) -> Iterator[list[int]]:
    """Which picture of how many each is, so that whoever reads them knows which is the last: [1, 2], [2, 2]."""
    total = sum(len(job.left) for job in jobs)
    return ([number, total] for number in range(1, total + 1))


def carry(
    job: Job,
    *,
    as_json: bool,
    quiet: bool,
    crew: Crew | None,
    on_saved: Callable[[Saved], object] | None,
    of: Iterator[list[int]],
) -> Path | None:
    """One job, with a word on how to go on where it is cut short -> the run's folder, if it has a picture more."""
    total, done, kept_back, folder = len(job.left), 0, 0, None
    begun: list[Path] = []  # the run's folder
    told: set[str] = set()  # prompts
    shots = {shot.stem: shot for shot in job.left}
    try:
        before = "" if crew else "loading the model"  # whose steps nobody hears of
        with meter(total, quiet=quiet, before=before) as bar:
            for saved in render(job, on_start=begun.append, on_step=bar.step, crew=crew):
                done, folder = done + 1, saved.path.parent
                bar.saved(done)
                if on_saved:
                    on_saved(saved)
                if done == 1 and not quiet:
                    for lora in saved.record.get("lora") or ():
                        say(f"{lora['file']}: {lora['matched']} of {lora['modules']} modules matched", "dim")
                doubts = doubts_of(shots[saved.stem], job) if as_json else []
                tell(saved, told, next(of), doubts, as_json=as_json, quiet=quiet)
                kept_back += bool(saved.record["blocked"])
    except (KeyboardInterrupt, BrokenPipeError) as reason:
        interrupted = isinstance(reason, KeyboardInterrupt)
        if begun and (interrupted or not quiet):
            there = f"{len(job.shots) - total + done} of {len(job.shots)} pictures are in {near(begun[0])}"
            why = "Interrupted" if interrupted else "Nobody reads on"
            whole = done == total and len(job.shots) == 1  # several get a contact sheet yet
            say(f"{why}: {there}.{'' if whole else f' Go on with: {go_on(job, begun[0])}'}")
        if not interrupted:
            raise
        raise typer.Exit(getattr(reason, "code", 130)) from None
    except (DiskFull, Unreachable) as error:
        stands = folder or (job.run and job.run.folder)  # a run that came to nothing is gone
        first = "Make room" if isinstance(error, DiskFull) else "See to it"
        hint = f"{first}, then go on with: {go_on(job, stands)}" if stands else error.hint
        raise K2Error(str(error), hint=hint) from None
    if not quiet and total - kept_back > 1 and folder is not None:
        sheets = sum(map(is_sheet, folder.iterdir()))
        beside = count_of(sheets, "contact sheet") if sheets > 1 else "a contact sheet"
        more = " more" if total < len(job.shots) else ""
        say(f"{total - kept_back}{more} pictures and {beside} in {near(folder)}", "dim")
    return folder


def tell(saved: Saved, told: set[str], of: list[int], doubts: Sequence[str], *, as_json: bool, quiet: bool) -> None:
    """A picture's line of results, and what is wrong with it; of its prompt once, as `told` keeps in mind. That it was
    blocked is said even if all else is quiet: its line is missing."""
    asked, blocked = saved.record["prompt"], saved.record["blocked"]
    unread = f'The last {asked["unread"]} tokens of "{asked["name"]}" are too many: unread.' if asked["unread"] else ""
    if unread and not quiet and asked["text"] not in told:
        told.add(asked["text"])
        say(unread, "yellow")
    if blocked:
        say(f'Blocked by the output filter "{blocked["filter"]}": {near(saved.path)}', "yellow")
    if as_json:
        beside = {"of": of, "warnings": [*doubts, *filter(None, [unread])]}
        result(to_json({"file": None if blocked else near(saved.path), **saved.record, **beside}))
    elif not blocked:
        result(near(saved.path))


def say_finished(job: Job) -> None:
    """That nothing is left of a run."""
    say(f"{near(job.run.folder) if job.run else job.project.name}: every picture of the run is there.")


def say_again(made: Mapping[Path, str]) -> None:
    """That all pictures of a run are those of the run before it.

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
            say(f"The same {which} as run {number_of(before[-1]):04d}; --seed N or --seed random for others.", "dim")


def holds(run: Path, hashes: Mapping[str, str]) -> bool:
    """Whether a run has pictures of these stems, with these pixels; the first that differs is the last looked at."""
    return all((history.load(run / f"{stem}.toml") or {}).get("pixels") == sha for stem, sha in hashes.items())


def say_doubts(job: Job) -> None:
    """That some prompts will get a picture of something else, or hold another tool's signs, that sizes are too far
    from what the model knows, that guidance ends which never began, or that references and moodboard have pictures
    beside them that nothing reads, or that are broken."""
    used = {each.image.parent for shot in job.shots for style in shot.spec.styles for each in style.references}
    if over := passed_over(job.project.others - used):
        say(over, "yellow")
    if unread := sorted(path.name for path in job.project.unread):
        say(f"Left out of the moodboard, as they cannot be read: {listed(unread)}.", "yellow")
    if far := far_off(job):
        say(far, "yellow")
    if until := never_guided(job):
        say(f"Guidance is off, so that guidance_until = {until:g} changes nothing.", "yellow")
    if signs := read_as_words(text for shot in job.left for text in (shot.given, shot.spec.negative)):
        say(signs, "yellow")
    if strange := list(dict.fromkeys(shot.given for shot in job.left if shows_else(shot, job))):
        say(nothing_in(strange), "yellow")


def doubts_of(shot: Shot, job: Job) -> list[str]:
    """What is told of a picture's prompt before it is made."""
    strange = nothing_in([shot.given]) if shows_else(shot, job) else ""
    return [*filter(None, (read_as_words([shot.given, shot.spec.negative]), strange))]


def far_off(job: Job) -> str:
    """That pictures are far larger, or smaller, than what a model says it was trained for; else nothing."""
    native, _, known = grid(job.model.name, job.model.variant)
    beyond = MOST if known and known[0] == known[1] else FURTHEST
    for width, height in {(shot.spec.width, shot.spec.height): None for shot in job.left}:
        if known and width and height and not LEAST * known[0] <= width * height <= beyond * known[1]:
            made_for = f"the {native}x{native} that the model was made for"
            return f"{width}x{height} is far from {made_for}: expect broken pictures."
    return ""


def never_guided(job: Job) -> float | None:
    """When guidance is to end, where no picture has any."""
    said = {shot.spec.guidance_until for shot in job.left if shot.spec.guidance_until is not None}
    if not said or any(shot.spec.guidance for shot in job.left):
        return None
    own = recommended(job.model.name, job.model.variant)["guidance"]
    return None if own and any(shot.spec.guidance is None for shot in job.left) else min(said)


def shows_else(shot: Shot, job: Job) -> bool:
    """Whether the weights in the box find nothing to draw in a prompt; a LoRA may have taught them something."""
    return job.model.name == "mini" and not shot.spec.adapters and not is_drawn(shot.given)


@lru_cache(maxsize=1000)  # many pictures have the same
def is_drawn(prompt: str) -> bool:
    return not prompt.strip() or vocabulary().draws(prompt)


def nothing_in(prompts: Sequence[str]) -> str:
    more = f" and {len(prompts) - 1} more" if len(prompts) > 1 else ""
    return f'Nothing that mini can draw is in "{prompts[0]}"{more}; what it can: k2 models vocabulary'


def go_on(job: Job, folder: Path) -> str:
    """The command that finishes a run, as short as it can be typed here."""
    root, last = job.project.root, Run.last(job.project.outputs)
    here = root_above(Path.cwd())
    words = ["k2 render --resume"]
    words += [] if last and last.folder == folder else [f"--run {number_of(folder)}"]
    words += [] if here and here.samefile(root) else [f"--project {typed(root)}"]
    model = Path(job.model.name)
    begun = (path for shot in job.shots for path in (shot.spec.init_image, shot.spec.mask))
    files = [model, *(path for path in begun if isinstance(path, Path))]
    outside = any(file.is_absolute() and not file.resolve().is_relative_to(root.resolve()) for file in files)
    words += ["--allow-outside"] if job.project.allow_outside or outside else []
    return " ".join(words)
