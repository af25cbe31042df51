"""4 bits as ComfyUI's own library writes, reads and multiplies them: what is held, written and refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import comfy_kitchen.tensor as kitchen
import pytest
import torch
from comfy_kitchen.backends.eager.w4a8_int8 import dequantize_w4a8_int8_weight, w4a8_int8_linear
from safetensors import safe_open
from safetensors.torch import load_file
from test_comfy_formats import ROTATED, assert_means, convrot, prefixed, raw, stands_for, with_table
from test_dit import inputs, random_model, relative_error
from test_layouts import TINY, native, refused, velocity
from torch import Tensor

from model import library, low_bit
from model.compact import write_compact
from model.four_bit import LEVELS, Codes, decode_codes, decode_e4m3, rotation_size, to_codes
from model.layouts import is_packed, load_dit, stored_precision, to_diffusers
from model.low_bit import few_bit_layers
from model.quantize import rotate

W4A8, W4A4 = kitchen.AsymW4A8Int8Layout, kitchen.TensorCoreConvRotW4A4Layout
MARKS = {
    W4A8: {"format": "asym_w4a8_int8", "group_size": 16},
    W4A4: {"format": "convrot_w4a4", "quant_group_size": 64, "linear_dtype": "int4"},
}
LAYOUTS = pytest.mark.parametrize("layout", [W4A8, W4A4])
NAME = "blocks.0.mlp.up.weight"


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return random_model(TINY).state_dict()


def stored(state: dict[str, Tensor], layout: type = W4A8, **how: object) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A state dict as ComfyUI saves it, the blocks' matrices in a layout, and the weights it stands for."""
    saved, means = dict(state), dict(state)
    for name in [n for n, t in state.items() if n.startswith("blocks.") and t.ndim == 2]:
        packed, params = layout.quantize(state[name], **how)
        means[name] = layout.dequantize(packed, params)
        saved |= {name + end: tensor for end, tensor in layout.state_dict_tensors(packed, params).items()}
        group = {"convrot": True, "convrot_groupsize": params.convrot_groupsize}
        saved[name.removesuffix("weight") + "comfy_quant"] = raw(MARKS[layout] | group)
    return saved, means


# ---- codes --------------------------------------------------------------------------------------


def test_bytes_are_read_as_e4m3():
    bits = torch.arange(256)
    theirs = bits.to(torch.uint8).view(torch.float8_e4m3fn).float()
    assert torch.equal(decode_e4m3(bits)[~theirs.isnan()], theirs[~theirs.isnan()])


def test_every_code_and_scale_decodes_like_the_writer():
    codes = torch.randint(0, 256, (300, 128), dtype=torch.uint8).view(torch.int8)
    scales = torch.arange(256, dtype=torch.uint8)[torch.arange(300 * 16) % 127].view(300, 16)  # positive, finite
    levels = torch.linspace(-1, 1, 16) ** 3
    numbers = decode_codes(codes, scales, levels)

    theirs = dequantize_w4a8_int8_weight(
        codes, scales.view(torch.float8_e4m3fn), torch.ones(300), levels, output_dtype=torch.float32
    )
    assert numbers.dtype == torch.int8 and numbers.shape == (300, 256)
    torch.testing.assert_close(rotate(numbers.float(), 256), theirs, rtol=0, atol=1e-3)


@pytest.mark.parametrize("shape", [(48, 256), (33, 1024), (128, 64)])
def test_rounding_error_matches_comfy_kitchen(shape):
    """comfy-kitchen searches for scales twice."""
    matrix = torch.randn(shape) * torch.logspace(-6, 3, shape[0])[:, None]
    turns = rotation_size(shape[1])
    codes = to_codes(rotate(matrix, turns))
    ours = rotate(codes.numbers * codes.rows[:, None], turns)
    theirs = W4A8.dequantize(*W4A8.quantize(matrix, convrot_groupsize=turns))

    def error(found: Tensor) -> Tensor:
        return (found - matrix).norm(dim=1) / matrix.norm(dim=1)

    assert error(ours).mean() < 1.03 * error(theirs).mean() < 0.08
    assert (codes.levels == torch.tensor(LEVELS)).all() and torch.equal(codes.levels, kitchen_levels())


