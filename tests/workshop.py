"""A folder with a data set of sixteen drawings, so that every stage of training runs in seconds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from model import library
from model.train.data import DATA, DRAWINGS, Catalog, latents_file, read_subjects

SIZES = (64, 128)
FACTOR = 16  # pixels to a latent cell, as in the box
# At the end of a recipe: the smallest network. The text's way in has the encoder's width; the multiplier shrinks it.
TINY = "[network]\nwidth = 32\nheads = 2\nkv_heads = 1\nblocks = 1\nmultiplier = 1\n"


def make_data(folder: Path, subjects: int = 4, drawings: int = 4) -> Catalog:
    """Renders of coloured discs and squares, and latents of noise, each subject's a little different."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    pairs = [(subject.name, drawing) for subject in read_subjects()[:subjects] for drawing in list(DRAWINGS)[:drawings]]
    y, x = np.mgrid[:128, :128] - 64
    renders = np.zeros((len(pairs), 128, 128, 4), np.uint8)
    for index, render in enumerate(renders):
        shape = x**2 + y**2 < 40**2 if index // drawings % 2 else np.maximum(abs(x), abs(y)) < 36
        render[shape] = (*rng.integers(40, 255, 3), 255)
    np.save(folder / "renders.npy", renders)
    (folder / "pairs.json").write_text(json.dumps(pairs))
    (folder / "manifest.toml").write_text('[renders]\nsha256 = "0"\n')
    catalog = Catalog(folder)
    items = catalog.items("train")
    for size in SIZES:
        centres = rng.normal(size=(len(pairs), 16, size // FACTOR, size // FACTOR))
        noise = rng.normal(size=(len(items), 16, size // FACTOR, size // FACTOR))
        np.save(
            latents_file(folder, size),
            np.stack([centres[item.row] + 0.5 * n for item, n in zip(items, noise, strict=True)]).astype(np.float16),
        )
    return catalog


def enlarge(folder: Path) -> None:
    """The same renders in 256 px."""
    np.save(folder / "renders-256.npy", np.load(folder / "renders.npy").repeat(2, 1).repeat(2, 2))


@pytest.fixture
def workshop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with the data set where training looks for it."""
    if "mini" not in library.box():
        pytest.skip("the box holds no weights yet")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("model.train.validation.PICTURES", 16)
    monkeypatch.setattr("model.train.rewards.REAL", 2)
    make_data(tmp_path / DATA)
    return tmp_path


class InThisProcess:
    """A pool that needs no other process, so that folders that a test put in place hold."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    map = staticmethod(map)
