"""The commands about existing pictures. As in `app.py`, each command does its own heavy imports."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from k2cli.completion import complete_run, complete_style
from k2cli.locate import find_file, find_folders, find_project_of
from k2cli.options import EmbedOption, JsonOption, OutsideOption, ProjectOption, QuietOption
from model.errors import K2Error, pluralise

if TYPE_CHECKING:
    from k2cli.folder import Folder
    from k2cli.history import MadePicture, Selection

SCREENFUL = 30  # pictures that a terminal shows by default

RunOption = Annotated[
    str,
    typer.Option(
        "--run", metavar="RUN", help="Only this run: its number, or part of its name.", autocompletion=complete_run
    ),
]
PromptFilterOption = Annotated[
    list[str] | None,
    typer.Option("--prompt", "-p", metavar="WORDS", help="Match the start of words in the prompt or its name."),
]
StyleFilterOption = Annotated[
    list[str] | None,
    typer.Option(
        "--style",
        metavar="NAME",
        help="Made with this style; if repeated, with all of them.",
        autocompletion=complete_style,
    ),
]
SinceOption = Annotated[
    str | None,
    typer.Option("--since", metavar="WHEN", help="How far back: 30m, 2h, 3d, 1w, today, yesterday, 2026-11-24."),
]


def selection_from(run: str, prompt: list[str] | None, style: list[str] | None, since: str | None) -> Selection | None:
    """Which pictures these options select; None if none is given. Raises K2Error."""
    from k2cli import history

    if not (run or prompt or style or since is not None):
        return None
    moment = history.parse_since(since) if since is not None else None
    return history.Selection(run, " ".join(prompt or []), style or [], moment)


def log(
    projects: Annotated[list[str] | None, typer.Argument(metavar="PROJECT", help="Project folders.")] = None,
    run: RunOption = "",
    prompt: PromptFilterOption = None,
    style: StyleFilterOption = None,
    since: SinceOption = None,
    last: Annotated[int | None, typer.Option("--last", "-n", metavar="N", min=1, help="Only the last N.")] = None,
    everything: Annotated[
        bool, typer.Option("--all", help=f"All pictures; by default a terminal shows the last {SCREENFUL}.")
    ] = False,
    null: Annotated[bool, typer.Option("--null", "-0", help="Only paths, each ended by a NUL, for xargs -0.")] = False,
    project: ProjectOption = None,
    allow_outside: OutsideOption = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """List pictures, newest last.

    A table on a terminal; in a pipe one line each, with tab-separated fields: file, when, seed, size, styles, prompt.

    \b
    Examples:
      k2 log --since 2d --style dusk
      k2 log -p "fox snow" --json | jq -r .file
      k2 log ~/projects/*/ --run 3
      k2 log --style dusk -0 | xargs -0 cp -t ~/dusk
    """
    from k2cli import history
    from k2cli.console import print_result, say, short_path, show_error, to_json, writing_results
    from k2cli.listing import short_picture_path, show_table, tsv_line

    if everything and last is not None:
        raise typer.BadParameter("it cannot be combined with --last", param_hint="--all")
    if null and json:
        raise typer.BadParameter("it cannot be combined with --json", param_hint="--null")
    folders, errors = find_folders(projects or [], project, allow_outside)
    selection = selection_from(run, prompt, style, since)
    skipped: list[Path] = []
    table = sys.stdout.isatty() and not json and not null
    short = table and last is None and not everything
    limit = SCREENFUL if short else last
    count = 0

    def all_pictures() -> Iterator[MadePicture]:
        """Of all projects; an error in one does not stop the others."""
        nonlocal count
        for folder in folders:
            try:
                for each in history.read(folder.outputs, selection, skipped.append):
                    count += 1
                    yield each
            except K2Error as error:
                errors.append(error)

    pictures = history.latest(all_pictures(), limit)
    if json:
        for each in pictures:
            print_result(to_json({"file": short_picture_path(each), **history.with_nulls(each.table)}))
    elif table:
        show_table(pictures)
    else:
        with writing_results():
            lines = (f"{short_picture_path(each)}\0" if null else f"{tsv_line(each)}\n" for each in pictures)
            print("".join(lines), end="", flush=True)
    if not quiet:
        if not count and not errors:
            message = (
                f"No picture matches. {explain_no_match(folders, selection)}"
                if selection
                else no_pictures_hint(folders)
            )
            say(message.rstrip(), "dim")
        elif len(pictures) < count:
            say(f"The last {len(pictures)} of {count:,} pictures{'; --all lists them all' if short else ''}.", "dim")
        if skipped:
            say(f"{len(skipped)} left out, record missing or unreadable: {short_path(skipped[0])}", "yellow")
    for problem in errors:
        show_error(problem)
    if errors:
        raise typer.Exit(1)


def no_pictures_hint(folders: Sequence[Folder]) -> str:
    """Say that projects have no pictures yet, and which command makes some."""
    from k2cli.console import for_shell
    from k2cli.folder import find_root
    from k2cli.status import first_command

    if len(folders) > 1:
        return "No pictures yet. Make some: k2 render"
    here, root = find_root(Path.cwd()), folders[0].root
    there = "" if here and here.samefile(root) else f" --project {for_shell(root)}"
    return f"No pictures yet. Make some: {first_command(folders[0].outputs)}{there}"


def explain_no_match(folders: Sequence[Folder], selection: Selection) -> str:
    """Why a selection may match no picture: a run or a style that does not exist, or a style that no record names; ""
    if nothing explains it."""
    from k2cli import history
    from k2cli.styles import BOARD_STYLE, Styles
    from k2cli.texts import nfc
    from model.errors import did_you_mean, nearest

    runs: list[str] = []
    known: set[str] = set()  # some styles live on only in pictures
    for folder in folders:
        with suppress(K2Error):
            runs += [run.name for run in history.run_folders(folder.outputs)]
            known.update(name for made in history.read(folder.outputs) for name in made.styles)
            known.update(Styles(folder.root, folder.path_inside).names)
    reasons = []
    if runs and not any(map(selection.matches_run, runs)):
        last = f"The last is {runs[-1]}." if len(folders) == 1 else ""
        reasons += [f'There is no run "{selection.run}".', did_you_mean(selection.run, runs) or last]
    for name in selection.styles:
        if nfc(name) not in {*known, BOARD_STYLE}:
            reasons += [f'There is no style "{name}".', nearest(name, sorted(known))]
    return " ".join(filter(None, (*reasons, mix_hint(folders, selection.styles))))


def mix_hint(folders: Sequence[Folder], styles: Iterable[str]) -> str:
    """For styles that are mixes and nothing else, the parts that records name instead; "" if there are none."""
    from k2cli.styles import Styles
    from k2cli.texts import nfc, shell_quote

    hints: dict[str, None] = {}
    for folder in folders:
        for name in map(nfc, styles):
            with suppress(K2Error):
                parts = [
                    part.name for part in Styles(folder.root, folder.path_inside).resolve({name: 1.0}, lambda name: "")
                ]
                if parts and name not in parts:
                    those = " ".join(f"--style {shell_quote(part)}" for part in parts)
                    hints[f"{name} is a mix, and records name its parts: {those}"] = None
    return " ".join(hints)


def gallery(
    folder: Annotated[
        str | None, typer.Argument(metavar="PROJECT", help="The project; default: that of the current folder.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DIR", help="Folder to write; default: gallery in the project."),
    ] = None,
    run: RunOption = "",
    prompt: PromptFilterOption = None,
    style: StyleFilterOption = None,
    since: SinceOption = None,
    project: ProjectOption = None,
    allow_outside: OutsideOption = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Make a web page of the project's pictures.

    It is a folder that needs no server and no network: filters by run, style and prompt, search, zoom, keyboard
    shortcuts, and each picture's record with the command that reproduces it. Run it again to update the page. The
    folder can be moved, zipped, or put on a web server. A selection of pictures needs its own folder, by --output.

    \b
    Examples:
      k2 gallery
      k2 gallery moody -o ~/public/moody
      k2 gallery --run 3 -o ~/public/foxes
    """
    from k2cli.console import print_result, say, short_path, to_json
    from k2cli.gallery import PAGE_FILE, build_gallery
    from k2cli.project import Project

    selection = selection_from(run, prompt, style, since)
    if selection and output is None:  # in the project's own, all others would be removed
        raise typer.BadParameter("a selection of pictures needs a folder of its own: name it", param_hint="--output")
    folders, errors = find_folders([folder] if folder else [], project, allow_outside)
    if errors:
        raise errors[0]
    (project_folder,) = folders
    target, name = output or project_folder.path_inside("gallery"), project_folder.root.name
    if selection and target.resolve() == (project_folder.root / "gallery").resolve():
        raise typer.BadParameter("it would remove all others from the project's own gallery", param_hint="--output")
    try:  # pictures can be viewed even while k2.toml is broken
        name = Project.open(project_folder.root, allow_outside=allow_outside).name
    except K2Error as error:
        errors.append(error)
    skipped: list[Path] = []
    count = build_gallery(project_folder.outputs, target, name, selection=selection, on_skipped=skipped.append)
    if skipped and not quiet:  # they may be why there is no page
        say(f"{len(skipped)} left out, picture or record unreadable: {short_path(skipped[0])}", "yellow")
    if selection and not count:
        hint = explain_no_match([project_folder], selection) or "All pictures: k2 log"
        raise K2Error("No picture that can be shown matches, so no page is made.", hint=hint)
    print_result(
        to_json({"file": short_path(target / PAGE_FILE), "pictures": count}) if json else short_path(target / PAGE_FILE)
    )
    if not quiet:
        for problem in errors:
            say(f"{problem} The page is named after the folder.", "yellow")
        if count:
            say(f"{pluralise(f'{count:,}', 'picture')}. Open the page in a browser.", "dim")
        elif not skipped:
            say(no_pictures_hint([project_folder]), "dim")


def show(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE...",
            help="Pictures that k2 made, or their records, here or in --project; several are compared.",
        ),
    ],
    project: ProjectOption = None,
    json: JsonOption = False,
) -> None:
    """Show what a picture was made from, or how several differ.

    On a terminal, the pictures are shown, too: by the kitty or iTerm2 protocol, as sixels, or in half-blocks. To
    choose, set K2_PREVIEW to kitty, iterm2, sixel, blocks or off.

    \b
    Examples:
      k2 show outputs/0001-fox/fox-7.png
      k2 show outputs/0001-fox/fox-7.png outputs/0002-fox/fox-7.png
      k2 show outputs/0001-fox/fox-7.png --json | jq .settings
    """
    from k2cli import records
    from k2cli.console import print_result, screen_width, short_path, to_json
    from k2cli.facts import describe
    from k2cli.history import with_nulls
    from k2cli.listing import show_differences
    from k2cli.outputs import picture_for
    from k2cli.preview import preview
    from model.picture_file import is_sheet

    paths = [find_file(file, project) for file in files]
    if len(paths) > 1:  # a shell's * finds a run's contact sheet, too
        paths = [file for file in paths if not is_sheet(file)] or paths
    found = [records.parse(records.read(file), Path) for file in paths]
    if json:
        for file, record in zip(paths, found, strict=True):
            there = None if record.table.get("blocked") else short_path(picture_for(file))
            print_result(to_json({"file": there, **with_nulls(record.table)}))
        return
    preview([picture for file in paths if (picture := picture_for(file)).is_file()])
    if len(found) == 1:
        print_result(describe(found[0], screen_width()))
    else:
        show_differences([short_path(file) for file in paths], found)


def rerun(
    files: Annotated[
        list[Path],
        typer.Argument(metavar="FILE...", help="Pictures that k2 made, their records, or the folder of a whole run."),
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Where to write a single picture; default: a new run."),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Compare and write nothing; prints the paths of the pictures compared.")
    ] = False,
    device: Annotated[
        str | None, typer.Option("--device", metavar="DEVICE", help="Device to use instead of the recorded one.")
    ] = None,
    project: ProjectOption = None,
    no_embed: EmbedOption = False,
    allow_outside: OutsideOption = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Reproduce pictures from their records, and compare.

    Refuses if the model or a reference has changed. Exits with 1 if any pixels differ, and with --check also if a
    picture is gone, changed or unreadable.

    \b
    Examples:
      k2 rerun outputs/0001-fox/fox-7.png
      k2 rerun outputs/0001-fox                    all pictures of a run
      k2 rerun ~/Downloads/fox-7.png -o fox.png    the picture alone is enough
      k2 rerun outputs/0001-fox --check            only compare
    """
    from k2cli.console import meter, say, say_at_exit
    from k2cli.pictures import without_sheets
    from k2cli.rerun import RerunFolders, how_to_reproduce, pictures_in, report, report_refusal, reproduce, summary

    if check and (output is not None or no_embed):
        other = "--output" if output is not None else "--no-embed"
        raise typer.BadParameter(f"it writes nothing, so it cannot be combined with {other}", param_hint="--check")
    paths, sheets = without_sheets([find_file(file, project) for file in files])
    if sheets and not quiet:
        say(sheets, "yellow")
    orphans: list[Path] = []
    targets = pictures_in(paths, None if check else orphans)
    if orphans and not quiet:
        gone = "its picture is" if len(orphans) == 1 else "their pictures are"
        say(f"{pluralise(len(orphans), 'record')} left out, since {gone} gone. {how_to_reproduce(orphans)}", "yellow")
    if output is not None and len(targets) > 1:
        raise typer.BadParameter(f"one file cannot hold {len(targets)} pictures", param_hint="--output")
    several, identical = len(targets) > 1, 0
    refused: list[str] = []
    with RerunFolders() as folders, meter(len(targets), quiet=quiet) as bar:
        for done, (file, unknown) in enumerate(targets, 1):
            try:
                if unknown:
                    raise unknown
                home = find_project_of(file, project, allow_outside)
                reproduction = reproduce(
                    file, home, folders, output, device, check=check, embed=not no_embed, on_step=bar.step
                )
            except Exception as error:
                report_refusal(error, file, refused, several=several, as_json=json)
                continue
            except KeyboardInterrupt:
                made = done - 1 - len(refused)
                say_at_exit(f"Interrupted: {made} of {len(targets)} rendered again, {identical} of them identical.")
                raise
            finally:
                bar.saved(done)
            identical += reproduction.identical
            report(reproduction, file, several=several, as_json=json, quiet=quiet)
    if several and not quiet:
        say(summary(identical, len(refused), len(targets)), "dim")
    if identical < len(targets):
        raise typer.Exit(1)
