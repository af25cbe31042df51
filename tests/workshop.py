"""A folder with a data set of sixteen drawings, so that every training stage runs in seconds."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import random_state

from model import library
from model.checkpoint import open_checkpoint, save
from model.dit import PRESETS, Krea2
from model.style import StyleConfig, StyleEncoder
from model.text_encoder import TextTower, open_tower
from model.train.autoencoder import load
from model.train.data import DATA, DRAWINGS, Catalog, latents_file, read_subjects
from model.train.looks import apply_medium, place_subject
from model.vae import QwenImageVAE

SIZES = (64, 128)
FACTOR = 16  # pixels per latent cell, as in the bundled model
# The smallest network, for the workshop's own text encoder; and TINY, the same as the end of a recipe.
NETWORK = {"width": 32, "heads": 2, "kv_heads": 1, "blocks": 1, "multiplier": 1, "text_width": 32, "text_heads": 2}
TINY = "[network]\n" + "".join(f"{key} = {value}\n" for key, value in NETWORK.items())


def make_data(folder: Path, subjects: int = 4, drawings: int = 4) -> Catalog:
    """Renders of coloured discs and squares, and latents of noise around a centre for each render."""
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
    """Save the same renders in 256 px."""
    np.save(folder / "renders-256.npy", np.load(folder / "renders.npy").repeat(2, 1).repeat(2, 2))


def small_box(box: Path) -> Path:
    """The bundled files with a narrower mini, made once: at smoke-test size, the text encoder and the autoencoder take
    most of a stage's time."""
    if box.exists():
        return box
    box.mkdir()
    for file in library.BUNDLED.glob("mini-*"):
        (box / file.name).symlink_to(file)
    text = open_tower(library.BUNDLED / "mini-text.safetensors")[0].config
    text = replace(text, hidden_size=32, intermediate_size=32, num_attention_heads=2, head_dim=16)
    dit = replace(PRESETS["mini"], **NETWORK)
    vae = replace(load(library.BUNDLED / "mini-vae.safetensors").config, base_dim=4)
    torch.manual_seed(0)
    networks = {
        "text": TextTower(text),
        "vae": QwenImageVAE(vae),
        "style": StyleEncoder(StyleConfig(text_width=dit.text_width, text_taps=dit.text_taps)),
        "raw": Krea2(dit),
        "turbo": Krea2(dit),
    }
    torch.nn.init.normal_(networks["text"].embed_tokens.weight, std=0.5)
    for part in ("style", "raw", "turbo"):
        networks[part].initialise()
    for part, network in networks.items():
        path = box / f"mini-{part}.safetensors"
        about = open_checkpoint(path).metadata | {"config": asdict(network.config)}
        path.unlink()
        save(path, random_state(network), about)
    return box


def with_box(box: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make training and rendering use these bundled files."""
    monkeypatch.setattr(library, "BUNDLED", box)
    for stage in ("autoencoder", "merge", "release", "rewards", "samples", "sharpen", "states", "training_set"):
        monkeypatch.setattr(f"model.train.{stage}.BUNDLED", box)


@pytest.fixture
def workshop(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with the data set where training looks for it and with bundled files of its own."""
    if "mini" not in library.bundled_models():
        pytest.skip("there are no bundled weights yet")
    monkeypatch.chdir(tmp_path)
    with_box(small_box(tmp_path_factory.getbasetemp() / "small-box"), monkeypatch)
    monkeypatch.setattr("model.train.validation.VALIDATION_PICTURES", 16)
    monkeypatch.setattr("model.train.rewards.REAL_PICTURES", 2)
    make_data(tmp_path / DATA)
    return tmp_path


def compose(render, look, rng, shape=None):
    """A subject on its ground in its medium: uint8 RGBA -> uint8 RGB [H, W, 3]."""
    return apply_medium(place_subject(render, look, rng, shape), look, rng)


class InThisProcess:
    """A pool that stays in this process, so that folders set by a test's monkeypatch apply."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    map = staticmethod(map)

    def submit(self, work, *args):
        return SimpleNamespace(result=lambda: work(*args))
