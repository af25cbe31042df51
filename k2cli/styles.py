"""A project's styles: files of words and reference pictures, mixed by weight into the styles of a render spec."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from k2cli.folder import list_names
from k2cli.pictures import PathInside, check_label, check_picture, find_pictures
from k2cli.texts import UNPRINTABLE, check_name, file_label, fold_case, nfc, relative_path
from k2cli.toml_tables import (
    PATH,
    WEIGHT,
    Place,
    Toml,
    check_keys,
    check_value,
    error_context,
    read_table,
    read_weights,
)
from model.errors import K2Error, nearest
from model.headers import read_header
from model.picture_file import describe_skipped
from model.spec import METHODS, Reference, Style, in_limits, limits_of

BOARD_STYLE = "moodboard"  # the style name of a project's [moodboard]
MAX_STYLE_PICTURES = 64  # pictures of a style; a glob that finds more is a mistake
MAX_MIX_DEPTH = 16  # levels of mixes within mixes
MAX_LORA_BYTES = 4 << 30  # bytes in a file, which is hashed when a run is planned: within seconds at most
MAX_STYLES = 256  # behind one picture, mixes broken down


@dataclass(frozen=True)
class StyleFile:
    """styles/NAME.toml as written, its globs resolved."""

    keywords: tuple[str, ...] = ()
    avoids: tuple[str, ...] = ()
    references: tuple[Reference, ...] = ()
    mix: Mapping[str, float] = field(default_factory=dict)
    mix_places: Mapping[str, str] = field(default_factory=dict, compare=False)  # where each of them is written
    lora: Path | None = None
    triggers: tuple[str, ...] = ()
    method: str = "auto"

    @property
    def is_pure_mix(self) -> bool:
        """Whether it has nothing of its own."""
        return not (self.keywords or self.avoids or self.references or self.lora)

    def as_style(self, name: str, strength: float) -> Style:
        """Its own content, as a style with this name."""
        return Style(
            name=name,
            strength=strength,
            references=self.references,
            keywords=self.keywords,
            avoids=self.avoids,
            lora=self.lora,
            triggers=self.triggers,
            method=self.method,
        )


@dataclass(frozen=True)
class ReferenceTable:
    """One [[reference]] of a style file."""

    image: str = field(metadata=PATH)
    weight: float = field(default=1.0, metadata=WEIGHT)


@dataclass(frozen=True)
class Styles:
    """A project's styles folder. `path_inside` makes a path absolute and refuses what lies outside the project."""

    root: Path
    path_inside: PathInside
    other_files: set[Path] = field(default_factory=set, compare=False)  # files that references match besides pictures

    @cached_property
    def files(self) -> dict[str, str]:
        """The names of all styles, and their files: some systems store accents apart from their letters, and a name is
        the same either way. What cannot be typed is not a name. Raises K2Error."""
        files = sorted(list_names(self.path_inside("styles", "")))
        found = ((nfc(Path(file).stem), file) for file in files if file.endswith(".toml"))
        return {name: file for name, file in found if not UNPRINTABLE.search(name)}

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all styles."""
        return tuple(sorted(self.files))

    def file_of(self, name: str) -> str:
        """The path of this style's file within the project, whether it exists or not."""
        return f"styles/{self.files.get(name, f'{name}.toml')}"

    def read(self, name: str, where: str) -> StyleFile:
        """styles/NAME.toml, checked; `where` is what refers to it."""
        name = nfc(name)
        file = self.file_of(name)
        with error_context(where):
            if name not in self.files:
                raise K2Error(
                    f'{where}: there is no style "{name}".',
                    hint=nearest(name, self.names) or f"Create styles/{name}.toml.",
                )
            path = self.path_inside(file, where)
        label = file_label(self.root, file)
        toml = Toml.read(path, label)
        place, table = Place(toml), toml.table
        check_keys(table, ("keywords", "avoids", "reference", "method", "mix", "lora", "triggers"), place)
        if not isinstance(table.get("reference", []), list):
            raise K2Error(
                f"{place('reference')}: references are a list of tables.",
                hint="Write [[reference]], with two brackets.",
            )
        if not any(table.get(key) for key in ("keywords", "reference", "mix", "lora")):
            raise K2Error(
                f"{label} has no keywords, no [[reference]], no lora and no [mix].",
                hint="Give it at least one of them.",
            )
        if table.get("triggers") and not table.get("lora"):
            raise K2Error(f"{place('triggers')}: triggers need a lora.", hint="Use keywords instead.")
        if "method" in table and not table.get("reference"):
            raise K2Error(
                f"{place('method')}: a method needs a [[reference]].", hint="It says how to read reference pictures."
            )
        mix = read_weights(table.get("mix", {}), place.below("mix"))
        return StyleFile(
            references=self.read_references(table.get("reference", []), place),
            keywords=read_words(table, "keywords", place),
            avoids=read_words(table, "avoids", place),
            mix=mix,
            mix_places={other: place.below("mix")(other) for other in mix},
            lora=self.check_lora(check_value("lora", table["lora"], str, PATH, place("lora")), place("lora"))
            if "lora" in table
            else None,
            triggers=read_words(table, "triggers", place),
            method=check_value("method", table.get("method", "auto"), str, {"choices": METHODS}, place("method")),
        )

    def read_references(self, entries: Sequence[Any], place: Place) -> tuple[Reference, ...]:
        """The pictures that a style file's [[reference]] tables name."""
        found: list[Reference] = []
        for index, entry in enumerate(entries):
            at = place.below("reference", index)
            table = read_table(ReferenceTable, entry, at)
            found += [Reference(path, table.weight) for path in self.reference_pictures(table.image, at("image"))]
        if len(found) > MAX_STYLE_PICTURES:
            raise K2Error(
                f"{place.toml.label} has {len(found)} reference pictures; the limit is {MAX_STYLE_PICTURES}.",
                hint="Choose those that show the look best.",
            )
        return tuple(found)

    def with_mixed(self, names: Iterable[str], where: str) -> set[str]:
        """These styles and all styles that they mix."""
        found: set[str] = set()
        queue = list(names)
        while queue:
            name = queue.pop()
            if name not in found:
                found.add(name)
                queue += self.read(name, where).mix
        return found

    def new_file(self, name: str, *, force: bool) -> Path:
        """Where to write a style of this name. Refuses an existing one unless forced."""
        path = self.path_inside(self.file_of(self.check_new_name(name, "The style")), "")
        if path.exists() and not force:
            raise exists_error(name)
        return path

    def check_new_name(self, name: str, where: str) -> str:
        """The name for a new style, accents composed. Refuses a name that cannot be a file's, that of [moodboard]'s
        look, and one that differs from another style's only in capitals: on many systems both would be one file."""
        name = check_name(name, where, whole_name=True)
        if name == BOARD_STYLE:
            raise K2Error(f"{where}: the name {BOARD_STYLE} is reserved for [moodboard].", hint="Choose another name.")
        alike = [each for each in self.names if fold_case(each) == fold_case(name)]
        if alike and name not in alike:
            said = f'{where}: on many systems "{name}" would be the same file as the style {alike[0]}.'
            raise K2Error(said, hint="Choose another name.")
        return name

    def is_mix(self, name: str, weights: Mapping[str, float]) -> bool:
        """Whether the style exists and is exactly this mix."""
        with suppress(K2Error):
            return self.read(name, "") == StyleFile(mix=dict(weights))
        return False

    def check_lora(self, file: str, where: str) -> Path:
        """A LoRA's file, its header checked; whether it fits is up to the model."""
        path = self.path_inside(file, where)
        if not path.is_file():
            raise K2Error(f"{where}: there is no file {file}.", hint="Paths are relative to the project.")
        if path.stat().st_size > MAX_LORA_BYTES:
            raise K2Error(
                f"{where}: {file} is larger than {MAX_LORA_BYTES >> 30} GB.", hint="Is it a model, not a LoRA?"
            )
        try:
            read_header(path)
        except K2Error as error:
            raise K2Error(f"{where}: {error}", hint=error.hint) from None
        return path

    def reference_pictures(self, pattern: str, where: str) -> list[Path]:
        """The pictures that a path, a folder or a glob names, sorted and each checked."""
        found, skipped = find_pictures(pattern, self.root, self.path_inside, where, MAX_STYLE_PICTURES)
        if not found:
            hint = describe_skipped(skipped) or "Put png, jpg or webp files there."
            raise K2Error(f"{where}: {pattern} matches no picture.", hint=hint)
        self.other_files.update(skipped)
        for path in found:
            label = relative_path(path, self.root)
            check_label(label, where)
            check_picture(path, where, label)
        return found

    def resolve(self, weights: Mapping[str, float], where: Callable[[str], str]) -> tuple[Style, ...]:
        """The styles behind these weights: mixes broken down, equal styles added up, strongest first, zeros dropped."""
        files: dict[str, StyleFile] = {}
        parts: dict[str, dict[str, float]] = {}

        def break_down(name: str, trail: tuple[str, ...], at: str) -> dict[str, float]:
            """A style's parts and their weights, by name: its own content and that of all styles mixed into it."""
            name = nfc(name)
            if name in trail:
                loop = " → ".join((*trail[trail.index(name) :], name))
                raise K2Error(f"{at}: the mixes form a loop, {loop}.", hint="Break the loop.")
            if len(trail) > MAX_MIX_DEPTH:
                raise K2Error(f"{at}: mixes nest more than {MAX_MIX_DEPTH} deep.", hint="Mix the styles directly.")
            if name not in parts:
                with error_context(at):
                    if len(files) == MAX_STYLES:
                        raise K2Error(f"{at}: more than {MAX_STYLES} styles at once.", hint="Mix fewer.")
                file = files[name] = self.read(name, at)
                parts[name] = {} if file.is_pure_mix else {name: 1.0}
                for other, weight in file.mix.items():
                    mixed = break_down(other, (*trail, name), file.mix_places[other])
                    add_weighted(parts[name], mixed, weight)
            return parts[name]

        total: dict[str, float] = {}
        for name, weight in sorted(weights.items()):
            add_weighted(total, break_down(name, (), where(name)), weight)
        total = {name: round(strength, 9) for name, strength in total.items()}
        for name, strength in total.items():
            if not in_limits("strength", strength):
                said = f'The weights of style "{name}" add up to {strength:g}, beyond {limits_of("strength")}.'
                raise K2Error(said, hint="Lower them.")
        strongest = sorted(((s, name) for name, s in total.items()), key=lambda pair: (-pair[0], pair[1]))
        return tuple(files[name].as_style(name, strength) for strength, name in strongest if strength)


def read_words(table: Mapping[str, Any], key: str, place: Place) -> tuple[str, ...]:
    """A style file's list of words, which are appended to a prompt one by one: none may be empty."""
    words: list[str] = check_value(key, table.get(key, []), list[str], {}, place(key))
    if not all(words):
        raise K2Error(f'{place(key)}: "{key}" has an empty string.', hint="Remove it, or write a word.")
    return tuple(words)


def add_weighted(total: dict[str, float], more: Mapping[str, float], weight: float) -> None:
    for name, share in more.items():
        total[name] = total.get(name, 0.0) + weight * share


def style_words(styles: Sequence[Style], wanted: str, opposite: str | None = None) -> Iterator[str]:
    """The styles' words, each once: the `wanted` ones of a style, the `opposite` ones if its strength is negative."""
    sides = ((style, wanted if style.strength > 0 else opposite) for style in styles)
    return iter(dict.fromkeys(text for style, side in sides if side for text in getattr(style, side)))


def exists_error(name: str) -> K2Error:
    return K2Error(f"The style {name} already exists.", hint="Choose another name, or replace it with --force.")
