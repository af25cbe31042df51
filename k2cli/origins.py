"""Read prompts and settings from the metadata of A1111, ComfyUI, InvokeAI, Midjourney, mflux and k2 pictures.

A1111 and its forks: text `parameters`, or the EXIF comment. ComfyUI: texts `prompt` and `workflow`, the graph as JSON;
in WebP the EXIF tags for camera model and maker. InvokeAI: text `invokeai_metadata`, formerly `sd-metadata`.
Midjourney: text `Description`, the prompt with its parameters. mflux: JSON in the EXIF comment, and a JSON file beside
the picture, like k2's record. All of it is untrusted text, and only read.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image

from k2cli import comfy, history
from k2cli.formats import record_from_xmp
from k2cli.matrix import MAX_PROMPT_CHARS, escape
from k2cli.prompts import prompt_of
from k2cli.texts import UNPRINTABLE
from k2cli.toml_tables import loads, tables_in
from model import picture_file
from model.errors import K2Error
from model.expand import LEVELS

MARKING = ("A1111", "ComfyUI", "InvokeAI")  # tools with a prompt syntax
LORA = re.compile(r"<(?:lora|lyco|hypernet):([^<>:]+)(?::[^<>]*)?>")
WEIGHT = re.compile(r"\(([^()]+?)(?::\s*[\d.]+\s*)?\)|\[([^\[\]:|]+)\]")  # (words:1.2), (words), [words]
RAISED = re.compile(  # InvokeAI only, as elsewhere C++ is a word: (words)1.2, (words)++, word++
    r"(?<=\))(?:[+-]+|\d*\.?\d+)|(?<=\w)(?:\++|--+)(?=[\s,.]|$)"
)
OLD_AVOID = re.compile(r"(?<!\\)\[([^\[\]]*)\]")  # InvokeAI before 3.0 put the negative prompt in brackets
FACT = re.compile(r'(?<![\w ./()-]) *+([\w./()-][\w ./()-]{0,80}?):\s*+("(?:\\.|[^"\\])*"|[^,]*)(?:,|$)')
STEPS_FIRST = re.compile(r"^[ \t]*+Steps: \d", re.MULTILINE)
CIVITAI = "Civitai resources: "  # JSON by Civitai's own generator, whose prompts name no LoRAs
CIVITAI_LORA = re.compile(r'"type":\s*"(?:lora|lycoris|locon|dora)"', re.IGNORECASE)
JOB = re.compile(r" Job ID: [0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}$")  # Midjourney's
PARAMETER = re.compile(r"(?:^| )--(?=[a-z])")
PART = re.compile(r"(.*?)(?:::(-?\d*\.?\d*)|$)", re.DOTALL)  # a part of a prompt, and its weight
IMAGE_PROMPTS = re.compile(r"^(?:<?https?://\S+(?: |$))+")
TAKEN = ("no", "seed", "ar", "aspect", "v", "version")  # the shape is the picture's own, and a version is another model
BRACKETS = "()[]"
DEEPEST = 8  # nested brackets
MOST_SAID = 1 << 20  # characters of a text; workflows can be long
MOST_SAMPLERS = 50  # of a graph, in which a prompt is sought
SIDE = ".metadata.json"
BEGINNING = "its init image"
CONTROL, REFERENCES = "ControlNet", "reference pictures"
TELLING = "Pictures by A1111, ComfyUI, InvokeAI, Midjourney, mflux and k2 do, unless their metadata was stripped."


class TooLong(K2Error):
    """A prompt too long for any project."""


@dataclass(frozen=True)
class Origin:
    """What a picture says about how it was made. What it does not say is None or empty."""

    tool: str
    prompt: str
    avoid: str = ""
    seed: int | None = None
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    guidance: float | None = None  # on k2's scale: those tools' CFG minus one
    model: str = ""
    left_out: tuple[str, ...] = ()  # what has no counterpart in k2
    turbo: bool = False  # made by k2's distilled checkpoint; the following are k2's own, too
    creativity: str = "raw"
    guidance_until: float | None = None  # if guidance ended before the last step
    sampler: str | None = None  # if not Euler's
    mu: float | None = None
    name: str = ""  # of the prompt


def read(path: Path) -> Origin:
    """The origin of a picture. Raises K2Error if it is not a picture, or has no readable prompt."""
    if not path.is_file():
        raise K2Error(f"There is no {path}.", hint="Name a picture.")
    if path.suffix == ".json":
        return read_side_file(path)
    try:
        with picture_file.open_picture(path) as image:
            said = {str(key): value for key, value in image.info.items()}
            texts = {key: value for key, value in said.items() if isinstance(value, str) and len(value) <= MOST_SAID}
            exif = image.getexif()
            comment, size = read_comment(exif), image.size
            for tag in (ExifTags.Base.Model, ExifTags.Base.Make):  # ComfyUI's WebPs: "prompt:{…}"
                key, _, rest = str(exif.get(tag, "")).partition(":")
                if key in ("prompt", "workflow") and len(rest) <= MOST_SAID:
                    texts.setdefault(key, rest)
            if record := record_from_xmp(said):
                texts.setdefault("k2", record)
    except Exception:  # Pillow raises anything over a broken file
        raise K2Error(f"{path} is not a readable picture.", hint="k2 reads PNG, JPEG and WebP.") from None
    beside = path.with_suffix(SIDE)
    kept = history.load_record(path.with_suffix(".toml")) or {}
    for found in (*readings(texts, comment), *of_k2(kept), *(of_mflux(table_in(beside)) if beside.is_file() else ())):
        if found.prompt:
            if len(escape(found.prompt)) > MAX_PROMPT_CHARS:
                hint = "No project can hold it: omit that picture."
                raise TooLong(f"{path} has a prompt of more than {MAX_PROMPT_CHARS:,} characters.", hint=hint)
            whole = found.width is not None and found.height is not None
            return found if whole else replace(found, width=size[0], height=size[1])
    raise K2Error(f"{path} does not state its prompt.", hint=TELLING)


def read_side_file(path: Path) -> Origin:
    """The origin that mflux can write beside a picture."""
    found = next(of_mflux(table_in(path)))
    if not found.prompt:
        raise K2Error(f"{path} does not state a prompt.", hint="The JSON that mflux writes beside a picture does.")
    return found


def table_in(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if there is none."""
    try:
        with path.open("rb") as file:
            return table_of(file.read(MOST_SAID).decode())
    except (OSError, ValueError):
        return {}


