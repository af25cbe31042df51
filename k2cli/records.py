"""Records: what a picture was made from, as TOML beside it and as metadata inside it, and the way back to a spec.

A record holds every resolved setting and the sha256 of every file that contributed to the picture. A plan entry in
run.toml is the same table as far as known before rendering, so one reader serves both.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from k2cli import formats, models
from k2cli.outputs import row_label
from k2cli.project import Shot
from k2cli.settings import field_for
from k2cli.texts import check_name, quote, relative
from k2cli.toml_tables import LIMIT, PATH, WEIGHT, Place, Toml, between, one_of, read_table
from model import picture_file
from model.errors import K2Error
from model.hashes import identity, sha256
from model.spec import METHODS, SIDES, Leader, Picture, Reference, RenderSpec, Style

SCHEMA = 1

T = TypeVar("T")
HashOf = Callable[[Path], str]


@dataclass(frozen=True)
class AskedPrompt:
    """[prompt] of a record or of a plan."""

    text: str  # as given
    expanded: str  # as the model read it
    name: str = "picture"
    avoid: str = ""
    row: str = ""  # on a contact sheet, as the caption
    caption: str = ""
    creativity: str = field_for("creativity")


@dataclass(frozen=True)
class MadeWith:
    """[settings]: as requested, or as they turned out. None in a plan means the checkpoint's own."""

    seed: int = field_for("seed")
    width: int | None = between(None, *SIDES)
    height: int | None = between(None, *SIDES)
    steps: int | None = field_for("steps")
    guidance: float | None = field_for("guidance")
    mu: float | None = field_for("mu")
    sampler: str | None = field_for("sampler")
    cohesion: float = field_for("cohesion")
    guidance_until: float | None = field_for("guidance_until")  # if there is guidance
    denoise: float | None = field_for("denoise")  # if there is an init image
    style_guidance: float | None = field_for("style_guidance")  # this and the next three: if a style uses them
    leak_guard: str | None = field_for("leak_guard")
    vision_tiles: int | None = field_for("vision_tiles")
    vision_rows: bool | None = None
    device: str | None = None
    dtype: str | None = None
    precision: str | None = field_for("precision")
    offload: str | None = field_for("offload")
    threads: int | None = between(None, 1, 4096)  # on a CPU, where their number affects rounding


SPEC_KEYS = tuple(f.name for f in fields(MadeWith) if hasattr(RenderSpec, f.name))  # the spec's own


@dataclass(frozen=True)
class StyleUsed:
    """One [[style]], without its files."""

    name: str
    strength: float = field(default=1.0, metadata=WEIGHT)
    keywords: list[str] | None = None
    avoids: list[str] | None = None
    method: str = one_of("auto", *METHODS)
    triggers: list[str] | None = None


@dataclass(frozen=True)
class PictureUsed:
    """A picture that another was made from, as it was then."""

    image: str = field(metadata=PATH)
    sha256: str


@dataclass(frozen=True)
class ReferenceUsed(PictureUsed):
    """A style's reference."""

    weight: float = field(default=1.0, metadata=WEIGHT)


@dataclass(frozen=True)
class Masked:
    """Which part of an init image was repainted: a region, or a mask picture as it was then."""

    region: str | None = None
    image: str | None = field(default=None, metadata=PATH)
    sha256: str = ""


@dataclass(frozen=True)
class LoraUsed:
    """A style's LoRA, as it was then."""

    file: str = field(metadata=PATH)
    sha256: str


@dataclass(frozen=True)
class LedBy:
    """The lead picture, if cohesion is on."""

    prompt: str
    seed: int = field_for("seed")
    avoid: str = ""


@dataclass(frozen=True)
class Record:
    """A record read back and checked; whether the files it names exist is not checked yet."""

    shot: Shot
    model: models.ModelSpec
    files: Mapping[str, str]  # of the model: name -> sha256
    threads: int | None
    references: Mapping[Path, str]
    table: Mapping[str, Any]

    @property
    def pixels(self) -> Any:
        return self.table.get("pixels")


