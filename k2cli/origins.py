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
from k2cli.matrix import MAX_PROMPT_CHARS, escape_braces
from k2cli.prompts import prompt_name
from k2cli.texts import UNPRINTABLE
from k2cli.toml_tables import loads, tables_in
from model import picture_file
from model.errors import K2Error
from model.expand import LEVELS

TOOLS_WITH_SYNTAX = ("A1111", "ComfyUI", "InvokeAI")  # tools with a prompt syntax
LORA_TAG = re.compile(r"<(?:lora|lyco|hypernet):([^<>:]+)(?::[^<>]*)?>")
WEIGHTED_WORDS = re.compile(r"\(([^()]+?)(?::\s*[\d.]+\s*)?\)|\[([^\[\]:|]+)\]")  # (words:1.2), (words), [words]
INVOKE_WEIGHT = re.compile(  # InvokeAI only, as elsewhere C++ is a word: (words)1.2, (words)++, word++
    r"(?<=\))(?:[+-]+|\d*\.?\d+)|(?<=\w)(?:\++|--+)(?=[\s,.]|$)"
)
OLD_INVOKE_NEGATIVE = re.compile(r"(?<!\\)\[([^\[\]]*)\]")  # InvokeAI before 3.0 put the negative prompt in brackets
A1111_FACT = re.compile(r'(?<![\w ./()-]) *+([\w./()-][\w ./()-]{0,80}?):\s*+("(?:\\.|[^"\\])*"|[^,]*)(?:,|$)')
A1111_FACTS_START = re.compile(r"^[ \t]*+Steps: \d", re.MULTILINE)
CIVITAI_KEY = "Civitai resources: "  # JSON by Civitai's own generator, whose prompts name no LoRAs
CIVITAI_LORA = re.compile(r'"type":\s*"(?:lora|lycoris|locon|dora)"', re.IGNORECASE)
JOB_ID = re.compile(r" Job ID: [0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}$")  # Midjourney's
PARAMETER = re.compile(r"(?:^| )--(?=[a-z])")
WEIGHTED_PART = re.compile(r"(.*?)(?:::(-?\d*\.?\d*)|$)", re.DOTALL)  # a part of a prompt, and its weight
IMAGE_PROMPTS = re.compile(r"^(?:<?https?://\S+(?: |$))+")
# the shape is the picture's own, and a version is another model
HANDLED_PARAMETERS = ("no", "seed", "ar", "aspect", "v", "version")
BRACKETS = "()[]"
MAX_DEPTH = 8  # nested brackets
MAX_TEXT = 1 << 20  # characters of a text; workflows can be long
MAX_SAMPLERS = 50  # of a graph, in which a prompt is sought
SIDECAR_SUFFIX = ".metadata.json"
INIT_IMAGE = "its init image"
CONTROLNET, REFERENCES = "ControlNet", "reference pictures"
SUPPORTED_TOOLS_HINT = (
    "Pictures by A1111, ComfyUI, InvokeAI, Midjourney, mflux and k2 do, unless their metadata was stripped."
)


class PromptTooLong(K2Error):
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


