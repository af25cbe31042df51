"""`k2 render --stream`: prompts rendered as they come, for a program at the other end of the pipe."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import typer

from k2cli.console import result, show_error
from k2cli.options import as_problem, not_text, to_json
from k2cli.prompts import Prompt, typed
from model.errors import K2Error


def render_each(render: Callable[[Prompt], object], *, as_json: bool) -> int:
    """Render a prompt a line of standard input, each before the next is read -> how many lines went wrong.

    What is wrong with a line is told, as an object too where results are objects: whoever waits for them hears of it.
    """
    wrong = 0
    for line in lines():
        try:
            render(typed(line))
        except (K2Error, OSError) as error:
            problem = as_problem(error)
            if problem is None:
                raise
            show_error(problem)
            wrong += 1
            if as_json:
                result(to_json({"file": None, "error": str(problem), "hint": problem.hint, "prompt": {"text": line}}))
    return wrong


def lines() -> Iterator[str]:
    """Lines of standard input as they come; whoever sent one waits for an answer, be it empty. Raises K2Error where one
    is no text."""
    if sys.stdin.isatty():
        typer.echo("A prompt a line, rendered as it comes; Ctrl-D ends.", err=True)
    try:
        for line in sys.stdin:
            line.encode()  # in some locales Python keeps bytes that are no text
            yield line.strip().removeprefix("\ufeff")
    except UnicodeError:
        raise not_text() from None
