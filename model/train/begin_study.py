"""Pictures with an init image, by the judge: `python -m model.train.begin_study JUDGE OUT`.

became  an init image of one subject with the prompt of another: for each share that is repainted, which of the two it
        is recognised as among the names of all, and how far its pixels move, relative to repainting everything
mended  the right half repainted by the picture's own prompt and another seed: whether it is still recognised
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from model.errors import exit_on_error
from model.spec import RenderSpec
from model.train.data import phrase
from model.train.evaluate import make_specs, retrieval
from model.train.study import Floats, Pixels, SubjectStudy, figure, mean, ratio, render_specs, study_parser

DENOISE_SHARES = (0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)


class Study(SubjectStudy):
    """Each subject is repainted as the next."""

    def init_images(self) -> tuple[list[Path], list[Pixels]]:
        """The init images and their files."""
        pictures = render_specs(self.pipeline, self.specs(self.chosen, 100))
        files = [self.folder / f"first-{index}.png" for index in range(len(pictures))]
        for file, picture in zip(files, pictures, strict=True):
            Image.fromarray(picture).save(file)
        return files, pictures

    def specs(self, subjects: list[str], seed: int) -> list[RenderSpec]:
        return make_specs(list(map(phrase, subjects)), seed, steps=self.steps)

    def recognised(self, pictures: list[Pixels], subjects: list[str]) -> Floats:
        """Whether each picture's own subject has the nearest name."""
        return retrieval(self.judge, pictures, subjects, self.subjects).astype(float)


def measure_repainted(study: Study) -> dict[str, Any]:
    """Share of the steps -> how many are recognised as their prompt's subject, how many as the init image's, and the
    mean distance to it."""
    files, before = study.init_images()
    wanted = [*study.chosen[1:], study.chosen[0]]
    made = {share: repainted(study, files, wanted, share) for share in DENOISE_SHARES}
    distances = {share: np.array(list(map(distance, those, before))) for share, those in made.items()}
    found = {"before": {"was": figure(mean, study.recognised(before, study.chosen))}}
    for share, those in made.items():
        found[f"{share:g}"] = {
            "is": figure(mean, study.recognised(those, wanted)),
            "was": figure(mean, study.recognised(those, study.chosen)),
            "gone": figure(ratio, distances[share], distances[DENOISE_SHARES[-1]]),
        }
    return found


def repainted(study: Study, files: list[Path], subjects: list[str], share: float) -> list[Pixels]:
    specs = study.specs(subjects, 500)
    return render_specs(
        study.pipeline, [with_init_image(spec, file, share) for spec, file in zip(specs, files, strict=True)]
    )


def with_init_image(spec: RenderSpec, file: Path, share: float, mask: str | None = None) -> RenderSpec:
    return replace(spec, init_image=file, denoise=share, mask=mask)


def distance(one: Pixels, other: Pixels) -> float:
    """Root mean square difference of pixels, out of 255."""
    return float(np.sqrt(np.mean((one.astype(float) - other) ** 2)))


def measure_masked(study: Study) -> dict[str, Any]:
    """How many are recognised as their subject, before and after their right half was repainted."""
    files, before = study.init_images()
    height, width = before[0].shape[:2]
    edge = width // 2
    asked = zip(study.specs(study.chosen, 900), files, strict=True)
    after = render_specs(
        study.pipeline, [with_init_image(*each, 1.0, f"{width - edge}x{height}+{edge}+0") for each in asked]
    )
    distances = [distance(one[:, edge:], other[:, edge:]) / 255 for one, other in zip(after, before, strict=True)]
    return {
        "before": figure(mean, study.recognised(before, study.chosen)),
        "after": figure(mean, study.recognised(after, study.chosen)),
        "gone": figure(mean, np.array(distances)),
    }


FIGURES = {"became": measure_repainted, "mended": measure_masked}


def main() -> None:
    Study.run(study_parser(__doc__, list(FIGURES)).parse_args(), FIGURES)


if __name__ == "__main__":
    with exit_on_error():
        main()