def read_origin(path: Path) -> Origin:
    """The origin of a picture. Raises K2Error if it is not a picture, or has no readable prompt."""
    if not path.is_file():
        raise K2Error(f"There is no {path}.", hint="Name a picture.")
    if path.suffix == ".json":
        return read_sidecar(path)
    try:
        with picture_file.open_picture(path) as image:
            info = {str(key): value for key, value in image.info.items()}
            texts = {key: value for key, value in info.items() if isinstance(value, str) and len(value) <= MAX_TEXT}
            exif = image.getexif()
            comment, size = read_comment(exif), image.size
            for tag in (ExifTags.Base.Model, ExifTags.Base.Make):  # ComfyUI's WebPs: "prompt:{…}"
                key, _, rest = str(exif.get(tag, "")).partition(":")
                if key in ("prompt", "workflow") and len(rest) <= MAX_TEXT:
                    texts.setdefault(key, rest)
            if record := record_from_xmp(info):
                texts.setdefault("k2", record)
    except Exception:  # Pillow raises anything over a broken file
        raise K2Error(f"{path} is not a readable picture.", hint="k2 reads PNG, JPEG and WebP.") from None
    sidecar = path.with_suffix(SIDECAR_SUFFIX)
    sidecar_record = history.load_record(path.with_suffix(".toml")) or {}
    for found in (
        *read_metadata(texts, comment),
        *from_k2(sidecar_record),
        *(from_mflux(read_json_object(sidecar)) if sidecar.is_file() else ()),
    ):
        if found.prompt:
            if len(escape_braces(found.prompt)) > MAX_PROMPT_CHARS:
                hint = "No project can hold it: omit that picture."
                raise PromptTooLong(f"{path} has a prompt of more than {MAX_PROMPT_CHARS:,} characters.", hint=hint)
            has_size = found.width is not None and found.height is not None
            return found if has_size else replace(found, width=size[0], height=size[1])
    raise K2Error(f"{path} does not state its prompt.", hint=SUPPORTED_TOOLS_HINT)


def read_sidecar(path: Path) -> Origin:
    """The origin that mflux can write beside a picture."""
    found = next(from_mflux(read_json_object(path)))
    if not found.prompt:
        raise K2Error(f"{path} does not state a prompt.", hint="The JSON that mflux writes beside a picture does.")
    return found


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if there is none."""
    try:
        with path.open("rb") as file:
            return parse_json_object(file.read(MAX_TEXT).decode())
    except (OSError, ValueError):
        return {}


def read_comment(exif: Image.Exif) -> str:
    """The EXIF comment, in any encoding that tools use; its first eight bytes say which."""
    raw = exif.get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment, b"")
    if isinstance(raw, str):
        return raw
    if not isinstance(raw, bytes) or len(raw) > 2 * MAX_TEXT:
        return ""
    if raw.startswith(b"UNICODE\0"):
        little = raw[8:10] == b"\xff\xfe" or raw[9::2].count(0) > raw[8::2].count(0)  # ASCII's zero bytes tell
        return raw[8:].decode("utf-16-le" if little else "utf-16-be", "replace").lstrip("\ufeff")
    return raw.removeprefix(b"ASCII\0\0\0").decode("utf-8", "replace").strip("\0")


def read_metadata(texts: Mapping[str, str], comment: str) -> Iterator[Origin]:
    """Every form of metadata present, the most informative first."""
    if "k2" in texts:
        with suppress(ValueError, RecursionError):
            yield from from_k2(loads(texts["k2"]))
    for key in ("invokeai_metadata", "sd-metadata"):
        if key in texts:
            yield from from_invokeai(parse_json_object(texts[key]))
    if "prompt" in texts:
        yield from from_comfy(parse_json_object(texts["prompt"]))
    if "workflow" in texts:
        yield from from_comfy(comfy.from_workflow(parse_json_object(texts["workflow"])))
    comment_table = parse_json_object(comment)
    if "prompt" in comment_table:
        yield from from_mflux(comment_table)
    described = one_line(texts.get("Description"))
    if JOB_ID.search(described):
        yield from_midjourney(JOB_ID.sub("", described))
    for text in (
        texts.get("parameters", ""),
        comment if A1111_FACTS_START.search(comment) else "",
    ):  # cameras comment, too
        if text and not parse_json_object(text):
            yield from_a1111(text)


def parse_json_object(text: str) -> dict[str, Any]:
    """A text parsed as a JSON object; empty if it is not one."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def from_k2(table: Mapping[str, Any]) -> Iterator[Origin]:
    """A record, perhaps edited or of another version."""
    prompt, settings, model = (table.get(key) for key in ("prompt", "settings", "model"))
    if isinstance(prompt, dict) and isinstance(settings, dict):
        model = model if isinstance(model, dict) else {}
        creativity = one_line(prompt.get("creativity"))
        leader, cohesion = table.get("leader"), as_float(settings.get("cohesion"))
        cohesion_notes = (
            [f'cohesion {cohesion:g} with "{one_line(leader.get("prompt"))}"']
            if isinstance(leader, dict) and cohesion
            else []
        )
        shared = leader.get("shared") if cohesion_notes and isinstance(leader, dict) else None
        if isinstance(shared, dict) and shared and not any(map(as_float, shared.values())):
            cohesion_notes = []  # it was the lead picture
        init = table.get("init_image")
        init_notes = [f"{INIT_IMAGE} {one_line(init.get('image'))}"] if isinstance(init, dict) else []
        styles = [f"style {one_line(name)}" for name in column(table, "style", "name")]
        loras = [f"LoRA {one_line(file)}" for file in column(table, "lora", "file")]
        yield make_origin(
            "k2",
            prompt.get("text"),
            own_negative_prompt(one_line(prompt.get("avoid")), table),
            settings,
            guidance=as_float(settings.get("guidance")),
            guidance_until=None if (until := as_float(settings.get("guidance_until"))) == 1 else until,
            sampler=None if (sampler := one_line(settings.get("sampler"))) in ("", "euler") else sampler,
            mu=as_float(settings.get("mu")),
            model=one_line(model.get("name")),
            turbo=model.get("variant") == "turbo",
            creativity=creativity if creativity in LEVELS else "raw",
            name=prompt_name(one_line(prompt.get("name")), one_line(prompt.get("caption"))),
            left_out=(*cohesion_notes, *init_notes, *styles, *loras),
        )


