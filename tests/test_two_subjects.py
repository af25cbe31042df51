"""Pictures of two subjects: where they stand, what their captions say, and how a run learns from them."""

from dataclasses import replace

import numpy as np
import pytest
from workshop import InThisProcess, enlarge, make_data

from model.errors import K2Error
from model.train import data as train_data
from model.train import encode, pretrain, training_set
from model.train.data import Catalog, latents_file
from model.train.looks import PALETTES, Look, place_two_subjects
from model.train.training_set import load_training_set
from model.train.two_subjects import RELATIONS, TwoSubjects, pictures_of_two

RED, BLUE = (230, 40, 40, 255), (40, 60, 230, 255)


def disc(colour):
    y, x = np.mgrid[0:128, 0:128]
    return np.where(((x - 64) ** 2 + (y - 64) ** 2 < 54**2)[..., None], np.array(colour), 0).astype(np.uint8)


def middle_of(picture, channel):
    """Row and column of the middle of what is of a channel's colour, red or blue; 0 ... 1."""
    strong = picture[..., channel] - picture[..., 2 - channel] > 0.4
    return np.argwhere(strong).mean(0) / strong.shape


@pytest.fixture(scope="module")
def catalog(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("two") / "data")


@pytest.mark.parametrize("ground", ["white", "flat", "scene", "floor"])
@pytest.mark.parametrize("shape", [(128, 128), (96, 160), (160, 96)])
def test_the_first_is_on_the_left_or_above(ground, shape):
    look = Look("noto", "plain", ground, "cream")
    for seed in range(8):
        for beside in (True, False):
            rng = np.random.default_rng(seed)
            picture = place_two_subjects((disc(RED), disc(BLUE)), look, rng, beside, shape)
            (red_row, red_column), (blue_row, blue_column) = (middle_of(picture, channel) for channel in (0, 2))
            apart, level = (blue_column - red_column, blue_row - red_row)[:: 1 if beside else -1]
            assert picture.shape == (*shape, 3) and apart > 0.2 and abs(level) < 0.09


def test_neither_is_cut_off():
    look = Look("noto", "plain", "white")
    for seed in range(40):
        for beside in (True, False):
            picture = place_two_subjects((disc(RED), disc(BLUE)), look, np.random.default_rng(seed), beside)
            rim = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
            assert rim.min() == 1  # discs leave a margin in their squares


@pytest.mark.parametrize("palette", ["cream", "night blue"])
def test_monochrome_drawings_have_one_ink_that_stands_out(palette):
    look = Look("emojione-monotone", "plain", "flat", palette)
    picture = place_two_subjects((disc(RED), disc(BLUE)), look, np.random.default_rng(0), True)
    colours = {tuple(pixel) for pixel in picture.reshape(-1, 3).round(2)}
    ground = np.array(PALETTES[palette][0]).round(2) / 255
    left, right = picture[64, 34], picture[64, 94]
    np.testing.assert_allclose(left, right, atol=0.02)
    assert len(colours) > 1 and np.abs(left - ground).max() > 0.5


@pytest.mark.parametrize("ground", ["flat", "gradient", "scene", "floor"])
@pytest.mark.parametrize("palette", PALETTES)
def test_both_have_the_ink_that_suits_the_ground(ground, palette):
    """The first drawing darkens the canvas, which must not decide the second one's ink."""
    square = np.full((128, 128, 4), 255, np.uint8)
    for beside in (True, False):
        look = Look("emojione-monotone", "plain", ground, palette)
        picture = place_two_subjects((square, square), look, np.random.default_rng(0), beside)
        low = 18 if beside and ground in ("scene", "floor") else 0
        one, other = ((64 + low, 34), (64 + low, 94)) if beside else ((36, 64), (92, 64))
        np.testing.assert_allclose(picture[one], picture[other], atol=0.01)


def test_pictures_are_the_same_every_time_and_of_two_different_subjects(catalog):
    made = pictures_of_two(catalog, 300)

    assert made == pictures_of_two(catalog, 300) and made[:100] == pictures_of_two(catalog, 100)
    assert all(each.second.subject != each.pair.subject for each in made)
    assert all(each.second.drawing == each.pair.drawing == each.look.drawing for each in made)
    assert all(catalog.pairs[each.second_row] == each.second for each in made)
    assert not any(pair.held_out for each in made for pair in (each.pair, each.second))
    assert {each.look for each in made} <= {item.look for item in catalog.items("train")}
    assert 0.5 < np.mean([each.beside for each in made]) < 0.8
    np.testing.assert_array_equal(catalog.picture(made[0]), catalog.picture(made[0]))


def test_held_out_pictures_are_others(catalog):
    train, held_out = pictures_of_two(catalog, 200), pictures_of_two(catalog, 200, split="held-out")
    assert train != held_out and len(set(held_out)) > 100


