"""Adapters beyond plain low-rank pairs: full matrices, biases, Kronecker products, norms, fused QKV."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from test_dit import random_model, relative_error
from test_lora import (
    LAYOUTS,
    THEIRS,
    TINY,
    Pairs,
    bare_ones,
    dense,
    flat,
    kohya,
    linears,
    native,
    pair,
    random_pairs,
    refused,
    velocity,
    write,
)
from torch import Tensor

from model.checkpoint import save
from model.dit import Krea2
from model.errors import K2Error
from model.layouts import diffusers_names, load_dit
from model.lora import Adapter, applied
from model.lora_match import read_lora


@pytest.fixture(scope="module")
def model() -> Krea2:
    return random_model(TINY)


@pytest.fixture(scope="module")
def pairs(model) -> Pairs:
    return random_pairs(model)


@pytest.fixture
def adapter(tmp_path, model, pairs) -> Adapter:
    return read_lora(write(tmp_path, LAYOUTS["ComfyUI"](pairs)), model)


# ---- full matrices ------------------------------------------------------------------------------


def differences(model: Krea2) -> dict[str, Tensor]:
    """A full matrix for every linear layer, and a difference for its bias where it has one."""
    generator = torch.Generator().manual_seed(3)
    found = {}
    for name, layer in linears(model).items():
        found[f"{name}.diff"] = torch.randn(layer.weight.shape, generator=generator) * layer.in_features**-0.5
        if layer.bias is not None:
            found[f"{name}.diff_b"] = torch.randn(layer.bias.shape, generator=generator)
    return found


def with_differences(model: Krea2, weight: float, found: dict[str, Tensor]) -> Krea2:
    state = model.state_dict()
    for name, tensor in found.items():
        own = name.replace(".diff_b", ".bias").replace(".diff", ".weight")
        state[own] = (state[own].double() + weight * tensor.double()).float()
    changed = Krea2(model.config).eval().requires_grad_(False)
    changed.load_state_dict(state)
    return changed


@pytest.mark.parametrize(
    "called",
    [
        lambda name: f"diffusion_model.{name}",
        lambda name: "transformer." + THEIRS[name],
        lambda name: "lora_unet_" + flat(name),
    ],
    ids=["ComfyUI", "diffusers", "kohya"],
)
def test_full_matrices_and_biases_are_added_as_is(tmp_path, model, called):
    found = differences(model)
    state = {f"{called(name)}.{what}": t for key, t in found.items() for name, _, what in [key.rpartition(".")]}
    adapter = read_lora(write(tmp_path, state), model)

    assert set(adapter.layers) == set(linears(model)) and not adapter.unmatched
    for weight in (1.0, -0.5):
        expected = velocity(with_differences(model, weight, found))
        assert relative_error(velocity(model, (adapter, weight)), expected) < 1e-5
    assert torch.equal(velocity(model, (adapter, 0)), velocity(model))


def test_text_fusion_projector_alone(tmp_path, model):
    """The widespread tiny files of a single row: how much each layer of the text encoder counts."""
    row = torch.randn(1, TINY.text_taps)
    adapter = read_lora(write(tmp_path, {"diffusion_model.txtfusion.projector.diff": row}), model)

    assert adapter.report(4.0)["matched"] == adapter.report(4.0)["modules"] == 1
    expected = velocity(with_differences(model, 4.0, {"txtfusion.projector.diff": row}))
    assert relative_error(velocity(model, (adapter, 4.0)), expected) < 1e-5


def test_full_matrices_combine_with_pairs(tmp_path, model, pairs):
    """In one file, and applied on top of one another."""
    row, bias = torch.randn(1, TINY.text_taps), torch.randn(TINY.width)
    few = {name: pair for name, pair in pairs.items() if name != "txtfusion.projector"}
    whole = {"txtfusion.projector.diff": row, "first.diff_b": bias}
    both = read_lora(write(tmp_path, LAYOUTS["bare"](few) | whole), model)
    apart = [
        read_lora(write(tmp_path, state, f"{index}.safetensors"), model)
        for index, state in enumerate([LAYOUTS["kohya"](pairs), {"first.diff_b": 2 * bias}])
    ]

    expected = velocity(dense(with_differences(model, 1, whole), (few, 1)))
    assert relative_error(velocity(model, (both, 1)), expected) < 1e-5
    expected = velocity(
        dense(with_differences(model, 0.5, whole | {"first.diff_b": 3 * bias}), (few, 0.5), (pairs, -1))
    )
    assert relative_error(velocity(model, (both, 0.5), (apart[0], -1), (apart[1], 0.5)), expected) < 1e-5


def in_their_shape(name: str, tensor: Tensor) -> Tensor:
    return tensor.view(6, -1) if name.endswith(".mod.lin") else tensor


@pytest.mark.parametrize("called", ["native", "diffusers", "kohya"])
def test_parameters_outside_linear_layers_are_changed(tmp_path, model, called):
    """As in full fine-tunes published as differences, and in Turbo's distillations."""
    found = {name: torch.randn(each.shape) * 0.3 for name, each in bare_ones(model).items()}
    theirs = diffusers_names(TINY.blocks)
    state = {
        "native": {f"diffusion_model.{name}.diff": tensor for name, tensor in found.items()},
        "diffusers": {
            f"transformer.{theirs[name].removesuffix('.weight')}.diff": in_their_shape(name, t)
            for name, t in found.items()
        },
        "kohya": {f"lora_unet_{flat(name)}.diff": tensor for name, tensor in found.items()},
    }[called]
    adapter = read_lora(write(tmp_path, state), model)
    before, weights = velocity(model), {name: id(each) for name, each in model.named_parameters()}

    assert set(adapter.layers) == set(found) and not adapter.unmatched
    changed = dense(model)
    changed.load_state_dict({n: t + 0.5 * found[n] if n in found else t for n, t in model.state_dict().items()})
    assert relative_error(velocity(model, (adapter, 0.5)), velocity(changed)) < 1e-5
    with applied(model, [(adapter, 0.2)]):  # one nested inside the other
        assert relative_error(velocity(model, (adapter, 0.3)), velocity(changed)) < 1e-5
    assert torch.equal(velocity(model), before)
    assert {name: id(each) for name, each in model.named_parameters()} == weights


