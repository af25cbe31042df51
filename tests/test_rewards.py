"""Rewards: what they must tell apart, on pictures where the answer is known."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from workshop import make_data

from model.errors import K2Error
from model.train import grpo, stpo
from model.train.judge import SIZE, Critic, Judge, JudgeConfig, JudgeStage, Recipe, damage, may_train_judge
from model.train.looks import Look
from model.train.rewards import Rewards, choice_key, top_octave
from model.train.rollout import RolloutPrompt

GRAINY, SMOOTH = Look("noto", "film"), Look("noto", "plain")


class Decoder(torch.nn.Module):
    """Latents are pictures already."""

    def decode(self, latents):
        return latents


def pictures(count, grain, seed=0):
    """Smooth pictures with a given amount of grain."""
    generator = torch.Generator().manual_seed(seed)
    smooth = F.interpolate(torch.randn(count, 3, 6, 6, generator=generator), 64, mode="bicubic").clamp(-1, 1) * 0.6
    return (smooth + grain * torch.randn(count, 3, 64, 64, generator=generator)).clamp(-1, 1)


@pytest.fixture(scope="module")
def rewards():
    torch.manual_seed(0)
    judge = Judge(JudgeConfig(words=("fox", "car"))).eval()
    data = SimpleNamespace(
        catalog=SimpleNamespace(subjects={"fox": None, "car": None}),
        by_look={GRAINY: list(range(8)), SMOOTH: list(range(8, 16))},
        items=[SimpleNamespace(look=GRAINY)] * 8 + [SimpleNamespace(look=SMOOTH)] * 8,
        latents=torch.cat((pictures(8, 0.2), pictures(8, 0.0, 1))),
    )
    return Rewards(judge, Critic().eval(), Decoder(), data)


def test_the_top_octave_measures_fine_grain():
    board = torch.arange(64)
    finest = ((board[:, None] + board) % 2 * 2.0 - 1).expand(1, 3, 64, 64)
    coarse = torch.sin(board * 2 * torch.pi * 8 / 64).expand(1, 3, 64, 64)

    assert top_octave(finest).item() > 1 and top_octave(coarse).item() < 1e-6
    assert (top_octave(pictures(4, 0.2)) > 20 * top_octave(pictures(4, 0.0))).all()
    turned = pictures(4, 0.2)
    torch.testing.assert_close(top_octave(turned), top_octave(turned.transpose(2, 3)))


def test_grain_must_neither_be_polished_away_nor_added(rewards):
    def grain(amount, look):
        return (
            rewards.chosen(pictures(6, amount, 5), [RolloutPrompt("", "fox", look)] * 6, ["grain"])["grain"]
            .mean()
            .item()
        )

    assert grain(0.2, GRAINY) > 0.7
    assert grain(0.1, GRAINY) < 0.5 * grain(0.2, GRAINY) and grain(0.0, GRAINY) < 0.1
    assert grain(0.3, GRAINY) < 0.8 * grain(0.2, GRAINY)
    assert grain(0.0, SMOOTH) > 2 * grain(0.1, SMOOTH)


def test_rewards_are_between_0_and_1_and_depend_on_the_prompt(rewards):
    asked = [RolloutPrompt("", "fox", GRAINY), RolloutPrompt("", "car", GRAINY)]
    found = rewards.chosen(pictures(1, 0.1).expand(2, -1, -1, -1), asked, ["subject", "style", "artefact", "grain"])

    assert all(value.shape == (2,) and ((value >= 0) & (value <= 1)).all() for value in found.values())
    assert found["subject"].sum().item() == pytest.approx(1)  # of one picture, over both names
    total = rewards.total(pictures(1, 0.1).expand(2, -1, -1, -1), asked, {"subject": 3.0, "grain": 1.0})
    torch.testing.assert_close(total, (3 * found["subject"] + found["grain"]) / 4)
    gated = rewards.total(
        pictures(1, 0.1).expand(2, -1, -1, -1), asked, {"subject": 3.0, "grain": 1.0}, {"grain": "style"}
    )
    torch.testing.assert_close(gated, (3 * found["subject"] + found["grain"] * found["style"]) / 4)


def test_pictures_that_show_what_was_asked_earn_more(rewards, monkeypatch):
    """The subject as named, the style as in the look's real pictures, and artefacts as the critic sees them."""
    both = torch.cat((pictures(8, 0.2), pictures(8, 0.0, 1)))
    monkeypatch.setattr(rewards, "name_embeddings", rewards.embed(both[[0, 8]])[0])

    def found(look):
        return rewards.chosen(both, [RolloutPrompt("", "fox", look)] * 16, ["subject", "style", "artefact"])

    as_grainy, as_smooth = found(GRAINY), found(SMOOTH)
    assert as_grainy["style"][:8].mean() > as_smooth["style"][:8].mean()
    assert as_grainy["style"][8:].mean() < as_smooth["style"][8:].mean()
    assert as_grainy["subject"][0] > 0.5 > as_grainy["subject"][8]
    torch.testing.assert_close(as_grainy["artefact"], rewards.critic(both).sigmoid())