def test_captions_name_both_in_their_order(catalog):
    """The order of names is that from the left or above, unless the relation says otherwise."""
    rng = np.random.default_rng(0)
    for item in pictures_of_two(catalog, 200):
        first, second = (catalog.subjects[pair.subject].words for pair in (item.pair, item.second))
        for form in ("short", "medium", "long"):
            caption = catalog.caption(item, rng, form)
            at = [min(caption.find(name) for name in names if name in caption) for names in (first, second)]
            turned = any(words in caption for words in ("to the right of", " below ", " under "))
            assert (at[0] > at[1]) == turned, caption
            beside = any(words in caption for words in (" and a", "next to", "beside", "with", "left", "right", "near"))
            assert beside or not item.beside, caption


def test_relations_name_each_subject_once():
    for relation in (*RELATIONS[True], *RELATIONS[False]):
        assert relation.count("{0}") == relation.count("{1}") == 1


RECIPE = pretrain.Recipe(name="pairs", size=64, batch=4, repeats=1, lr=1e-3, muon_lr=1e-3, mu=0.0, steps=1, two=0.25)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    made = make_data(tmp_path / "data").folder
    for module in (train_data, encode, training_set):
        monkeypatch.setattr(module, "DATA", made)
    monkeypatch.setattr(encode, "ProcessPoolExecutor", InThisProcess)
    for module in (encode, training_set):
        monkeypatch.setattr(module, "pictures_of_two", lambda catalog: pictures_of_two(catalog, 30))
    encode.cached_catalog.cache_clear()
    return made


def test_run_needs_their_latents(folder):
    with pytest.raises(K2Error) as told:
        load_training_set(RECIPE, "cpu")
    assert "of two subjects" in str(told.value) and told.value.hint.endswith("model.train.encode 64 --two")


def test_run_draws_its_share_of_them(folder):
    encode.main(64, two=True)
    latents = np.load(latents_file(folder, 64, two=True))
    single = np.load(latents_file(folder, 64))
    assert latents.shape == (30, *single.shape[1:])

    data = load_training_set(RECIPE, "cpu")
    two = np.array([isinstance(item, TwoSubjects) for item in data.items])
    assert two.sum() == 30 and data.weights[two].sum() == pytest.approx(0.25) and data.weights.sum() == pytest.approx(1)
    np.testing.assert_array_equal(data.latents[two].numpy(), latents)

    only = replace(RECIPE, two=1.0, batch=16)
    batch = load_training_set(only, "cpu").batch(only, 0)
    captioned = [caption for caption in batch["captions"] if caption]
    relations = [part for each in RELATIONS.values() for relation in each for part in (relation[3:-3],)]
    assert captioned and all(any(words in caption for words in relations) for caption in captioned)


def test_style_references_show_one_subject_and_another(folder):
    """Else the picture's subject could be copied from its reference."""
    encode.main(64, two=True)
    data, rng = load_training_set(RECIPE, "cpu"), np.random.default_rng(0)
    for index, item in enumerate(data.items):
        for _ in range(4):
            reference = data.items[data._same_look(index, rng)]
            assert not isinstance(reference, TwoSubjects) and reference.look == item.look
            assert reference.pair.subject not in item.subjects


def test_latents_are_of_their_pictures(folder):
    enlarge(folder)
    encode.main(128, two=True)
    encode.main(128)
    two, single = (np.load(latents_file(folder, 128, two=kind)).astype(np.float32) for kind in (True, False))
    catalog = Catalog(folder, 128)
    items = pictures_of_two(catalog, 30)
    vae = encode.load_autoencoder(encode.AUTOENCODER)
    expected = vae.encode(encode.from_bytes(np.stack([catalog.picture(items[7])])))[0].detach().numpy()
    np.testing.assert_allclose(two[7], expected, atol=5e-3)
    assert len(single) == len(catalog.items("train"))


@pytest.mark.parametrize(("share", "expected"), [(0.25, False), (0.0, True)])
def test_strange_words_name_no_second_thing_where_two_may_be_drawn(folder, monkeypatch, share, expected):
    """A caption whose second thing is to be ignored contradicts one whose second thing is drawn."""
    encode.main(64, two=True)
    words, named = load_training_set(replace(RECIPE, two=share), "cpu").wording.strange_words, []
    monkeypatch.setattr(words, "second_thing", lambda names, rng: named.append(names) or "beside a thing")
    for seed in range(100):
        words.wrap("a dog", ("dog",), np.random.default_rng(seed))
    assert bool(named) == expected


def test_only_a_few_parts_are_composed_ahead(monkeypatch):
    submitted = []

    class Pool:
        def submit(self, work, *args):
            submitted.append(args)
            return InThisProcess().submit(lambda folder, size, items: items, *args)

    monkeypatch.setattr(encode, "PARTS_AHEAD", 3)
    parts = [[index] for index in range(20)]
    ahead = []
    for count, part in enumerate(encode.compose_ahead(Pool(), 64, parts)):  # type: ignore[arg-type]
        assert part == [count]
        ahead.append(len(submitted) - count)
    assert max(ahead) == 4 and len(ahead) == 20