def test_pairs_for_parameters_outside_linear_layers(tmp_path, model):
    """The last layer's modulation is two rows, so rank 2 is its maximum. A block's is one row, given by a product."""
    last = torch.randn(2, 2), torch.randn(2, TINY.width)
    block = torch.randn(6, 3), torch.randn(3, TINY.width)
    state = {}
    for name, (up, down) in {"last.modulation.lin": last, "blocks.1.mod.lin": block}.items():
        state |= {f"diffusion_model.{name}.lora_B.weight": up, f"diffusion_model.{name}.lora_A.weight": down}
    state["diffusion_model.blocks.1.mod.lin.alpha"] = torch.tensor(1.5)
    adapter = read_lora(write(tmp_path, state), model)

    changed, own = dense(model), model.state_dict()
    own["last.modulation.lin"] = own["last.modulation.lin"] + last[0] @ last[1]
    own["blocks.1.mod.lin"] = own["blocks.1.mod.lin"] + 0.5 * (block[0] @ block[1]).flatten()
    changed.load_state_dict(own)
    assert relative_error(velocity(model, (adapter, 1)), velocity(changed)) < 1e-5


def test_failed_change_leaves_no_trace(tmp_path, model, monkeypatch):
    found = {f"{name}.diff": torch.ones(each.shape) for name, each in bare_ones(model).items()}
    adapter = read_lora(write(tmp_path, found), model)
    before, weights = velocity(model), {name: id(each) for name, each in model.named_parameters()}

    def fail(*given: object) -> None:
        raise RuntimeError

    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(model.blocks[1].mlp, "forward", fail)
        velocity(model, (adapter, 1))
    assert torch.equal(velocity(model), before)
    assert {name: id(each) for name, each in model.named_parameters()} == weights


def test_streamed_network_changes_like_a_resident_one(tmp_path, model, pairs):
    found = {f"{name}.diff": torch.randn(each.shape) * 0.3 for name, each in bare_ones(model).items()}
    path = write(tmp_path, LAYOUTS["bare"](pairs) | found)
    save(tmp_path / "model.safetensors", model.state_dict(), {})
    resident, streamed = (load_dit(tmp_path / "model.safetensors", streamed=each)[0] for each in (False, True))
    answers = [velocity(each, (read_lora(path, each), 0.7)) for each in (resident, streamed)]
    assert torch.equal(*answers) and not torch.equal(answers[0], velocity(model))
    assert torch.equal(velocity(streamed), velocity(resident))
    assert {each.device.type for each in streamed.blocks.parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("state", "what"),
    [
        ({"last.modulation.lin.diff": (64, 2)}, "another size: its change of last.modulation.lin is [64, 2]"),
        ({"blocks.0.prenorm.scale.diff": (65,)}, "another size"),
        ({"last.modulation.lin.lora_A": (2, 64), "last.modulation.lin.lora_B": (3, 2)}, "another size"),
        ({"last.modulation.lin.lora_A": (2, 64), "last.modulation.lin.lora_B": (2, 3)}, "is damaged"),
        ({"last.modulation.lin.diff_b": (64,)}, "which is not a linear layer, as if it were one"),
        ({"last.modulation.lin.lokr_w1": (2, 2), "last.modulation.lin.lokr_w2": (1, 32)}, "as if it were one"),
        ({"blocks.0.mod.lin.lora_A": (1, 1 << 18), "blocks.0.mod.lin.lora_B": (1 << 18, 1)}, "another size"),
    ],
)
def test_invalid_changes_outside_linear_layers_are_refused(tmp_path, model, state, what):
    assert what in refused(tmp_path, model, {name: torch.ones(shape) for name, shape in state.items()})


