"""Commands for models. As in `app.py`, each command imports the heavy modules it needs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from k2cli.commands import CommandApp, CommandGroup
from k2cli.completion import complete_model
from k2cli.options import AcceptOption, JsonOption, PrecisionOption, QuietOption
from model.errors import K2Error

models_app = CommandApp(cls=CommandGroup, no_args_is_help=True, rich_markup_mode=None)


@models_app.command("list")
def list_models(json: JsonOption = False) -> None:
    """List models: name, variant, size, parameters."""
    from k2cli.console import print_result, print_results, to_json
    from k2cli.models import inventory

    if json:
        for each in inventory():
            print_result(to_json(each))
        return
    fields = ("{name}", "{variant}", "{native} px", "{parameters:,} parameters", "{megabytes:.1f} MB", "{source}")
    print_results([[field.format(**each) for field in fields] for each in inventory()])


@models_app.command()
def info(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A bundled model, a hub id, a folder, or a file.", autocompletion=complete_model
        ),
    ],
    accept_licence: AcceptOption = False,
    json: JsonOption = False,
) -> None:
    """Describe a model's files.

    Layout, shapes, precision, recommended settings, licence, hashes. --json adds all details of training and config.
    """
    from k2cli import licence, models
    from k2cli.console import print_result, say, to_json

    if accept_licence:
        licence.require_for_model(models.resolve(model), yes=True)
    entries = models.describe_files(model)
    print_result("\n".join(map(to_json, entries)) if json else "\n\n".join(map(models.entry_text, entries)))
    if warning := models.unknown_variant(models.resolve(model)):
        say(warning, "yellow")


@models_app.command("vocabulary")
def show_vocabulary(
    words: Annotated[list[str] | None, typer.Argument(metavar="WORDS", help="Words to look up; default: all.")] = None,
    json: JsonOption = False,
) -> None:
    """List what the bundled weights can draw, and the words for it.

    \b
    Examples:
      k2 models vocabulary | grep fruit
      k2 models vocabulary kitten "8-bit"
    """
    from k2cli.console import print_result, print_results, to_json
    from model.errors import listed
    from model.vocabulary import vocabulary

    known, unknown, rows = vocabulary(), [], []
    for word in words or [""]:
        matches = known.look_up(word) if words else known.entries
        if not matches:
            unknown.append(f'"{word}"')
        for entry in matches:
            if json:
                print_result(to_json(entry._asdict()))
            rows.append([entry.kind, entry.name, ", ".join(entry.others)])
    if not json:
        print_results(rows)
    if unknown:
        raise K2Error(f"The bundled weights do not know {listed(unknown)}.", hint="List all: k2 models vocabulary")


@models_app.command()
def pull(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="krea-2-turbo, krea-2-raw, or a hub id like ORG/NAME.")],
    revision: Annotated[
        str | None, typer.Option("--revision", metavar="REV", help="Branch, tag or commit; default: the latest.")
    ] = None,
    include: Annotated[
        list[str] | None,
        typer.Option("--include", metavar="GLOB", help="Only files that match, if there are several models."),
    ] = None,
    accept_licence: AcceptOption = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Fetch weights from the hub and verify every file's hash.

    They go into the Hugging Face cache; an interrupted pull resumes. HF_TOKEN, HF_ENDPOINT, HF_HOME and
    HF_HUB_OFFLINE are honoured. Then use them with `k2 render --model NAME`; NAME@REV pins a revision.
    """
    from k2cli import hub
    from k2cli.console import print_result, say, to_json
    from k2cli.texts import shell_quote

    try:
        found = hub.pull(model, revision, include or [], accept=accept_licence, quiet=quiet)
    except KeyboardInterrupt:
        options = [f" --revision {shell_quote(revision)}"] if revision else []
        options += [f" --include {shell_quote(pattern)}" for pattern in include or []]
        say(
            f"Interrupted; what has arrived is kept. Resume with: k2 models pull {shell_quote(model)}{''.join(options)}"
        )
        raise
    about = {"name": model, "path": str(found.path), "commit": found.revision, "licence": found.licence}
    print_result(to_json(about | {"files": found.manifest.get("files", {})}) if json else str(found.path))


@models_app.command()
def export(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A bundled model, a folder, or a .safetensors file.", autocompletion=complete_model
        ),
    ],
    target: Annotated[
        Path, typer.Argument(metavar="TARGET", help="New folder, for diffusers; or a .safetensors file.")
    ],
    turbo: Annotated[bool, typer.Option("--turbo", help="Export the distilled checkpoint.")] = False,
    precision: PrecisionOption = None,
    quiet: QuietOption = False,
) -> None:
    """Export a model for diffusers, or its transformer as one file.

    diffusers.Krea2Pipeline opens the folder. The file is k2's own, in bf16 or already rounded: to int8 or fp8 (half
    the size), or to int4 (a third), which ComfyUI reads too. Rounded files load faster where memory is short.

    \b
    Examples:
      k2 models export mini mini-diffusers
      k2 models export krea-2-turbo turbo-int8.safetensors --precision int8
    """
    from k2cli import licence, models
    from k2cli.console import meter, print_result, short_path
    from k2cli.settings import check_setting
    from k2cli.toml_tables import Option
    from model import library

    name, variant = models.resolve(model), "turbo" if turbo else None
    if target.exists():
        raise K2Error(f"{target} exists already.", hint="Choose another name.")
    file = target.suffix == ".safetensors"
    if not file and target.suffix.lower() in library.WEIGHT_LIKE_SUFFIXES:
        raise K2Error(
            f"{target}: k2 does not write models as {target.suffix}.",
            hint="Name a .safetensors file, or a folder for diffusers.",
        )
    if precision is not None and not file:
        raise typer.BadParameter(
            "a folder for diffusers holds bf16; name a .safetensors file", param_hint="--precision"
        )
    checked_precision = check_setting("precision", precision or "native", Option("--precision"))
    licence.require_for_model(name, variant)
    if file:
        from model.compact import write_compact

        found = library.find(name, variant)
        if found is None:
            raise K2Error(f'"{name}" has no turbo checkpoint here.', hint="Omit --turbo, or name another model.")
        with meter(None, quiet=quiet, what="tensors") as bar:
            write_compact(library.find_parts(found).dit, target, checked_precision, found.variant, bar.saved)
    else:
        from model.pipeline import Pipeline

        Pipeline.load(name, variant, "cpu", precision="native", offload="none").export(target)
    print_result(short_path(target))