def own_negative_prompt(avoid: str, table: Mapping[str, Any]) -> str:
    """A record's own negative prompt, without what its styles, which are not taken over, appended to it."""
    texts: dict[str, None] = {}  # each once, as `styles.style_words` yields them
    styles = zip(*(column(table, "style", key) for key in ("strength", "avoids", "keywords")), strict=True)
    for strength, avoids, keywords in styles:
        side = avoids if (as_float(strength) or 0) > 0 else keywords
        texts |= dict.fromkeys(map(one_line, side if isinstance(side, list) else ()))
    style_phrases = Counter(one_line(part) for text in texts for part in text.split(","))
    kept = []
    for part in reversed(avoid.split(",")):
        style_phrases[one_line(part)] -= 1
        if style_phrases[one_line(part)] < 0:
            kept.append(part)
    return ",".join(reversed(kept)).strip()


def column(table: Mapping[str, Any], key: str, name: str) -> list[Any]:
    """The value that each table in a list has under a key."""
    return [each.get(name) for each in tables_in(table, key)]


def from_invokeai(table: Mapping[str, Any]) -> Iterator[Origin]:
    """Before 3.0 everything was under `image`, since then at the top level."""
    old = table.get("image")
    if isinstance(old, dict):
        prompt = old.get("prompt")
        prompt = (
            prompt[0].get("prompt") if isinstance(prompt, list) and prompt and isinstance(prompt[0], dict) else prompt
        )
        prompt = prompt if isinstance(prompt, str) else ""
        avoid = ", ".join(OLD_INVOKE_NEGATIVE.findall(prompt))
        yield make_origin(
            "InvokeAI",
            OLD_INVOKE_NEGATIVE.sub("", prompt),
            avoid,
            old,
            guidance=guidance_from_cfg(old.get("cfg_scale")),
            model=one_line(table.get("model_weights")),
        )
    model = table.get("model")
    name = (model.get("name") or model.get("model_name")) if isinstance(model, dict) else model
    kinds = {"loras": "LoRAs", "controlnets": CONTROLNET, "ipAdapters": REFERENCES}
    unsupported = [told for key, told in kinds.items() if isinstance(table.get(key), list) and table[key]]
    yield make_origin(
        "InvokeAI",
        table.get("positive_prompt"),
        table.get("negative_prompt"),
        table,
        guidance=guidance_from_cfg(table.get("cfg_scale")),
        model=one_line(name),
        left_out=(*unsupported, *(INIT_IMAGE,) * bool(table.get("init_image"))),
    )


