"""What the autoencoder's training loss asks for: edges in the right place, grain of the right strength."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from model.train.autoencoder import NARROW_WINDOW, WIDE_WINDOW, Recipe, loss, measure_latents, spectra
from model.vae import VAEConfig

GRAIN = 0.2  # its standard deviation, where pictures are -1 ... 1
GREY = torch.zeros(4, 3, 64, 64)


class Decoded:
    """An autoencoder whose decoder returns given pictures."""

    mean, std = torch.zeros(1, 16, 1, 1), torch.ones(1, 16, 1, 1)

    def __init__(self, pictures, mean=0.0, logvar=0.0):
        self.pictures, self.latents = pictures, (mean, logvar)

    def moments(self, images):
        return tuple(torch.full((len(images), 16, 8, 8), each) for each in self.latents)

    def reconstruct(self, latents):
        return self.pictures


def noise(seed: int):
    return GRAIN * torch.randn(4, 1, 64, 64, generator=torch.Generator().manual_seed(seed)).expand(-1, 3, -1, -1)


def cost(decoded, images, grainy: bool, texture: float) -> float:
    recipe = Recipe(name="t", steps=1, lr=1e-3, muon_lr=1e-3, weight_decay=0.0, decoder=True, texture=texture)
    which = torch.full((len(images),), grainy)
    return loss(Decoded(decoded), images, which, recipe, torch.Generator()).item()


@pytest.mark.parametrize("side", [NARROW_WINDOW, WIDE_WINDOW])
def test_white_noise_has_its_variance_at_every_frequency(side):
    pictures = GRAIN * torch.randn(8, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    power = spectra(pictures, side).mean(dim=(0, 1, 2, 3))

    torch.testing.assert_close(power, torch.full_like(power, GRAIN**2), rtol=0.25, atol=0)


def repeated(cell):
    """A pattern of 8 x 8 pixels over the whole picture, as strong as the grain."""
    cell = cell - cell.mean()
    return (GRAIN * cell / cell.std()).repeat(4, 3, 8, 8)


def test_other_grain_costs_less_than_none_or_imitations():
    real, other = noise(1), noise(2)
    dot = torch.zeros(8, 8)
    dot[3, 5] = 1
    tile = torch.randn(8, 8, generator=torch.Generator().manual_seed(3))
    net = (noise(2).abs() - noise(2).abs().mean()) * GRAIN / noise(2).abs().std()  # just as white, but not noise

    costs = {
        name: cost(decoded, real, grainy=True, texture=0.05)
        for name, decoded in (
            ("real", real),
            ("other", other),
            ("none", GREY),
            ("dots", repeated(dot)),
            ("tiles", repeated(tile)),
            ("net", net),
        )
    }

    assert costs["real"] < costs["other"] < min(costs[name] for name in ("none", "dots", "tiles", "net")), costs


def test_everything_but_grain_must_be_in_its_place():
    real, other = noise(1), noise(2)
    edge = torch.cat((GREY[..., :32], GREY[..., 32:] + 0.5), -1)

    assert cost(other, real, grainy=True, texture=0.0) > cost(GREY, real, grainy=True, texture=0.0)
    assert cost(other, real, grainy=False, texture=0.05) > 2 * cost(other, real, grainy=True, texture=0.05)
    assert cost(edge.roll(2, -1), edge, grainy=False, texture=0.05) > cost(edge, edge, grainy=False, texture=0.05)


@pytest.mark.parametrize(("mean", "logvar"), [(0.0, 0.0), (2.0, 0.0), (0.0, 1.0), (-1.0, -2.0)])
def test_latents_cost_their_divergence_from_a_unit_gaussian(mean, logvar):
    recipe = Recipe(name="t", steps=1, lr=1e-3, muon_lr=1e-3, weight_decay=0.0, kl=0.5)
    found = loss(Decoded(GREY, mean, logvar), GREY, torch.zeros(4, dtype=torch.bool), recipe, torch.Generator())

    latents = Normal(mean, math.exp(logvar / 2))
    assert found.item() == pytest.approx(0.5 * kl_divergence(latents, Normal(0.0, 1.0)).item(), rel=1e-5)


def test_channel_scales_are_equalised_halfway():
    """For deviations 1 and 9, with mean 5, the remaining ratio is the root of the original one, neither that nor 1."""
    vae = Decoded(GREY)
    vae.config = VAEConfig()
    vae.moments = lambda images: (images[:, :2] * torch.tensor([1.0, 9.0])[:, None, None] + 3, None)
    pictures = np.zeros((40, 64, 64, 3), np.uint8)
    pictures[:, ::2] = 255

    config = measure_latents(vae, pictures)

    assert config.latents_mean == pytest.approx((3, 3), abs=1e-4)
    assert config.latents_std == pytest.approx((5**0.5, 45**0.5), rel=1e-4)
