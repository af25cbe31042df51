"""What commands share: options, and how they read."""

from __future__ import annotations

import codecs
import math
import os
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from k2cli.complete import complete_model, complete_prompt, complete_setting
from model.errors import K2Error

if TYPE_CHECKING:
    from collections.abc import Collection

    from k2cli.folder import Folder
    from k2cli.matrix import Matrix
    from k2cli.project import Project
    from k2cli.prompts import Prompt


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


def meant_by(word: str, words: Sequence[str], prompts: Sequence[str]) -> str:
    """A hint at what is meant by a word where a project's folder belongs: a prompt, known or new, or the rest of one.

    words    all that stand there
    prompts  those of -p
    """
    from k2cli.project import Project
    from k2cli.tables import quote

    if any(prompt.split() != [prompt] for prompt in prompts):  # which was quoted, so that this one is another
        return f"Each prompt goes with its own -p, and a project is made by: k2 new {quote(word)}"
    if len(prompts) == 1:
        there = "".join(f"{quote(each)} " for each in words if os.path.exists(each))
        whole = " ".join([*prompts, *(each for each in words if not os.path.exists(each))])
        return f"A prompt of several words stands in quotes: k2 render {there}-p {quote(whole)}"
    if word.split() == [word] and ("/" in word or os.sep in word):
        return "Check the path."
    with suppress(K2Error):
        if (here := Project.around(Path.cwd())) and here.choose([word]):
            return f"The prompt of that name: k2 render --only {quote(word)}"
    return f"A prompt goes with -p: k2 render -p {quote(word)}"


def find_file(file: Path, project: Path | None) -> Path:
    """A picture or a record as it is named: from the current folder on, else within the project that is named."""
    from k2cli.folder import Folder

    if project is None:
        return file
    there = Folder.at(project).root / file
    return there if not os.path.exists(file) and os.path.exists(there) else file


def find_home(file: Path, project: Path | None, allow_outside: bool) -> Folder | None:
    """A picture's project: the one named, else the nearest above the picture, else above the current folder. Whatever
    its k2.toml says by now, the picture was made."""
    from k2cli.folder import Folder, root_above

    root = project or root_above(file.absolute().parent) or root_above(Path.cwd())
    return Folder.at(root, allow_outside=allow_outside) if root else None


def find_project(project: Path | None, allow_outside: bool = False) -> Project:
    from k2cli.project import Project

    at = Project.open if project else Project.find
    return at(project or Path.cwd(), allow_outside=allow_outside)


def open_projects(
    folders: Sequence[str], project: Path | None, allow_outside: bool, prompts: Sequence[str] = ()
) -> list[Project]:
    """The projects named, each once, however it is called; or the one that the current folder belongs to. Raises
    K2Error where anything is wrong with any, once all of that is told.

    prompts  those of -p, for a hint where words stand that name no folder
    """
    from k2cli.project import Project
    from k2cli.several import refuse, tried

    gone = [name for name in folders if not os.path.exists(name)]  # what most people type first
    said = ((name, name if len(name) < 80 else f"{name[:80]}…") for name in gone)
    wrong = [K2Error(f"There is no project {short}.", hint=meant_by(name, folders, prompts)) for name, short in said]
    if gone and len(gone) == len(folders):
        raise wrong[0]
    found, no_projects = find_folders([name for name in folders if name not in gone], project, allow_outside)
    opened, unread = tried(found, lambda each: Project.open(each.root, allow_outside=allow_outside))
    refuse([*wrong, *no_projects, *unread])
    return opened


def find_folders(
    folders: Sequence[str], project: Path | None, allow_outside: bool
) -> tuple[list[Folder], list[K2Error]]:
    """The same without a look into their k2.toml, and what is wrong with those that are named and are no projects."""
    from k2cli.folder import Folder

    if folders and project:
        raise typer.BadParameter("name projects as arguments or with --project, not both", param_hint="--project")
    if not folders:
        at = Folder.at if project else Folder.find
        return [at(project or Path.cwd(), allow_outside=allow_outside)], []
    found: dict[Path, Folder] = {}
    wrong = []
    for name in folders:
        try:
            each = Folder.at(Path(name), allow_outside=allow_outside)
            found.setdefault(each.root.resolve(), each)
        except K2Error as error:
            wrong.append(error)
    return list(found.values()), wrong


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


def read_weights(texts: Sequence[str], option: str) -> dict[str, float]:
    """ "dusk=0.7", "riso=0.3" -> each style and its weight, in the order given."""
    weights: dict[str, float] = {}
    for text in texts:
        name, weight = read_style(text, option)
        if name in weights:
            raise typer.BadParameter(f'"{name}" comes twice', param_hint=option)
        weights[name] = weight
    return weights


def read_prompts(texts: Sequence[str], *, stdin: bool) -> list[Prompt] | None:
    """Prompts of the command line and of standard input; None where neither was used."""
    from k2cli.prompts import refuse_twins, typed
    from k2cli.stream import asked_by

    prompts = [typed(text) for text in texts]
    if stdin:
        if sys.stdin.isatty():
            typer.echo("Prompts, one a line; Ctrl-D ends:", err=True)
        # the mark that some editors begin a text with comes again where such files are joined
        lines = (line.removeprefix("\ufeff").strip() for line in re.split(r"\r\n?|\n", read_input()))
        said = {number: asked_by(line, f"Line {number}") for number, line in enumerate(lines, 1) if line}
        if not (said or texts):
            raise K2Error("Standard input holds no prompt.", hint="Give one a line, or leave the - out.")
        refuse_twins((f"Line {number}", prompt) for number, prompt in said.items())
        prompts += said.values()
    return prompts if texts or stdin else None


def read_input() -> str:
    """All of standard input. Raises K2Error where it is no text."""
    return decoded(sys.stdin.buffer.read())


def decoded(said: bytes) -> str:
    """What came on standard input: UTF-8, as programs write it, else in the encoding here. Raises K2Error."""
    encoding = codecs.lookup(sys.stdin.encoding).name
    for each in ("utf-8", encoding):
        with suppress(UnicodeError):
            return said.decode(each)
    raise K2Error(f"Standard input is no text in the encoding here, {encoding}.", hint="Save it as UTF-8.")


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


def to_json(table: Any) -> str:
    """One line of JSON; control characters that JSON lets pass are escaped too, as terminals obey some of them.

    JSON has no nan and no inf: they are null. It is UTF-8, or ASCII where standard output speaks something else.
    """
    import json

    from k2cli.tables import UNPRINTABLE

    escaped = codecs.lookup(sys.stdout.encoding or "utf-8").name != "utf-8"

    def write(value: Any) -> str:
        return json.dumps(value, ensure_ascii=escaped, allow_nan=False, default=lambda moment: moment.isoformat())

    try:
        text = write(table)
    except ValueError:
        text = write(finite(table))
    return UNPRINTABLE.sub(lambda sign: f"\\u{ord(sign[0]):04x}", text)


def finite(value: Any) -> Any:
    """The same with None for every number that is not finite."""
    if isinstance(value, Mapping):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