def read_comment(exif: Image.Exif) -> str:
    """The EXIF comment, in any encoding that tools use; its first eight bytes say which."""
    raw = exif.get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment, b"")
    if isinstance(raw, str):
        return raw
    if not isinstance(raw, bytes) or len(raw) > 2 * MOST_SAID:
        return ""
    if raw.startswith(b"UNICODE\0"):
        little = raw[8:10] == b"\xff\xfe" or raw[9::2].count(0) > raw[8::2].count(0)  # ASCII's zero bytes tell
        return raw[8:].decode("utf-16-le" if little else "utf-16-be", "replace").lstrip("\ufeff")
    return raw.removeprefix(b"ASCII\0\0\0").decode("utf-8", "replace").strip("\0")


def readings(texts: Mapping[str, str], comment: str) -> Iterator[Origin]:
    """Every form of metadata present, the most informative first."""
    if "k2" in texts:
        with suppress(ValueError, RecursionError):
            yield from of_k2(loads(texts["k2"]))
    for key in ("invokeai_metadata", "sd-metadata"):
        if key in texts:
            yield from of_invoke(table_of(texts[key]))
    if "prompt" in texts:
        yield from of_comfy(table_of(texts["prompt"]))
    if "workflow" in texts:
        yield from of_comfy(comfy.from_workflow(table_of(texts["workflow"])))
    said = table_of(comment)
    if "prompt" in said:
        yield from of_mflux(said)
    described = plain(texts.get("Description"))
    if JOB.search(described):
        yield of_midjourney(JOB.sub("", described))
    for text in (texts.get("parameters", ""), comment if STEPS_FIRST.search(comment) else ""):  # cameras comment, too
        if text and not table_of(text):
            yield of_a1111(text)


