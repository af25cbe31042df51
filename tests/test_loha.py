"""LoHa, a Hadamard product of two low-rank matrices: the dense product in any layout; PEFT's files, LoKr included."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from test_dit import inputs, random_model, reference, relative_error
from test_lora import LAYOUTS, THEIRS, TINY, bare_ones, linears, random_pairs, refused, velocity, write
from test_lora_kinds import with_differences
from torch import Tensor

from model.adapter_path import Hadamard
from model.dit import Krea2
from model.latents import position_ids
from model.lora import applied
from model.lora_match import read_lora

Factors = dict[str, dict[str, Tensor]]  # native layer -> LyCORIS's name -> tensor


@pytest.fixture(scope="module")
def model() -> Krea2:
    return random_model(TINY)


def hadamard_factors(model: Krea2, rank: int = 2, seed: int = 0) -> Factors:
    """For every linear layer; the entries of their product have a variance of 1 / in."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, layer in linears(model).items():
        out, inward = layer.weight.shape
        shapes = {"w1_a": (out, rank), "w1_b": (rank, inward), "w2_a": (out, rank), "w2_b": (rank, inward)}
        size = (inward**-0.5 / rank) ** 0.25
        found[name] = {f"hada_{w}": torch.randn(shape, generator=generator) * size for w, shape in shapes.items()}
    return found


def hadamard(part: dict[str, Tensor]) -> Tensor:
    """The definition (FedPara), in double precision and without a scale."""
    w1_a, w1_b, w2_a, w2_b = (part[f"hada_{what}"].double() for what in ("w1_a", "w1_b", "w2_a", "w2_b"))
    return (w1_a @ w1_b) * (w2_a @ w2_b)


def called(layout: str, name: str, what: str) -> str:
    """The name of a layer's tensor in a layout of `test_lora.LAYOUTS`, with `what` in place of LoRA's half."""
    key = next(iter(LAYOUTS[layout]({name: (torch.ones(1, 1), torch.ones(1, 1))})))
    return re.sub(r"lora[_.](A|down)", what, key)


def written(found: Factors, layout: str, alpha: float | None = None) -> dict[str, Tensor]:
    state = {}
    for name, part in found.items():
        for what, tensor in part.items():
            state[called(layout, name, what).removesuffix(".weight")] = tensor
        if alpha is not None:
            state[called(layout, name, "alpha").partition(".alpha")[0] + ".alpha"] = torch.tensor(alpha)
    return state


