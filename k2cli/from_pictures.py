"""A project made from pictures: the k2.toml that asks for them again, and what it cannot take over."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

from k2cli import models
from k2cli.matrix import MAX_PROMPT_CHARS, escape_braces
from k2cli.origins import SUPPORTED_TOOLS_HINT, Origin, PromptTooLong, read_origin
from k2cli.pictures import folder_pictures
from k2cli.prompts import slug
from k2cli.settings import Settings
from k2cli.sizes import fit_aspect, parse_size
from k2cli.toml_tables import MAX_FILE_BYTES
from model import library
from model.errors import K2Error, listed, pluralise
from model.picture_file import describe_skipped

MAX_PICTURES = 1000  # pictures in a folder, and in a batch
PER_PROMPT = ("steps", "guidance", "creativity")  # set per [[prompt]] if its picture's differ from the first's


def gather_origins(paths: Iterable[Path]) -> tuple[dict[Path, Origin], dict[Path, K2Error]]:
    """The origins of pictures and of those in folders; which of the latter were skipped, and why. Raises K2Error."""
    found: dict[Path, Origin] = {}
    skipped: dict[Path, K2Error] = {}
    for path in paths:
        if not path.is_dir():
            found[path] = read_origin(path)
            continue
        pictures = folder_pictures(path)
        if not pictures:
            hint = describe_skipped(path.iterdir()) or "Name pictures, or a folder of them."
            raise K2Error(f"{path} holds no picture.", hint=hint)
        if len(pictures) > MAX_PICTURES:
            raise K2Error(f"{path} holds more than {MAX_PICTURES:,} pictures.", hint="Name the ones to use.")
        for picture in pictures:
            try:
                found[picture] = read_origin(picture)
            except K2Error as error:
                skipped[picture] = error
    if not found:
        silent = K2Error(f"No picture in {next(iter(paths))} states its prompt.", hint=SUPPORTED_TOOLS_HINT)
        raise next((error for error in skipped.values() if isinstance(error, PromptTooLong)), silent)
    return found, skipped


def group_batches(origins: Sequence[Origin]) -> dict[Origin, int]:
    """Pictures that differ only in consecutive seeds form a batch: the first of them -> how many."""
    seeds: dict[Origin, set[int | None]] = defaultdict(set)
    for each in origins:
        seeds[replace(each, seed=None)].add(each.seed)
    found: dict[Origin, int] = {}
    for each in origins:
        alike = seeds[replace(each, seed=None)]
        if each.seed is None:
            found[each] = 1
        elif each.seed - 1 not in alike:
            found[each] = next(n for n in count(1) if each.seed + n not in alike)
    return found


def name_prompts(origins: Iterable[Origin]) -> dict[str, Origin]:
    """A name for the prompt of each, its own or one made from its words, numbered if two would be alike."""
    found: dict[str, Origin] = {}
    for each in origins:
        stem = slug(each.name or each.prompt)
        numbers = (stem if number == 1 else f"{stem}-{number}" for number in count(1))
        found[next(name for name in numbers if name not in found)] = each
    return found


def stated_settings(origin: Origin) -> dict[str, Any]:
    """The [render] settings that a picture states, except model and shape."""
    numbers = ("steps", "guidance", "guidance_until", "sampler")
    made = {key: value for key in numbers if (value := getattr(origin, key)) is not None}
    made |= {"mu": origin.mu} if has_own_mu(origin) else {}
    return made | ({} if origin.creativity == "raw" else {"creativity": origin.creativity})


def has_own_mu(origin: Origin) -> bool:
    """Whether a picture's mu differs from its model's default for its size, as far as that is known."""
    model, variant = project_model(origin), "turbo" if origin.turbo else "raw"
    if origin.mu is None or model != origin.model or not (origin.width and origin.height):
        return False
    with suppress(K2Error):
        default = models.default_mu(model, variant, origin.width, origin.height)
        return default is not None and not math.isclose(origin.mu, default)
    return False


def reusable_settings(origin: Origin) -> dict[str, Any]:
    """`stated_settings` of a k2 picture, as far as [render] allows."""
    return {key: value for key, value in stated_settings(origin).items() if is_valid_setting(key, value)}


def settings_to_write(origin: Origin) -> dict[str, Any]:
    """`reusable_settings` as written to k2.toml: without Turbo's own steps and guidance, which would be useless for
    raw."""
    defaults = turbo_defaults(project_model(origin)) if origin.turbo else {}
    return {key: value for key, value in reusable_settings(origin).items() if defaults.get(key) != value}


def turbo_defaults(model: str) -> Mapping[str, Any]:
    """The defaults of a model's distilled checkpoint; for one that is not here, the open weights'."""
    with suppress(K2Error):
        if library.find(model, "turbo"):
            return models.recommended_settings(model, "turbo")
    return library.RECOMMENDED["turbo"]


def is_valid_setting(key: str, value: Any) -> bool:
    with suppress(K2Error):
        return bool(Settings().override(**{key: value}))
    return False


def project_model(origin: Origin) -> str:
    """The model for the project: a k2 picture's, if it is a plain name; paths and hub ids may not exist here."""
    has_plain_name = origin.tool == "k2" and re.fullmatch(r"\w[\w.-]*", origin.model)
    return origin.model if has_plain_name else "mini"


