"""Creativity: how far to expand a prompt beyond what it says.

Words for looks and settings that the model knows are appended to the prompt, which itself stays as written. What the
prompt, a style or an avoid has already decided is left alone. Torch-free and a pure function of its arguments, so that
a plan can show what a run will do.
"""

from __future__ import annotations

import hashlib
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

LEVELS = {"raw": 0, "low": 1, "medium": 2, "high": 3}  # level -> how many slots it fills
LOOK_SLOTS = ("drawing", "medium")  # the slots that a style's pictures or LoRA already fill
SLOTS = ("ground", *LOOK_SLOTS)  # in the order in which they are appended
MAX_CHARS = 600  # characters that a language model's expansion may have
STOP_WORDS = frozenset((  # words that say nothing about a look
    "a", "an", "the", "of", "on", "in", "at", "with", "and", "or", "its", "his", "her", "their", "to", "by", "from",
    "for",
))  # fmt: skip


@cache
def look_words() -> Mapping[str, Any]:
    """`looks.toml`: the look words by slot, and the words by which a prompt itself fills a slot."""
    return tomllib.loads(Path(__file__).with_name("looks.toml").read_text("utf-8"))


def expand(
    prompt: str, level: str, seed: int, *, styles: Sequence[str] = (), avoids: Sequence[str] = (), look: bool = False
) -> str:
    """The prompt plus words for what it leaves open, the same for the same arguments; "raw" is the prompt itself.

    level   one of LEVELS: low adds a setting, medium a manner of drawing or a medium, high both
    seed    of the picture; choices depend only on prompt and seed, so a higher level keeps a lower one's, except that
            it drops the setting if the medium it adds has its own background
    styles  words that join the prompt anyway: what they name is decided
    avoids  words that are never added, nor others with the same meaning
    look    whether a style's pictures or LoRA decide drawing and medium
    """
    if not (count := LEVELS[level]):
        return prompt
    words = look_words()
    decided = {slot for slot, names in words["named"].items() if mention_any([prompt, *styles], names)}
    if look:
        decided.update(LOOK_SLOTS)
    # a plain prompt varies in both drawing and medium: "medium" would vary less than "raw" if it only added drawings
    order = LOOK_SLOTS if pick(LOOK_SLOTS, "look", prompt, seed) == LOOK_SLOTS[0] else LOOK_SLOTS[::-1]
    added: dict[str, str] = {}
    for slot in order:
        if len(added) < count - 1 and slot not in decided and (choices := allowed_looks(slot, decided, avoids)):
            name = pick(sorted(choices), slot, prompt, seed)
            added[slot] = pick(choices[name], f"{slot} words", prompt, seed)
            if name in words["own_ground"]["media"]:
                decided.add("ground")
    if "ground" not in decided and (setting := pick_ground(prompt, seed, decided, avoids)):
        added["ground"] = setting
    return ", ".join([prompt, *(added[slot] for slot in SLOTS if slot in added)])


def allowed_looks(slot: str, decided: set[str], avoids: Sequence[str]) -> dict[str, list[str]]:
    """The looks of a slot, each with its words, that may be added unasked, given what is decided."""
    words = look_words()
    left_out = set(words["asked_only"][slot])
    if slot == "medium" and {"ground", "colour"} & decided:  # theirs is black
        left_out |= set(words["own_ground"]["media"])
    return {
        name: phrases for name, phrases in words[slot].items() if name not in left_out and not clash(phrases, avoids)
    }


def pick_ground(prompt: str, seed: int, decided: set[str], avoids: Sequence[str]) -> str:
    """A setting for a prompt that names none, with a colour if the prompt names none; "" if all are avoided."""
    words = look_words()
    colours = [name for name in sorted(words["palette"]) if not clash([name], avoids)]
    plain = "colour" in decided or not colours
    settings = [words["ground"][name][plain] for name in sorted(words["ground"])]
    settings = [each for each in settings if not clash([each.replace("{}", "")], avoids)]
    if not settings:
        return ""
    colour = "" if plain else pick(colours, "colour", prompt, seed)
    text = pick(settings, "ground", prompt, seed).format(colour)
    return text.replace(" a o", " an o")  # of the colours only orange begins with a vowel


