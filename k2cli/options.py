"""Options that several commands share, and how their values are read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from k2cli.completion import complete_model, complete_prompt, complete_setting

if TYPE_CHECKING:
    from collections.abc import Collection

    from k2cli.matrix import Matrix


ProjectOption = Annotated[
    Path | None, typer.Option("--project", metavar="DIR", help="The project; default: that of the current folder.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object per line.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Print only results and errors.")]
OUTSIDE_ENV = "K2_ALLOW_OUTSIDE"
OutsideOption = Annotated[
    bool, typer.Option("--allow-outside", envvar=OUTSIDE_ENV, help="Let the project use files outside its folder.")
]
AcceptOption = Annotated[bool, typer.Option("--accept-licence", help="You have read and accept the weights' licence.")]
OnlyOption = Annotated[
    list[str] | None,
    typer.Option(
        "--only",
        metavar="NAME",
        help="Only prompts of this name, or that match 'fo*'.",
        autocompletion=complete_prompt,
    ),
]
TurboOption = Annotated[
    bool | None,
    typer.Option("--turbo/--raw", help="Distilled (few steps, no guidance) or raw weights."),
]
AvoidOption = Annotated[
    list[str] | None,
    typer.Option("--avoid", metavar="WORDS", help="Negative prompt instead of [render]'s; repeatable."),
]
BatchOption = Annotated[int | None, typer.Option("--batch", "-n", metavar="N", help="Pictures per prompt.")]
SizeOption = Annotated[str | None, typer.Option("--size", metavar="WxH", help="Pixels, multiples of 16 (mini: 32).")]
StepsOption = Annotated[int | None, typer.Option("--steps", metavar="N", help="Denoising steps.")]
GuidanceOption = Annotated[
    float | None,
    typer.Option("--guidance", metavar="G", help="Prompt adherence; 0 is off, 6 is CFG 7."),
]
GuidanceUntilOption = Annotated[
    float | None,
    typer.Option("--guidance-until", metavar="SHARE", help="Share of the steps to guide, from the first on."),
]
StyleGuidanceOption = Annotated[
    float | None,
    typer.Option(
        "--style-guidance",
        metavar="G",
        help="Extra guidance by references; 0 adds none, 1 doubles it.",
    ),
]
InitImageOption = Annotated[
    Path | None,
    typer.Option("--init-image", metavar="PICTURE", help="Start from this picture; 'none' starts from noise."),
]
DenoiseOption = Annotated[
    float | None, typer.Option("--denoise", metavar="D", help="How much of it to repaint; 1 repaints all.")
]
MaskOption = Annotated[
    str | None,
    typer.Option("--mask", metavar="PART", help="Repaint only this: white in a picture, or WxH+X+Y."),
]
ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="MODEL",
        help="A name, a folder, or a .safetensors or .gguf file.",
        autocompletion=complete_model,
    ),
]
DeviceOption = Annotated[str | None, typer.Option("--device", metavar="DEVICE", help="cpu, cuda, cuda:1, mps.")]


def choice_option(key: str, metavar: str, help: str) -> Any:
    """An option with a fixed set of values, which the shell completes."""
    return typer.Option(f"--{key}", metavar=metavar, help=help, autocompletion=complete_setting(key))


ScopeOption = Annotated[str | None, choice_option("scope", "S", "Whose first picture sets the look: prompt or run.")]
CreativityOption = Annotated[
    str | None, choice_option("creativity", "LEVEL", "How freely to extend prompts: raw, low, medium, high.")
]
SamplerOption = Annotated[
    str | None, choice_option("sampler", "NAME", "euler, or ab2, which needs fewer steps (for Raw).")
]
PrecisionOption = Annotated[
    str | None, choice_option("precision", "BITS", "Weight precision: native, int8, fp8 or int4.")
]
OffloadOption = Annotated[str | None, choice_option("offload", "PART", "Read as needed: none, text (encoder) or all.")]
FormatOption = Annotated[str | None, choice_option("format", "KIND", "File format: png, webp (lossless) or jpeg.")]
EmbedOption = Annotated[bool, typer.Option("--no-embed", help="Write no metadata into the pictures.")]


def parse_seed(text: str | None) -> int | str | None:
    """A seed as typed, as a number if it is one."""
    try:
        return None if text is None else int(text)
    except ValueError:
        return text


def variant_from(turbo: bool | None) -> str | None:
    """The variant that --turbo or --raw asks for; None if neither was given."""
    return None if turbo is None else "turbo" if turbo else "raw"


def parse_style_weight(text: str, option: str = "--style") -> tuple[str, float]:
    """ "dusk=0.6" → ("dusk", 0.6)."""
    from model.spec import in_limits, limits_of

    name, _, weight = text.rpartition("=")
    try:
        value = float(weight)
    except ValueError:
        value = float("nan")
    if not name or not in_limits("strength", value):
        message = f'"{text}" is not NAME=WEIGHT with a weight of {limits_of("strength")}'
        raise typer.BadParameter(message, param_hint=option)
    return name.strip(), value


def parse_style_weights(texts: Sequence[str]) -> dict[str, float]:
    """The arguments "dusk=0.7", "riso=0.3" -> each style and its weight, in the order given."""
    weights: dict[str, float] = {}
    for text in texts:
        name, weight = parse_style_weight(text, "NAME=W")
        if name in weights:
            raise typer.BadParameter(f'"{name}" is given twice', param_hint="NAME=W")
        weights[name] = weight
    return weights


def parse_matrix(texts: Sequence[str], fixed: Collection[str]) -> Matrix:
    """The axes of --matrix, each given once, and none that another option has already set."""
    from k2cli.matrix import read_axes

    names = [text.partition("=")[0].strip() for text in texts]
    for name in names:
        if names.count(name) > 1:
            raise typer.BadParameter(
                f'"{name}" is given twice; list its values together: {name}=1,2', param_hint="--matrix"
            )
        if name in fixed:
            raise typer.BadParameter(f'"{name}" is already set by another option', param_hint="--matrix")
    return read_axes(texts)
