"""A picture's record as facts for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from itertools import chain
from typing import Any

from k2cli.console import aligned
from k2cli.history import lora_weights
from k2cli.records import Record
from k2cli.texts import display_safe
from model.errors import pluralise

SINGULAR = {"styles": "style", "loras": "lora", "files": "file", "versions": "version"}  # facts of several values
PER_PICTURE = ("created", "seconds", "pixels")  # of each picture alone, however it was made
NAME_WIDTH = len("creativity")  # the longest name of a fact, except those that only references use

Facts = dict[str, str | dict[str, str]]


def record_facts(record: Record) -> Facts:
    """A record's facts by name; those with several values as a dict; "" if it has none."""
    spec, used, table = record.shot.spec, record.model, record.table
    versions, blocked = table.get("versions") or {}, table.get("blocked")
    return {
        "blocked": f"by {blocked.get('filter')}: {blocked.get('reason')}" if isinstance(blocked, dict) else "",
        "prompt": record.shot.given,
        "expanded": "" if spec.prompt == record.shot.given else spec.prompt,
        "creativity": record.shot.creativity if record.shot.creativity != "raw" else "",
        "avoid": spec.negative,
        "styles": {
            style.name: f"{style.strength:g}{', ' + style.method if style.references else ''}" for style in spec.styles
        },
        "loras": lora_weights(table),
        "size": f"{spec.width}x{spec.height}" if spec.width and spec.height else "",
        "seed": f"{spec.seed}" if "seed" in table["settings"] else "",
        "steps": f"{spec.steps or ''}",
        "guidance": "" if spec.guidance is None else f"{spec.guidance:g}{until_suffix(spec.guidance_until)}",
        "mu": "" if spec.mu is None else f"{spec.mu:g}",
        "sampler": spec.sampler if spec.sampler and spec.sampler != "euler" else "",
        "cohesion": f"{spec.cohesion:g}, follows seed {spec.leader.seed} of: {spec.leader.prompt}"
        if spec.leader
        else "",
        "style guidance": "" if spec.style_guidance is None else f"{spec.style_guidance:g}",
        "leak guard": spec.leak_guard or "",
        "vision tiles": f"{spec.vision_tiles or ''}",
        "vision rows": "" if spec.vision_rows is None else f"{spec.vision_rows}".lower(),
        "init image": f"{spec.init_image or ''}",
        "denoise": "" if spec.denoise is None else f"{spec.denoise:g}",
        "mask": f"{spec.mask or ''}",
        "model": f"{used.name} {used.variant or ''}",
        "files": {name: sha[:12] for name, sha in record.files.items()},
        "device": ", ".join(filter(None, (used.device, used.dtype))),
        "weights": used.precision if used.precision and used.precision != "native" else "",
        "offload": used.offload if used.offload and used.offload != "none" else "",
        **{key: f"{to_the_second(table.get(key, ''))}" for key in PER_PICTURE},
        "versions": {name: f"{number}" for name, number in versions.items()},
    }


def to_the_second(value: Any) -> Any:
    """A datetime for people, in local time; anything else as is."""
    try:
        return value.astimezone().replace(microsecond=0) if isinstance(value, datetime) else value
    except (OverflowError, ValueError, OSError):  # a zone would leave the calendar, or the range of the clock
        return value


def describe(record: Record, cells: int | None = None) -> str:
    """A record for people: one fact per line, wrapped if `cells` gives the screen's width."""
    facts = record_facts(record)
    pictures = {style.name: [f"  {each.image}" for each in style.references] for style in record.shot.spec.styles}
    rows = []
    for name, fact in facts.items():
        if isinstance(fact, str):
            lines = fact.split("\n") if fact else []
        else:
            lines = []
            for one, how in fact.items():
                lines += [f"{how}  {one}" if name == "files" else f"{one} {how}"]
                lines += pictures[one] if name == "styles" else []
            lines = [", ".join(lines)] if name == "versions" and lines else lines
        rows += [(name, display_safe(line)) for line in lines]
    return aligned(rows, 2 + max(NAME_WIDTH, *(len(name) for name, _ in rows)), cells)


def differences(records: Sequence[Record]) -> dict[str, list[str]]:
    """In what pictures differ: a fact's name -> its value for each; "" if it has none."""
    flat: list[dict[str, str]] = []
    for record in records:
        facts = record_facts(record) | {"references": {f"{path}": sha[:12] for path, sha in record.references.items()}}
        flat.append({})
        for name, fact in facts.items():
            if isinstance(fact, dict):
                flat[-1] |= {f"{SINGULAR.get(name, 'file')} {one}": how for one, how in fact.items()}
            elif name not in PER_PICTURE:
                flat[-1][name] = fact
    rows = {name: [facts.get(name, "") for facts in flat] for name in dict.fromkeys(chain.from_iterable(flat))}
    return {name: row for name, row in rows.items() if len({*row}) > 1}


def until_suffix(until: float | None) -> str:
    """The suffix of guidance that ends before the last step."""
    return "" if until in (None, 1) else f" until {until:g}"


def steps_and_guidance(settings: Mapping[str, Any]) -> tuple[str, str]:
    """Steps and guidance for people, with what is unusual about them: a sampler other than Euler's, an early end; ""
    for what a record lacks."""
    sampler, until = settings.get("sampler"), settings.get("guidance_until")
    steps, guidance = settings["steps"], settings["guidance"]
    return (
        pluralise(steps, "step") + (f" of {sampler}" if sampler not in (None, "euler") else "") if steps else "",
        "" if guidance is None else f"guidance {guidance:g}{until_suffix(until) if guidance else ''}",
    )