def test_unmatched_parts_are_named(tmp_path, model):
    """A bias for a layer without one, and a difference for a norm that does not exist."""
    state = {
        "diffusion_model.first.diff": torch.zeros(TINY.width, 16),
        "diffusion_model.blocks.0.norm9.diff": torch.ones(4),
    }
    state |= {f"diffusion_model.blocks.{i}.attn.wq.diff_b": torch.ones(TINY.width) for i in range(2)}
    adapter = read_lora(write(tmp_path, state), model)
    assert set(adapter.layers) == {"first"} and adapter.unmatched == (
        "diffusion_model.blocks.0.norm9",
        "diffusion_model.blocks.0.attn.wq.diff_b",
        "diffusion_model.blocks.1.attn.wq.diff_b",
    )
    with pytest.raises(K2Error, match="matches no layer"):
        read_lora(write(tmp_path, {"blocks.0.attn.wq.diff_b": torch.ones(TINY.width)}), model)


@pytest.mark.parametrize(
    ("key", "shape"),
    [("first.diff", (64, 8)), ("first.diff", (16, 64)), ("first.diff_b", (65,)), ("txtfusion.projector.diff", (3,))],
)
def test_full_matrices_of_another_size_are_refused(tmp_path, model, key, shape):
    message = refused(tmp_path, model, {key: torch.ones(shape)})
    assert f"another size: its {key} is {list(shape)}" in message


# ---- Kronecker products -------------------------------------------------------------------------


