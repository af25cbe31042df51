"""Merging, balancing and curating, with known answers."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from workshop import NETWORK, workshop  # noqa: F401

from model.errors import K2Error
from model.train import merge, midtrain, pretrain, states
from model.train.data import Item, Pair
from model.train.looks import Look
from model.train.merge import best_weights, combine, simplex_grid
from model.train.midtrain import balanced_odds, kmeans
from model.train.rollout import draw_sigmas
from model.train.sft import Recipe, best_of_each, domain_mask
from model.train.training_set import load_training_set
from model.train.validation import hold_out, is_validation, restrict, validation_loss

WAVES = 3
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def net():
    return nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))


def fit(model, low, high, steps, lr, seed):
    """Learn a wave between low and high from noisy points."""
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(model.parameters(), lr)
    for _ in range(steps):
        x = low + (high - low) * torch.rand(64, 1, generator=generator)
        loss = (model(x) - torch.sin(WAVES * x) - 0.3 * torch.randn(64, 1, generator=generator)).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return {name: value.clone() for name, value in model.state_dict().items()}


def error(state, seed, count=2000):
    """The error against the wave itself, over both domains."""
    x = -1 + 2 * torch.rand(count, 1, generator=torch.Generator().manual_seed(seed))
    model = net()
    model.load_state_dict(state)
    with torch.no_grad():
        return (model(x) - torch.sin(WAVES * x)).square().mean().item()


@pytest.fixture(scope="module")
def domains():
    """A common parent and two children, each trained on one half of the line."""
    torch.manual_seed(0)
    model = net()
    base = fit(model, -1, 1, 150, 3e-3, 0)
    children = []
    for seed, (low, high) in enumerate(((-1, 0), (0, 1)), 1):
        model.load_state_dict(base)
        children.append(fit(model, low, high, 100, 1e-3, seed))
    return base, children


def test_merging_domain_runs_by_validation_beats_each_of_them(domains):
    _, children = domains
    weights, value, scores = best_weights(children, lambda state: error(state, seed=10, count=300), 4)
    merged = error(combine(children, weights), seed=11)
    alone = [error(state, seed=11) for state in children]

    assert merged <= sum(alone) / 2
    assert merged < min(alone)
    assert value == min(scores.values()) and sum(weights) == pytest.approx(1)


def test_parent_that_spoils_every_merge_gets_no_weight(domains):
    base, children = domains
    spoilt = {name: 10 * torch.randn(value.shape) for name, value in base.items()}
    weights, _, _ = best_weights([children[0], spoilt], lambda state: error(state, seed=10, count=300), 4)
    assert weights == (1.0, 0.0)


def test_mean_of_noisy_snapshots_beats_the_last():
    """PMA: at a constant, high learning rate snapshots wander around the minimum; their mean is closer to it."""
    torch.manual_seed(0)
    model = net()
    fit(model, -1, 1, 300, 5e-3, 0)
    snapshots = [fit(model, -1, 1, 20, 5e-3, seed) for seed in range(1, 9)]

    mean = error(combine(snapshots, [1 / 8] * 8), seed=11)
    assert mean < sum(error(state, seed=11) for state in snapshots) / 8
    assert mean < error(snapshots[-1], seed=11)


def test_merging_is_linear_and_exact_at_the_corners():
    one, other = ({"w": torch.randn(5), "count": torch.tensor(n)} for n in (3, 4))
    assert torch.equal(combine([one, other], (1.0, 0.0))["w"], one["w"])
    torch.testing.assert_close(combine([one, other], (0.25, 0.75))["w"], 0.25 * one["w"] + 0.75 * other["w"])
    assert combine([one, other], (0.5, 0.5))["count"] == 3


def test_refuses_to_merge_mismatched_weights():
    for other in ({"v": torch.zeros(2)}, {"w": torch.zeros(3)}):
        with pytest.raises(K2Error, match="cannot be merged"):
            combine([{"w": torch.zeros(2)}, other], (0.5, 0.5))


def test_either_every_run_has_a_weight_or_none_has():
    with pytest.raises(K2Error, match="states 1 weights for 2 runs"):
        merge.Recipe.of({"name": "moved", "runs": ["a", "b"], "weights": [1.0]}, "moved.toml")
    with pytest.raises(K2Error, match="states 1 weights for 0 runs"):
        merge.Recipe.of({"name": "moved", "snapshots": "a", "weights": [1.0]}, "moved.toml")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"runs": ["moved", "b"]}, 'would overwrite the run "moved"'),
        ({"snapshots": "moved"}, 'would overwrite the run "moved"'),
        ({"runs": ["a", "b"], "divisions": 0}, "divisions must be at least 1"),
        (
            {"runs": ["a", "b"], "weights": [1.0, 0.0], "divisions": 9},
            "divisions has no meaning for weights that are known",
        ),
        (
            {"runs": ["a", "b"], "weights": [1.0, 0.0], "pictures": 4},
            "pictures has no meaning for weights that are stated",
        ),
        ({"snapshots": "a", "divisions": 9}, "divisions has no meaning"),
    ],
)
def test_refuses_invalid_merge_recipes(keys, message):
    with pytest.raises(K2Error, match=message):
        merge.Recipe.of({"name": "moved", **keys}, "moved.toml")


@pytest.mark.parametrize("how", [{"runs": ("night",)}, {"runs": ("night",), "weights": (1.0,)}, {"snapshots": "night"}])
def test_refuses_to_merge_runs_without_a_transformer(tmp_path, monkeypatch, how):
    monkeypatch.chdir(tmp_path)
    lora = {"name": "night", "stage": "lora", "pictures": "night", "steps": 4}
    states.write_state(
        states.RUNS / "night", {"ema.w": torch.zeros(2)}, {"step": 4, "seconds": 1.0, "recipe": lora}, {}
    )

    with pytest.raises(K2Error, match='"night" has no transformer: its stage is "lora"'):
        merge.main(merge.Recipe(name="merged", **how), "cpu", lambda line: None)


@pytest.mark.parametrize(("count", "divisions"), [(2, 4), (3, 4), (3, 3), (4, 2)])
def test_weights_tried_include_every_parent_and_the_mean(count, divisions):
    grid = simplex_grid(count, divisions)
    assert all(sum(weights) == pytest.approx(1) for weights in grid) and len(set(grid)) == len(grid)
    for index in range(count):
        assert tuple(float(index == k) for k in range(count)) in grid
    assert (1 / count,) * count in grid


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
def test_features_for_clustering_are_in_main_memory(workshop, device):  # noqa: F811
    keys = {"name": "middle", "size": 64, "steps": 1, "batch": 2, "repeats": 1, "mu": 0.0, "lr": 1e-3, "muon_lr": 1e-3}
    small = midtrain.Recipe(**keys, init="box", network=NETWORK)
    data = load_training_set(small, device)

    found = midtrain.features(data, pretrain.build_model(small, len(data.looks)).to(device))

    assert found.shape == (len(data.items), 4 * 32 + 64)
    assert np.allclose(np.linalg.norm(found[:, : 4 * 32], axis=1), 1, atol=1e-4)


def test_domain_must_leave_pictures_of_every_shape():
    """Otherwise the first step with a shape that has none would end the run, however late it comes."""
    data = SimpleNamespace(weights=np.full(4, 0.25), shape_subsets=[SimpleNamespace(indices=np.array([2, 3]))])
    with pytest.raises(K2Error, match="one of its shapes"):
        restrict(data, np.array([True, True, False, False]))

    restrict(data, np.array([True, False, True, False]))
    assert data.weights.tolist() == [0.5, 0, 0.5, 0]


def test_validation_pictures_are_not_trained_on():
    items = [Item(row, Pair(f"thing {row}", "noto"), Look("noto", "plain", "white", "cream")) for row in range(200)]
    data = SimpleNamespace(items=items, weights=np.full(200, 1 / 200), shape_subsets=[])
    hold_out(data)

    assert 0 < sum(map(is_validation, items)) < 20
    assert (data.weights == 0).tolist() == [is_validation(item) for item in items]

    drawn = []

    class Resting(SimpleNamespace):
        def batch(self, recipe, step):
            drawn.append((step, self.weights > 0))
            return step

    model = SimpleNamespace(look_head=nn.Linear(1, 1), losses=lambda step, recipe: [torch.full((16,), float(step))])
    found = validation_loss(model, Resting(items=items), RECIPE, 48)

    assert found == 1 and [step for step, _ in drawn] == [0, 1, 2]
    assert all(resting.tolist() == [is_validation(item) for item in items] for _, resting in drawn)


def test_clusters_are_found_and_the_same_for_the_same_seed():
    rng = np.random.default_rng(0)
    own = np.repeat([0, 1, 2], [300, 40, 10])
    points = np.array([[0, 0], [5, 0], [0, 5]])[own] + 0.3 * rng.normal(size=(350, 2))

    found = kmeans(points, 3, seed=1)

    assert np.array_equal(found, kmeans(points, 3, seed=1))
    assert len({(a, b) for a, b in zip(own, found, strict=True)}) == 3 == len(np.unique(found))
    assert len(np.unique(kmeans(np.zeros((5, 2)), 3))) == 1


def test_balanced_odds_draw_clusters_equally_and_keep_ratios_inside():
    rng = np.random.default_rng(0)
    clusters = np.repeat([0, 1, 2], [900, 90, 10])
    weights = rng.random(1000) + 0.1
    weights[-1] = 0.0
    weights /= weights.sum()

    drawn = rng.choice(1000, 6000, p=balanced_odds(weights, clusters, 1.0))
    shares = np.bincount(clusters[drawn]) / 6000
    assert np.abs(shares - 1 / 3).max() < 4 * (2 / 9 / 6000) ** 0.5
    odds = balanced_odds(weights, clusters, 1.0)
    np.testing.assert_allclose(odds[:900] / odds[0], weights[:900] / weights[0])
    assert odds[-1] == 0
    np.testing.assert_allclose(balanced_odds(weights, clusters, 0.0), weights)
    half = np.bincount(clusters, balanced_odds(weights, clusters, 0.5))
    before = np.bincount(clusters, weights)
    np.testing.assert_allclose(half, before**0.5 / (before**0.5).sum())


ITEMS = [
    Item(row, Pair(f"thing {row % 3}", drawing), Look(drawing, medium, ground, "cream"))
    for row, (drawing, medium, ground) in enumerate(
        [
            ("noto", "plain", "white"),
            ("noto", "film", "flat"),
            ("twemoji", "film", "flat"),
            ("twemoji", "plain", "flat"),
        ]
        * 3
    )
]
RECIPE = Recipe(name="d", steps=1, size=64, batch=1, repeats=1, lr=0.1, muon_lr=0.1, mu=0.0)


def test_domain_is_what_its_recipe_selects():
    film = domain_mask(ITEMS, replace(RECIPE, media=("film",)))
    assert [item.look.medium == "film" for item in ITEMS] == film.tolist()
    both = domain_mask(ITEMS, replace(RECIPE, media=("plain",), drawings=("noto",), on=("white", "flat")))
    assert [i.look.medium == "plain" and i.pair.drawing == "noto" for i in ITEMS] == both.tolist()
    assert domain_mask(ITEMS, RECIPE).all()


@pytest.mark.parametrize("domain", [{"media": ("film", "flim")}, {"drawings": ("nothing",)}])
def test_refuses_unknown_domain_values(domain):
    with pytest.raises(K2Error, match="there is no"):
        replace(RECIPE, **domain)


def test_best_pictures_of_each_subject_stay():
    keep = np.array([True] * 11 + [False])
    score = np.arange(12.0)
    best = best_of_each(ITEMS, keep, score, 2)
    assert [sorted(i for i in np.flatnonzero(best) if i % 3 == k) for k in range(3)] == [[6, 9], [7, 10], [5, 8]]


def test_noise_levels_are_stratified_around_their_shift():
    levels = draw_sigmas(4000, 0.7, torch.Generator().manual_seed(0))
    logits = torch.logit(levels)
    assert logits.mean().item() == pytest.approx(0.7, abs=0.01) and logits.std().item() == pytest.approx(1, abs=0.02)
    drawn = torch.logit(draw_sigmas(8, 0.0, torch.Generator().manual_seed(0)))
    few = drawn.sort().values
    edges = torch.special.ndtri(torch.arange(9) / 8)
    assert ((few >= edges[:-1]) & (few <= edges[1:])).all()
    assert not torch.equal(drawn, few)  # otherwise a picture's level would depend on its place in the batch