def prompt_settings(origin: Origin, first: Origin) -> dict[str, Any]:
    """The settings of PER_PROMPT in the [[prompt]] of a k2 picture, in a project with the first picture's settings:
    none if it was made by another checkpoint."""
    if not origin.tool == first.tool == "k2" or (origin.model, origin.turbo) != (first.model, first.turbo):
        return {}
    kept, made = ({"creativity": "raw"} | reusable_settings(each) for each in (first, origin))
    return {key: made[key] for key in PER_PROMPT if key in made and made[key] != kept.get(key)}


def not_imported(origin: Origin, first: Origin) -> list[str]:
    """What a project with the first picture's settings does not take over from this one."""
    dropped = list(origin.left_out)
    if origin.tool == "k2":
        defaults = {"creativity": "raw"}
        project_settings = defaults | (reusable_settings(first) if first.tool == "k2" else {})
        stated = defaults | stated_settings(origin)
        dropped += [f"model {origin.model}"] if origin.model not in ("", project_model(first)) else []
        dropped += [f"variant {'turbo' if origin.turbo else 'raw'}"] if origin.turbo != first.turbo else []
        project_settings |= prompt_settings(origin, first)
        dropped += [f"{key} {value}" for key, value in stated.items() if project_settings.get(key) != value]
        model_defaults = (
            key for key, value in project_settings.items() if key not in stated and getattr(origin, key) != value
        )
        dropped += [f"the model's own {key}" for key in model_defaults]
    return dropped


def import_notes(origins: Mapping[Path, Origin], skipped: Mapping[Path, K2Error]) -> list[str]:
    """What is not taken over from which pictures, a sentence for each thing, and which pictures were skipped."""
    first = next(iter(origins.values()))
    lost: dict[str, list[Path]] = defaultdict(list)
    for path, each in origins.items():
        for thing in dict.fromkeys(not_imported(each, first)):
            lost[thing].append(path)
    sentences = [
        f"Not imported from {listed([path.name for path in paths], 1)}: {thing}." for thing, paths in lost.items()
    ]
    long = [path.name for path, error in skipped.items() if isinstance(error, PromptTooLong)]
    if long:
        sentences.append(f"Passed over for a prompt of more than {MAX_PROMPT_CHARS:,} characters: {listed(long, 1)}.")
    silent = [path.name for path, error in skipped.items() if not isinstance(error, PromptTooLong)]
    if silent:
        sentences.append(
            f"Passed over: {listed(silent, 1)}, which {'state' if len(silent) > 1 else 'states'} no prompt."
        )
    return sentences


