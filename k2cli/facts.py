"""What is said of a picture to people, by its record."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from k2cli.console import aligned
from k2cli.history import loras
from k2cli.records import Record
from k2cli.tables import masked
from model.errors import count_of


def describe(record: Record) -> str:
    """A record for people: what it says, a fact a line."""
    spec, used, table = record.shot.spec, record.model, record.table
    looks = [
        f"{style.name} {style.strength:g}{', ' + style.method if style.references else ''}"
        + "".join(f"\n  {reference.image}" for reference in style.references)
        for style in spec.styles
    ]
    versions, blocked = table.get("versions", {}), table.get("blocked")
    facts = {
        "blocked": f"by {blocked.get('filter')}: {blocked.get('reason')}" if isinstance(blocked, dict) else "",
        "prompt": record.shot.given,
        "expanded": "" if spec.prompt == record.shot.given else spec.prompt,
        "creativity": record.shot.creativity if record.shot.creativity != "raw" else "",
        "avoid": spec.negative,
        "styles": "\n".join(looks),
        "loras": "\n".join(loras(table)),
        "size": f"{spec.width} x {spec.height}",
        **{key: getattr(spec, key) for key in ("seed", "steps")},
        "guidance": f"{spec.guidance}{lasting(spec.guidance_until)}",
        "mu": spec.mu,
        "sampler": spec.sampler if spec.sampler != "euler" else "",
        "cohesion": f"{spec.cohesion:g}, led by seed {spec.leader.seed} of: {spec.leader.prompt}"
        if spec.leader
        else "",
        "apart": "" if spec.style_guidance is None else f"style guidance {spec.style_guidance:g}",
        "guard": spec.leak_guard or "",
        "begun with": spec.init_image or "",
        "made anew": " of ".join(str(part) for part in (spec.denoise, spec.mask) if part is not None),
        "model": f"{used.name} {used.variant or ''}",
        "files": "\n".join(f"{sha[:12]}  {name}" for name, sha in record.files.items()),
        "device": f"{used.device}, {used.dtype}",
        "weights": "" if used.precision in (None, "native") else used.precision,
        "offload": "" if used.offload in (None, "none") else used.offload,
        **{key: table.get(key, "") for key in ("created", "seconds", "pixels")},
        "versions": ", ".join(f"{name} {number}" for name, number in versions.items()) if versions else "",
    }
    lines = [(name, line) for name, fact in facts.items() if fact != "" for line in str(fact).split("\n")]
    return aligned([(name, masked(line)) for name, line in lines], 2 + max(map(len, facts)))


def lasting(until: float | None) -> str:
    """What is said behind guidance of when it ends, where that is before the last step."""
    return "" if until in (None, 1) else f" until {until:g}"


def course(settings: Mapping[str, Any]) -> tuple[str, str]:
    """Steps and guidance for people, with what of them is not as usual: a sampler that is not Euler's, an early end."""
    sampler, until = settings.get("sampler"), settings.get("guidance_until")
    steps = count_of(settings["steps"], "step") + (f" of {sampler}" if sampler not in (None, "euler") else "")
    return steps, f"guidance {settings['guidance']:g}{lasting(until) if settings['guidance'] else ''}"
