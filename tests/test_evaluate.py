"""The figures that weights are judged by, on cases with a known answer."""

import numpy as np
import pytest
import torch

from model.checkpoint import open_checkpoint
from model.hashes import sha256
from model.library import BUNDLED
from model.train.evaluate import frechet, group_spread, is_recognised, kernel_distance, retrieval
from model.train.judge import Judge, JudgeConfig
from model.train.rewards import EVALUATION_SEED

RNG = np.random.default_rng(0)


def test_frechet_distance_of_gaussians_in_closed_form():
    """Between N(0, 1) and N(2, 3²) along one axis, the others alike: 2² + (3 − 1)²."""
    a, b = RNG.standard_normal((2, 40_000, 3))
    b = b * [3, 1, 1] + [2, 0, 0]

    assert frechet(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet(a, b) == pytest.approx(8, rel=0.03)
    assert frechet(a, b) == pytest.approx(frechet(b, a))


def test_frechet_distance_sees_correlations():
    """The same spread along every axis, once independent and once not: only the covariance differs."""
    a = RNG.standard_normal((20_000, 2))
    b = a[:, [0, 0]]

    assert frechet(a, b) == pytest.approx(4 - 2 * np.sqrt(2), rel=0.05)


def test_the_kernel_distance_of_small_sets_is_unbiased():
    """For sets of one kind its mean is 0, while the Fréchet distance is the larger the smaller the sets are."""
    sets = RNG.standard_normal((40, 2, 60, 24))
    same = np.array([kernel_distance(a, b) for a, b in sets])
    moved = np.array([kernel_distance(a, b + 0.3) for a, b in sets])

    assert abs(same.mean()) < 3 * same.std() / 40**0.5 and moved.mean() > 10 * same.std() / 40**0.5
    assert np.mean([frechet(a, b) for a, b in sets]) > 5


def test_shared_captions_do_not_lower_the_kernel_distance():
    """A picture is like the real one with its caption; that alone must not make the distance less than none."""
    captions = RNG.standard_normal((40, 1, 60, 24))
    same = np.array([kernel_distance(a, b) for a, b in captions + 0.5 * RNG.standard_normal((40, 2, 60, 24))])

    assert abs(same.mean()) < 3 * same.std() / 40**0.5


def test_spread_is_the_mean_distance_within_a_group():
    found = np.array([[0.0, 0], [3, 4], [1, 1], [1, 1]])

    assert group_spread(found, 2).tolist() == [5, 0]


def test_pictures_are_read_by_their_nearest_name():
    torch.manual_seed(0)
    judge = Judge(JudgeConfig(("ant", "bee", "cat"))).eval()
    with torch.inference_mode():
        names = judge.read(["ant", "bee", "cat"])
    found = names[[1, 1, 2]].numpy()

    assert is_recognised(judge, found, ["bee", "ant", "cat"], ["ant", "bee", "cat"]).tolist() == [True, False, True]
    pictures = RNG.integers(0, 255, (2, 128, 128, 3), dtype=np.uint8)
    assert len(retrieval(judge, pictures, ["ant", "bee"], ["ant", "bee"])) == 2


def test_bundled_judge_is_the_one_in_the_model_card():
    """It only evaluates, and its words are those that it was trained with: a cat is nearest to a cat."""
    file = BUNDLED / f"judge-{EVALUATION_SEED}.safetensors"
    assert f"`{sha256(file)[:16]}…`" in (BUNDLED / "README.md").read_text("utf-8")
    assert open_checkpoint(file).metadata["training"]["seed"] == EVALUATION_SEED
    with torch.inference_mode():
        cat, *others = Judge.load(file).read(["cat face", "airplane", "castle", "hamburger"])
        own = Judge.load(file).read(["cat"])[0]
    assert all(own @ cat > own @ other for other in others)
