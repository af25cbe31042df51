"""`k2 train`: any stage of the training pipeline, from its recipe."""

from __future__ import annotations

from typing import Annotated

import typer

from k2cli.options import QuietOption


def train(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="A .toml file, or the name of a recipe of the package.")
    ],
    steps: Annotated[
        int | None, typer.Option("--steps", metavar="N", min=1, help="Run for so many steps, whatever the recipe says.")
    ] = None,
    device: Annotated[
        str | None, typer.Option("--device", metavar="DEVICE", help="cpu, cuda, cuda:1; the best there is if left out.")
    ] = None,
    quiet: QuietOption = False,
) -> None:
    """Run a stage of training to its end, from where it stands.

    State, log and curves go to .runs/NAME; a run that was stopped goes on by the same command.
    Prints the path of the trained state.
    """
    from dataclasses import replace

    from k2cli.console import near, result, say
    from model.train import recipe as recipes

    chosen = recipes.load(recipe)
    if steps is not None:
        chosen = replace(chosen, steps=steps, minutes=0.0)

    from model.parts import pick_device

    report = (lambda line: None) if quiet else say
    try:
        run = recipes.module(chosen.stage, recipe).main(chosen, str(pick_device(device)), report)
    except KeyboardInterrupt:
        say(f"Interrupted; what was saved stays. Go on with: k2 train {recipe}")
        raise typer.Exit(130) from None
    result(near(run.folder / "state.safetensors"))
