"""Pretraining: it learns, and it resumes to the last bit."""

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from time import sleep

import pytest
import torch
from workshop import workshop  # noqa: F401

from model.dit import PRESETS, DiTConfig
from model.errors import K2Error
from model.train import loop, optim, pretrain
from model.train.alignment import MAX_SIGMA_GAP, Teacher
from model.train.data import Item, Pair
from model.train.looks import Look
from model.train.pretrain import PretrainStage, Recipe
from model.train.training_set import load_training_set, pad_features

TINY = DiTConfig(width=32, heads=2, kv_heads=1, blocks=2, text_width=32, text_taps=2, text_heads=2)


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "RUNS", tmp_path)
    monkeypatch.setitem(PRESETS, "tiny", TINY)
    return Recipe(
        name="tiny",
        size=64,
        minutes=1e6,
        batch=4,
        repeats=2,
        lr=4e-3,
        muon_lr=4e-3,
        mu=0.0,
        preset="tiny",
        warmup_steps=1,
    )


def begin(recipe: Recipe) -> loop.Run:
    return loop.Run(PretrainStage(recipe, looks=3), pretrain.RUNS / recipe.name)


def make_batch(seed: int, references: bool) -> dict:
    generator = torch.Generator().manual_seed(seed)
    masked = torch.ones(4, 5, dtype=torch.bool)
    masked[1, 3:] = False
    return {
        "latents": torch.randn(4, 16, 4, 4, generator=generator),
        "embeds": torch.randn(4, 5, 2, 32, generator=generator),
        "mask": masked,
        "references": torch.randn(4, 16, 4, 4, generator=generator) if references else None,
        "null": torch.tensor([True, False, False, False]),
        "looks": torch.tensor([0, 1, 2, 1]),
        "generator": generator,
    }


def test_overfits_one_batch(recipe):
    run = begin(recipe)

    losses = [run.advance(make_batch(0, references=True))["loss"] for _ in range(60)]

    assert losses[-1] < 0.5 * losses[0]


def test_resuming_is_exact(recipe):
    straight = begin(recipe)
    for step in range(4):
        last = straight.advance(make_batch(step, step % 2 == 0))

    broken = begin(recipe)
    for step in range(2):
        broken.advance(make_batch(step, step % 2 == 0))
    broken.save()
    resumed = begin(recipe)
    assert resumed.step == 2
    for step in range(2, 4):
        again = resumed.advance(make_batch(step, step % 2 == 0))

    assert again == last
    for name, value in straight.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
        assert torch.equal(straight.ema[name], resumed.ema[name]), name


def test_repeats_share_the_prompt_not_the_noise(recipe):
    run = begin(recipe)
    flow, sigma, *_ = run.model.losses(make_batch(0, references=False), recipe)

    assert flow.shape == (8,)
    assert len(sigma.unique()) == 8


def test_stage_starts_from_its_parents_averages(recipe):
    parent = begin(recipe)
    parent.advance(make_batch(0, references=True))
    parent.save()

    child = begin(replace(recipe, name="child", init="tiny", fresh=("dit.txtmlp",), seed=9))

    assert child.step == 0
    weights = child.model.state_dict()
    assert torch.equal(weights["dit.blocks.0.attn.wq.weight"], parent.ema["dit.blocks.0.attn.wq.weight"])
    assert not torch.equal(weights["dit.txtmlp.1.weight"], parent.ema["dit.txtmlp.1.weight"])
    assert all(torch.equal(child.ema[name], value) for name, value in weights.items())


def test_orthogonalised_matrices_have_singular_values_near_one():
    values = torch.linalg.svdvals(optim.orthogonalise(torch.randn(3, 16, 40)))

    assert values.min() > 0.5 and values.max() < 1.4


