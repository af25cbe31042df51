"""The commands about existing pictures. As in `app.py`, each command does its own heavy imports."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from k2cli.complete import complete_run, complete_style
from k2cli.finding import find_file, find_folders, find_home
from k2cli.options import EmbedOption, JsonOption, OutsideOption, ProjectOption, QuietOption
from model.errors import K2Error, count_of

if TYPE_CHECKING:
    from k2cli.folder import Folder
    from k2cli.history import Chosen, Made

SCREENFUL = 30  # pictures that a terminal shows by default

RunOption = Annotated[
    str,
    typer.Option(
        "--run", metavar="RUN", help="Only this run: its number, or part of its name.", autocompletion=complete_run
    ),
]
WordsOption = Annotated[
    list[str] | None,
    typer.Option("--prompt", "-p", metavar="WORDS", help="Match the start of words in the prompt or its name."),
]
WithOption = Annotated[
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


def chosen_by(run: str, prompt: list[str] | None, style: list[str] | None, since: str | None) -> Chosen | None:
    """Which pictures these options select; None if none is given. Raises K2Error."""
    from k2cli import history

    if not (run or prompt or style or since is not None):
        return None
    moment = history.read_since(since) if since is not None else None
    return history.Chosen(run, " ".join(prompt or []), style or [], moment)


def log(
    projects: Annotated[list[str] | None, typer.Argument(metavar="PROJECT", help="Project folders.")] = None,
    run: RunOption = "",
    prompt: WordsOption = None,
    style: WithOption = None,
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
    from k2cli.console import delivering, result, say, short_path, show_error, to_json
    from k2cli.listing import line_of, near_file, show_table

    if everything and last is not None:
        raise typer.BadParameter("it cannot be combined with --last", param_hint="--all")
    if null and json:
        raise typer.BadParameter("it cannot be combined with --json", param_hint="--null")
    folders, wrong = find_folders(projects or [], project, allow_outside)
    chosen = chosen_by(run, prompt, style, since)
    unread: list[Path] = []
    table = sys.stdout.isatty() and not json and not null
    short = table and last is None and not everything
    most = SCREENFUL if short else last
    count = 0

    def every() -> Iterator[Made]:
        """Of all projects; an error in one does not stop the others."""
        nonlocal count
        for folder in folders:
            try:
                for each in history.read(folder.outputs, chosen, unread.append):
                    count += 1
                    yield each
            except K2Error as error:
                wrong.append(error)

    found = history.newest_last(every(), most)
    if json:
        for each in found:
            result(to_json({"file": near_file(each), **history.in_full(each.table)}))
    elif table:
        show_table(found)
    else:
        with delivering():
            lines = (f"{near_file(each)}\0" if null else f"{line_of(each)}\n" for each in found)
            print("".join(lines), end="", flush=True)
    if not quiet:
        if not count and not wrong:
            told = f"No picture matches. {why_none(folders, chosen)}" if chosen else none_yet(folders)
            say(told.rstrip(), "dim")
        elif len(found) < count:
            say(f"The last {len(found)} of {count:,} pictures{'; --all lists them all' if short else ''}.", "dim")
        if unread:
            say(f"{len(unread)} left out, record missing or unreadable: {short_path(unread[0])}", "yellow")
    for problem in wrong:
        show_error(problem)
    if wrong:
        raise typer.Exit(1)


def none_yet(folders: Sequence[Folder]) -> str:
    """Say that projects have no pictures yet, and which command makes some."""
    from k2cli.console import for_shell
    from k2cli.folder import root_above
    from k2cli.here import first_step

    if len(folders) > 1:
        return "No pictures yet. Make some: k2 render"
    here, root = root_above(Path.cwd()), folders[0].root
    there = "" if here and here.samefile(root) else f" --project {for_shell(root)}"
    return f"No pictures yet. Make some: {first_step(folders[0].outputs)}{there}"


def why_none(folders: Sequence[Folder], chosen: Chosen) -> str:
    """Why a selection may match no picture: a run or a style that does not exist, or a style that no record names; ""
    if nothing explains it."""
    from k2cli import history
    from k2cli.styles import BOARD, Styles
    from k2cli.texts import composed
    from model.errors import close_to, nearest

    runs: list[str] = []
    known: set[str] = set()  # some styles live on only in pictures
    for folder in folders:
        with suppress(K2Error):
            runs += [run.name for run in history.runs_of(folder.outputs)]
            known.update(name for made in history.read(folder.outputs) for name in made.styles)
            known.update(Styles(folder.root, folder.inside).known)
    told = []
    if runs and not any(map(chosen.run_folder, runs)):
        last = f"The last is {runs[-1]}." if len(folders) == 1 else ""
        told += [f'There is no run "{chosen.run}".', close_to(chosen.run, runs) or last]
    for name in chosen.styles:
        if composed(name) not in {*known, BOARD}:
            told += [f'There is no style "{name}".', nearest(name, sorted(known))]
    return " ".join(filter(None, (*told, of_mixes(folders, chosen.styles))))


def of_mixes(folders: Sequence[Folder], styles: Iterable[str]) -> str:
    """For styles that are mixes and nothing else, the parts that records name instead; "" if there are none."""
    from k2cli.styles import Styles
    from k2cli.texts import composed, quote

    told: dict[str, None] = {}
    for folder in folders:
        for name in map(composed, styles):
            with suppress(K2Error):
                parts = [part.name for part in Styles(folder.root, folder.inside).resolve({name: 1.0}, lambda name: "")]
                if parts and name not in parts:
                    those = " ".join(f"--style {quote(part)}" for part in parts)
                    told[f"{name} is a mix, and records name its parts: {those}"] = None
    return " ".join(told)


def gallery(
    folder: Annotated[
        str | None, typer.Argument(metavar="PROJECT", help="The project; default: that of the current folder.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DIR", help="Folder to write; default: gallery in the project."),
    ] = None,
    run: RunOption = "",
    prompt: WordsOption = None,
    style: WithOption = None,
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
    from k2cli.console import result, say, short_path, to_json
    from k2cli.gallery import PAGE, build
    from k2cli.project import Project

    chosen = chosen_by(run, prompt, style, since)
    if chosen and output is None:  # in the project's own, all others would be removed
        raise typer.BadParameter("a selection of pictures needs a folder of its own: name it", param_hint="--output")
    found, wrong = find_folders([folder] if folder else [], project, allow_outside)
    if wrong:
        raise wrong[0]
    (there,) = found
    target, name = output or there.inside("gallery"), there.root.name
    if chosen and target.resolve() == (there.root / "gallery").resolve():
        raise typer.BadParameter("it would remove all others from the project's own gallery", param_hint="--output")
    try:  # pictures can be viewed even while k2.toml is broken
        name = Project.open(there.root, allow_outside=allow_outside).name
    except K2Error as error:
        wrong.append(error)
    unread: list[Path] = []
    count = build(there.outputs, target, name, chosen=chosen, skipped=unread.append)
    if unread and not quiet:  # they may be why there is no page
        say(f"{len(unread)} left out, picture or record unreadable: {short_path(unread[0])}", "yellow")
    if chosen and not count:
        hint = why_none([there], chosen) or "All pictures: k2 log"
        raise K2Error("No picture that can be shown matches, so no page is made.", hint=hint)
    result(to_json({"file": short_path(target / PAGE), "pictures": count}) if json else short_path(target / PAGE))
    if not quiet:
        for problem in wrong:
            say(f"{problem} The page is named after the folder.", "yellow")
        if count:
            say(f"{count_of(f'{count:,}', 'picture')}. Open the page in a browser.", "dim")
        elif not unread:
            say(none_yet([there]), "dim")


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
    from k2cli.console import result, screen, short_path, to_json
    from k2cli.facts import describe
    from k2cli.history import in_full
    from k2cli.listing import show_differences
    from k2cli.outputs import picture_of
    from k2cli.preview import preview
    from model.picture_file import is_sheet

    named = [find_file(file, project) for file in files]
    if len(named) > 1:  # a shell's * finds a run's contact sheet, too
        named = [file for file in named if not is_sheet(file)] or named
    found = [records.parse(records.read(file), Path) for file in named]
    if json:
        for file, record in zip(named, found, strict=True):
            there = None if record.table.get("blocked") else short_path(picture_of(file))
            result(to_json({"file": there, **in_full(record.table)}))
        return
    preview([picture for file in named if (picture := picture_of(file)).is_file()])
    if len(found) == 1:
        result(describe(found[0], screen()))
    else:
        show_differences([short_path(file) for file in named], found)


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
    from k2cli.console import last_words, meter, say
    from k2cli.pictures import without_sheets
    from k2cli.rerun import Shelf, brought_back, in_all, pictures_in, refuse, repeat, tell

    if check and (output is not None or no_embed):
        other = "--output" if output is not None else "--no-embed"
        raise typer.BadParameter(f"it writes nothing, so it cannot be combined with {other}", param_hint="--check")
    asked, sheets = without_sheets([find_file(file, project) for file in files])
    if sheets and not quiet:
        say(sheets, "yellow")
    lone: list[Path] = []
    named = pictures_in(asked, None if check else lone)
    if lone and not quiet:
        gone = "its picture is" if len(lone) == 1 else "their pictures are"
        say(f"{count_of(len(lone), 'record')} left out, since {gone} gone. {brought_back(lone)}", "yellow")
    if output is not None and len(named) > 1:
        raise typer.BadParameter(f"one file cannot hold {len(named)} pictures", param_hint="--output")
    several, identical = len(named) > 1, 0
    refused: list[str] = []
    with Shelf() as shelf, meter(len(named), quiet=quiet) as bar:
        for done, (file, unknown) in enumerate(named, 1):
            try:
                if unknown:
                    raise unknown
                home = find_home(file, project, allow_outside)
                again = repeat(file, home, shelf, output, device, check=check, embed=not no_embed, on_step=bar.step)
            except Exception as error:
                refuse(error, file, refused, several=several, as_json=json)
                continue
            except KeyboardInterrupt:
                made = done - 1 - len(refused)
                last_words(f"Interrupted: {made} of {len(named)} rendered again, {identical} of them identical.")
                raise
            finally:
                bar.saved(done)
            identical += again.identical
            tell(again, file, several=several, as_json=json, quiet=quiet)
    if several and not quiet:
        say(in_all(identical, len(refused), len(named)), "dim")
    if identical < len(named):
        raise typer.Exit(1)
