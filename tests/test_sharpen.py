"""The decoder on drawn latents: the same when widened, with a critic that learns and that the decoder follows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import DIT
from torch import Tensor
from workshop import enlarge, make_data

from model.dit import Krea2
from model.errors import K2Error
from model.train import autoencoder, loop, sharpen
from model.train.autoencoder import ENCODER_PREFIXES
from model.train.data import DATA, Catalog
from model.train.rollout import sample
from model.train.sharpen import Critic, Pool, Recipe, SharpenStage, widen
from model.train.states import RUNS
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
    return widen(vae, (8, 8, 16, 24))


@torch.no_grad()
def test_widened_autoencoder_encodes_and_decodes_the_same(vae):
    wide, images, latents = twice(vae), torch.randn(2, 3, 64, 64), torch.randn(2, 4, 8, 8)

    assert wide.config.base_dim == 8 and wide.config.dim_mult == (1, 1, 2, 3)
    torch.testing.assert_close(wide.encode(images), vae.encode(images), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(wide.decode(latents), vae.decode(latents), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_widened_encoder_is_exact_in_bf16_and_decoder_twins_differ(vae):
    for tensor in vae.state_dict().values():
        tensor.copy_(tensor.bfloat16())

    for name, tensor in twice(vae).state_dict().items():
        if name.startswith(ENCODER_PREFIXES):
            assert torch.equal(tensor, tensor.bfloat16().float()), name
    first, second = twice(vae).decoder.conv_out.weight.chunk(2, dim=1)
    assert not torch.isclose(first, second).any()


def test_same_width_changes_nothing(vae):
    same = widen(vae, (4, 4, 8, 24))

    assert all(torch.equal(tensor, same.state_dict()[name]) for name, tensor in vae.state_dict().items())


@pytest.mark.parametrize(
    "widths",
    [(), (8, 8, 16), (2, 4, 8, 24), (8, 8, 8, 24), (6, 6, 12, 24), (12, 12, 24, 24), (16, 16, 32, 24), (8, 8, 16, 48)],
)
def test_incompatible_widths_are_refused(vae, widths):
    with pytest.raises(K2Error, match=r"Scales of \[4, 4, 8, 24\] channels cannot be widened"):
        widen(vae, widths)


@torch.no_grad()
def test_critic_does_not_see_large_forms():
    critic, picture = Critic(8), torch.randn(1, 3, 128, 128)
    ramp = torch.linspace(-1, 1, 128).expand(1, 3, 128, 128)

    def seen(picture: Tensor) -> Tensor:
        return critic(picture)[..., 6:10, 6:10]  # not the edges, where a ramp ends

    torch.testing.assert_close(seen(picture + 0.7 + ramp), seen(picture), rtol=1e-3, atol=1e-5)
    assert not torch.isclose(seen(0.5 * picture), seen(picture), rtol=1e-3).any()


def test_sample_starts_from_the_given_latents():
    """After none of the steps it is unchanged, after all it is what noise leads to."""
    dit, features = Krea2(DIT).eval(), torch.randn(2, 7, DIT.text_taps, DIT.text_width)
    dit.initialise()
    torch.nn.init.normal_(dit.last.linear.weight, std=0.1)
    begun = torch.randn(2, 4, 8, 8)

    def made(*given) -> Tensor:
        prompts = ["a fox", "an owl"]
        return sample(dit, lambda _: (features, torch.ones(2, 7, dtype=torch.bool)), prompts, 8, 4, 0.0, 1, 0.5, *given)

    assert torch.equal(made((begun, 0)), begun) and torch.equal(made((begun, 4)), made())
    far = [(made((begun, taken)) - begun).square().mean().item() for taken in range(5)]
    assert far == sorted(far)
    with pytest.raises(ValueError, match="of 4 steps 5 cannot"):
        made((begun, 5))


class Data:
    """A data set of which only the fingerprint is used."""


@pytest.fixture
def stage(vae, monkeypatch):
    """The stage on sixteen pictures of one disc each; the free latents of each are those of another picture."""
    monkeypatch.setattr(sharpen, "fingerprint", lambda catalog: "")

    def made(**settings) -> SharpenStage:
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
        return SharpenStage(recipe, Data(), Pool(pictures, np.zeros(16, bool), *latents), vae)

    return made


def gradients(stage: SharpenStage, step: int) -> dict[str, Tensor]:
    stage.loss(stage.batch(step))[0].backward()
    return {name: p.grad for name, p in stage.model.named_parameters() if p.grad is not None}


def test_critic_is_not_trained_by_the_decoders_loss(stage):
    """Whatever the weight of its opinion, it learns the same."""
    deaf, heeding = (gradients(stage(critic=weight), step=1000) for weight in (0.0, 10.0))

    moved = {name for name, each in deaf.items() if not torch.allclose(each, heeding[name], rtol=1e-3, atol=1e-6)}
    assert "vae.decoder.conv_out.weight" in moved and not any(name.startswith("critic.") for name in moved)


def test_untrained_critic_is_ignored(stage):
    deaf, first = (gradients(stage(critic=weight), step=0) for weight in (0.0, 10.0))

    assert all(torch.allclose(gradient, first[name], rtol=1e-4, atol=1e-6) for name, gradient in deaf.items())


def figures(stage: SharpenStage, batch) -> dict[str, float]:
    with torch.no_grad():
        return {name: float(value) for name, value in stage.loss(dict(batch, generator=torch.Generator()))[1].items()}


def descend(stage: SharpenStage, batch, which: str, rate: float, steps: int = 1) -> None:
    """Move the parameters of one part down the gradient of the loss."""
    params = [
        p for name, p in stage.model.named_parameters() if name.startswith(which) and ENCODER_PREFIXES[0] not in name
    ]
    for _ in range(steps):
        loss = stage.loss(dict(batch, generator=torch.Generator()))[0]
        for param, grad in zip(params, torch.autograd.grad(loss, params, allow_unused=True), strict=True):
            if grad is not None:
                param.data -= rate * grad / (grad.norm() + 1e-8)


def test_critic_learns_which_are_real(stage):
    made = stage(critic=0.0)
    batch = made.batch(0)

    def real() -> float:
        return made.model.critic(batch["images"][2:]).mean().item()

    apart = real() - figures(made, batch)["opinion"]
    descend(made, batch, "critic.", rate=0.02, steps=20)
    assert real() - figures(made, batch)["opinion"] > apart + 0.1


def test_decoder_follows_the_critic(stage):
    def rise(weight: float) -> float:
        made = stage(critic=weight)
        batch = made.batch(1000)
        before = figures(made, batch)["opinion"]
        descend(made, batch, "vae.decoder", rate=1e-3)
        return figures(made, batch)["opinion"] - before

    assert rise(1e4) > 2 * abs(rise(0.0))


def test_started_pictures_count_by_their_weight(stage):
    none, some = (gradients(stage(begun=weight, critic=0.0), step=0) for weight in (0.0, 1.0))

    assert not torch.allclose(*(each["vae.decoder.conv_out.weight"] for each in (none, some)), rtol=0.01)


def test_large_forms_of_free_pictures_are_held(stage):
    made = stage(hold=1e4)
    batch = made.batch(0)
    assert figures(made, batch)["moved"] < 1e-4
    with torch.no_grad():
        made.model.vae.decoder.conv_out.bias += 0.3
    before = figures(made, batch)["moved"]

    descend(made, batch, "vae.decoder", rate=0.05)
    assert figures(made, batch)["moved"] < 0.9 * before


def test_wanted_latents_count_only_in_the_distance(stage):
    made = stage()
    batch = made.batch(0)
    other = dict(batch, latents=batch["latents"].clone())
    other["latents"][:2] += 1

    first, second = figures(made, batch), figures(made, other)
    assert {name for name in first if first[name] != second[name]} == {"off"}


def test_pictures_and_latents_are_cropped_alike(stage):
    """With cells of 8 px, a picture's crop encodes to about the crop of its latents."""
    made = stage(crop=32)
    y, x = np.mgrid[:64, :64]
    made.pool.pictures[:] = np.stack([x, y, y], -1)
    for kind in sharpen.KINDS:
        getattr(made.pool, kind)[..., :2, :, :] = np.stack([x, y])[:, ::8, ::8]
    batch = made.batch(3)

    corners = (batch["images"][:, :2, 0, 0] + 1) * 127.5
    torch.testing.assert_close(corners, batch["latents"][:, :2, 0, 0])
    assert len(corners.unique(dim=0)) > 2


