"""What commands share: options, and how they read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from k2cli.complete import complete_model, complete_prompt, complete_setting

if TYPE_CHECKING:
    from collections.abc import Collection

    from k2cli.matrix import Matrix


ProjectOption = Annotated[
    Path | None, typer.Option("--project", metavar="DIR", help="The project, if not that of the current folder.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object a line on standard output.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Nothing but results and errors.")]
ALLOWED = "K2_ALLOW_OUTSIDE"
OutsideOption = Annotated[
    bool, typer.Option("--allow-outside", envvar=ALLOWED, help="Let the project use files outside its folder.")
]
AcceptOption = Annotated[
    bool, typer.Option("--accept-licence", help="You have read the weights' licence and accept it.")
]
OnlyOption = Annotated[
    list[str] | None,
    typer.Option(
        "--only",
        metavar="NAME",
        help="The project's prompt of this name, or all of 'fo*'.",
        autocompletion=complete_prompt,
    ),
]
TurboOption = Annotated[
    bool | None,
    typer.Option("--turbo/--raw", help="Take the distilled checkpoint, of few steps and no guidance; or the other."),
]
AvoidOption = Annotated[
    list[str] | None,
    typer.Option("--avoid", metavar="WORDS", help="Negative prompt, in the place of [render]'s; may come again."),
]
BatchOption = Annotated[int | None, typer.Option("--batch", "-n", metavar="N", help="Pictures per prompt.")]
SizeOption = Annotated[str | None, typer.Option("--size", metavar="WxH", help="Pixels, multiples of 16, mini's of 32.")]
StepsOption = Annotated[int | None, typer.Option("--steps", metavar="N", help="Denoising steps.")]
GuidanceOption = Annotated[
    float | None, typer.Option("--guidance", metavar="G", help="How far to follow the prompt; 0 is off, 6 is CFG 7.")
]
GuidanceUntilOption = Annotated[
    float | None,
    typer.Option("--guidance-until", metavar="SHARE", help="Guide this share of the steps, the first ones."),
]
StyleGuidanceOption = Annotated[
    float | None,
    typer.Option(
        "--style-guidance",
        metavar="G",
        help="How far to follow reference pictures: 0 as they are, 1 twice as far.",
    ),
]
InitImageOption = Annotated[
    Path | None,
    typer.Option("--init-image", metavar="PICTURE", help="Begin with this one, or, by 'none', with noise after all."),
]
DenoiseOption = Annotated[
    float | None, typer.Option("--denoise", metavar="D", help="How much of it is made anew, up to 1: all.")
]
MaskOption = Annotated[
    str | None,
    typer.Option("--mask", metavar="PART", help="Which part, white in a picture or WxH+X+Y; the rest stays."),
]
ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="MODEL",
        help="A name, a folder, a .safetensors or .gguf file.",
        autocompletion=complete_model,
    ),
]
DeviceOption = Annotated[str | None, typer.Option("--device", metavar="DEVICE", help="cpu, cuda, cuda:1, mps.")]


def choice(key: str, metavar: str, help: str) -> Any:
    """An option that takes certain values, which the shell offers."""
    return typer.Option(f"--{key}", metavar=metavar, help=help, autocompletion=complete_setting(key))


ScopeOption = Annotated[str | None, choice("scope", "S", "Whose first picture leads the others: prompt or run.")]
CreativityOption = Annotated[
    str | None, choice("creativity", "LEVEL", "raw, low, medium, high: what may be added to a prompt.")
]
SamplerOption = Annotated[str | None, choice("sampler", "NAME", "euler, or ab2, which needs fewer steps (for Raw).")]
PrecisionOption = Annotated[str | None, choice("precision", "BITS", "Of the weights: native, int8, fp8 or int4.")]
OffloadOption = Annotated[str | None, choice("offload", "PART", "Read as needed: none, text (encoder) or all.")]
FormatOption = Annotated[str | None, choice("format", "KIND", "Of the files: png, webp (lossless) or jpeg.")]
EmbedOption = Annotated[bool, typer.Option("--no-embed", help="Write no metadata into the pictures.")]


def seed_of(text: str | None) -> int | str | None:
    """A seed as it was typed, a number if it is one."""
    try:
        return None if text is None else int(text)
    except ValueError:
        return text


def variant_of(turbo: bool | None) -> str | None:
    """What --turbo or --raw asks for; None where neither was said."""
    return None if turbo is None else "turbo" if turbo else "raw"


def read_style(text: str, option: str = "--style") -> tuple[str, float]:
    """ "dusk=0.6" → ("dusk", 0.6)."""
    from model.spec import span, within

    name, _, weight = text.rpartition("=")
    try:
        value = float(weight)
    except ValueError:
        value = float("nan")
    if not name or not within("strength", value):
        said = f'"{text}" is not NAME=WEIGHT with a weight of {span("strength")}'
        raise typer.BadParameter(said, param_hint=option)
    return name.strip(), value


def read_styles(texts: Sequence[str]) -> dict[str, float]:
    """ "dusk=0.7", "riso=0.3", as arguments -> each style and its weight, in the order given."""
    weights: dict[str, float] = {}
    for text in texts:
        name, weight = read_style(text, "NAME=W")
        if name in weights:
            raise typer.BadParameter(f'"{name}" comes twice', param_hint="NAME=W")
        weights[name] = weight
    return weights


def read_matrix(texts: Sequence[str], settled: Collection[str]) -> Matrix:
    """The axes of --matrix, each of them once, and none about which another option has decided."""
    from k2cli.matrix import read_axes

    names = [text.partition("=")[0].strip() for text in texts]
    for name in names:
        if names.count(name) > 1:
            raise typer.BadParameter(
                f'"{name}" comes twice; give its values at once: {name}=1,2', param_hint="--matrix"
            )
        if name in settled:
            raise typer.BadParameter(f'"{name}" is settled by another option', param_hint="--matrix")
    return read_axes(texts)
