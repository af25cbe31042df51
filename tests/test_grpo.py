"""GRPO: its sampler, ratios and reward arithmetic, and a flow whose mean is known and must move."""

import math
from types import SimpleNamespace

import pytest
import torch

from model.errors import K2Error
from model.sampler import euler, shifted_sigmas
from model.train import grpo
from model.train.grpo import (
    GRPOStage,
    Recipe,
    advantages,
    informative_prompts,
    log_prob,
    policy_loss,
    rollout,
    sde_step,
)
from model.train.looks import Look
from model.train.rewards import Rewards
from model.train.rollout import RolloutPrompt

PLAIN = {"name": "x", "size": 64, "steps": 2, "batch": 1, "lr": 1e-3, "muon_lr": 1e-3, "mu": 0.0, "every": 2}
PROMPTS = [RolloutPrompt(str(number), "fox", Look("noto", "plain")) for number in range(10)]
SIGMAS = shifted_sigmas(8, 0.5)


class Gaussian(torch.nn.Module):
    """The exact velocity of the flow from noise to N(mean, 0.3²) in the plane; only the mean is learned."""

    def __init__(self, mean=(0.0, 0.0)):
        super().__init__()
        self.mean = torch.nn.Parameter(torch.tensor(mean))

    def forward(self, x, t):
        t = t.view(-1, 1, 1)
        variance = (1 - t) ** 2 * 0.09 + t**2
        away = x - (1 - t) * self.mean
        return t / variance * away - (self.mean + (1 - t) * 0.09 / variance * away)


def noise(count, seed=0):
    return torch.randn(count, 1, 2, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("keys", "message"),
    [({"group": 1}, "group must be at least 2"), ({"gates": {"stlye": "subject"}}, '"stlye" is gated')],
)
def test_recipes_that_would_learn_nothing_are_refused(keys, message):
    with pytest.raises(K2Error, match=message):
        Recipe(**{**PLAIN, "weights": {"subject": 1.0, "style": 1.0}, **keys})


def test_rollout_without_noise_is_euler_bit_for_bit():
    field, levels = Gaussian((0.7, -0.2)), torch.tensor(SIGMAS)
    start = noise(64)
    by_euler = euler(lambda tokens, step: field(tokens, levels[step].expand(64)), start, SIGMAS)

    still, made = rollout(field, start, SIGMAS, {1, 4}, 0.0, torch.Generator().manual_seed(1))
    noisy, _ = rollout(field, start, SIGMAS, {1, 4}, 0.7, torch.Generator().manual_seed(1))

    assert torch.equal(still, by_euler) and made == []
    assert not torch.equal(noisy, by_euler)


def test_stochastic_steps_keep_the_distribution():
    """The stochastic equation has the flow's marginals: after many steps, mean and deviation are those of the data."""
    field, start, sigmas = Gaussian((1.0, -1.0)), noise(20_000), shifted_sigmas(80, 0.0)
    end, made = rollout(field, start, sigmas, range(1, 79), 0.7, torch.Generator().manual_seed(1))

    assert len(made) == 78
    torch.testing.assert_close(end.mean((0, 1)), torch.tensor([1.0, -1.0]), atol=0.02, rtol=0)
    assert end.std(0).mean().item() == pytest.approx(0.3, abs=0.03)


def test_sde_step_is_the_papers():
    x, v = torch.tensor([[[0.4]]]), torch.tensor([[[-0.3]]])
    mean, std = sde_step(x, v, 0.6, 0.5, 0.7)

    s = 0.7 * math.sqrt(0.6 / 0.4)
    assert std == pytest.approx(s * math.sqrt(0.1))
    assert mean.item() == pytest.approx(0.4 - 0.1 * (-0.3 + s**2 / 1.2 * (0.4 + 0.4 * -0.3)))


def test_the_first_step_is_finite():
    mean, std = sde_step(noise(4), noise(4, 1), 1.0, SIGMAS[1], 0.7, SIGMAS[1])
    assert mean.isfinite().all() and 0 < std < 2


def test_log_probabilities_are_gaussian_and_averaged():
    after, mean = noise(5), noise(5, 1)
    expected = torch.distributions.Normal(mean, 0.4).log_prob(after).mean((1, 2))
    torch.testing.assert_close(log_prob(after, mean, 0.4), expected)


