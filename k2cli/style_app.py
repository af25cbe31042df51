"""Commands for styles and moodboards. As in `app.py`, each command imports the heavy modules it needs."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from k2cli.commands import CommandApp, CommandGroup
from k2cli.completion import complete_method, complete_style, complete_weight
from k2cli.locate import find_project
from k2cli.options import (
    DenoiseOption,
    DeviceOption,
    EmbedOption,
    GuidanceOption,
    GuidanceUntilOption,
    InitImageOption,
    JsonOption,
    ModelOption,
    OutsideOption,
    ProjectOption,
    QuietOption,
    SamplerOption,
    SizeOption,
    StepsOption,
    StyleGuidanceOption,
    TurboOption,
    parse_seed,
    parse_style_weights,
    variant_from,
)
from model.errors import K2Error, pluralise

if TYPE_CHECKING:
    from collections.abc import Sequence

    from k2cli.project import Project
    from k2cli.prompts import Prompt
    from k2cli.styles import StyleFile, Styles

style_app = CommandApp(cls=CommandGroup, no_args_is_help=True, rich_markup_mode=None)
moodboard_app = CommandApp(cls=CommandGroup, no_args_is_help=True, rich_markup_mode=None)

ForceOption = Annotated[bool, typer.Option("--force", help="Replace an existing style of this name.")]


@style_app.command()
def add(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the style.")],
    files: Annotated[
        list[Path],
        typer.Argument(metavar="FILE", help="Pictures with the look, or folders; also a LoRA (.safetensors)."),
    ],
    keyword: Annotated[
        list[str] | None, typer.Option("--keyword", "-k", metavar="WORDS", help="Added to the prompt; repeatable.")
    ] = None,
    avoid: Annotated[
        list[str] | None, typer.Option("--avoid", metavar="WORDS", help="Added to the negative prompt; repeatable.")
    ] = None,
    trigger: Annotated[
        list[str] | None,
        typer.Option("--trigger", metavar="WORDS", help="LoRA trigger, added to the prompt; repeatable."),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            "--method",
            metavar="M",
            help="How to read pictures: auto, tokens, splice or vision.",
            autocompletion=complete_method,
        ),
    ] = None,
    force: ForceOption = False,
    project: ProjectOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Make a style from pictures, a LoRA, or both.

    Copies pictures into refs/NAME and a LoRA into loras, and writes styles/NAME.toml. It never writes outside the
    project. Without --trigger it uses the trigger words stated in the LoRA's file, if any. --force overwrites the
    style file; existing files in refs/NAME and loras stay.

    \b
    Examples:
      k2 style add dusk ~/Pictures/dusk/*.jpg -k "film grain"
      k2 style add night outputs/0001-owl/owl-7.png
      k2 style add ink ~/Downloads/ink.safetensors --trigger "in the ink style"
    """
    from k2cli.console import print_result, say, short_path, to_json
    from k2cli.folder import OutsideProject
    from k2cli.new_style import add_style
    from k2cli.pictures import without_sheets
    from k2cli.toml_tables import Option, check_value, error_context
    from model.spec import METHODS

    if method is not None:
        with error_context(Option("--method")) as at:
            check_value("method", method, str, {"choices": METHODS}, at)
    files, sheets = without_sheets(files)
    words = {"keywords": keyword or [], "avoids": avoid or [], "triggers": trigger or []}
    try:
        added = add_style(find_project(project).styles, name, files, **words, method=method, force=force)
    except OutsideProject as error:
        raise K2Error(str(error), hint="Replace the link with the file or folder itself.") from None
    about = {
        "name": name,
        "file": short_path(added.file),
        "references": [short_path(picture) for picture in added.pictures],
        "lora": short_path(added.lora) if added.lora else None,
    }
    print_result(to_json(about) if json else short_path(added.file))
    if not quiet:
        for note in filter(None, (sheets, added.passed_over)):
            say(note, "yellow")
        if added.stated_triggers:
            say(f"Trigger words stated by the LoRA, added to the prompt: {', '.join(added.stated_triggers)}", "dim")
        pictures = pluralise(len(added.pictures), "picture") if added.pictures else ""
        holds = " and ".join(filter(None, [pictures, "1 LoRA" if added.lora else ""]))
        say(f"{holds}. Next: k2 render --style {name}=0.6", "dim")


