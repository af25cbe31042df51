"""Render settings: a project's [render], overridden by the options of a command line."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from k2cli import models
from k2cli.formats import SUFFIXES
from k2cli.sizes import clamped_aspect, fit_aspect, parse_resolution, parse_size
from k2cli.toml_tables import (
    NO_KEY,
    PATH,
    Option,
    between,
    check_value,
    error_context,
    limited,
    matching,
    one_of,
    type_hints,
)
from model.errors import USAGE, K2Error
from model.expand import LEVELS
from model.headers import VARIANTS
from model.plan import OFFLOADS, PRECISIONS
from model.spec import LEAK_GUARDS, SAMPLERS, STYLE_SETTINGS, TILES

SCOPES = ("prompt", "run")
RANDOM = "random"  # instead of a seed
NONE = "none"  # instead of a picture: use none, whatever was set before
SIZE_KEYS = {"size", "aspect", "resolution"}  # of which the last one given counts
PROMPT_KEYS = (  # settings that a [[prompt]] may override
    *("batch", "seed", "size", "aspect", "resolution"),
    *("steps", "guidance", "creativity"),
    *("init_image", "denoise", "mask"),
)

SPEC_KEYS = (  # settings copied as is into a picture's spec
    *("steps", "guidance", "guidance_until", "sampler", "mu"),
    *STYLE_SETTINGS,
)


@dataclass(frozen=True)
class Settings:
    """[render], and the options of `k2 render`. None means the checkpoint's own recommendation."""

    model: str = field(default="mini", metadata=PATH)
    variant: str | None = one_of(None, *VARIANTS)  # of the model's checkpoints; None: raw if it has one
    size: str | None = None
    aspect: str | None = None
    resolution: str | int | None = None
    batch: int = between(1, 1, 1000)
    seed: int | str = field(default=0, metadata={"low": 0, "high": 2**63 - 1, "word": RANDOM})
    avoid: str = ""  # by every prompt, in addition to its own
    steps: int | None = limited("steps")
    guidance: float | None = limited("guidance")
    sampler: str | None = one_of(None, *SAMPLERS)
    guidance_until: float | None = limited("guidance_until")  # share of the steps to guide, from the first on
    mu: float | None = limited("mu")
    init_image: str | None = field(default=None, metadata=PATH)  # to start from instead of noise
    denoise: float | None = limited("denoise")  # how much of it to repaint
    mask: str | None = field(default=None, metadata=PATH)  # which part of it: white in a picture, or "96x64+80+120"
    style_guidance: float | None = limited("style_guidance")  # None: styles share the prompt's guidance
    leak_guard: str | None = one_of(None, *LEAK_GUARDS)
    vision_tiles: int | None = one_of(None, *TILES)
    vision_rows: bool | None = None
    device: str | None = matching(None, r"cpu|mps|cuda(:\d+)?", "cpu", "cuda", "cuda:1", "mps")
    precision: str | None = one_of(None, *PRECISIONS)
    offload: str | None = one_of(None, *OFFLOADS)
    cohesion: float = limited("cohesion", 0.0)  # how much pictures share with the first of their prompt, or of the run
    scope: str = one_of("prompt", *SCOPES)  # whose first picture
    # of the files; only JPEG is lossy
    format: str = field(default="png", metadata={"choices": tuple(SUFFIXES), "also": {"jpg": "jpeg"}})
    creativity: str = one_of("raw", *LEVELS)  # how far prompts are extended
    drawn_seed: int = field(default=0, metadata=NO_KEY)  # the seed that "random" stands for, in the whole run
    sources: Mapping[str, str] = field(default_factory=dict, metadata=NO_KEY)  # keys not set in [render], and where

    def override(self, **given: Any) -> Settings:
        """These settings overridden by a command line's options; None means not given."""
        options = {key: Option(f"--{key.replace('_', '-')}") for key, value in given.items() if value is not None}
        checked = {key: check_setting(key, given[key], where) for key, where in options.items()}
        if "size" in checked and ("aspect" in checked or "resolution" in checked):
            message = "--size excludes --aspect and --resolution."
            raise K2Error(message, hint="Keep --size or the others.", code=USAGE)
        return self.overridden_by(checked, options)

    def overridden_by(self, values: Mapping[str, Any], where: Mapping[str, str]) -> Settings:
        """These settings overridden by others, noting where those were given. Of a size and an aspect the later one
        counts."""
        if "size" in values:
            values = {"aspect": None, "resolution": None, **values}
        elif "aspect" in values or "resolution" in values:
            values = {"size": None, **values}
        return replace(self, **values, sources={**self.sources, **where})

    def yielding(self, keys: Collection[str]) -> Settings:
        """These settings, but a prompt may override those named, even if a command line has set them."""
        freed = {*keys, *(SIZE_KEYS if SIZE_KEYS & set(keys) else ())}
        return replace(self, sources={key: where for key, where in self.sources.items() if key not in freed})

    @property
    def first_seed(self) -> int:
        """The seed of a batch's first picture."""
        return self.drawn_seed if isinstance(self.seed, str) else self.seed

    def model_spec(self) -> models.ModelSpec:
        """The weights that these settings ask for, once the model is found."""
        return models.ModelSpec(
            self.model, self.variant, device=self.device, precision=self.precision, offload=self.offload
        )

    def stronger_than_turbo(self, prompts: Iterable[Mapping[str, Any]]) -> str:
        """A phrase on steps and guidance that the project, not the command line, sets higher than the checkpoint named
        on the command line is made for; else "".

        prompts  the settings of each [[prompt]]
        """
        if "variant" not in self.sources:
            return ""
        defaults = models.recommended_settings(self.model, self.variant)
        tables = [vars(self), *prompts]
        highest = {
            key: max(said.get(key) or 0 for said in tables) for key in ("steps", "guidance") if key not in self.sources
        }
        higher = {key: value for key, value in highest.items() if value > defaults[key]}
        stated = " and ".join(f"{key} = {value:g}" for key, value in higher.items())
        return (
            stated
            and f"{stated}; {self.variant} is made for {' '.join(f'--{key} {defaults[key]:g}' for key in higher)}"
        )

    def resolve_size(
        self, where: Callable[[str], str], grid: models.Grid, init_size: tuple[int, int] | None = None
    ) -> tuple[int | None, int | None]:
        """Width and height of a picture; (None, None) is the checkpoint's own. `where` locates a key for messages.
        `init_size` is the size of the init image: kept if the model knows such a size, else only its shape."""
        if self.size is not None:
            with error_context(where("size")) as at:
                return parse_size(self.size, at, grid.step)
        if self.aspect is None and self.resolution is None and (init_size is None or grid.trained_for(*init_size)):
            return init_size or (None, None)
        with error_context(where("resolution")) as at:
            edge = grid.native if self.resolution is None else parse_resolution(self.resolution, at)
        with error_context(where("resolution" if self.aspect is None else "aspect")) as at:
            return fit_aspect(self.aspect or clamped_aspect(*(init_size or (1, 1))), edge, at, grid.step)


