"""Warnings about requests that the user may not mean, found before anything is rendered."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache

from k2cli.console import name_among_several, say
from k2cli.foreign_syntax import foreign_syntax_warning, shorten
from k2cli.matrix import Matrix
from k2cli.models import Grid, grid, recommended_settings, unknown_variant
from k2cli.pictures import picture_sides
from k2cli.project import Shot
from k2cli.prompts import Prompt
from k2cli.runs import Job
from k2cli.settings import NONE, Settings
from model.errors import listed, pluralise
from model.picture_file import describe_skipped
from model.region import Region
from model.spec import Leader, RenderSpec, resolve_denoise, steps_guided, steps_taken
from model.vocabulary import vocabulary

MAX_CROP = 0.1  # share of an init image that may be lost without a warning: sides are rounded to multiples of a token
MIN_AREA, MAX_AREA = 0.5, 1.5  # range that a model still paints coherently, relative to what it was trained for ...
MAX_BEYOND = 1.1  # ... and the limit above the largest of several areas, beyond which a model hardly goes


class JobWarnings:
    """Warnings about a job and each of its pictures; the model's metadata is read once."""

    def __init__(self, job: Job):
        self.job = job
        self._model = job.model.name, job.model.variant

    def say(self, *, with_project: bool) -> None:
        """Print all of them, prefixed with the project's name if it is one of several."""
        for warning in self.all():
            say(f"{name_among_several(self.job.project.root)}: {warning}" if with_project else warning, "yellow")

    def all(self) -> Iterator[str]:
        """Some prompts will get a picture of something else, name several subjects, or hold another tool's syntax;
        nothing says which variant the weights are; sizes are too far from what the model knows; guidance is to end
        that never began; beside references and moodboard lie pictures that nothing reads, or that are broken."""
        job, remaining = self.job, self.job.remaining
        used = {each.image.parent for shot in job.shots for style in shot.spec.styles for each in style.references}
        if over := describe_skipped(job.project.other_files - used):
            yield over
        if unread := sorted(path.name for path in job.project.unreadable):
            yield f"Left out of the moodboard because they cannot be read: {listed(unread)}."
        if self._unknown_variant:
            yield self._unknown_variant
        if far := next(filter(None, map(self._unusual_size, remaining)), ""):
            yield far
        guidance_warnings = [self._guidance_off(shot) for shot in remaining if shot.spec.guidance_until]
        if guidance_warnings and all(guidance_warnings):
            yield guidance_warnings[0]
        if syntax_warning := foreign_syntax_warning(
            text for shot in remaining for text in (shot.given, shot.spec.negative)
        ):
            yield syntax_warning
        if undrawable := list(dict.fromkeys(shot.given for shot in remaining if names_nothing(shot, job))):
            yield nothing_to_draw(undrawable)
        if several_named := list(dict.fromkeys(shot.given for shot in remaining if names_several(shot, job))):
            yield several_subjects(several_named)

    def about(self, shot: Shot) -> list[str]:
        """Those that concern one picture."""
        found = [self._unknown_variant, self._unusual_size(shot), self._guidance_off(shot)]
        found.append(foreign_syntax_warning([shot.given, shot.spec.negative]))
        found.append(nothing_to_draw([shot.given]) if names_nothing(shot, self.job) else "")
        found.append(several_subjects([shot.given]) if names_several(shot, self.job) else "")
        return [warning for warning in found if warning]

    @cached_property
    def _unknown_variant(self) -> str:
        return unknown_variant(*self._model)

    @cached_property
    def _grid(self) -> Grid:
        return grid(*self._model)

    @cached_property
    def _guidance(self) -> float:
        return float(recommended_settings(*self._model)["guidance"])

    def _unusual_size(self, shot: Shot) -> str:
        """A warning if a picture is far larger or smaller than the model says it was trained for, else ""."""
        native, _, known = self._grid
        width, height = shot.spec.width, shot.spec.height
        limit = MAX_AREA if known and known[0] == known[1] else MAX_BEYOND
        if known and width and height and not MIN_AREA * known[0] <= width * height <= limit * known[1]:
            made_for = f"the model's native {native}x{native}"
            return f"{width}x{height} is far from {made_for}: expect broken pictures."
        return ""

    def _guidance_off(self, shot: Shot) -> str:
        """A warning if guidance is to end early in a picture that has none, else ""."""
        until, guidance = shot.spec.guidance_until, shot.spec.guidance
        if until and not (self._guidance if guidance is None else guidance):
            return f"Guidance is off, so guidance_until = {until:g} has no effect."
        return ""


