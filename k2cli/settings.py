"""What a picture is rendered by: [render] of a project, with the options of a command line in its place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, get_type_hints

from k2cli import models
from k2cli.formats import SUFFIXES
from k2cli.sizes import fit_aspect, parse_resolution, parse_size
from k2cli.tables import PATH, between, check_value, like, no_key, one_of
from model.errors import K2Error
from model.expand import LEVELS
from model.plan import OFFLOADS, PRECISIONS
from model.spec import LEAK_GUARDS, TILES

SCOPES = ("prompt", "run")


@dataclass(frozen=True)
class Settings:
    """[render], and the options of `k2 render`. None is the checkpoint's own recommendation."""

    model: str = field(default="mini", metadata=PATH)
    variant: str | None = one_of(None, "raw", "turbo")  # of the model's checkpoints; None: raw where there is one
    size: str | None = None
    aspect: str | None = None
    resolution: str | int | None = None
    batch: int = between(1, 1, 1000)
    seed: int = between(0, 0, 2**63 - 1)
    steps: int | None = between(None, 1, 1000)
    guidance: float | None = between(None, 0, 100)
    mu: float | None = between(None, -10, 10)
    style_guidance: float | None = between(None, 0, 100)  # None: styles are guided with the prompt
    leak_guard: str | None = one_of(None, *LEAK_GUARDS)
    vision_tiles: int | None = one_of(None, *TILES)
    vision_rows: bool | None = None
    device: str | None = like(None, r"cpu|mps|cuda(:\d+)?", "cpu", "cuda", "cuda:1", "mps")
    precision: str | None = one_of(None, *PRECISIONS)
    offload: str | None = one_of(None, *OFFLOADS)
    cohesion: float = between(0.0, 0, 1)  # how much pictures share with the first of their prompt, or of the run
    scope: str = one_of("prompt", *SCOPES)  # whose first picture
    format: str = one_of("png", *SUFFIXES)  # of the files; only JPEG loses anything
    creativity: str = one_of("raw", *LEVELS)  # how far prompts are led beyond what they say
    given: frozenset[str] = no_key(frozenset())  # the keys that a command line has said

    def override(self, **given: Any) -> Settings:
        """These settings with the options of a command line in their place; None means not given.

        No [[prompt]] and no [[matrix]] says again what was given.
        """
        types, limits = get_type_hints(Settings), {f.name: f.metadata for f in fields(Settings)}
        given = {
            k: check_value(k, v, types[k], limits[k], f"--{k.replace('_', '-')}")
            for k, v in given.items()
            if v is not None
        }
        said = self.given | given.keys()
        if "size" in given and ("aspect" in given or "resolution" in given):
            raise K2Error("--size says all that --aspect and --resolution could.", hint="Give the one or the others.")
        if "size" in given:
            given = {"aspect": None, "resolution": None, **given}
        elif "aspect" in given or "resolution" in given:
            given = {"size": None, **given}
        return replace(self, **given, given=said)

    def held(self) -> models.Held:
        """The weights that these settings ask for, once the model is found."""
        return models.Held(self.model, self.variant, device=self.device, precision=self.precision, offload=self.offload)

    def beyond(self) -> str:
        """Steps and guidance that a project asks for, and no command line, where a checkpoint that a command line names
        is made for less."""
        if "variant" not in self.given:
            return ""
        own = models.recommended(self.model, self.variant)
        asked = {key: getattr(self, key) or 0 for key in ("steps", "guidance") if key not in self.given}
        odd = {key: value for key, value in asked.items() if value > own[key]}
        theirs = " and ".join(f"{key} = {value:g}" for key, value in odd.items())
        return theirs and f"{theirs}; {self.variant} is made for {' '.join(f'--{key} {own[key]:g}' for key in odd)}"

    def pixels(self, size: str | None, where: Callable[[str], str]) -> tuple[int | None, int | None]:
        """Width and height of a picture; (None, None) is the checkpoint's own. `where` places a key in messages."""
        if size is not None:
            return parse_size(size, where("size"), models.step(self.model))
        if self.aspect is None and self.resolution is None:
            return None, None
        if self.resolution is None:
            edge = models.native_size(self.model)
        else:
            edge = parse_resolution(self.resolution, where("resolution"))
        said = where("resolution" if self.aspect is None else "aspect")
        return fit_aspect(self.aspect or "1:1", edge, said, models.step(self.model))