def pick(choices: Sequence[str], slot: str, prompt: str, seed: int) -> str:
    """Pick one of the choices by hash: the same in every process, independent between slots.

    Of n choices, each block of n seeds starting at a multiple of n has every choice once, so a batch within a block
    repeats none. Each block has its own order, or slots with equally many choices would always move together; across a
    block's border a choice may come twice.
    """
    which_round, place = divmod(seed, len(choices))

    def key(choice: str) -> bytes:
        text = "\0".join((slot, prompt, str(which_round), choice))
        return hashlib.sha256(text.encode("utf-8", "replace")).digest()

    return sorted(choices, key=key)[place]


def split_words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.casefold())


def mention_any(texts: Iterable[str], names: Iterable[str]) -> bool:
    """Whether any of the texts contains any of the names as whole words."""
    spaced = [spaced_words(text) for text in texts]
    return any(spaced_words(name) in text for name in names for text in spaced)


@lru_cache(maxsize=1024)
def spaced_words(text: str) -> str:
    """A text's words, with spaces around each. Cached: the same names and prompts are searched again and again."""
    return f" {' '.join(split_words(text))} "


def clash(texts: Iterable[str], avoids: Iterable[str]) -> bool:
    """Whether any text shares a meaningful word with what is to be avoided."""
    avoided = {word for text in avoids for word in split_words(text)} - STOP_WORDS
    return any(word in avoided for text in texts for word in split_words(text))


# ---- by a language model ----------------------------------------------------------------------------------------

Generate = Callable[[str, int], str]  # (instruction, seed) -> what a language model answers

INSTRUCTIONS = {
    "low": "Add only where it is.",
    "medium": "Add where it is and how it is drawn.",
    "high": "Add where it is, how it is drawn, its medium, light and mood, and be inventive.",
}
REFUSALS = re.compile(
    r"\b(i\W?m sorry|i am sorry|i apologi[sz]e|i can\W?t|i cannot|i can not|i\W?m unable|i am unable|i won\W?t"
    r"|i will not|as an ai|as a language model|not able to (help|assist|create|generate|provide)"
    r"|against (my|the) (policy|policies|guidelines)|inappropriate|please provide"
    r"|could you (please )?(clarify|provide))",
    re.IGNORECASE,
)


def instruction(
    prompt: str, level: str, styles: Sequence[str] = (), avoids: Sequence[str] = (), look: bool = False
) -> str:
    """The instruction for a language model; it contains the prompt as material, in quotes."""
    lines = [
        "Rewrite this description of a picture as one sentence for an image generator.",
        "Keep its subject and every detail it names, in its own words. " + INSTRUCTIONS["low" if look else level],
        f"It is drawn with: {', '.join(styles)}. Contradict none of it." if styles else "",
        f"Never mention: {', '.join(avoids)}." if avoids else "",
        "Answer with the description alone.",
        f'Description: "{prompt}"',
    ]
    return "\n".join(filter(None, lines))


def expand_by_language(
    generate: Generate,
    prompt: str,
    level: str,
    seed: int,
    *,
    styles: Sequence[str] = (),
    avoids: Sequence[str] = (),
    look: bool = False,
) -> str:
    """A language model's expansion, or the unchanged prompt if its answer cannot be trusted.

    Not trusted, besides what `trusted` rejects: an answer that lost a word of the prompt or contains an avoided one.
    "raw" asks no model. The other arguments are those of `expand`.
    """
    if level == "raw":
        return prompt
    answer = checked_answer(generate(instruction(prompt, level, styles, avoids, look), seed))
    kept = set(split_words(prompt)) - STOP_WORDS <= set(split_words(answer))
    return answer if answer and kept and not mention_any([answer], avoids) else prompt


def checked_answer(answer: str) -> str:
    """The answer, tidied; "" if it is empty, refuses, asks back, or is longer than MAX_CHARS characters."""
    answer = tidy(answer)
    return "" if len(answer) > MAX_CHARS or answer.endswith("?") or REFUSALS.search(answer) else answer


def tidy(answer: str) -> str:
    """An answer on one line, without thinking, label and quotes."""
    answer = re.sub(r"<think>.*?(</think>|$)", " ", answer, flags=re.DOTALL)
    answer = re.sub(r"[\x00-\x1f\x7f-\x9f]+", " ", answer)
    answer = re.sub(
        r"^\s*(?:rewritten |new |taste )?(?:description|prompt|profile)\s*:", "", answer, flags=re.IGNORECASE
    )
    return " ".join(answer.split()).strip("\"'“”‘’ ")