def test_the_ratio_is_exactly_one_on_policy():
    field = Gaussian((0.3, 0.1))
    _, made = rollout(field, noise(16), SIGMAS, {2, 5}, 0.7, torch.Generator().manual_seed(1))
    loss, figures = policy_loss(field, made, torch.ones(16), 0.7, SIGMAS[1], 1e-4)

    assert figures["ratio"].item() == 0 and loss.item() == -1
    with torch.no_grad():
        field.mean += 0.05
    assert policy_loss(field, made, torch.ones(16), 0.7, SIGMAS[1], 1e-4)[1]["ratio"].item() > 0


def test_ratios_beyond_trust_have_no_gradient():
    """Once a ratio has moved in its advantage's direction, further than trusted, its gradient is zero."""
    field = Gaussian((0.3, 0.1))
    _, made = rollout(field, noise(16), SIGMAS, {2}, 0.7, torch.Generator().manual_seed(1))
    with torch.no_grad():
        field.mean += 0.5
    mean, std = sde_step(made[0].before, field(made[0].before, torch.full((16,), made[0].sigma)), *made[0][:2], 0.7)
    moved = log_prob(made[0].after, mean, std) - made[0].log_prob

    policy_loss(field, made, moved.detach().sign(), 0.7, SIGMAS[1], 1e-4)[0].backward()
    assert field.mean.grad.abs().max() == 0
    policy_loss(field, made, -moved.detach().sign(), 0.7, SIGMAS[1], 1e-4)[0].backward()
    assert field.mean.grad.abs().max() > 0


def test_a_rewards_scale_does_not_change_its_weight():
    generator = torch.Generator().manual_seed(0)
    one, other = torch.rand(6, 8, generator=generator), torch.rand(6, 8, generator=generator)
    weights = {"one": 1.0, "other": 0.5}

    plain, counts = advantages({"one": one, "other": other}, weights)
    scaled, _ = advantages({"one": 0.05 * one + 0.9, "other": other}, weights)

    torch.testing.assert_close(plain, scaled, atol=1e-4, rtol=1e-4)
    assert counts.all() and plain.mean().abs() < 1e-6
    assert plain.std().item() == pytest.approx(1, abs=1e-3)
    alone, _ = advantages({"one": one, "other": other}, {"one": 1.0})
    assert torch.corrcoef(torch.stack((plain.flatten(), alone.flatten())))[0, 1] > 0.7


def test_groups_without_variance_are_dropped():
    reward = torch.tensor([[0.5] * 4, [0.1, 0.2, 0.3, 0.9]])
    found, counts = advantages({"one": reward}, {"one": 1.0})

    assert counts.tolist() == [False, True]
    assert (found[0] == 0).all() and found[1].argmax() == 3
    torch.testing.assert_close(found[1:], advantages({"one": reward[1:]}, {"one": 1.0})[0])  # nor do they scale others
    none, counts = advantages({"one": reward[:1]}, {"one": 1.0})
    assert (none == 0).all() and not counts.any()


def test_a_closed_gate_makes_a_reward_worthless():
    style, subject = torch.tensor([[0.9, 0.8, 0.1, 0.2]]), torch.tensor([[0.0, 1.0, 1.0, 1.0]])
    free, _ = advantages({"style": style, "subject": subject}, {"style": 1.0})
    gated, _ = advantages({"style": style, "subject": subject}, {"style": 1.0}, {"style": "subject"})

    assert free[0].argmax() == 0 and gated[0].argmin() == 0 and gated[0].argmax() == 1


