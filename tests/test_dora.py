"""DoRA: its definition in double precision, by rows and by columns, over any product and weights; parity with PEFT."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_dit import inputs, random_model, reference, relative_error
from test_loha import answer_of, called, hadamard, hadamard_factors
from test_lora import FOX, LAYOUTS, THEIRS, TINY, dense, linears, pair, random_pairs, refused, velocity, write
from test_lora import pipeline as pipeline
from test_lora_kinds import factors, product, with_differences
from test_low_bit import layer as few_bit_layer
from tiny import tiny, tiny_box  # noqa: F401
from torch import Tensor, nn

from model import adapter_path
from model.adapter_path import Dora, LowRank, dora_gain
from model.checkpoint import save
from model.dit import Krea2
from model.layouts import load_dit
from model.lora import applied
from model.lora_match import read_lora
from model.low_bit import FewBitLinear, dequantised_state, few_bit_layers
from model.spec import Lora

FORMS = {"rows": 1, "columns": 0}  # the dimension along which the norm is taken
Matrices = dict[str, Tensor]  # native layer -> [out, in]


@pytest.fixture(scope="module")
def model() -> Krea2:
    return random_model(TINY)


def magnitudes(model: Krea2, form: str, seed: int = 0) -> Matrices:
    """Magnitudes for every linear layer, up to half more or less than its own norms: [out, 1] or [1, in]."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, layer in linears(model).items():
        norm = layer.weight.norm(dim=FORMS[form], keepdim=True)
        found[name] = norm * (0.5 + torch.rand(norm.shape, generator=generator))
    return found


def decomposed(weights: Matrices, updates: Matrices, lengths: Matrices, form: str) -> dict[str, Tensor]:
    """The definition, as the difference added to each matrix: m (W + U) / ‖W + U‖ − W."""
    changes = {}
    for name, length in lengths.items():
        weight = weights[f"{name}.weight"].double()
        changed = weight + updates[name].double()
        changed = length.double() * changed / changed.norm(dim=FORMS[form], keepdim=True)
        changes[f"{name}.diff"] = changed - weight
    return changes


def lora(model: Krea2, layout: str, form: str, seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A DoRA in a trainer's layout, and what its definition adds to each matrix at weight 1."""
    pairs, lengths = random_pairs(model, seed), magnitudes(model, form, seed)
    state = LAYOUTS[layout](pairs)
    for name, length in lengths.items():
        if "down" in next(iter(state)):
            state[called(layout, name, "dora_scale").removesuffix(".weight")] = length
        else:  # PEFT's is a vector, and it has none for columns
            state[called(layout, name, "lora_magnitude_vector")] = length.flatten() if form == "rows" else length
    updates = {name: up.double() @ down.double() for name, (down, up) in pairs.items()}
    return state, decomposed(model.state_dict(), updates, lengths, form)


# ---- the definition -----------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_matches_the_definition(tmp_path, model, layout, form):
    state, changes = lora(model, layout, form)
    adapter = read_lora(write(tmp_path, state), model)

    assert set(adapter.layers) == set(linears(model)) and not adapter.unmatched
    assert adapter.report(1)["matched"] == adapter.report(1)["modules"] == len(changes)
    expected = velocity(with_differences(model, 1, changes))
    assert relative_error(velocity(model, (adapter, 1)), expected) < 1e-4


def test_ai_toolkit_magnitudes(tmp_path, model):
    """Its norm omits alpha. If alpha is the rank or not stated, that is PEFT's norm; otherwise it is another one."""
    state, changes = lora(model, "ComfyUI", "rows")
    state = {name.replace("lora_magnitude_vector.weight", "magnitude"): tensor for name, tensor in state.items()}
    module = "diffusion_model.blocks.0.attn.wq"
    rank = len(state[f"{module}.lora_A.weight"])
    expected = velocity(with_differences(model, 1, changes))
    for stated in ({}, {f"{module}.alpha": torch.tensor(float(rank))}):
        adapter = read_lora(write(tmp_path, state | stated), model)
        assert set(adapter.layers) == set(linears(model)) and not adapter.unmatched
        assert relative_error(velocity(model, (adapter, 1)), expected) < 1e-4
    scaled = state | {f"{module}.alpha": torch.tensor(rank / 2)}
    assert "a DoRA whose norm omits alpha" in refused(tmp_path, model, scaled)


def test_norms_are_taken_once_not_for_every_batch(tmp_path, model, monkeypatch):
    state, _ = lora(model, "PEFT", "rows")
    adapter = read_lora(write(tmp_path, state), model)
    taken: list[nn.Linear] = []
    monkeypatch.setattr(
        adapter_path, "dora_gain", lambda layer, update: taken.append(layer) or dora_gain(layer, update)
    )

    first, half, again = (velocity(model, (adapter, weight)) for weight in (1.0, 0.5, 1.0))

    assert len(taken) == len(set(taken)) == len(adapter.layers)
    assert torch.equal(first, again) and not torch.equal(first, half)


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("weight", [-2.0, -0.3, 0.0, 0.5, 2.0])
def test_weight_scales_the_difference(tmp_path, model, form, weight):
    """Layer by layer; at weight 0, and after removal, the layer's answer is unchanged to the bit."""
    state, changes = lora(model, "LyCORIS", form)
    adapter = read_lora(write(tmp_path, state), model)
    for name, layer in linears(model).items():
        x = torch.randn(2, 5, layer.in_features)
        before = layer(x)
        with applied(model, [(adapter, weight)]):
            during = layer(x)
        expected = weight * x.double() @ changes[f"{name}.diff"].T
        if weight:
            assert relative_error((during - before).double(), expected) < 1e-4, name
        else:
            assert torch.equal(during, before)
        assert torch.equal(layer(x), before)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["LoHa", "LoKr"])
