"""Proof that this is a Krea 2: diffusers opens the exported folder and renders the same picture from the same noise."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import ImageChops
from safetensors import SafetensorError
from tiny import tiny, tiny_box  # noqa: F401

from model import library
from model.checkpoint import read, save
from model.errors import K2Error
from model.hashes import sha256
from model.headers import read_header
from model.latents import draw_noise, patchify
from model.pipeline import Pipeline
from model.spec import RenderSpec

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def assert_same_pictures(pipeline: Pipeline, folder: Path, spec: RenderSpec) -> None:
    """Render with k2 and diffusers from the same noise: no pixel may differ by more than 2 of 255."""
    diffusers = pytest.importorskip("diffusers")
    spec = pipeline.resolve(spec)
    ours = pipeline.render([spec])[0]

    other = diffusers.Krea2Pipeline.from_pretrained(folder)
    other.set_progress_bar_config(disable=True)
    cells = [side // pipeline.vae.factor for side in (spec.height, spec.width)]
    start = draw_noise(spec.seed, pipeline.dit.config.channels, *cells)
    theirs = other(
        spec.prompt,
        negative_prompt=spec.negative,
        height=spec.height,
        width=spec.width,
        num_inference_steps=spec.steps,
        guidance_scale=spec.guidance,
        latents=patchify(start, pipeline.dit.config.patch),
    ).images[0]

    assert max(ours.image.tobytes()) - min(ours.image.tobytes()) > 50  # a picture, not a flat field
    assert max(ImageChops.difference(ours.image, theirs).tobytes()) <= 2


@pytest.mark.parametrize("variant", ["raw", "turbo"])
def test_diffusers_renders_the_same_picture(tiny, tmp_path, variant):  # noqa: F811
    """Another size than the native one; with guidance, a negative prompt of another length than the prompt.

    Without guidance, diffusers drops negative prompts and k2 steers the prompt away from them, so there is none.
    """
    pipeline = Pipeline.load("tiny", variant=variant, device="cpu")
    pipeline.export(tmp_path / "out")
    pipeline.dit.side = None  # diffusers treats all weights as trained at many sizes

    negative = "blue" if pipeline.recommended["guidance"] else ""
    spec = RenderSpec("a red fox in the snow", width=80, height=64, seed=7, negative=negative)
    assert_same_pictures(pipeline, tmp_path / "out", spec)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_constant_mu_is_exported(tiny, tmp_path, monkeypatch):  # noqa: F811
    state, about = read(tiny / "tiny-raw.safetensors")
    for path in tiny.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    save(tmp_path / "tiny-raw.safetensors", state, about | {"recommended": {"steps": 3, "guidance": 0.0, "mu": 0.2}})
    monkeypatch.setattr(library, "BUNDLED", tmp_path)
    pipeline = Pipeline.load("tiny", device="cpu")
    pipeline.export(tmp_path / "out")

    assert_same_pictures(pipeline, tmp_path / "out", RenderSpec("a red fox"))


@pytest.mark.parametrize("ends", [(3.0, 3.0), (0.7, 2.5)])
def test_mu_of_weights_without_metadata_comes_from_the_scheduler(tiny, tmp_path, ends):  # noqa: F811
    """As diffusers saves them. The same holds after they are exported again."""
    Pipeline.load("tiny", variant="raw", device="cpu").export(tmp_path / "out")
    weights, config = (next((tmp_path / "out").glob(each)) for each in ("transformer/*.safetensors", "scheduler/*"))
    save(weights, read(weights)[0], {})
    shift = {"base_shift": ends[0], "max_shift": ends[1]}
    config.write_text(json.dumps(json.loads(config.read_text()) | shift))

    pipeline = Pipeline.load(str(tmp_path / "out"), device="cpu")
    spec = RenderSpec("a red fox", width=64, height=96, steps=3, guidance=0.0)
    assert_same_pictures(pipeline, tmp_path / "out", spec)
    pipeline.export(tmp_path / "again")
    assert_same_pictures(pipeline, tmp_path / "again", spec)


def test_taps_up_to_the_last_layer(tiny, tmp_path, monkeypatch):  # noqa: F811
    """Both diffusers and k2 use the last layer's state after the norm."""
    for path in tiny.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    state, about = read(tiny / "tiny-text.safetensors")
    layer = {
        name.replace("layers.2.", "layers.3."): t.clone() for name, t in state.items() if name.startswith("layers.2.")
    }
    state |= layer | {"norm.weight": torch.rand(32) + 0.5}
    save(tmp_path / "tiny-text.safetensors", state, about | {"config": about["config"] | {"taps": [0, 2, 4]}})
    monkeypatch.setattr(library, "BUNDLED", tmp_path)
    pipeline = Pipeline.load("tiny", device="cpu")
    pipeline.export(tmp_path / "out")

    assert_same_pictures(pipeline, tmp_path / "out", RenderSpec("a red fox"))


