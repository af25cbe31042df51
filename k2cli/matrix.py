"""Many pictures from few words: choices in prompts, `a {red|blue} fox`, and [[matrix]] tables of settings.

Every choice and every cell is rendered with the same seeds, so that pictures differ only in what is compared, and in
the words that creativity adds, which depend on the prompt and its styles.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from k2cli.settings import FOREIGN_NAMES, MISPLACED, check_setting
from k2cli.sizes import parse_size
from k2cli.texts import check_line, nfc
from k2cli.toml_tables import WEIGHT, Option, Place, check_keys, check_value, dotted_name_hint, error_context
from model.errors import K2Error, nearest

MAX_PICTURES = 10_000  # pictures in a run
MAX_PROMPT_CHARS = 20_000  # characters of a prompt with all that its styles add
MAX_TOTAL_CHARS = 10_000_000  # characters of all readings of a project's prompts together
MAX_DEPTH = 32  # nested braces
AXES = (  # settings that can be compared, besides styles' weights
    *("seed", "size", "steps", "guidance", "guidance_until", "sampler"),
    *("creativity", "denoise"),
)
OPTION = Option("--matrix")
BRACES = re.compile(r"\\([{|}\\])|([{|}])")


@dataclass(frozen=True)
class Cell:
    """One combination: the settings that override all others, and its labels on a sheet."""

    styles: Mapping[str, float] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    row: str = ""
    caption: str = ""
    where: str = ""  # where its matrix was written, for messages


@dataclass(frozen=True)
class Matrix:
    """Axes in the order written; the last one runs along the rows of the sheet."""

    axes: Mapping[str, Sequence[Any]]  # "style.dusk", "seed", … -> its values
    prompts: Sequence[str] = ()  # names; all if empty
    where: str = OPTION  # where it was written, for messages

    def covers(self, prompt: str) -> bool:
        """Whether it compares the prompt of this name."""
        return not self.prompts or prompt in self.prompts

    def count(self, fixed: Collection[str] = ()) -> int:
        """The number of combinations."""
        return math.prod(len(values) for name, values in self.axes.items() if name not in fixed)

    def cells(self, fixed: Collection[str] = ()) -> list[Cell]:
        """Every combination, without axes that the command line has set. Raises K2Error past MAX_PICTURES."""
        if self.count(fixed) > MAX_PICTURES:
            raise K2Error(f"That is more than {MAX_PICTURES:,} pictures.", hint="Use fewer values or axes.")
        axes = {name: values for name, values in self.axes.items() if name not in fixed}
        return [make_cell(dict(zip(axes, values, strict=True)), self.where) for values in product(*axes.values())]


def fixed_axes(given: Iterable[str], styles: Iterable[str]) -> set[str]:
    """The axes with nothing left to compare once a command line has set these settings and styles."""
    return {"size" if key in ("aspect", "resolution") else key for key in given} | {f"style.{name}" for name in styles}


def make_cell(values: Mapping[str, Any], where: str) -> Cell:
    styles = {name.removeprefix("style."): value for name, value in values.items() if name.startswith("style.")}
    settings = {name: value for name, value in values.items() if name in AXES}
    labels = [f"{name.removeprefix('style.')} {value_text(value)}" for name, value in values.items()]
    return Cell(styles, settings, " · ".join(labels[:-1]), "".join(labels[-1:]), where)


def value_text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def read_matrices(entries: Any, place: Place, prompts: Collection[str]) -> tuple[Matrix, ...]:
    """The [[matrix]] tables; `prompts` are the names that they may choose from."""
    if not isinstance(entries, list):
        raise K2Error(f"{place('matrix')}: matrices are a list.", hint="Write [[matrix]], with two brackets.")
    found = []
    for index, table in enumerate(entries):
        at = place.below("matrix", index)
        check_keys(table, ("prompt", "style", *AXES), at, MISPLACED)
        axes: dict[str, Sequence[Any]] = {}
        for key, values in table.items():
            if key == "style":
                if not isinstance(values, dict):
                    raise K2Error(f"{at(key)}: expected a table of styles.", hint="Like style.dusk = [0, 0.5, 1].")
                axes |= {
                    f"style.{check_line(n, at(key))}": read_axis(f"style.{n}", each, at(key))
                    for n, each in values.items()
                }
            elif key != "prompt":
                axes[key] = read_axis(key, values, at(key))
        if not axes:
            raise K2Error(f"{at()}: the matrix compares nothing.", hint="Give it an axis, like seed = [1, 2, 3].")
        names = check_value("prompt", table.get("prompt", []), list[str], {}, at("prompt"))
        chosen = [*map(nfc, names)]  # as prompts' names are
        for name in chosen:
            if name not in prompts:
                raise K2Error(
                    f'{at("prompt")}: there is no prompt named "{name}".', hint=nearest(name, sorted(prompts))
                )
        found.append(Matrix(axes, chosen, at()))
    return tuple(found)


def read_axes(texts: Sequence[str]) -> Matrix:
    """ "style.dusk=0,0.5,1" and "seed=7,8" from a command line."""
    axes = {}
    with error_context(OPTION):
        for text in texts:
            key, equals, values = text.partition("=")
            key = key.strip()
            if key not in AXES and not (key.startswith("style.") and len(key) > len("style.")):
                hint = (
                    MISPLACED[key] if FOREIGN_NAMES.get(key, ("",))[0] in AXES else nearest(key, [*AXES, "style.NAME"])
                )
                raise K2Error(f'{OPTION}: "{check_line(key, OPTION)}" is not an axis.', hint=hint)
            if not equals:
                raise K2Error(f'{OPTION}: "{key}" has no values to compare.', hint=f"Like {key}=1,2.")
            axes[key] = read_axis(key, [parse_number(part.strip()) for part in values.split(",")], OPTION)
    return Matrix(axes)


def parse_number(text: str) -> Any:
    """A number if the text is one, whole if possible; else the text."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def read_axis(key: str, values: Any, where: str) -> list[Any]:
    """The values of one axis, each checked as the setting it stands for."""
    if not isinstance(values, list) or not values:
        hint = dotted_name_hint(key.removeprefix("style."), values) if key.startswith("style.") else ""
        hint = hint or f"Like {key} = [1, 2]."
        raise K2Error(f'{where}: "{key}" must be a list of values to compare.', hint=hint)
    if key.startswith("style."):
        checked = [check_value(key, value, float, WEIGHT, where) for value in values]
    else:
        checked = [check_setting(key, value, where) for value in values]
    if len(set(checked)) < len(checked):
        raise K2Error(f'{where}: "{key}" lists a value twice.', hint="Once is enough.")
    if key == "size":
        for value in checked:
            parse_size(value, where)
    return checked