@style_app.command("list")
def list_styles(project: ProjectOption = None, allow_outside: OutsideOption = False, json: JsonOption = False) -> None:
    """List the styles: file, contents, keywords.

    On a terminal also each style's weight in the project; in a pipe one line per style, fields separated by tabs.
    """
    from k2cli.console import print_result, print_results, screen_width, short_path, to_json
    from k2cli.status import describe_weight

    opened, rows = find_project(project, allow_outside), []
    usable = usable_styles(opened.styles)
    for name, style in usable.items():
        path = opened.root / opened.styles.file_of(name)
        kinds = [
            pluralise(len(style.references), "picture") if style.references else "",
            "a mix of " + ", ".join(style.mix) if style.mix else "",
            f"lora {style.lora.name}" if style.lora else "",
        ]
        about = {
            "name": name,
            "file": short_path(path),
            "references": [short_path(each.image) for each in style.references],
            "keywords": list(style.keywords),
            "avoids": list(style.avoids),
            "method": style.method,
            "mix": dict(style.mix),
            "lora": short_path(style.lora) if style.lora else None,
            "weight": opened.weights.get(name, 0.0),
        }
        if json:
            print_result(to_json(about))
        weight = [describe_weight(opened, name)] if screen_width() else []
        rows.append([short_path(path), *weight, ", ".join(filter(None, kinds)) or "words", ", ".join(style.keywords)])
    if not json:
        print_results(rows)
    if len(usable) < len(opened.styles.names):
        raise typer.Exit(1)


def usable_styles(styles: Styles) -> dict[str, StyleFile]:
    """The styles that can be used, by name. Errors in the others are shown; if a mix fails by an error already shown,
    only that it mixes an unusable style."""
    from k2cli.console import show_error
    from k2cli.texts import file_label

    usable: dict[str, StyleFile] = {}
    shown: set[str] = set()
    for name in styles.names:
        try:
            usable[name] = styles.read(name, "k2 style list")
        except K2Error as error:
            show_error(error)
            shown.add(str(error))
    for name in [name for name, style in usable.items() if style.mix]:
        try:
            styles.resolve({name: 0.0}, lambda name: "k2 style list")  # which is too strong for none
        except K2Error as error:
            mix_error = K2Error(f"{file_label(styles.root, styles.file_of(name))} mixes a style that cannot be used.")
            show_error(mix_error if str(error) in shown else error)
            shown.add(str(error))
            del usable[name]
    return usable


@style_app.command("show")
def show_style(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A style of the project.", autocompletion=complete_style)],
    project: ProjectOption = None,
    allow_outside: OutsideOption = False,
    json: JsonOption = False,
) -> None:
    """Show what a style amounts to at weight 1.

    Its mixes broken down into parts; the words, references and weights of each.
    """
    from k2cli.console import print_result, to_json
    from k2cli.records import style_table
    from k2cli.status import describe_weight
    from k2cli.texts import relative_path

    opened = find_project(project, allow_outside)
    parts = opened.styles.resolve({name: 1.0}, lambda name: "k2 style show")
    if json:
        weight = opened.weights.get(name, 0.0)
        print_result(
            to_json({"name": name, "weight": weight, "parts": [style_table(part, opened.root) for part in parts]})
        )
        return
    print_result(f"{name} at weight 1 (in the project: {describe_weight(opened, name).removeprefix('weight ')})")
    for part in parts:
        print_result(f"{part.name} {part.strength:g}")
        facts = {
            "keywords": ", ".join(part.keywords),
            "avoids": ", ".join(part.avoids),
            "triggers": ", ".join(part.triggers),
            "lora": relative_path(part.lora, opened.root) if part.lora else "",
            "method": part.method if part.references else "",
            "pictures": "\n            ".join(
                f"{reference.weight:<5g} {relative_path(reference.image, opened.root)}" for reference in part.references
            ),
        }
        for key, fact in facts.items():
            if fact:
                print_result(f"  {key:<10}{fact}")


