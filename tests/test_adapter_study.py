"""The study of LoRA training, end to end on a toy: what is taught, and which figures come out."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny, tiny_box  # noqa: F401
from workshop import make_data

from model.train import adapter, states
from model.train.adapter_study import TRIGGER, train_and_measure, write_pictures
from model.train.data import Catalog
from model.train.judge import Judge, JudgeConfig
from model.train.study import choose_looks, represents_look


@pytest.fixture(scope="module")
def catalog(tmp_path_factory) -> Catalog:
    return make_data(tmp_path_factory.mktemp("data") / "mini", subjects=30, drawings=2)


def test_teaches_up_to_ten_subjects_without_naming_their_look(catalog, tmp_path):
    look = choose_looks(catalog)[0]
    taught = write_pictures(catalog, look, tmp_path)

    files = sorted(tmp_path.glob("*.png"))
    assert 4 <= len(set(taught)) == len(taught) == len(files) <= 10
    for file in files:
        subject = file.stem.replace("-", " ")
        caption = file.with_suffix(".txt").read_text()
        assert caption.endswith(subject) and TRIGGER not in caption
    shown = {hashlib.sha256(np.asarray(Image.open(file)).tobytes()).digest() for file in files}
    standing = [i for i in catalog.items("styles") if i.look == look and represents_look(i)]
    assert not shown & {hashlib.sha256(catalog.picture(item).tobytes()).digest() for item in standing}


def test_compares_three_ways_with_real_pictures(catalog, tmp_path, tiny, monkeypatch):  # noqa: F811
    monkeypatch.setattr(states, "RUNS", tmp_path / "runs")
    torch.manual_seed(0)
    judge = Judge(JudgeConfig(("cat", "fox"))).eval()
    recipe = adapter.Recipe(name="study", pictures="pictures", model="tiny", steps=4, every=2, size=64, rank=2, lr=0.05)

    found = train_and_measure(judge, catalog, tmp_path, recipe, which=1, count=3, steps=2)

    assert found["steps"] == 4 and found["prompts"] == 3 and len(found["taught"]) >= 4
    figures = {row["name"]: row for row in found["figure"]}
    for way in ("plain", "words", "lora", "turbo words", "turbo lora", "real"):
        assert -1 <= figures[f"likeness, {way}"]["low"] <= figures[f"likeness, {way}"]["high"] <= 1
    apart = figures["likeness, lora"]["value"] - figures["likeness, plain"]["value"]
    assert figures["likeness, lora − plain"]["value"] == pytest.approx(apart, abs=2e-4)
    assert len({figures[f"likeness, {way}"]["value"] for way in ("lora", "words", "plain")}) == 3
    assert Image.open(tmp_path / "adapter.png").height == 6 * 134 + 26
