"""Latents to tokens and back, positions, and the noise of a seed."""

from __future__ import annotations

import pytest
import torch

from model.latents import OUTER_SPACING, centre_on_square, draw_noise, patchify, position_ids, unpatchify


@pytest.mark.parametrize("shape", [(2, 16, 8, 8), (1, 4, 6, 10), (3, 3, 2, 4)])
@pytest.mark.parametrize("patch", [1, 2])
def test_patchify_round_trip(shape, patch):
    latents = torch.randn(shape)
    tokens = patchify(latents, patch)

    assert tokens.shape == (shape[0], shape[2] * shape[3] // patch**2, shape[1] * patch**2)
    assert torch.equal(unpatchify(tokens, patch, *shape[2:]), latents)


def test_order_inside_and_between_tokens():
    """Channel, patch row and patch column within a token; tokens row by row."""
    latents = torch.arange(2 * 4 * 6).view(1, 2, 4, 6)
    tokens = patchify(latents, 2)

    assert tokens[0, 0].tolist() == [0, 1, 6, 7, 24, 25, 30, 31]
    assert tokens[0, 1, :2].tolist() == [2, 3]
    assert tokens[0, 3, :2].tolist() == [12, 13]


def test_positions():
    ids = position_ids(2, 2, 3)
    assert ids.tolist() == [[0, 0, 0]] * 2 + [[0, row, column] for row in range(2) for column in range(3)]


def test_noise_depends_only_on_the_seed():
    torch.manual_seed(1)
    first = draw_noise(7, 16, 4, 6)
    state = torch.get_rng_state()

    assert first.shape == (1, 16, 4, 6) and first.dtype == torch.float32
    assert torch.equal(draw_noise(7, 16, 4, 6), first)
    assert not torch.equal(draw_noise(8, 16, 4, 6), first)
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is untouched
    assert torch.equal(first, torch.randn(1, 16, 4, 6, generator=torch.Generator().manual_seed(7)))


def test_grid_is_centred_on_the_square():
    """The scale lies between that of equal areas and that of an inner square; outside the square, rows lie closer."""
    places = position_ids(0, 16, 4)[:, 1:].double()

    there = centre_on_square(places, (16, 4), 8).view(16, 4, 2)
    rows, columns = there[:, 0, 0], there[0, :, 1]

    scale = (1 * 2) ** 0.5  # 8 / √(16 · 4), and 8 / 4
    torch.testing.assert_close(columns.diff(), torch.full((3,), scale).double())
    torch.testing.assert_close(rows[6:10].diff(), torch.full((3,), scale).double())
    torch.testing.assert_close(rows[:3].diff(), torch.full((2,), OUTER_SPACING * scale).double())
    torch.testing.assert_close(there.mean((0, 1)), torch.tensor([3.5, 3.5]).double())
    assert torch.equal(
        centre_on_square(position_ids(0, 8, 8)[:, 1:].double(), (8, 8), 8), position_ids(0, 8, 8)[:, 1:].double()
    )