@pytest.mark.parametrize(("share", "least", "most"), [(0.0, 0, 40), (0.5, 130, 230), (1.0, 300, 300)])
def test_share_of_grainy_pictures_follows_the_recipe(stage, share, least, most):
    """In all three kinds, however few of the pictures are grainy."""
    made = stage(grainy=share, batch=100)
    made.pool = made.pool._replace(grainy=np.arange(16) == 3)
    grainy = made.batch(0)["grainy"]
    assert least <= grainy.sum() <= most
    assert all(share == 0 or part.any() for part in grainy.chunk(3))


def test_latents_are_drawn_in_parts_and_kept(tmp_path, monkeypatch):
    """Each part from its own pictures, all in order."""
    make_data(tmp_path / "data")
    enlarge(tmp_path / "data")
    catalog, recipe, drawn = Catalog(tmp_path / "data", 256), Recipe(**(COMMON | {"pictures": 5})), []

    def draw(drawer, catalog, items, pictures, recipe, first):
        assert all((catalog.picture(item) == picture).all() for item, picture in zip(items, pictures, strict=True))
        drawn.append((first, len(items)))
        return {kind: np.arange(first, first + len(items))[:, None].astype(np.float16) for kind in sharpen.KINDS}

    monkeypatch.setattr(sharpen, "draw_latents", draw)
    monkeypatch.setattr(sharpen, "FILE_PICTURES", 2)
    first = sharpen.load_pool(catalog, recipe, tmp_path, None, lambda line: None)
    assert drawn == [(0, 2), (2, 2), (4, 1)] and first.free[:, 0].tolist() == [0, 1, 2, 3, 4]

    next(tmp_path.rglob("000002.npz")).unlink()
    again = sharpen.load_pool(catalog, recipe, tmp_path, None, lambda line: None)
    assert drawn[3:] == [(2, 2)] and (again.asked == first.asked).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"taken": (2, 9)}, "taken must be at most 8"),
        ({"crop": 100}, "crop and size must be multiples of 16"),
        ({"widths": (16, 16)}, "channels cannot be widened"),
    ],
)
def test_untrainable_recipe_is_refused_before_drawing(tmp_path, monkeypatch, settings, message):
    monkeypatch.chdir(tmp_path)
    make_data(tmp_path / DATA)
    enlarge(tmp_path / DATA)

    with pytest.raises(K2Error, match=message):
        sharpen.main(Recipe(**(COMMON | {"widths": box_widths()} | settings)))
    assert not (tmp_path / RUNS).exists()


def box_widths() -> tuple[int, ...]:
    config = autoencoder.load(sharpen.AUTOENCODER).config
    return tuple(config.base_dim * times for times in config.dim_mult)


def test_training_improves_started_pictures_not_the_encoder(stage, tmp_path):
    made = stage(steps=60, critic=0.0, batch=4, every=1000, warmup_steps=5, average=0.9)
    before = {name: value.clone() for name, value in made.model.state_dict().items()}

    def off() -> float:
        with torch.no_grad():
            return sum(float(made.loss(made.batch(10**6 + part))[1]["begun"]) for part in range(4))

    first = off()
    loop.train(loop.Run(made, tmp_path), lambda line: None)

    assert off() < 0.8 * first
    for name, value in made.model.vae.state_dict().items():
        if name.startswith(ENCODER_PREFIXES):
            assert torch.equal(value, before[f"vae.{name}"]), name
