"""Prompt syntax that k2 reads as plain words: other tools' notation, and choices that lack a brace. Found, and reported
with what to use instead."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache

from k2cli.settings import FOREIGN_NAMES, FOREIGN_OPTIONS, PROMPT_KEYS
from model.errors import listed

WEIGHED = "words have no weights, styles do: --style NAME=0.6"
CHOSEN = "{a|b} makes a prompt of each, without weights"
TOLD = 3  # at most, of the signs that mean the same
TAGS = ("HD", "OC", "CGI", "DOF", "FHD", "HDR", "QHD", "RAW", "SFW", "UHD", "VFX", "DSLR", "NSFW")  # beside 8K and 3D
UNSHOUTED = "|".join((r"(?:(?<![A-Z] )|(?<=\d[A-Z] )", *(rf"(?<=\b{tag} )" for tag in TAGS))) + ")"
LONGEST = 40  # characters shown of one

SIGNS = {  # pattern: what to use in k2
    r"<(?:lora|lyco|hypernet):[^<>]{1,200}>": "a style can name a LoRA: lora, in styles/NAME.toml",
    r"\bembedding:\w{1,60}": "k2 has no embeddings, but a style can name a LoRA",
    r"(?<![\"“'`])__[\w/*-]{1,60}__": "choices go in braces: {red|green}",
    r"\$\{\w{1,60}\}?": "k2 has no variables, but has choices in braces: {red|green}",
    r"(?<![\w.])\d{1,3}(?:-\d{1,3})?\$\$": CHOSEN,
    r"(?<![\w.])\d{0,3}\.?\d{1,3}::": CHOSEN,
    r"\b\w{1,60}::(?=\s|$|-?\d)(?:-?\d{0,3}\.?\d{1,3})?": WEIGHED,
    r"\\\([^()]{0,200}\\?\)": "brackets are plain text and need no backslash",
    r"\({2}[^()]{1,200}\){2}": WEIGHED,
    r"\([^()]{1,200}(?:(?<!\d):\d|:\s?\d?\.\d{1,3})\)": WEIGHED,
    r"(?:\b(?![Nn]otepad\+)\w{2,60}|\([^()]{1,200}\))\+{2,9}": WEIGHED,
    r"\[[^\[\]|:]{0,200}(?::[^\[\]|:]{0,200}){1,2}:\d{0,3}\.?\d{1,3}\]": "words cannot change between steps",
    r"\[[^\[\]|]{0,200}:\d?\.?\d{1,3}\]": WEIGHED,
    r"\[[^\[\]|]{1,200}\|[^\[\]]{1,200}\]": "choices go in braces: {red|green}",
    r"(?<![\"“'])\[(?!sic\])[^\W\d][^\[\]\"”]{0,200}\]": WEIGHED,  # an editor's [sic], a shop's "[open]"
    # not capitals for emphasis: BREAK THE RULES, TEA BREAK; but HDR BREAK a hill
    rf"(?<![\w\"“'‘]){UNSHOUTED}BREAK(?![\w\"”'’!]|\s+[A-Z]{{2}})": "a prompt is read as a whole",
    r"(?<=[^A-Z\"] )AND(?= (?![A-Z]{2}))": "a prompt is read as a whole",  # nor a shop's SALT AND PEPPER
}
OPTION = re.compile(r"(?<!\S)(?:--|—(?=ar\b))([a-z_-]{1,20})(?![\w-])(?:[ =](?!--|—)[^\s,]{1,60})?")
ANY = re.compile("|".join(f"({sign})" for sign in SIGNS))


@lru_cache(maxsize=1000)  # many pictures have the same
def signs_of(text: str) -> dict[str, str]:
    """The notation of other tools in a prompt, and what to use in k2."""
    advice = list(SIGNS.values())
    found = {short(sign[0]): advice[(sign.lastindex or 0) - 1] for sign in ANY.finditer(text)}
    for option in OPTION.finditer(text):
        key = option[1].replace("-", "_")
        ours, how = (key, "") if key in PROMPT_KEYS else FOREIGN_NAMES.get(key, ("", ""))
        if ours:
            found[short(option[0])] = f"--{ours.replace('_', '-')} goes after the prompt{how}"
        elif key in FOREIGN_OPTIONS:
            found[short(option[0])] = FOREIGN_OPTIONS[key].rstrip(".")
    if "|" in text and (brace := unpaired(text)):
        found[brace] = "choices need two braces: {red|green}"
    return found


def unpaired(text: str) -> str:
    """The first unmatched brace of a text, closing ones first; "" if all are in pairs."""
    left = 0
    for brace in re.findall(r"[{}]", text):
        left += 1 if brace == "{" else -1
        if left < 0:
            return "}"
    return "{" if left else ""


def short(sign: str) -> str:
    return sign if len(sign) <= LONGEST else f"{sign[:LONGEST]}…"


def read_as_words(texts: Iterable[str]) -> str:
    """A sentence on the notation of other tools in these texts; "" if there is none."""
    found: dict[str, dict[str, None]] = {}
    for text in dict.fromkeys(texts):
        for sign, advice in signs_of(text).items():
            found.setdefault(advice, {})[sign] = None
    told = "; ".join(f"{listed(list(signs), TOLD)} ({advice})" for advice, signs in found.items())
    return told and f"Read as words: {told}."
