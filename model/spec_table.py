"""A picture's settings in plain values: its own part of the record, beside the model's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from model.cohesion import lead_spec, shared_amounts
from model.resolve import ResolvedSpec

RECORDED_SEPARATELY = ("styles", "loras", "leader", "init_image", "mask")  # fields that are recorded in another form


def spec_table(spec: ResolvedSpec, files: Mapping[Path, str]) -> dict[str, Any]:
    """A resolved spec for a record; `files` are the sha256 of its references, init image and mask."""
    init_image, mask = spec.init_image, spec.mask
    masked = {"image": str(mask), "sha256": files[mask]} if isinstance(mask, Path) else {"region": mask}
    return {
        **{key: value for key, value in vars(spec).items() if key not in RECORDED_SEPARATELY and value is not None},
        **({"init_image": {"image": str(init_image), "sha256": files[init_image]}} if init_image else {}),
        **({"mask": masked} if mask else {}),
        **({"leader": vars(spec.leader), "shared": shared_amounts(spec)} if lead_spec(spec) else {}),
        "styles": [
            {
                "name": style.name,
                "strength": style.strength,
                "keywords": list(style.keywords),
                "avoids": list(style.avoids),
                "method": style.method,
                "references": [
                    {"image": str(each.image), "weight": each.weight, "sha256": files[each.image]}
                    for each in style.references
                ],
            }
            for style in spec.styles
        ],
    }