def planned_record(shot: Shot, root: Path, hash_of: HashOf = identity) -> dict[str, Any]:
    """What is known about a picture before it is rendered; reference paths are relative to the project."""
    spec, led, begun = shot.spec, shot.spec.leader, shot.spec.init_image
    return {
        "prompt": {
            "name": shot.name,
            "text": shot.given,
            "expanded": spec.prompt,
            "avoid": spec.negative,
            "row": shot.row or None,
            "caption": shot.caption or None,
            "creativity": shot.creativity,
        },
        "settings": {key: getattr(spec, key) for key in SPEC_KEYS},
        "leader": led and {"prompt": led.prompt, "seed": led.seed, "avoid": led.negative},
        "init_image": begun and {"image": relative(begun, root), "sha256": hash_of(begun)},
        "mask": spec.mask and mask_table(spec.mask, root, hash_of),
        "style": [style_table(style, root, hash_of) for style in spec.styles] or None,
    }


def mask_table(mask: Path | str, root: Path, hash_of: HashOf) -> dict[str, Any]:
    """A mask as stored in records."""
    if isinstance(mask, str):
        return {"region": mask}
    return {"image": relative(mask, root), "sha256": hash_of(mask)}


def style_table(style: Style, root: Path, hash_of: HashOf = identity) -> dict[str, Any]:
    """A style as stored in records, with the hash of every file it is made from."""
    table = {
        "name": style.name,
        "strength": style.strength,
        "keywords": list(style.keywords),
        "avoids": list(style.avoids),
        "method": style.method if style.references else None,
        "reference": [
            {"image": relative(r.image, root), "weight": r.weight, "sha256": hash_of(r.image)} for r in style.references
        ],
    }
    if style.lora:
        table["triggers"] = list(style.triggers)
        table["lora"] = {"file": relative(style.lora, root), "sha256": hash_of(style.lora)}
    return table


def compose(shot: Shot, picture: Picture, root: Path) -> dict[str, Any]:
    """The record of a finished picture: what was requested, and what the model did."""
    made = dict(picture.record)
    used = {each["image"]: each["sha256"] for style in made.get("styles", ()) for each in style["references"]}
    used |= {lora["path"]: lora["sha256"] for lora in made.get("loras", ())}
    used |= {made[key]["image"]: made[key]["sha256"] for key in ("init_image", "mask") if "image" in made.get(key, ())}

    def hash_of(path: Path) -> str:
        """A file's hash when the picture was made: by now the file may have changed or be gone."""
        return used.get(str(path)) or identity(path)

    asked = planned_record(shot, root, hash_of)
    return {
        "schema": SCHEMA,
        "created": datetime.now(UTC),
        "seconds": made.pop("seconds", None),
        "pixels": pixel_hash(picture.image),
        "blocked": made.get("blocked"),  # by an output filter, and why
        "prompt": asked["prompt"] | {"unread": made.get("unread")},
        "settings": asked["settings"] | {key: made[key] for key in (f.name for f in fields(MadeWith)) if key in made},
        "leader": asked["leader"] and asked["leader"] | {"shared": made.get("shared")},
        "init_image": asked["init_image"],
        "mask": asked["mask"],
        "model": made["model"] | {"name": portable(made["model"]["name"], root)},
        "style": with_methods(asked.get("style"), made.get("styles", ())),
        "lora": [  # how much of each adapter matched the network
            {"file": relative(Path(lora["path"]), root), **{key: lora[key] for key in lora if key != "path"}}
            for lora in made.get("loras", ())
        ]
        or None,
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("k2", "torch", "safetensors", "pillow")},
        },
    }


def with_methods(asked: list[dict[str, Any]] | None, made: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]] | None:
    """The requested styles, with the method by which the network in fact read their references."""
    used = {style["name"]: style["method"] for style in made}
    return asked and [
        style | {"method": style["method"] and used.get(style["name"], style["method"])} for style in asked
    ]


def portable(name: str, root: Path) -> str:
    """A model's name; a path within the project is made relative to it, so that the project can move."""
    return Path(name).relative_to(root).as_posix() if Path(name).is_relative_to(root) else name


def pixel_hash(image: Image.Image) -> str:
    """sha256 of the RGB bytes, row by row: of the picture itself, whatever its file format."""
    return hashlib.sha256(image.convert("RGB").tobytes()).hexdigest()


