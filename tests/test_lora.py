"""LoRA: every trainer's layout means the same, sums are exact, nothing is ignored silently, removal is complete."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_dit import inputs, random_model, reference, relative_error
from tiny import tiny, tiny_box  # noqa: F401
from torch import Tensor, nn

from model import lora_match
from model.dit import PRESETS, DiTConfig, Krea2
from model.errors import K2Error
from model.latents import position_ids
from model.layouts import diffusers_names
from model.lora import Adapter, applied
from model.lora_match import layer_names, read_lora, strip_prefixes
from model.pipeline import MAX_ADAPTERS, Pipeline
from model.quantize import to_int8
from model.spec import Lora, RenderSpec, Style

TINY = DiTConfig(width=64, heads=4, kv_heads=2, blocks=2, text_width=32, text_taps=3, text_heads=2, channels=4)
RANK = 4
Pairs = dict[str, tuple[Tensor, Tensor]]  # native layer -> down [r, in], up [out, r]


@pytest.fixture(scope="module")
def model() -> Krea2:
    return random_model(TINY)


def linears(model: Krea2) -> dict[str, nn.Linear]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}


def bare_ones(model: Krea2) -> dict[str, nn.Parameter]:
    """Scales of norms, and what each layer adds to the modulation."""
    return {name: each for name, each in model.named_parameters() if name.endswith((".scale", ".lin"))}


def random_pairs(model: Krea2, seed: int = 0, rank: int = RANK) -> Pairs:
    """For every linear layer, large enough to have an effect."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (
            torch.randn(rank, layer.in_features, generator=generator) * 0.5 * layer.in_features**-0.5,
            torch.randn(layer.out_features, rank, generator=generator) * 0.5,
        )
        for name, layer in linears(model).items()
    }


@pytest.fixture(scope="module")
def pairs(model) -> Pairs:
    return random_pairs(model)


def dense(model: Krea2, *weighted: tuple[Pairs, float]) -> Krea2:
    """The network with the full products in its matrices, summed in double precision."""
    state = model.state_dict()
    for pairs, weight in weighted:
        for name, (down, up) in pairs.items():
            state[f"{name}.weight"] = state[f"{name}.weight"].double() + weight * (up.double() @ down.double())
    changed = Krea2(model.config).eval().requires_grad_(False)
    changed.load_state_dict(state)
    return changed


@torch.no_grad()
def velocity(model: Krea2, *adapters: tuple[Adapter, float]) -> Tensor:
    tokens, sigma, embeds, grid = inputs(model.config)
    with applied(model, adapters):
        return model(tokens, sigma, embeds, grid)


# ---- trainers' layouts --------------------------------------------------------------------------

THEIRS = {n.removesuffix(".weight"): d.removesuffix(".weight") for n, d in diffusers_names(TINY.blocks).items()}


def peft(prefix: str, middle: str, names: Callable[[str], str]) -> Callable[[Pairs], dict[str, Tensor]]:
    return lambda pairs: {
        f"{prefix}{names(name)}.lora_{half}{middle}": tensor
        for name, pair in pairs.items()
        for half, tensor in zip("AB", pair, strict=True)
    }


def kohya(prefix: str, names: Callable[[str], str]) -> Callable[[Pairs], dict[str, Tensor]]:
    """With an alpha of half the rank, which the up matrix compensates."""

    def write(pairs: Pairs) -> dict[str, Tensor]:
        state = {}
        for name, (down, up) in pairs.items():
            module = prefix + names(name)
            state |= {f"{module}.lora_down.weight": down, f"{module}.lora_up.weight": 2 * up}
            state[f"{module}.alpha"] = torch.tensor(len(down) / 2)
        return state

    return write


def native(name: str) -> str:
    return name


def flat(name: str) -> str:
    return name.replace(".", "_")


