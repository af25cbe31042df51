"""Run-time type checks for specs from callers without a type checker. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from model.errors import K2Error, brief

TYPE_NAMES = {str: "a text", int: "a whole number", float: "a number", bool: "True or False", Path: "a Path"}
EXAMPLES = {str: '"a fox"', int: "7", float: "0.5", bool: "True", Path: 'Path("fox.png")'}
ACCEPTED = {float: (int, float)}  # only Python's own: records cannot hold NumPy's


def check_types(value: Any, cls: type) -> None:
    """Refuse a value that is not a `cls`, a dataclass, or that has a field of the wrong type, at any depth.

    Raises K2Error.
    """
    if not isinstance(value, cls):
        raise K2Error(f"Expected a {cls.__name__}, not {brief(repr(value), 60)}.", hint=f"Like {example(cls)}.")
    for name, kinds in field_types(cls).items():
        each = getattr(value, name)
        if type(each) not in kinds and not any(fits(each, kind) for kind in kinds):
            wanted, said = " or ".join(map(type_name, kinds)), brief(repr(each), 60)
            meant = f"Path({said})" if isinstance(each, str) and Path in kinds else example(kinds[0])
            raise K2Error(f"{cls.__name__}.{name} must be {wanted}, not {said}.", hint=f"Like {meant}.")
        for part in nested_dataclasses(each):
            check_types(part, type(part))


@cache
def field_types(cls: type) -> dict[str, tuple[Any, ...]]:
    """The fields of a dataclass, and the types each may have."""
    hints = get_type_hints(cls)
    return {name: get_args(hint) if isinstance(hint, UnionType) else (hint,) for name, hint in hints.items()}


def fits(value: Any, kind: Any) -> bool:
    if get_origin(kind) is tuple:  # lists are fine too; a string is not, though Python sees a sequence
        one = get_args(kind)[0]
        return isinstance(value, Sequence) and not isinstance(value, str) and all(fits(each, one) for each in value)
    return isinstance(value, ACCEPTED.get(kind, kind)) and (kind is bool or not isinstance(value, bool))


def nested_dataclasses(value: Any) -> Iterator[Any]:
    """The dataclasses that a field holds."""
    for each in value if isinstance(value, tuple | list) else (value,):
        if is_dataclass(each):
            yield each


def type_name(kind: Any) -> str:
    if get_origin(kind) is tuple:
        return f"a tuple of {'texts' if (one := get_args(kind)[0]) is str else one.__name__}"
    return "None" if kind is NoneType else TYPE_NAMES.get(kind) or f"a {kind.__name__}"


def example(kind: Any) -> str:
    """How a value of a type is written, for a hint: "(Style(...),)"."""
    if get_origin(kind) is tuple:
        return f"({example(get_args(kind)[0])},)"
    return EXAMPLES.get(kind) or f"{kind.__name__}(...)"
