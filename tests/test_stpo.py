"""STPO on points in the plane: it learns the preference without losing the winner, as plain DPO does."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from model.latents import patchify
from model.train import stpo
from model.train.looks import Look
from model.train.pretrain import TrainedModel
from model.train.rollout import RolloutPrompt
from model.train.stpo import (
    PICTURES_PER_PROMPT,
    PairTerms,
    Recipe,
    STPOStage,
    best_and_worst,
    make_pairs,
    preference_loss,
    safe_scale,
    squared_error,
)

BRIGHT = SimpleNamespace(
    vae=None, total=lambda pictures, asked, weights: pictures.mean((1, 2, 3))
)  # brightness is the reward
PROMPTS = [RolloutPrompt(str(number), "fox", Look("noto", "plain")) for number in range(20)]


def recipe(**more):
    plain = {"name": "x", "size": 64, "steps": 4, "batch": 2, "lr": 1e-3, "muon_lr": 1e-3, "mu": 0.0, "every": 2}
    network = {"width": 32, "heads": 2, "kv_heads": 1, "blocks": 1}
    return Recipe(**plain | {"weights": {"subject": 1.0}, "network": network} | more)


@pytest.fixture(scope="module")
def preference(tmp_path_factory):
    """The stage, calibrating β after one step."""
    folder, chosen = tmp_path_factory.mktemp("data"), recipe(beta=1.0, calibrate_at=1)
    (folder / "manifest.toml").touch()
    data = SimpleNamespace(catalog=SimpleNamespace(folder=folder), looks=[0], embed=None, cells=8)
    return STPOStage(chosen, data, TrainedModel(chosen.config, 1).state_dict(), "cpu")


class Plane(nn.Module):
    """A velocity field over the plane: (x [B, 2], t [B]) -> [B, 2]."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 48), nn.Tanh(), nn.Linear(48, 48), nn.Tanh(), nn.Linear(48, 2))

    def forward(self, x, t):
        return self.net(torch.cat((x, t[:, None]), 1))


def pairs(generator, count=128):
    """Winners around one point, losers near them: so close that pushing a loser away drags its winner along."""
    winner = torch.tensor([1.0, 0.0]) + 0.3 * torch.randn(count, 2, generator=generator)
    return winner, winner + torch.tensor([0.25, 0.35]) + 0.1 * torch.randn(count, 2, generator=generator)


def velocities(model, images, noise, t):
    return PairTerms(*(model(torch.lerp(image, noise, t[:, None]), t) for image in images))


@pytest.fixture(scope="module")
def pretrained():
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = Plane()
    optimiser = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(300):
        images = torch.cat(pairs(generator))
        noise, t = torch.randn(images.shape, generator=generator), torch.rand(len(images), generator=generator)
        loss = squared_error(model(torch.lerp(images, noise, t[:, None]), t), noise - images).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model.state_dict()


def tuned(state, kind):
    """Mean rise of the winner's and the loser's loss over the reference's, on new pairs, after 300 steps."""
    model, reference = Plane(), Plane()
    for each in (model, reference):
        each.load_state_dict(state)
    generator = torch.Generator().manual_seed(1)
    optimiser = torch.optim.Adam(model.parameters(), 1e-3)

    def compare(count):
        images = pairs(generator, count)
        noise, t = torch.randn(count, 2, generator=generator), torch.rand(count, generator=generator)
        made = velocities(model, images, noise, t)
        with torch.no_grad():
            before = velocities(reference, images, noise, t)
        target = PairTerms(*(noise - image for image in images))
        return preference_loss(made, target, before, 10.0, kind)

    for _ in range(300):
        loss, _ = compare(128)
        optimiser.zero_grad()
        loss.mean().backward()
        optimiser.step()
    figures = compare(4000)[1]
    return {name: float(value.mean()) for name, value in figures.items()}


def test_winners_loss_rises_with_plain_dpo_but_not_with_stpo(pretrained):
    found = {kind: tuned(pretrained, kind) for kind in ("dpo", "dpo+sft", "stpo")}

    assert found["dpo"]["winner"] > 0.05
    assert found["stpo"]["winner"] < 0.01 < found["dpo"]["winner"] / 5
    assert found["stpo"]["winner"] < found["dpo+sft"]["winner"]
    for figures in found.values():  # and each learns the preference
        assert figures["winner"] < figures["loser"] and figures["right"] > 0.55


def test_equal_models_have_even_preference_and_dpos_gradient():
    """If model and reference agree, Δ = 0: the loss is log 2, its slope β/4 of each picture's error."""
    target = PairTerms(torch.zeros(1, 2), torch.zeros(1, 2))
    made = PairTerms(*(torch.tensor([[a, b]], requires_grad=True) for a, b in ((1.0, 0.0), (0.0, 1.0))))
    before = PairTerms(*(each.detach() for each in made))

    loss, _ = preference_loss(made, target, before, 8.0, "dpo")
    loss.sum().backward()

    assert loss.item() == pytest.approx(torch.log(torch.tensor(2.0)).item())
    torch.testing.assert_close(made.winner.grad, 8 / 4 * made.winner.detach())
    torch.testing.assert_close(made.loser.grad, -8 / 4 * made.loser.detach())