def test_codes_are_the_nearest_levels():
    """Except for quotients so near the middle between two that the table's steps do not tell them apart."""
    matrix = torch.randn(64, 4096)
    codes = to_codes(matrix)
    own = torch.stack([codes.packed & 15, codes.packed >> 4 & 15], -1).view(64, -1, 16)
    shares = matrix.view(64, -1, 16) / (decode_e4m3(codes.groups.int()) * codes.rows[:, None])[..., None]
    nearest = torch.bucketize(shares, (codes.levels[1:] + codes.levels[:-1]) / 2)
    assert (own != nearest).float().mean() < 0.006 and (own - nearest).abs().max() == 1


def kitchen_levels() -> Tensor:
    from comfy_kitchen.tensor.w4a8_packed import default_w4a8_codebook

    return default_w4a8_codebook()


def test_zero_groups_and_rows():
    matrix = torch.randn(4, 64)
    matrix[1], matrix[2, 16:32], matrix[3] = 0, 0, matrix[3] * 1e-30
    codes = to_codes(matrix)
    back = codes.numbers * codes.rows[:, None]
    assert not back[1].any() and not back[2, 16:32].any() and back.isfinite().all()
    assert relative_error(back[::2], matrix[::2]) < 0.1


@pytest.mark.parametrize("none", [math.nan, math.inf, -math.inf])
def test_row_with_nan_has_no_scale(none):
    matrix = torch.randn(3, 64)
    matrix[1, 20] = none
    assert to_codes(matrix).rows.isfinite().tolist() == [True, False, True]


@pytest.mark.parametrize(("inward", "turns"), [(6144, 256), (16384, 256), (384, 64), (1024, 256), (48, 16), (20, 4)])
def test_rotation_size_divides_the_row(inward, turns):
    assert rotation_size(inward) == turns


# ---- ComfyUI's files ----------------------------------------------------------------------------


@LAYOUTS
def test_network_equals_the_weights_it_stands_for(tmp_path, state, layout):
    saved, means = stored(state, layout)
    loaded, checkpoint = load_dit(native(tmp_path, saved))

    assert loaded.config == TINY and stored_precision(checkpoint) == "int4" and not is_packed(checkpoint)
    assert_means(loaded, means)


@torch.no_grad()
@LAYOUTS
def test_codes_are_kept_as_stored(tmp_path, state, layout):
    saved, means = stored(state, layout)
    path = native(tmp_path, saved)
    four, eight = (load_dit(path, precision=precision)[0] for precision in ("int4", "int8"))

    for name, layer in few_bit_layers(four).items():
        assert layer.format.bits == 4 and torch.equal(layer.weight, saved[name])
        torch.testing.assert_close(layer.matrix(), means[name], rtol=1e-5, atol=1e-6)
        other = few_bit_layers(eight)[name]
        assert other.format.bits == 8 and torch.equal(other.matrix(), layer.matrix())
        tokens = torch.randn(21, layer.in_features)
        assert torch.equal(layer(tokens), other(tokens))
    given = inputs(TINY)
    assert relative_error(four(*given), load_dit(path)[0](*given)) < 0.02
    assert torch.equal(velocity(four), velocity(load_dit(path, precision="int4", streamed=True)[0]))


def test_product_matches_comfy_kitchen(tmp_path, state, monkeypatch):
    """Tokens are rotated, rounded to 8 bits and multiplied by 8-bit numbers, whatever this processor is good at."""
    monkeypatch.setattr(low_bit, "is_native", lambda number, device: True)
    saved, _ = stored(state)
    layer = few_bit_layers(load_dit(native(tmp_path, saved), precision="int4")[0])[NAME]
    tokens = torch.randn(40, layer.in_features)
    parts = [saved[NAME + end] for end in ("", "_s_rel", "_s_channel")]
    theirs = w4a8_int8_linear(tokens, *parts, codebook=saved[f"{NAME}_codebook"], out_dtype=torch.float32)
    assert relative_error(layer(tokens), theirs) < 1e-3