def from_mflux(table: Mapping[str, Any]) -> Iterator[Origin]:
    """The EXIF comment, or the file beside the picture; other tools write such comments, too."""
    loras = table.get("lora_paths")
    yield make_origin(
        "mflux" if "mflux_version" in table else "another tool",
        table.get("prompt"),
        table.get("negative_prompt"),
        table,
        guidance=None,  # of a distilled network, or on another scale than k2's
        model=one_line(table.get("model")),
        left_out=("LoRAs",) * bool(isinstance(loras, list) and loras) + (INIT_IMAGE,) * bool(table.get("image_path")),
    )


def from_midjourney(text: str) -> Origin:
    """The prompt, after any links to pictures, and its parameters: `--ar 3:2 --no text --raw`."""
    prompt, *parameters = PARAMETER.split(text)
    pairs = [each.partition(" ")[::2] for each in parameters]
    facts = dict(pairs)
    images = IMAGE_PROMPTS.match(prompt)
    unhandled = " ".join(f"--{key} {value}".strip() for key, value in pairs if key not in HANDLED_PARAMETERS)
    parts = [
        (words.strip(" ,"), weight) for words, weight in WEIGHTED_PART.findall(prompt[images.end() if images else 0 :])
    ]
    avoided = [words for words, weight in parts if weight.startswith("-")]
    return make_origin(
        "Midjourney",
        ", ".join(words for words, weight in parts if words and not weight.startswith("-")),
        ", ".join([*avoided, *(value for key, value in pairs if key == "no")]),
        facts,
        left_out=("its image prompt",) * bool(images)
        + ("prompt weights",) * any(weight for _, weight in parts)
        + (unhandled,) * bool(unhandled),
    )


def from_a1111(text: str) -> Origin:
    """Prompt, `Negative prompt: …`, and a last paragraph that starts with `Steps: `."""
    facts_at = list(A1111_FACTS_START.finditer(text))
    prompts, fact_text = (text[: facts_at[-1].start()], text[facts_at[-1].start() :]) if facts_at else (text, "")
    facts: dict[str, str] = {}
    for match in A1111_FACT.finditer(fact_text.replace("\n", ", ")):
        facts.setdefault(match[1], unquote(match[2]))  # extensions append their own, with the same names
    prompt, _, avoid = ("\n" + prompts).partition("\nNegative prompt:")
    width, _, height = facts.get("Size", "").partition("x")
    table = {"seed": facts.get("Seed"), "steps": facts.get("Steps"), "width": width, "height": height}
    tool, model, turbo = "A1111", one_line(facts.get("Model")), False
    if facts.get("Version", "").startswith("k2 "):  # written by k2, with the variant after the model's name
        tool, turbo = "k2", model.endswith("-turbo")
        model = model.removesuffix("-raw").removesuffix("-turbo")
    denoise = facts.get("Denoising strength")
    hires = [key for key in facts if key.startswith("Hires")]  # a second pass
    reported = [key for key in ("Hires upscale", "Hires resize") if key in facts] or hires[:1]
    left_out = [one_line(f"{key.lower()} {facts[key]}") for key in reported]
    left_out += (
        ["LoRAs"] if CIVITAI_LORA.search(fact_text.partition(CIVITAI_KEY)[2]) and not LORA_TAG.search(prompt) else []
    )
    left_out += [CONTROLNET] if any(key.startswith("ControlNet") for key in facts) else []
    left_out += [INIT_IMAGE] if denoise and not hires else []
    left_out += [f"denoising strength {one_line(denoise)}"] if denoise else []
    return make_origin(
        tool,
        prompt,
        avoid,
        table,
        guidance=guidance_from_cfg(facts.get("CFG scale")),
        model=model,
        turbo=turbo,
        left_out=tuple(left_out),
    )


def unquote(value: str) -> str:
    """A value that holds a comma or a colon is written as JSON."""
    with suppress(ValueError):
        return str(json.loads(value)) if value.startswith('"') else value
    return value.strip('"')


