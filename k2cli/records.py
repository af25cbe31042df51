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
from k2cli.texts import check_name, relative_path, shell_quote
from k2cli.toml_tables import MAX_FILE_BYTES, PATH, WEIGHT, Place, Toml, between, one_of, read_table
from model import picture_file
from model.errors import K2Error
from model.hashes import identity, sha256
from model.spec import METHODS, SIDES, Leader, Picture, Reference, RenderSpec, Style

SCHEMA = 1

T = TypeVar("T")
HashOf = Callable[[Path], str]


@dataclass(frozen=True)
class RecordedPrompt:
    """[prompt] of a record or of a plan."""

    text: str  # as given
    expanded: str  # as the model read it
    name: str = "picture"
    avoid: str = ""
    row: str = ""  # on a contact sheet, as the caption
    caption: str = ""
    creativity: str = field_for("creativity")


@dataclass(frozen=True)
class RecordedSettings:
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


SPEC_KEYS = tuple(f.name for f in fields(RecordedSettings) if hasattr(RenderSpec, f.name))  # the spec's own


@dataclass(frozen=True)
class RecordedStyle:
    """One [[style]], without its files."""

    name: str
    strength: float = field(default=1.0, metadata=WEIGHT)
    keywords: list[str] | None = None
    avoids: list[str] | None = None
    method: str = one_of("auto", *METHODS)
    triggers: list[str] | None = None


@dataclass(frozen=True)
class RecordedPicture:
    """A picture that another was made from, as it was then."""

    image: str = field(metadata=PATH)
    sha256: str


@dataclass(frozen=True)
class RecordedReference(RecordedPicture):
    """A style's reference."""

    weight: float = field(default=1.0, metadata=WEIGHT)


@dataclass(frozen=True)
class RecordedMask:
    """Which part of an init image was repainted: a region, or a mask picture as it was then."""

    region: str | None = None
    image: str | None = field(default=None, metadata=PATH)
    sha256: str = ""


@dataclass(frozen=True)
class RecordedLora:
    """A style's LoRA, as it was then."""

    file: str = field(metadata=PATH)
    sha256: str


@dataclass(frozen=True)
class RecordedLeader:
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
    spec, leader, init_image = shot.spec, shot.spec.leader, shot.spec.init_image
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
        "leader": leader and {"prompt": leader.prompt, "seed": leader.seed, "avoid": leader.negative},
        "init_image": init_image and {"image": relative_path(init_image, root), "sha256": hash_of(init_image)},
        "mask": spec.mask and mask_table(spec.mask, root, hash_of),
        "style": [style_table(style, root, hash_of) for style in spec.styles] or None,
    }


def mask_table(mask: Path | str, root: Path, hash_of: HashOf) -> dict[str, Any]:
    """A mask as stored in records."""
    if isinstance(mask, str):
        return {"region": mask}
    return {"image": relative_path(mask, root), "sha256": hash_of(mask)}


def style_table(style: Style, root: Path, hash_of: HashOf = identity) -> dict[str, Any]:
    """A style as stored in records, with the hash of every file it is made from."""
    table = {
        "name": style.name,
        "strength": style.strength,
        "keywords": list(style.keywords),
        "avoids": list(style.avoids),
        "method": style.method if style.references else None,
        "reference": [
            {"image": relative_path(r.image, root), "weight": r.weight, "sha256": hash_of(r.image)}
            for r in style.references
        ],
    }
    if style.lora:
        table["triggers"] = list(style.triggers)
        table["lora"] = {"file": relative_path(style.lora, root), "sha256": hash_of(style.lora)}
    return table


