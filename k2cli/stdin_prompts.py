"""`k2 render --stream`: prompts rendered as they arrive, for a program at the other end of the pipe."""

from __future__ import annotations

import ast
import codecs
import json
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

from k2cli.commands import as_user_error
from k2cli.console import Unwritable, print_result, say, show_error, to_json
from k2cli.multi_project import MultipleErrors
from k2cli.prompts import TEXT_KEYS, Prompt, check_unique_names, read_prompts, typed_prompt
from k2cli.settings import FIELDS, MISPLACED, PROMPT_KEYS
from k2cli.toml_tables import Place, Toml, check_integers, check_keys, check_value, describe_value
from model.errors import K2Error

JSON_OBJECT = re.compile(r'\{\s*"')  # start of a line that is JSON, not a prompt with choices
OTHER_JSON = re.compile(  # a line that means objects, but is not one JSON object on its own line
    r"""[][{},\s]+$|\[\s*\{\s*["}]"""  # a list, or an object spread over lines
    r"""|"[^"|]*"\s*:\s*(?:".*"|-?\d[\d.e+-]*|[\[{]|true|false|null)[]},\s]*$"""  # a line of such an object
    r"""|\[?\s*\{\s*'[^'|]*'\s*:"""  # Python's; but {a: b|c: d} is a prompt's choice
    r"""|\[?\s*\{\s*\w+\s*:(?:\s*(?:"[^"]*"|'[^']*')\s*[,}]|[^|]*\}\s*\]?,?$)"""  # JavaScript's
)
JSON_PIECE = re.compile(r"""["'][^"'|]*["']\s*:""")  # start of a line of an object spread over lines
EXAMPLE = '{"prompt": "a red fox", "seed": 4}'
KEY_ALIASES = {"prompt": "text", "styles": "style"}  # a line's names for keys that differ from [[prompt]]'s
WHOLE_STREAM = "It applies to all lines: set {} on the command line."
MISPLACED = {  # hints for keys that a line cannot have
    **MISPLACED,
    **{
        key: WHOLE_STREAM.format(f"--{key.replace('_', '-')}") for key in (FIELDS.keys() & MISPLACED) - set(PROMPT_KEYS)
    },
    **dict.fromkeys(("variant", "turbo"), WHOLE_STREAM.format("--turbo")),
    **dict.fromkeys(("mu", "leak_guard", "vision_tiles", "vision_rows"), MISPLACED["mu"]),  # which have no option
    "seeds": "Write seed, and batch for more.",
}
KNOWN_KEYS = (*KEY_ALIASES, *(key for key in (*TEXT_KEYS, *PROMPT_KEYS) if key not in KEY_ALIASES.values()))


def render_lines(render: Callable[[Prompt], object], *, as_json: bool) -> int:
    """Render a prompt per line of standard input, each before the next is read -> how many lines failed.

    A line's error is shown and, if results are objects, also printed as one, for the program that waits for them.
    """
    failed = 0
    for raw in input_lines():
        line = raw.decode(errors="replace").strip()  # for messages, if it is not text
        try:
            line = decode(raw).strip().removeprefix("\ufeff")
            render(parse_line(line))
        except Exception as error:
            problem = as_user_error(error)
            if problem is None or isinstance(error, Unwritable):
                raise
            show_error(problem)
            failed += 1
            if as_json:
                errors = [*(problem.shown if isinstance(problem, MultipleErrors) else ()), problem]
                hints = dict.fromkeys(each.hint for each in errors if each.hint)
                about = {"file": None, "error": "\n".join(map(str, errors)), "hint": "\n".join(hints)}
                print_result(to_json({**about, "prompt": {"text": prompt_text(line)}}))
    return failed


def prompt_text(line: str) -> str:
    """The prompt's text in a line; the line itself if none can be read in it."""
    with suppress(ValueError, RecursionError):
        table = json.loads(line) if JSON_OBJECT.match(line) else {}
        text = table.get("prompt", table.get("text"))
        if isinstance(text, str):
            text.encode()  # JSON may hold lone surrogates
            return text
    return line


