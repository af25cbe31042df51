"""The schedule against its formula and an independent implementation, and Euler on flows whose end is known."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from model.sampler import adams_bashforth, apply_guidance, apply_style_guidance, euler, shifted_sigmas
from model.spec import raw_mu


@pytest.mark.parametrize("mu", [0.5, 1.15])
def test_straight_flow_lands_on_the_image(mu):
    """Noise minus image is constant along the path, so Euler is exact for any schedule."""
    noise, image = torch.randn(2, 1, 4, 8)

    result = euler(lambda tokens, step: noise - image, noise, shifted_sigmas(8, mu))

    torch.testing.assert_close(result, image)


@pytest.mark.parametrize("steps", [1, 8, 52])
@pytest.mark.parametrize("mu", [-1.0, 0.0, 0.5, 1.15])
def test_sigmas_fall_from_1_to_0_as_published(steps, mu):
    """From 1 to 0, falling, and shifted as published: e^mu / (e^mu + 1/t − 1)."""
    sigmas = shifted_sigmas(steps, mu)

    assert len(sigmas) == steps + 1 and sigmas[0] == 1 and sigmas[-1] == 0
    assert all(a > b for a, b in pairwise(sigmas))
    for i, sigma in enumerate(sigmas[:-1]):
        t = 1 - i / steps
        assert sigma == pytest.approx(math.exp(mu) / (math.exp(mu) + 1 / t - 1))


def test_no_shift_is_an_even_grid():
    assert shifted_sigmas(4, 0.0) == pytest.approx([1, 0.75, 0.5, 0.25, 0])


def test_sigmas_are_those_of_diffusers_scheduler():
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15)
    scheduler.set_timesteps(sigmas=[1 - i / 8 for i in range(8)], mu=0.7)
    assert shifted_sigmas(8, 0.7) == pytest.approx(scheduler.sigmas.tolist(), abs=1e-6)


def test_raw_mu_extends_beyond_its_two_points():
    assert raw_mu(256) == 0.5 and raw_mu(6400) == pytest.approx(1.15)
    assert raw_mu(64) < 0.5 and raw_mu(16384) > 1.15


def test_guidance_zero_is_off_and_one_doubles_the_difference():
    conditional, unconditional = torch.randn(2, 3)
    assert torch.equal(apply_guidance(conditional, unconditional, 0.0), conditional)
    torch.testing.assert_close(apply_guidance(conditional, unconditional, 1.0), 2 * conditional - unconditional)


def test_style_guidance_zero_adds_the_style_once_and_one_twice():
    """On top of whatever the prompt's own guidance has made of the velocity."""
    styled, conditional, led = torch.randn(3, 4)
    torch.testing.assert_close(apply_style_guidance(styled, conditional, conditional, 0.0), styled)
    torch.testing.assert_close(apply_style_guidance(styled, conditional, led, 1.0), led + 2 * (styled - conditional))


def test_adams_bashforth_is_second_order():
    """On the flow from noise to a Gaussian of deviation s, whose end is known: x(0) = s x(1) for any point.

    v = E[noise − image | x] = x (σ − (1 − σ) s²) / ((1 − σ)² s² + σ²). Half the step leaves a quarter of the error,
    and half of Euler's.
    """
    s, start = 0.3, torch.linspace(-2, 2, 9, dtype=torch.float64)

    def off(sampler, steps: int) -> float:
        sigmas = shifted_sigmas(steps, 0.5)

        def velocity(x: torch.Tensor, step: int) -> torch.Tensor:
            sigma = sigmas[step]
            return x * (sigma - (1 - sigma) * s**2) / ((1 - sigma) ** 2 * s**2 + sigma**2)

        return (sampler(velocity, start, sigmas) - s * start).norm().item()

    for sampler, order in ((euler, 1), (adams_bashforth, 2)):
        ratios = [off(sampler, steps) / off(sampler, 2 * steps) for steps in (64, 128)]
        assert ratios == pytest.approx([2**order] * 2, rel=0.1)
    assert off(adams_bashforth, 28) < off(euler, 84)


def test_adams_bashforth_restarts_where_the_field_changes():
    """As in two runs: the slope of the first means nothing to the second."""
    sigmas, start = shifted_sigmas(8, 0.5), torch.randn(3)

    def velocity(x: torch.Tensor, step: int) -> torch.Tensor:
        return x * sigmas[step] if step < 4 else 1 - x

    first = adams_bashforth(velocity, start, sigmas[:5])
    rest = adams_bashforth(lambda x, step: velocity(x, step + 4), first, sigmas[4:])
    torch.testing.assert_close(adams_bashforth(velocity, start, sigmas, restart_steps={4}), rest)
    assert not torch.allclose(adams_bashforth(velocity, start, sigmas), rest)


@pytest.mark.parametrize("sampler", [euler, adams_bashforth])
def test_steps_are_counted_and_reported(sampler):
    asked, done = [], []
    sampler(lambda tokens, step: (asked.append(step), tokens)[1], torch.ones(1), shifted_sigmas(3, 0.0), done.append)
    assert asked == [0, 1, 2] and done == [1, 2, 3]


@pytest.mark.parametrize("sampler", [euler, adams_bashforth])
def test_starting_later_takes_the_remaining_steps(sampler):
    """Steps keep their numbers, by which the field knows its noise level; only the steps taken are counted."""
    sigmas, start, asked, done = shifted_sigmas(7, 0.5), torch.randn(5), [], []

    def velocity(x: torch.Tensor, step: int) -> torch.Tensor:
        asked.append(step)
        return x * sigmas[step] + 1

    late = sampler(velocity, start, sigmas, done.append, first=4)
    assert asked == [4, 5, 6] and done == [1, 2, 3]
    torch.testing.assert_close(late, sampler(lambda x, step: velocity(x, step + 4), start, sigmas[4:]))


def test_zero_steps_are_refused():
    with pytest.raises(ValueError):
        shifted_sigmas(0, 0.5)
