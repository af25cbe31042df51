"""The hook for output filters: a filter sees every finished picture and may block it before anyone else sees it.

k2 includes no classifier; whoever deploys it chooses one. A package plugs one in by an entry point,

    [project.entry-points."k2.filters"]
    nudity = "my_package:check"

with `check(image, record) -> Verdict`; in Python it is `Pipeline.load(..., filters=[check])`. A filter that fails lets
nothing through.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any

from PIL import Image

from model.errors import K2Error
from model.spec import Picture

ENTRY_POINT_GROUP = "k2.filters"


@dataclass(frozen=True)
class Verdict:
    """A filter's decision about a picture; the reason is for the record and the log."""

    allowed: bool
    reason: str = ""


Filter = Callable[[Image.Image, Mapping[str, Any]], Verdict]


def installed_filters() -> dict[str, Filter]:
    """The filters of installed packages, by name; if two packages use the same name, with the entry point added.

    Raises K2Error for one that cannot be loaded.
    """
    filters: dict[str, Filter] = {}
    for point in sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda point: (point.name, point.value)):
        name = point.name if point.name not in filters else f"{point.name} of {point.value}"
        try:
            filters[name] = point.load()
        except Exception as error:  # whatever a third-party package raises on import
            raise filter_error(point.name, error) from error
    return filters


def check_filters(filters: Any) -> Mapping[str, Filter] | Sequence[Filter]:
    """A caller's filters as a reusable collection: an iterator would be exhausted after the first picture.

    Raises K2Error if they are not callable.
    """
    if isinstance(filters, Iterable) and not isinstance(filters, str):
        found = dict(filters) if isinstance(filters, Mapping) else tuple(filters)
        if all(map(callable, found.values() if isinstance(found, dict) else found)):
            return found
    raise K2Error("Filters must be a list of functions.", hint="Like filters=[check].")


def filter_name(check: Filter) -> str:
    return getattr(check, "__name__", type(check).__name__)


def review(picture: Picture, filters: Mapping[str, Filter] | Iterable[Filter]) -> Picture:
    """The picture unchanged if every filter allows it; else a black one, whose record says which filter blocked it and
    why."""
    named = filters.items() if isinstance(filters, Mapping) else [(filter_name(check), check) for check in filters]
    for name, check in named:
        try:
            verdict = check(picture.image.copy(), picture.record)
        except Exception as error:  # a classifier's own errors; the picture stays unseen
            raise filter_error(name, error) from error
        if not isinstance(verdict, Verdict):
            raise filter_error(name, TypeError(f"it returned {type(verdict).__name__}, not a Verdict"))
        if not verdict.allowed:
            blocked = {"filter": name, "reason": verdict.reason or "no reason given"}
            return Picture(Image.new("RGB", picture.image.size), {**picture.record, "blocked": blocked})
    return picture


def filter_error(name: str, error: Exception) -> K2Error:
    return K2Error(
        f'The output filter "{name}" failed: {error or type(error).__name__}.',
        hint="No picture passes unchecked. Fix the filter, or uninstall the package that provides it.",
    )
