"""Models as a project names them, and what their files say about themselves. Needs no torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from k2cli.sizes import MAX_RATIO
from k2cli.texts import check_path, display_safe
from k2cli.toml_tables import PATH, one_of
from model import library, reference_weights
from model.errors import K2Error, nearest
from model.hashes import sha256
from model.headers import VARIANTS, read_json
from model.plan import OFFLOADS, PRECISIONS
from model.spec import Style, resolve_mu

VAE_SCALES = 4  # of the open weights' autoencoder
ESSENTIAL_KEYS = {"config": (), "training": ("steps", "minutes", "torch")}  # of long tables, in `entry_text`


@dataclass(frozen=True)
class ModelSpec:
    """The weights of a run: which model's, and how they are held. None is decided when they are loaded."""

    name: str = field(metadata=PATH)
    variant: str | None = None
    device: str | None = None
    dtype: str | None = None
    precision: str | None = one_of(None, *PRECISIONS)
    offload: str | None = one_of(None, *OFFLOADS)


def resolve(name: str, inside: Callable[[str], Path] | None = None, variant: str | None = None) -> str:
    """The name of a bundled or pulled model, or the absolute path of a folder or file. Raises K2Error if not here.

    `inside` makes a project's relative path absolute and refuses what lies outside; without it paths are the shell's.
    """
    if name in library.bundled_models():
        if library.find(name, variant) is None:
            raise K2Error(
                f"There is no bundled {variant} checkpoint of {name}.", hint=f"Use --{other_variant(variant)}."
            )
        return name
    path = inside(name) if inside else Path(name).absolute()
    if name and os.path.exists(path):
        if not any(library.find_weights(path) if path.is_dir() else [path.suffix in library.WEIGHT_SUFFIXES]):
            kinds = " or ".join(library.WEIGHT_SUFFIXES)
            raise K2Error(
                f"{display_safe(name)} holds no weights: no {kinds}.",
                hint="Name a folder or a file that does; `k2 models list` lists the models here.",
            )
        check_variant(str(path), variant)
        return str(path)
    found = library.find(name)
    if found is not None and found.source == "hub":
        check_variant(name, variant)
        return name
    shown, short = display_safe(name), name.partition("@")[0]
    if short == "krea-2" or short in library.OFFICIAL:
        pulled = shown if short in library.OFFICIAL else f"krea-2-{variant or 'turbo'}"
        raise K2Error(f"{shown} is not on this machine.", hint=f"Fetch it with: k2 models pull {pulled}")
    base, _, suffix = name.lower().rpartition("-")
    if suffix in ("turbo", "raw") and base in ("", *library.bundled_models()):
        hint = f'The variant is not part of the name: use variant = "{suffix}" under [render], or --{suffix}.'
    elif "/" in name or "." in name:
        hint = "Name an existing folder or file, or fetch a model from the hub: k2 models pull ORG/NAME"
    else:
        hint = nearest(name, [*library.bundled_models(), *library.OFFICIAL])
    raise K2Error(f'There is no model "{shown}" here.', hint=hint)


def check_variant(name: str, variant: str | None) -> None:
    """Raises K2Error if weights from a path or the hub say that they are another variant."""
    if variant and library.find(name, variant) is None:
        raise K2Error(
            f"{display_safe(name)} holds no {variant} weights.", hint=f"Use --{other_variant(variant)}, or name others."
        )


def unknown_variant(name: str, variant: str | None = None) -> str:
    """A warning that neither the weights nor the caller say which variant they are; else ""."""
    found = library.find(name, variant)
    if found is None or found.variant:
        return ""
    about = map(library.describe, library.weights_files(library.dit_path(found.path)))
    if not any(each.get("layout") or each.get("kind") == "dit" for each in about):
        return ""  # not a transformer, which is reported when it is read
    name = display_safe(Path(name).name)
    return f"{name} does not say whether it is Raw or Turbo; k2 assumes Raw, or Turbo with --turbo."


