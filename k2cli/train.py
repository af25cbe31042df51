"""`k2 train`: run any stage of the training pipeline from its recipe, or train a LoRA on a folder of pictures."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from k2cli.completion import complete_recipe
from k2cli.options import QuietOption
from model.errors import K2Error, brief

LESS_MEMORY_HINT = (  # memory
    'In a recipe lower batch or size, or set recompute = true; for a LoRA also precision = "int8" or "int4". '
    "Or close other programs that use memory."
)

DISK_FULL = re.compile(r"\(os error (28|112|122)\)")  # Rust's text for ENOSPC, on Windows too, and for EDQUOT


@contextmanager
def training_errors(name: str) -> Iterator[None]:
    """Turn what the machine refuses a run (memory, disk) into one sentence. Raises K2Error."""
    from safetensors import SafetensorError

    from k2cli.disk import HINTS, DiskFull
    from model.plan import memory_errors

    try:
        with memory_errors(f'the run "{name}"', LESS_MEMORY_HINT):
            yield
    except (OSError, SafetensorError) as error:
        folder = f".runs/{name}"
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or DISK_FULL.search(str(error)):
            hint = "Free some space, then train again: it resumes from the last save."
            raise DiskFull(f"The disk is full: {folder} was not written.", hint=hint) from None
        if isinstance(error, SafetensorError):
            hint = f"Remove the damaged .safetensors file in {folder}, or in the run it starts from."
            raise K2Error(f'A saved state of "{name}" cannot be read: {brief(error)}.', hint=hint) from None
        if not str(error.filename or "").startswith(".runs"):
            raise
        hint = HINTS.get(error.errno or 0, "Is it writable?")
        raise K2Error(f"{error.filename} cannot be used: {error.strerror}.", hint=hint) from None


def train(
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE",
            help="A .toml file, a built-in recipe, or a folder of pictures.",
            autocompletion=complete_recipe,
        ),
    ],
    steps: Annotated[
        int | None, typer.Option("--steps", metavar="N", min=1, help="Number of steps; overrides the recipe's.")
    ] = None,
    device: Annotated[
        str | None, typer.Option("--device", metavar="DEVICE", help="cpu, cuda or cuda:1; default: the best available.")
    ] = None,
    trigger: Annotated[
        str | None, typer.Option("--trigger", metavar="WORDS", help="LoRA trigger words, added to every caption.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", metavar="MODEL", help="The model to train a LoRA on; default: mini.")
    ] = None,
    quiet: QuietOption = False,
) -> None:
    """Train a LoRA on a folder of pictures, or run a recipe.

    A picture's caption is the text file beside it, or else its file name. A recipe is one stage of the model's own
    training.

    State, log and curves go to .runs/NAME; the same command resumes a stopped run.
    Prints the path of the trained state or LoRA.

    \b
    Examples:
      k2 train refs/night --trigger "night look"
      k2 train pretrain-128
    """
    from dataclasses import replace

    from k2cli import licence
    from k2cli.console import for_shell, print_result, say, short_path
    from k2cli.folder import find_root
    from k2cli.texts import shell_quote
    from model.train import recipe as recipes

    chosen: Any = recipes.load(recipe)
    if steps is not None:
        if not isinstance(chosen, recipes.Recipe):
            raise K2Error(f'The stage "{chosen.stage}" has no steps.', hint="Omit --steps.")
        chosen = replace(chosen, steps=steps, minutes=0.0)
    changes = {key: value for key, value in (("trigger", trigger), ("model", model)) if value is not None}
    if changes and chosen.stage != "lora":
        raise typer.BadParameter(
            f'it is for a LoRA only, and this is "{chosen.stage}"', param_hint=f"--{next(iter(changes))}"
        )
    chosen = replace(chosen, **changes)
    if chosen.stage == "lora":
        licence.require_for_model(chosen.model, chosen.variant)

    from model.parts import pick_device
    from model.train import parallel

    place = parallel.join_group(str(pick_device(device)))
    report = (lambda line: None) if quiet or not parallel.world().is_main else say
    try:
        with training_errors(chosen.name):
            run = recipes.stage_module(chosen.stage, recipe).main(chosen, place, report)
    except KeyboardInterrupt:
        given = {"steps": steps, "device": device, "trigger": trigger, "model": model}
        options = [f" --{name} {shell_quote(str(value))}" for name, value in given.items() if value is not None]
        say(f"Interrupted; what was saved is kept. Resume with: k2 train {shell_quote(recipe)}{''.join(options)}")
        raise
    if not parallel.world().is_main:
        parallel.exit_group()
        return
    print_result(short_path(run.result))
    if chosen.stage == "lora" and not quiet:
        words = ["k2 style add", shell_quote(run.result.stem), for_shell(run.result)]
        words += ["--trigger", shell_quote(chosen.trigger)] if chosen.trigger else []
        words += [] if find_root(Path.cwd()) else ["--project DIR"]
        say(f"Make it a style: {' '.join(words)}", "dim")
    parallel.exit_group()