def test_most_singular_values_of_a_square_matrix_approach_one():
    """The smallest are nearly zero and would take many more steps."""
    square = torch.randn(1, 384, 384, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(optim.orthogonalise(square))

    assert values.quantile(0.1) > 0.5 and values.max() < 1.4


def test_muon_updates_have_the_size_of_adamws():
    weight = torch.nn.Parameter(torch.zeros(64, 192))
    weight.grad = torch.randn(64, 192)
    optim.Muon([weight], lr=1.0).step()

    assert weight.detach().square().mean().sqrt().item() == pytest.approx(0.2, rel=0.25)


def test_muon_looks_ahead_of_its_momentum(monkeypatch):
    """As in Nesterov's method: the gradient plus the momentum that already contains it is orthogonalised."""
    monkeypatch.setattr(optim, "native_bf16", lambda device: False)
    weight, (first, second) = torch.nn.Parameter(torch.zeros(4, 8)), torch.randn(2, 4, 8)
    muon = optim.Muon([weight], lr=1.0)
    for gradient in (first, second):
        before, weight.grad = weight.detach().clone(), gradient
        muon.step()

    momentum = 0.05 * (0.95 * first + second)
    ahead = 0.05 * second + 0.95 * momentum
    torch.testing.assert_close(before - weight.detach(), 0.2 * 8**0.5 * optim.orthogonalise(ahead))


def test_muon_lets_weights_decay():
    weights = [torch.nn.Parameter(torch.ones(4, 8)) for _ in range(2)]
    gradient = torch.randn(4, 8)
    for weight, decay in zip(weights, (0.0, 0.1), strict=True):
        weight.grad = gradient
        optim.Muon([weight], lr=0.5, weight_decay=decay).step()

    torch.testing.assert_close(weights[0] - weights[1], torch.full((4, 8), 0.5 * 0.1))


def test_muon_trains_block_and_text_matrices_adamw_the_rest(recipe):
    stage = PretrainStage(replace(recipe, lr=1e-3, muon_lr=2e-3, weight_decay=0.1), looks=3)
    names = {param: name for name, param in stage.model.named_parameters()}
    optimisers = optim.make_optimisers(stage.model, stage.recipe, stage.muon, stage.rate)
    found = {
        names[param]: (which, group["lr"], group["peak"], group["weight_decay"])
        for which, optimiser in optimisers.items()
        for group in optimiser.param_groups
        for param in group["params"]
    }

    inside = ("dit.blocks.1.attn.wq", "dit.txtfusion.refiner_blocks.0.attn.wq", "dit.txtmlp.1")
    assert {found[f"{name}.weight"] for name in inside} == {("muon", 2e-3, 2e-3, 0.1)}
    rest = ("dit.blocks.1.attn.qknorm.qnorm.scale", "dit.txtmlp.1.bias", "dit.first.weight", "look_head.weight")
    assert {found[name] for name in rest} == {("adamw", 1e-3, 1e-3, 0.1)}
    assert found.keys() == set(names.values())


def test_learning_rate_warms_up_holds_and_decays():
    course = [optim.warmup_stable_decay(step, 10, step / 100, decay=0.2) for step in (0, 4, 9, 50, 90, 100)]

    assert course == pytest.approx([0.1, 0.5, 1, 1, 0.5, 0])


def test_recipe_can_ask_for_8_bit_products(recipe):
    """The course is the same apart from rounding, and the state dict is that of any run."""
    wide = begin(replace(recipe, name="wide"))
    small = begin(replace(recipe, name="small", products="int8-rowwise"))
    losses = [[run.advance(make_batch(0, references=False))["loss"] for _ in range(20)] for run in (wide, small)]

    assert losses[0] != losses[1]
    assert losses[1][-1] == pytest.approx(losses[0][-1], rel=0.05)
    assert list(small.model.state_dict()) == list(wide.model.state_dict())
    with pytest.raises(K2Error, match="int9"):
        begin(replace(recipe, name="none", products="int9"))


def test_captions_of_several_lengths_are_padded_and_masked():
    padded, mask = pad_features([torch.ones(3, 2, 4), torch.ones(5, 2, 4)], 8)
    assert padded.shape == (2, 8, 2, 4) and padded.sum((2, 3)).tolist() == [[8.0] * n + [0.0] * (8 - n) for n in (3, 5)]
    assert mask.sum(1).tolist() == [3, 5] and mask[:, :3].all()


def test_two_threads_share_one_training_set(recipe, workshop):  # noqa: F811
    """They encode in turn, each caption once, and evict no more than necessary."""
    data, encoded, busy = load_training_set(recipe, "cpu"), Counter(), threading.Lock()
    data.max_cached, encode = 8, data.text.encode

    def watched(captions, **options):
        assert busy.acquire(blocking=False), "two threads at once"
        sleep(0.01)
        encoded.update(set(captions))
        busy.release()
        return encode(captions, **options)

    data.text.encode = watched
    captions = [f"a fox and {count} owls" for count in range(6)]
    alone = data.embed(captions)[0]
    assert encoded == Counter(captions)

    batches = [[*captions[count % 6 :], f"a cat {count}"] for count in range(24)]
    with ThreadPoolExecutor(2) as threads:
        rows = [embeds for embeds, _ in threads.map(data.embed, batches)]
    assert len(data.features) == 8
    for count, row in enumerate(rows):
        assert torch.equal(row[: 6 - count % 6, : alone.shape[1]], alone[count % 6 :])


def test_sheets_are_rendered_on_the_networks_device(recipe, monkeypatch):
    stage, asked = begin(recipe).stage, []
    monkeypatch.setattr("model.train.samples.main", lambda *given: asked.append(given))
    for device in ("cpu", "meta"):
        stage.model.to(device)
        stage.sheet()

    assert asked == [("tiny", "cpu"), ("tiny", "meta")]


# ---- alignment ------------------------------------------------------------------------------------------------------


def aligned(step: int, first: bool = True) -> dict:
    return make_batch(step % 3, references=step % 2 == 0) | {"first": first}


def test_pupil_learns_to_predict_its_teacher(recipe):
    run = begin(replace(recipe, align=0.5))
    rows = [run.advance(aligned(step)) for step in range(60)]

    assert rows[-1]["align"] < 0.6 * rows[0]["align"]
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_teacher_is_the_average_of_the_trained_weights(recipe):
    run = begin(replace(recipe, align=0.5))
    run.advance(aligned(0))
    teacher = run.stage.current_teacher(aligned(1))

    assert len(teacher.dit.blocks) == 1  # of two blocks: cut after two thirds of them
    for name, param in teacher.dit.named_parameters():
        assert torch.equal(param, run.ema[f"dit.{name}"]) and not param.requires_grad


def test_teacher_sees_less_noise(recipe):
    class Watched:
        def features(self, tokens, sigma, *_):
            self.sigma = sigma
            return torch.randn(8, 4, TINY.width)

    model, teacher = begin(replace(recipe, align=0.5)).model, Watched()
    less = model.losses(make_batch(0, references=False), recipe, teacher).sigma - teacher.sigma

    assert ((less >= 0) & (less <= MAX_SIGMA_GAP)).all() and less.max() > 0.05


def test_teacher_is_updated_once_per_step(recipe, monkeypatch):
    followed, follow = [], Teacher.update
    monkeypatch.setattr(Teacher, "update", lambda self, averages: followed.append(1) or follow(self, averages))
    run = begin(replace(recipe, align=0.5))
    for step in range(2):
        run.advance(*(aligned(3 * step + part) for part in range(3)))

    assert len(followed) == 3  # at the start, and after each step


def test_only_the_first_epoch_is_aligned(recipe):
    run = begin(replace(recipe, align=0.5))

    assert "align" in run.advance(aligned(0)) and "align" not in run.advance(aligned(1, first=False))
    assert run.stage.teacher is None
    assert "align" not in begin(replace(recipe, name="other")).advance(aligned(0))


def test_aligned_run_resumes_exactly_and_drops_its_head(recipe):
    recipe = replace(recipe, align=0.5)
    straight, broken = begin(recipe), begin(recipe)
    for step in range(4):
        last = straight.advance(aligned(step))
    for step in range(2):
        broken.advance(aligned(step))
    broken.save()
    resumed = begin(recipe)
    again = [resumed.advance(aligned(step)) for step in range(2, 4)][-1]
    child = begin(replace(recipe, name="child", init="tiny", align=0.0))

    assert again == last
    assert not any(name.startswith("pupil") for name in child.model.state_dict())


def test_bare_captions_show_only_chosen_looks(recipe):
    stencil, shaded = (Item(0, Pair("fox", name), Look(name)) for name in ("fluent-emoji-high-contrast", "noto"))
    grainy = Item(0, Pair("fox", "noto"), Look("noto", "film"))
    choosy = replace(recipe, unasked=("noto",))

    assert [recipe.form(item, "short") for item in (stencil, shaded, grainy)] == ["short"] * 3
    assert [choosy.form(item, "short") for item in (stencil, shaded, grainy)] == ["medium", "short", "medium"]
    assert choosy.form(stencil, "long") == "long"