def finished_record(shot: Shot, picture: Picture, root: Path) -> dict[str, Any]:
    """The record of a finished picture: what was requested, and what the model did."""
    outcome = dict(picture.record)
    hashes = {each["image"]: each["sha256"] for style in outcome.get("styles", ()) for each in style["references"]}
    hashes |= {lora["path"]: lora["sha256"] for lora in outcome.get("loras", ())}
    hashes |= {
        outcome[key]["image"]: outcome[key]["sha256"]
        for key in ("init_image", "mask")
        if "image" in outcome.get(key, ())
    }

    def hash_of(path: Path) -> str:
        """A file's hash when the picture was made: by now the file may have changed or be gone."""
        return hashes.get(str(path)) or identity(path)

    planned = planned_record(shot, root, hash_of)
    return {
        "schema": SCHEMA,
        "created": datetime.now(UTC),
        "seconds": outcome.pop("seconds", None),
        "pixels": pixel_hash(picture.image),
        "blocked": outcome.get("blocked"),  # by an output filter, and why
        "prompt": planned["prompt"] | {"unread": outcome.get("unread")},
        "settings": planned["settings"]
        | {key: outcome[key] for key in (f.name for f in fields(RecordedSettings)) if key in outcome},
        "leader": planned["leader"] and planned["leader"] | {"shared": outcome.get("shared")},
        "init_image": planned["init_image"],
        "mask": planned["mask"],
        "model": outcome["model"] | {"name": portable_name(outcome["model"]["name"], root)},
        "style": with_methods(planned.get("style"), outcome.get("styles", ())),
        "lora": [  # how much of each adapter matched the network
            {"file": relative_path(Path(lora["path"]), root), **{key: lora[key] for key in lora if key != "path"}}
            for lora in outcome.get("loras", ())
        ]
        or None,
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("k2", "torch", "safetensors", "pillow")},
        },
    }


def with_methods(
    planned: list[dict[str, Any]] | None, used_styles: Iterable[Mapping[str, Any]]
) -> list[dict[str, Any]] | None:
    """The requested styles, with the method by which the network in fact read their references."""
    methods = {style["name"]: style["method"] for style in used_styles}
    return planned and [
        style | {"method": style["method"] and methods.get(style["name"], style["method"])} for style in planned
    ]


def portable_name(name: str, root: Path) -> str:
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
    if text is not None and len(text) <= MAX_FILE_BYTES:
        return Toml(text, path.name)
    if path.with_suffix(".toml").is_file():
        return Toml.read(path.with_suffix(".toml"), path.with_suffix(".toml").name)
    if picture_file.is_sheet(path):
        raise K2Error(f"{path} is a contact sheet.", hint="Name one of the pictures that it shows.")
    raise K2Error(
        f"{path} has no record, inside or beside it.",
        hint="Made with another tool? Reuse its prompt: k2 new NAME --from PICTURE",
    )


ResolvePath = Callable[[str], Path]  # makes a project's path absolute; refuses what lies outside


def parse(toml: Toml, inside: ResolvePath | None) -> Record:
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
            hint = f"For a style: k2 style show {shell_quote(Path(toml.label).stem)}"
        raise K2Error(f"{toml.label} is not the record of a picture.", hint=hint)
    if table.get("schema") != SCHEMA or not isinstance(table.get("versions", {}), dict):
        raise K2Error(f"{toml.label} is not a record that this version of k2 reads.", hint=f"It reads schema {SCHEMA}.")
    shot, references = parse_shot(table, place, inside)
    spec = shot.spec
    # before these settings existed, guidance ran to the end, and the sampler was Euler's
    until = (1.0 if spec.guidance_until is None else spec.guidance_until) if spec.guidance else None
    shot = replace(shot, spec=replace(spec, guidance_until=until, sampler=spec.sampler or "euler"))
    model, settings = (
        parse_part(models.ModelSpec, table, "model", place),
        parse_part(RecordedSettings, table, "settings", place),
    )
    files = table["model"].get("files")
    if not isinstance(files, dict) or not files or not all(isinstance(sha, str) for sha in files.values()):
        at = place.below("model")("files")
        raise K2Error(f"{at}: expected a table of file = sha256.", hint="Is it a record that k2 wrote?")
    model_settings = {key: getattr(settings, key) for key in ("device", "dtype", "precision", "offload")}
    return Record(shot, replace(model, **model_settings), files, settings.threads, references, table)


def locate_model(record: Record, inside: ResolvePath | None) -> str:
    """The record's model, found here. Raises K2Error if one of its files, or a reference, has changed."""
    name = models.resolve(record.model.name, inside, record.model.variant)
    verify_files(
        {models.recorded_file(name, file): sha for file, sha in record.files.items()} | dict(record.references)
    )
    return name


