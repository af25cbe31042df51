"""The GPU queue end to end, on the CPU: tiny stages, from renders to 8-bit weights of Raw and Turbo."""

import json

import numpy as np
import pytest
from workshop import InThisProcess

from model.checkpoint import open_checkpoint
from model.library import BUNDLED
from model.train import data, encode, pretrain, queue, recipe, release, samples, training_set, turbo
from model.train.data import DRAWINGS, read_subjects
from model.train.two_subjects import pictures_of_two

RECIPE = """
name = "{name}"
size = {size}
minutes = 1
batch = 2
repeats = 1
lr = 1e-3
muon_lr = 1e-3
mu = 0.0
{init}
[network]
width = 32
heads = 2
kv_heads = 1
blocks = 1
multiplier = 1
"""


@pytest.mark.skipif(not (BUNDLED / "mini-vae.safetensors").exists(), reason="no bundled weights")
def test_queue_trains_from_renders_to_weights(tmp_path, monkeypatch):
    folder = tmp_path / "data"
    folder.mkdir()
    pairs = [(subject.name, drawing) for subject in read_subjects()[:2] for drawing in list(DRAWINGS)[:2]]
    for side in (128, 256):
        renders = np.random.default_rng(0).integers(0, 255, (len(pairs), side, side, 4), np.uint8)
        np.save(data.renders_path(folder, side), renders)
    (folder / "pairs.json").write_text(json.dumps(pairs))
    (folder / "manifest.toml").write_text('[renders]\nsha256 = "0"\n')
    recipes = tmp_path / "recipes"
    recipes.mkdir()
    more = {
        "two": 'init = "one"\nshapes = ["320x192"]\ntwo = 0.5',
        "guidance": 'init = "two"\nteacher = "two"\nstage = "turbo"\nmethod = "guidance"',
        "three": 'init = "guidance"\nteacher = "two"\nstage = "turbo"\nmethod = "trajectory"\nwalk_steps = 2\n'
        'shapes = ["320x192"]\nshaped = 0.5',
    }
    for name, size in (("one", 64), ("two", 256), ("guidance", 256), ("three", 256)):
        (recipes / f"{name}.toml").write_text(RECIPE.format(name=name, size=size, init=more.get(name, "")))
    for module in (data, encode, training_set, queue, release):
        monkeypatch.setattr(module, "DATA", folder)
    for module in (pretrain, queue, release, samples, turbo):
        monkeypatch.setattr(module, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(recipe, "FOLDER", recipes)
    monkeypatch.setattr(queue, "STAGES", (("one", 0.25), ("two", 0.25), ("guidance", 0.25), ("three", 0.25)))
    monkeypatch.setattr(queue, "RELEASED", ("two", "three"))
    monkeypatch.setattr(samples, "PROMPTS", ["a dog"] * 8)
    monkeypatch.setattr(encode, "ProcessPoolExecutor", InThisProcess)
    for module in (encode, training_set):
        monkeypatch.setattr(module, "pictures_of_two", lambda catalog: pictures_of_two(catalog, 8))
    encode.cached_catalog.cache_clear()

    queue.main(0.02, tmp_path / "out", "cpu")

    made = open_checkpoint(tmp_path / "out" / "mini-raw.safetensors")
    assert made.metadata["native"] == 256 and made.metadata["config"]["width"] == 32
    assert made.metadata["training"]["recipe"]["init"] == "one" and made.metadata["shapes"] == ["320x192"]
    turbo_made = open_checkpoint(tmp_path / "out" / "mini-turbo.safetensors").metadata
    assert (turbo_made["variant"], turbo_made["recommended"]["steps"]) == ("turbo", 2)
    assert turbo_made["shapes"] == ["320x192"] and list(folder.glob("latents-320x192-*.npy"))
    assert len(np.load(data.latents_file(folder, 256, two=True))) == 8
    assert list((tmp_path / "out").glob("samples-*.png"))