def table_of(text: str) -> dict[str, Any]:
    """A text parsed as a JSON object; empty if it is not one."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def of_k2(table: Mapping[str, Any]) -> Iterator[Origin]:
    """A record, perhaps edited or of another version."""
    asked, made, used = (table.get(key) for key in ("prompt", "settings", "model"))
    if isinstance(asked, dict) and isinstance(made, dict):
        used = used if isinstance(used, dict) else {}
        level = plain(asked.get("creativity"))
        led, tied = table.get("leader"), decimal(made.get("cohesion"))
        ties = [f'cohesion {tied:g} with "{plain(led.get("prompt"))}"'] if isinstance(led, dict) and tied else []
        shared = led.get("shared") if ties and isinstance(led, dict) else None
        if isinstance(shared, dict) and shared and not any(map(decimal, shared.values())):
            ties = []  # it was the lead picture
        init = table.get("init_image")
        begun = [f"{BEGINNING} {plain(init.get('image'))}"] if isinstance(init, dict) else []
        styles = [f"style {plain(name)}" for name in values(table, "style", "name")]
        loras = [f"LoRA {plain(file)}" for file in values(table, "lora", "file")]
        yield origin(
            "k2",
            asked.get("text"),
            own_phrases(plain(asked.get("avoid")), table),
            made,
            guidance=decimal(made.get("guidance")),
            guidance_until=None if (until := decimal(made.get("guidance_until"))) == 1 else until,
            sampler=None if (sampler := plain(made.get("sampler"))) in ("", "euler") else sampler,
            mu=decimal(made.get("mu")),
            model=plain(used.get("name")),
            turbo=used.get("variant") == "turbo",
            creativity=level if level in LEVELS else "raw",
            name=prompt_of(plain(asked.get("name")), plain(asked.get("caption"))),
            left_out=(*ties, *begun, *styles, *loras),
        )


def own_phrases(avoid: str, table: Mapping[str, Any]) -> str:
    """A record's own negative prompt, without what its styles, which are not taken over, appended to it."""
    texts: dict[str, None] = {}  # each once, as `styles.words` yields them
    styles = zip(*(values(table, "style", key) for key in ("strength", "avoids", "keywords")), strict=True)
    for strength, avoids, keywords in styles:
        side = avoids if (decimal(strength) or 0) > 0 else keywords
        texts |= dict.fromkeys(map(plain, side if isinstance(side, list) else ()))
    theirs = Counter(plain(part) for text in texts for part in text.split(","))
    kept = []
    for part in reversed(avoid.split(",")):
        theirs[plain(part)] -= 1
        if theirs[plain(part)] < 0:
            kept.append(part)
    return ",".join(reversed(kept)).strip()


def values(table: Mapping[str, Any], key: str, of: str) -> list[Any]:
    """The value that each table in a list has under a key."""
    return [each.get(of) for each in tables_in(table, key)]


def of_invoke(table: Mapping[str, Any]) -> Iterator[Origin]:
    """Before 3.0 everything was under `image`, since then at the top level."""
    old = table.get("image")
    if isinstance(old, dict):
        asked = old.get("prompt")
        asked = asked[0].get("prompt") if isinstance(asked, list) and asked and isinstance(asked[0], dict) else asked
        asked = asked if isinstance(asked, str) else ""
        avoid = ", ".join(OLD_AVOID.findall(asked))
        yield origin(
            "InvokeAI",
            OLD_AVOID.sub("", asked),
            avoid,
            old,
            guidance=scale(old.get("cfg_scale")),
            model=plain(table.get("model_weights")),
        )
    model = table.get("model")
    name = (model.get("name") or model.get("model_name")) if isinstance(model, dict) else model
    kinds = {"loras": "LoRAs", "controlnets": CONTROL, "ipAdapters": REFERENCES}
    led = [told for key, told in kinds.items() if isinstance(table.get(key), list) and table[key]]
    yield origin(
        "InvokeAI",
        table.get("positive_prompt"),
        table.get("negative_prompt"),
        table,
        guidance=scale(table.get("cfg_scale")),
        model=plain(name),
        left_out=(*led, *(BEGINNING,) * bool(table.get("init_image"))),
    )