def unused_settings(settings: Settings, shots: Sequence[Shot]) -> Iterator[str]:
    """Settings given for this run that have no effect in it."""
    specs, given = [shot.spec for shot in shots], settings.sources
    lead = all(spec.leader == Leader(spec.prompt, spec.seed, spec.negative) for spec in specs)
    if "cohesion" in given and settings.cohesion and lead:
        yield "Every picture is its own lead picture, so cohesion has no effect."
    if "scope" in given and not settings.cohesion:
        yield "Cohesion is 0, so scope has no effect."
    guided = "style_guidance" in given and settings.style_guidance is not None  # --like may set None
    if guided and not any(style.references for spec in specs for style in spec.styles):
        yield "No style has reference pictures, so style_guidance has no effect."


def missing_lead(settings: Settings, shots: Sequence[Shot]) -> Iterator[str]:
    """The lead picture is not in this run, and in no earlier one either, because its seed was drawn for this run."""
    specs = [shot.spec for shot in shots]
    others = {spec.leader for spec in specs} - {Leader(spec.prompt, spec.seed, spec.negative) for spec in specs}
    if any(leader and leader.seed == settings.drawn_seed for leader in others):
        belong = "these pictures match no earlier ones. To match one: --like PICTURE"
        yield f"The lead picture is the first prompt's, with a seed drawn for this run: {belong}"


def missing_init_image(
    job: Job, settings: Settings, prompts: Sequence[Prompt], matrices: Sequence[Matrix]
) -> Iterator[str]:
    """No picture has an init image, so settings that concern one have no effect."""
    if any(shot.spec.init_image for shot in job.shots):
        return
    typed = settings.sources.keys() - job.project.settings.sources.keys()  # not taken over by --like
    given = {key: getattr(settings, key) for key in typed}
    run_settings = vars(settings) if settings.init_image is None else given  # else for one that prompts reject
    none = given.get("init_image") == NONE  # except for prompts that override the command line
    prompt_settings = [prompt.settings for prompt in prompts if prompt.overrides_options or not none]
    sources = [run_settings, *prompt_settings, *(matrix.axes for matrix in matrices)]
    if unused := [key for key in ("denoise", "mask") if any(each.get(key) not in (None, NONE) for each in sources)]:
        change = "has" if len(unused) == 1 else "have"
        yield f"No picture has an init image, so {' and '.join(unused)} {change} no effect."


def unsuitable_init_images(job: Job) -> Iterator[str]:
    """Init images of which nothing remains though something should, that are cropped a lot, whose kept part is scaled,
    or whose region is too narrow to be painted."""
    specs = [shot.spec for shot in job.shots if shot.spec.init_image]
    if not specs:  # saves reading the model's headers
        return
    default_steps = recommended_settings(job.model.name, job.model.variant)["steps"]
    for mask, denoise, steps in {(spec.mask, spec.denoise, spec.steps or default_steps): None for spec in specs}:
        strength = resolve_denoise(denoise, masked=bool(mask))
        if not mask and strength < 1 and steps_taken(strength, steps) == steps:
            all_of_it = f"denoise {strength:g} amounts to 1: nothing of the init image remains."
            yield f"With {pluralise(steps, 'step')}, {all_of_it}"
    framed = {(spec.init_image, spec.width, spec.height, bool(spec.mask)): None for spec in specs}
    for path, width, height, masked in framed:
        if not (path and width and height):
            continue
        sides = picture_sides(path)
        was, shape = "x".join(map(str, sides)), width / height * sides[1] / sides[0]
        if (cut := 1 - min(shape, 1 / shape)) > MAX_CROP:
            yield f"{path.name} is {was} and fills {width}x{height}: {cut:.0%} of it is cropped."
        if masked and sides != (width, height):
            yield f"{path.name} is scaled from {was} to {width}x{height}, and so is the part that the mask keeps."
    step = grid(job.model.name, job.model.variant).step
    for region in {Region.parse(spec.mask): None for spec in specs if isinstance(spec.mask, str)}:
        if region and min(region.width, region.height) < step:
            yield f"The region {region} is narrower than {step} pixels: little or nothing in it will change."


