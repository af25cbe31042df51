"""Recipes: TOML files that say what a training run does. Nothing here imports torch.

A recipe names its `stage`; the stage's module holds a `Recipe` (the keys it knows) and `main(recipe, device, report)`.
"""

from __future__ import annotations

import math
import re
import tomllib
import types
from collections.abc import Collection, Mapping
from dataclasses import MISSING, dataclass, fields
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any, Self, Union, get_args, get_origin, get_type_hints

from model.errors import K2Error, did_you_mean

FOLDER = Path(__file__).parent / "recipes"
STAGES = {  # value of `stage` -> its module
    "pretrain": "model.train.pretrain",
    "turbo": "model.train.turbo",
    "lora": "model.train.adapter",
    "midtrain": "model.train.midtrain",
    "hearing": "model.train.hearing",
    "sft": "model.train.sft",
    "merge": "model.train.merge",
    "judge": "model.train.judge",
    "text": "model.train.text",
    "autoencoder": "model.train.autoencoder",
    "finer": "model.train.finer",
    "sharpen": "model.train.sharpen",
    "stpo": "model.train.stpo",
    "grpo": "model.train.grpo",
}
GIVE_EITHER = "Name a folder of pictures or a recipe: a .toml file, or a bundled one like pretrain-256."
MAX_NAME = 200  # bytes of a name: file systems allow 255, and names of drafts are longer
MAX_COUNT = 10**9  # of any count
LORA_STEPS = 300  # for a LoRA from a folder of pictures, without a recipe


@dataclass(frozen=True, kw_only=True)
class Table:
    """A recipe as a strict TOML table."""

    name: str  # of the run, and of its folder
    stage: str = "pretrain"

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\w[\w.-]*", self.name):
            raise K2Error(f'"{self.name}" cannot name a run.', hint="Use letters, digits, dots and dashes.")
        if len(self.name.encode()) > MAX_NAME:
            raise K2Error(f'"{self.name[:40]}…" is too long to name a run.', hint=f"At most {MAX_NAME} bytes.")
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int) and value > MAX_COUNT and field.name != "seed":
                raise K2Error(f'Recipe "{self.name}": {field.name} must be at most {MAX_COUNT:,}.')

    @classmethod
    def read(cls, path: Path) -> Self:
        """The recipe in a TOML file. Raises `K2Error` for unknown or missing keys and for values of another kind."""
        return cls.of(read_table(path), str(path))

    @classmethod
    def of(cls, table: Mapping[str, Any], where: str) -> Self:
        """A recipe from a table; `where` is its name in errors."""
        known, hints = {field.name: field for field in fields(cls)}, get_type_hints(cls)
        for key in table:
            if key not in known:
                raise K2Error(f'{where}: unknown key "{key}".', hint=did_you_mean(key, known))
            if not fits(table[key], hints[key]):
                raise K2Error(f"{where}: {key} must be {type_text(hints[key])}.")
        for key, field in known.items():
            if key not in table and field.default is MISSING and field.default_factory is MISSING:
                raise K2Error(f"{where}: {key} is missing.")
        values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in table.items()}
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class Recipe(Table):
    """The keys of every stage that uses the loop; each stage adds its own."""

    minutes: float = 0.0  # length by the clock ...
    steps: int = 0  # ... or by count: then the whole run is reproducible, not only each of its steps
    lr: float  # of AdamW
    muon_lr: float  # of the matrices inside the blocks; updates are of AdamW's size, but tolerate a higher rate
    warmup_steps: int = 50
    decay: float = 0.0  # share of the run over which the learning rate falls to zero
    weight_decay: float = 0.01
    clip: float = 2.0  # of the gradient's norm
    accumulate: int = 1  # parts of a step, each with its own batch
    average: float = 0.998  # decay of the averaged weights, after the first steps
    keep: int = 0  # how many of the last snapshots of the weights to keep ...
    keep_every: int = 0  # ... of those taken every so many steps before the learning rate falls
    every: int = 25  # steps per line of the log; runs are saved on such steps only
    seed: int = 1
    init: str = ""  # a run whose averaged weights this one starts from, or "box", "turbo": the bundled ones
    fresh: tuple[str, ...] = ()  # modules that start from scratch all the same

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 0, "minutes", "steps", "lr", "muon_lr", "weight_decay", "keep", "keep_every")
        check_at_least(self, 1, "accumulate", "every", "warmup_steps")
        check_positive(self, "clip")
        check_share(self, "decay", "average")
        if not 0 <= self.seed < 2**63:
            raise K2Error(f'Recipe "{self.name}": {self.seed} is not a seed.', hint="Seeds go from 0 to 2^63 − 1.")
        if bool(self.minutes) == bool(self.steps):
            raise K2Error(f'Recipe "{self.name}" must set either minutes or steps.')
        if bool(self.keep) != bool(self.keep_every):
            raise K2Error(f'Recipe "{self.name}": keep and keep_every must be set together.')
        if self.average == 1:
            raise K2Error(f'Recipe "{self.name}": average must be less than 1, or the averages never change.')

    @property
    def total(self) -> float:
        """The run's length, in steps or in seconds."""
        return self.steps or self.minutes * 60