def read(path: Path) -> Toml:
    """A picture's record, from the .toml beside it or from the picture itself."""
    if path.suffix == ".toml" and not path.is_dir():
        return Toml.read(path, path.name)
    if path.is_dir():
        raise K2Error(f"{path} is a folder.", hint="Name a picture in it, or a record; `k2 log` lists them.")
    if not path.is_file():
        raise K2Error(f"There is no {path}.", hint="Name a picture that k2 made, or its record.")
    try:
        with picture_file.open_picture(path) as image:
            if image.width * image.height > picture_file.MAX_PIXELS:
                raise ValueError
            text = image.info.get("k2") if image.format == "PNG" else formats.record_from_xmp(image.info)
            if text is None and image.format == "PNG" and not getattr(image, "is_animated", False):
                image.load()  # texts may also follow the image data; in an animation that is every frame
                text = image.info.get("k2")
    except Exception as error:  # Pillow raises anything over a broken file
        hint = picture_file.truncation_hint(error) or "Name a picture that k2 made, or its record."
        raise K2Error(f"{path} is not a readable picture.", hint=hint) from None
    if text is not None and len(text) <= LIMIT:
        return Toml(text, path.name)
    if path.with_suffix(".toml").is_file():
        return Toml.read(path.with_suffix(".toml"), path.with_suffix(".toml").name)
    if picture_file.is_sheet(path):
        raise K2Error(f"{path} is a contact sheet.", hint="Name one of the pictures that it shows.")
    raise K2Error(
        f"{path} has no record, inside or beside it.",
        hint="Made with another tool? Reuse its prompt: k2 new NAME --from PICTURE",
    )


Inside = Callable[[str], Path]  # makes a project's path absolute; refuses what lies outside


def parse(toml: Toml, inside: Inside | None) -> Record:
    """A record read back and checked. Without a project it cannot have references."""
    place, table = Place(toml), toml.table
    if isinstance(table.get("picture"), list):
        raise K2Error(
            f"{toml.label} is the plan of a run, not the record of a picture.",
            hint="Name a picture of the run, or its record; k2 render --resume resumes a run.",
        )
    if "schema" not in table:
        hint = "Name a picture that k2 made, or its record."
        if table.keys() & {"keywords", "reference", "mix", "lora"}:
            hint = f"For a style: k2 style show {quote(Path(toml.label).stem)}"
        raise K2Error(f"{toml.label} is not the record of a picture.", hint=hint)
    if table.get("schema") != SCHEMA or not isinstance(table.get("versions", {}), dict):
        raise K2Error(f"{toml.label} is not a record that this version of k2 reads.", hint=f"It reads schema {SCHEMA}.")
    shot, references = shot_of(table, place, inside)
    spec = shot.spec
    # before these settings existed, guidance ran to the end, and the sampler was Euler's
    until = (1.0 if spec.guidance_until is None else spec.guidance_until) if spec.guidance else None
    shot = replace(shot, spec=replace(spec, guidance_until=until, sampler=spec.sampler or "euler"))
    used, made = part(models.ModelSpec, table, "model", place), part(MadeWith, table, "settings", place)
    files = table["model"].get("files")
    if not isinstance(files, dict) or not files or not all(isinstance(sha, str) for sha in files.values()):
        at = place.below("model")("files")
        raise K2Error(f"{at}: expected a table of file = sha256.", hint="Is it a record that k2 wrote?")
    held = {key: getattr(made, key) for key in ("device", "dtype", "precision", "offload")}
    return Record(shot, replace(used, **held), files, made.threads, references, table)


def locate(record: Record, inside: Inside | None) -> str:
    """The record's model, found here. Raises K2Error if one of its files, or a reference, has changed."""
    name = models.resolve(record.model.name, inside, record.model.variant)
    verify({models.file_of(name, file): sha for file, sha in record.files.items()} | dict(record.references))
    return name


