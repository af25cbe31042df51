"""The decoder on drawn latents: wider without another word, a critic that learns, and a decoder that heeds it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from model.errors import K2Error
from model.train import autoencoder, loop, sharpen
from model.train.autoencoder import ENCODER
from model.train.sharpen import Critic, Pool, Recipe, Sharpening, widened
from model.vae import QwenImageVAE, VAEConfig

NARROW = VAEConfig(
    base_dim=4,
    dim_mult=(1, 1, 2, 6),
    num_res_blocks=1,
    z_dim=4,
    latents_mean=(0.0,) * 4,
    latents_std=(1.0,) * 4,
)
COMMON = {"name": "t", "steps": 100, "lr": 2e-3, "muon_lr": 2e-3, "weight_decay": 0.0, "batch": 2, "crop": 64}


@pytest.fixture
def vae() -> QwenImageVAE:
    torch.manual_seed(0)
    return QwenImageVAE(NARROW).to(memory_format=torch.channels_last)


def twice(vae: QwenImageVAE) -> QwenImageVAE:
    return widened(vae, (8, 8, 16, 24))


@torch.no_grad()
def test_a_wider_autoencoder_says_and_draws_the_same(vae):
    wide, images, latents = twice(vae), torch.randn(2, 3, 64, 64), torch.randn(2, 4, 8, 8)

    assert wide.config.base_dim == 8 and wide.config.dim_mult == (1, 1, 2, 3)
    torch.testing.assert_close(wide.encode(images), vae.encode(images), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(wide.decode(latents), vae.decode(latents), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_its_encoder_is_as_exact_in_bf16_and_the_decoders_twins_differ(vae):
    for tensor in vae.state_dict().values():
        tensor.copy_(tensor.bfloat16())

    for name, tensor in twice(vae).state_dict().items():
        if name.startswith(ENCODER):
            assert torch.equal(tensor, tensor.bfloat16().float()), name
    first, second = twice(vae).decoder.conv_out.weight.chunk(2, dim=1)
    assert not torch.isclose(first, second).any()


def test_as_wide_as_it_was_it_is_what_it_was(vae):
    same = widened(vae, (4, 4, 8, 24))

    assert all(torch.equal(tensor, same.state_dict()[name]) for name, tensor in vae.state_dict().items())


@pytest.mark.parametrize("widths", [(8, 8, 16), (6, 6, 12, 24), (2, 4, 8, 24), (8, 8, 8, 24), ()])
def test_widths_that_are_no_multiples_are_refused(vae, widths):
    with pytest.raises(K2Error, match=r"Scales of \[4, 4, 8, 24\] channels cannot have"):
        widened(vae, widths)


def test_a_critic_learns_what_is_real():
    torch.manual_seed(0)
    critic = Critic(8)
    optimiser = torch.optim.AdamW(critic.parameters(), 2e-3)
    flat = torch.rand(8, 3, 1, 1).expand(-1, -1, 64, 64)
    for _ in range(60):
        real, drawn = critic(flat), critic(flat + 0.3 * torch.randn(8, 3, 64, 64))
        loss = (1 - real).relu().mean() + (1 + drawn).relu().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    assert critic(flat).mean() > 0.5 > -0.5 > critic(flat + 0.3 * torch.randn(8, 3, 64, 64)).mean()


class Data:
    """A data set that is known by its manifest's hash alone."""


@pytest.fixture
def stage(vae, monkeypatch):
    """The stage on sixteen pictures of one disc each, whose free latents are other pictures' than their captions'."""
    monkeypatch.setattr(autoencoder, "load", lambda path: vae)
    monkeypatch.setattr(sharpen, "fingerprint", lambda catalog: "")

    def made(**settings) -> Sharpening:
        rng = np.random.default_rng(0)
        y, x = np.mgrid[:64, :64] - 32
        pictures = np.full((16, 64, 64, 3), 255, np.uint8)
        for picture in pictures:
            picture[x**2 + y**2 < rng.integers(100, 600)] = rng.integers(0, 255, 3)
        with torch.no_grad():
            asked = vae.encode(sharpen.from_bytes(pictures))[:, None]
        begun = asked + 0.2 * torch.randn(asked.shape, generator=torch.Generator().manual_seed(1))
        latents = (each.half().numpy() for each in (asked, begun, asked.roll(1, 0)))
        recipe = Recipe(**(COMMON | {"widths": (8, 8, 16, 24), "size": 64} | settings))
        return Sharpening(recipe, Data(), Pool(pictures, np.zeros(16, bool), *latents))

    return made


def gradients(stage: Sharpening, step: int) -> dict[str, Tensor]:
    stage.loss(stage.batch(step))[0].backward()
    return {name: p.grad for name, p in stage.model.named_parameters() if p.grad is not None}


def test_the_critic_is_not_moved_to_please_the_decoder(stage):
    """Whatever its opinion weighs, it learns the same."""
    deaf, heeding = (gradients(stage(critic=weight), step=1000) for weight in (0.0, 10.0))

    moved = {name for name, each in deaf.items() if not torch.allclose(each, heeding[name], rtol=1e-3, atol=1e-6)}
    assert "vae.decoder.conv_out.weight" in moved and not any(name.startswith("critic.") for name in moved)


def test_a_critic_that_knows_nothing_yet_is_not_heeded(stage):
    deaf, first = (gradients(stage(critic=weight), step=0) for weight in (0.0, 10.0))

    assert all(torch.allclose(gradient, first[name], rtol=1e-4, atol=1e-6) for name, gradient in deaf.items())


def test_pictures_and_latents_are_cut_out_of_one_place(stage):
    """Cells of factor 8: a picture's crop, encoded, is about the crop of its latents."""
    made = stage(crop=32)
    made.pool.pictures[:] = np.arange(64)[None, None, :, None]
    made.pool.asked[:] = np.arange(8, dtype=np.float16)
    batch = made.batch(3)

    left = (batch["images"][:2, 0, 0, 0] + 1) * 127.5
    torch.testing.assert_close(left, 8 * batch["latents"][:2, 0, 0, 0])


def test_it_draws_begun_pictures_more_nearly_and_leaves_the_encoder(stage, tmp_path):
    made = stage(steps=60, critic=0.0, batch=4, every=1000, warmup_steps=5, average=0.9)
    before = {name: value.clone() for name, value in made.model.state_dict().items()}

    def off() -> float:
        with torch.no_grad():
            return sum(float(made.loss(made.batch(10**6 + part))[1]["begun"]) for part in range(4))

    first = off()
    loop.train(loop.Run(made, tmp_path), lambda line: None)

    assert off() < 0.8 * first
    for name, value in made.model.vae.state_dict().items():
        if name.startswith(ENCODER):
            assert torch.equal(value, before[f"vae.{name}"]), name
