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

from model.errors import exit_on_error
from model.train.data import DATA, Catalog, phrase
from model.train.evaluate import held_out_prompts, kernel_distance, make_specs
from model.train.shapes import Shape
from model.train.study import Pixels, SubjectStudy, embed, embed_names, figure, mean, render_specs, sheet, study_parser

SIZES = (
    *("256x256", "288x224", "320x224", "224x320", "320x192", "192x320", "352x192", "192x192"),
    *("384x384", "480x320"),
)
MAX_SHOWN = 8  # pictures of each size on the sheet


class Study(SubjectStudy):
    """Each picture has its own seed."""

    def paint(self, size: str, count: int) -> list[Pixels]:
        width, height = map(int, size.split("x"))
        captions = list(map(phrase, self.chosen[:count]))
        return render_specs(self.pipeline, make_specs(captions, 100, width=width, height=height, steps=self.steps))


def pad_to_square(picture: Pixels, mode: Literal["edge", "constant"] = "edge") -> Pixels:
    """A picture [H, W, 3] in the middle of a square, its outermost pixels extended to the edges, or on black."""
    height, width = picture.shape[:2]
    side = max(height, width)
    margins = [((side - each) // 2, side - each - (side - each) // 2) for each in (height, width)]
    return np.pad(picture, (*margins, (0, 0)), mode=mode)


def crop_to_square(picture: Pixels) -> Pixels:
    """The largest square in the middle of a picture [H, W, 3]."""
    side = min(picture.shape[:2])
    top, left = ((each - side) // 2 for each in picture.shape[:2])
    return picture[top : top + side, left : left + side]


def shapes(study: Study) -> dict[str, Any]:
    """Shares of pictures whose subject is recognised, by size."""
    names, found = embed_names(study.judge, study.subjects), {}
    for size in SIZES:
        pictures = study.paint(size, study.count)
        views = (
            embed(study.judge, [view(each) for each in pictures])[0] @ names.T
            for view in (pad_to_square, crop_to_square)
        )
        nearest = [study.subjects[index] for index in np.maximum(*views).argmax(1)]
        found[size] = figure(mean, np.array([a == b for a, b in zip(nearest, study.chosen, strict=True)], float))
        print(f"  {size}", flush=True)
    return found


def distance(study: Study) -> dict[str, Any]:
    """Distance of pictures with the real ones' captions, by size: the less, the more alike."""
    found: dict[str, Any] = {}
    for size in SIZES:
        shape = Shape.parse(size)
        catalog = Catalog(DATA, shape.render_size)
        items, captions = zip(*held_out_prompts(catalog, study.count), strict=True)
        settings = {"width": shape.width, "height": shape.height, "steps": study.steps}
        made = render_specs(study.pipeline, make_specs(captions, seed=2000, **settings))
        real = [catalog.picture(item, shape) for item in items]
        seen = (
            np.concatenate(embed(study.judge, [pad_to_square(each) for each in those]), 1) for those in (made, real)
        )
        found[size] = round(kernel_distance(*seen), 4)
        print(f"  {size}", flush=True)
    return found


def shapes_sheet(study: Study) -> dict[str, Any]:
    rows = [[pad_to_square(each, "constant") for each in study.paint(size, MAX_SHOWN)] for size in SIZES]
    labels = [size.replace("x", "\n") for size in SIZES]
    return {"file": sheet(study.folder / "shapes.png", study.chosen[:MAX_SHOWN], rows, labels).name}


FIGURES = {"shapes": shapes, "distance": distance, "sheet": shapes_sheet}


def main() -> None:
    Study.run(study_parser(__doc__, list(FIGURES)).parse_args(), FIGURES)


if __name__ == "__main__":
    with exit_on_error():
        main()