@pytest.mark.parametrize(
    ("kind", "hinged", "anchored"),
    [("dpo", 0, 0), ("dpo+sft", 0, 1), ("stpo", 1, 1)],
)
def test_hinge_and_anchor_are_scaled_by_half_of_beta(kind, hinged, anchored):
    """ℓ_w is 4 and 1, the reference's 1 and 4: only the first has risen."""
    target = PairTerms(torch.zeros(2, 1), torch.zeros(2, 1))
    made, before = (PairTerms(torch.tensor(w), torch.ones(2, 1)) for w in ([[2.0], [1.0]], [[1.0], [2.0]]))

    def loss(hinge=0.0, anchor=0.0):
        return preference_loss(made, target, before, 8.0, kind, hinge=hinge, anchor=anchor)[0]

    torch.testing.assert_close(loss(hinge=0.5) - loss(), hinged * 8 / 2 * 0.5 * torch.tensor([3.0, 0.0]))
    torch.testing.assert_close(loss(anchor=0.05) - loss(), anchored * 8 / 2 * 0.05 * torch.tensor([4.0, 1.0]))


def test_safe_scale_never_lets_the_winners_loss_rise():
    """To first order, a step along −(g_w − λ g_l) changes ℓ_w by −⟨g_w, g_w − λ g_l⟩: never up."""
    generator = torch.Generator().manual_seed(0)
    made = PairTerms(*(torch.randn(1000, 3, generator=generator) for _ in range(2)))
    made = PairTerms(made.winner, made.loser * 3)
    target = PairTerms(torch.zeros(1000, 3), torch.zeros(1000, 3))
    scale = safe_scale(made, target, 0.1)

    def change(by):
        return -(made.winner * (made.winner - by[:, None] * made.loser)).sum(1)

    assert (change(torch.ones(1000)) > 0).any(), "without the scale some would rise"
    assert (change(scale) <= -0.0999 * made.winner.square().sum(1)).all()
    assert ((scale >= 0) & (scale <= 1)).all()
    opposed = (made.winner * made.loser).sum(1) <= 0
    assert (scale[opposed] == 1).all() and (scale[~opposed] < 1).any()


def test_pairs_are_the_best_and_worst_of_groups_that_differ():
    best, worst, enough = best_and_worst(torch.tensor([[0.2, 0.9, 0.1], [0.5, 0.52, 0.5]]), 0.1)

    assert best.tolist() == [1, 1] and worst.tolist() == [2, 0]
    assert enough.tolist() == [True, False]


def test_pairs_share_a_prompt_and_the_winner_has_the_higher_reward(monkeypatch):
    """The latents' first channel is the number of their prompt; for some prompts the pictures hardly differ."""

    def sample(dit, embed, captions, *_):
        numbers = torch.tensor([float(caption) for caption in captions])
        spread = torch.tensor([-0.4, 0.4, 0.1, 0.0]).repeat(len(captions) // 4) * (numbers % 3 > 0)
        return torch.stack((numbers, spread), 1)[..., None, None]

    monkeypatch.setattr(stpo, "draw_prompts", lambda *_: PROMPTS)
    monkeypatch.setattr(stpo, "sample", sample)
    monkeypatch.setattr(stpo, "decode", lambda vae, latents: latents)
    data, model = SimpleNamespace(embed=None, cells=1), SimpleNamespace(dit=None)

    pairs = make_pairs(model, data, BRIGHT, recipe(aside=0), lambda line: None)

    assert pairs.captions == [each.caption for each in PROMPTS if int(each.caption) % 3]
    for latents, brightness in zip(pairs.latents, (0.4, -0.4), strict=True):
        assert latents[:, 0, 0, 0].tolist() == [float(caption) for caption in pairs.captions]
        assert latents[:, 1, 0, 0].tolist() == pytest.approx([brightness] * len(pairs), abs=1e-3)


def test_pair_shares_its_noise_but_has_separate_targets(preference, monkeypatch):
    """A model that knows both pictures has no error; the reference is off by one."""
    images = torch.randn(2, 3, 16, 4, 4)
    tokens = torch.cat([patchify(each, preference.model.dit.config.patch) for each in images])

    def knowing(dit, *_):
        off = float(dit is preference.reference.dit)
        return lambda x, sigma: (x - tokens) / sigma[:, None, None] + off

    monkeypatch.setattr(stpo, "conditioned_velocity", knowing)
    texts = {"embeds": torch.zeros(3, 5, 2, 32), "mask": torch.ones(3, 5, dtype=torch.bool)}
    _, figures = preference.compare({"winner": images[0], "loser": images[1], "seed": 0, **texts})

    for name in ("winner", "loser"):
        torch.testing.assert_close(figures[name], torch.full((3,), -1.0), atol=1e-3, rtol=0)


def test_beta_is_calibrated_to_the_spread_of_pairs(preference, monkeypatch):
    """βΔ/2 gets a standard deviation of 1, within a factor of ten of the recipe's β."""
    for spread, expected in ((0.5, 2 / 0.5), (100.0, 1.0 / 10)):
        figures = {"winner": spread * torch.tensor([2.0, 0.0, 3.0]), "loser": spread * torch.tensor([1.0, 0.0, 4.0])}
        monkeypatch.setattr(preference, "held_out_figures", lambda figures=figures: figures)
        preference.after(1)
        assert preference.model.beta.item() == pytest.approx(expected)


def test_win_rate_counts_pictures_with_higher_rewards(preference, monkeypatch):
    learned = torch.tensor([0.1, 0.1, 0.1, -0.1]).view(PICTURES_PER_PROMPT, 1, 1, 1).expand(-1, 3, 8, 8)
    monkeypatch.setattr(stpo, "sample", lambda dit, *_: learned * (dit is preference.model.dit))
    monkeypatch.setattr(stpo, "decode", lambda vae, latents: latents)

    found = preference.evaluate(BRIGHT, PROMPTS[:1])

    assert found["reward_win_rate"] == 0.75
    assert found["reward_before"] == 0 and found["reward_after"] == pytest.approx(0.05)