def text_readings(text: str) -> list[tuple[str, tuple[str, ...]]]:
    r"""Every reading of a prompt with choices, and what was chosen in it; the first choice varies slowest.

    `a {red|blue} fox` is two prompts. Choices nest, and may be empty. Braces without a | between them are literal, and
    so are \{ and \}. Raises K2Error if there are more than MAX_PICTURES, or too long.
    """
    if len(text) > MAX_PROMPT_CHARS:
        raise K2Error(f"A prompt is longer than {MAX_PROMPT_CHARS:,} characters: {text[:40]}…", hint="Shorten it.")
    parts = parse_choices(text)
    count = count_readings(parts)
    if count > MAX_PICTURES:
        amount = f"{count:,}" if count < 10**9 else "billions of"
        raise K2Error(
            f"A prompt with choices makes {amount} prompts; the limit is {MAX_PICTURES:,}.", hint="Use fewer."
        )
    if count * len(text) > MAX_TOTAL_CHARS:
        raise K2Error(f"A prompt with choices adds up to {count * len(text):,} characters.", hint="Shorten it.")
    return [(" ".join(said.split()), chosen) for said, chosen in readings(parts)]


def escape_braces(text: str) -> str:
    """A text escaped so that `text_readings` reads it literally."""
    return re.sub(r"([{|}\\])", r"\\\1", text)


def parse_choices(text: str) -> list[Any]:
    """A prompt as parts: texts, and lists of alternatives, each of which is again a list of parts."""
    stack: list[list[list[Any]]] = [[[]]]  # for every open brace, the alternatives so far
    end = 0
    for match in BRACES.finditer(text):
        stack[-1][-1].append(text[end : match.start()])
        end = match.end()
        if match[2] == "{":
            if len(stack) > MAX_DEPTH:
                raise K2Error(f"A prompt has more than {MAX_DEPTH} nested braces.", hint="Close some of them.")
            stack.append([[]])
        elif match[2] == "|" and len(stack) > 1:
            stack[-1].append([])
        elif match[2] == "}" and len(stack) > 1:
            found = stack.pop()
            stack[-1][-1] += [found] if len(found) > 1 else ["{", *found[0], "}"]
        else:
            stack[-1][-1].append(match[1] or match[2])
    stack[-1][-1].append(text[end:])
    while len(stack) > 1:  # an unclosed brace is literal
        found = stack.pop()
        stack[-1][-1] += ["{", *found[0], *(part for more in found[1:] for part in ("|", *more))]
    return stack[0][0]


def count_readings(parts: Sequence[Any]) -> int:
    """The number of readings of a prompt's parts, without expanding them."""
    return math.prod(sum(map(count_readings, part)) for part in parts if not isinstance(part, str))


def readings(parts: Sequence[Any]) -> list[tuple[str, tuple[str, ...]]]:
    """The readings themselves, each with what was chosen in it; nested choices are part of the outer one."""
    found: list[tuple[str, tuple[str, ...]]] = [("", ())]
    for part in parts:
        if isinstance(part, str):
            found = [(said + part, chosen) for said, chosen in found]
        else:
            more = [said for alternative in part for said, _ in readings(alternative)]
            found = [(said + each, (*chosen, each)) for said, chosen in found for each in more]
    return found
