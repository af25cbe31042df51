"""Sizes other than the square: pictures keep their subject whole, and a training step has one shape."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from workshop import FACTOR, InThisProcess, compose, make_data

from model.errors import K2Error
from model.latents import patchify, token_grid, unpatchify
from model.library import BUNDLED
from model.text_encoder import TextEncoder
from model.train import data as train_data
from model.train import encode, loop, pretrain, turbo
from model.train.data import latents_file
from model.train.looks import MEDIA, Look, place_subject
from model.train.pretrain import Recipe
from model.train.shapes import ONE_IN, Shape, indices_in_shape
from model.train.training_set import TrainingSet, read_latents

SHAPES = ("96x64", "64x128")


@pytest.fixture
def render():
    """A red disc, RGBA."""
    y, x = np.mgrid[0:128, 0:128]
    disc = (x - 64) ** 2 + (y - 64) ** 2 < 60**2
    return np.where(disc[..., None], np.array([220, 40, 40, 255]), 0).astype(np.uint8)


@pytest.mark.parametrize("shape", [(128, 192), (192, 128), (96, 224), (224, 224)])
@pytest.mark.parametrize("ground", ["white", "flat", "gradient", "scene", "floor"])
def test_subjects_are_whole_and_centred_in_any_shape(render, shape, ground):
    picture = place_subject(render, Look("noto", ground=ground, palette="sky blue"), np.random.default_rng(3), shape)

    assert picture.shape == (*shape, 3)
    red = (picture[..., 0] > 0.7) & (picture[..., 1] < 0.3)
    rows, columns = np.nonzero(red.any(1))[0], np.nonzero(red.any(0))[0]
    height, width = rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1
    assert abs(height - width) <= 2 and 0.7 * min(shape) < height < 0.9 * min(shape)
    for found, length in ((rows, shape[0]), (columns, shape[1])):
        assert abs((found[0] + found[-1]) / 2 - length / 2) < 0.04 * min(shape)


@pytest.mark.parametrize("medium", MEDIA)
def test_media_work_in_every_shape_and_match_in_the_square(render, medium):
    look = Look("noto", medium, "flat", "cream")
    square = compose(render, look, np.random.default_rng(0))

    np.testing.assert_array_equal(square, compose(render, look, np.random.default_rng(0), (128, 128)))
    for shape in ((128, 96), (96, 160), (160, 480)):
        picture = compose(render, look, np.random.default_rng(0), shape)
        assert picture.shape == (*shape, 3) and picture.std() > 8
        assert abs(picture.mean() - square.mean()) < 60


def test_a_gradient_goes_from_edge_to_edge(render):
    for shape in ((128, 128), (224, 96), (96, 224)):
        column = place_subject(render * 0, Look("noto", ground="gradient"), np.random.default_rng(0), shape)[:, 0]
        light, deep = column[0], column[-1]
        np.testing.assert_allclose(column[len(column) // 2], (light + deep) / 2, atol=0.02)
        np.testing.assert_allclose(deep, np.array([232, 208, 168]) / 255, atol=0.01)


def test_each_shape_has_a_twelfth_of_the_pictures_mostly_its_own(tmp_path):
    items = make_data(tmp_path / "data", subjects=40).items("train")

    found = [set(indices_in_shape(items, Shape.parse(text))) for text in SHAPES]

    for each in found:
        assert 0.6 < len(each) * ONE_IN / len(items) < 1.4
    assert len(found[0] & found[1]) < 0.4 * len(found[0])


@pytest.mark.parametrize("text", ["320", "320x", "wide", "320 x 192", "-320x192"])
def test_invalid_sizes_are_refused(text):
    with pytest.raises(K2Error, match="is not a size"):
        Shape.parse(text)


def test_latents_of_any_shape_survive_patchify_and_unpatchify():
    import torch

    latents = torch.randn(2, 16, 4, 6)
    assert token_grid(latents, 2) == (2, 3)
    assert torch.equal(unpatchify(patchify(latents, 2), 2, 4, 6), latents)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A data set with latents of two shapes."""
    if not (BUNDLED / "mini-text.safetensors").exists():
        pytest.skip("no weights in the box")
    folder = tmp_path_factory.mktemp("data") / "mini"
    catalog = make_data(folder, subjects=20)
    items, rng = catalog.items("train"), np.random.default_rng(0)
    for shape in map(Shape.parse, SHAPES):
        cells = (shape.height // FACTOR, shape.width // FACTOR)
        latents = rng.normal(size=(len(indices_in_shape(items, shape)), 16, *cells))
        np.save(latents_file(folder, shape), latents.astype(np.float16))
    return TrainingSet(catalog, TextEncoder.load(BUNDLED / "mini-text.safetensors"), RECIPE)


RECIPE = Recipe(
    name="shaped", size=64, steps=8, batch=4, repeats=2, lr=1e-3, muon_lr=1e-3, mu=0.0, shapes=SHAPES, shaped=0.6,
    network={"width": 32, "heads": 2, "kv_heads": 1, "blocks": 1, "multiplier": 1}, frozen=("style",), style_loss=0.0,
)  # fmt: skip


def test_a_step_has_one_shape_and_the_shapes_their_share(data, monkeypatch):
    monkeypatch.setattr(data, "embed", lambda captions, more: (None, None))  # slow, and independent of the shape
    seen = Counter()
    for step in range(60):
        parts = [data.batch(RECIPE, step, part) for part in range(2)]
        shapes = {tuple(each["latents"].shape[-2:]) for each in parts}
        assert len(shapes) == 1
        seen.update(shapes)
        for each in parts:
            if each["references"] is not None:
                assert each["references"].shape[-2:] == (4, 4)
            again = data.batch(RECIPE, step, parts.index(each))
            assert np.array_equal(again["latents"], each["latents"]) and again["captions"] == each["captions"]

    assert set(seen) == {(4, 4), (4, 6), (8, 4)}
    assert 12 <= seen[4, 4] <= 36
    square = data.batch(replace(RECIPE, shaped=0.0), 1)
    plain = data.batch(replace(RECIPE, shapes=()), 1)
    assert np.array_equal(square["latents"], plain["latents"]) and square["captions"] == plain["captions"]


def test_shaped_batches_draw_pictures_of_their_shape(data):
    step = next(n for n in range(60) if data.batch(RECIPE, n)["latents"].shape[-1] == 6)
    batch = data.batch(RECIPE, step)
    indices, latents = data.shape_subsets[0]

    for subject, drawn in zip(batch["subjects"], batch["latents"], strict=True):
        place = next(i for i, each in enumerate(latents) if np.array_equal(each.float(), drawn))
        assert data.items[indices[place]].pair.subject == subject


def test_shapes_are_learned_and_frozen_parts_stay(data, tmp_path):
    run = loop.Run(pretrain.PretrainStage(RECIPE, len(data.looks), data), tmp_path)
    style = {name: value.clone() for name, value in run.model.style.state_dict().items()}
    before = run.model.dit.first.weight.clone()
    losses = [run.advance(run.stage.batch(step)) for step in range(8)]

    assert all(np.isfinite(each["loss"]) for each in losses)
    assert not np.array_equal(run.model.dit.first.weight.detach(), before)
    for name, value in run.model.style.state_dict().items():
        assert np.array_equal(value, style[name]), name


def test_a_teacher_sees_other_shapes_too(data):
    aligned = replace(RECIPE, align=0.5)
    stage = pretrain.PretrainStage(aligned, len(data.looks), data)
    stage.begin({name: value.clone() for name, value in stage.model.state_dict().items()})
    step = next(n for n in range(60) if data.batch(RECIPE, n)["latents"].shape[-1] == 6)

    loss, figures = stage.loss(stage.batch(step) | {"first": True})

    assert np.isfinite(float(loss.detach())) and 0 < float(figures["align"]) < 2
    assert stage.teacher.dit.side == stage.model.dit.side == 2  # 64 px, at 32 per token


def test_shapes_are_learned_at_the_positions_of_a_render(data):
    """Around the middle of the square: whatever draws in a stage, or is asked for its view, must agree on it."""
    import torch

    shaped = data.batch(RECIPE, next(n for n in range(60) if data.batch(RECIPE, n)["latents"].shape[-1] == 6))
    square = data.batch(RECIPE, next(n for n in range(60) if data.batch(RECIPE, n)["latents"].shape[-2:] == (4, 4)))
    stage = pretrain.PretrainStage(RECIPE, len(data.looks), data)
    for param in stage.model.dit.parameters():  # at the start, every gate is shut
        torch.nn.init.normal_(param, std=0.1)

    def loss(batch, side):
        stage.model.dit.side = side
        with torch.no_grad():
            return float(stage.loss(batch | {"generator": torch.Generator().manual_seed(0)})[0])

    side = stage.model.dit.side
    assert loss(shaped, side) != loss(shaped, None) and loss(square, side) == loss(square, None)
    raw = pretrain.TrainedModel(RECIPE.config, len(data.looks))
    for method in turbo.METHODS:
        half = turbo.Recipe(**{**vars(RECIPE), "style_loss": 0.05, "frozen": (), "repeats": 1}, method=method)
        made = turbo.TurboStage(half, data, raw, torch.zeros(1, 1, *shaped["embeds"].shape[2:]))
        networks = [made.model.dit, made.model.fake, made.teacher.dit]
        assert {network.side for network in networks if network is not None} == {2}


def test_encoding_a_shape_writes_its_share(data, tmp_path, monkeypatch):
    folder = data.catalog.folder
    monkeypatch.setattr(encode, "DATA", folder)
    monkeypatch.setattr(encode, "ProcessPoolExecutor", InThisProcess)
    renders = np.load(folder / "renders.npy")
    np.save(folder / "renders-256.npy", renders.repeat(2, 1).repeat(2, 2))
    encode.cached_catalog.cache_clear()
    shape = Shape.parse("96x32")

    encode.main(shape)

    made = np.load(latents_file(folder, shape))
    assert made.shape == (len(indices_in_shape(data.items, shape)), 16, 2, 6) and np.isfinite(made).all()
    with pytest.raises(K2Error, match="no latents of 64x32 px") as told:
        read_latents(folder, Shape.parse("64x32"), 1)
    assert told.value.hint.endswith("python -m model.train.encode 64x32")
    (tmp_path / "another.safetensors").touch()
    monkeypatch.setattr(train_data, "AUTOENCODER", tmp_path / "another.safetensors")
    with pytest.raises(K2Error, match="by the bundled autoencoder"):
        read_latents(folder, shape, len(made))