def other_variant(variant: str | None) -> str:
    """The other variant."""
    return "turbo" if variant == "raw" else "raw"


def model_files(name: str) -> list[Path]:
    """The files of a resolved model: weights and whatever else it needs."""
    if name in library.bundled_models():
        return library.bundled_models()[name]
    found = library.find(name)
    path = found.path if found else Path(name)
    return sorted(library.find_weights(path)) if path.is_dir() else [path]


def recorded_file(name: str, file: str) -> Path:
    """Where a file named by a record is: with its model, or in the release that completes a single file."""
    if Path(file).is_absolute() or ".." in Path(file).parts:
        raise K2Error(f'The record names a file outside its model: "{display_safe(file)}".')
    check_path(file, "The record's model: ")
    found = None if name in library.bundled_models() else library.find(name)
    if found is None:
        return library.BUNDLED / file
    release = library.locate("krea-2")
    candidates = [found.root / file, *([release / file] if release else []), library.BUNDLED / file]
    return next((place for place in candidates if place.is_file()), candidates[0])


class Grid(NamedTuple):
    """The sizes of a model's pictures, in pixels."""

    native: int  # the side it was trained for
    step: int  # sides are multiples of it: one token, two latent cells wide
    pixel_range: tuple[int, int] | None = None  # the least and most pixels it states it was trained for

    def trained_for(self, width: int, height: int) -> bool:
        """Whether it was trained for pictures of this size."""
        least, most = self.pixel_range or (self.native**2, self.native**2)
        fits = width % self.step == height % self.step == 0 and max(width, height) <= MAX_RATIO * min(width, height)
        return fits and least <= width * height <= most


def grid(name: str, variant: str | None = None) -> Grid:
    """The grid from a model's headers, or else that of the open weights. Raises K2Error if there is no such model."""
    found = library.find(name, variant)
    if found is None:
        raise K2Error(f'There is no model "{display_safe(name)}" here.')
    parts = library.find_parts(found)
    about = [library.describe(file) for file in library.weights_files(parts.dit)]
    native, shapes = (next((each[key] for each in about if each.get(key)), None) for key in ("native", "shapes"))
    areas = [prod(map(int, shape.split("x"))) for shape in shapes or ()] + ([native**2] if native else [])
    config_file = parts.vae / "config.json"
    embedded_config = library.describe(parts.vae).get("config") if parts.vae.is_file() else None
    scales = (read_json(config_file) if config_file.is_file() else embedded_config or {}).get("dim_mult")
    step = 2 ** (len(scales) if isinstance(scales, list) else VAE_SCALES)
    return Grid(native or library.OPEN_WEIGHTS_SIDE, step, (min(areas), max(areas)) if areas else None)


def auto_method(name: str, variant: str | None = None) -> str:
    """How a model reads reference pictures if the style's method is `auto`. Its weights are not read."""
    found = library.find(name, variant)
    return reference_weights.auto_method(found is not None and library.find_parts(found).style is not None)


def method_resolver(name: str, variant: str | None) -> Callable[[Style], Style]:
    """A function that returns a style with `auto` decided as rendering does. It raises K2Error for a method that the
    model lacks the part for. Weights are not read."""
    found = library.find(name, variant)
    assert found is not None, name
    parts = library.find_parts(found)
    return partial(
        reference_weights.resolve_auto,
        model=found.name,
        has_style_encoder=parts.style is not None,
        has_vision=library.has_vision(parts.text),
    )


def recommended_settings(name: str, variant: str | None = None) -> dict[str, Any]:
    """A model's defaults: width, height, steps, guidance, and mu unless it depends on the size. Its weights are not
    read."""
    best = recommended_sampling(name, variant)
    side = grid(name, variant).native
    settings = {"width": side, "height": side, "steps": best["steps"], "guidance": float(best["guidance"])}
    return settings | ({"mu": float(best["mu"])} if isinstance(best["mu"], (int, float)) else {})


