"""The study of pictures that start from an init image, with a painter that keeps a known part of it."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from test_style_study import SUBJECTS, Painter, Rims, colour, draw

from model.spec import Picture
from model.train.begin_study import Study, distance, measure_masked, measure_repainted


class Keeps(Painter):
    """Keeps the init image below a denoise of 0.6, then paints the prompt; inside a mask, always repaints."""

    def render(self, specs):
        made = []
        for spec in specs:
            picture = draw(np.full(3, 128.0), colour(spec.prompt.split(" ", 1)[1]))
            if spec.init_image:
                before = np.asarray(Image.open(spec.init_image))
                if spec.mask:
                    assert spec.mask == "64x128+64+0"
                    picture = np.concatenate([before[:, :64], 255 - before[:, 64:]], 1)
                elif spec.denoise < 0.6:
                    picture = before
            made.append(Picture(Image.fromarray(picture), {}))
        return made


@pytest.fixture
def study(tmp_path) -> Study:
    return Study(Keeps(), Rims(), list(SUBJECTS), tmp_path, None, len(SUBJECTS))


def test_subjects_are_counted_for_each_denoise_share(study):
    found = measure_repainted(study)

    assert found["before"]["was"]["value"] == 1
    for share in ("0.25", "0.375", "0.5"):
        assert [found[share][key]["value"] for key in ("is", "was", "gone")] == [0, 1, 0]
    for share in ("0.625", "0.875", "1"):
        assert [found[share][key]["value"] for key in ("is", "was", "gone")] == [1, 0, 1]


def test_masked_half_is_repainted(study):
    found = measure_masked(study)

    assert found["before"]["value"] == 1 and found["after"]["value"] < 0.5  # half of it is inverted
    assert found["gone"]["value"] > 0.1


def test_distance_is_in_pixel_levels():
    one = np.zeros((4, 4, 3), np.uint8)

    assert distance(one, one) == 0
    assert distance(one, np.full_like(one, 255)) == distance(np.full_like(one, 255), one) == 255