LAYOUTS = {
    "diffusers": peft("transformer.", ".weight", THEIRS.__getitem__),
    "diffusers, named adapter": peft("transformer.", ".style-1.weight", THEIRS.__getitem__),
    "ComfyUI": peft("diffusion_model.", ".weight", native),
    "ComfyUI, long prefix": peft("model.diffusion_model.", ".weight", native),
    "ComfyUI, kohya's halves": kohya("diffusion_model.", native),
    "PEFT": peft("base_model.model.", ".default.weight", native),
    "PEFT, diffusers names": peft("base_model.model.", ".weight", THEIRS.__getitem__),
    "PEFT, no weight": peft("base_model.model.", "", native),
    "PEFT, default but no weight": peft("base_model.model.transformer.", ".default", THEIRS.__getitem__),
    "kohya": kohya("lora_unet_", flat),
    "kohya, diffusers names": kohya("lora_unet_", lambda name: flat(THEIRS[name])),
    "kohya, two underscores behind the prefix": kohya("lora_unet__", flat),
    "kohya, two underscores for a dot": kohya("lora_unet_", lambda name: THEIRS[name].replace(".", "__")),
    "no number at the end": peft("diffusion_model.", ".weight", lambda name: THEIRS[name].removesuffix(".0")),
    "diffusers' older halves": lambda pairs: {
        key.replace("lora_A", "lora.down").replace("lora_B", "lora.up"): t
        for key, t in peft("transformer.", ".weight", THEIRS.__getitem__)(pairs).items()
    },
    "LyCORIS": kohya("lycoris_", lambda name: flat(THEIRS[name])),
    "OneTrainer": kohya("lora_transformer_", lambda name: flat(THEIRS[name])),
    "bare": peft("", ".weight", native),
}


def write(folder: Path, state: dict[str, Tensor], name: str = "lora.safetensors", **metadata: str) -> Path:
    save_file(
        {key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in state.items()},
        folder / name,
        metadata or None,
    )
    return folder / name


@pytest.fixture
def adapter(tmp_path, model, pairs) -> Adapter:
    return read_lora(write(tmp_path, LAYOUTS["ComfyUI"](pairs)), model)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_matches_every_layer(tmp_path, model, pairs, layout):
    adapter = read_lora(write(tmp_path, LAYOUTS[layout](pairs)), model)

    assert set(adapter.layers) == set(linears(model)) and not adapter.unmatched
    assert adapter.report(0.5) == {
        "path": str(tmp_path / "lora.safetensors"),
        "sha256": adapter.sha256,
        "weight": 0.5,
        "matched": len(pairs),
        "modules": len(pairs),
        "unmatched": [],
    }
    assert relative_error(velocity(model, (adapter, 1)), velocity(dense(model, (pairs, 1)))) < 1e-5


def test_idle_lora_is_reported(tmp_path, model, pairs):
    """Saved before it was trained, or with alphas of 0."""
    state = LAYOUTS["ComfyUI"](pairs)
    untrained = {name: tensor * (0 if "lora_B" in name or "lora_up" in name else 1) for name, tensor in state.items()}
    alphas = {f"{name.rpartition('.lora_')[0]}.alpha": torch.tensor(0.0) for name in state if ".lora_" in name}

    for made, idle in ((state, False), (untrained, True), (state | alphas, True)):
        assert ("idle" in read_lora(write(tmp_path, made), model).report(1)) == idle


@pytest.mark.parametrize(
    ("added", "idle"),
    [
        ({"blocks.0.attn.wq.diff": (64, 64)}, False),
        ({"first.diff_b": (64,)}, False),
        ({"blocks.0.prenorm.scale.diff": (64,)}, False),
        ({"blocks.0.attn.wq.lora_magnitude_vector": (64,)}, False),
        ({"blocks.0.attn.wq.diff": (64, 64), "blocks.0.prenorm.scale.diff": (64,)}, True),
    ],
)
def test_other_changes_are_not_idle(tmp_path, model, added, idle):
    """A full matrix, a bias, a norm's scale, a DoRA's magnitudes; if they are all zero, the LoRA is idle again."""
    state = {name: torch.full(shape, 0.0 if idle else 1.0) for name, shape in added.items()}
    if "blocks.0.attn.wq.lora_magnitude_vector" in added:
        halves = {"A": torch.ones(4, 64), "B": torch.zeros(64, 4)}
        state |= {f"blocks.0.attn.wq.lora_{half}.weight": tensor for half, tensor in halves.items()}

    assert ("idle" in read_lora(write(tmp_path, state), model).report(1)) == idle