def of_mflux(table: Mapping[str, Any]) -> Iterator[Origin]:
    """The EXIF comment, or the file beside the picture; other tools write such comments, too."""
    loras = table.get("lora_paths")
    yield origin(
        "mflux" if "mflux_version" in table else "another tool",
        table.get("prompt"),
        table.get("negative_prompt"),
        table,
        guidance=None,  # of a distilled network, or on another scale than k2's
        model=plain(table.get("model")),
        left_out=("LoRAs",) * bool(isinstance(loras, list) and loras) + (BEGINNING,) * bool(table.get("image_path")),
    )


def of_midjourney(text: str) -> Origin:
    """The prompt, after any links to pictures, and its parameters: `--ar 3:2 --no text --raw`."""
    asked, *parameters = PARAMETER.split(text)
    pairs = [each.partition(" ")[::2] for each in parameters]
    facts = dict(pairs)
    images = IMAGE_PROMPTS.match(asked)
    others = " ".join(f"--{key} {value}".strip() for key, value in pairs if key not in TAKEN)
    parts = [(words.strip(" ,"), weight) for words, weight in PART.findall(asked[images.end() if images else 0 :])]
    avoided = [words for words, weight in parts if weight.startswith("-")]
    return origin(
        "Midjourney",
        ", ".join(words for words, weight in parts if words and not weight.startswith("-")),
        ", ".join([*avoided, *(value for key, value in pairs if key == "no")]),
        facts,
        left_out=("its image prompt",) * bool(images)
        + ("prompt weights",) * any(weight for _, weight in parts)
        + (others,) * bool(others),
    )


def of_a1111(text: str) -> Origin:
    """Prompt, `Negative prompt: …`, and a last paragraph that starts with `Steps: `."""
    facts_at = list(STEPS_FIRST.finditer(text))
    said, rest = (text[: facts_at[-1].start()], text[facts_at[-1].start() :]) if facts_at else (text, "")
    facts: dict[str, str] = {}
    for match in FACT.finditer(rest.replace("\n", ", ")):
        facts.setdefault(match[1], unquoted(match[2]))  # extensions append their own, with the same names
    asked, _, avoid = ("\n" + said).partition("\nNegative prompt:")
    width, _, height = facts.get("Size", "").partition("x")
    table = {"seed": facts.get("Seed"), "steps": facts.get("Steps"), "width": width, "height": height}
    tool, model, turbo = "A1111", plain(facts.get("Model")), False
    if facts.get("Version", "").startswith("k2 "):  # written by k2, with the variant after the model's name
        tool, turbo = "k2", model.endswith("-turbo")
        model = model.removesuffix("-raw").removesuffix("-turbo")
    denoised = facts.get("Denoising strength")
    hires = [key for key in facts if key.startswith("Hires")]  # a second pass
    told = [key for key in ("Hires upscale", "Hires resize") if key in facts] or hires[:1]
    left_out = [plain(f"{key.lower()} {facts[key]}") for key in told]
    left_out += ["LoRAs"] if CIVITAI_LORA.search(rest.partition(CIVITAI)[2]) and not LORA.search(asked) else []
    left_out += [CONTROL] if any(key.startswith("ControlNet") for key in facts) else []
    left_out += [BEGINNING] if denoised and not hires else []
    left_out += [f"denoising strength {plain(denoised)}"] if denoised else []
    return origin(
        tool,
        asked,
        avoid,
        table,
        guidance=scale(facts.get("CFG scale")),
        model=model,
        turbo=turbo,
        left_out=tuple(left_out),
    )