def mix_styles(
    styles: Annotated[
        list[str],
        typer.Argument(metavar="NAME=W", help="Styles and their weights, −2 … 2.", autocompletion=complete_weight),
    ],
    save_as: Annotated[
        str | None, typer.Option("--save-as", metavar="NAME", help="Save the mix as a style of this name.")
    ] = None,
    sweep: Annotated[
        int | None,
        typer.Option("--sweep", metavar="N", help="Render N pictures from style to style instead."),
    ] = None,
    preview: Annotated[
        bool, typer.Option("--preview/--no-preview", help="Render the parts and the mix side by side.")
    ] = True,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", metavar="TEXT", help="The prompt; default: the project's first.")
    ] = None,
    turbo: TurboOption = None,
    seed: Annotated[
        str | None, typer.Option("--seed", metavar="N", help="One seed for every picture; or random.")
    ] = None,
    size: SizeOption = None,
    init_image: InitImageOption = None,
    denoise: DenoiseOption = None,
    steps: StepsOption = None,
    guidance: GuidanceOption = None,
    guidance_until: GuidanceUntilOption = None,
    sampler: SamplerOption = None,
    style_guidance: StyleGuidanceOption = None,
    model: ModelOption = None,
    device: DeviceOption = None,
    force: ForceOption = False,
    project: ProjectOption = None,
    no_embed: EmbedOption = False,
    allow_outside: OutsideOption = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Mix styles by weight, preview the mix, save it as a style.

    Prints the style's file, if saved, then the path of each picture, then their contact sheet. With --sweep two styles
    give a path, three a triangle, more a path for every pair. With --init-image all pictures start from that one.

    \b
    Examples:
      k2 mix-styles dusk=0.7 riso=0.3 --save-as blend
      k2 mix-styles dusk=1 riso=1 --sweep 8
      k2 mix-styles dusk=1 riso=1 ink=1 --sweep 4 -p "a teapot"
      k2 mix-styles dusk=1 riso=1 --init-image sketch.png --denoise 0.6
    """
    from k2cli import mix
    from k2cli.console import print_result, say, short_path, to_json
    from k2cli.execute import execute
    from k2cli.matrix import text_readings
    from k2cli.new_style import add_mix

    opened = find_project(project, allow_outside)
    weights = parse_style_weights(styles)
    if not any(weights.values()):
        raise typer.BadParameter("all weights are 0", param_hint="NAME=W")
    opened.styles.resolve(weights, lambda name: "k2 mix-styles")
    if sweep is None and not preview and save_as is None:
        raise typer.BadParameter("without --sweep or --save-as there is nothing left to do", param_hint="--no-preview")
    jobs = []
    if sweep is not None or preview:
        settings = opened.resolve_settings(
            **{
                "variant": variant_from(turbo),
                "seed": parse_seed(seed),
                "size": size,
                "steps": steps,
                "guidance": guidance,
            },
            **{"guidance_until": guidance_until, "sampler": sampler, "style_guidance": style_guidance},
            **{"init_image": init_image and str(init_image), "denoise": denoise, "model": model, "device": device},
        )
        layout = mix.preview(weights) if sweep is None else mix.sweep(weights, sweep)
        chosen_prompt = pick_prompt(opened, prompt)
        jobs = [mix.plan_job(opened, settings, chosen_prompt, layout)]
        if not quiet and (choices := len(text_readings(chosen_prompt.text))) > 1:
            say(f"The prompt has {choices} choices; only the first is used.", "yellow")
    if save_as is not None:
        file = short_path(add_mix(opened.styles, save_as, weights, force=force))
        print_result(to_json({"kind": "style", "name": save_as, "file": file, "mix": weights}) if json else file)
        if not quiet and not jobs:
            say(f"Next: k2 render --style {save_as}=1", "dim")
    for folder in execute(jobs, embed=not no_embed, as_json=json, quiet=quiet):
        if (folder / "sheet.png").exists():
            sheet = short_path(folder / "sheet.png")
            print_result(to_json({"kind": "sheet", "file": sheet}) if json else sheet)


def pick_prompt(project: Project, text: str | None) -> Prompt:
    """The prompt that was typed, or the project's first."""
    from k2cli.prompts import typed_prompt

    if text is not None:
        return typed_prompt(text)
    if not project.prompts:
        raise K2Error("The project has no [[prompt]].", hint='Give one with -p: -p "a red fox"')
    return project.prompts[0]