@pytest.mark.parametrize("config", [TINY, PRESETS["medium"]], ids=["tiny", "medium"])
def test_no_two_layers_share_a_spelling(config):
    with torch.device("meta"):
        network = Krea2(config)
    names, theirs = layer_names(network), diffusers_names(config.blocks)
    for name in [*linears(network), *bare_ones(network)]:
        other = theirs.get(f"{name}.weight", theirs.get(name)).removesuffix(".weight")
        assert names[name] == names[flat(name)] == names[other] == names[flat(other)] == name
        assert strip_prefixes(f"base_model.model.transformer.{other}") == other


# ---- sums ---------------------------------------------------------------------------------------


@torch.no_grad()
def test_each_layers_change_is_the_dense_product(model, pairs, adapter):
    for name, layer in linears(model).items():
        down, up = pairs[name]
        x = torch.randn(5, layer.in_features)
        before = layer(x)
        with applied(model, [(adapter, -0.7)]):
            delta = layer(x) - before
        expected = -0.7 * (x.double() @ (up.double() @ down.double()).T)
        assert relative_error(delta.double(), expected) < 1e-5, name
        assert torch.equal(layer(x), before)


def test_two_loras_add_in_any_order(tmp_path, model, pairs, adapter):
    others = random_pairs(model, seed=1, rank=3)
    other = read_lora(write(tmp_path, LAYOUTS["kohya"](others), "other.safetensors"), model)

    both = velocity(model, (adapter, 0.8), (other, -0.5))

    assert relative_error(both, velocity(dense(model, (pairs, 0.8), (others, -0.5)))) < 1e-5
    assert torch.equal(both, velocity(model, (other, -0.5), (adapter, 0.8)))
    assert relative_error(velocity(model, (adapter, 0.3), (adapter, 0.7)), velocity(model, (adapter, 1))) < 1e-5
    with applied(model, [(other, -0.5)]):  # nested
        assert relative_error(velocity(model, (adapter, 0.8)), both) < 1e-5


def test_several_weights_of_one_lora_add_in_any_order(model, adapter):
    """Bit for bit, although rounding depends on the order of a sum."""
    orders = permutations([(adapter, weight) for weight in (0.5, -0.3, 0.7)])
    first, *others = (velocity(model, *each) for each in orders)
    assert all(torch.equal(other, first) for other in others)


def test_weight_zero_and_removal_leave_no_trace(model, adapter):
    weights = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    before = velocity(model)

    assert torch.equal(velocity(model, (adapter, 0)), before)
    assert not torch.equal(velocity(model, (adapter, 1e-3)), before)
    with pytest.raises(RuntimeError), applied(model, [(adapter, 1)]):
        assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == weights  # nothing is copied
        raise RuntimeError
    assert torch.equal(velocity(model), before)


def test_in_half_precision(model, pairs, adapter):
    half = dense(model).bfloat16()
    tokens, sigma, embeds, grid = inputs(TINY)
    with applied(half, [(adapter, 1)]), torch.no_grad():
        ours = half(tokens.bfloat16(), sigma, embeds.bfloat16(), grid).float()
    assert relative_error(ours, velocity(dense(model, (pairs, 1)))) < 0.05


# ---- alpha --------------------------------------------------------------------------------------


def scaled(pairs: Pairs, by: float) -> Pairs:
    return {name: (down, by * up) for name, (down, up) in pairs.items()}