def parse_line(line: str, label: str = "The line") -> Prompt:
    """The prompt that a line gives, as text or as a JSON object with the keys of a [[prompt]]. Raises K2Error."""
    if not JSON_OBJECT.match(line):
        if looks_like_json(line):
            hint = f'One object per line, as jq -c and json.dumps write it: {EXAMPLE}. To split a list: jq -c ".[]".'
            raise K2Error(f"{label} is neither a prompt nor a JSON object that holds one.", hint=hint)
        return typed_prompt(line)
    try:
        table = json.loads(line, object_pairs_hook=partial(read_object, label))
        check_integers(table)
    except (ValueError, RecursionError) as error:
        raise K2Error(f"{label} is not JSON: {error}.", hint=f"Like {EXAMPLE}.") from None
    for key, own in KEY_ALIASES.items():
        if key in table and own in table:
            raise K2Error(f'{label}: "{key}" and "{own}" are the same.', hint="Keep one.")
    place = Place(Toml("", label))  # [[prompt]]'s own names are accepted, too, but not suggested
    check_keys(
        {key: value for key, value in table.items() if key not in KEY_ALIASES.values()}, KNOWN_KEYS, place, MISPLACED
    )
    text_key, style_key = (key if key in table else own for key, own in KEY_ALIASES.items())  # as the line names them
    for key, value in table.items():
        if isinstance(value, dict) and key != style_key:
            raise K2Error(f'{label}: "{key}" cannot be an object.', hint=f"Like {EXAMPLE}.")
    check_value(text_key, table.get(text_key, ""), str, {}, label)
    if not isinstance(weights := table.get(style_key, {}), dict):
        hint = f'Like "{style_key}": {{"dusk": 0.6}}.'
        raise K2Error(f'{label}: "{style_key}" must be an object, not {describe_value(weights)}.', hint=hint)
    entry = {"text": ""} | {KEY_ALIASES.get(key, key): value for key, value in table.items()}
    (prompt,) = read_prompts([entry], place)
    return replace(prompt, overrides_options=True)


def read_object(label: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object without nulls, which programs, k2 included, write for omitted keys. Raises K2Error if a key occurs
    twice, where JSON would let the last win."""
    table = dict(pairs)
    if len(table) < len(pairs):
        ((key, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise K2Error(f'{label}: the key "{key}" appears more than once.', hint="Keep one.")
    return {key: value for key, value in table.items() if value is not None}


def looks_like_json(line: str) -> bool:
    """Whether a line is JSON of another shape, part of some, or nearly JSON, so that it is not meant as a prompt."""
    if OTHER_JSON.match(line):
        return True
    if JSON_PIECE.match(line):
        cut = line.rstrip("]}, ")  # its closing brackets may belong to an earlier line
        return any(is_json("{" + said + "}") for said in (line.rstrip(", "), cut, cut + "}", cut + "]"))
    return line[:1] in ("{", "[") and is_json(line)


def is_json(text: str) -> bool:
    """Whether a text is an object or a list, in JSON or Python syntax."""
    for parse in (json.loads, ast.literal_eval):
        with suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd backslashes
            return isinstance(parse(text), dict | list)
    return False


def input_lines() -> Iterator[bytes]:
    """Lines of standard input as they arrive, even empty or undecodable ones: the sender waits for an answer."""
    if sys.stdin.isatty():
        say("One prompt per line, rendered as it arrives; Ctrl-D ends.")
    yield from sys.stdin.buffer


def prompts_given(texts: Sequence[str], *, stdin: bool) -> list[Prompt] | None:
    """Prompts from the command line and standard input; None if neither was used."""
    prompts = [typed_prompt(text) for text in texts]
    if stdin:
        if sys.stdin.isatty():
            say("Prompts, one per line; Ctrl-D ends:")
        # the byte order mark that some editors write also appears inside, where such files are joined
        lines = (line.removeprefix("\ufeff").strip() for line in re.split(r"\r\n?|\n", read_input()))
        parsed = {number: parse_line(line, f"Line {number}") for number, line in enumerate(lines, 1) if line}
        if not (parsed or texts):
            raise K2Error("Standard input holds no prompt.", hint="Give one per line, or omit the -.")
        check_unique_names((f"Line {number}", prompt) for number, prompt in parsed.items())
        prompts += parsed.values()
    return prompts if texts or stdin else None


def read_input() -> str:
    """All of standard input. Raises K2Error if it is not text."""
    return decode(sys.stdin.buffer.read())


def decode(data: bytes) -> str:
    """Standard input decoded as UTF-8, which programs write, or else in the encoding here. Raises K2Error."""
    encoding = codecs.lookup(sys.stdin.encoding).name
    for each in ("utf-8", encoding):
        with suppress(UnicodeError):
            return data.decode(each)
    raise K2Error(f"Standard input is not text in the encoding here, {encoding}.", hint="Save it as UTF-8.")