def factors(
    model: Krea2, halves: str, layers: dict[str, tuple[int, int]] | None = None, most: int = 4
) -> dict[str, dict[str, Tensor]]:
    """LoKr factors for every linear layer (or for the shapes given), the left one with 4 rows at most.

    halves: which of the two factors are themselves of rank 2.
    """
    generator = torch.Generator().manual_seed(4)
    shapes = layers or {name: tuple(layer.weight.shape) for name, layer in linears(model).items()}
    found = {}
    for name, (out, inward) in shapes.items():
        a, b = (next(f for f in range(most, 0, -1) if side % f == 0) for side in (out, inward))
        part = {}
        for what, (high, wide) in {"w1": (a, b), "w2": (out // a, inward // b)}.items():
            if what in halves:
                part[f"lokr_{what}_a"] = torch.randn(high, 2, generator=generator)
                part[f"lokr_{what}_b"] = torch.randn(2, wide, generator=generator) * 0.3
            else:
                part[f"lokr_{what}"] = torch.randn(high, wide, generator=generator) * wide**-0.5
        found[name] = part
    return found


def product(part: dict[str, Tensor]) -> Tensor:
    """LyCORIS's definition, in double precision and without a scale."""
    left, right = (
        (part[f"lokr_{what}"] if f"lokr_{what}" in part else part[f"lokr_{what}_a"] @ part[f"lokr_{what}_b"]).double()
        for what in ("w1", "w2")
    )
    return torch.kron(left, right)


def written(found: dict[str, dict[str, Tensor]], called: Callable[[str], str], alpha: float) -> dict[str, Tensor]:
    state = {f"{called(name)}.{what}": tensor for name, part in found.items() for what, tensor in part.items()}
    return state | {f"{called(name)}.alpha": torch.tensor(alpha) for name in found}


@pytest.mark.parametrize(("halves", "scale"), [("", 1.0), ("w2", 3.0), ("w1", 3.0), ("w1 w2", 3.0)])
@pytest.mark.parametrize(
    "called",
    [lambda name: f"diffusion_model.{name}", lambda name: "lycoris_" + flat(THEIRS[name])],
    ids=["ai-toolkit", "LyCORIS"],
)
def test_kronecker_products(tmp_path, model, halves, scale, called):
    """The scale is alpha over the rank; if both factors are full, there is no rank and alpha means nothing."""
    found = factors(model, halves)
    adapter = read_lora(write(tmp_path, written(found, called, alpha=6.0)), model)

    assert set(adapter.layers) == set(linears(model)) and not adapter.unmatched
    for weight in (0.5, -1.0):
        expected = {f"{name}.diff": scale * product(part) for name, part in found.items()}
        changed = velocity(with_differences(model, weight, expected))
        assert relative_error(velocity(model, (adapter, weight)), changed) < 1e-4
    assert torch.equal(velocity(model, (adapter, 0)), velocity(model))


@torch.no_grad()
def test_kronecker_product_equals_the_dense_one(tmp_path, model):
    found = {"blocks.0.mlp.up": factors(model, "w2")["blocks.0.mlp.up"]}
    adapter = read_lora(write(tmp_path, written(found, native, alpha=2.0)), model)
    layer, x = model.blocks[0].mlp.up, torch.randn(3, 5, TINY.width)
    before = layer(x)
    with applied(model, [(adapter, 0.7)]):
        delta = layer(x) - before
    expected = 0.7 * x.double() @ product(found["blocks.0.mlp.up"]).T
    assert relative_error(delta.double(), expected) < 1e-5 and torch.equal(layer(x), before)


def test_kronecker_products_combine_with_pairs(tmp_path, model, pairs, adapter):
    found = factors(model, "w2")
    bias = torch.randn(TINY.width)
    state = written(found, native, alpha=2.0) | {"first.diff_b": bias}
    other = read_lora(write(tmp_path, state, "lokr.safetensors"), model)
    whole = {f"{name}.diff": product(part) for name, part in found.items()} | {"first.diff_b": bias}

    expected = velocity(dense(with_differences(model, 0.3, whole), (pairs, -0.6)))
    both = velocity(model, (other, 0.3), (adapter, -0.6))
    assert relative_error(both, expected) < 1e-4
    assert torch.equal(both, velocity(model, (adapter, -0.6), (other, 0.3)))


@pytest.mark.parametrize("halves", ["", "w2"])
def test_fused_qkv_as_one_kronecker_product(tmp_path, model, halves):
    """Its rows need not split where a factor's do: SimpleTuner's 9216 of 6144, 1536 and 1536 do not."""
    sizes = [getattr(model.blocks[0].attn, each).weight.shape[0] for each in ("wq", "wk", "wv")]
    found = factors(model, halves, {"transformer_blocks.0.attn.to_qkv": (sum(sizes), TINY.width)}, most=2)
    part = found["transformer_blocks.0.attn.to_qkv"]
    assert (sizes[0] + sizes[1]) % len(part.get("lokr_w2", part.get("lokr_w2_a")))
    untrained = {k: torch.zeros_like(t) if "w2" in k else t for k, t in factors(model, "")["blocks.0.attn.wk"].items()}
    state = written(found | {"transformer_blocks.0.attn.to_k": untrained}, lambda name: f"transformer.{name}", 2.0)
    adapter = read_lora(write(tmp_path, state), model)

    rows = product(part).split(sizes)
    expected = {f"blocks.0.attn.{each}.diff": r for each, r in zip(("wq", "wk", "wv"), rows, strict=True)}
    assert relative_error(velocity(model, (adapter, 1)), velocity(with_differences(model, 1, expected))) < 1e-4
    short = {key: tensor[:-1] if key.endswith(("w2", "w2_a")) else tensor for key, tensor in state.items()}
    assert "another size" in refused(tmp_path, model, short)


@pytest.mark.parametrize(
    ("shapes", "what"),
    [
        ({"w1": (4, 4), "w2": (16, 8)}, "maps 32 numbers to 64, this network's 64 to 64"),
        ({"w1": (4, 4), "w2_a": (16, 2), "w2_b": (3, 16)}, "is damaged"),
        ({"w1": (4, 4), "w2": (16, 16, 1, 1)}, "is damaged"),
        ({"w1": (4, 4), "w2_a": (16, 0), "w2_b": (0, 16)}, "is damaged"),
        ({"w1": (16,), "w2": (16, 16)}, "is damaged"),
        ({"w1": (), "w2": (16, 16)}, "not make up a low-rank pair or product: blocks.0.attn.wq.lokr_w1"),
        ({"w1_a": (1 << 20, 1), "w1_b": (1, 1 << 20), "w2": (1, 1)}, "another size"),
    ],
    ids=["size", "two ranks", "a convolution", "no rank", "one dim", "no dims", "a bomb"],
)
def test_invalid_factors_are_refused(tmp_path, model, shapes, what):
    state = {f"blocks.0.attn.wq.lokr_{name}": torch.ones(shape) for name, shape in shapes.items()}
    assert what in refused(tmp_path, model, state)


# ---- fused queries, keys and values -------------------------------------------------------------


def fuse(pairs: Pairs, stem: str) -> Pairs:
    """One attention's queries, keys and values fused into one pair, as exact as the three low-rank pairs."""
    three = [pairs[f"{stem}.{each}"] for each in ("wq", "wk", "wv")]
    down = torch.cat([down for down, _ in three])
    return {f"{stem}.qkv": (down, torch.block_diag(*(up for _, up in three)))}


@pytest.mark.parametrize("prefix", ["diffusion_model.", "lycoris_"])
@pytest.mark.parametrize("beside", ["nothing", "untrained"])
def test_fused_qkv(tmp_path, model, pairs, prefix, beside):
    three = {
        name: pair for name, pair in pairs.items() if name.startswith("blocks") and name[-2:] in ("wq", "wk", "wv")
    }
    whole = fuse(three, "blocks.0.attn") | fuse(three, "blocks.1.attn")
    names = THEIRS | {f"blocks.{i}.attn.qkv": f"transformer_blocks.{i}.attn.to_qkv" for i in range(2)}
    called = (lambda name: flat(names[name])) if prefix == "lycoris_" else names.__getitem__
    state = kohya(prefix, called)(whole)
    if beside == "untrained":
        state |= kohya(prefix, called)({name: (down, torch.zeros_like(up)) for name, (down, up) in three.items()})
    adapter = read_lora(write(tmp_path, state), model)

    assert set(adapter.layers) == set(three) and not adapter.unmatched
    assert relative_error(velocity(model, (adapter, 1)), velocity(dense(model, (three, 1)))) < 1e-5

    trained = kohya(prefix, called)({"blocks.1.attn.wk": three["blocks.1.attn.wk"]})
    assert "twice, on its own and in" in refused(tmp_path, model, state | trained)


def test_fused_qkv_of_another_size_is_refused(tmp_path, model):
    state = pair("transformer_blocks.0.attn.to_qkv", width=64)
    assert "another size" in refused(tmp_path, model, state)


def test_alpha_of_fused_qkv(tmp_path, model, pairs):
    stated = json.dumps({"lora_alpha": 1, "alpha_pattern": {"attn.to_qkv": 6}})
    three = {name: pair for name, pair in pairs.items() if name.startswith("blocks.0.attn.w")}
    (whole,) = fuse(three, "blocks.0.attn").values()
    state = {f"transformer_blocks.0.attn.to_qkv.lora_{h}.weight": t for h, t in zip("AB", whole, strict=True)}
    layers = read_lora(write(tmp_path, state, lora_adapter_metadata=stated), model).layers
    assert {each.scale for each in layers.values()} == {6 / len(whole[0])} and len(layers) == 3


@pytest.mark.parametrize("rank", [0, -1, None, "many", float("inf")])
def test_peft_lokr_without_a_rank(tmp_path, model, rank):
    """PEFT divides alpha by the rank even if both factors are full."""
    state = written({"blocks.0.attn.wq": factors(model, "")["blocks.0.attn.wq"]}, native, 1.0)
    del state["blocks.0.attn.wq.alpha"]
    stated = {"peft_type": "LOKR", "alpha": 3, "r": rank}
    assert "settings that cannot be read" in refused(tmp_path, model, state, lora_adapter_metadata=json.dumps(stated))
    stated = {"peft_type": "LOKR", "alpha": 3, "r": 2}
    layers = read_lora(write(tmp_path, state, lora_adapter_metadata=json.dumps(stated)), model).layers
    assert layers["blocks.0.attn.wq"].scale == 1.5


@pytest.mark.parametrize("kind", ["PeftType.OFT", "ADALORA", 3])
def test_peft_adapters_of_other_kinds_are_refused(tmp_path, model, kind):
    state = written({"blocks.0.attn.wq": factors(model, "")["blocks.0.attn.wq"]}, native, 1.0)
    assert "is a PEFT" in refused(tmp_path, model, state, lora_adapter_metadata=json.dumps({"peft_type": kind}))
    for plain in ("LORA", "PeftType.LORA", None):
        stated = json.dumps({"transformer.peft_type": plain})
        read_lora(write(tmp_path, pair("blocks.0.attn.wq", width=64), lora_adapter_metadata=stated), model)