def equal_step_counts(job: Job, matrices: Sequence[Matrix]) -> Iterator[str]:
    """Shares of the steps that a matrix compares: several come to the same number of steps, or some pictures ignore
    them. That all pictures do is reported elsewhere."""
    needs = {"denoise": "an init image", "guidance_until": "guidance"}
    axes = {key for matrix in matrices for key in needs if len(matrix.axes.get(key, ())) > 1}
    if not axes:  # saves reading the model's headers
        return
    defaults = recommended_settings(job.model.name, job.model.variant)
    shares: dict[tuple[RenderSpec, str, int, int], dict[str, None]] = {}
    ignoring: Counter[tuple[str, RenderSpec, str]] = Counter()
    for shot in job.shots:
        spec = shot.spec
        steps = steps_run = spec.steps or defaults["steps"]
        if spec.init_image:
            denoise = resolve_denoise(spec.denoise, masked=bool(spec.mask))
            steps_run = steps_taken(denoise, steps)
            shares.setdefault((replace(spec, denoise=None), "denoise", steps, steps_run), {})[f"{denoise:g}"] = None
        else:
            ignoring[shot.given, spec, "denoise"] += 1
        others = replace(spec, guidance_until=None)
        if not (defaults["guidance"] if spec.guidance is None else spec.guidance):
            ignoring[shot.given, others, "guidance_until"] += 1
        elif spec.guidance_until:
            guided = steps_guided(spec.guidance_until, steps_run)
            shares.setdefault((others, "guidance_until", steps_run, guided), {})[f"{spec.guidance_until:g}"] = None
    warnings: dict[str, None] = {}
    for (_, key, steps, count), (*values, last) in shares.items():
        if key in axes and values:
            how = f"{'is' if count == 1 else 'are'} {'used' if key == 'denoise' else 'guided'}"
            those = f"{key} {', '.join(values)} and {last}"
            warnings[f"With {those}, {count} of {pluralise(steps, 'step')} {how}: these pictures are the same."] = None
    yield from warnings
    for key, need in needs.items():
        alike = {given: None for (given, _, about), count in ignoring.items() if about == key and count > 1}
        if key in axes and alike and any(about == key for _, about, _, _ in shares):
            those = listed([f'"{shorten(prompt)}"' for prompt in alike], 1)
            yield f"Some pictures of {those} are the same: {key} has no effect without {need}."


def names_nothing(shot: Shot, job: Job) -> bool:
    """Whether the bundled weights find nothing to draw in a prompt; a LoRA may have taught them something."""
    return job.model.name == "mini" and not shot.spec.adapters and not is_drawable(shot.given)


@lru_cache(maxsize=1000)  # many pictures share a prompt
def is_drawable(prompt: str) -> bool:
    return not prompt.strip() or vocabulary().can_draw(prompt)


def names_several(shot: Shot, job: Job) -> bool:
    """Whether a prompt asks the bundled weights, which learned from single drawings, for several things at once."""
    return job.model.name == "mini" and not shot.spec.adapters and len(subjects(shot.given)) > 1


@lru_cache(maxsize=1000)
def subjects(prompt: str) -> list[str]:
    return vocabulary().subjects(prompt)


def several_subjects(prompts: Sequence[str]) -> str:
    """That only one of several subjects will be painted, or a mixture of them."""
    named = f'"{shorten(prompts[0])}" ({listed(subjects(prompts[0]), 3)})'
    return f"mini paints one subject per picture; several are named in {listed([named, *prompts[1:]], 1)}"


def nothing_to_draw(prompts: Sequence[str]) -> str:
    those = listed([f'"{shorten(prompt)}"' for prompt in prompts], 1)
    return f"mini can draw nothing in {those}; to list what it can: k2 models vocabulary"