def prompt_table(origin: Origin, first: Origin) -> Origin:
    """What a [[prompt]] takes over from a picture, with [render] as in the first; pictures with the same wish differ
    only in what is not taken over."""
    shared = {key: getattr(first, key) for key in PER_PROMPT} | prompt_settings(origin, first)
    kept = ("tool", "prompt", "avoid", "seed", "width", "height", "name")
    return Origin(**{key: getattr(origin, key) for key in kept}, **shared)


def project_toml(name: str, origins: Sequence[Origin]) -> str:
    """A k2.toml that asks for these pictures again.

    Seeds, shapes and words are taken over. Steps and guidance belong to another model, so they are written as comments;
    for k2's own pictures they are set, per prompt where they differ from the first's.
    """

    def toml_string(value: str) -> str:
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")

    def toml_line(key: str, value: Any) -> str:
        return f"{key} = {toml_string(value) if isinstance(value, str) else repr(value).removesuffix('.0')}"

    first, counts = origins[0], group_batches([prompt_table(each, origins[0]) for each in origins])
    is_k2 = first.tool == "k2"
    model = project_model(first)
    lines = ["[project]", f"name = {toml_string(name)}", "", "[render]"]
    lines.append(f"model = {toml_string(model)}" if model == first.model else 'model = "mini"        # bundled')
    lines += ['variant = "turbo"'] if is_k2 and first.turbo else []
    if size := picture_size(first, model):
        shape = f'size = "{size}"' if is_k2 else f'aspect = "{aspect(first)}"'
        lines.append(shape if is_k2 else with_size_comment(shape, first))
    for key, value in (settings_to_write if is_k2 else stated_settings)(first).items():
        line = toml_line(key, value)
        lines.append(line if is_k2 else f"# {line}".ljust(22) + f"# with {first.model or first.tool}")
    for prompt_name, each in name_prompts(counts).items():
        lines += ["", "[[prompt]]".ljust(22) + f"# from a picture by {each.tool}", f"name = {toml_string(prompt_name)}"]
        lines.append(f"text = {toml_string(escape_braces(each.prompt))}")
        lines += [f"avoid = {toml_string(each.avoid)}"] if each.avoid else []
        lines += [f"seed = {each.seed}"] if each.seed is not None else []
        lines += [f"batch = {counts[each]}"] if counts[each] > 1 else []
        if (other := picture_size(each, model)) and other != size:
            shape = f'size = "{other}"'
            lines.append(shape if each.tool == "k2" else with_size_comment(shape, each))
        lines += [toml_line(key, value) for key in PER_PROMPT if (value := getattr(each, key)) != getattr(first, key)]
    content = "\n".join(lines) + "\n"
    if len(content.encode()) > MAX_FILE_BYTES:  # no command would read it
        message = (
            f"The prompts of {pluralise(f'{len(origins):,}', 'picture')} add up to more than {MAX_FILE_BYTES >> 20} MB."
        )
        raise K2Error(message, hint="Use fewer, or make several projects.")
    return content


def with_size_comment(shape: str, origin: Origin) -> str:
    return f"{shape:<22}# it was {origin.width}x{origin.height}"


def aspect(origin: Origin) -> str:
    part = math.gcd(origin.width or 1, origin.height or 1)
    return f"{(origin.width or 1) // part}:{(origin.height or 1) // part}"


def picture_size(origin: Origin, model: str) -> str:
    """A k2 picture's size, or for another tool's picture the size of that shape with this model; "" if none."""
    if not origin.width or not origin.height:
        return ""
    with suppress(K2Error):
        is_local = library.find(model) is not None  # else sizes are as those of the open weights
        grid = models.grid(model) if is_local else models.Grid(library.OPEN_WEIGHTS_SIDE, 2**models.VAE_SCALES)
        if origin.tool == "k2":
            width, height = parse_size(f"{origin.width}x{origin.height}", "", grid.step)
        else:
            width, height = fit_aspect(aspect(origin), grid.native, "", grid.step)
        return f"{width}x{height}"
    return ""