def test_over_loha_and_lokr_products(tmp_path, model, form, kind):
    """LyCORIS decomposes whatever it trains."""
    found = hadamard_factors(model) if kind == "LoHa" else factors(model, "w2")
    lengths = magnitudes(model, form)
    state = {f"{name}.{what}": tensor for name, part in found.items() for what, tensor in part.items()}
    state |= {f"{name}.dora_scale": length for name, length in lengths.items()}
    state |= {f"{name}.alpha": torch.tensor(3.0) for name in found}
    adapter = read_lora(write(tmp_path, state), model)

    updates = {name: 1.5 * (hadamard(part) if kind == "LoHa" else product(part)) for name, part in found.items()}
    changes = decomposed(model.state_dict(), updates, lengths, form)
    for weight in (1.0, -0.5):
        expected = velocity(with_differences(model, weight, changes))
        assert relative_error(velocity(model, (adapter, weight)), expected) < 1e-4


@pytest.mark.parametrize("nested", [False, True])
def test_several_adapters_in_any_order(tmp_path, model, nested):
    """The norm is that of the original matrix plus the DoRA's own update, whatever else is applied to the layer."""
    rows, by_rows = lora(model, "kohya", "rows", seed=1)
    columns, by_columns = lora(model, "OneTrainer", "columns", seed=2)
    pairs, bias = random_pairs(model, seed=3), torch.randn(TINY.width)
    rows["lora_unet_first.diff_b"] = bias
    states = {"rows": (rows, 0.7), "columns": (columns, -0.4), "plain": (LAYOUTS["bare"](pairs), 0.5)}
    weighted = [
        (read_lora(write(tmp_path, state, f"{name}.safetensors"), model), weight)
        for name, (state, weight) in states.items()
    ]
    expected = with_differences(model, 0.7, by_rows | {"first.diff_b": bias})
    expected = with_differences(expected, -0.4, by_columns)
    expected = dense(expected, (pairs, 0.5))

    answers = []
    for order in ((0, 1, 2), (2, 1, 0), (1, 0, 2)):
        ordered = [weighted[index] for index in order]
        if nested:
            with applied(model, ordered[:1]), applied(model, ordered[1:2]):
                answers.append(velocity(model, ordered[2]))
        else:
            answers.append(velocity(model, *ordered))
        assert relative_error(answers[-1], velocity(expected)) < 1e-4
    assert nested or all(torch.equal(answers[0], each) for each in answers)


