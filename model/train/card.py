"""Sheets for the model card, from the bundled weights: `python -m model.train.card [FOLDER]`.

subjects.webp  forty subjects of the training list in plain words, one seed each, uncurated
others.webp    words that pretraining never saw, learned by hearing
near.webp      words that no training used
samples.webp   the training's own sheet: subjects, then media and grounds
scenes.webp    the forty subjects again, each with the next ground, colour and medium
prompts.webp   `prompts.txt`: forty prompts by somebody who had only the list of subjects
all.webp       every subject of the training list, in one look
begun.webp     init images, repainted more and more
masked.webp    pictures with a part repainted by five seeds, the rest unchanged

Raw paints the first five, Turbo the others.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image, ImageDraw

from model.errors import exit_on_error
from model.library import BUNDLED
from model.pipeline import Pipeline
from model.region import Region
from model.spec import RenderSpec
from model.train.data import phrase, read_subjects
from model.train.looks import MEDIA, PALETTES, Look
from model.train.samples import PROMPTS

SUBJECTS = (
    *("dog", "cat", "fox", "lion", "panda", "rabbit", "frog", "horse", "elephant", "penguin"),
    *("owl", "turtle", "whale", "butterfly", "crab", "sunflower", "cactus", "palm tree", "mushroom", "red apple"),
    *("banana", "strawberry", "watermelon", "pineapple", "carrot", "pizza", "hamburger", "doughnut", "car", "bus"),
    *("bicycle", "sailboat", "rocket", "house", "crescent moon", "rainbow", "umbrella", "balloon", "guitar", "ghost"),
)
SIDE = 160  # of most pictures, in px
SEEDS = 5  # by which a masked part is repainted
GROUNDS = ("flat", "gradient", "scene", "floor")
LOOK = "soft shaded vector"  # of the sheet of all subjects
INIT_IMAGE_PROMPTS = {  # subject of the init image -> prompt
    "fox": "a wolf",
    "red apple": "a pumpkin",
    "house": "a house on an orange background, pencil hatching",
    "car": "a taxi, pixel art",
}
MASK_REGIONS = {  # prompt -> the part of its picture to repaint
    "a guitar on a white background": "176x144+16+96",
    "a cactus on a white background": "96x128+16+64",
    "a house on a white background": "256x96+0+0",
}
DENOISE_SHARES = [n / 8 for n in range(2, 9)]  # shares of Turbo's steps to take
UNTRAINED_WORDS = {  # a word that no training used -> the subject that it means or is close to
    "hound": "dog",
    "kitty": "cat",
    "hammerhead": "shark",
    "squirrel": "chipmunk",
    "willow": "tree",
    "boulder": "rock",
    "tea": "coffee",
    "jet": "airplane",
    "asteroid": "comet",
    "gown": "dress",
}
THESAURUS_WORDS = {  # words that only the thesaurus has -> their meaning
    "puppy": "dog",
    "kitten": "cat",
    "bunny": "rabbit",
    "stallion": "horse",
    "pigeon": "dove",
    "automobile": "car",
    "yacht": "sailboat",
    "cottage": "house",
    "oak": "tree",
    "cheeseburger": "hamburger",
    "espresso": "coffee",
    "ukulele": "guitar",
    "locomotive": "train",
    "vespa": "motor scooter",
    "sword": "crossed swords",
    "parcel": "package",
    "cellphone": "mobile phone",
    "spectacles": "glasses",
    "streetcar": "tram",
    "phantom": "ghost",
}


def scenes() -> list[str]:
    """The subjects, each with the next ground, colour and medium, without media that bring a black ground."""
    media = [told[0] for name, told in MEDIA.items() if told and name not in ("neon", "lowkey")]
    texts = []
    for i, name in enumerate(SUBJECTS):
        look = Look("noto", ground=GROUNDS[i % len(GROUNDS)], palette=list(PALETTES)[i % len(PALETTES)])
        texts.append(f"{phrase(name)} {look.ground_words}, {media[i % len(media)]}")
    return texts


def sheet(pipeline: Pipeline, prompts: Sequence[str], columns: int, side: int) -> Image.Image:
    """Pictures of prompts, seeds from 0 up, row by row in one image."""
    specs = [RenderSpec(prompt, seed=index) for index, prompt in enumerate(prompts)]
    page = Image.new("RGB", (columns * side, -(-len(specs) // columns) * side), "white")
    for index, made in enumerate(pipeline.stream(specs)):
        picture = made.image.convert("RGB").resize((side, side), Image.Resampling.LANCZOS)
        page.paste(picture, (index % columns * side, index // columns * side))
    return page


def denoise_ladder(pipeline: Pipeline) -> Image.Image:
    """Init images, each followed by its results by how much is repainted; seeds 0 to 3, results 100 to 103."""
    originals = list(
        pipeline.stream([RenderSpec(phrase(name), seed=seed) for seed, name in enumerate(INIT_IMAGE_PROMPTS)])
    )
    page = Image.new("RGB", ((1 + len(DENOISE_SHARES)) * SIDE, len(INIT_IMAGE_PROMPTS) * SIDE))
    with TemporaryDirectory() as folder:
        for row, (original, prompt) in enumerate(zip(originals, INIT_IMAGE_PROMPTS.values(), strict=True)):
            original.image.save(path := Path(folder) / f"{row}.png")
            spec = RenderSpec(prompt, seed=100 + row, init_image=path)
            repainted = pipeline.stream([replace(spec, denoise=share) for share in DENOISE_SHARES])
            for column, made in enumerate((original, *repainted)):
                page.paste(made.image.resize((SIDE, SIDE), Image.Resampling.LANCZOS), (column * SIDE, row * SIDE))
    return page


def masked(pipeline: Pipeline) -> Image.Image:
    """Pictures with a part framed, each followed by that part repainted; seeds 0 to 2, then 0 to 4."""
    originals = list(pipeline.stream([RenderSpec(prompt, seed=seed) for seed, prompt in enumerate(MASK_REGIONS)]))
    page = Image.new("RGB", ((1 + SEEDS) * SIDE, len(MASK_REGIONS) * SIDE))
    with TemporaryDirectory() as folder:
        for row, (original, (prompt, region)) in enumerate(zip(originals, MASK_REGIONS.items(), strict=True)):
            original.image.save(path := Path(folder) / f"{row}.png")
            specs = [RenderSpec(prompt, seed=seed, init_image=path, mask=region) for seed in range(SEEDS)]
            framed = original.image.copy()
            if part := Region.parse(region):
                box = (part.left, part.top, part.left + part.width - 1, part.top + part.height - 1)
                ImageDraw.Draw(framed).rectangle(box, outline="blue", width=2)
            for column, picture in enumerate([framed, *(made.image for made in pipeline.stream(specs))]):
                page.paste(picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS), (column * SIDE, row * SIDE))
    return page


def main(folder: Path = BUNDLED) -> None:
    all_subjects = [subject.name for subject in read_subjects()]
    prompts = Path(__file__).with_name("prompts.txt").read_text("utf-8").splitlines()
    raw: dict[str, tuple[Sequence[str], int, int]] = {
        "subjects": ([phrase(name) for name in SUBJECTS], 10, SIDE),
        "others": ([phrase(name) for name in THESAURUS_WORDS], 10, SIDE),
        "near": ([phrase(name) for name in UNTRAINED_WORDS], 10, SIDE),
        "samples": (PROMPTS, 8, 192),
        "scenes": (scenes(), 10, SIDE),
    }
    turbo: dict[str, tuple[Sequence[str], int, int]] = {
        "prompts": (prompts, 8, 192),
        "all": ([f"{phrase(name)}, {LOOK}" for name in all_subjects], 25, 64),
    }
    for variant, sheets in (("raw", raw), ("turbo", turbo)):
        pipeline = Pipeline.load("mini", variant)
        for name, (texts, columns, side) in sheets.items():
            sheet(pipeline, texts, columns, side).save(folder / f"{name}.webp", quality=85)
            print(folder / f"{name}.webp")
    for name, page in (("begun", denoise_ladder(pipeline)), ("masked", masked(pipeline))):
        page.save(folder / f"{name}.webp", quality=85)
        print(folder / f"{name}.webp")


if __name__ == "__main__":
    with exit_on_error():
        main(*map(Path, sys.argv[1:2]))
