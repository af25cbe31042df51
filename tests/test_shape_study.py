"""The study of shapes, with painters that know only squares."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from test_style_study import Drawings, Painter, Rims, colour, draw

from model.spec import Picture
from model.train import shape_study
from model.train.data import article
from model.train.shape_study import Study, crop_to_square, pad_to_square


class Square(Painter):
    """Paints the subject in square pictures, and none of the subjects in others."""

    def render(self, specs):
        made = []
        for spec in specs:
            (subject,) = [name for name in Drawings().subjects if spec.prompt == f"{article(name)}{name}"]
            picture = draw(np.full(3, 128.0), colour(subject if spec.width == spec.height else "nothing"))
            made.append(Picture(Image.fromarray(picture).resize((spec.width, spec.height)), {}))
        return made


def test_recognition_is_counted_per_size(tmp_path, monkeypatch):
    monkeypatch.setattr(shape_study, "SIZES", ("64x64", "96x64"))
    study = Study(Square(), Rims(), list(Drawings().subjects), tmp_path, None, 3)

    found = shape_study.shapes(study)

    assert found["64x64"]["value"] == 1 and found["96x64"]["value"] == 0
    monkeypatch.setattr(shape_study, "MAX_SHOWN", 2)
    assert (tmp_path / shape_study.shapes_sheet(study)["file"]).is_file()


class Framed(Drawings):
    """Real pictures of any shape."""

    def __init__(self, *_):
        super().__init__()

    def picture(self, item, shape):
        return np.asarray(Image.fromarray(super().picture(item)).resize(shape[::-1], Image.Resampling.NEAREST))


def test_real_pictures_have_zero_distance(tmp_path, monkeypatch):
    monkeypatch.setattr(shape_study, "SIZES", ("64x64", "96x64"))
    monkeypatch.setattr(shape_study, "Catalog", Framed)
    items = Framed().items("styles")[:60]
    monkeypatch.setattr(shape_study, "held_out_prompts", lambda *_: [(item, item.pair.subject) for item in items])

    class Knows(Painter):
        """All looks in squares, a single one in wide pictures."""

        def render(self, specs):
            at = [spec.seed - 2000 if spec.width == spec.height else 0 for spec in specs]
            shapes = [(spec.height, spec.width) for spec in specs]
            made = [Framed().picture(items[i], shape) for i, shape in zip(at, shapes, strict=True)]
            return [Picture(Image.fromarray(each), {}) for each in made]

    found = shape_study.distance(Study(Knows(), Rims(), [], tmp_path, None, 60))

    assert abs(found["64x64"]) < 0.05 < 0.2 < found["96x64"]


@pytest.mark.parametrize("shape", [(4, 7), (7, 4), (5, 5)])
def test_square_holds_the_picture_centred(shape):
    picture = np.arange(np.prod(shape) * 3, dtype=np.uint8).reshape(*shape, 3)

    square = pad_to_square(picture)

    side = max(shape)
    top, left = ((side - each) // 2 for each in shape)
    assert square.shape == (side, side, 3)
    assert (square[top : top + shape[0], left : left + shape[1]] == picture).all()
    assert (square[0, left] == picture[0, 0]).all() and (square[-1, -1] == picture[-1, -1]).all()
    least = min(shape)
    assert crop_to_square(picture).shape == (least, least, 3) and crop_to_square(picture)[0, 0, 0] in picture[..., 0]
