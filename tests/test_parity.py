"""Whole pictures: diffusers paints the same ones in both variants, square and 3:2, and so does every layout."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from test_layouts import gguf_of, native
from tiny import tiny, tiny_box  # noqa: F401

from model.latents import draw_noise, patchify
from model.layouts import to_diffusers
from model.pipeline import Pipeline
from model.spec import RenderSpec

os.environ.setdefault("HF_HUB_OFFLINE", "1")

FOX = RenderSpec("a red fox in the snow", negative="blue", seed=7)
SIZES = {"square": (64, 64), "3:2": (96, 64)}


@pytest.fixture(params=["raw", "turbo"])
def pipeline(request, tiny) -> Pipeline:  # noqa: F811
    """Raw with guidance, Turbo without, as each checkpoint recommends."""
    loaded = Pipeline.load("tiny", variant=request.param, device="cpu")
    assert bool(loaded.recommended["guidance"]) == (request.param == "raw")
    return loaded


def test_whole_picture_matches_diffusers(pipeline, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    pipeline.export(tmp_path / "out")
    other = diffusers.Krea2Pipeline.from_pretrained(tmp_path / "out")
    other.set_progress_bar_config(disable=True)

    for size, (width, height) in SIZES.items():
        # without guidance diffusers drops a negative prompt, while k2 steers the prompt away from it
        negative = FOX.negative if pipeline.recommended["guidance"] else ""
        spec = pipeline.resolve(RenderSpec(FOX.prompt, width, height, FOX.seed, negative))
        if (width, height) != (pipeline.native,) * 2:
            pipeline.dit.side = None  # diffusers takes all weights to be trained on many sizes
        ours = np.asarray(pipeline.render([spec])[0].image, dtype=np.float32)
        start = draw_noise(spec.seed, pipeline.dit.config.channels, height // 8, width // 8)
        theirs = other(
            spec.prompt,
            negative_prompt=spec.negative,
            width=width,
            height=height,
            num_inference_steps=spec.steps,
            guidance_scale=spec.guidance,
            latents=patchify(start, pipeline.dit.config.patch),
            output_type="np",
        ).images[0]
        assert np.ptp(ours) > 50, size  # a picture, not a flat field
        assert np.abs(ours - 255 * theirs).max() < 0.51, size  # eight bits round away half a level


def test_every_layout_renders_the_same_picture(pipeline, tmp_path):
    """A lone transformer uses the parts beside it; as nothing is rounded, the pixels are exactly the same."""
    folder = tmp_path / "out"
    pipeline.export(folder)
    state = pipeline.dit.state_dict()
    files = {
        "diffusers": folder,
        "native": native(folder, state),
        "GGUF": gguf_of(folder, state, "F32"),
        "ComfyUI": native(made(folder / "comfy"), state, "model.diffusion_model."),
        "diffusers in one file": native(made(folder / "single"), to_diffusers(state, pipeline.dit.config)),
    }
    for name in ("comfy", "single"):
        for part in ("model_index.json", "text_encoder", "tokenizer", "vae"):
            (folder / name / part).symlink_to(folder / part)

    spec = pipeline.resolve(FOX)
    expected = pipeline.render([spec])[0].record["pixels"]
    for layout, file in files.items():
        loaded = Pipeline.load(str(file), device="cpu")
        assert loaded.render([spec])[0].record["pixels"] == expected, layout


def made(folder: Path) -> Path:
    folder.mkdir()
    return folder