def shot_of(table: Mapping[str, Any], place: Place, inside: Inside | None) -> tuple[Shot, dict[Path, str]]:
    """The shot that a record or plan entry describes, and the hashes of the references it needs."""
    prompt, made = part(AskedPrompt, table, "prompt", place), part(MadeWith, table, "settings", place)
    hashes: dict[Path, str] = {}

    def own(file: str, sha: str) -> Path:
        """A file in the project that the picture was made with."""
        if inside is None:
            raise K2Error(
                f"{place.toml.label} needs {file} from its project.",
                hint="Name the project: --project DIR",
            )
        path = inside(file)
        hashes[path] = sha
        return path

    entries = enumerate(tables_of(table, "style", place))
    styles = [style_of(entry, place.below("style", index), own) for index, entry in entries]
    led = part(LedBy, table, "leader", place) if made.cohesion else None
    begun = part(PictureUsed, table, "init_image", place) if "init_image" in table else None
    mask = part(Masked, table, "mask", place) if "mask" in table else Masked()
    if "mask" in table and bool(mask.region) == bool(mask.image):
        raise K2Error(f"{place('mask')}: expected a region or an image.", hint="Is it a record that k2 wrote?")
    spec = RenderSpec(
        prompt=prompt.expanded,
        negative=prompt.avoid,
        styles=tuple(styles),
        leader=Leader(led.prompt, led.seed, led.avoid) if led else None,
        init_image=own(begun.image, begun.sha256) if begun else None,
        mask=own(mask.image, mask.sha256) if mask.image else mask.region,
        **{key: getattr(made, key) for key in SPEC_KEYS},
    )
    stem = f"{check_name(prompt.name, place())}-{spec.seed}"
    kept = formats.format_of(str(table.get("file", ""))) or "png"  # from the file name in a plan
    row = row_label(prompt.row, prompt.text)
    return Shot(stem, prompt.name, prompt.text, spec, row, prompt.caption, prompt.creativity, kept), hashes


def style_of(table: Mapping[str, Any], place: Place, own: Callable[[str, str], Path]) -> Style:
    """A style as it was used; `own` finds its files by name and hash."""
    used = known_part(StyleUsed, table, place)
    entries = enumerate(tables_of(table, "reference", place))
    pictures = (known_part(ReferenceUsed, each, place.below("reference", number)) for number, each in entries)
    references = tuple(Reference(own(each.image, each.sha256), each.weight) for each in pictures)
    adapter = part(LoraUsed, table, "lora", place) if "lora" in table else None
    return Style(
        name=used.name,
        strength=used.strength,
        references=references,
        keywords=tuple(used.keywords or ()),
        avoids=tuple(used.avoids or ()),
        lora=own(adapter.file, adapter.sha256) if adapter else None,
        triggers=tuple(used.triggers or ()),
        method=used.method,
    )


def part(cls: type[T], table: Mapping[str, Any], key: str, place: Place) -> T:
    """One table of a record."""
    if not isinstance(table, dict) or not isinstance(table.get(key), dict):
        raise K2Error(f"{place()}: the table [{key}] is missing.", hint="Is it a record that k2 wrote?")
    return known_part(cls, table[key], place.below(key))


def known_part(cls: type[T], table: Any, place: Place) -> T:
    """A dataclass from the keys it knows in a table; the other keys are for people."""
    known = {f.name for f in fields(cls)}  # type: ignore[arg-type]
    return read_table(cls, {name: value for name, value in table.items() if name in known}, place)


def tables_of(table: Mapping[str, Any], key: str, place: Place) -> list[dict[str, Any]]:
    """A list of tables, perhaps empty."""
    found = table.get(key, [])
    if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
        raise K2Error(f"{place(key)}: expected a list of tables.", hint="Is it a record that k2 wrote?")
    return found


def verify(hashes: Mapping[Path, str]) -> None:
    """Raises K2Error, naming the file, if something a picture was made from is gone or has changed."""
    for path, expected in hashes.items():
        if not path.is_file():
            raise K2Error(
                f"{path} is gone, and the picture was made with it.", hint="Restore it to reproduce the picture."
            )
        if expected not in (identity(path), sha256(path)):  # older records do not cover the settings beside an adapter
            raise K2Error(
                f"{path} has changed since the picture was made.",
                hint="Restore the old file to reproduce the picture.",
            )