def from_comfy(graph: Mapping[str, Any]) -> Iterator[Origin]:
    """One origin for every sampler in a graph, the last first."""
    for given in islice(comfy.samplers(graph), MAX_SAMPLERS):
        yield make_origin(
            "ComfyUI",
            given["prompt"],
            given["avoid"],
            given,
            guidance=guidance_from_cfg(given["cfg"]),
            model=one_line(given["model"]),
            left_out=("LoRAs",) * given["loras"]
            + ("prompt enhancement",) * given["enhanced"]
            + (CONTROLNET,) * given["control"]
            + (REFERENCES,) * given["references"]
            + ((f"{INIT_IMAGE} {one_line(given['begun'])}",) if given["begun"] else ())
            + ((f"denoising strength {given['denoise']:g}",) if 0 < (given["denoise"] or 0) < 1 else ()),
        )


def make_origin(tool: str, prompt: Any, avoid: Any, table: Mapping[str, Any], **more: Any) -> Origin:
    """An origin from what a tool wrote: texts without that tool's syntax, numbers only where they are numbers."""
    is_invoke, has_syntax = tool == "InvokeAI", tool in TOOLS_WITH_SYNTAX
    clean = partial(strip_syntax, is_invoke=is_invoke) if has_syntax else one_line
    loras = map(one_line, LORA_TAG.findall(prompt)) if has_syntax and isinstance(prompt, str) else ()
    left_out = (*more.pop("left_out", ()), *(f"LoRA {name}" for name in loras))
    left_out += ("prompt weights",) * (has_syntax and any(has_weights(text, is_invoke) for text in (prompt, avoid)))
    seed = as_integer(table.get("seed"))
    left_out += (f"seed {seed}",) if 2**63 <= seed < 2**64 else ()  # ComfyUI's seeds have one bit more
    numbers: dict[str, Any] = {key: valid_integer(table.get(key)) for key in ("seed", "width", "height", "steps")}
    return Origin(tool, clean(prompt), clean(avoid), **numbers, **more, left_out=left_out)


def strip_syntax(text: Any, is_invoke: bool = False) -> str:
    """A prompt as plain words on one line: no adapters, no weights, no brackets but escaped ones."""
    text = re.sub(r"(?: BREAK)+(?= |$)", ",", LORA_TAG.sub("", one_line(text)))  # A1111 starts a new chunk there
    text = hide_escaped(text)
    text = INVOKE_WEIGHT.sub("", text) if is_invoke else text
    for _ in range(MAX_DEPTH):
        text = WEIGHTED_WORDS.sub(r"\1\2", text)
    text = re.sub(r"\0([0-3])", lambda sign: BRACKETS[int(sign[1])], text)
    return re.sub(r" ?,[ ,]*,", ",", one_line(text)).strip(" ,")


def has_weights(text: Any, is_invoke: bool = False) -> bool:
    """Whether a prompt's syntax gives some of its words more or less weight."""
    text = hide_escaped(one_line(text))
    return bool(WEIGHTED_WORDS.search(text) or (is_invoke and INVOKE_WEIGHT.search(text)))


def hide_escaped(text: str) -> str:
    """The text with a number in place of each escaped bracket, which is not syntax."""
    return re.sub(r"\\([()\[\]])", lambda sign: f"\0{BRACKETS.index(sign[1])}", text)


def one_line(text: Any) -> str:
    """A text on one line, without control characters; "" for anything else."""
    return " ".join(UNPRINTABLE.sub(" ", text).split()) if isinstance(text, str) else ""


def valid_integer(value: Any) -> int | None:
    """A whole number valid as a seed, a side or steps; else None."""
    number = as_integer(value)
    return number if 0 <= number < 2**63 else None


def as_integer(value: Any) -> int:
    """A whole number; −1 for anything else."""
    try:
        return int(value)
    except (TypeError, ValueError, OverflowError):
        return -1


def as_float(value: Any) -> float | None:
    """A finite number; else None."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def guidance_from_cfg(cfg: Any) -> float | None:
    """Another tool's CFG scale as k2's guidance, which is 1 less; None if it is not a number."""
    number = as_float(cfg)
    return None if number is None else max(0.0, round(number - 1, 6))
