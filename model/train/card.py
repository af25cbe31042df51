"""Sheets for the model card, from the weights in the box: `python -m model.train.card [FOLDER]`.

subjects.webp  forty subjects of the training list in plain words, one seed each, nothing chosen
near.webp      words that no caption holds, beside subjects that do
samples.webp   the training's own sheet: subjects, then media and grounds
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from model.pipeline import Pipeline
from model.spec import RenderSpec
from model.train.pretrain import BOX
from model.train.samples import PROMPTS

SUBJECTS = (
    *("dog", "cat", "fox", "lion", "panda", "rabbit", "frog", "horse", "elephant", "penguin"),
    *("owl", "turtle", "whale", "butterfly", "crab", "sunflower", "cactus", "palm tree", "mushroom", "red apple"),
    *("banana", "strawberry", "watermelon", "pineapple", "carrot", "pizza", "hamburger", "doughnut", "car", "bus"),
    *("bicycle", "sailboat", "rocket", "house", "crescent moon", "rainbow", "umbrella", "balloon", "guitar", "ghost"),
)
NEAR = {  # a word of no caption -> the subject in whose neighbourhood it lies
    "hound": "dog",
    "kitten": "cat",
    "bunny": "rabbit",
    "automobile": "car",
    "yacht": "sailboat",
    "cottage": "house",
    "rooster": "chicken",
    "jet": "airplane",
    "oak": "tree",
    "cheeseburger": "hamburger",
}


def sheet(pipeline: Pipeline, prompts: Sequence[str], columns: int, seed: int = 0) -> Image.Image:
    """Pictures of prompts, row by row, in one image."""
    specs = [RenderSpec(prompt, seed=seed + index) for index, prompt in enumerate(prompts)]
    pictures = [np.asarray(picture.image.convert("RGB")) for picture in pipeline.stream(specs)]
    rows = [np.concatenate(pictures[start : start + columns], 1) for start in range(0, len(pictures), columns)]
    return Image.fromarray(np.concatenate(rows))


def phrase(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def main(folder: Path = BOX) -> None:
    pipeline = Pipeline.load("mini")
    sheets = {
        "subjects": ([phrase(name) for name in SUBJECTS], 10),
        "near": ([phrase(name) for name in NEAR], 10),
        "samples": (PROMPTS, 8),
    }
    for name, (prompts, columns) in sheets.items():
        sheet(pipeline, prompts, columns).save(folder / f"{name}.webp", quality=85)
        print(folder / f"{name}.webp")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
