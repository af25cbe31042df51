"""Prompt syntax that k2 reads as plain words: other tools' notation, and choices that lack a brace. Found, and reported
with what to use instead."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache

from k2cli.settings import FOREIGN_NAMES, FOREIGN_OPTIONS, PROMPT_KEYS
from model.errors import listed

NO_WEIGHTS = "words have no weights, styles do: --style NAME=0.6"
USE_CHOICES = "{a|b} makes a prompt of each, without weights"
MAX_EXAMPLES = 3  # at most, of the signs that mean the same
# beside 8K and 3D
CAPITAL_TAGS = ("HD", "OC", "CGI", "DOF", "FHD", "HDR", "QHD", "RAW", "SFW", "UHD", "VFX", "DSLR", "NSFW")
NOT_SHOUTED = "|".join((r"(?:(?<![A-Z] )|(?<=\d[A-Z] )", *(rf"(?<=\b{tag} )" for tag in CAPITAL_TAGS))) + ")"
MAX_SHOWN = 40  # characters shown of one

PATTERNS = {  # pattern: what to use in k2
    r"<(?:lora|lyco|hypernet):[^<>]{1,200}>": "a style can name a LoRA: lora, in styles/NAME.toml",
    r"\bembedding:\w{1,60}": "k2 has no embeddings, but a style can name a LoRA",
    r"(?<![\"“'`])__[\w/*-]{1,60}__": "choices go in braces: {red|green}",
    r"\$\{\w{1,60}\}?": "k2 has no variables, but has choices in braces: {red|green}",
    r"(?<![\w.])\d{1,3}(?:-\d{1,3})?\$\$": USE_CHOICES,
    r"(?<![\w.])\d{0,3}\.?\d{1,3}::": USE_CHOICES,
    r"\b\w{1,60}::(?=\s|$|-?\d)(?:-?\d{0,3}\.?\d{1,3})?": NO_WEIGHTS,
    r"\\\([^()]{0,200}\\?\)": "brackets are plain text and need no backslash",
    r"\({2}[^()]{1,200}\){2}": NO_WEIGHTS,
    r"\([^()]{1,200}(?:(?<!\d):\d|:\s?\d?\.\d{1,3})\)": NO_WEIGHTS,
    r"(?:\b(?![Nn]otepad\+)\w{2,60}|\([^()]{1,200}\))\+{2,9}": NO_WEIGHTS,
    r"\[[^\[\]|:]{0,200}(?::[^\[\]|:]{0,200}){1,2}:\d{0,3}\.?\d{1,3}\]": "words cannot change between steps",
    r"\[[^\[\]|]{0,200}:\d?\.?\d{1,3}\]": NO_WEIGHTS,
    r"\[[^\[\]|]{1,200}\|[^\[\]]{1,200}\]": "choices go in braces: {red|green}",
    r"(?<![\"“'])\[(?!sic\])[^\W\d][^\[\]\"”]{0,200}\]": NO_WEIGHTS,  # an editor's [sic], a shop's "[open]"
    # not capitals for emphasis: BREAK THE RULES, TEA BREAK; but HDR BREAK a hill
    rf"(?<![\w\"“'‘]){NOT_SHOUTED}BREAK(?![\w\"”'’!]|\s+[A-Z]{{2}})": "a prompt is read as a whole",
    r"(?<=[^A-Z\"] )AND(?= (?![A-Z]{2}))": "a prompt is read as a whole",  # nor a shop's SALT AND PEPPER
}
TYPED_OPTION = re.compile(r"(?<!\S)(?:--|—(?=ar\b))([a-z_-]{1,20})(?![\w-])(?:[ =](?!--|—)[^\s,]{1,60})?")
ANY_PATTERN = re.compile("|".join(f"({sign})" for sign in PATTERNS))


@lru_cache(maxsize=1000)  # many pictures have the same
def find_syntax(text: str) -> dict[str, str]:
    """The notation of other tools in a prompt, and what to use in k2."""
    advice = list(PATTERNS.values())
    found = {shorten(sign[0]): advice[(sign.lastindex or 0) - 1] for sign in ANY_PATTERN.finditer(text)}
    for option in TYPED_OPTION.finditer(text):
        key = option[1].replace("-", "_")
        ours, how = (key, "") if key in PROMPT_KEYS else FOREIGN_NAMES.get(key, ("", ""))
        if ours:
            found[shorten(option[0])] = f"--{ours.replace('_', '-')} goes after the prompt{how}"
        elif key in FOREIGN_OPTIONS:
            found[shorten(option[0])] = FOREIGN_OPTIONS[key].rstrip(".")
    if "|" in text and (brace := unpaired_brace(text)):
        found[brace] = "choices need two braces: {red|green}"
    return found


def unpaired_brace(text: str) -> str:
    """The first unmatched brace of a text, closing ones first; "" if all are in pairs."""
    depth = 0
    for brace in re.findall(r"[{}]", text):
        depth += 1 if brace == "{" else -1
        if depth < 0:
            return "}"
    return "{" if depth else ""


def shorten(sign: str) -> str:
    return sign if len(sign) <= MAX_SHOWN else f"{sign[:MAX_SHOWN]}…"


def foreign_syntax_warning(texts: Iterable[str]) -> str:
    """A sentence on the notation of other tools in these texts; "" if there is none."""
    found: dict[str, dict[str, None]] = {}
    for text in dict.fromkeys(texts):
        for sign, advice in find_syntax(text).items():
            found.setdefault(advice, {})[sign] = None
    told = "; ".join(f"{listed(list(signs), MAX_EXAMPLES)} ({advice})" for advice, signs in found.items())
    return told and f"Read as words: {told}."
