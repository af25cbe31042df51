"""Pictures in other sizes than in training, by the judge: `python -m model.train.shape_study JUDGE OUT`.

shapes    for every size, is the prompt's subject the nearest among the names of all, one prompt per subject
distance  squared kernel distance, in the judge's features, to held-out real pictures of that size with the same
          captions
sheet     the first few of them, one row per size, to look at

The judge knows only squares: it sees the centre crop of another shape, and the complete picture with its edges extended
to a square; for each name the better of the two views counts. The distance uses only the complete picture.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from model.errors import reported
from model.train.data import DATA, Catalog, phrase
from model.train.evaluate import held_out_prompts, kernel_distance, specs_of
from model.train.shapes import Shape
from model.train.study import Pixels, SubjectStudy, embed, figure, mean, names_of, paint, parser_of, sheet

SIZES = (
    *("256x256", "288x224", "320x224", "224x320", "320x192", "192x320", "352x192", "192x192"),
    *("384x384", "480x320"),
)
SHOWN = 8  # pictures of each size on the sheet


class Study(SubjectStudy):
    """Each picture has its own seed."""

    def paint(self, size: str, count: int) -> list[Pixels]:
        width, height = map(int, size.split("x"))
        captions = list(map(phrase, self.chosen[:count]))
        return paint(self.pipeline, specs_of(captions, 100, width=width, height=height, steps=self.steps))


def squared(picture: Pixels, mode: Literal["edge", "constant"] = "edge") -> Pixels:
    """A picture [H, W, 3] in the middle of a square, its outermost pixels extended to the edges, or on black."""
    height, width = picture.shape[:2]
    side = max(height, width)
    margins = [((side - each) // 2, side - each - (side - each) // 2) for each in (height, width)]
    return np.pad(picture, (*margins, (0, 0)), mode=mode)


def cropped(picture: Pixels) -> Pixels:
    """The largest square in the middle of a picture [H, W, 3]."""
    side = min(picture.shape[:2])
    top, left = ((each - side) // 2 for each in picture.shape[:2])
    return picture[top : top + side, left : left + side]


def shapes(study: Study) -> dict[str, Any]:
    """Shares of pictures whose subject is recognised, by size."""
    names, found = names_of(study.judge, study.subjects), {}
    for size in SIZES:
        pictures = study.paint(size, study.count)
        views = (embed(study.judge, [view(each) for each in pictures])[0] @ names.T for view in (squared, cropped))
        nearest = [study.subjects[index] for index in np.maximum(*views).argmax(1)]
        found[size] = figure(mean, np.array([a == b for a, b in zip(nearest, study.chosen, strict=True)], float))
        print(f"  {size}", flush=True)
    return found


def distance(study: Study) -> dict[str, Any]:
    """Distance of pictures with the real ones' captions, by size: the less, the more alike."""
    found: dict[str, Any] = {}
    for size in SIZES:
        shape = Shape.of(size)
        catalog = Catalog(DATA, shape.renders)
        items, captions = zip(*held_out_prompts(catalog, study.count), strict=True)
        settings = {"width": shape.width, "height": shape.height, "steps": study.steps}
        made = paint(study.pipeline, specs_of(captions, seed=2000, **settings))
        real = [catalog.picture(item, shape) for item in items]
        seen = (np.concatenate(embed(study.judge, [squared(each) for each in those]), 1) for those in (made, real))
        found[size] = round(kernel_distance(*seen), 4)
        print(f"  {size}", flush=True)
    return found


def sheet_of(study: Study) -> dict[str, Any]:
    rows = [[squared(each, "constant") for each in study.paint(size, SHOWN)] for size in SIZES]
    labels = [size.replace("x", "\n") for size in SIZES]
    return {"file": sheet(study.folder / "shapes.png", study.chosen[:SHOWN], rows, labels).name}


FIGURES = {"shapes": shapes, "distance": distance, "sheet": sheet_of}


def main() -> None:
    Study.conduct(parser_of(__doc__, list(FIGURES)).parse_args(), FIGURES)


if __name__ == "__main__":
    with reported():
        main()