def test_other_levels_and_scales(tmp_path, state):
    """Without levels, codes are whole numbers; scales may be stored as bytes, and levels may differ between layers."""
    plain, means = stored(state, codebook=False)
    assert not any(name.endswith("_codebook") for name in plain)
    assert_means(load_dit(native(tmp_path, plain))[0], means)
    saved, means = stored(state)
    saved |= {name: tensor.view(torch.uint8) for name, tensor in saved.items() if name.endswith("_s_rel")}
    assert_means(load_dit(native(tmp_path, saved))[0], means)

    own = torch.linspace(-1, 1, 16)
    packed, params = W4A8.quantize(state[NAME], codebook_tensor=own)
    saved |= {NAME + end: tensor for end, tensor in W4A8.state_dict_tensors(packed, params).items()}
    four = load_dit(native(tmp_path, saved), precision="int4")[0]
    torch.testing.assert_close(
        few_bit_layers(four)[NAME].matrix(), W4A8.dequantize(packed, params), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("where", ["beside the weights", "in the metadata", "under diffusers' names"])
def test_marks_in_any_place(tmp_path, state, where):
    saved, means = stored(state)
    marks = {name: tensor for name, tensor in saved.items() if name.endswith(".comfy_quant")}
    if where == "beside the weights":
        path = native(tmp_path, prefixed(saved))
    elif where == "in the metadata":
        table = {name.removesuffix(".comfy_quant"): json.loads(bytes(mark.tolist())) for name, mark in marks.items()}
        path = with_table(tmp_path, prefixed({n: t for n, t in saved.items() if n not in marks}), table)
    else:
        theirs = to_diffusers({name: saved[name] for name in state}, TINY)
        names = {id(saved[name]): other for other in theirs for name in state if saved[name] is theirs[other]}
        for name in set(saved) - set(state):
            layer, _, end = name.rpartition(".")
            theirs[f"{names[id(saved[f'{layer}.weight'])].rpartition('.')[0]}.{end}"] = saved[name]
        path = native(tmp_path, theirs)
    assert_means(load_dit(path)[0], means)
    assert {layer.format.bits for layer in few_bit_layers(load_dit(path, precision="int4")[0]).values()} == {4}


def test_mixed_precision_keeps_each_matrix_as_stored(tmp_path, state):
    saved, means = stored(state)
    turned, plain = "blocks.0.mlp.down.weight", "blocks.1.attn.wo.weight"
    rows, scale = convrot(state[turned], 64)
    for name in (turned, plain):
        for end in ("_s_rel", "_s_channel", "_codebook"):
            del saved[name + end]
        del saved[name.removesuffix("weight") + "comfy_quant"]
    mark = {turned.removesuffix("weight") + "comfy_quant": raw(ROTATED | {"convrot_groupsize": 64})}
    saved |= {turned: rows, f"{turned}_scale": scale, plain: state[plain], **mark}
    means |= {turned: stands_for(rows, scale, 64), plain: state[plain]}
    path = native(tmp_path, saved)

    assert_means(load_dit(path)[0], means)
    four, checkpoint = load_dit(path, precision="int4")
    held = {name: layer.format for name, layer in few_bit_layers(four).items()}
    assert stored_precision(checkpoint) == "int4"
    assert plain not in held and torch.equal(four.get_parameter(plain), state[plain])
    assert held[turned] == (torch.int8, 8, 64) and torch.equal(few_bit_layers(four)[turned].weight, rows)
    assert {format for name, format in held.items() if name != turned} == {(torch.int8, 4, 256)}
    write_compact(path, tmp_path / "again.safetensors", "int4", None)
    again = few_bit_layers(load_dit(tmp_path / "again.safetensors", precision="int4")[0])
    assert {name: layer.format for name, layer in again.items()} == held


@LAYOUTS
def test_file_info_counts_the_weights_and_finds_the_release(tmp_path, state, layout, monkeypatch):
    """The open weights are recognised by their shape, in any number of bits."""
    saved, _ = stored(state, layout)
    path = native(tmp_path, saved)
    about, word = library.describe(path), {W4A8: "W4A8", W4A4: "W4A4"}[layout]
    inside = sum(t.numel() for n, t in state.items() if n.startswith("blocks.") and t.ndim == 2)
    assert about["precision"][word] == inside
    assert about["parameters"] == sum(tensor.numel() for tensor in state.values())
    assert (about["shape"]["width"], about["shape"]["heads"]) == (TINY.width, TINY.heads)
    monkeypatch.setattr(library, "RELEASE_SHAPE", {"width": TINY.width, "blocks": TINY.blocks})
    assert library.is_release(path)


# ---- our files ----------------------------------------------------------------------------------


def test_written_files_are_read_by_comfy_kitchen(tmp_path, state):
    write_compact(native(tmp_path, state), tmp_path / "four.safetensors", "int4", None)
    tensors, held = load_file(tmp_path / "four.safetensors"), load_dit(tmp_path / "four.safetensors", precision="int4")
    with safe_open(tmp_path / "four.safetensors", "pt") as file:
        marks = json.loads(file.metadata()["_quantization_metadata"])["layers"]

    layers = few_bit_layers(held[0])
    assert set(marks) == {name.removesuffix(".weight") for name in layers}
    for name, layer in layers.items():
        mark = marks[name.removesuffix(".weight")]
        assert (mark["format"], mark["group_size"], mark["convrot"]) == ("asym_w4a8_int8", 16, True)
        theirs = dequantize_w4a8_int8_weight(
            *(tensors[name + end] for end in ("", "_s_rel", "_s_channel", "_codebook")),
            convrot_groupsize=mark["convrot_groupsize"],
            output_dtype=torch.float32,
        )
        torch.testing.assert_close(layer.matrix(), theirs, rtol=1e-5, atol=1e-6)
        assert relative_error(theirs, state[name]) < 0.08
    wide = sum(state[name].numel() * 2 for name in layers)
    assert sum(tensors[name + end].nbytes for name in layers for end in ("", "_s_rel")) == wide * 9 / 32


def test_matrix_is_coded_in_parts(monkeypatch):
    matrix, format = torch.randn(37, 64), low_bit.FORMATS["int4"]._replace(rotation=16)
    whole = low_bit.pack(matrix, None, 0, format)
    monkeypatch.setattr("model.quantize._CHUNK", 64 * 5)
    monkeypatch.setattr("model.four_bit.CHUNK", {"cpu": 64 * 3})
    for a, b in zip(whole, low_bit.pack(matrix, None, 0, format), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(Codes(*whole).numbers, decode_codes(*(whole[i] for i in (0, 1, 3))))


# ---- refusals -----------------------------------------------------------------------------------


def with_(end: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda saved: saved | {NAME + end: change(saved[NAME] if end == "_correction" else saved[NAME + end])}


def without(name: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda saved: {n: tensor for n, tensor in saved.items() if n != name}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without(f"{NAME}_s_rel"), "asym_w4a8_int8 without scales"),
        (without(f"{NAME}_s_channel"), "asym_w4a8_int8 without scales"),
        (with_("", lambda packed: packed[:, :4].contiguous()), "asym_w4a8_int8 of shape [768, 8]"),
        (with_("_correction", lambda packed: torch.ones(16, len(packed))), 'with "weight_correction" beside them'),
        (with_("_codebook", lambda levels: levels.repeat(4)), "with levels of F32 [64]"),
        (with_("_s_channel", lambda rows: rows[:1]), "with scales of F32 [1]"),
        (with_("_s_rel", lambda groups: groups.float()), "with scales of F32 ["),
        (with_("_s_rel", lambda groups: groups[:, :8].contiguous()), "with scales of F8_E4M3 ["),
        (without("blocks.0.mlp.up.comfy_quant"), "with an unexplained"),
        (without("blocks.1.attn.wo.weight"), "scales without their weights"),
    ],
)
def test_misleading_files_are_refused(tmp_path, state, change, said):
    assert said in refused(native(tmp_path, change(stored(state)[0])))


@pytest.mark.parametrize(
    "how", [{"group_size": 32}, {"group_size": "16"}, {"convrot_groupsize": 512}, {"bits": 6}, {"quant_group_size": 32}]
)
def test_other_group_sizes_are_refused(tmp_path, state, how):
    saved, _ = stored(state)
    mark = {"blocks.0.mlp.up.comfy_quant": raw(MARKS[W4A8] | {"convrot_groupsize": 256} | how)}
    message = refused(native(tmp_path, saved | mark))
    assert next(iter(how)) in message or "in groups of 512" in message


def test_w4a4_has_no_groups(tmp_path, state):
    saved, _ = stored(state, W4A4)
    groups = torch.ones(len(state[NAME]), state[NAME].shape[1] // 16).to(torch.float8_e4m3fn)
    assert "convrot_w4a4 with group scales" in refused(native(tmp_path, saved | {f"{NAME}_s_rel": groups}))


def test_6_bits(tmp_path, state):
    """The mark is the same, the widths are not."""
    saved, _ = stored(state, bits=6)
    assert "asym_w4a8_int8 with scales of F8_E4M3" in refused(native(tmp_path, saved))
