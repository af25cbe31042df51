"""What may not be meant by what is asked for: found before pictures are made of it, and told."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache

from k2cli.console import among_others, say
from k2cli.matrix import Matrix
from k2cli.models import Grid, grid, recommended, untold_variant
from k2cli.pictures import sides_of
from k2cli.project import Shot
from k2cli.prompts import Prompt
from k2cli.runs import Job
from k2cli.settings import NONE, Settings
from k2cli.signs import read_as_words, short
from model.errors import count_of, listed
from model.picture_file import passed_over
from model.region import Region
from model.spec import Leader, RenderSpec, denoise_of, steps_guided, steps_taken
from model.vocabulary import vocabulary

CUT = 0.1  # of an initial picture, beyond which it is told; less comes of sides that are multiples of a token's
LEAST, MOST = 0.5, 1.5  # of the area that a model was trained for, what it still paints whole ...
FURTHEST = 1.1  # ... and of the largest of several: a model that was led so far goes hardly further


class Doubts:
    """What may not be meant by a job, and by each picture of it; what the model says of itself is read once."""

    def __init__(self, job: Job):
        self.job = job
        self._model = job.model.name, job.model.variant

    def say(self, *, named: bool) -> None:
        """All of it, with the project's name in front where it is one of several."""
        for doubt in self.all():
            say(f"{among_others(self.job.project.root)}: {doubt}" if named else doubt, "yellow")

    def all(self) -> Iterator[str]:
        """That some prompts will get a picture of something else, or hold another tool's signs, that nobody says which
        variant the weights are, that sizes are too far from what the model knows, that guidance ends which never began,
        or that references and moodboard have pictures beside them that nothing reads, or that are broken."""
        job, left = self.job, self.job.left
        used = {each.image.parent for shot in job.shots for style in shot.spec.styles for each in style.references}
        if over := passed_over(job.project.others - used):
            yield over
        if unread := sorted(path.name for path in job.project.unread):
            yield f"Left out of the moodboard, as they cannot be read: {listed(unread)}."
        if self._untold:
            yield self._untold
        if far := next(filter(None, map(self._far_off, left)), ""):
            yield far
        never = [self._never_guided(shot) for shot in left if shot.spec.guidance_until]
        if never and all(never):
            yield never[0]
        if signs := read_as_words(text for shot in left for text in (shot.given, shot.spec.negative)):
            yield signs
        if strange := list(dict.fromkeys(shot.given for shot in left if shows_else(shot, job))):
            yield nothing_in(strange)

    def of(self, shot: Shot) -> list[str]:
        """Those that hold for one picture."""
        signs = read_as_words([shot.given, shot.spec.negative])
        strange = nothing_in([shot.given]) if shows_else(shot, self.job) else ""
        return [*filter(None, (self._untold, self._far_off(shot), self._never_guided(shot), signs, strange))]

    @cached_property
    def _untold(self) -> str:
        return untold_variant(*self._model)

    @cached_property
    def _grid(self) -> Grid:
        return grid(*self._model)

    @cached_property
    def _guidance(self) -> float:
        return float(recommended(*self._model)["guidance"])

    def _far_off(self, shot: Shot) -> str:
        """That a picture is far larger, or smaller, than what the model says it was trained for; else nothing."""
        native, _, known = self._grid
        width, height = shot.spec.width, shot.spec.height
        beyond = MOST if known and known[0] == known[1] else FURTHEST
        if known and width and height and not LEAST * known[0] <= width * height <= beyond * known[1]:
            made_for = f"the {native}x{native} that the model was made for"
            return f"{width}x{height} is far from {made_for}: expect broken pictures."
        return ""

    def _never_guided(self, shot: Shot) -> str:
        """That guidance of a picture is to end which has none; else nothing."""
        until, guidance = shot.spec.guidance_until, shot.spec.guidance
        if until and not (self._guidance if guidance is None else guidance):
            return f"Guidance is off, so that guidance_until = {until:g} changes nothing."
        return ""


def idle(settings: Settings, shots: Sequence[Shot]) -> Iterator[str]:
    """Of settings that were typed for this run: that they change nothing in it."""
    specs, here = [shot.spec for shot in shots], settings.elsewhere
    lead = all(spec.leader == Leader(spec.prompt, spec.seed, spec.negative) for spec in specs)
    if "cohesion" in here and settings.cohesion and lead:
        yield "Every picture is the first of its own, so that cohesion changes nothing."
    if "scope" in here and not settings.cohesion:
        yield "Cohesion is 0, so that scope changes nothing."
    guided = "style_guidance" in here and settings.style_guidance is not None  # as a picture's own none
    if guided and not any(style.references for spec in specs for style in spec.styles):
        yield "No style has reference pictures, so that style_guidance changes nothing."


