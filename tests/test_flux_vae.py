"""The FLUX.2 autoencoder compared with diffusers' on random weights, and tiles compared with the whole picture."""

from dataclasses import replace
from fractions import Fraction
from itertools import pairwise

import pytest
import torch

from model.flux_vae import FluxVAE, FluxVAEConfig
from model.tiling import OVERLAP, TILE, apply_tiled, blend_ramp, tile_starts

diffusers = pytest.importorskip("diffusers")

TINY = FluxVAEConfig(block_out_channels=(8, 16, 16, 16), layers_per_block=1, norm_num_groups=4)
SHAPES = {"alike": TINY, "slim decoder": replace(TINY, decoder_block_out_channels=(4, 8, 8, 16))}


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.fixture(scope="module", params=SHAPES)
def pair(request):
    """Diffusers' autoencoder with random weights and statistics, and ours loaded from it."""
    torch.manual_seed(0)
    config = SHAPES[request.param]
    theirs = diffusers.AutoencoderKLFlux2(
        block_out_channels=config.block_out_channels,
        decoder_block_out_channels=config.decoder_block_out_channels,
        layers_per_block=1,
        norm_num_groups=4,
    ).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        theirs.bn.running_mean.normal_()
        theirs.bn.running_var.uniform_(0.5, 2)
    ours = FluxVAE(FluxVAEConfig.from_dict(dict(theirs.config))).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def test_config_from_diffusers(pair, request):
    assert pair[0].config == SHAPES[request.node.callspec.params["pair"]]


@torch.no_grad()
def test_parity_with_diffusers(pair):
    """Pictures agree, and so do latents, packed and normalised as in diffusers' pipeline."""
    from diffusers.pipelines.flux2.pipeline_flux2 import Flux2Pipeline

    ours, theirs = pair
    images = torch.rand(2, 3, 64, 32) * 2 - 1
    std = (theirs.bn.running_var + TINY.batch_norm_eps).sqrt().view(1, -1, 1, 1)
    mean = theirs.bn.running_mean.view(1, -1, 1, 1)

    packed = (Flux2Pipeline._patchify_latents(theirs.encode(images).latent_dist.mean) - mean) / std
    assert relative(torch.nn.functional.pixel_unshuffle(ours.encode(images), 2), packed) < 1e-4

    latents = torch.randn(2, 128, 4, 2)
    decoded = theirs.decode(Flux2Pipeline._unpatchify_latents(latents * std + mean)).sample.clamp(-1, 1)
    assert relative(ours.decode(torch.nn.functional.pixel_shuffle(latents, 2)), decoded) < 1e-4


@torch.no_grad()
def test_odd_sizes_are_refused(pair):
    with pytest.raises(ValueError, match="multiples of 16"):
        pair[0].encode(torch.zeros(1, 3, 24, 16))


@pytest.mark.parametrize(("length", "tile", "overlap"), [(64, 64, 16), (65, 64, 16), (200, 64, 16), (129, 32, 31)])
def test_tiles_cover_the_length(length, tile, overlap):
    """Tiles reach both borders, neighbours overlap by at least as much as asked, and one tile fewer would not do."""
    begin = tile_starts(length, tile, overlap, unit=1)
    assert begin[0] == 0 and begin[-1] == max(0, length - tile)
    assert all(after - before <= tile - overlap for before, after in pairwise(begin))
    assert len(begin) == 1 or tile + (len(begin) - 2) * (tile - overlap) < length


def test_only_one_tile_is_processed_at_a_time():
    seen = set()

    def look(part: torch.Tensor) -> torch.Tensor:
        seen.add(tuple(part.shape))
        return part

    for shape in ((40, 72), (10, 72), (16, 16)):
        x = torch.randn(1, 1, *shape)
        torch.testing.assert_close(apply_tiled(look, x, 16, 4, Fraction(1)), x)
    assert seen == {(1, 1, 16, 16), (1, 1, 10, 16)}


def test_blending_is_exact_where_tiles_agree():
    """Maps that work cell by cell give the same result in tiles; weights fade only towards neighbours."""
    x = torch.randn(2, 3, 40, 72)
    up = torch.nn.Upsample(scale_factor=8)
    torch.testing.assert_close(apply_tiled(up, x, 16, 4, Fraction(8)), up(x))
    down = torch.nn.AvgPool2d(8)
    torch.testing.assert_close(apply_tiled(down, x, 16, 8, Fraction(1, 8), unit=8), down(x))
    assert blend_ramp(8, 4, first=True, last=False).tolist() == [1, 1, 1, 1, 1, 0.75, 0.25, 0]


@torch.no_grad()
def test_tiles_are_close_to_the_whole_without_a_seam(pair):
    """Group norms and attention see the tile instead of the picture.

    Bounds: 10 % of the whole's norm, and the step across a tile's border no more than 1.5 times the whole's own.
    """
    ours, _ = pair
    torch.manual_seed(1)
    latents = torch.randn(1, 32, 48, 32)  # uniform, so that a tile's statistics resemble the whole's
    whole = ours.decode(latents)
    ours.tile, ours.overlap = 192, 64
    try:
        parts = ours.decode(latents)
        tiled_latents = ours.encode(whole)
    finally:
        ours.tile, ours.overlap = TILE, OVERLAP
    assert relative(parts, whole) < 0.1
    assert relative(tiled_latents, ours.encode(whole)) < 0.1
    step, own = parts.diff(dim=-2).abs().mean((0, 1, 3)), whole.diff(dim=-2).abs().mean((0, 1, 3))
    assert step[127:320].amax() <= 1.5 * own.amax()


def test_refuses_configs_without_four_scales():
    for scales in ({"block_out_channels": [32] * 3}, {"decoder_block_out_channels": [32] * 5}):
        with pytest.raises(ValueError, match="4 scales"):
            FluxVAEConfig.from_dict(scales)


@pytest.mark.parametrize(
    ("tile", "overlap", "unit", "scale"),
    [(4, 4, 1, "1"), (4, 0, 1, "1"), (5, 2, 2, "1"), (4, 1, 2, "1"), (4, 2, 1, "1/2")],
)
def test_impossible_tiles_are_refused(tile, overlap, unit, scale):
    """Those without a step or an overlap, and those that would cut cells of the picture in two."""
    with pytest.raises(ValueError, match="overlap"):
        apply_tiled(torch.nn.Identity(), torch.zeros(1, 1, 9, 9), tile, overlap, Fraction(scale), unit)