def test_fused_queries_keys_and_values(tmp_path, model):
    """Rows split as the matrices do. A norm of one column across three matrices cannot be split."""
    names = [f"blocks.0.attn.{each}" for each in ("wq", "wk", "wv")]
    whole = torch.cat([model.get_submodule(name).weight for name in names])
    down, up, lengths = torch.randn(4, TINY.width) * 0.1, torch.randn(len(whole), 4), torch.rand(len(whole), 1) + 0.5
    module = "transformer.transformer_blocks.0.attn.to_qkv"
    state = {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}
    for length in (lengths, lengths.flatten()):
        adapter = read_lora(write(tmp_path, state | {f"{module}.lora_magnitude_vector": length}), model)

        (change,) = decomposed({"qkv.weight": whole}, {"qkv": up @ down}, {"qkv": lengths}, "rows").values()
        sizes = [len(model.get_submodule(name).weight) for name in names]
        expected = {f"{name}.diff": part for name, part in zip(names, change.split(sizes), strict=True)}
        assert relative_error(velocity(model, (adapter, 1)), velocity(with_differences(model, 1, expected))) < 1e-4
    message = refused(tmp_path, model, state | {f"{module}.dora_scale": torch.ones(1, TINY.width)})
    assert "column magnitudes (DoRA) that three layers share" in message
    beside, out = module.replace("to_qkv", "to_k"), sizes[1]
    state |= {f"{beside}.lora_A.weight": torch.ones(1, TINY.width), f"{beside}.lora_B.weight": torch.zeros(out, 1)}
    own = model.get_submodule(names[1]).weight.norm(dim=1)
    state |= {f"{module}.lora_magnitude_vector": lengths.flatten(), f"{beside}.lora_magnitude_vector": own}
    adapter = read_lora(write(tmp_path, state), model)  # no effect, nor has its magnitude, which is the layer's own
    assert relative_error(velocity(model, (adapter, 1)), velocity(with_differences(model, 1, expected))) < 1e-4
    state[f"{beside}.lora_B.weight"] = torch.ones(out, 1)
    assert "twice, on its own and in" in refused(tmp_path, model, state)


@pytest.mark.parametrize("form", FORMS)
def test_magnitude_beside_a_fused_layer(tmp_path, model, form):
    """The layer's own norm changes nothing, nor does that of the same layer in few bits or distilled. Any other was
    trained, and would be lost silently."""
    layer, module = model.blocks[0].attn.wv, "transformer_blocks.0.attn.to_qkv"
    beside, out, own = module.replace("qkv", "v"), layer.out_features, layer.weight.norm(dim=FORMS[form], keepdim=True)
    rows = sum(getattr(model.blocks[0].attn, each).out_features for each in ("wq", "wk", "wv"))
    fused = {"lora_A.weight": torch.randn(2, TINY.width), "lora_B.weight": torch.randn(rows, 2)}
    nothing = {"lora_A.weight": torch.ones(1, TINY.width), "lora_B.weight": torch.zeros(out, 1)}
    state = {f"{module}.{what}": tensor for what, tensor in fused.items()}
    alone = velocity(model, (read_lora(write(tmp_path, state), model), 1))
    state |= {f"{beside}.{what}": tensor for what, tensor in nothing.items()}
    for length in (own, own.bfloat16(), own * (1 + 0.05 * torch.randn_like(own))):
        adapter = read_lora(write(tmp_path, state | {f"{beside}.dora_scale": length}), model)
        assert torch.equal(velocity(model, (adapter, 1)), alone)
    for length in (own * 5, own * 0.7, torch.zeros_like(own)):
        message = refused(tmp_path, model, state | {f"{beside}.dora_scale": length})
        assert f"holds {beside} twice, on its own and in" in message
    assert "another size" in refused(tmp_path, model, state | {f"{beside}.dora_scale": torch.ones(out + 1, 1)})

    for each in ("int8", "int4"):
        save(tmp_path / "wide.safetensors", model.state_dict(), {})
        small, _ = load_dit(tmp_path / "wide.safetensors", precision=each)
        read_lora(write(tmp_path, state | {f"{beside}.dora_scale": own}), small)


