"""What `k2 show` and the gallery say about a picture."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from k2cli import facts, gallery, records
from k2cli.fast_toml import dump
from k2cli.history import MadePicture
from k2cli.project import Shot
from k2cli.records import SPEC_KEYS, Record
from k2cli.toml_tables import Toml
from model.spec import Leader, Picture, Reference, RenderSpec, Style

OTHERWISE = {  # settings that are neither the defaults nor those of the record they are compared with
    **{"width": 80, "height": 128, "seed": 8, "steps": 9, "guidance": 3.5, "guidance_until": 0.6, "sampler": "ab2"},
    **{"mu": 0.5, "denoise": 0.4, "cohesion": 0.7, "style_guidance": 1.5, "leak_guard": "shift"},
    **{"vision_tiles": 4, "vision_rows": False},
}


def recorded(folder: Path, **changes: Any) -> Record:
    """A record with every field filled in, as it is read back."""
    for name in ("a.png", "sketch.png"):
        Image.new("RGB", (64, 96)).save(folder / name)
    (folder / "ink.safetensors").touch()
    looks = (
        Style("dusk", 0.6, (Reference(folder / "a.png", 0.5),), method="splice"),
        Style("ink", 0.5, lora=folder / "ink.safetensors"),
    )
    spec = RenderSpec("a red fox, film", 64, 96, 7, "snow", 8, 2.5, -0.25, styles=looks)
    spec = replace(spec, init_image=folder / "sketch.png", mask="8x8+0+0", denoise=0.3, leader=Leader("tea", 3, "milk"))
    spec = replace(spec, **{"cohesion": 0.5, **changes})
    named = ("seed", "width", "height", "steps", "guidance", "mu")
    made = {"device": "cpu", "dtype": "float32", "precision": "int8", "offload": "text", "seconds": 0.5}
    made |= {"model": {"name": "mini", "variant": "raw", "files": {"mini-raw.safetensors": "ab" * 32}}}
    made |= {key: getattr(spec, key) for key in named}
    shot = Shot("fox-7", "fox", "a red fox", spec, creativity="high")
    table = records.finished_record(shot, Picture(Image.new("RGB", (64, 96)), made), folder)
    return records.parse(Toml(dump(table).decode(), "fox-7.toml"), folder.joinpath)


def test_gallery_shows_the_same_facts_as_show(tmp_path):
    record = recorded(tmp_path, **OTHERWISE)

    shown = {name for name, fact in facts.record_facts(record).items() if fact}
    page = {name for name, _ in gallery.picture_facts(MadePicture(tmp_path / "fox-7.png", record.table))}

    assert shown - page == {
        "prompt",
        "files",
        "versions",
    }  # the prompt stands above; the others matter only for a rerun
    assert page - shown == {"references", "guidance_until"}  # which show includes in the styles and in guidance


@pytest.mark.parametrize("key", SPEC_KEYS)
def test_every_setting_shows_up_as_a_difference(tmp_path, key):
    assert facts.differences([recorded(tmp_path), recorded(tmp_path, **{key: OTHERWISE[key]})])
