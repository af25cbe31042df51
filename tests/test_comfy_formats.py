"""ComfyUI's marks: rotated int8 is read as the weights it stands for, wherever its mark is; all else is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_dit import inputs, random_model, relative_error
from test_layouts import TINY, native, refused, velocity
from torch import Tensor

from model.checkpoint import open_checkpoint, refuse_unreadable
from model.errors import K2Error
from model.layouts import is_packed, load_dit, stored_precision, to_diffusers
from model.low_bit import dequantised_state, few_bit_layers
from model.quantize import rotate

PREFIX = "model.diffusion_model."
ROTATED = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 256}


@pytest.fixture(scope="module")
def model():
    return random_model(TINY)


@pytest.fixture(scope="module")
def state(model):
    return model.state_dict()


# ---- an independent writer ----------------------------------------------------------------------


def turn(size: int) -> np.ndarray:
    """comfy-kitchen's matrix in double precision, by definition: a Kronecker power over the root of its size."""
    four = np.array([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], dtype=float)
    whole = np.ones((1, 1))
    while len(whole) < size:
        whole = np.kron(whole, four)
    return whole / np.sqrt(size)


def turned(rows: np.ndarray, size: int) -> np.ndarray:
    """Every `size` numbers of a row times the matrix, transposed."""
    return np.concatenate([part @ turn(size).T for part in np.split(rows, rows.shape[1] // size, 1)], 1)


def convrot(matrix: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """matrix [out, in] -> int8 of its rotated rows, scales fp32 [out, 1]."""
    rows = turned(matrix.double().numpy(), size)
    scale = np.maximum(np.abs(rows).max(1, keepdims=True) / 127, 1e-30).astype(np.float32)
    return torch.from_numpy(np.round(rows / scale).astype(np.int8)), torch.from_numpy(scale)


def stands_for(rows: Tensor, scale: Tensor, size: int) -> Tensor:
    """The matrix that such int8 stands for; the rotation is its own inverse."""
    return torch.from_numpy(turned(rows.double().numpy() * scale.double().numpy(), size)).float()


def raw(mark: object) -> Tensor:
    return torch.tensor(list(json.dumps(mark).encode()), dtype=torch.uint8)


def rotated(state: dict[str, Tensor], size: int, mark: object = None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A state dict as ComfyUI saves it, the blocks' matrices rotated in groups; and what it stands for."""
    stored, means = dict(state), dict(state)
    for name in [n for n, t in state.items() if n.startswith("blocks.") and t.ndim == 2]:
        rows, scale = convrot(state[name], size)
        stored |= {name: rows, f"{name}_scale": scale}
        means[name] = stands_for(rows, scale, size)
        if mark is not False:
            layer = name.removesuffix(".weight")
            stored[f"{layer}.comfy_quant"] = raw(mark or ROTATED | {"convrot_groupsize": size})
    return stored, means


def assert_means(loaded: torch.nn.Module, means: dict[str, Tensor]) -> None:
    for name, tensor in loaded.state_dict().items():
        torch.testing.assert_close(tensor, means[name], rtol=1e-5, atol=1e-6, msg=name)


def layers_of(stored: dict[str, Tensor]) -> list[str]:
    return [name.removesuffix(".weight") for name, tensor in stored.items() if tensor.dtype == torch.int8]


# ---- what it means ------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [4, 16, 64, 256, 1024, 4096])
def test_a_rotation_is_the_kronecker_power_and_its_own_inverse(size):
    matrix = torch.randn(3, 2 * size)
    there = rotate(matrix, size)
    torch.testing.assert_close(
        there.double(), torch.from_numpy(turned(matrix.double().numpy(), size)), rtol=0, atol=1e-5
    )
    torch.testing.assert_close(rotate(there, size), matrix, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [16, 64, 256])
def test_rotated_int8_loads_as_the_weights_it_stands_for(tmp_path, model, state, size):
    stored, means = rotated(state, size)
    loaded, checkpoint = load_dit(native(tmp_path, stored))

    assert loaded.config == TINY and stored_precision(checkpoint) == "int8"
    assert_means(loaded, means)
    assert 0 < relative_error(velocity(loaded), velocity(model)) < 0.01


def test_products_equal_those_of_rotated_tokens(tmp_path, state):
    """ComfyUI leaves the weights rotated and rotates the tokens."""
    stored, _ = rotated(state, 256)
    loaded, _ = load_dit(native(tmp_path, stored))
    for layer in layers_of(stored):
        rows, scale = (stored[f"{layer}.weight{end}"].double().numpy() for end in ("", "_scale"))
        tokens = torch.randn(7, rows.shape[1])
        theirs = turned(tokens.double().numpy(), 256) @ (rows * scale).T
        assert relative_error(loaded.get_submodule(layer)(tokens).double(), torch.from_numpy(theirs)) < 1e-5


def test_scales_may_be_flat_or_one_per_matrix(tmp_path, state):
    for shape in ((), (1,)):
        stored, means = rotated(state, 64)
        for layer in layers_of(stored):
            name = f"{layer}.weight"
            stored[f"{name}_scale"] = torch.full(shape, 0.002)
            means[name] = stands_for(stored[name], torch.tensor(0.002), 64)
        assert_means(load_dit(native(tmp_path, stored))[0], means)
    stored, means = rotated(state, 64)
    flat = {n: t.flatten() if n.endswith("_scale") else t for n, t in stored.items()}
    assert_means(load_dit(native(tmp_path, flat))[0], means)


def test_stored_precision_is_that_of_most_numbers(tmp_path, state):
    """Writers keep the first matrices in more bits, or store only those in fewer."""
    stored, _ = rotated(state, 64)
    first = [name for name in stored if name.startswith("blocks.0.attn.")]
    mostly = {name: tensor for name, tensor in stored.items() if name not in first}
    mostly |= {name: state[name] for name in first if name in state}
    hardly = state | {name: stored[name] for name in first}

    for tensors, precision in ((mostly, "int8"), (hardly, None)):
        _, checkpoint = load_dit(native(tmp_path, tensors))
        assert stored_precision(checkpoint) == precision and not is_packed(checkpoint)


@torch.no_grad()
def test_rotated_int8_is_held_as_stored(tmp_path, model, state):
    """Its rows stay rotated, and tokens are rotated before they are rounded."""
    stored, means = rotated(state, 256)
    loaded, _ = load_dit(native(tmp_path, stored), precision="int8")

    for layer in layers_of(stored):
        held, name = loaded.get_submodule(layer), f"{layer}.weight"
        assert torch.equal(held.weight, stored[name])
        assert torch.equal(held.weight_scale, stored[f"{name}_scale"].flatten())
        torch.testing.assert_close(held.matrix(), means[name], rtol=1e-5, atol=1e-6)
        tokens = torch.randn(40, held.in_features)
        assert relative_error(held(tokens), tokens @ means[name].T) < 0.02
    given = inputs(TINY)
    assert relative_error(loaded(*given), model(*given)) < 0.02
    state = dequantised_state(loaded, torch.float32)
    assert all(torch.allclose(state[name], means[name], rtol=1e-5, atol=1e-6) for name in means)


@torch.no_grad()
def test_rotated_int8_is_rounded_again_to_fp8(tmp_path, model, state):
    """The rotated numbers themselves would make another network."""
    stored, means = rotated(state, 256)
    loaded, _ = load_dit(native(tmp_path, stored), precision="fp8")

    matrix, means = loaded.blocks[0].mlp.down.matrix(), means["blocks.0.mlp.down.weight"]
    assert ((matrix - means).abs() <= means.abs().amax(1, keepdim=True) / 14 * 0.5001).all()
    given = inputs(TINY)
    assert relative_error(loaded(*given), model(*given)) < 0.08


@pytest.mark.parametrize("size", [64, 256])
def test_rotated_int8_is_coded_again_in_4_bits(tmp_path, state, size):
    """Whether or not its rows are already rotated as the codes want them."""
    stored, means = rotated(state, size)
    four, _ = load_dit(native(tmp_path, stored), precision="int4")

    held = few_bit_layers(four)
    assert {layer.format.bits for layer in held.values()} == {4}
    assert all(relative_error(layer.matrix(), means[name]) < 0.1 for name, layer in held.items())


def test_rotated_int8_can_be_streamed(tmp_path, state):
    stored, _ = rotated(state, 256)
    path = native(tmp_path, stored)
    for precision in ("native", "int8"):
        held, streamed = (load_dit(path, precision=precision, streamed=each)[0] for each in (False, True))
        assert torch.equal(velocity(streamed), velocity(held))


# ---- where the marks are ------------------------------------------------------------------------


def prefixed(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    return {PREFIX + name: tensor for name, tensor in stored.items()}


def with_table(path: Path, stored: dict[str, Tensor], marks: dict[str, object]) -> Path:
    save_file(stored, path / "model.safetensors", {"_quantization_metadata": json.dumps({"layers": marks})})
    return path / "model.safetensors"


@pytest.mark.parametrize("before", ["", PREFIX], ids=["bare", "full"])
def test_marks_in_the_metadata(tmp_path, state, before):
    """With the transformer's prefix, as ComfyUI writes them, and without it."""
    stored, means = rotated(state, 64, mark=False)
    marks = {before + layer: ROTATED | {"convrot_groupsize": 64} for layer in layers_of(stored)}
    assert_means(load_dit(with_table(tmp_path, prefixed(stored), marks))[0], means)


def test_marks_in_both_places(tmp_path, state):
    stored, means = rotated(state, 256)
    marks = dict.fromkeys(layers_of(stored), ROTATED)
    assert_means(load_dit(with_table(tmp_path, stored, marks))[0], means)

    marks["blocks.1.attn.wq"] = {"format": "int8_tensorwise"}  # as an editor of such tables writes them
    assert "contradict" in refused(with_table(tmp_path, stored, marks))


@pytest.mark.parametrize(
    "mark",
    [
        {"format": "int8_tensorwise", "convrot": True},
        {"format": "int8_tensorwise", "params": {"convrot": True, "convrot_groupsize": 256}},
        ROTATED | {"per_row": True, "orig_dtype": "torch.bfloat16", "orig_shape": [1, 1]},
        {"convrot": True, "per_row": True},
    ],
    ids=["the usual group", "older", "converted", "no format"],
)
def test_marks_of_every_writer(tmp_path, state, mark):
    stored, means = rotated(state, 256, mark)
    assert_means(load_dit(native(tmp_path, stored))[0], means)


def test_marks_may_say_that_nothing_is_rotated(tmp_path, state):
    stored, _ = rotated(state, 256, {"format": "int8_tensorwise", "convrot": False, "convrot_groupsize": 256})
    loaded, checkpoint = load_dit(native(tmp_path, stored))
    name = "blocks.0.attn.wq.weight"
    assert torch.equal(loaded.blocks[0].attn.wq.weight, stored[name].float() * stored[f"{name}_scale"])
    assert stored_precision(checkpoint) == "int8"


def test_marks_with_diffusers_names(tmp_path, state):
    stored, means = rotated(state, 256, mark=False)
    plain = {name: tensor for name, tensor in stored.items() if not name.endswith("_scale")}
    theirs = to_diffusers(plain, TINY)
    names = {id(tensor): name for name, tensor in theirs.items()}
    for layer in layers_of(stored):
        other = names[id(stored[f"{layer}.weight"])]
        theirs[f"{other}_scale"] = stored[f"{layer}.weight_scale"]
        theirs[f"{other.removesuffix('.weight')}.comfy_quant"] = raw(ROTATED)
    assert_means(load_dit(native(tmp_path, theirs))[0], means)


TEXT = "text_encoders.qwen3vl_4b.transformer.model.layers.0.mlp.up_proj"


@pytest.mark.parametrize("where", ["beside the weight", "in the metadata"])
@pytest.mark.parametrize("kind", ["nvfp4", "convrot_w4a4", "made up"])
def test_the_format_of_an_included_text_encoder_is_ignored(tmp_path, state, kind, where):
    """In all-in-one files; k2 uses its own."""
    stored, means = rotated(state, 256, mark=None if where == "beside the weight" else False)
    scales = {f"{TEXT}.weight_scale": torch.ones(8, 2), f"{TEXT}.weight_scale_2": torch.ones(())}
    beside = {f"{TEXT}.weight": torch.ones(8, 16, dtype=torch.uint8)} | scales
    if where == "beside the weight":
        path = native(tmp_path, prefixed(stored) | beside, **{f"{TEXT}.comfy_quant": raw({"format": kind})})
    else:
        marks = {PREFIX + layer: ROTATED for layer in layers_of(stored)} | {TEXT: {"format": kind}}
        path = with_table(tmp_path, prefixed(stored) | beside, marks)
    loaded, checkpoint = load_dit(path)

    assert_means(loaded, means)
    assert not set(beside) & set(checkpoint.tensors)


def test_marks_of_a_removed_text_encoder_are_ignored(tmp_path, state):
    assert_means(load_dit(with_table(tmp_path, prefixed(state), {TEXT: {"format": "nvfp4"}}))[0], state)


def test_unreadable_numbers_matter_only_in_the_transformer(tmp_path, model):
    """Such files load all the same; if the transformer itself is stored that way, the error message says so."""
    name = "blocks.0.attn.wq.weight"
    state = model.state_dict() | {name: torch.ones(256, 256).to(torch.float8_e4m3fn)}
    path = native(tmp_path, prefixed(state) | {f"{TEXT}.weight": torch.ones(4, 4, dtype=torch.uint8)})
    whole = path.read_bytes()
    for dtype in ("F8_E4M3FNUZ", "F8_E5M2FNUZ"):
        path.write_bytes(with_dtype(whole, f"{TEXT}.weight", dtype))
        load_dit(path)
    path.write_bytes(with_dtype(whole, PREFIX + name, "F8_E4M3FNUZ"))
    assert "stored as F8_E4M3FNUZ, which k2 does not read" in refused(path)


def with_dtype(whole: bytes, name: str, dtype: str) -> bytes:
    """A safetensors file whose header gives a tensor another number format."""
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    header[name]["dtype"] = dtype
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + whole[8 + length :]


# ---- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize("group", [512, 2, 0, -256, 300, "256", 256.0, True, None, [256], 1024, 4**40])
def test_invalid_rotation_groups_are_refused(tmp_path, state, group):
    """512 is not a power of 4, 1024 does not divide a row, and a size is a whole number."""
    stored, _ = rotated(state, 256, ROTATED | {"convrot_groupsize": group})
    message = refused(native(tmp_path, stored))
    assert "rotated in groups of" in message or "an unknown format" in message


@pytest.mark.parametrize("format", ["awq_w4a16", "int8_blockwise", "convrot"])
def test_other_rotations_are_refused(tmp_path, state, format):
    stored, _ = rotated(state, 256, ROTATED | {"format": format})
    assert format in refused(native(tmp_path, stored))


@pytest.mark.parametrize(
    ("format", "beside", "told"),
    [
        ("awq_w4a16", ["_zeros"], "GPTQ or AWQ"),
        ("svdquant_w4a4", ["_smooth_factor", "_proj_down", "_proj_up"], "SVDQuant"),
        ("made_up", [], "made_up"),
    ],
)
def test_refused_formats_are_named_whatever_their_shapes(tmp_path, state, format, beside, told):
    """As ComfyUI stores other tools' 4 bits, two in an int8; if a mark is lost, the others still say it first."""
    stored = dict(state)
    for name in [n for n, t in state.items() if n.startswith("blocks.") and t.ndim == 2]:
        out, inward = state[name].shape
        stored |= {name: torch.ones(out, inward // 2).char(), f"{name}_scale": torch.ones(inward // 64, out)}
        stored |= {f"{name}{end}": torch.ones(inward // 64, out) for end in beside}
        stored[f"{name.removesuffix('weight')}comfy_quant"] = raw({"format": format})
    assert f"stored as {told}, which" in refused(native(tmp_path, stored))
    del stored["blocks.0.attn.wq.comfy_quant"]
    assert f"stored as {told}, " in refused(native(tmp_path, stored))


@pytest.mark.parametrize("number", [torch.uint8, torch.int16, torch.int32, torch.bool])
def test_integers_that_pack_other_formats_are_refused(tmp_path, state, number):
    """Bits of floats, or two numbers in one, would be taken at face value."""
    name = "blocks.0.attn.wq.weight"
    for beside in ({}, {f"{name}_scale": torch.ones(())}):
        path = native(tmp_path, state | {name: torch.ones(256, 256, dtype=number)} | beside)
        assert "which packs another format" in refused(path)


def test_int8_needs_scales(tmp_path, state):
    name = "blocks.0.attn.wq.weight"
    path = native(tmp_path, state | {name: torch.ones(256, 256, dtype=torch.int8)})
    assert "I8 without scales" in refused(path)


@pytest.mark.parametrize("mark", [{}, {"per_row": True}, {"quarot": True}, {"convrot_groupsize": 256}, [], 3, "x"])
def test_incomplete_marks_are_refused(tmp_path, state, mark):
    stored, _ = rotated(state, 256, mark=False)
    beside = {f"{layer}.comfy_quant": raw(mark) for layer in layers_of(stored)}
    assert "an unknown format" in refused(native(tmp_path, stored | beside))


def test_marks_without_their_weights_are_refused(tmp_path, state):
    assert "marks without their weights" in refused(with_table(tmp_path, state, {"blocks.9.attn.wq": ROTATED}))
    assert "marks without their weights" in refused(native(tmp_path, state, **{"blocks.9.x.comfy_quant": raw(ROTATED)}))
    load_dit(with_table(tmp_path, state, {"blocks.9.attn.wq": {"format": "float8_e4m3fn"}}))  # nothing unusual


def test_invalid_tables_of_marks_are_refused(tmp_path, state):
    for text in ("{", "[]", '{"layers": 3}', "[" * 100_000):
        save_file(state, tmp_path / "model.safetensors", {"_quantization_metadata": text})
        assert "marks without their weights" in refused(tmp_path / "model.safetensors")


def test_overlong_marks_are_not_read(tmp_path):
    path = native(tmp_path, {"a.weight": torch.ones(4, 4), "a.comfy_quant": torch.full((1 << 17,), 91).byte()})
    checkpoint = open_checkpoint(path)
    assert checkpoint.tensors["a.weight"].marks == (b"",)
    with pytest.raises(K2Error, match="an unknown format"):
        refuse_unreadable(checkpoint)
