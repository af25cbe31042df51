"""What ten pictures teach a LoRA, by the evaluation judge: `python -m model.train.adapter_study JUDGE OUT`.

The pictures are real ones in a look that neither generator nor judge was trained on, captioned only by their subject.
Prompts name other subjects. Each prompt is painted in three ways with the same seed: as is, with only the trigger's
words, with the words and the LoRA; the latter two also on Turbo, if it exists. A likeness is the cosine between the
judge's style embedding of a picture and the mean of other real pictures in the look; intervals are 95 %, by bootstrap
over prompts. Writes `adapter.toml` and `adapter.png`: one row per way, real pictures last.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
from numpy.typing import NDArray
from PIL import Image

from model import library
from model.errors import exit_on_error
from model.pipeline import Pipeline
from model.spec import Lora
from model.train import adapter
from model.train.data import DATA, Catalog, Item, phrase
from model.train.evaluate import candidate_subjects, make_specs, retrieval
from model.train.judge import Judge
from model.train.looks import Look
from model.train.study import (
    choose_looks,
    difference,
    embed,
    figure,
    mean,
    prototype,
    render_specs,
    represents_look,
    sheet,
)

TRIGGER = "dusk style"  # words that mean no look of the data set
PICTURES = 10
MAX_SHOWN = 12  # pictures per row of the sheet


def write_pictures(catalog: Catalog, look: Look, folder: Path) -> list[str]:
    """Write ten pictures in a look with captions, each of a different subject -> the subjects."""
    folder.mkdir(parents=True, exist_ok=True)
    known = set(candidate_subjects(catalog, len(catalog.subjects)))
    items: dict[str, Item] = {}
    for item in catalog.items("styles"):
        if item.look == look and not represents_look(item) and item.pair.subject in known:
            items.setdefault(item.pair.subject, item)
    chosen = list(items.items())[:PICTURES]
    for subject, item in chosen:
        stem = folder / subject.replace(" ", "-")
        Image.fromarray(catalog.picture(item)).save(stem.with_suffix(".png"))
        stem.with_suffix(".txt").write_text(phrase(subject))
    return [subject for subject, _ in chosen]


def train_and_measure(
    judge: Judge, catalog: Catalog, folder: Path, recipe: adapter.Recipe, *, which: int, count: int, steps: int | None
) -> dict[str, Any]:
    """Train, paint, judge -> figures. `which` of the held-out looks, `count` prompts, sampling `steps`."""
    looks = choose_looks(catalog)
    look = looks[which]
    taught_subjects = write_pictures(catalog, look, folder / "pictures")
    started = time.monotonic()
    run = adapter.main(replace(recipe, pictures=str(folder / "pictures"), trigger=TRIGGER), "cpu")
    seconds = time.monotonic() - started

    candidate_names = candidate_subjects(catalog)
    subjects = [subject for subject in candidate_names if subject not in taught_subjects][:count]
    plain = make_specs(list(map(phrase, subjects)), 500, steps=steps)
    with_trigger = [replace(spec, prompt=f"{spec.prompt}, {TRIGGER}") for spec in plain]
    loras = (Lora(run.result),)
    variants = {"plain": plain, "words": with_trigger, "lora": [replace(spec, loras=loras) for spec in with_trigger]}
    raw = Pipeline.load(recipe.model, "raw", "cpu")
    pictures = {name: render_specs(raw, each) for name, each in variants.items()}
    if library.find(recipe.model, "turbo"):
        turbo_specs = {
            f"turbo {name}": [replace(spec, steps=None) for spec in variants[name]] for name in ("words", "lora")
        }
        variants |= turbo_specs
        turbo = Pipeline.load(recipe.model, "turbo", "cpu")
        pictures |= {name: render_specs(turbo, each) for name, each in turbo_specs.items()}
    real = [item for item in catalog.items("styles") if item.look == look and not represents_look(item)]
    pictures["real"] = [catalog.picture(item) for item in real if item.pair.subject not in taught_subjects][:count]

    centres = np.stack([prototype(judge, catalog, each) for each in looks])
    likeness = {name: embed(judge, made)[1] @ centres.T for name, made in pictures.items()}
    to_look = {name: values[:, which] for name, values in likeness.items()}
    nearest = {name: (values.argmax(1) == which).astype(float) for name, values in likeness.items()}
    recognised = {name: retrieval(judge, pictures[name], subjects, candidate_names).astype(float) for name in variants}
    rows: list[tuple[str, Callable[..., float], tuple[NDArray[Any], ...]]] = [
        *((f"likeness, {name}", mean, (values,)) for name, values in to_look.items()),
        ("likeness, lora − plain", difference, (to_look["lora"], to_look["plain"])),
        ("likeness, lora − words", difference, (to_look["lora"], to_look["words"])),
        *(
            [("likeness, turbo lora − words", difference, (to_look["turbo lora"], to_look["turbo words"]))]
            if "turbo lora" in to_look
            else []
        ),
        *((f"look is the nearest of {len(looks)}, {name}", mean, (values,)) for name, values in nearest.items()),
        *(
            (f"subject is the nearest of {len(candidate_names)}, {name}", mean, (values,))
            for name, values in recognised.items()
        ),
    ]
    shown = min(MAX_SHOWN, *map(len, pictures.values()))
    image_rows = [each[:shown] for each in pictures.values()]
    sheet(folder / "adapter.png", [""] * shown, image_rows, list(pictures))
    return {
        "look": asdict(look),
        "taught": taught_subjects,
        "prompts": len(subjects),
        "steps": run.step,
        "seconds": round(seconds, 1),
        "loss": run.figures.get("loss", float("nan")),
        "figure": [{"name": name} | figure(statistic, *columns) for name, statistic, columns in rows],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("judge", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--look", type=int, default=0, help="which of the held-out looks")
    parser.add_argument("--steps", type=int, default=150, help="of training")
    parser.add_argument("--sampling", type=int, help="sampling steps; default: the model's own")
    parser.add_argument("--count", type=int, default=40, help="prompts")
    options = parser.parse_args()
    recipe = adapter.Recipe(
        name=f"study-{options.look}", pictures="pictures", model=options.model, steps=options.steps, batch=8
    )  # fmt: skip
    found = train_and_measure(
        Judge.load(options.judge),
        Catalog(DATA),
        options.out,
        recipe,
        which=options.look,
        count=options.count,
        steps=options.sampling,
    )
    (options.out / "adapter.toml").write_text(tomli_w.dumps(found))
    for row in found["figure"]:
        print(f"{row['name']:<36}{row['value']:>8.3f}  ({row['low']:.3f} … {row['high']:.3f})")


if __name__ == "__main__":
    with exit_on_error():
        main()