def test_unknown_rewards_are_refused(rewards):
    with pytest.raises(K2Error, match="beauty"):
        rewards.chosen(pictures(1, 0.1), [RolloutPrompt("", "fox", GRAINY)], ["beauty"])


def test_only_requested_rewards_are_computed(rewards, monkeypatch):
    def not_asked(*_):
        raise AssertionError

    monkeypatch.setattr("model.train.rewards.top_octave", not_asked)
    monkeypatch.setattr(rewards.critic, "forward", not_asked)
    assert rewards.chosen(pictures(1, 0.1), [RolloutPrompt("", "fox", GRAINY)], ["subject"]).keys() == {"subject"}


@pytest.mark.parametrize("stage", [stpo, grpo])
def test_a_choice_names_all_that_it_depends_on(rewards, stage, tmp_path):
    """Runs and judges may be retrained under their old names."""
    torch.manual_seed(0)
    plain = {"name": "x", "size": 64, "steps": 2, "batch": 1, "lr": 1e-3, "muon_lr": 1e-3, "mu": 0.0, "every": 2}
    recipe = stage.Recipe(**plain, weights={"subject": 1.0})
    dits = [torch.nn.Linear(2, 2) for _ in range(2)]
    own = {"vae": rewards.vae, "judge": rewards.judge, "critic": rewards.critic}
    anew = {"vae": dits[1], "judge": Judge(rewards.judge.config), "critic": Critic()}
    others = [SimpleNamespace(**(own | {name: network})) for name, network in anew.items()]
    sets = []
    for name, tower in (("these", dits[0]), ("read otherwise", dits[1]), ("others", dits[0])):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "manifest.toml").write_text("others" if name == "others" else "these")
        sets.append(SimpleNamespace(catalog=SimpleNamespace(folder=folder), text=SimpleNamespace(tower=tower)))

    def found(dit=dits[0], rewards=rewards, data=sets[0], **changes):
        return choice_key(replace(recipe, **changes), stage.CHOICE_KEYS, dit, rewards, data)

    changes = {"white": 2.0, "grounds": 1.0, "later": 1.0, "preset": "big", "network": {"blocks": 1}}
    changes |= {"gates": {"subject": "style"}} if stage is grpo else {}
    made = [found(), found(dits[1]), *(found(rewards=other) for other in others)]
    made += [found(data=other) for other in sets[1:]] + [found(**{key: value}) for key, value in changes.items()]
    assert json.loads(json.dumps(made[0])) == found(lr=1.0)
    assert all(each not in made[:place] for place, each in enumerate(made))


def test_every_picture_is_broken_and_keeps_its_grain():
    whole = pictures(60, 0.1, 7)
    wrong = damage(whole, np.random.default_rng(0))

    assert wrong.isfinite().all() and wrong.abs().max() <= 1
    assert ((wrong - whole).abs().flatten(1).mean(1) > 0.005).all()
    assert (top_octave(wrong) > 0.6 * top_octave(whole)).all()
    assert torch.equal(wrong, damage(whole, np.random.default_rng(0)))
    assert not torch.equal(wrong, damage(whole, np.random.default_rng(1)))


@pytest.fixture
def judging(tmp_path):
    """The judge's stage for a seed, on the workshop's drawings."""
    catalog = make_data(tmp_path / "data")
    return lambda seed: JudgeStage(Recipe(name="judge", steps=1, lr=1e-3, muon_lr=1e-3, seed=seed), catalog)


def test_value_ranges_do_not_tell_whole_from_broken(judging):
    """White stays white when it is doubled, melted, patched or torn, whatever it was tinted with."""
    stage = judging(3)
    stage.composed = dict.fromkeys(range(len(stage.items)), np.full((SIZE, SIZE, 3), 255, np.uint8))
    for step in range(4):
        batch = stage.batch(step)
        alike = (batch["x"] - batch["broken"]).abs().amax((1, 2, 3)) < 1e-5
        assert alike.float().mean() > 0.6, step  # all but the speckled ones


def test_judges_skip_a_tenth_of_their_own_and_all_held_out(judging):
    catalog = judging(3).catalog
    train, seen = set(catalog.items("train")), [set(judging(seed).items) for seed in (3, 4)]
    left = [train - each for each in seen]

    assert all(each <= train and 0.05 < len(train - each) / len(train) < 0.15 for each in seen)
    assert left[0] != left[1]
    assert not any(may_train_judge(item, seed) for item in catalog.items("held-out") for seed in (3, 4))
