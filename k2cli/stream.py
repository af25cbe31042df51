"""`k2 render --stream`: prompts rendered as they come, for a program at the other end of the pipe."""

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

from k2cli.commands import as_problem
from k2cli.console import Unwritable, result, say, show_error, to_json
from k2cli.prompts import WORDS, Prompt, read_prompts, refuse_twins, typed
from k2cli.settings import FIELDS, HOMES, OF_PROMPT
from k2cli.several import Several
from k2cli.tables import Place, Toml, check_keys, check_numbers, check_value, describe
from model.errors import K2Error

OBJECT = re.compile(r'\{\s*"')  # how a line begins that is JSON, and no prompt with choices
OTHERWISE = re.compile(  # and how one looks that means objects, but is none of JSON alone on its line
    r"""[][{},\s]+$|\[\s*\{\s*["}]"""  # a list, or what is spread over lines
    r"""|"[^"|]*"\s*:\s*(?:".*"|-?\d[\d.e+-]*|[\[{]|true|false|null)[]},\s]*$"""  # a line of that, spelt as it may be
    r"""|\[?\s*\{\s*'[^'|]*'\s*:"""  # Python's; as a choice, {a: b|c: d} is a prompt's
    r"""|\[?\s*\{\s*\w+\s*:(?:\s*(?:"[^"]*"|'[^']*')\s*[,}]|[^|]*\}\s*\]?,?$)"""  # JavaScript's
)
PIECE = re.compile(r"""["'][^"'|]*["']\s*:""")  # how a line of what is spread begins
LIKE = '{"prompt": "a red fox", "seed": 4}'
KEYS = {"prompt": "text", "styles": "style"}  # what a line calls them, where it is not as [[prompt]] does
OF_ALL = "It is the same for all lines: {} on the command line."
ELSEWHERE = {  # hints for keys that are no line's
    **HOMES,
    **{key: OF_ALL.format(f"--{key.replace('_', '-')}") for key in (FIELDS.keys() & HOMES) - set(OF_PROMPT)},
    **dict.fromkeys(("variant", "turbo"), OF_ALL.format("--turbo")),
    **dict.fromkeys(("mu", "leak_guard", "vision_tiles", "vision_rows"), HOMES["mu"]),  # which no option says
    "seeds": "Say seed, and batch for more.",
}
KNOWN = (*KEYS, *(key for key in (*WORDS, *OF_PROMPT) if key not in KEYS.values()))


def render_each(render: Callable[[Prompt], object], *, as_json: bool) -> int:
    """Render a prompt a line of standard input, each before the next is read -> how many lines went wrong.

    What is wrong with a line is told, as an object too where results are objects: whoever waits for them hears of it.
    """
    wrong = 0
    for said in lines():
        line = said.decode(errors="replace").strip()  # as it is told where it is no text
        try:
            line = as_text(said).strip().removeprefix("\ufeff")
            render(asked_by(line))
        except Exception as error:
            problem = as_problem(error)
            if problem is None or isinstance(error, Unwritable):
                raise
            show_error(problem)
            wrong += 1
            if as_json:
                all_of = [*(problem.told if isinstance(problem, Several) else ()), problem]
                hints = dict.fromkeys(each.hint for each in all_of if each.hint)
                about = {"file": None, "error": "\n".join(map(str, all_of)), "hint": "\n".join(hints)}
                result(to_json({**about, "prompt": {"text": text_of(line)}}))
    return wrong


def text_of(line: str) -> str:
    """The prompt's text as a line says it; the line itself where none can be read in it."""
    with suppress(ValueError, RecursionError):
        said = json.loads(line) if OBJECT.match(line) else {}
        text = said.get("prompt", said.get("text"))
        if isinstance(text, str):
            text.encode()  # JSON may hold halves of characters
            return text
    return line


