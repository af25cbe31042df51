"""The 2-D autoencoders against diffusers' on random weights."""

import inspect
from dataclasses import asdict

import pytest
import torch

from model.checkpoint import save
from model.parts import load_vae
from model.tiling import OVERLAP, TILE
from model.train.autoencoder import MINI_CONFIG
from model.train.linear_init import init_linear
from model.vae import QwenImageVAE, VAEConfig

diffusers = pytest.importorskip("diffusers")

SHAPES = {
    8: VAEConfig(base_dim=8, dim_mult=(1, 2, 4, 4), num_res_blocks=1),
    16: VAEConfig(
        base_dim=8, dim_mult=(2, 1, 2, 4, 4), num_res_blocks=1, temporal_downsample=(False, False, True, True)
    ),
}


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.fixture(scope="module", params=SHAPES)
def pair(request):
    """Diffusers' autoencoder with random weights, temporal ones included, and ours loaded from it."""
    torch.manual_seed(0)
    theirs = diffusers.AutoencoderKLQwenImage.from_config(SHAPES[request.param].to_diffusers()).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    ours = QwenImageVAE(SHAPES[request.param]).eval()
    ours.load_diffusers(theirs.state_dict())
    return ours, theirs


def test_config_defaults_are_those_of_diffusers():
    theirs, ours = inspect.signature(diffusers.AutoencoderKLQwenImage.__init__).parameters, VAEConfig()
    for key in ("base_dim", "dim_mult", "num_res_blocks", "temperal_downsample", "latents_mean", "latents_std"):
        own = getattr(ours, key.replace("temperal", "temporal"))
        assert list(theirs[key].default) == list(own) if isinstance(own, tuple) else theirs[key].default == own


@torch.no_grad()
def test_qwen_parity(pair):
    """Encoding and decoding one frame agree, whatever the temporal weights are."""
    ours, theirs = pair
    images, latents = torch.rand(2, 3, 6 * ours.factor, 4 * ours.factor) * 2 - 1, torch.randn(2, 16, 6, 4)

    moments = theirs.encode(images.unsqueeze(2)).latent_dist
    assert relative(ours.moments(images)[0], moments.mean.squeeze(2)) < 1e-4
    assert relative(ours.encode(images), (moments.mean.squeeze(2) - ours.mean) / ours.std) < 1e-4

    decoded = theirs.decode((latents * ours.std + ours.mean).unsqueeze(2)).sample.squeeze(2)
    assert relative(ours.decode(latents), decoded) < 1e-4


@torch.no_grad()
def test_qwen_export_round_trip(pair):
    """An export loads strictly into diffusers, gives the same picture, and comes back unchanged."""
    ours, _ = pair
    exported = ours.to_diffusers()
    theirs = diffusers.AutoencoderKLQwenImage.from_config(ours.config.to_diffusers()).eval()
    theirs.load_state_dict(exported, strict=True)
    latents = torch.randn(1, 16, 4, 4)

    decoded = theirs.decode((latents * ours.std + ours.mean).unsqueeze(2)).sample.squeeze(2)
    assert relative(ours.decode(latents), decoded) < 1e-4

    back = QwenImageVAE(ours.config)
    back.load_diffusers(exported)
    assert all(torch.equal(value, back.state_dict()[name]) for name, value in ours.state_dict().items())


@torch.no_grad()
def test_qwen_tiles_agree_with_the_whole(pair):
    """Norms act on single pixels, so only the attention sees the tile instead of the picture: within 5 %."""
    ours, _ = pair
    torch.manual_seed(1)
    latents = torch.randn(1, 16, 32, 16)
    whole = ours.decode(latents)
    again = ours.encode(whole)
    ours.tile, ours.overlap = 24 * ours.factor, 12 * ours.factor
    try:
        assert relative(ours.decode(latents), whole) < 0.05
        assert relative(ours.encode(whole), again) < 0.05
    finally:
        ours.tile, ours.overlap = TILE, OVERLAP


def test_config_survives_json():
    """A file's metadata holds lists where the dataclass has tuples."""
    values = {"base_dim": 8, "dim_mult": [1, 4, 8, 12], "num_res_blocks": 1}
    assert VAEConfig.from_dict(values) == VAEConfig(base_dim=8, dim_mult=(1, 4, 8, 12), num_res_blocks=1)


def test_config_is_read_in_diffusers_spelling_too():
    assert VAEConfig.from_dict(SHAPES[16].to_diffusers()) == SHAPES[16]


def test_what_a_file_does_not_state_is_as_in_the_release(tmp_path):
    vae, file = QwenImageVAE(SHAPES[8]), tmp_path / "vae.safetensors"
    config = asdict(vae.config)
    del config["temporal_downsample"]
    save(file, vae.state_dict(), {"kind": "vae", "config": config})

    assert load_vae(file, torch.device("cpu"), torch.float32).config == vae.config


@torch.no_grad()
def test_linear_start_reconstructs():
    """Before any training, smooth pictures come back with an error far below their variance."""
    torch.manual_seed(0)
    images = torch.nn.functional.interpolate(torch.rand(8, 3, 6, 6) * 2 - 1, size=(48, 48), mode="bicubic")
    vae = QwenImageVAE(MINI_CONFIG)
    init_linear(vae, images)

    latents = vae.encode(images)
    assert (vae.decode(latents) - images).square().mean() < 0.1 * images.var()
    assert 0.5 < latents.std() < 2


def test_odd_sizes_are_refused():
    with pytest.raises(ValueError, match="multiples of 8"):
        QwenImageVAE(SHAPES[8]).encode(torch.zeros(1, 3, 20, 16))


def test_a_small_picture_is_the_same_alone_and_in_a_batch():
    """Below some size PyTorch has another kernel for a single picture; one thread does not split work by batch size."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        config = VAEConfig(8, (1, 2, 6, 12), 1, temporal_downsample=(False,) * 3)
        vae = QwenImageVAE(config).eval().requires_grad_(False).to(memory_format=torch.channels_last)
        for side in (2, 8, 12):
            latents = torch.randn(3, 16, side, side)
            assert torch.equal(vae.decode(latents)[:1], vae.decode(latents[:1]))
    finally:
        torch.set_num_threads(threads)