@pytest.mark.parametrize("precision", ["native", "int8"])
def test_magnitude_beside_a_fused_layer_that_is_streamed(tmp_path, model, precision):
    """Its block is read for the comparison, and is streamed as before afterwards."""
    layer, module = model.blocks[1].attn.wv, "transformer_blocks.1.attn.to_qkv"
    own = layer.weight.norm(dim=1, keepdim=True)
    rows = sum(getattr(model.blocks[1].attn, each).out_features for each in ("wq", "wk", "wv"))
    state = {f"{module}.lora_A.weight": torch.randn(2, TINY.width), f"{module}.lora_B.weight": torch.randn(rows, 2)}
    beside = module.replace("qkv", "v")
    state |= {f"{beside}.lora_A.weight": torch.ones(1, TINY.width), f"{beside}.lora_B.weight": torch.zeros(len(own), 1)}
    save(tmp_path / "wide.safetensors", model.state_dict(), {})
    held, streamed = (
        load_dit(tmp_path / "wide.safetensors", streamed=each, precision=precision)[0] for each in (False, True)
    )
    before = velocity(held)
    assert torch.equal(velocity(streamed), before)  # its first block is being read again already

    messages = [refused(tmp_path, each, state | {f"{beside}.dora_scale": own * 0.7}) for each in (held, streamed)]
    path = write(tmp_path, state | {f"{beside}.dora_scale": own})
    answers = [velocity(each, (read_lora(path, each), 1)) for each in (held, streamed)]

    assert messages[0] == messages[1] and "twice, on its own and in" in messages[0]
    assert torch.equal(*answers) and not torch.equal(answers[0], before)
    assert {each.device.type for each in streamed.blocks.parameters()} == {"meta"}
    assert torch.equal(velocity(streamed), before)


def test_magnitude_trained_alone(tmp_path, model):
    """Over a product of zeros, it still changes the layer if the layer has no other update."""
    layer = model.blocks[0].attn.wk
    out, lengths = layer.out_features, torch.rand(layer.out_features, 1) + 0.5
    nothing = {"lora_A.weight": torch.ones(1, TINY.width), "lora_B.weight": torch.zeros(out, 1)}
    module = "transformer_blocks.0.attn.to_k"
    state = {f"{module}.{what}": tensor for what, tensor in nothing.items()} | {f"{module}.dora_scale": lengths}
    adapter = read_lora(write(tmp_path, state), model)

    expected = {"blocks.0.attn.wk.diff": layer.weight * (lengths / layer.weight.norm(dim=1, keepdim=True) - 1)}
    assert relative_error(velocity(model, (adapter, 1)), velocity(with_differences(model, 1, expected))) < 1e-4


def test_kronecker_product_over_fused_layers(tmp_path, model):
    """Each of the three layers takes its rows of the product, for its norm too."""
    names = [f"blocks.0.attn.{each}" for each in ("wq", "wk", "wv")]
    weights = [model.get_submodule(name).weight for name in names]
    whole, module = torch.cat(weights), "transformer_blocks.0.attn.to_qkv"
    (part,) = factors(model, "", {module: tuple(whole.shape)}, most=2).values()
    lengths = torch.rand(len(whole), 1) + 0.5
    state = {f"{module}.{what}": tensor for what, tensor in part.items()} | {f"{module}.dora_scale": lengths}
    adapter = read_lora(write(tmp_path, state), model)

    (change,) = decomposed({"qkv.weight": whole}, {"qkv": product(part)}, {"qkv": lengths}, "rows").values()
    expected = {f"{n}.diff": c for n, c in zip(names, change.split([len(w) for w in weights]), strict=True)}
    assert relative_error(velocity(model, (adapter, 1)), velocity(with_differences(model, 1, expected))) < 1e-4