def unquoted(value: str) -> str:
    """A value that holds a comma or a colon is written as JSON."""
    with suppress(ValueError):
        return str(json.loads(value)) if value.startswith('"') else value
    return value.strip('"')


def of_comfy(graph: Mapping[str, Any]) -> Iterator[Origin]:
    """One origin for every sampler in a graph, the last first."""
    for given in islice(comfy.samplers(graph), MOST_SAMPLERS):
        yield origin(
            "ComfyUI",
            given["prompt"],
            given["avoid"],
            given,
            guidance=scale(given["cfg"]),
            model=plain(given["model"]),
            left_out=("LoRAs",) * given["loras"]
            + ("prompt enhancement",) * given["enhanced"]
            + (CONTROL,) * given["control"]
            + (REFERENCES,) * given["references"]
            + ((f"{BEGINNING} {plain(given['begun'])}",) if given["begun"] else ())
            + ((f"denoising strength {given['denoise']:g}",) if 0 < (given["denoise"] or 0) < 1 else ()),
        )


def origin(tool: str, asked: Any, avoid: Any, table: Mapping[str, Any], **more: Any) -> Origin:
    """An origin from what a tool wrote: texts without that tool's syntax, numbers only where they are numbers."""
    raised = tool == "InvokeAI"
    tidy = partial(unmarked, raised=raised) if tool in MARKING else plain
    loras = [plain(name) for name in LORA.findall(asked)] if tool in MARKING and isinstance(asked, str) else []
    left_out = (*more.pop("left_out", ()), *(f"LoRA {name}" for name in loras))
    left_out += ("prompt weights",) * (tool in MARKING and any(weighed(text, raised) for text in (asked, avoid)))
    seed = integer(table.get("seed"))
    left_out += (f"seed {seed}",) if 2**63 <= seed < 2**64 else ()  # ComfyUI's seeds have one bit more
    numbers: dict[str, Any] = {key: whole(table.get(key)) for key in ("seed", "width", "height", "steps")}
    return Origin(tool, tidy(asked), tidy(avoid), **numbers, **more, left_out=left_out)


def unmarked(text: Any, raised: bool = False) -> str:
    """A prompt as plain words on one line: no adapters, no weights, no brackets but escaped ones."""
    text = guarded(re.sub(r"(?: BREAK)+(?= |$)", ",", LORA.sub("", plain(text))))  # A1111 starts a new chunk at BREAK
    text = RAISED.sub("", text) if raised else text
    for _ in range(DEEPEST):
        text = WEIGHT.sub(r"\1\2", text)
    text = re.sub(r"\0([0-3])", lambda sign: BRACKETS[int(sign[1])], text)
    return re.sub(r" ?,[ ,]*,", ",", plain(text)).strip(" ,")


def weighed(text: Any, raised: bool = False) -> bool:
    """Whether a prompt's syntax gives some of its words more or less weight."""
    text = guarded(plain(text))
    return bool(WEIGHT.search(text) or (raised and RAISED.search(text)))


def guarded(text: str) -> str:
    """The text with a number in place of each escaped bracket, which is not syntax."""
    return re.sub(r"\\([()\[\]])", lambda sign: f"\0{BRACKETS.index(sign[1])}", text)


def plain(text: Any) -> str:
    """A text on one line, without control characters; "" for anything else."""
    return " ".join(UNPRINTABLE.sub(" ", text).split()) if isinstance(text, str) else ""


def whole(value: Any) -> int | None:
    """A whole number valid as a seed, a side or steps; else None."""
    number = integer(value)
    return number if 0 <= number < 2**63 else None


def integer(value: Any) -> int:
    """A whole number; −1 for anything else."""
    try:
        return int(value)
    except (TypeError, ValueError, OverflowError):
        return -1


def decimal(value: Any) -> float | None:
    """A finite number; else None."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def scale(cfg: Any) -> float | None:
    """Another tool's CFG scale as k2's guidance, which is 1 less; None if it is not a number."""
    number = decimal(cfg)
    return None if number is None else max(0.0, round(number - 1, 6))
