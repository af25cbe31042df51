"""The models at hand: what is in the box, what a weights file says of itself. Reads headers only, without torch."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import model
from k2cli.tables import UNPRINTABLE, nearest
from model.errors import K2Error
from model.headers import read_header

BOX = Path(model.__file__).parent / "weights"


@dataclass(frozen=True)
class Weights:
    """One .safetensors file; `about` is what k2 wrote into it: kind, variant, config, recommended, native, training."""

    path: Path
    about: dict[str, Any]
    parameters: int

    @property
    def bytes(self) -> int:
        return self.path.stat().st_size


def read(path: Path) -> Weights:
    """What a weights file says of itself. Raises K2Error where it is none, or is cut short."""
    header = read_header(path)
    about = json.loads(header.pop("__metadata__", {}).get("k2", "{}"))
    parameters = sum(math.prod(each["shape"]) for name, each in header.items() if not name.endswith("_scale"))
    return Weights(path, about, parameters)


def box() -> dict[str, list[Path]]:
    """The models of the box: name → its files."""
    names = sorted(
        {path.name.rsplit("-", 1)[0] for path in BOX.glob("*-*.safetensors") if path.stem.endswith(("-raw", "-turbo"))}
    )
    return {
        name: sorted(path for path in BOX.glob(f"{name}-*") if path.suffix in (".safetensors", ".json"))
        for name in names
    }


def resolve(name: str, inside: Callable[[str], Path] | None = None) -> str:
    """A model's name in the box, or the absolute path of a folder or file.

    `inside` makes a project's relative path absolute and refuses what lies outside; without it paths are the shell's.
    """
    if name in box():
        return name
    if os.sep not in name and not name.endswith(".safetensors"):
        hint = nearest(name, box()) or "Name a folder or a .safetensors file."
        raise K2Error(f'There is no model "{UNPRINTABLE.sub("?", name)}" in the box.', hint=hint)
    path = inside(name) if inside else Path(name).absolute()
    if not path.exists():
        raise K2Error(f"There is no model at {path}.", hint="k2 models list shows what is here.")
    return str(path)


def file_of(name: str, file: str) -> Path:
    """Where a file that a record names lies: beside the other files of its model."""
    folder = BOX if name in box() else Path(name) if Path(name).is_dir() else Path(name).parent
    if Path(file).is_absolute() or ".." in Path(file).parts:
        raise K2Error(
            f'The record names a file outside its model: "{UNPRINTABLE.sub("?", file)}".',
            hint="Is it a record that k2 wrote?",
        )
    return folder / file


def native_size(name: str) -> int:
    """The side in pixels that a model was trained for; 1024 where its files do not say, as for the open weights."""
    for path in (*box().get(name, ()), Path(name)):
        if path.suffix == ".safetensors" and path.is_file() and "native" in (about := read(path).about):
            return int(about["native"])
    return 1024


def sha256(path: Path) -> str:
    """The hash of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def inventory() -> list[dict[str, Any]]:
    """One entry for each transformer of the box: what it is and how much of it there is, its helpers included."""
    entries = []
    for name, paths in box().items():
        helpers = [
            read(path) for path in paths if path.suffix == ".safetensors" and not path.stem.endswith(("-raw", "-turbo"))
        ]
        for path in paths:
            if path.stem.endswith(("-raw", "-turbo")):
                weights = read(path)
                entries.append(
                    {
                        "name": name,
                        "variant": weights.about.get("variant"),
                        "native": weights.about.get("native"),
                        "recommended": weights.about.get("recommended", {}),
                        "parameters": sum(each.parameters for each in (weights, *helpers)),
                        "megabytes": round(sum(each.bytes for each in (weights, *helpers)) / 1e6, 1),
                        "file": str(path),
                    }
                )
    return entries


def files(name: str) -> list[dict[str, Any]]:
    """What each file of a model says of itself, with its hash."""
    found = resolve(name)
    folder = Path(found)
    paths = box().get(found) or (sorted(folder.rglob("*.safetensors")) if folder.is_dir() else [folder])
    return [
        {"file": path.name, "megabytes": round(path.stat().st_size / 1e6, 1), "sha256": sha256(path)}
        | ({"parameters": (weights := read(path)).parameters, **weights.about} if path.suffix == ".safetensors" else {})
        for path in paths
    ]


def card(entry: Mapping[str, Any], indent: str = "") -> str:
    """A file's entry for people: a key a line, tables below their names."""
    lines = []
    for key, value in entry.items():
        if isinstance(value, dict):
            lines += [f"{indent}{key}", card(value, indent + "  ")] if value else []
        else:
            text = f"{value:,}" if isinstance(value, int) else str(value)
            lines.append(f"{indent}{key:<{max(12 - len(indent), 1)}} {UNPRINTABLE.sub('?', text)}")
    return "\n".join(lines)
