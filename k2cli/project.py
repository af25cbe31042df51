"""A project: its k2.toml read, checked, and resolved into render specs."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatchcase
from functools import cache, cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

from k2cli import models, moodboard
from k2cli.expander import expander
from k2cli.folder import PROJECT_FILE, Folder, OutsideProject, find_root, spelled_on_disk
from k2cli.formats import SUFFIXES
from k2cli.matrix import MAX_PICTURES, MAX_PROMPT_CHARS, Cell, Matrix, escape_braces, fixed_axes, read_matrices
from k2cli.pictures import check_label, check_picture, is_dark, picture_hint, picture_sides
from k2cli.prompts import Prompt, matrix_cells, name_files, prompt_readings, read_prompts
from k2cli.settings import MISPLACED, NONE, SPEC_KEYS, Settings, check_size_keys, draw_seed
from k2cli.styles import BOARD_STYLE, Styles, style_words
from k2cli.texts import check_line, file_label, fold_case, relative_path
from k2cli.toml_tables import Option, Place, Toml, check_keys, check_value, error_context, read_table, read_weights
from model.errors import USAGE, K2Error, nearest
from model.picture_file import same_shape
from model.region import EXAMPLE, REGION_LIKE, Region
from model.spec import Leader, RenderSpec, Style, mentions, tie_to_lead

INIT_OPTION, MASK_OPTION = Option("--init-image"), Option("--mask")
Sides = tuple[int, int]  # width and height of a picture
MAX_PLAN = 32 << 20  # bytes in a run.toml


@dataclass(frozen=True)
class Shot:
    """One picture to make: its file's stem, the prompt as given, and everything known before rendering."""

    stem: str
    name: str
    given: str
    spec: RenderSpec
    row: str = ""  # above its strip on a contact sheet, before the prompt
    caption: str = ""  # below it; the seed if empty
    creativity: str = "raw"  # that expanded the given prompt to the spec's
    format: str = "png"  # of the file

    @property
    def file(self) -> str:
        return self.stem + SUFFIXES[self.format]