def draw_seed() -> int:
    """A random seed, short enough to type."""
    return int.from_bytes(os.urandom(4))


FIELDS = {f.name: f for f in fields(Settings)}
FOREIGN_NAMES = {  # what other tools call a setting: its name here, and how it differs
    **dict.fromkeys(("negative", "negative_prompt", "no"), ("avoid", "")),
    **dict.fromkeys(("cfg", "cfg_scale", "guidance_scale"), ("guidance", ", and is 1 less than a CFG scale")),
    **dict.fromkeys(("width", "height"), ("size", ', for both sides: "320x192"')),
    **dict.fromkeys(("ar", "aspect_ratio"), ("aspect", "")),
    **dict.fromkeys(("num_steps", "num_inference_steps"), ("steps", "")),
    **dict.fromkeys(("batch_size", "num_images", "count", "n", "num", "repeat"), ("batch", "")),
    **dict.fromkeys(("image", "img2img", "init", "init_img"), ("init_image", "")),
    **dict.fromkeys(("inpaint", "mask_image"), ("mask", "")),
    **dict.fromkeys(("strength", "denoising_strength", "image_strength"), ("denoise", ", and 1 repaints all")),
    "iw": ("denoise", ", and a lower value keeps more"),
    **dict.fromkeys(("checkpoint", "ckpt"), ("model", "")),
}
NO_UPSCALER = "k2 has no upscaler; to repaint larger: k2 render --init-image PICTURE --size WxH --denoise 0.4"
FOREIGN_OPTIONS = {  # k2's answer to options of other tools that are none of its settings
    **dict.fromkeys(("upscale", "hires"), NO_UPSCALER),
    **dict.fromkeys(("sref", "cref", "style_reference"), "Make the picture a style: k2 style add NAME PICTURE"),
    **dict.fromkeys(("s", "stylize", "sw"), "A look is as strong as the weight of its style: --style NAME=0.6"),
    **dict.fromkeys(("v", "version", "niji"), "Choose weights with --model; to list them: k2 models list"),
    **dict.fromkeys(("c", "chaos", "weird"), "Seeds vary more with --creativity high."),
    **dict.fromkeys(("-o", "output", "outdir"), "Pictures go to outputs/; their paths are printed."),
    **dict.fromkeys(("tile", "tiling"), "k2 has no seamless tiling."),
}
FOREIGN_COMMANDS = {  # k2's answer to commands of other tools
    "upscale": NO_UPSCALER,
    **dict.fromkeys(("vary", "remix"), "For more like a picture: k2 render --like PICTURE"),
    "reroll": "For new seeds: k2 render --seed random",
    **dict.fromkeys(("generate", "imagine", "txt2img"), 'Give a prompt with -p: k2 render -p "a red fox"'),
    "img2img": 'Start from a picture: k2 render -p "a red fox" --init-image PICTURE',
    "init": "To make a project: k2 new NAME",
    **dict.fromkeys(("style rm", "style remove", "style delete"), "Delete its file, styles/NAME.toml."),
}
MISPLACED = {  # hints for keys of k2.toml that are in the wrong table
    **{key: "It belongs under [render]." for key, each in FIELDS.items() if each.metadata.get("key", True)},
    "text": "It belongs under [[prompt]].",
    "prompt": "It is called text, under [[prompt]].",
    "avoid": "It belongs under [render] or [[prompt]].",
    "style": "Style weights belong under [style].",
    "images": "It belongs under [moodboard].",
    "turbo": 'Write variant = "turbo" under [render].',
    **dict.fromkeys(("mix", "reference", "keywords", "avoids", "lora"), "It belongs in a style: styles/NAME.toml."),
    **{theirs: f"It is called {ours}{how}." for theirs, (ours, how) in FOREIGN_NAMES.items()},
    **{key: each for key, each in FOREIGN_OPTIONS.items() if key != "version"},  # a file may mean its own
    "seeds": "Write seed, and batch for more; or a [[matrix]] with seed = [1, 5].",
}


def field_for(key: str) -> Any:
    """A dataclass field with the default and the limits of this key of [render]."""
    return field(default=FIELDS[key].default, metadata=FIELDS[key].metadata)


def check_setting(key: str, value: Any, where: str) -> Any:
    """A value, checked and converted as this setting requires."""
    with error_context(where):
        return check_value(key, value, type_hints(Settings)[key], FIELDS[key].metadata, where)


def check_size_keys(values: Mapping[str, Any], where: Callable[[str], str]) -> None:
    """Refuse a size given together with an aspect."""
    if values.get("size") is not None and (values.get("aspect") is not None or values.get("resolution") is not None):
        raise K2Error(f'{where("size")}: "size" excludes "aspect" and "resolution".', hint="Keep size or the others.")
