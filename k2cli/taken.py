"""A project taken from pictures: the k2.toml that asks for them anew, and what stays behind."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

from k2cli import models
from k2cli.matrix import escape
from k2cli.origins import Origin
from k2cli.prompts import slug
from k2cli.settings import Settings
from k2cli.sizes import fit_aspect, parse_size
from model import library
from model.errors import K2Error


def name(origins: Iterable[Origin]) -> dict[str, Origin]:
    """A name for the prompt of each, made of its words, numbered where two would be alike."""
    named: dict[str, Origin] = {}
    for each in origins:
        stem = slug(each.prompt)
        numbers = (stem if number == 1 else f"{stem}-{number}" for number in count(1))
        named[next(called for called in numbers if called not in named)] = each
    return named


def settings_of(origin: Origin) -> dict[str, Any]:
    """What a picture says of [render], but for its model and shape. Turbo's steps and guidance are the checkpoint's."""
    numbers = () if origin.turbo else ("steps", "guidance")
    made = {key: value for key in numbers if (value := getattr(origin, key)) is not None}
    return made | ({} if origin.creativity == "raw" else {"creativity": origin.creativity})


def taken_over(origin: Origin) -> dict[str, Any]:
    """The same of a picture of k2's own, as far as [render] allows it."""
    return {key: value for key, value in settings_of(origin).items() if allowed(key, value)}


def allowed(key: str, value: Any) -> bool:
    with suppress(K2Error):
        return bool(Settings().override(**{key: value}))
    return False


def model_of(origin: Origin) -> str:
    """The model that a project takes over: k2's own by its name; a path, or one of the hub, may be nowhere here."""
    own = origin.tool == "k2" and re.fullmatch(r"\w[\w.-]*", origin.model)
    return origin.model if own else "mini"


def left_behind(origin: Origin, first: Origin) -> list[str]:
    """What a project that has its settings of the first picture does not take over of this one."""
    lost = list(origin.left_out)
    if origin.tool == "k2":
        kept = taken_over(first) if first.tool == "k2" else {}
        lost += [f"model {origin.model}"] if origin.model not in ("", model_of(first)) else []
        lost += [f"{key} {value}" for key, value in settings_of(origin).items() if kept.get(key) != value]
    return lost


def notes(origins: Mapping[Path, Origin]) -> list[str]:
    """What stays behind of each picture, a sentence for each thing."""
    first = next(iter(origins.values()))
    lost = ((path, thing) for path, each in origins.items() for thing in left_behind(each, first))
    return [f"{path.name}: {thing} stayed behind." for path, thing in lost]


def project_text(name: str, origins: Mapping[str, Origin]) -> str:
    """A k2.toml that asks for these pictures anew; name of a prompt -> origin.

    Seeds, shapes and words are taken over. Steps and guidance are another model's, so they are told and not set,
    except for pictures of k2's own; and those of --turbo are its own.
    """

    def text(value: str) -> str:
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")

    first = next(iter(origins.values()))
    own = first.tool == "k2"
    model = model_of(first)
    lines = ["[project]", f"name = {text(name)}", "", "[render]"]
    lines.append(f"model = {text(model)}" if model == first.model else 'model = "mini"        # the model in the box')
    if size := size_of(first, model):
        shape = f'size = "{size}"' if own else f'aspect = "{aspect_of(first)}"'
        lines.append(shape if own else told(shape, first))
    for key, value in (taken_over if own else settings_of)(first).items():
        line = f"{key} = {text(value)}" if isinstance(value, str) else f"{key} = {value:g}"
        lines.append(line if own else f"# {line}".ljust(22) + f"# with {first.model or first.tool}")
    for called, each in origins.items():
        lines += ["", "[[prompt]]".ljust(22) + f"# from a picture of {each.tool}", f"name = {text(called)}"]
        lines.append(f"text = {text(escape(each.prompt))}")
        lines += [f"avoid = {text(each.avoid)}"] if each.avoid else []
        lines += [f"seed = {each.seed}"] if each.seed is not None else []
        if (other := size_of(each, model)) and other != size:
            shape = f'size = "{other}"'
            lines.append(shape if each.tool == "k2" else told(shape, each))
    return "\n".join(lines) + "\n"


def told(shape: str, origin: Origin) -> str:
    return f"{shape:<22}# it was {origin.width}x{origin.height}"


def aspect_of(origin: Origin) -> str:
    part = math.gcd(origin.width or 1, origin.height or 1)
    return f"{(origin.width or 1) // part}:{(origin.height or 1) // part}"


def size_of(origin: Origin, model: str) -> str:
    """The size of a picture of k2's, and of another tool's what its shape comes to with this model; "" is none."""
    if not origin.width or not origin.height:
        return ""
    with suppress(K2Error):
        here = library.find(model) is not None  # else sizes are as those of the open weights
        grid = models.grid(model) if here else models.Grid(models.NATIVE, 2**models.SCALES)
        if origin.tool == "k2":
            width, height = parse_size(f"{origin.width}x{origin.height}", "", grid.step)
        else:
            width, height = fit_aspect(aspect_of(origin), grid.native, "", grid.step)
        return f"{width}x{height}"
    return ""