def test_one_lucky_picture_does_not_dominate():
    """One reward differs only within one group of 200; another, which hardly counts, differs within all."""
    seldom, always = torch.zeros(200, 8), torch.rand(200, 8, generator=torch.Generator().manual_seed(0))
    seldom[0, 0] = 1.0
    found, _ = advantages({"seldom": seldom, "always": always}, {"seldom": 1.0, "always": 0.05})

    assert found[0, 0] == found.abs().max() == 5


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """The stage; its only reward is gated by another."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "manifest.toml").touch()
    keys = {"weights": {"style": 1.0}, "gates": {"style": "subject"}, "batch": 2, "group": 4}
    network = {"width": 32, "heads": 2, "kv_heads": 1, "blocks": 1}
    texts = torch.zeros(8, 5, 2, 32), torch.ones(8, 5, dtype=torch.bool)
    data = SimpleNamespace(catalog=SimpleNamespace(folder=folder), looks=[0], embed=lambda captions: texts, cells=4)
    stage = GRPOStage(
        Recipe(**PLAIN | keys, network=network, sample_steps=3, stochastic=2), data, SimpleNamespace(vae=None)
    )
    stage.pool = PROMPTS
    return stage


def test_a_policy_learns_from_gated_rewards(policy, monkeypatch):
    rewards = {"style": torch.rand(8), "subject": torch.rand(8)}
    learned = []

    def watched(velocity, made, advantage, *options):
        learned.append(advantage)
        return policy_loss(velocity, made, advantage, *options)

    monkeypatch.setattr(grpo, "conditioned_velocity", lambda *_: lambda x, sigma: 0.1 * x)
    monkeypatch.setattr(grpo, "decode", lambda vae, latents: latents)
    monkeypatch.setattr(grpo, "policy_loss", watched)
    monkeypatch.setattr(policy.rewards, "chosen", lambda p, a, names: {n: rewards[n] for n in names}, raising=False)
    policy.loss(policy.batch(0))

    by_group = {name: value.view(2, 4) for name, value in rewards.items()}
    expected, _ = advantages(by_group, policy.recipe.weights, policy.recipe.gates)
    assert learned[0].any() and torch.equal(learned[0], expected.flatten())


def test_the_last_step_is_never_stochastic(policy):
    """It yields the picture, which would stay noisy."""
    assert all(policy.batch(step)["stochastic"] == [0, 1] for step in range(0, 20, 2))


def test_telling_prompts_are_neither_won_nor_hopeless(monkeypatch):
    """By rewards as they are learned from: 3's differ most, but it is won; 4's differ, but its subject never shows."""
    spread = torch.tensor([0.01, 0.03, 0.02, 0.09, 0.08, 0.05, 0.00, 0.04, 0.07, 0.06])
    mean = torch.tensor([0.5, 0.5, 0.5, 0.99, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5])
    known = {
        "style": mean[:, None] + spread[:, None] * torch.tensor([-0.1, 0.1, 0.0, 0.0]),
        "subject": torch.ones(10, 4),
    }
    known["subject"][4] = 0.0

    class Known(Rewards):
        vae = None

        def __init__(self):
            pass

        def chosen(self, pictures, asked, names):
            prompts = [int(each.caption) for each in asked[::4]]
            return {name: known[name][prompts].flatten() for name in names}

    monkeypatch.setattr(grpo, "draw_prompts", lambda *_: PROMPTS)
    monkeypatch.setattr(grpo, "sample", lambda *_: None)
    monkeypatch.setattr(grpo, "decode", lambda *_: None)
    data = SimpleNamespace(embed=None, cells=4)

    def chosen(pool):
        recipe = Recipe(**PLAIN, weights={"style": 1.0}, gates={"style": "subject"}, pool=pool)
        return [int(each.caption) for each in informative_prompts(None, data, Known(), recipe, lambda line: None)]

    assert chosen(3) == [8, 9, 5]
    assert chosen(10) == [8, 9, 5, 7, 1, 2, 0, 6, 3, 4]


def test_rewarded_outcomes_become_more_frequent():
    """Rewarded for being near a point, and for nothing else, the flow's mean moves there."""
    field, goal = Gaussian(), torch.tensor([0.8, -0.6])
    optimiser = torch.optim.Adam(field.parameters(), 0.03)
    rewards = []
    for step in range(60):
        generator = torch.Generator().manual_seed(step)
        chosen = torch.randperm(7, generator=generator)[:2].tolist()
        end, made = rollout(field, noise(64, 1000 + step), SIGMAS, chosen, 0.7, generator)
        reward = (-(end[:, 0] - goal).norm(dim=-1)).exp()
        rewards.append(reward.mean().item())
        advantage, _ = advantages({"near": reward.view(8, 8)}, {"near": 1.0})
        for _ in range(2):
            loss, _ = policy_loss(field, made, advantage.flatten(), 0.7, SIGMAS[1], 0.2)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()

    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.15
    assert (field.mean - goal).norm() < 0.5 * goal.norm()