def led_apart(settings: Settings, shots: Sequence[Shot]) -> Iterator[str]:
    """Of pictures that are led by one which is not among them: that no run before had it, its seed being drawn."""
    specs = [shot.spec for shot in shots]
    others = {spec.leader for spec in specs} - {Leader(spec.prompt, spec.seed, spec.negative) for spec in specs}
    if any(leader and leader.seed == settings.drawn for leader in others):
        belong = "these pictures belong to none that were made before. To belong to one: --like PICTURE"
        yield f"The first of all prompts leads, with a seed drawn for this run: {belong}"


def unbegun(job: Job, settings: Settings, prompts: Sequence[Prompt], matrices: Sequence[Matrix]) -> Iterator[str]:
    """Of pictures none of which begins with one: that what is said of such a picture changes nothing."""
    if any(shot.spec.init_image for shot in job.shots):
        return
    typed = settings.elsewhere.keys() - job.project.settings.elsewhere.keys()  # and not of a picture as an example
    here = {key: getattr(settings, key) for key in typed}
    mine = vars(settings) if settings.init_image is None else here  # else of a picture that prompts do without
    none = here.get("init_image") == NONE  # but for prompts that go before the command line
    theirs = [prompt.settings for prompt in prompts if prompt.last or not none]
    said = [mine, *theirs, *(matrix.axes for matrix in matrices)]
    if void := [key for key in ("denoise", "mask") if any(each.get(key) not in (None, NONE) for each in said)]:
        change = "changes" if len(void) == 1 else "change"
        yield f"Nothing begins with a picture, so that {' and '.join(void)} {change} nothing."


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
    """Of shares of the steps that a matrix compares: that several come to as many, or that some pictures have no use
    for any. That none has is told of all."""
    needs = {"denoise": "an initial picture", "guidance_until": "guidance"}
    axes = {key for matrix in matrices for key in needs if len(matrix.axes.get(key, ())) > 1}
    if not axes:  # nor need the model's headers be read
        return
    own = recommended(job.model.name, job.model.variant)
    shares: dict[tuple[RenderSpec, str, int, int], dict[str, None]] = {}
    void: Counter[tuple[str, RenderSpec, str]] = Counter()
    for shot in job.shots:
        spec = shot.spec
        steps = taken = spec.steps or own["steps"]
        if spec.init_image:
            denoise = denoise_of(spec.denoise, masked=bool(spec.mask))
            taken = steps_taken(denoise, steps)
            shares.setdefault((replace(spec, denoise=None), "denoise", steps, taken), {})[f"{denoise:g}"] = None
        else:
            void[shot.given, spec, "denoise"] += 1
        others = replace(spec, guidance_until=None)
        if not (own["guidance"] if spec.guidance is None else spec.guidance):
            void[shot.given, others, "guidance_until"] += 1
        elif spec.guidance_until:
            guided = steps_guided(spec.guidance_until, taken)
            shares.setdefault((others, "guidance_until", taken, guided), {})[f"{spec.guidance_until:g}"] = None
    told: dict[str, None] = {}
    for (_, key, steps, count), (*values, last) in shares.items():
        if key in axes and values:
            how = f"{'is' if count == 1 else 'are'} {'taken' if key == 'denoise' else 'guided'}"
            those = f"{key} {', '.join(values)} and {last}"
            told[f"Of {count_of(steps, 'step')} {count} {how} by {those}: these pictures are the same."] = None
    yield from told
    for key, need in needs.items():
        alike = {given: None for (given, _, about), count in void.items() if about == key and count > 1}
        if key in axes and alike and any(about == key for _, about, _, _ in shares):
            those = listed([f'"{short(prompt)}"' for prompt in alike], 1)
            yield f"Some pictures of {those} are the same: {key} changes nothing without {need}."


def shows_else(shot: Shot, job: Job) -> bool:
    """Whether the weights in the box find nothing to draw in a prompt; a LoRA may have taught them something."""
    return job.model.name == "mini" and not shot.spec.adapters and not is_drawn(shot.given)


@lru_cache(maxsize=1000)  # many pictures have the same
def is_drawn(prompt: str) -> bool:
    return not prompt.strip() or vocabulary().draws(prompt)


def nothing_in(prompts: Sequence[str]) -> str:
    those = listed([f'"{short(prompt)}"' for prompt in prompts], 1)
    return f"Nothing that mini can draw is in {those}; what it can: k2 models vocabulary"