def recommended_sampling(name: str, variant: str | None) -> dict[str, Any]:
    """Steps, guidance and mu of a local model, from `library.recommended`."""
    found = library.find(name, variant)
    assert found is not None, name
    about = [library.describe(path) for path in model_files(name) if path.suffix == ".safetensors"]
    header = next((each for each in about if each.get("kind") == "dit" and each.get("variant") == found.variant), {})
    return library.recommended(found.variant or "raw", header, found.path)


def default_mu(name: str, variant: str, width: int, height: int) -> float | None:
    """A model's default mu for pictures of this size. For a model that is not here: the open weights' if it is one of
    them, else None. Its weights are not read."""
    is_local = library.find(name, variant) is not None
    if not is_local and name not in library.OFFICIAL:
        return None
    best = recommended_sampling(name, variant) if is_local else library.RECOMMENDED[variant]
    step = grid(name, variant).step if is_local else 2**VAE_SCALES
    return resolve_mu(best["mu"], width * height // step**2)


def inventory() -> list[dict[str, Any]]:
    """The models here: what each is, and its size, text encoder and autoencoder included."""
    entries = []
    for model in library.list_models():
        others = {library.BUNDLED / f"{model.name}-{each}.safetensors" for each in VARIANTS} - {model.path}
        weights = [
            path for path in model_files(model.name) if path.suffix in library.WEIGHT_SUFFIXES and path not in others
        ]
        about = [library.describe(path) for path in weights]
        entries.append(
            {
                "name": model.name,
                "variant": model.variant,
                "source": model.source,
                "native": next((each["native"] for each in about if "native" in each), None),
                "parameters": sum(each["parameters"] for each in about),
                "megabytes": megabytes(*weights),
                "revision": model.revision,
                "licence": model.licence,
                "path": str(model.path),
            }
        )
    return entries


def describe_files(name: str) -> list[dict[str, Any]]:
    """What each file of a model says about itself, with its hash; for a pulled one the hash verified on arrival."""
    name = resolve(name)
    found = library.find(name)
    assert found is not None, name
    verified = {found.root / file: entry.get("sha256") for file, entry in found.manifest.get("files", {}).items()}
    pulled = {"revision": found.revision} if found.revision else {}
    entries = []
    for path in model_files(name):
        about = library.describe(path) if path.suffix in library.WEIGHT_SUFFIXES else {}
        if "layout" in about:  # the transformer: its publisher's facts, where it states none itself
            variant = about.get("variant") or library.detect_variant(path) or found.variant
            best = library.recommended(variant, {}, path) if variant else {}
            about = {"variant": variant, "recommended": best} | about
            about |= {"licence": found.licence} if found.licence else {}
        file = {"file": str(path.relative_to(found.root)), "megabytes": megabytes(path)}
        entries.append(file | {"sha256": verified.get(path) or sha256(path)} | pulled | about)
    return entries


def megabytes(*paths: Path) -> float:
    return round(sum(path.stat().st_size for path in paths) / 1e6, 1)


def entry_text(entry: Mapping[str, Any], indent: str = "") -> str:
    """A file's entry for people: one key per line, tables below their names, and of the longest only the essentials."""
    lines = []
    for key, value in entry.items():
        if isinstance(value, dict):
            value = {name: value[name] for name in ESSENTIAL_KEYS.get(key, value) if name in value}
            lines += [f"{indent}{key}", entry_text(value, indent + "  ")] if value else []
        else:
            if isinstance(value, tuple):  # mu, see `headers.shift_of`
                value = "{:g} at 256 tokens, {:g} at 6400".format(*value)
            if isinstance(value, list):
                value = ", ".join(map(str, value))
            is_whole_number = isinstance(value, int) and not isinstance(value, bool)
            text = f"{value:,}" if is_whole_number else str(value).lower() if isinstance(value, bool) else str(value)
            lines.append(f"{indent}{key:<{max(12 - len(indent), 1)}} {display_safe(text)}")
    return "\n".join(lines)