@torch.no_grad()
def answer_of(other: torch.nn.Module) -> Tensor:
    """The answer of diffusers' network to what `velocity` asks ours."""
    tokens, sigma, embeds, grid = inputs(TINY)
    everything = torch.ones(embeds.shape[:2], dtype=torch.bool)
    return other(tokens, embeds, sigma, position_ids(embeds.shape[1], *grid), everything, return_dict=False)[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_matches_every_layer(tmp_path, model, layout):
    found = hadamard_factors(model)
    adapter = read_lora(write(tmp_path, written(found, layout, alpha=6.0)), model)

    assert set(adapter.layers) == set(linears(model)) and not adapter.unmatched
    assert adapter.report(1)["matched"] == adapter.report(1)["modules"] == len(found)
    expected = with_differences(model, 1, {f"{name}.diff": 3 * hadamard(part) for name, part in found.items()})
    assert relative_error(velocity(model, (adapter, 1)), velocity(expected)) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("rank", [1, 3, 20], ids=["one", "few", "more than the matrix has"])
def test_each_layer_gets_the_dense_product(tmp_path, model, rank):
    found = hadamard_factors(model, rank)
    adapter = read_lora(write(tmp_path, written(found, "LyCORIS", alpha=2.0)), model)
    for name, layer in linears(model).items():
        x = torch.randn(2, 5, layer.in_features)
        before = layer(x)
        with applied(model, [(adapter, -1.5)]):
            delta = layer(x) - before
        expected = -1.5 * 2 / rank * x.double() @ hadamard(found[name]).T
        assert relative_error(delta.double(), expected) < 1e-4, name
        assert torch.equal(layer(x), before)


@pytest.mark.parametrize(("rank", "whole"), [(2, False), (20, True)])
def test_cheaper_computation_is_chosen(monkeypatch, rank, whole):
    """A low rank is multiplied as a low-rank pair; for a high one the dense matrix is less work."""
    update = Hadamard(torch.ones(64, rank), torch.ones(rank, 48), torch.ones(64, rank), torch.ones(rank, 48))
    made, dense = [], Hadamard.dense
    monkeypatch.setattr(Hadamard, "dense", lambda self, rows: made.append(rows) or dense(self, rows))
    assert torch.equal(update.product(torch.ones(3, 48)), torch.full((3, 64), 48.0 * rank**2))
    assert bool(made) == whole


@pytest.mark.parametrize("alpha", [None, 6.0])
def test_combines_with_other_kinds_in_any_order(tmp_path, model, alpha):
    found, pairs = hadamard_factors(model), random_pairs(model)
    loha = read_lora(write(tmp_path, written(found, "bare", alpha)), model)
    lora = read_lora(write(tmp_path, LAYOUTS["ComfyUI"](pairs), "lora.safetensors"), model)
    before = velocity(model)

    whole = {
        f"{name}.diff": 0.5 * (1 if alpha is None else alpha / 2) * hadamard(part) - up.double() @ down.double()
        for (name, part), (down, up) in zip(found.items(), pairs.values(), strict=True)
    }
    both = velocity(model, (loha, 0.5), (lora, -1))
    assert relative_error(both, velocity(with_differences(model, 1, whole))) < 1e-4
    assert torch.equal(both, velocity(model, (lora, -1), (loha, 0.5)))
    assert torch.equal(velocity(model, (loha, 0)), before) and torch.equal(velocity(model), before)


def test_fused_qkv(tmp_path, model):
    sizes = [getattr(model.blocks[0].attn, each).weight.shape[0] for each in ("wq", "wk", "wv")]
    shapes = {"w1_a": (sum(sizes), 2), "w1_b": (2, TINY.width), "w2_a": (sum(sizes), 2), "w2_b": (2, TINY.width)}
    part = {f"hada_{what}": torch.randn(shape) * 0.3 for what, shape in shapes.items()}
    state = {f"transformer.transformer_blocks.0.attn.to_qkv.{what}": tensor for what, tensor in part.items()}
    adapter = read_lora(write(tmp_path, state), model)

    rows = hadamard(part).split(sizes)
    expected = {f"blocks.0.attn.{each}.diff": r for each, r in zip(("wq", "wk", "wv"), rows, strict=True)}
    assert relative_error(velocity(model, (adapter, 1)), velocity(with_differences(model, 1, expected))) < 1e-4


@pytest.mark.parametrize(
    ("shapes", "what"),
    [
        (
            {"w1_a": (64, 2), "w1_b": (2, 64), "w2_a": (64, 2)},
            "not make up a low-rank pair or product: blocks.0.attn.wq",
        ),
        ({"w1_a": (64, 2), "w1_b": (3, 64), "w2_a": (64, 2), "w2_b": (2, 64)}, "is damaged"),
        ({"w1_a": (64, 2), "w1_b": (2, 64), "w2_a": (64, 0), "w2_b": (0, 64)}, "is damaged"),
        ({"w1_a": (64, 2), "w1_b": (2, 64), "w2_a": (64, 65), "w2_b": (65, 64)}, "has a rank of 65"),
        ({"w1_a": (64, 2), "w1_b": (2, 64, 1, 1), "w2_a": (64, 2), "w2_b": (2, 64)}, "is damaged"),
        ({"w1_a": (64, 2), "w1_b": (2, 64), "w2_a": (64, 2), "w2_b": (2, 1)}, "maps 1 numbers to 64"),
        ({"w1_a": (32, 2), "w1_b": (2, 64), "w2_a": (64, 2), "w2_b": (2, 64)}, "maps 64 numbers to 32"),
    ],
    ids=["missing factor", "two ranks", "no rank", "rank above width", "a convolution", "in", "out"],
)
def test_invalid_factors_are_refused(tmp_path, model, shapes, what):
    state = {f"blocks.0.attn.wq.hada_{name}": torch.ones(shape) for name, shape in shapes.items()}
    assert what in refused(tmp_path, model, state)


def test_parameters_outside_linear_layers_are_refused(tmp_path, model):
    name, scale = next(iter(bare_ones(model).items()))
    shapes = {"w1_a": (len(scale), 1), "w1_b": (1, 1), "w2_a": (len(scale), 1), "w2_b": (1, 1)}
    state = {f"{name}.hada_{what}": torch.ones(shape) for what, shape in shapes.items()}
    assert "which is not a linear layer, as if it were one" in refused(tmp_path, model, state)


# ---- compared with PEFT -------------------------------------------------------------------------


def test_lokr_matches_peft(tmp_path: Path, model):
    """Its scale is by the stated rank, as its factors do not all have one."""
    peft = pytest.importorskip("peft")
    settings = peft.LoKrConfig(
        r=3,
        alpha=5,
        decompose_both=True,
        decompose_factor=8,
        target_modules=sorted({THEIRS[name] for name in linears(model)}),
        alpha_pattern={"to_q": 11},
        rank_pattern={"to_k": 2, "ff.up": 64},
        init_weights=False,
    )
    torch.manual_seed(5)
    other = peft.get_peft_model(reference(model), settings)
    other.save_pretrained(tmp_path)

    adapter = read_lora(tmp_path, model)

    assert set(adapter.layers) == set(linears(model)) and not adapter.unmatched
    assert {each.scale for each in adapter.layers.values()} == {5 / 3, 11 / 3, 5 / 2, 5 / 64}
    assert relative_error(velocity(model, (adapter, 1)), answer_of(other)) < 1e-5
    assert relative_error(velocity(model), answer_of(other)) > 0.01


def test_loha_matches_peft(tmp_path: Path, model):
    """On diffusers' network with the same weights, from the folder that PEFT saves; one layer has its own alpha."""
    peft = pytest.importorskip("peft")
    settings = peft.LoHaConfig(
        r=3,
        alpha=5,
        target_modules=sorted({THEIRS[name] for name in linears(model)}),
        alpha_pattern={"transformer_blocks.1.attn.to_q": 11},
        init_weights=False,  # otherwise they are zero
    )
    torch.manual_seed(5)
    other = peft.get_peft_model(reference(model), settings)
    other.save_pretrained(tmp_path)

    adapter = read_lora(tmp_path, model)

    assert set(adapter.layers) == set(linears(model)) and not adapter.unmatched
    assert {each.scale for each in adapter.layers.values()} == {5 / 3, 11 / 3}
    assert relative_error(velocity(model, (adapter, 1)), answer_of(other)) < 1e-5
    assert relative_error(velocity(model), answer_of(other)) > 0.01