def read_table(path: Path) -> dict[str, Any]:
    """The contents of a TOML file. Raises `K2Error` if it cannot be read."""
    try:
        return tomllib.loads(path.read_text("utf-8-sig"))
    except tomllib.TOMLDecodeError as error:
        raise K2Error(f"{path} is not valid TOML: {error}.") from None
    except OSError as error:
        raise K2Error(f"{path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:  # a picture, say
        raise K2Error(f"{path} is neither a folder of pictures nor a recipe.", hint=GIVE_EITHER) from None


def names() -> list[str]:
    """The bundled recipes."""
    return sorted(each.stem for each in FOLDER.glob("*.toml"))


def find(name: str) -> Path:
    """A recipe by its path, or a bundled one by its bare name."""
    for path in (Path(name), FOLDER / f"{name}.toml"):
        if path.is_file():
            return path
    near = get_close_matches(name, names(), 1)
    hint = f'Did you mean the recipe "{near[0]}"? Or name a folder of pictures.' if near else GIVE_EITHER
    raise K2Error(f'"{name}" is neither a folder of pictures nor a recipe.', hint=hint)


def load(name: str) -> Any:
    """The recipe of a path or name, as its stage reads it; for a folder of pictures, a LoRA's."""
    if name and Path(name).is_dir():  # an empty name is a path too: the current folder
        own = re.sub(r"[^\w.-]+|^\W+", "-", Path(name).resolve().name).encode()[:MAX_NAME].decode(errors="ignore")
        own = own.strip("-.") or "pictures"
        return stage_module("lora", name).Recipe.of({"name": own, "pictures": name, "steps": LORA_STEPS}, name)
    path = find(name)
    table = read_table(path)
    return stage_module(table.get("stage", "pretrain"), str(path)).Recipe.of(table, str(path))


def saved_recipe(table: Mapping[str, Any]) -> Any:
    """The recipe of a saved run, from its `place`."""
    return stage_module(table.get("stage", "pretrain"), "the run").Recipe.of(table, "the run's recipe")


def stage_module(stage: Any, where: str) -> Any:
    """The module of a stage. Raises `K2Error` if no stage has that name."""
    if not isinstance(stage, str) or stage not in STAGES:
        hint = did_you_mean(str(stage), STAGES) or f"Stages: {', '.join(STAGES)}."
        raise K2Error(f'{where}: there is no stage "{stage}".', hint=hint)
    return import_module(STAGES[stage])


def reject(recipe: Table, *keys: str, to: str = "") -> None:
    """Raises K2Error if a recipe sets keys that its stage, or `to` what it asks for, does not use."""
    stage = f'the stage "{recipe.stage}"'
    for field in fields(recipe):
        if field.name in keys and getattr(recipe, field.name) != field.default:
            raise K2Error(f'Recipe "{recipe.name}": {field.name} has no meaning for {to or stage}.')


def check_at_least(recipe: Table, least: int, *keys: str) -> None:
    """Raises K2Error if one of these numbers is less."""
    for key in keys:
        if getattr(recipe, key) < least:
            raise K2Error(f'Recipe "{recipe.name}": {key} must be at least {least}.')


def check_positive(recipe: Table, *keys: str) -> None:
    """Raises K2Error if one of these numbers is 0 or less."""
    for key in keys:
        if getattr(recipe, key) <= 0:
            raise K2Error(f'Recipe "{recipe.name}": {key} must be more than 0.')


def check_share(recipe: Table, *keys: str) -> None:
    """Raises K2Error if one of these is not between 0 and 1."""
    for key in keys:
        if not 0 <= getattr(recipe, key) <= 1:
            raise K2Error(f'Recipe "{recipe.name}": {key} must be from 0 to 1.')


def check_known(recipe: Table, names: Collection[str], allowed: Collection[str], what: str) -> None:
    """Raises K2Error if one of these names is not among the known ones."""
    for name in names:
        if name not in allowed:
            raise K2Error(
                f'Recipe "{recipe.name}": there is no {what} "{name}".', hint=f"Choose one of {', '.join(allowed)}."
            )


def fits(value: Any, hint: Any) -> bool:
    """Whether a value of a TOML file fits a field of this type."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (types.UnionType, Union):
        return any(fits(value, each) for each in inner)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            return False
        if inner[-1] is Ellipsis:
            return all(fits(each, inner[0]) for each in value)
        return len(value) == len(inner) and all(map(fits, value, inner))
    if origin is dict:
        return isinstance(value, dict) and all(fits(each, inner[1]) for each in value.values())
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf
    return isinstance(value, hint) and not (hint is int and isinstance(value, bool))


def type_text(hint: Any) -> str:
    """What `fits` asks for, in words."""
    origin, inner = get_origin(hint), get_args(hint)
    plain = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
    if origin is tuple:
        many = "a list" if inner[-1] is Ellipsis else f"a list of {len(inner)}"
        return f"{many}, each {plain.get(inner[0], 'of its kind')}"
    if origin is dict:
        return f"a table, each value {plain.get(inner[1], 'of its kind')}"
    return plain.get(hint) or " or ".join(type_text(each) for each in inner if each is not type(None))
