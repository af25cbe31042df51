"""Looks and data: pictures are composed by rule, and come out the same every time."""

import numpy as np
import pytest
from workshop import compose, make_data

from model.errors import K2Error
from model.train import data
from model.train.data import Catalog, Item, Pair, Subject, article, read_subjects, stable_seed
from model.train.looks import DRAWINGS, MEDIA, PALETTES, Look, resize, split_looks


@pytest.fixture
def render():
    """A red disc, RGBA."""
    y, x = np.mgrid[0:128, 0:128]
    disc = (x - 64) ** 2 + (y - 64) ** 2 < 40**2
    return np.where(disc[..., None], np.array([220, 40, 40, 255]), 0).astype(np.uint8)


@pytest.fixture
def catalog(render):
    """A catalogue of one subject in every drawing set, without files."""
    made = Catalog.__new__(Catalog)
    made.subjects = {"ball": Subject("ball", ("ball",), ("ball", "red ball"))}
    made.pairs = [Pair("ball", drawing) for drawing in DRAWINGS]
    made.size = 128
    made.renders = np.stack([render] * len(made.pairs))
    made.looks = {drawing: split_looks(drawing) for drawing in DRAWINGS}
    return made


@pytest.mark.parametrize("medium", MEDIA)
@pytest.mark.parametrize("ground", ["white", "flat", "gradient", "scene", "floor"])
def test_pictures_are_deterministic(render, medium, ground):
    look = Look("noto", medium, ground, "teal")

    first, second = (compose(render, look, np.random.default_rng(3)) for _ in range(2))

    assert first.shape == (128, 128, 3) and first.dtype == np.uint8
    np.testing.assert_array_equal(first, second)


def test_every_medium_differs_and_keeps_the_subject_visible(render):
    pictures = {m: compose(render, Look("noto", m, "flat", "cream"), np.random.default_rng(0)) for m in MEDIA}

    flat = [p.astype(float) for p in pictures.values()]
    distances = [np.abs(a - b).mean() for i, a in enumerate(flat) for b in flat[:i]]
    assert min(distances) > 4
    for medium, picture in pictures.items():
        middle, rim = picture[34:94, 34:94].mean((0, 1)), picture[:12].mean((0, 1))
        assert np.abs(middle - rim).max() > 12, medium


def test_grainy_film_has_more_fine_detail_than_plain(render):
    def top_octave(medium):
        grey = compose(render, Look("noto", medium, "flat", "cream"), np.random.default_rng(0)).mean(-1)
        power = np.abs(np.fft.rfft2(grey - grey.mean())) ** 2
        return power[32:96, 32:].sum()

    assert top_octave("film") > 5 * top_octave("plain")


def test_held_out_looks_are_new_pairs_of_trained_media():
    trained = {(look.drawing, look.medium) for d in DRAWINGS for look in split_looks(d)[0]}
    held = {(look.drawing, look.medium) for d in DRAWINGS for look in split_looks(d)[1]}

    assert not trained & held
    assert len(held) == 3 * len(DRAWINGS)
    assert {medium for _, medium in trained} == set(MEDIA)


def test_splits_are_disjoint_and_complete(catalog):
    train, held = (set(catalog.items(split)) for split in ("train", "held-out"))

    assert not train & held
    assert len(train | held) == sum(len(catalog.looks[d][0]) for d in DRAWINGS)


def test_captions_describe_the_picture(catalog):
    rng = np.random.default_rng(0)
    for item in catalog.items("train"):
        for form in ("short", "medium", "long"):
            assert "ball" in catalog.caption(item, rng, form)
    item = Item(0, catalog.pairs[0], Look("noto", "pixel", "flat", "orange"))
    assert "pixel art" in catalog.caption(item, rng, "medium")
    assert "on an orange background" in catalog.caption(item, rng, "medium")


def test_content_captions_name_no_style(catalog):
    style_words = {word for group in (DRAWINGS, MEDIA) for words in group.values() for word in words}
    rng = np.random.default_rng(0)
    for item in catalog.items("train"):
        caption = catalog.caption(item, rng, "long", style=False)
        assert not any(word in caption for word in style_words)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("fox", "a "), ("owl", "an "), ("unicorn", "a "), ("hourglass", "an "), ("scissors", ""), ("sun", "the ")],
)
def test_articles(name, expected):
    assert article(name) == expected


def test_seeds_are_the_same_in_every_process():
    assert stable_seed("a", 1) == 0x60AC85A169C5A905
    assert stable_seed("a", 1) != stable_seed("a", 2)


def test_subjects_are_many_and_unique():
    subjects = read_subjects()

    assert len(subjects) >= 100
    assert len({s.icons[0] for s in subjects}) == len(subjects)
    assert all(name in PALETTES for name in ("cream", "teal"))


def test_pictures_exist_in_every_rendered_size(tmp_path):
    """The same drawing on the same ground, in finer detail."""
    folder = tmp_path / "data"
    small = make_data(folder)
    with pytest.raises(K2Error, match="no renders of 256 px") as told:
        Catalog(folder, 256)
    assert "python -m model.train.data 256" in told.value.hint
    np.save(folder / "renders-256.npy", small.renders.repeat(2, 1).repeat(2, 2))
    large = Catalog(folder, 256)
    np.save(folder / "renders-160.npy", np.zeros((3, 160, 160, 4), np.uint8))
    with pytest.raises(K2Error, match="holds 3 renders, but the data set has 16"):
        Catalog(folder, 160)

    item = next(each for each in small.items("train") if each.look.medium == "plain" and each.look.ground == "scene")
    fine = large.picture(item)
    assert fine.shape == (256, 256, 3)
    off = np.abs(resize(fine, 128).astype(float) - small.picture(item)).mean()
    assert off < 3


def test_icons_render_with_own_viewbox_and_aliases():
    pytest.importorskip("resvg_py")
    square = '<rect width="10" height="10" fill="#f00"/>'
    icons = {
        "icons": {"red-box": {"body": square, "width": 10, "height": 10}},
        "aliases": {"box": {"parent": "red-box"}},
    }

    picture = data.render_icon(icons, "box", 32)

    assert picture.shape == (32, 32, 4)
    np.testing.assert_array_equal(picture[16, 16], [255, 0, 0, 255])
    assert data.render_icon(icons, "circle", 32) is None