# ---- weights in few bits, in bf16, streamed -----------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("precision", ["int8", "fp8", "int4"])
def test_over_weights_in_few_bits(tmp_path, model, monkeypatch, precision, form):
    """The norm is that of the dequantised matrix; the answer is exact if tokens are not rounded."""
    save(tmp_path / "wide.safetensors", model.state_dict(), {})
    small, _ = load_dit(tmp_path / "wide.safetensors", precision=precision)
    assert any(name.startswith("blocks.") for name in few_bit_layers(small))
    held = random_model(TINY)
    held.load_state_dict(dequantised_state(small, torch.float32))
    state, changes = lora(held, "kohya", form)
    adapter = read_lora(write(tmp_path, state), small)
    before, expected = velocity(small), velocity(with_differences(held, -0.5, changes))

    assert relative_error(velocity(small, (adapter, -0.5)), expected) < 0.05
    assert torch.equal(velocity(small, (adapter, 0)), before) and torch.equal(velocity(small), before)
    monkeypatch.setattr(FewBitLinear, "exact", True)
    assert relative_error(velocity(small, (adapter, -0.5)), expected) < 1e-4


@torch.no_grad()
def test_int8_product_runs_once_per_call(tmp_path, model, monkeypatch):
    """By rows, the layer's own answer is all that is needed of its matrix, once the norm is known."""
    save(tmp_path / "wide.safetensors", model.state_dict(), {})
    small, _ = load_dit(tmp_path / "wide.safetensors", precision="int8")
    adapter = read_lora(write(tmp_path, lora(model, "kohya", "rows")[0]), small)
    layer, x, calls = small.blocks[0].attn.wq, torch.randn(3, TINY.width), []
    forward = FewBitLinear.forward
    monkeypatch.setattr(FewBitLinear, "forward", lambda self, x: calls.append(self) or forward(self, x))
    with applied(small, [(adapter, 1)]):
        layer(x)
        monkeypatch.setattr("model.adapter_path.row_chunks", lambda layer: pytest.fail("its norm was taken twice"))
        layer(x)
    assert calls == [layer, layer]


def test_streamed_and_resident_networks_change_alike(tmp_path, model):
    path = write(tmp_path, lora(model, "PEFT", "rows")[0])
    save(tmp_path / "model.safetensors", model.state_dict(), {})
    for precision in ("native", "int8"):
        resident, streamed = (
            load_dit(tmp_path / "model.safetensors", streamed=each, precision=precision)[0] for each in (False, True)
        )
        answers = [velocity(each, (read_lora(path, each), 0.7)) for each in (resident, streamed)]
        assert torch.equal(*answers) and not torch.equal(answers[0], velocity(resident))
        assert torch.equal(velocity(streamed), velocity(resident))
        assert {each.device.type for each in streamed.blocks.parameters()} == {"meta"}


@torch.no_grad()
def test_in_half_precision(tmp_path, model):
    state, changes = lora(model, "ComfyUI", "rows")
    adapter, half = read_lora(write(tmp_path, state), model), random_model(TINY).bfloat16()
    tokens, sigma, embeds, grid = inputs(TINY)
    with applied(half, [(adapter, 1)]):
        ours = half(tokens.bfloat16(), sigma, embeds.bfloat16(), grid).float()
    assert relative_error(ours, velocity(with_differences(model, 1, changes))) < 0.05


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_small_magnitude_changes_survive_bf16(form):
    """In bf16, 1.001 rounds to 1."""
    layer, x = nn.Linear(64, 48, bias=False).bfloat16(), torch.randn(5, 64).bfloat16()
    length = 1.001 * layer.weight.float().norm(dim=FORMS[form], keepdim=True)
    dora = Dora(LowRank(torch.zeros(1, 64), torch.zeros(48, 1), magnitude=length), 1.0)
    expected = 0.001 * x.float() @ layer.weight.float().T
    assert relative_error(dora.difference(layer, x, layer(x)).float(), expected) < 0.01


