"""A project's prompts: read, expanded into one for each choice, and given names that work as file names."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from k2cli.matrix import MAX_PICTURES, MAX_TOTAL_CHARS, Cell, Matrix, fixed_axes, text_readings
from k2cli.settings import MISPLACED, NONE, PROMPT_KEYS, check_setting, check_size_keys
from k2cli.sizes import parse_size
from k2cli.texts import as_name, check_line, check_name, is_combining
from k2cli.toml_tables import NO_KEY, Place, check_keys, error_context, read_table, read_weights
from model.errors import K2Error

MAX_STEM = 50  # characters of a name made from a prompt's choices
MAX_PROMPTS = 20_000  # of a project
EMPTY_PROMPT_HINT = "Say what the picture should show."


@dataclass(frozen=True)
class Prompt:
    """One [[prompt]]: what to show, and its own settings, which override [render] and [style]."""

    text: str
    name: str = ""
    avoid: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict, metadata=NO_KEY)  # of PROMPT_KEYS
    style: Mapping[str, float] = field(default_factory=dict, metadata=NO_KEY)
    place: Place | None = field(default=None, metadata=NO_KEY)  # of its table
    base: str = field(default="", metadata=NO_KEY)  # the prompt it is a reading of, if another
    restored: Mapping[str, Any] = field(default_factory=dict, metadata=NO_KEY)  # [render]'s again, despite --like
    overrides_options: bool = field(default=False, metadata=NO_KEY)  # as it was given after the command line

    def where(self, *path: str) -> str:
        """Where one of its keys was written, for messages."""
        return f'"{self.name or self.text}"' if self.place is None else self.place.below(*path)()


TEXT_KEYS = tuple(f.name for f in fields(Prompt) if f.metadata.get("key", True))


def typed_prompt(text: str) -> Prompt:
    """A prompt from the command line, or from a line of standard input."""
    line = check_line(text, "A prompt")
    if not line:
        raise K2Error("A prompt is empty.", hint=EMPTY_PROMPT_HINT)
    return Prompt(line)


def read_prompts(entries: Any, place: Place) -> tuple[Prompt, ...]:
    """The [[prompt]] tables, checked: each has a text, and its name is unique and works as a file name."""
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise K2Error(f"{place('prompt')}: prompts are a list of tables.", hint="Write [[prompt]], with two brackets.")
    if len(entries) > MAX_PROMPTS:
        raise K2Error(
            f"{place('prompt')}: more than {MAX_PROMPTS:,} prompts.", hint="Split them into several projects."
        )
    prompts: list[Prompt] = []
    for index, entry in enumerate(entries):
        at = place.below("prompt", index)
        check_keys(entry, (*TEXT_KEYS, *PROMPT_KEYS, "style"), at, MISPLACED)
        prompt = replace(
            read_table(Prompt, {key: entry[key] for key in TEXT_KEYS if key in entry}, at),
            settings={key: check_setting(key, entry[key], at(key)) for key in PROMPT_KEYS if key in entry},
            style=read_weights(entry.get("style", {}), at.below("style")),
            place=at,
        )
        if not prompt.text:
            raise K2Error(f"{at('text')}: the prompt is empty.", hint=EMPTY_PROMPT_HINT)
        check_size_keys(prompt.settings, at)
        if "size" in prompt.settings:
            parse_size(prompt.settings["size"], at("size"))
        if prompt.settings.get("init_image") == NONE and prompt.settings.get("mask", NONE) != NONE:
            raise K2Error(f"{at('mask')}: there is no init_image to mask.", hint="Name one, or drop the mask.")
        if prompt.name:
            prompt = replace(prompt, name=check_name(prompt.name, at("name")))
        prompts.append(prompt)
    check_unique_names((place.below("prompt", index)("name"), prompt) for index, prompt in enumerate(prompts))
    return tuple(prompts)


def check_unique_names(prompts: Iterable[tuple[str, Prompt]]) -> None:
    """Raises K2Error if two prompts have the same name but for capitals, which some disks ignore. Each comes with its
    place for messages."""
    taken: dict[str, str] = {}  # name without capitals -> as written
    for where, name in ((where, prompt.name) for where, prompt in prompts if prompt.name):
        if other := taken.get(name.casefold()):
            raise K2Error(f'{where}: another prompt is named "{other}".', hint="Give each its own name.")
        taken[name.casefold()] = name


def prompt_readings(prompts: Sequence[Prompt]) -> list[tuple[Prompt, str]]:
    """Every reading of every prompt, named like its files, and the name of the prompt it comes from.

    A given name precedes the choice: fox, with {red|blue} in its text, becomes fox-red and fox-blue.
    """
    found, known, count, chars = [], [], 0, 0
    last: dict[str, int] = {}
    for prompt, base in name_files(prompts):
        known.append((prompt, base, text_readings(prompt.text)))
        count += len(known[-1][2])
        chars += len(known[-1][2]) * len(prompt.text)
        if count > MAX_PROMPTS:
            raise K2Error(f"With their choices these are more than {MAX_PROMPTS:,} prompts.", hint="Use fewer.")
        if chars > MAX_TOTAL_CHARS:
            raise K2Error(f"The prompts add up to more than {MAX_TOTAL_CHARS:,} characters.", hint="Use fewer.")
    taken = {base.casefold() for _, base, read in known if not read[0][1]}
    for prompt, base, read in known:
        for text, chosen in read:
            if not text:
                raise K2Error(f'A reading of "{prompt.text}" is empty.', hint="Write a word outside the choices.")
            name = base
            if chosen:
                name = f"{prompt.name}-{slug(' '.join(chosen))}" if prompt.name else slug(text)
                name = free_name(name[:MAX_STEM].strip("-"), taken, last)
            found.append((replace(prompt, text=text, name=name), prompt.base or base))
    return found


def matrix_cells(
    readings: Sequence[tuple[Prompt, str]], matrices: Sequence[Matrix], fixed: Collection[str]
) -> Iterator[tuple[Prompt, list[tuple[str, Cell]]]]:
    """Matrix by matrix, every reading that it compares, with its cells and a name for each cell.

    fixed  axes that the command line has already set, which leaves nothing to compare; the same holds for what a
           prompt sets that overrides the command line
    """

    def all_fixed(prompt: Prompt) -> set[str]:
        return {*fixed, *(fixed_axes(prompt.settings, prompt.style) if prompt.overrides_options else ())}

    totals: Counter[str] = Counter()
    for matrix in matrices:
        for prompt, base in readings:
            if matrix.covers(base):
                totals[prompt.name[:MAX_STEM]] += matrix.count(all_fixed(prompt))
    max_number = min(MAX_PICTURES, max(totals.values(), default=0))
    numbers: Counter[str] = Counter()
    for matrix in matrices:
        for prompt, base in readings:
            if matrix.covers(base):
                prompt_fixed = all_fixed(prompt)
                if "batch" in prompt_fixed and "seed" in matrix.axes.keys() - prompt_fixed:
                    with error_context(matrix.where) as at:
                        raise K2Error(f"{at} lists the seeds, so a batch has no effect.", hint="Omit the batch.")
                cells = matrix.cells(prompt_fixed)
                first = numbers[prompt.name[:MAX_STEM]] + 1
                numbers[prompt.name[:MAX_STEM]] += len(cells)
                yield (
                    prompt,
                    [(numbered(prompt.name, number, max_number), cell) for number, cell in enumerate(cells, first)],
                )


def name_files(prompts: Sequence[Prompt]) -> list[tuple[Prompt, str]]:
    """Every prompt with its file-name stem: its name, or one made from its text, numbered if two would be alike."""
    taken = {prompt.name.casefold() for prompt in prompts}
    last: dict[str, int] = {}
    return [(prompt, prompt.name or free_name(slug(prompt.text), taken, last)) for prompt in prompts]


def free_name(stem: str, taken: set[str], last: dict[str, int]) -> str:
    """The stem, numbered if a prompt has that name already; the result is added to `taken`.

    taken  the names in use, without capitals
    last   stem -> the last number used
    """
    name, number = stem, last.get(stem, 1)
    while name.casefold() in taken:
        number += 1
        name = f"{stem}-{number}"
    taken.add(name.casefold())
    last[stem] = number
    return name


def numbered(name: str, number: int, max_number: int) -> str:
    """The name of a picture among at most `max_number` that are compared: files sort in the order of their numbers."""
    return f"{name[:MAX_STEM]}-{number:0{max(2, len(str(max_number)))}}"


def prompt_name(name: str, caption: str) -> str:
    """The name of a picture's prompt, from the name in its record; in a comparison, which has a caption, that ends in
    a number."""
    return re.sub(r"-\d+$", "", name) if caption else name


def slug(text: str) -> str:
    """A file-name stem made from a prompt; a long one is cut between words, or within a word that is too long."""
    name, end = as_name(text.casefold()).strip("-_"), 40
    while is_combining(name[end : end + 1] or "-"):
        end -= 1
    return (name if len(name) <= 40 else name[:end].rsplit("-", 1)[0]) or "prompt"
