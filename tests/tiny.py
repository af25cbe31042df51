"""A complete model with random weights, small enough to render in milliseconds."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from PIL import ImageChops

from model import library
from model.checkpoint import save
from model.dit import DiTConfig, Krea2
from model.spec import Picture
from model.style import StyleConfig, StyleEncoder
from model.text_encoder import TextConfig, TextTower
from model.vae import QwenImageVAE, VAEConfig

TOKENIZER = Path(library.__file__).parent / "weights" / "mini-tokenizer.json"

DIT = DiTConfig(width=64, heads=4, kv_heads=2, blocks=2, text_width=32, text_taps=3, text_heads=2, channels=4)


def make_box(folder: Path) -> None:
    """Write tiny-raw, tiny-turbo, tiny-text, tiny-vae, tiny-style and tiny-tokenizer."""
    if not TOKENIZER.exists():
        pytest.skip("the bundled tokenizer does not exist yet")
    torch.manual_seed(0)
    for variant, recommended in (
        ("raw", {"steps": 4, "guidance": 2.0, "mu": "auto"}),
        ("turbo", {"steps": 2, "guidance": 0.0, "mu": 1.15}),
    ):
        dit = Krea2(DIT)
        dit.initialise()
        torch.nn.init.normal_(dit.last.linear.weight, std=0.1)
        about = {"kind": "dit", "variant": variant, "config": asdict(DIT), "recommended": recommended, "native": 64}
        save(folder / f"tiny-{variant}.safetensors", dit.state_dict(), about)

    vocabulary = len(json.loads(TOKENIZER.read_text())["model"]["vocab"]) + 8
    text = TextConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        rope_theta=1e4,
        rms_norm_eps=1e-6,
        taps=(1, 2, 3),
    )
    tower = TextTower(text)
    torch.nn.init.normal_(tower.embed_tokens.weight, std=0.5)
    save(folder / "tiny-text.safetensors", random_state(tower), {"kind": "text", "config": asdict(text)})
    vae = VAEConfig(
        base_dim=8, z_dim=4, num_res_blocks=1, latents_mean=(0.1, -0.2, 0.3, 0.0), latents_std=(1.1, 0.9, 1.0, 1.2)
    )
    save(folder / "tiny-vae.safetensors", QwenImageVAE(vae).state_dict(), {"kind": "vae", "config": asdict(vae)})
    style = StyleEncoder(StyleConfig(text_width=32, text_taps=3, rows=2, channels=4, width=16, hidden=24, vector=8))
    style.initialise()
    save(folder / "tiny-style.safetensors", style.state_dict(), {"kind": "style", "config": asdict(style.config)})
    shutil.copy(TOKENIZER, folder / "tiny-tokenizer.json")


def random_state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor + 0.02 * torch.randn_like(tensor) for name, tensor in module.state_dict().items()}


def pixels(picture: Picture) -> str:
    return picture.record["pixels"]


def difference(a: Picture, b: Picture) -> int:
    """The largest difference between two pictures' pixels."""
    return max(ImageChops.difference(a.image, b.image).tobytes())


@pytest.fixture(scope="session")
def tiny_box(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("box")
    make_box(folder)
    return folder


@pytest.fixture
def tiny(tiny_box: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Bundle the tiny model instead of the trained one."""
    monkeypatch.setattr(library, "BUNDLED", tiny_box)
    return tiny_box