@pytest.mark.parametrize("form", FORMS)
def test_norms_are_taken_in_parts(monkeypatch, form):
    """No whole matrix exists in fp32."""
    layer, up, down = nn.Linear(64, 37).requires_grad_(False).bfloat16(), torch.randn(37, 3), torch.randn(3, 64)
    update = LowRank(down, up, scale=0.5, magnitude=torch.ones(37, 1) if form == "rows" else torch.ones(1, 64))
    expected = 1 / (layer.weight.double() + 0.5 * (up @ down).double()).norm(dim=FORMS[form], keepdim=True)
    largest = []
    some = LowRank.dense
    monkeypatch.setattr(LowRank, "dense", lambda self, rows: largest.append(some(self, rows)) or largest[-1])
    monkeypatch.setattr("model.quantize._CHUNK", 64 * 5)
    assert relative_error(dora_gain(layer, update).double(), expected) < 1e-5
    assert max(map(len, largest)) == 5 and sum(map(len, largest)) == 37


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_norms_over_few_bits_are_taken_in_parts(monkeypatch, precision):
    small = few_bit_layer(torch.randn(40, 64) * torch.logspace(-3, 2, 40)[:, None], precision)
    update = LowRank(torch.randn(3, 64), torch.randn(40, 3), magnitude=torch.ones(40, 1))
    whole = dora_gain(small, update)
    monkeypatch.setattr("model.quantize._CHUNK", 64 * 5)
    torch.testing.assert_close(dora_gain(small, update), whole, rtol=1e-5, atol=0)


def test_rows_of_zeros_stay_zero():
    layer = nn.Linear(4, 3, bias=False)
    with torch.no_grad():
        layer.weight.zero_()
    gain = dora_gain(layer, LowRank(torch.zeros(1, 4), torch.zeros(3, 1), magnitude=torch.zeros(3, 1)))
    assert torch.equal(gain, torch.zeros(3, 1))


# ---- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "shape", "what"),
    [
        ("blocks.0.attn.wq.dora_scale", (63, 1), "another size: its magnitude of blocks.0.attn.wq is [63, 1]"),
        ("blocks.0.attn.wq.dora_scale", (64, 64), "this network's layer has 64 rows and 64 columns"),
        ("blocks.0.attn.wq.dora_scale", (64, 1, 1, 1), "another size"),
        ("blocks.0.attn.wq.lora_magnitude_vector", (32,), "another size"),
        ("blocks.0.attn.wk.dora_scale", (64, 1), "the magnitude of blocks.0.attn.wk"),
        ("blocks.0.attn.wq.lora_magnitude_vector.bias", (64,), "product: blocks.0.attn.wq.lora_magnitude_vector.bias"),
        ("blocks.0.attn.wq.dora_scale.second", (), "product: blocks.0.attn.wq.dora_scale.second"),
    ],
)
def test_refuses_impossible_magnitudes(tmp_path, model, key, shape, what):
    state = pair("blocks.0.attn.wq", width=64) | {key: torch.ones(shape)}
    assert what in refused(tmp_path, model, state)


def test_vectors_are_never_column_magnitudes(tmp_path, model):
    layer = model.blocks[0].mlp.up
    assert layer.in_features != layer.out_features
    state = {"lora_A": torch.ones(2, layer.in_features), "lora_B": torch.ones(layer.out_features, 2)}
    state["dora_scale"] = torch.ones(layer.in_features)
    message = refused(tmp_path, model, {f"blocks.0.mlp.up.{what}": tensor for what, tensor in state.items()})
    assert "its magnitude of blocks.0.mlp.up" in message