def parse_shot(table: Mapping[str, Any], place: Place, inside: ResolvePath | None) -> tuple[Shot, dict[Path, str]]:
    """The shot that a record or plan entry describes, and the hashes of the references it needs."""
    prompt, settings = (
        parse_part(RecordedPrompt, table, "prompt", place),
        parse_part(RecordedSettings, table, "settings", place),
    )
    hashes: dict[Path, str] = {}

    def project_file(file: str, sha: str) -> Path:
        """A file in the project that the picture was made with."""
        if inside is None:
            raise K2Error(
                f"{place.toml.label} needs {file} from its project.",
                hint="Name the project: --project DIR",
            )
        path = inside(file)
        hashes[path] = sha
        return path

    entries = enumerate(table_list(table, "style", place))
    styles = [parse_style(entry, place.below("style", index), project_file) for index, entry in entries]
    leader = parse_part(RecordedLeader, table, "leader", place) if settings.cohesion else None
    init_image = parse_part(RecordedPicture, table, "init_image", place) if "init_image" in table else None
    mask = parse_part(RecordedMask, table, "mask", place) if "mask" in table else RecordedMask()
    if "mask" in table and bool(mask.region) == bool(mask.image):
        raise K2Error(f"{place('mask')}: expected a region or an image.", hint="Is it a record that k2 wrote?")
    spec = RenderSpec(
        prompt=prompt.expanded,
        negative=prompt.avoid,
        styles=tuple(styles),
        leader=Leader(leader.prompt, leader.seed, leader.avoid) if leader else None,
        init_image=project_file(init_image.image, init_image.sha256) if init_image else None,
        mask=project_file(mask.image, mask.sha256) if mask.image else mask.region,
        **{key: getattr(settings, key) for key in SPEC_KEYS},
    )
    stem = f"{check_name(prompt.name, place())}-{spec.seed}"
    file_format = formats.format_of(str(table.get("file", ""))) or "png"  # from the file name in a plan
    row = row_label(prompt.row, prompt.text)
    return Shot(stem, prompt.name, prompt.text, spec, row, prompt.caption, prompt.creativity, file_format), hashes


def parse_style(table: Mapping[str, Any], place: Place, project_file: Callable[[str, str], Path]) -> Style:
    """A style as it was used; `project_file` finds its files by name and hash."""
    style = parse_known(RecordedStyle, table, place)
    entries = enumerate(table_list(table, "reference", place))
    pictures = (parse_known(RecordedReference, each, place.below("reference", number)) for number, each in entries)
    references = tuple(Reference(project_file(each.image, each.sha256), each.weight) for each in pictures)
    adapter = parse_part(RecordedLora, table, "lora", place) if "lora" in table else None
    return Style(
        name=style.name,
        strength=style.strength,
        references=references,
        keywords=tuple(style.keywords or ()),
        avoids=tuple(style.avoids or ()),
        lora=project_file(adapter.file, adapter.sha256) if adapter else None,
        triggers=tuple(style.triggers or ()),
        method=style.method,
    )


def parse_part(cls: type[T], table: Mapping[str, Any], key: str, place: Place) -> T:
    """One table of a record."""
    if not isinstance(table, dict) or not isinstance(table.get(key), dict):
        raise K2Error(f"{place()}: the table [{key}] is missing.", hint="Is it a record that k2 wrote?")
    return parse_known(cls, table[key], place.below(key))


def parse_known(cls: type[T], table: Any, place: Place) -> T:
    """A dataclass from the keys it knows in a table; the other keys are for people."""
    known = {f.name for f in fields(cls)}  # type: ignore[arg-type]
    return read_table(cls, {name: value for name, value in table.items() if name in known}, place)


def table_list(table: Mapping[str, Any], key: str, place: Place) -> list[dict[str, Any]]:
    """A list of tables, perhaps empty."""
    found = table.get(key, [])
    if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
        raise K2Error(f"{place(key)}: expected a list of tables.", hint="Is it a record that k2 wrote?")
    return found


def verify_files(hashes: Mapping[Path, str]) -> None:
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