@moodboard_app.command()
def analyze(
    images: Annotated[
        list[Path] | None,
        typer.Argument(metavar="IMAGE", help="Pictures or folders; default: those of [moodboard]."),
    ] = None,
    name: Annotated[str, typer.Option("--name", metavar="NAME", help="Name of the style to write.")] = "board",
    force: ForceOption = False,
    project: ProjectOption = None,
    allow_outside: OutsideOption = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Find a moodboard's looks, colours and words; write a style.

    Writes styles/NAME.toml, to edit as you like, with the pictures that represent each look, and the colours as
    styles/NAME.png. Pictures outside the project or in its outputs/ are copied to refs/NAME-looks. With the open
    weights, their text encoder also looks at the board and describes its taste.

    \b
    Examples:
      k2 moodboard analyze refs/board/*
      k2 moodboard analyze refs/summer refs/sea --name coast
    """
    from dataclasses import replace

    from k2cli import moodboard
    from k2cli.console import meter, print_result, say, short_path, to_json
    from k2cli.disk import Exists
    from k2cli.pictures import without_sheets
    from k2cli.texts import display_safe
    from k2cli.toml_tables import Option, error_context
    from model.picture_file import describe_skipped

    home = find_project(project, allow_outside)
    with error_context(Option("--name")) as at:
        name = home.styles.check_new_name(name, at)
    target = home.path_inside(f"styles/{name}.toml")

    def exists_error(path: Path) -> K2Error:
        return K2Error(f"{short_path(path)} exists already.", hint="Choose another --name, or replace it with --force.")

    if not force:
        for path in (target, target.with_suffix(".png")):
            if path.exists():
                raise exists_error(path)
    images, sheets = without_sheets(images or [])
    paths, skipped = pick_pictures(home, images)
    with meter(len(paths), quiet=quiet) as bar:
        board = moodboard.analyse_board(paths, home.settings.model, lambda done, of: bar.saved(done))
    board = replace(board, notes=(*filter(None, (sheets, describe_skipped(skipped))), *board.notes))
    model = ""
    with suppress(K2Error):  # a model not pulled yet has nothing to say
        model = home.resolve_settings().model
    if model:
        board = moodboard.describe_taste(board, model, home.settings.device)
    # The project's board may be refs/NAME itself, which must not grow by its own looks.
    board = moodboard.with_copies(board, home, f"refs/{target.stem}-looks")
    try:
        palette_file = moodboard.save_style(board, home.root, target, new=not force)
    except Exists as error:  # created since the check above
        raise exists_error(error.path) from None
    print_result(
        to_json({"file": short_path(target), **moodboard.to_table(board, home.root)}) if json else short_path(target)
    )
    if not quiet:
        for note in board.notes:
            say(display_safe(note), "yellow")
        for sentence in filter(None, (board.told, board.profile)):
            say(sentence)
        say(f"Colours: {short_path(palette_file)}. Edit the style, then use it: k2 render --style {name}=0.35", "dim")


def pick_pictures(home: Project, images: Sequence[Path]) -> tuple[list[Path], set[Path]]:
    """A moodboard's pictures, those named or else those of [moodboard], and the other files beside them. Raises
    K2Error."""
    from k2cli import moodboard
    from k2cli.folder import Folder
    from k2cli.texts import relative_path

    if images:
        root = home.root.resolve()  # links may lead to either
        paths = [relative_path(image.parent.resolve() / image.name, root) for image in images]
        unrestricted = Folder(root=home.root, allow_outside=True)  # a path typed by the user may lie outside
        return moodboard.gather_pictures(paths, home.root, unrestricted.path_inside, "The moodboard")
    if home.board:
        return home.board_pictures(home.board)
    raise K2Error(
        "There is no moodboard: no picture was named, and k2.toml has no [moodboard].",
        hint="Name pictures: k2 moodboard analyze refs/board/*",
    )