@dataclass(frozen=True, kw_only=True)
class Project(Folder):
    """A folder with a k2.toml."""

    name: str
    settings: Settings
    prompts: tuple[Prompt, ...]
    weights: Mapping[str, float]
    toml: Toml
    board: moodboard.Moodboard | None = None
    matrices: tuple[Matrix, ...] = ()
    leader: Leader | None = None  # the lead picture, if not the first of a batch
    other_files: set[Path] = field(default_factory=set, compare=False)  # beside pictures, in its folders and globs
    unreadable: set[Path] = field(default_factory=set, compare=False)  # moodboard pictures that could not be read

    @classmethod
    def find(cls, start: Path, *, allow_outside: bool = False) -> Project:
        """The project of a folder, or of the nearest one above it."""
        return cls.open(Folder.find(start).root, allow_outside=allow_outside)

    @classmethod
    def find_or_none(cls, folder: Path, *, allow_outside: bool = False) -> Project | None:
        """The project of a folder, or of the nearest one above it; None if there is none."""
        root = find_root(folder)
        return None if root is None else cls.open(root, allow_outside=allow_outside)

    @classmethod
    def open(cls, folder: Path, *, allow_outside: bool = False) -> Project:
        """Read and check k2.toml; styles are read when they are used."""
        folder = cls.at(folder).root
        if not allow_outside and not (folder / PROJECT_FILE).resolve().is_relative_to(folder.resolve()):
            raise OutsideProject(
                f"{folder / PROJECT_FILE} lies outside the project.", hint="Copy it there, or use --allow-outside."
            )
        toml = Toml.read(folder / PROJECT_FILE, file_label(folder, PROJECT_FILE))
        place, table = Place(toml), toml.table
        check_keys(table, ("project", "render", "prompt", "matrix", "style", "moodboard"), place, MISPLACED)
        head = read_table(ProjectTable, table.get("project", {}), place.below("project"), MISPLACED)
        misplaced = MISPLACED | {"prompts": "Write each as text, under a [[prompt]] of its own."}
        settings = read_table(Settings, table.get("render", {}), place.below("render"), misplaced)
        check_size_keys(vars(settings), place.below("render"))
        prompts = read_prompts(table.get("prompt", []), place)
        board = table.get("moodboard")
        if board is not None:
            board = read_table(moodboard.Moodboard, board, place.below("moodboard"), MISPLACED)
        return cls(
            root=folder,
            name=head.name or folder.name,
            settings=settings,
            prompts=prompts,
            weights=read_weights(table.get("style", {}), place.below("style")),
            toml=toml,
            allow_outside=allow_outside,
            board=board,
            matrices=read_matrices(table.get("matrix", []), place, {name for _, name in name_files(prompts)}),
        )

    @cached_property
    def styles(self) -> Styles:
        return Styles(self.root, self.path_inside, self.other_files)

    def resolve_settings(self, **given: Any) -> Settings:
        """The project's settings, overridden by a command line's options, with the model found and a seed drawn in case
        it is random."""
        settings = replace(self.settings.override(**given), drawn_seed=draw_seed())
        from_shell = given.get("model") is not None  # a path relative to the shell, not the project
        try:
            inside = None if from_shell else self.path_inside
            return replace(settings, model=models.resolve(settings.model, inside, settings.variant))
        except K2Error as error:
            option = settings.sources.get("model")
            if not option and "model" not in self.toml.table.get("render", {}):
                raise
            where = option or self.toml.where("render", "model")
            raise K2Error(f"{where}: {error}", hint=error.hint, code=USAGE if option else error.code) from None

    def board_pictures(self, board: moodboard.Moodboard) -> tuple[list[Path], set[Path]]:
        """The pictures of [moodboard], and the other files beside them."""
        where = Place(self.toml, ("moodboard",))("images")
        pictures, skipped = moodboard.gather_pictures(board.images, self.root, self.path_inside, where)
        for path in pictures:
            check_label(relative_path(path, self.root), where)
        return pictures, skipped

    def with_board(self, strength: float) -> Project:
        """The project with its moodboard at this strength; at 0 it needs none."""
        if self.board is None:
            if strength == 0:
                return self
            raise K2Error(
                f"{self.root.name} has no moodboard.",
                hint=f"Add one to {PROJECT_FILE}: [moodboard] with images under it.",
            )
        limits = next(f.metadata for f in fields(self.board) if f.name == "strength")
        with error_context(Option("--moodboard")) as at:
            check_value("strength", strength, float, limits, at)
        return replace(self, board=replace(self.board, strength=strength))

    def resolve_styles(
        self, settings: Settings, overrides: Mapping[str, tuple[float, str]], styles: Mapping[str, float]
    ) -> tuple[Style, ...]:
        """The project's styles at their weights, and its moodboard.

        overrides  weights that replace the project's own, and where they were set
        styles     weights from --style, which replace both
        """
        weights = {**self.weights, **{name: weight for name, (weight, _) in overrides.items()}, **styles}
        where = {name: said for name, (_, said) in overrides.items()} | dict.fromkeys(styles, Option("--style"))
        resolved = self.styles.resolve(weights, lambda name: where.get(name) or self.toml.where("style", name))
        if self.board is None:
            return resolved
        if any(style.name == BOARD_STYLE for style in resolved):
            raise K2Error(
                f"The style name {BOARD_STYLE} is taken by the project's [moodboard].",
                hint=f"Rename styles/{BOARD_STYLE}.toml.",
            )
        pictures, skipped = self.board_pictures(self.board)
        self.other_files.update(skipped)
        self.other_files.difference_update(path.parent for path in pictures)  # a style's folder may hold the board's
        look, unreadable = moodboard.as_style(self.board, pictures, settings.model)
        self.unreadable.update(unreadable)
        return (*resolved, *look)

    @cached_property
    def cached_picture(self) -> Callable[[str, str], tuple[Path, Sides]]:
        """`find_picture`, cached: each file is opened once, however many pictures start from it."""
        return cache(self.find_picture)

    def find_picture(self, name: str, where: str) -> tuple[Path, Sides]:
        """A picture and its sides, by a path in the project, or in the shell if an option names it. Raises K2Error."""
        if not name:
            raise K2Error(f"{where} names no picture.", hint='Name one, or "none".')
        from_shell = where in (INIT_OPTION, MASK_OPTION)
        path = Path(os.path.realpath(spelled_on_disk(Path(), name))) if from_shell else self.path_inside(name, where)
        if from_shell and not path.exists():
            hint = picture_hint(path, name) or "Paths are relative to the current folder."
            raise K2Error(f"{where}: there is no {name}.", hint=hint)
        check_picture(path, where, name, complete=True)
        return path, picture_sides(path)

    def resolve_mask(self, text: str, where: str, size: tuple[int | None, int | None], init_sides: Sides) -> Path | str:
        """The part of an init image to repaint: a region of the new picture, or a mask picture with the init image's
        proportions. Raises K2Error."""
        if region := Region.parse(text):
            assert size[0] and size[1]  # the init image determines them
            region.check(size[0], size[1], f"{where}: ")
            return str(region)
        if REGION_LIKE.fullmatch(text):
            raise K2Error(f'{where}: "{text}" is not a region.', hint=EXAMPLE)
        path, sides = self.cached_picture(text, where)
        if is_dark(path):
            raise K2Error(f"{where}: nothing in {text} is white.", hint="White is repainted, dark stays as is.")
        if not same_shape(sides, init_sides):
            raise K2Error(
                f"{where}: {text} does not have the proportions of its init_image.", hint="Draw it on a copy of that."
            )
        return path

    def choose_prompts(self, names: Sequence[str]) -> tuple[Prompt, ...]:
        """The readings of the project's prompts with these names, as --only gives them, in file order. A name may be a
        prompt's or a single reading's, a pattern, or several separated by commas."""
        lists = ([name.strip() for name in several.split(",")] for several in names)
        patterns = [name for several in lists for name in [*filter(None, several)] or [""]]
        known = [name for _, name in name_files(self.prompts)]
        readings = {
            each.name: replace(each, text=escape_braces(each.text), base=base)
            for each, base in prompt_readings(self.prompts)
        }
        chosen: set[str] = set()
        for name in patterns:
            found = {each for each in (*known, *readings) if fnmatchcase(fold_case(each), fold_case(name))}
            if not found:
                message = f'--only: {self.root.name} has no prompt named "{check_line(name, "The name")}".'
                raise K2Error(message, hint=nearest(name, known), code=USAGE)
            chosen |= found
        return tuple(each for each in readings.values() if chosen & {each.name, each.base})

    def matrices_for(self, prompts: Sequence[Prompt] | None) -> tuple[Matrix, ...]:
        """The matrices that compare any of these prompts (default: all of the project's); without one they are
        batches."""
        named = name_files(self.prompts if prompts is None else prompts)
        names = [prompt.base or name for prompt, name in named]
        return tuple(matrix for matrix in self.matrices if any(map(matrix.covers, names)))

    def uncompared(self, prompts: Sequence[Prompt] | None, matrices: Sequence[Matrix]) -> list[str]:
        """The names of the prompts that no matrix compares, which are not rendered beside those that are compared."""
        if not matrices:
            return []
        names = dict.fromkeys(base for _, base in prompt_readings(self.prompts if prompts is None else prompts))
        return [name for name in names if not any(matrix.covers(name) for matrix in matrices)]

    def shots(
        self,
        settings: Settings,
        prompts: Sequence[Prompt] | None = None,
        styles: Mapping[str, float] | None = None,
        matrices: Sequence[Matrix] = (),
    ) -> list[Shot]:
        """Every picture of a run, resolved.

        settings  resolved
        prompts   replace the project's own, if given; a prompt with choices becomes one for each
        styles    weights on top of the project's own
        matrices  settings to run every prompt through, instead of one batch
        """
        if prompts is None and not self.prompts:
            raise K2Error(
                f"{PROJECT_FILE} has no [[prompt]].", hint='Add one, or give one with -p: k2 render -p "a red fox"'
            )
        readings = prompt_readings(self.prompts if prompts is None else prompts)
        fixed = fixed_axes(settings.sources, styles or {})
        grid = models.grid(settings.model, settings.variant)
        cached_styles = cache(lambda overrides, given: self.resolve_styles(settings, dict(overrides), dict(given)))
        uncompared = ((prompt, [(prompt.name, Cell())]) for prompt, _ in readings)
        shots: list[Shot] = []
        chars = 0
        for prompt, cells in matrix_cells(readings, matrices, fixed) if matrices else uncompared:
            base = replace(settings.yielding(prompt.restored), **prompt.restored)
            command_line, weights = base.sources, styles or {}
            if prompt.overrides_options:
                command_line = base.yielding(prompt.settings).sources
                weights = {name: weight for name, weight in weights.items() if name not in prompt.style}
            one_picture = {"batch": 1} if matrices else {}  # a cell is one picture ...
            combined = (
                {**one_picture, **prompt.settings} if prompt.overrides_options else {**prompt.settings, **one_picture}
            )
            prompt_settings = base.overridden_by(combined, {key: prompt.where(key) for key in combined})
            from_options = {key: getattr(base, key) for key in command_line}  # ... unless more are asked for
            prompt_settings = prompt_settings.overridden_by(from_options, command_line)
            prompt_styles = {style: (weight, prompt.where("style", style)) for style, weight in prompt.style.items()}
            for name, cell in cells:
                cell_settings = prompt_settings.overridden_by(cell.settings, dict.fromkeys(cell.settings, cell.where))
                cell_styles = {style: (weight, cell.where) for style, weight in cell.styles.items()}
                cell_looks = cached_styles(tuple((prompt_styles | cell_styles).items()), tuple(weights.items()))
                series = self.prompt_shots(prompt, name, cell_settings, cell_looks, cell, grid)
                shots += series
                chars += len(series) * plan_chars(series[0])
            if len(shots) > MAX_PICTURES:
                raise K2Error(f"That is more than {MAX_PICTURES:,} pictures.", hint="Use fewer values or prompts.")
            if chars > MAX_PLAN:
                raise K2Error("The run is too large to plan.", hint="Render it in parts: --only")
        if settings.scope == "run":
            return tie_shots(
                shots, settings.cohesion, self.leader or self.project_leader(settings, prompts, styles, matrices)
            )
        batches = [list(batch) for _, batch in groupby(shots, lambda shot: shot.name)]
        return [shot for batch in batches for shot in tie_shots(batch, settings.cohesion, self.leader)]

    def project_leader(
        self,
        settings: Settings,
        prompts: Sequence[Prompt] | None,
        styles: Mapping[str, float] | None,
        matrices: Sequence[Matrix],
    ) -> Leader | None:
        """The project's first picture, when only some of its own prompts are rendered: they share a look with the rest.
        A seed given for these few is theirs alone, unless the first picture's seed is random."""
        if not settings.cohesion or not prompts or prompts[0].place is None or prompts[0].place.toml is not self.toml:
            return None
        settings = replace(settings, scope="prompt")
        if not isinstance(self.settings.seed, str):
            settings = replace(settings.yielding(["seed"]), seed=self.settings.seed)
        if matrices and tuple(matrices) == self.matrices_for(prompts):
            matrices = self.matrices
        known = name_files(self.prompts)
        candidates = (
            (prompt, name) for each in matrices or [Matrix({})] for prompt, name in known if each.covers(name)
        )
        prompt, name = next(candidates)  # matrix by matrix, as they are compared
        first = replace(prompt, name=name)  # by which matrices know it
        spec = self.shots(settings, [first], styles, matrices)[0].spec
        return Leader(spec.prompt, spec.seed, spec.negative)

    def prompt_shots(
        self,
        prompt: Prompt,
        name: str,
        settings: Settings,
        looks: tuple[Style, ...],
        cell: Cell,
        grid: models.Grid,
    ) -> list[Shot]:
        """One prompt's pictures, seed by seed."""
        place = Place(self.toml, ("render",))

        def where(key: str) -> str:
            """Where a setting was given: by the prompt or its matrix, on the command line, or in [render]."""
            return settings.sources.get(key) or place(key)

        triggers = [trigger for trigger in style_words(looks, "triggers") if not mentions(prompt.text, trigger)]
        appended = [*triggers, *style_words(looks, "keywords", "avoids")]
        avoids = [
            *filter(None, dict.fromkeys([prompt.avoid, settings.avoid])),
            *style_words(looks, "avoids", "keywords"),
        ]
        for parts, what in (([prompt.text, *appended], "prompt"), (avoids, "negative prompt")):
            if sum(map(len, parts)) > MAX_PROMPT_CHARS:
                raise K2Error(
                    f'The {what} of "{name}" is longer than {MAX_PROMPT_CHARS:,} characters.', hint="Shorten it."
                )
        has_look = any(style.strength > 0 and (style.references or style.lora) for style in looks)
        init_image, sides = None, None
        if settings.init_image not in (None, NONE):
            with error_context(where("init_image")) as at:
                init_image, sides = self.cached_picture(settings.init_image, at)
        width, height = settings.resolve_size(where, grid, sides)
        mask = None
        if settings.mask not in (None, NONE) and settings.init_image != NONE:  # without which there is nothing to mask
            with error_context(where("mask")) as at:
                if sides is None:
                    hint = f'Name the picture that "{name}" starts from.'
                    raise K2Error(f"{at}: there is no init_image to mask.", hint=hint)
                mask = self.resolve_mask(settings.mask, at, (width, height), sides)
        seed, batch = settings.first_seed, settings.batch
        if seed + batch > 2**63:
            raise K2Error(f"Seed {seed} leaves no room for {batch} pictures.", hint="Choose a smaller one.")
        spec = RenderSpec(
            prompt="",
            negative=", ".join(avoids),
            width=width,
            height=height,
            init_image=init_image,
            denoise=settings.denoise if init_image else None,
            mask=mask,
            styles=looks,
            **{key: getattr(settings, key) for key in SPEC_KEYS},
        )
        expand = expander(settings.model, settings.creativity, settings.device)
        shots: list[Shot] = []
        texts: dict[str, str] = {}  # a long prompt is kept once, not once per seed
        for n in range(seed, seed + batch):
            expanded = expand(
                prompt.text, settings.creativity, n, styles=tuple(appended), avoids=tuple(avoids), look=has_look
            )
            picture_spec = replace(spec, seed=n, prompt=texts.setdefault(expanded, ", ".join([expanded, *appended])))
            caption = f"{cell.caption} · seed {n}" if cell.caption and batch > 1 else cell.caption
            shots.append(
                Shot(
                    f"{name}-{n}",
                    name,
                    prompt.text,
                    picture_spec,
                    cell.row,
                    caption,
                    settings.creativity,
                    settings.format,
                )
            )
        return shots


@dataclass(frozen=True)
class ProjectTable:
    """[project]"""

    name: str = ""


def plan_chars(shot: Shot) -> int:
    """The least number of characters that a picture adds to its run's plan; a reference adds its path and hash."""
    styles = shot.spec.styles
    style_chars = sum(len(word) for style in styles for word in (*style.keywords, *style.avoids))
    return (
        len(shot.given)
        + len(shot.spec.prompt)
        + len(shot.spec.negative)
        + style_chars
        + 100 * sum(1 + len(style.references) for style in styles)
    )


def tie_shots(shots: Sequence[Shot], cohesion: float, leader: Leader | None) -> list[Shot]:
    """Shots tied together by cohesion, led by the first of them, or by another picture."""
    specs = tie_to_lead([shot.spec for shot in shots], cohesion, leader)
    return [replace(shot, spec=spec) for shot, spec in zip(shots, specs, strict=True)]