@pytest.mark.parametrize(
    ("settings", "scale"),
    [({"r": RANK, "lora_alpha": 8}, 2.0), ({"lora_alpha": 2, "use_rslora": True}, 1.0), ({"r": RANK}, 1.0)],
    ids=["alpha", "rank-stabilised", "none"],
)
def test_alpha_beside_the_tensors(tmp_path, model, pairs, settings, scale):
    """diffusers writes it into the file's metadata, PEFT into a file of its own."""
    state = LAYOUTS["diffusers"](pairs)
    stated = json.dumps({f"transformer.{key}": value for key, value in settings.items()})
    inside = read_lora(write(tmp_path, state, lora_adapter_metadata=stated), model)
    write(tmp_path, LAYOUTS["PEFT"](pairs), "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    folder = read_lora(tmp_path, model)

    for adapter in (inside, folder):
        assert {each.scale for each in adapter.layers.values()} == {scale}
    assert relative_error(velocity(model, (inside, 1)), velocity(dense(model, (scaled(pairs, scale), 1)))) < 1e-5


def test_alpha_per_layer(tmp_path, model, pairs):
    """PEFT's keys are regular expressions for the end of a name as it is in the file: "gate" is a part of attention
    natively, but in diffusers' names only of the feed-forward."""
    theirs = ("transformer_blocks.1.attn.to_q", r"^transformer_blocks\.1\.attn\.to_(q|r)")
    for layout, keys in {"diffusers": theirs, "ComfyUI": (r"blocks\.1\..*\.wq",)}.items():
        for key in keys:
            stated = json.dumps({"lora_alpha": 4, "alpha_pattern": {key: 12}})
            layers = read_lora(write(tmp_path, LAYOUTS[layout](pairs), lora_adapter_metadata=stated), model).layers
            assert layers["blocks.1.attn.wq"].scale == 3 and layers["blocks.0.attn.wq"].scale == 1
    stated = json.dumps({"lora_alpha": 4, "alpha_pattern": {"gate": 12}})
    layers = read_lora(write(tmp_path, LAYOUTS["diffusers"](pairs), lora_adapter_metadata=stated), model).layers
    assert layers["blocks.1.mlp.gate"].scale == 3 and layers["blocks.1.attn.gate"].scale == 1
    for key in ("(a+)+", ".*.*.*.*wq", "(wq", "w" * 1000):
        stated = json.dumps({"alpha_pattern": {key: 12}})
        with pytest.raises(K2Error, match="settings that cannot be read"):
            read_lora(write(tmp_path, LAYOUTS["diffusers"](pairs), lora_adapter_metadata=stated), model)


# ---- unmatched layers and refusals --------------------------------------------------------------


def test_missing_layers_are_named(tmp_path, model, pairs):
    """A LoRA for a deeper network, with a part for a text encoder."""
    strange = {"blocks.7.attn.wq": pairs["blocks.0.attn.wq"], "text_encoder.layers.0.mlp": pairs["first"]}
    state = LAYOUTS["ComfyUI"](pairs) | LAYOUTS["ComfyUI"](strange)

    report = read_lora(write(tmp_path, state), model).report(1)

    assert (report["matched"], report["modules"]) == (len(pairs), len(pairs) + 2)
    assert report["unmatched"] == ["diffusion_model.blocks.7.attn.wq", "diffusion_model.text_encoder.layers.0.mlp"]


def test_rank_may_exceed_the_smallest_layers_sides(tmp_path, model):
    """The text fusion's projector has one output and as many inputs as there are taps."""
    wide = random_pairs(model, rank=16)
    adapter = read_lora(write(tmp_path, LAYOUTS["diffusers"](wide)), model)
    assert relative_error(velocity(model, (adapter, 1)), velocity(dense(model, (wide, 1)))) < 1e-5


def refused(tmp_path: Path, model: Krea2, state: dict[str, Tensor], **metadata: str) -> str:
    path = write(tmp_path, state, **metadata)
    with pytest.raises(K2Error) as error:
        read_lora(path, model)
    assert path.name in str(error.value) and error.value.hint
    return str(error.value)


def pair(*modules: str, down: str = "lora_A", up: str = "lora_B", width: int = 3072) -> dict[str, Tensor]:
    return {
        f"{m}.{half}.weight": torch.ones(4, width).T if half == up else torch.ones(4, width)
        for m in modules
        for half in (down, up)
    }


@pytest.mark.parametrize(
    ("modules", "what"),
    [
        (["transformer.single_transformer_blocks.0.attn.to_q", "transformer.transformer_blocks.0.attn.to_q"], "FLUX"),
        (["lora_unet_double_blocks_0_img_attn_qkv"], "FLUX"),
        (["transformer.transformer_blocks.0.img_mod.1", "transformer.transformer_blocks.0.attn.to_q"], "Qwen-Image"),
        (["lora_unet_down_blocks_0_attentions_0_proj_in", "lora_te1_text_model_encoder_layers_0_mlp_fc1"], "SDXL"),
        (["diffusion_model.joint_blocks.0.x_block.attn.qkv"], "Stable Diffusion 3"),
        (["diffusion_model.blocks.0.self_attn.q"], "Wan"),
        (["diffusion_model.layers.0.attention.to_q"], "Z-Image"),
        (["lora_te_layers_0_self_attn_q_proj"], "a text encoder"),
        (["transformer.mystery.0.to_q"], "matches no layer of this network: it has layers like transformer.mystery.0"),
    ],
    ids=["FLUX", "FLUX kohya", "Qwen-Image", "SDXL", "SD 3", "Wan", "Z-Image", "text encoder", "unknown"],
)
def test_lora_for_another_model_is_refused(tmp_path, model, modules, what):
    """Even if some of the names are also ours, as diffusers names blocks alike in every model."""
    assert what in refused(tmp_path, model, pair(*modules, width=64))


def test_lora_for_another_size_is_refused(tmp_path, model):
    state = pair("diffusion_model.blocks.0.attn.wq", width=6144)
    assert "maps 6144 numbers to 6144, this network's 64 to 64" in refused(tmp_path, model, state)


@pytest.mark.parametrize(
    ("key", "what"),
    [
        ("blocks.0.attn.wk.lokr_w1", "not make up a low-rank pair or product: blocks.0.attn.wk"),
        ("blocks.0.attn.wq.lokr_w2_a", "not make up a low-rank pair or product: blocks.0.attn.wq"),
        ("blocks.0.attn.wk.lokr_t2", "a convolutional LoKr"),
        ("blocks.0.attn.wq.hada_w1_a", "not make up a low-rank pair or product: blocks.0.attn.wq"),
        ("blocks.0.attn.wq.hada_t1", "a convolutional LoHa"),
        ("blocks.0.attn.wq.set_weight", "replace the model's own"),
        ("blocks.0.attn.wq.diff", "blocks.0.attn.wq both by a full matrix and by factors"),
        ("blocks.0.attn.wq.wd_for_diff", "a DoRA of differences"),
        ("blocks.0.attn.wq.oft_blocks", "OFT"),
        ("blocks.0.attn.wq.a1.weight", "GLoRA"),
        ("blocks.0.attn.wq.on_input", "IA3"),
        ("blocks.0.prenorm.w_norm", "norms"),
        ("blocks.0.attn.wq.reshape_weight", "not make up a low-rank pair or product: blocks.0.attn.wq.reshape_weight"),
        ("blocks.0.attn.wq.lora_mid.weight", "a convolutional LoRA"),
        ("blocks.0.attn.wq.lora_B.bias", "biases"),
        ("blocks.0.attn.wk.lora_A.weight", "not make up a low-rank pair or product: blocks.0.attn.wk"),
        ("blocks.0.attn.wk.alpha", "not make up a low-rank pair or product: blocks.0.attn.wk.alpha"),
        ("blocks.0.attn.wq.lora_down.weight", "more than one adapter"),
        ("blocks.0.attn.wq.lora_A.second.weight", "more than one adapter"),
        ("blocks.0.attn.wq.weight", "not make up a low-rank pair or product: blocks.0.attn.wq.weight"),
    ],
)
def test_other_adapter_kinds_are_refused(tmp_path, model, key, what):
    assert what in refused(tmp_path, model, pair("blocks.0.attn.wq", width=64) | {key: torch.ones(2, 2)})


def test_factors_in_8_bits(tmp_path, model, pairs):
    """With scales they are read; without, the numbers are not what they seem."""
    stored, means = {}, {}
    for name, pair in pairs.items():
        rows = [to_int8(half) for half in pair]
        means[name] = tuple(number * scale[:, None] for number, scale in rows)
        for half, (number, scale) in zip("AB", rows, strict=True):
            stored |= {f"{name}.lora_{half}.weight": number, f"{name}.lora_{half}.weight_scale": scale}
    adapter = read_lora(write(tmp_path, stored), model)
    assert relative_error(velocity(model, (adapter, 1)), velocity(dense(model, (means, 1)))) < 1e-5
    del stored["first.lora_A.weight_scale"]
    assert "I8 without scales" in refused(tmp_path, model, stored)


def test_layer_under_two_names_is_refused(tmp_path, model):
    state = pair("blocks.0.attn.wq", "transformer.transformer_blocks.0.attn.to_q", width=64)
    assert "same layer twice" in refused(tmp_path, model, state)


@pytest.mark.parametrize(
    ("down", "up"),
    [((4, 64), (64, 5)), ((0, 64), (64, 0)), ((65, 64), (64, 65)), ((4, 64, 1), (64, 4)), ((256,), (64, 4))],
    ids=["two ranks", "no rank", "rank above width", "three dims", "one dim"],
)
def test_invalid_shapes_are_refused(tmp_path, model, down, up):
    state = {"blocks.0.attn.wq.lora_A.weight": torch.ones(down), "blocks.0.attn.wq.lora_B.weight": torch.ones(up)}
    assert "is damaged" in refused(tmp_path, model, state)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_are_refused(tmp_path, model, value):
    state = pair("blocks.0.attn.wq", width=64)
    state["blocks.0.attn.wq.lora_B.weight"][3, 1] = value
    assert "NaN or infinite" in refused(tmp_path, model, state)


def test_oversized_file_is_refused(tmp_path, model, monkeypatch):
    """Judged by the file's size, before a tensor is read."""
    path = write(tmp_path, {"blocks.0.attn.wq.lora_A.weight": torch.ones(4, 64)})
    monkeypatch.setattr(lora_match, "MAX_EXTRA_BYTES", -8 * sum(weight.numel() for weight in model.parameters()))
    monkeypatch.setattr(lora_match, "sort_parts", lambda *read: pytest.fail("it was read"))

    with pytest.raises(K2Error, match="larger than a LoRA of this network"):
        read_lora(path, model)


@pytest.mark.parametrize(
    "text",
    ["{", "[1]", '{"lora_alpha": "much"}', '{"lora_alpha": NaN}', f'{{"lora_alpha": {"9" * 400}}}', "[" * 100_000],
)
def test_unreadable_peft_settings_are_refused(tmp_path, model, text):
    assert "settings" in refused(tmp_path, model, pair("blocks.0.attn.wq", width=64), lora_adapter_metadata=text)


@pytest.mark.parametrize("begun", ["pissa", "pissa_niter_16", "olora", "corda", "loftq"])
def test_lora_that_changed_its_base_is_refused(tmp_path, model, begun):
    """PEFT subtracts such an adapter's initial values from the base; on an unchanged base they would count twice."""
    for prefix in ("", "transformer."):
        stated = json.dumps({f"{prefix}init_lora_weights": begun})
        assert begun in refused(tmp_path, model, pair("blocks.0.attn.wq", width=64), lora_adapter_metadata=stated)
    for plain in (True, False, "gaussian", "eva", "orthogonal"):
        stated = json.dumps({"init_lora_weights": plain})
        read_lora(write(tmp_path, pair("blocks.0.attn.wq", width=64), lora_adapter_metadata=stated), model)


def test_files_without_a_lora_are_refused(tmp_path, model):
    assert "is not a LoRA: it holds blocks.0.attn.wq.weight" in refused(
        tmp_path, model, {"blocks.0.attn.wq.weight": torch.ones(2)}
    )
    (tmp_path / "lora.pt").write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(K2Error, match="pickle"):
        read_lora(tmp_path / "lora.pt", model)
    with pytest.raises(K2Error, match="no file"):
        read_lora(tmp_path / "missing.safetensors", model)


# ---- compared with diffusers --------------------------------------------------------------------


@torch.no_grad()
def test_matches_diffusers(tmp_path, model, pairs):
    """With a file that its own loader takes, at a strength and with an alpha."""
    pytest.importorskip("peft", reason="diffusers loads LoRA through peft, which is not installed")
    settings = {"r": RANK, "lora_alpha": 2 * RANK, "target_modules": sorted({THEIRS[name] for name in pairs})}
    settings["rank_pattern"] = {}
    stated = json.dumps({f"transformer.{key}": value for key, value in settings.items()})
    path = write(tmp_path, LAYOUTS["diffusers"](pairs), lora_adapter_metadata=stated)
    other = reference(model)
    other.load_lora_adapter(tmp_path, weight_name=path.name, prefix="transformer")
    other.set_adapters(other.active_adapters(), weights=[0.6])

    tokens, sigma, embeds, grid = inputs(TINY)
    everything = torch.ones(embeds.shape[:2], dtype=torch.bool)
    ids = position_ids(embeds.shape[1], *grid)
    theirs = other(tokens, embeds, sigma, ids, everything, return_dict=False)[0]
    assert relative_error(velocity(model, (read_lora(path, model), 0.6)), theirs) < 1e-5


# ---- in the pipeline ----------------------------------------------------------------------------

FOX = RenderSpec("a red fox", seed=7)


@pytest.fixture
def pipeline(tiny):  # noqa: F811
    return Pipeline.load("tiny", device="cpu")


@pytest.fixture
def path(tmp_path, pipeline) -> Path:
    return write(tmp_path, LAYOUTS["kohya"](random_pairs(pipeline.dit)))


def pixels(pipeline: Pipeline, *specs: RenderSpec) -> list[str]:
    return [picture.record["pixels"] for picture in pipeline.render(specs)]


def test_pictures_with_and_without(pipeline, path):
    """In one run, in any order, neighbours do not affect each other; in a style a LoRA does the same."""
    plain, strong, weak = FOX, replace(FOX, loras=(Lora(path),)), replace(FOX, loras=(Lora(path, -0.5),))
    apart = [pixels(pipeline, spec)[0] for spec in (plain, strong, weak)]

    assert len(set(apart)) == 3
    assert pixels(pipeline, weak, plain, strong, strong, plain) == [apart[i] for i in (2, 0, 1, 1, 0)]
    assert pixels(pipeline, replace(FOX, loras=(Lora(path, 0),))) == [apart[0]]
    assert pixels(pipeline, replace(FOX, styles=(Style("dusk", -0.5, lora=path),))) == [apart[2]]
    assert pixels(pipeline, replace(FOX, styles=(Style("dusk", 0, lora=path),))) == [apart[0]]


def test_records_name_the_loras(pipeline, path, tmp_path):
    style = Style("dusk", 0.5, lora=path, triggers=("dusk style",))
    record = pipeline.render([replace(FOX, loras=(Lora(path, 0.25), Lora(path, 0)), styles=(style,))])[0].record

    entries = {entry["weight"]: entry for entry in record["loras"]}
    assert 0.25 in entries and 0 not in entries
    assert entries[0.25]["path"] == str(path) and len(entries[0.25]["sha256"]) == 64
    assert entries[0.25]["matched"] == entries[0.25]["modules"] > 0


def test_changed_file_is_read_again(pipeline, path, tmp_path):
    spec = replace(FOX, loras=(Lora(path),))
    before = pixels(pipeline, spec)
    write(tmp_path, LAYOUTS["diffusers"](random_pairs(pipeline.dit, seed=5)))
    assert pixels(pipeline, spec) != before


def test_each_lora_is_read_once_however_many(pipeline, tmp_path, monkeypatch):
    """If fewer were cached, each would evict the one needed next."""
    few = {"blocks.0.attn.wq": random_pairs(pipeline.dit)["blocks.0.attn.wq"]}
    paths = [write(tmp_path, LAYOUTS["kohya"](few), f"{i}.safetensors") for i in range(MAX_ADAPTERS + 1)]
    spec, asked = replace(FOX, loras=tuple(map(Lora, paths))), []
    monkeypatch.setattr("model.pipeline.read_lora", lambda path, dit: asked.append(path) or read_lora(path, dit))

    pipeline.render([spec, replace(spec, seed=1, steps=3)])

    assert sorted(asked) == sorted(paths)


def test_overwritten_file_does_not_change_a_loaded_lora(monkeypatch, model, pairs, tmp_path):
    """Large tensors are views of the file's pages; an adapter is cached, and must keep the values it was read with."""
    monkeypatch.setattr("model.safetensors_file.MAX_COPIED", 0)
    file = write(tmp_path, LAYOUTS["diffusers"](pairs))
    adapter = read_lora(file, model)
    before = velocity(model, (adapter, 1.0))

    with file.open("r+b") as same:
        same.write(bytes(file.stat().st_size))

    assert torch.equal(velocity(model, (adapter, 1.0)), before)


def test_peft_settings_are_part_of_the_identity(pipeline, tmp_path):
    """PEFT keeps alpha in a separate file: another alpha is another adapter, to caches and to records."""
    state = LAYOUTS["PEFT"](random_pairs(pipeline.dit))
    spec = replace(FOX, loras=(Lora(write(tmp_path, state, "adapter_model.safetensors")),))
    made = []
    for alpha in (4, 32):
        (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": alpha}))
        made += pipeline.render([spec])

    four, many = (picture.record["pixels"] for picture in made)
    assert four != many and pixels(Pipeline.load("tiny", device="cpu"), spec) == [many]
    assert len({picture.record["loras"][0]["sha256"] for picture in made}) == 2


def test_text_input_layers_are_adapted_after_a_plain_picture(pipeline, tmp_path):
    """Encoded prompts are cached, and an adapter changes them."""
    inner = {name: pair for name, pair in random_pairs(pipeline.dit).items() if name.startswith("txt")}
    adapted = replace(FOX, loras=(Lora(write(tmp_path, LAYOUTS["kohya"](inner))),))
    (alone,) = pixels(Pipeline.load("tiny", device="cpu"), adapted)

    plain, after = pixels(pipeline, FOX, adapted)

    assert plain != alone and after == alone


@pytest.mark.parametrize("weight", [11, float("nan"), float("-inf")])
def test_weights_out_of_range_are_refused(pipeline, path, weight):
    with pytest.raises(K2Error, match="weight"):
        pipeline.resolve(replace(FOX, loras=(Lora(path, weight),)))


def test_invalid_lora_is_refused_before_rendering(pipeline, tmp_path):
    specs = [FOX, replace(FOX, loras=(Lora(tmp_path / "missing.safetensors"),))]
    with pytest.raises(K2Error, match="missing"):
        next(pipeline.stream(specs))