def test_refuses_magnitudes_without_a_low_rank_update(tmp_path, model):
    """Full differences and norm layers; also two magnitudes for one layer, and one with NaN."""
    length = {"blocks.0.attn.wq.dora_scale": torch.ones(64, 1)}
    whole = {"blocks.0.attn.wq.diff": torch.ones(64, 64)}
    assert "the magnitude of blocks.0.attn.wq" in refused(tmp_path, model, whole | length)
    two = length | {"blocks.0.attn.wq.lora_magnitude_vector": torch.ones(64)} | pair("blocks.0.attn.wq", width=64)
    assert "more than one adapter" in refused(tmp_path, model, two)
    norm = {"last.modulation.lin.lora_A": torch.ones(2, 64), "last.modulation.lin.lora_B": torch.ones(2, 2)}
    norm["last.modulation.lin.dora_scale"] = torch.ones(2, 1)
    assert "which is not a linear layer, as if it were one" in refused(tmp_path, model, norm)
    broken = pair("blocks.0.attn.wq", width=64) | {"blocks.0.attn.wq.dora_scale": torch.full((64, 1), torch.nan)}
    assert "NaN or infinite" in refused(tmp_path, model, broken)


def test_dora_without_its_magnitudes_is_refused(tmp_path, model):
    """PEFT states in the metadata that it is a DoRA. Read as a LoRA, it would render another picture."""
    stated = json.dumps({"transformer.use_dora": True, "transformer.lora_alpha": 4})
    state = pair("blocks.0.attn.wq", width=64)
    message = refused(tmp_path, model, state, lora_adapter_metadata=stated)
    assert "says that it is a DoRA, but has no magnitude for blocks.0.attn.wq" in message
    state["blocks.0.attn.wq.lora_magnitude_vector"] = torch.ones(64)
    read_lora(write(tmp_path, state, lora_adapter_metadata=stated), model)


# ---- parity with PEFT ---------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("saved_by", ["PEFT", "diffusers"])
def test_answers_match_peft(tmp_path: Path, model, saved_by):
    """On diffusers' network with the same weights, with the files that PEFT and diffusers save."""
    peft = pytest.importorskip("peft")
    targets = sorted({THEIRS[name] for name in linears(model)})
    settings = peft.LoraConfig(r=3, lora_alpha=5, use_dora=True, target_modules=targets, init_lora_weights=False)
    torch.manual_seed(5)
    other = reference(model)
    if saved_by == "PEFT":
        whole = peft.get_peft_model(other, settings)
    else:
        other.add_adapter(settings)
        whole = other
    lengths = [tensor for name, tensor in whole.named_parameters() if "lora_magnitude_vector" in name]
    assert len(lengths) == len(targets)
    for tensor in lengths:
        tensor.mul_(0.5 + torch.rand(tensor.shape))
    if saved_by == "PEFT":
        whole.save_pretrained(tmp_path)
        path = tmp_path
    else:
        other.save_lora_adapter(tmp_path)
        (path,) = tmp_path.glob("*.safetensors")

    adapter = read_lora(path, model)

    assert set(adapter.layers) == set(linears(model)) and not adapter.unmatched
    assert all(each.magnitude is not None and each.scale == 5 / 3 for each in adapter.layers.values())
    assert relative_error(velocity(model, (adapter, 1)), answer_of(whole)) < 1e-5
    assert relative_error(velocity(model), answer_of(whole)) > 0.01


# ---- in the pipeline ----------------------------------------------------------------------------


def test_pictures_with_and_without_a_dora(tmp_path, pipeline):
    """At strength 0 the picture is the one without it; the record says how many modules matched."""
    path = write(tmp_path, lora(pipeline.dit, "OneTrainer", "columns")[0])
    specs = [FOX, *(replace(FOX, loras=(Lora(path, weight),)) for weight in (0, 1, -2))]
    records = [picture.record for picture in pipeline.render(specs)]

    pixels = [record["pixels"] for record in records]
    assert pixels[0] == pixels[1] and len(set(pixels)) == 3
    (entry,) = records[2]["loras"]
    assert entry["matched"] == entry["modules"] == len(linears(pipeline.dit)) and not entry["unmatched"]
