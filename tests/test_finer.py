"""One more scale for the autoencoder: twins of one picture, and a network that starts as its teacher."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from workshop import enlarge, make_data

from model.train import finer, loop
from model.train.autoencoder import MINI_CONFIG
from model.train.data import Catalog
from model.train.finer import GrowStage, Recipe, grow, halve_resolution, load_pool, picture_pair
from model.vae import QwenImageVAE


@pytest.fixture(scope="module")
def catalog(tmp_path_factory) -> Catalog:
    """Drawings of 256 px in every look."""
    folder = tmp_path_factory.mktemp("twins") / "data"
    make_data(folder)
    enlarge(folder)
    return Catalog(folder, 256)


def of_medium(catalog: Catalog, medium: str):
    return next(item for item in catalog.items("train") if item.look.medium == medium)


@pytest.mark.parametrize("medium", ["plain", "halftone", "pixel", "neon", "hatching", "watercolour", "riso", "lowkey"])
def test_twins_show_the_same_picture(catalog, medium):
    item = of_medium(catalog, medium)
    fine, coarse = picture_pair(catalog, item)

    assert (fine == catalog.picture(item)).all() and coarse.shape == (128, 128, 3)
    assert np.abs(halve_resolution(fine.astype(float)) - coarse).mean() < 6


def test_grain_is_equally_strong_and_aligned_in_twins(catalog):
    fine, coarse = (picture.astype(float) for picture in picture_pair(catalog, of_medium(catalog, "film")))
    corner = (slice(0, 24), slice(0, 24))  # only ground
    small = halve_resolution(fine)[corner].mean(-1)

    assert coarse[corner].mean(-1).std() == pytest.approx(fine[:48, :48].mean(-1).std(), rel=0.15)
    assert np.corrcoef(small.ravel(), coarse[corner].mean(-1).ravel())[0, 1] > 0.95


def test_looks_keep_their_statistics_at_both_sizes(catalog):
    """Lines are as wide and as bright: a picture's mean and spread do not change with its size."""
    small = Catalog(catalog.folder)
    for medium in ("neon", "hatching", "watercolour"):
        item = of_medium(catalog, medium)
        fine, coarse = halve_resolution(catalog.picture(item).astype(float)), small.picture(item).astype(float)
        assert fine.mean() == pytest.approx(coarse.mean(), rel=0.1)
        assert fine.std() == pytest.approx(coarse.std(), rel=0.15)


def test_twins_are_cached_per_data_set(catalog, tmp_path, monkeypatch):
    recipe = Recipe(name="fine", teacher="autoencoder", pictures=2, minutes=1, lr=1e-3, muon_lr=1e-3)
    first = load_pool(catalog, recipe, tmp_path).fine
    monkeypatch.setattr(finer, "picture_pair", lambda catalog, item: (np.zeros((256, 256, 3)), np.zeros((128, 128, 3))))
    assert np.array_equal(load_pool(catalog, recipe, tmp_path).fine, first)
    monkeypatch.setattr(finer, "fingerprint", lambda catalog: "other")
    assert not np.array_equal(load_pool(catalog, recipe, tmp_path).fine, first)


def teacher() -> QwenImageVAE:
    torch.manual_seed(0)
    return QwenImageVAE(MINI_CONFIG).requires_grad_(False)


@pytest.mark.parametrize("top", [1, 2])
def test_grown_network_starts_as_its_teacher(top, monkeypatch):
    """The grown network's inner scales turn a coarse picture's features into exactly what the teacher's do."""
    monkeypatch.setattr(finer, "NEW_SCALE_WIDTH", top)
    old = teacher()
    new = grow(old)
    coarse = torch.randn(2, 8, 32, 32)

    assert (old.factor, new.factor) == (8, 16)
    with torch.no_grad():
        silent = torch.zeros(2, 8 * (top - 1), 32, 32)
        expected, found = coarse, torch.cat((coarse, silent), 1)  # the new channels carry nothing yet
        for index, layer in enumerate(old.encoder.down_blocks):
            expected, found = layer(expected), new.encoder.down_blocks[index + 2](found)
        torch.testing.assert_close(found, expected)
        z = torch.randn(1, 16, 4, 4)
        expected = found = old.decoder.mid_block(old.decoder.conv_in(z))
        for ours, theirs in zip(new.decoder.up_blocks, old.decoder.up_blocks[:3], strict=False):
            expected, found = theirs(expected), ours(found)
        torch.testing.assert_close(found, expected)
        assert new.decode(new.encode(torch.rand(1, 3, 64, 96) * 2 - 1)).shape == (1, 3, 64, 96)


def test_both_halves_learn(catalog, tmp_path):
    recipe = Recipe(
        name="t", steps=12, lr=2e-3, muon_lr=2e-3, weight_decay=0.0, clip=1e6, every=4, batch=2, crop=64, pictures=6,
        warmup_steps=1,
    )  # fmt: skip
    stage = GrowStage(recipe, catalog, load_pool(catalog, recipe, tmp_path), teacher())
    first = stage.batch(0)
    assert first["fine"].shape == (2, 3, 64, 64) and first["coarse"].shape == (2, 3, 32, 32)
    apart = torch.nn.functional.avg_pool2d(first["fine"], 2) - first["coarse"]
    assert apart.abs().mean() < 0.15  # the same crop of both twins
    _, before = stage.loss(stage.batch(100))
    run = loop.train(loop.Run(stage, tmp_path / "run"), lambda line: None)

    _, after = run.stage.loss(stage.batch(100))
    assert after["drawn"] < before["drawn"] and after["off"] < before["off"]


def test_missing_teacher_is_reported(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = Recipe(name="t", steps=1, lr=1e-3, muon_lr=1e-3)
    with pytest.raises(finer.K2Error, match='run "autoencoder" has no autoencoder'):
        finer.main(recipe)
    with pytest.raises(finer.K2Error, match="decoder has no meaning"):
        replace(recipe, decoder=True)