def test_k2_reads_its_export(tiny, tmp_path):  # noqa: F811
    """With the same settings; a second export is identical byte for byte, except for the order of the metadata."""
    pipeline = Pipeline.load("tiny", variant="turbo", device="cpu")
    pipeline.export(tmp_path / "out")
    again = Pipeline.load(str(tmp_path / "out"), device="cpu")

    assert again.variant == "turbo" and again.recommended == pipeline.recommended and again.native == pipeline.native
    spec = RenderSpec("a red fox", seed=3)
    assert again.render([spec])[0].record["pixels"] == pipeline.render([spec])[0].record["pixels"]
    again.export(tmp_path / "twice")
    first, second = (sorted(p for p in (tmp_path / n).rglob("*") if p.is_file()) for n in ("out", "twice"))
    assert [path.name for path in first] == [path.name for path in second]
    for one, other in zip(first, second, strict=True):
        if one.suffix == ".safetensors":
            assert read_header(one) == read_header(other)
            start = 8 + int.from_bytes(one.read_bytes()[:8], "little")
            assert one.read_bytes()[start:] == other.read_bytes()[start:], one.name
        else:
            assert one.read_bytes() == other.read_bytes(), one.name


def test_tokenizer_file_without_its_folder_is_exported(tiny, tmp_path):  # noqa: F811
    Pipeline.load("tiny", device="cpu").export(made := tmp_path / "out")
    (made / "tokenizer" / "tokenizer.json").rename(made / "tokenizer.json")
    shutil.rmtree(made / "tokenizer")
    pipeline = Pipeline.load(str(made), device="cpu")
    pipeline.export(tmp_path / "again")

    assert_same_pictures(pipeline, tmp_path / "again", RenderSpec("a red fox"))


def test_record_has_hashes_of_configs_and_tokenizer(tiny, tmp_path):  # noqa: F811
    Pipeline.load("tiny", device="cpu").export(made := tmp_path / "out")

    files = Pipeline.load(str(made), device="cpu").hashes()

    configs = {f"{part}/config.json" for part in ("transformer", "text_encoder", "vae")}
    beside = {"tokenizer/tokenizer.json", "model_index.json"}
    assert {name for name in files if not name.endswith(".safetensors")} == configs | beside
    assert next(iter(files)).startswith("transformer/") and all(files[name] == sha256(made / name) for name in files)


def test_export_refuses_an_existing_folder(tiny, tmp_path):  # noqa: F811
    with pytest.raises(K2Error, match="exists already"):
        Pipeline.load("tiny", device="cpu").export(tmp_path)


def test_failed_export_leaves_nothing(tiny, tmp_path, monkeypatch):  # noqa: F811
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("model.export.write_tokenizer", full)
    with pytest.raises(K2Error, match="No space left") as told:
        Pipeline.load("tiny", device="cpu").export(tmp_path / "out")
    assert told.value.hint == "Free some space, and try again."
    assert not list(tmp_path.iterdir())


def test_full_disk_leaves_not_even_the_parent_folders(tiny, tmp_path, monkeypatch):  # noqa: F811
    def full(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("model.export.save", full)
    with pytest.raises(K2Error, match=r"cannot be written: .*No space left"):
        Pipeline.load("tiny", device="cpu").export(tmp_path / "no" / "such" / "folder")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("variant", ["raw", "turbo"])
def test_bundled_model(tmp_path, variant):
    if library.find("mini", variant) is None:
        pytest.skip(f"mini-{variant} is not in the box")
    pipeline = Pipeline.load("mini", variant=variant, device="cpu")
    pipeline.export(tmp_path / "mini")

    assert_same_pictures(pipeline, tmp_path / "mini", RenderSpec("a red fox", seed=7, steps=4))