def asked_by(line: str, called: str = "The line") -> Prompt:
    """What a line asks for: a prompt, or a JSON object of what a [[prompt]] may say. Raises K2Error."""
    if not OBJECT.match(line):
        if means_objects(line):
            hint = f'One object a line, as jq -c and json.dumps write it: {LIKE}. Those of a list: jq -c ".[]".'
            raise K2Error(f"{called} is neither a prompt nor an object of JSON that holds one.", hint=hint)
        return typed(line)
    try:
        said = json.loads(line, object_pairs_hook=partial(read_object, called))
        check_numbers(said)
    except (ValueError, RecursionError) as error:
        raise K2Error(f"{called} is no JSON: {error}.", hint=f"Like {LIKE}.") from None
    for key, own in KEYS.items():
        if key in said and own in said:
            raise K2Error(f'{called}: "{key}" and "{own}" are the same.', hint="Keep the one or the other.")
    place = Place(Toml("", called))  # [[prompt]]'s own names are taken, too, and not advised
    check_keys({key: value for key, value in said.items() if key not in KEYS.values()}, KNOWN, place, ELSEWHERE)
    words, styles = (key if key in said else own for key, own in KEYS.items())  # as it says them
    for key, value in said.items():
        if isinstance(value, dict) and key != styles:
            raise K2Error(f'{called}: "{key}" cannot be an object.', hint=f"Like {LIKE}.")
    check_value(words, said.get(words, ""), str, {}, called)
    if not isinstance(weights := said.get(styles, {}), dict):
        hint = f'Like "{styles}": {{"dusk": 0.6}}.'
        raise K2Error(f'{called}: "{styles}" must be an object, not {describe(weights)}.', hint=hint)
    entry = {"text": ""} | {KEYS.get(key, key): value for key, value in said.items()}
    (prompt,) = read_prompts([entry], place)
    return replace(prompt, last=True)


def read_object(called: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, without what is null: so programs write what they leave out, k2 too. Raises K2Error where a
    key comes twice, of which JSON would let the last win."""
    table = dict(pairs)
    if len(table) < len(pairs):
        ((key, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise K2Error(f'{called}: the key "{key}" is there more than once.', hint="Keep one.")
    return {key: value for key, value in table.items() if value is not None}


def means_objects(line: str) -> bool:
    """Whether a line is JSON of another shape, a piece of some, or nearly JSON: a picture of its text is not meant."""
    if OTHERWISE.match(line):
        return True
    if PIECE.match(line):
        cut = line.rstrip("]}, ")  # what it closes may be another line's
        return any(readable("{" + said + "}") for said in (line.rstrip(", "), cut, cut + "}", cut + "]"))
    return line[:1] in ("{", "[") and readable(line)


def readable(text: str) -> bool:
    """Whether a text is an object or a list, of JSON or as Python writes them."""
    for read in (json.loads, ast.literal_eval):
        with suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd backslashes
            return isinstance(read(text), dict | list)
    return False


def lines() -> Iterator[bytes]:
    """Lines of standard input as they come; whoever sent one waits for an answer, be it empty, or no text."""
    if sys.stdin.isatty():
        say("A prompt a line, rendered as it comes; Ctrl-D ends.")
    yield from sys.stdin.buffer


def asked_for(texts: Sequence[str], *, stdin: bool) -> list[Prompt] | None:
    """Prompts of the command line and of standard input; None where neither was used."""
    prompts = [typed(text) for text in texts]
    if stdin:
        if sys.stdin.isatty():
            say("Prompts, one a line; Ctrl-D ends:")
        # the mark that some editors begin a text with comes again where such files are joined
        lines = (line.removeprefix("\ufeff").strip() for line in re.split(r"\r\n?|\n", read_input()))
        said = {number: asked_by(line, f"Line {number}") for number, line in enumerate(lines, 1) if line}
        if not (said or texts):
            raise K2Error("Standard input holds no prompt.", hint="Give one a line, or leave the - out.")
        refuse_twins((f"Line {number}", prompt) for number, prompt in said.items())
        prompts += said.values()
    return prompts if texts or stdin else None


def read_input() -> str:
    """All of standard input. Raises K2Error where it is no text."""
    return as_text(sys.stdin.buffer.read())


def as_text(said: bytes) -> str:
    """What came on standard input: UTF-8, as programs write it, else in the encoding here. Raises K2Error."""
    encoding = codecs.lookup(sys.stdin.encoding).name
    for each in ("utf-8", encoding):
        with suppress(UnicodeError):
            return said.decode(each)
    raise K2Error(f"Standard input is no text in the encoding here, {encoding}.", hint="Save it as UTF-8.")
