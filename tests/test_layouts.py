"""Every layout found in the wild gives the same velocity, and every invalid file one clear error message."""

from __future__ import annotations

import json
import random
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_dit import inputs, random_model, reference, relative_error
from torch import Tensor

from model import gguf_file
from model.dit import DiTConfig
from model.errors import K2Error
from model.gguf_file import GGUFTensors
from model.headers import read_header
from model.layouts import is_packed, load_dit, to_diffusers
from model.quantize import quantise, to_int8

# wide enough for GGUF's blocks of 256; the text matrices are narrower, as some in every real network are
TINY = DiTConfig(width=256, heads=4, kv_heads=2, blocks=2, text_width=64, text_taps=3, text_heads=2)


@pytest.fixture(scope="module")
def model():
    return random_model(TINY)


@pytest.fixture(scope="module")
def state(model):
    return model.state_dict()


@torch.no_grad()
def velocity(model) -> Tensor:
    tokens, sigma, embeds, grid = inputs(TINY)
    return model(tokens, sigma, embeds, grid)


# ---- writers of other tools' files --------------------------------------------------------------


def native(folder: Path, state, prefix: str = "", **more: Tensor) -> Path:
    save_file({prefix + name: tensor for name, tensor in state.items()} | more, folder / "model.safetensors")
    return folder / "model.safetensors"


def comfy_fp8(folder: Path, state, scale_name: str, mark: str = '{"format": "float8_e4m3fn"}') -> Path:
    """Matrices as float8 times one scale each, under ComfyUI's prefix; the rest bf16."""
    stored = {}
    for name, tensor in state.items():
        layer = "model.diffusion_model." + name.removesuffix(".weight")
        if name.endswith(".weight") and tensor.ndim == 2 and name.startswith("blocks."):
            scale = tensor.abs().max() / 448
            stored[f"{layer}.weight"] = (tensor / scale).to(torch.float8_e4m3fn)
            stored[f"{layer}.{scale_name}"] = scale if scale_name == "weight_scale" else scale[None]
            stored[f"{layer}.comfy_quant"] = torch.tensor(list(mark.encode()), dtype=torch.uint8)
        else:
            stored["model.diffusion_model." + name] = tensor.bfloat16()
    if scale_name == "scale_weight":
        stored["model.diffusion_model.scaled_fp8"] = torch.zeros(2).to(torch.float8_e4m3fn)
    return native(folder, stored)


INT8_ROWS = '{"format": "int8_tensorwise", "orig_dtype": "torch.bfloat16", "per_row": true}'


def comfy_int8(folder: Path, state, mark: str = INT8_ROWS) -> Path:
    """Matrices as int8 times a scale [out, 1] each row, marked as converters do; the rest bf16."""
    stored = {name: tensor.bfloat16() for name, tensor in state.items()}
    for name in [name for name, t in state.items() if name.startswith("blocks.") and t.ndim == 2]:
        rows, scale = to_int8(state[name])
        stored |= {name: rows, f"{name}_scale": scale[:, None]}
        stored[f"{name.removesuffix('.weight')}.input_scale"] = torch.ones(())
        stored[f"{name.removesuffix('.weight')}.comfy_quant"] = torch.tensor(list(mark.encode()), dtype=torch.uint8)
    return native(folder, stored)


def q4_k(rows: np.ndarray) -> np.ndarray:
    """[n, 256 m] -> bytes [n, 144 m]: 8 runs of 32 numbers, each q · scale − offset with q in 0 … 15."""
    runs = rows.reshape(-1, 8, 32)
    low = np.minimum(runs.min(-1), 0)
    scale, offset = (runs.max(-1) - low) / 15, -low
    d, dmin = (np.maximum(x.max(-1, keepdims=True) / 63, 1e-8).astype(np.float16) for x in (scale, offset))
    sc, mn = ((x / y.astype(np.float32)).round().clip(0, 63).astype(np.uint8) for x, y in ((scale, d), (offset, dmin)))
    step, base = ((y.astype(np.float32) * x)[..., None] for x, y in ((sc, d), (mn, dmin)))
    q = ((runs + base) / np.maximum(step, 1e-12)).round().clip(0, 15).astype(np.uint8)
    scales = np.concatenate(
        [sc[:, :4] | sc[:, 4:] >> 4 << 6, mn[:, :4] | mn[:, 4:] >> 4 << 6, sc[:, 4:] & 15 | (mn[:, 4:] & 15) << 4], -1
    )
    packed = (q[:, 0::2] | q[:, 1::2] << 4).reshape(-1, 128)
    return np.concatenate([d.view(np.uint8), dmin.view(np.uint8), scales, packed], -1).reshape(len(rows), -1)


def gguf_of(folder: Path, state, kind: str, prefix: str = "", **settings: int) -> Path:
    """As by ComfyUI's converter: small tensors in F32, matrices in `kind`, reshaped where rows do not fill blocks."""
    gguf = pytest.importorskip("gguf")
    path = folder / f"{kind}.gguf"
    writer = gguf.GGUFWriter(path, "krea2", **settings)
    for name, tensor in state.items():
        data = tensor.float().numpy()
        if tensor.ndim < 2 or tensor.numel() < 1024:
            # llama.cpp, which alone makes K-quants, forgets dimensions of 1
            writer.add_tensor(prefix + name, data.squeeze() if kind == "Q4_K" else data)
            continue
        dtype = gguf.GGMLQuantizationType[kind]
        if data.shape[-1] % gguf.GGML_QUANT_SIZES[dtype][0]:
            writer.add_array(f"comfy.gguf.orig_shape.{prefix}{name}", list(data.shape))
            data = data.reshape(-1, 256)
        raw = q4_k(data) if kind == "Q4_K" else gguf.quantize(data, dtype)
        writer.add_tensor(prefix + name, raw, raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def diffusers_folder(folder: Path, model, size: str) -> Path:
    reference(model).save_pretrained(folder / "transformer", max_shard_size=size)
    return folder


def all_in_one(folder: Path, state) -> Path:
    beside = {"vae.decoder.conv_in.weight": torch.zeros(2), "text_encoders.q.model.norm.weight": torch.zeros(2)}
    beside |= {f"model.diffusion_model.last.{x}.weight": torch.zeros(2, 2) for x in ("up", "down")}
    return native(folder, state, "model.diffusion_model.", **beside)


Write = Callable[[Path, torch.nn.Module, dict[str, Tensor]], Path]
EXACT: dict[str, Write] = {
    "native": lambda folder, _, state: native(folder, state),
    "ComfyUI": lambda folder, _, state: native(folder, state, "model.diffusion_model."),
    "ComfyUI, short prefix": lambda folder, _, state: native(folder, state, "diffusion_model."),
    "ComfyUI, all in one": lambda folder, _, state: all_in_one(folder, state),
    "pipeline in shards": lambda folder, model, _: diffusers_folder(folder, model, "1MB"),
    "transformer": lambda folder, model, _: diffusers_folder(folder, model, "1GB") / "transformer",
    "compiled": lambda folder, _, state: native(folder, state, "_orig_mod."),
    "of a whole pipeline": lambda folder, _, state: native(folder, to_diffusers(state, TINY), "transformer."),
    "ComfyUI, diffusers": lambda folder, _, state: native(folder, to_diffusers(state, TINY), "model.diffusion_model."),
    "diffusers in one file": lambda folder, _, state: native(folder, to_diffusers(state, TINY)),
    "GGUF F32": lambda folder, _, state: gguf_of(folder, state, "F32"),
    "GGUF, prefix": lambda folder, _, state: gguf_of(folder, state, "F32", "model.diffusion_model."),
    "GGUF, diffusers": lambda folder, _, state: gguf_of(folder, to_diffusers(state, TINY), "F32"),
}
# a weight's largest error, relative to the tensor's largest; then the velocity's, relative (measured: half of it)
ROUNDED: dict[str, tuple[float, float, Write]] = {
    "native bf16": (2**-8, 0.006, lambda f, _, s: native(f, {n: t.bfloat16() for n, t in s.items()})),
    "int8 rows": (1 / 254 + 1e-4, 0.01, lambda f, _, s: native(f, quantise(s))),
    "int8 rows, marked": (1 / 254 + 1e-4, 0.01, lambda f, _, s: comfy_int8(f, s)),
    "fp8_scaled": (2**-4, 0.03, lambda f, _, s: comfy_fp8(f, s, "weight_scale")),
    "fp8_scaled, converted": (
        2**-4,
        0.03,
        lambda f, _, s: comfy_fp8(f, s, "weight_scale", '{"format": "float8_e4m3fn", "orig_shape": [1, 1]}'),
    ),
    "fp8_scaled, older": (2**-4, 0.03, lambda f, _, s: comfy_fp8(f, s, "scale_weight")),
    "GGUF F16": (2**-11, 0.001, lambda f, _, s: gguf_of(f, s, "F16")),
    "GGUF BF16": (2**-8, 0.006, lambda f, _, s: gguf_of(f, s, "BF16")),
    "GGUF Q8_0": (1 / 254 + 2**-10, 0.02, lambda f, _, s: gguf_of(f, s, "Q8_0")),
    "GGUF Q4_K": (2 / 15, 0.3, lambda f, _, s: gguf_of(f, s, "Q4_K")),
}


@pytest.mark.parametrize("case", EXACT)
def test_every_layout_gives_the_same_velocity(tmp_path, model, state, case):
    loaded, _ = load_dit(EXACT[case](tmp_path, model, state))

    assert loaded.config == TINY
    assert relative_error(velocity(loaded), velocity(model)) < 1e-4
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())


@pytest.mark.parametrize("case", ROUNDED)
def test_rounded_layouts_are_off_by_their_rounding(tmp_path, model, state, case):
    of_weight, of_velocity, write = ROUNDED[case]
    loaded, checkpoint = load_dit(write(tmp_path, model, state))

    assert loaded.config == TINY
    assert is_packed(checkpoint) == (case in ("GGUF Q8_0", "GGUF Q4_K"))
    for name, tensor in loaded.state_dict().items():
        assert (tensor - state[name]).abs().max() <= of_weight * state[name].abs().max(), name
    assert 0 < relative_error(velocity(loaded), velocity(model)) < of_velocity


def test_a_file_misnamed_gguf_is_recognised(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"hello, hello, hello")
    with pytest.raises(K2Error, match=r"x\.gguf is not a GGUF file\."):
        read_header(tmp_path / "x.gguf")


def test_a_folder_of_one_gguf_file(tmp_path, state):
    file = gguf_of(tmp_path, state, "F32")
    _, checkpoint = load_dit(tmp_path)
    assert checkpoint.files == [file]

    file.with_name("another.gguf").write_bytes(file.read_bytes())
    assert "holds 2 .gguf files and no index" in refused(tmp_path)


# ---- what must be refused -----------------------------------------------------------------------


def refused(path: Path) -> str:
    with pytest.raises(K2Error) as error:
        load_dit(path)
    assert path.name in str(error.value) and error.value.hint
    return str(error.value)


@pytest.mark.parametrize("case", ["native", "ComfyUI", "diffusers in one file", "GGUF F32", "GGUF, prefix"])
def test_missing_and_unknown_tensors_are_named(tmp_path, model, state, case):
    less = {name: tensor for name, tensor in state.items() if name != "blocks.1.mlp.up.weight"}
    more = {} if "diffusers" in case else {"blocks.1.mlp.extra": torch.zeros(4)}
    if "diffusers" in case:  # written from a native state dict
        whole = to_diffusers(state, TINY) | {"transformer_blocks.1.extra": torch.zeros(4)}
        del whole["transformer_blocks.1.ff.up.weight"]
        message = refused(native(tmp_path, whole))
    else:
        message = refused(EXACT[case](tmp_path, model, less | more))
    assert "1 missing (blocks.1.mlp.up.weight)" in message
    assert "1 unknown (" in message and "extra)" in message


def test_prefixed_and_bare_names_together_are_refused(tmp_path, state):
    extra = {"first.weight": state["first.weight"].clone()}
    assert "with and without" in refused(native(tmp_path, state, "model.diffusion_model.", **extra))


@pytest.mark.parametrize(
    ("names", "what"),
    [
        (["model.language_model.embed_tokens.weight", "model.visual.blocks.0.attn.qkv.weight"], "a text encoder"),
        (["encoder.downsamples.0.residual.0.gamma", "decoder.conv1.weight"], "an autoencoder"),  # Qwen-Image's own
        (["bn.running_mean", "encoder.conv_in.weight", "decoder.conv_in.weight"], "an autoencoder"),  # FLUX.2's
        (["transformer_blocks.0.img_mod.1.weight"], "another kind of image model"),
    ],
    ids=["Qwen3-VL", "Qwen-Image VAE", "FLUX.2 VAE", "Qwen-Image"],
)
def test_other_networks_are_recognised(tmp_path, names, what):
    assert what in refused(native(tmp_path, {name: torch.zeros(2) for name in names}))


def test_a_text_encoder_as_gguf_is_recognised(tmp_path):
    assert "a text encoder" in refused(gguf_of(tmp_path, {"blk.0.attn_q.weight": torch.zeros(2)}, "F32"))


@pytest.mark.parametrize(
    ("mark", "what"),
    [
        ('{"format": "int8_tensorwise", "convrot": true}', "F8_E4M3 rows of 256 rotated in groups of 256 (convrot)"),
        ('{"format": "int8_blockwise", "group_size": 128}', "int8_blockwise with group_size"),
        ('{"format": "int8_tensorwise", "smooth": true}', "int8_tensorwise with smooth"),
        ('{"format": "nvfp4"}', "nvfp4"),
        ('{"format": ["x"]}', "unknown"),
        ("[" * 100_000, "unknown"),
    ],
    ids=["rotated floats", "blocks", "smoothed", "four bits", "nonsense", "deep"],
)
def test_unsupported_quantisation_marks_are_refused(tmp_path, state, mark, what):
    """They may have exactly the shapes of supported weights: only the mark differs."""
    assert what in refused(comfy_fp8(tmp_path, state, "weight_scale", mark))


@pytest.mark.parametrize("shape", [[256, 8], [16, 16], [1, 256]])
def test_block_scales_are_refused(tmp_path, state, shape):
    """Even if there are exactly as many as rows."""
    name = "blocks.0.attn.wq.weight"
    stored = state | {name: state[name].to(torch.float8_e4m3fn), f"{name}_scale": torch.ones(shape)}
    assert f"F8_E4M3 with scales of {shape}" in refused(native(tmp_path, stored))


@pytest.mark.parametrize(("number", "called"), [(torch.int8, "I8"), (torch.float8_e4m3fn, "F8_E4M3")])
def test_column_scales_are_refused(tmp_path, state, number, called):
    """As many as a row is long, whereas k2 reads one per row."""
    name = "blocks.0.mlp.up.weight"
    rows, columns = state[name].shape
    stored = state | {name: state[name].to(number), f"{name}_scale": torch.ones(columns)}
    assert rows != columns
    assert f"{called} with scales of [{columns}]" in refused(native(tmp_path, stored))


@pytest.mark.parametrize(
    ("beside", "what"),
    [
        ({"blocks.0.attn.wq.weight_scale_inv": torch.ones(2, 2)}, '8 bits with "weight_scale_inv" beside them'),
        ({"blocks.0.attn.wq.weight_zero_point": torch.ones(2, 1)}, '8 bits with "weight_zero_point" beside them'),
        ({"blocks.0.attn.wq.SCB": torch.ones(256)}, "bitsandbytes"),
        ({"blocks.0.attn.other.weight_scale": torch.ones(())}, "scales without their weights"),
        ({"blocks.0.attn.wq.weight": torch.ones(256, 256, dtype=torch.int8)}, "I8 without scales"),
    ],
    ids=["blocks", "zero points", "bitsandbytes", "an orphan", "none"],
)
def test_scales_that_would_be_lost_are_refused(tmp_path, state, beside, what):
    assert what in refused(native(tmp_path, state | beside))


PACKED = [  # what other tools store in place of a matrix, and which tool
    ({".qweight": torch.int8, ".wscales": torch.bfloat16}, "SVDQuant"),
    ({".qweight": torch.int32, ".qzeros": torch.int32, ".scales": torch.float16}, "GPTQ or AWQ"),
    ({".encoded_exponent": torch.uint8, ".sign_mantissa": torch.uint8}, "DFloat11"),
    ({".weight._data": torch.int8, ".weight._scale": torch.float32}, "quanto"),
    ({".weight._data._data": torch.uint8, ".weight._scale": torch.float32, ".weight._shift": torch.float32}, "quanto"),
    ({"._weight_qdata": torch.int8, "._weight_scale": torch.float32}, "torchao"),
    ({".weight": torch.uint8, ".weight.absmax": torch.uint8}, "bitsandbytes"),
    ({".weight": torch.uint8, ".scale": torch.float32, ".zero_point": torch.float32}, "SDNQ"),
]
every_tool = pytest.mark.parametrize(("packed", "tool"), PACKED, ids=[tool for _, tool in PACKED])


def packed_as(packed: dict[str, torch.dtype], state: dict[str, Tensor], within: str) -> dict[str, Tensor]:
    """A network's tensors, with matrices that have `within` in their names packed as by another tool."""
    matrices = {name for name in state if within in name and state[name].ndim == 2 and name.endswith(".weight")}
    stored = {name: tensor for name, tensor in state.items() if name not in matrices}
    for name in matrices:
        stored |= {name.removesuffix(".weight") + end: torch.zeros(64, 1).to(number) for end, number in packed.items()}
    return stored


@every_tool
@pytest.mark.parametrize("names", ["native", "diffusers"])
@pytest.mark.parametrize("within", ["blocks.", ""], ids=["blocks", "all"])
def test_matrices_packed_by_other_tools_are_refused(tmp_path, state, within, names, packed, tool):
    """They have neither the names nor the shapes of a network's, but nothing is wrong with the download."""
    theirs = to_diffusers(state, TINY) if names == "diffusers" else state
    assert f"stored as {tool}, which" in refused(native(tmp_path, packed_as(packed, theirs, within)))


def test_other_networks_are_recognised_even_when_packed(tmp_path):
    """A file in more bits would not be Krea 2 either."""
    theirs = {"layers.0.attention.qkv.weight": torch.zeros(64, 1, dtype=torch.uint8)}
    theirs |= {"layers.0.attention.qkv.weight.absmax": torch.zeros(4)}
    assert "is not a Krea 2 transformer" in refused(native(tmp_path, theirs))


def test_config_json_names_the_tool_if_tensors_do_not(tmp_path, model):
    folder = diffusers_folder(tmp_path, model, "1GB") / "transformer"
    file, config = folder / "diffusion_pytorch_model.safetensors", folder / "config.json"
    stored = load_file(file)
    stored["transformer_blocks.0.attn.to_q.weight"] = torch.ones(256, 256, dtype=torch.int8)
    save_file(stored, file)
    told = json.loads(config.read_text())
    for settings, what in (({"quant_method": "sdnq"}, "sdnq, I8 without scales"), (["sdnq"], "I8 without scales")):
        config.write_text(json.dumps(told | {"quantization_config": settings}))
        assert f"stored as {what}, which" in refused(folder)


@pytest.mark.parametrize("scale_name", ["weight_scale", "scale_weight"])
def test_fp8_scales_with_diffusers_names(tmp_path, model, state, scale_name):
    theirs, name = to_diffusers(state, model.config), "transformer_blocks.0.attn.to_q"
    matrix = theirs[f"{name}.weight"]
    scale = matrix.abs().max() / 448
    theirs |= {f"{name}.weight": (matrix / scale).to(torch.float8_e4m3fn), f"{name}.{scale_name}": scale}
    loaded, _ = load_dit(native(tmp_path, theirs))
    torch.testing.assert_close(loaded.blocks[0].attn.wq.weight, matrix, rtol=0.07, atol=1e-3)


# ---- GGUF headers -------------------------------------------------------------------------------


def test_the_header_reads_as_in_the_gguf_package(tmp_path, state):
    gguf = pytest.importorskip("gguf")
    path = gguf_of(tmp_path, state, "Q4_K")
    header, loaded = read_header(path), load_dit(path)[0].state_dict()

    for tensor in gguf.GGUFReader(path).tensors:
        entry = header[tensor.name]
        assert entry["dtype"] == tensor.tensor_type.name
        assert entry["data_offsets"] == [tensor.data_offset, tensor.data_offset + tensor.n_bytes]
        whole = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(entry["shape"])
        assert np.array_equal(loaded[tensor.name].squeeze(), whole)
    assert {gguf.GGMLQuantizationType(number).name: gguf.GGML_QUANT_SIZES[number] for number in gguf_file.FORMATS} == {
        name: (numbers, size) for name, numbers, size in gguf_file.FORMATS.values()
    }


def header(*, version=3, fields=(), tensors=(), counts=None, data=b"") -> bytes:
    """A GGUF file by hand: fields (name, kind, bytes), tensors (name, dims, format, offset)."""
    text = lambda name: struct.pack("<Q", len(name)) + name.encode()  # noqa: E731
    raw = struct.pack("<4sIQQ", b"GGUF", version, *(counts or (len(tensors), len(fields))))
    for name, kind, value in fields:
        raw += text(name) + struct.pack("<I", kind) + value
    for name, dims, dtype, offset in tensors:
        raw += text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, dtype, offset)
    return raw + bytes(-len(raw) % 32) + data


HUGE = 1 << 60
LIES = {
    "endless fields": header(counts=(0, HUGE)),
    "endless tensors": header(counts=(HUGE, 0)),
    "an endless list": header(fields=[("list", 9, struct.pack("<IQ", 0, HUGE))]),
    "an endless text": header(fields=[("text", 8, struct.pack("<Q", HUGE))]),
    "endless texts": header(fields=[("texts", 9, struct.pack("<IQ", 8, HUGE))]),
    "lists in lists": header(fields=[("list", 9, struct.pack("<IQ", 9, HUGE))]),
    "an unknown kind": header(fields=[("odd", 77, b"")]),
    "a field twice": header(fields=[("a", 0, b"1"), ("a", 0, b"1")]),
    "no alignment": header(fields=[("general.alignment", 4, bytes(4))]),
    "an odd alignment": header(fields=[("general.alignment", 4, struct.pack("<I", 33))]),
    "a future version": header(version=9),
    "big-endian": header(version=3 << 24),
    "a tensor twice": header(tensors=[("t", [8], 0, 0), ("t", [8], 0, 32)], data=bytes(64)),
    "overlapping tensors": header(tensors=[("t", [16], 0, 0), ("u", [8], 0, 32)], data=bytes(64)),
    "past the end": header(tensors=[("t", [8], 0, 64)], data=bytes(64)),
    "far past the end": header(tensors=[("t", [8], 0, (1 << 64) - 32)], data=bytes(64)),
    "dims that overflow": header(tensors=[("t", [1 << 63, 1 << 63], 0, 0)], data=bytes(64)),
    "no dims": header(tensors=[("t", [], 0, 0)], data=bytes(64)),
    "an empty dim": header(tensors=[("t", [0], 0, 0)], data=bytes(64)),
    "half a block": header(tensors=[("t", [16], 8, 0)], data=bytes(64)),
    "another shape": header(
        fields=[("comfy.gguf.orig_shape.t", 9, struct.pack("<IQ2i", 5, 2, -2, -4))],
        tensors=[("t", [8], 0, 0)],
        data=bytes(32),
    ),
    "a name that is not text": header(tensors=[("t", [8], 0, 0)], data=bytes(32)).replace(b"t", b"\xff"),
}


@pytest.mark.parametrize("lie", LIES)
def test_invalid_gguf_headers_are_refused(tmp_path, lie):
    path = tmp_path / "model.gguf"
    path.write_bytes(LIES[lie])
    assert "damaged GGUF file" in refused(path)


def test_a_piece_of_a_split_file_is_recognised(tmp_path, state):
    gguf_of(tmp_path, state, "F32", split_max_tensors=60)
    first, *_, last = sorted(tmp_path.iterdir())
    for piece in (first, last):
        assert "is one of 2 pieces of a GGUF file" in refused(piece)
    assert "holds 2 .gguf files" in refused(tmp_path)


def test_unsupported_number_formats_are_named(tmp_path):
    path = tmp_path / "model.gguf"
    for number, called in ((40, "NVFP4"), (28, "F64"), (77, "number format 77")):
        path.write_bytes(header(tensors=[("t", [256], number, 0)], data=bytes(64)))
        assert f"tensors in {called}, which" in refused(path)


@pytest.mark.parametrize("number", gguf_file.FORMATS)
def test_reading_in_pieces_equals_reading_at_once(tmp_path, monkeypatch, number):
    gguf = pytest.importorskip("gguf")
    name, numbers, size = gguf_file.FORMATS[number]
    path, raw = tmp_path / "model.gguf", np.random.default_rng(0).integers(0, 60, 5 * size, dtype=np.uint8)
    path.write_bytes(header(tensors=[("t", [5 * numbers], number, 0)], data=raw.tobytes()))
    monkeypatch.setattr(GGUFTensors, "CHUNK", 2 * numbers)

    with GGUFTensors(path) as file:
        read = file.get_tensor("t").numpy()
    assert np.array_equal(read, gguf.dequantize(raw, gguf.GGMLQuantizationType[name]).flatten())
    assert len(read) == 5 * numbers and np.isfinite(read).all() and read.any()


def test_files_truncated_or_corrupted_anywhere(tmp_path, state):
    """Whatever is broken, the result is a K2Error or a readable header."""
    few = {name: tensor for name, tensor in state.items() if name.startswith("blocks.0.attn")}
    whole = gguf_of(tmp_path, few, "Q8_0").read_bytes()
    path, dice = tmp_path / "broken.gguf", random.Random(0)
    errors = 0
    for _ in range(300):
        raw = bytearray(whole[: dice.randrange(4, 1200)] if dice.random() < 0.3 else whole)
        for _ in range(dice.randrange(1, 4)):
            raw[dice.randrange(min(len(raw), 800))] = dice.randrange(256)
        path.write_bytes(b"GGUF" + raw[4:])
        try:
            read_header(path)
        except K2Error as error:
            errors += "broken.gguf" in str(error)
    assert errors > 100


def test_without_the_gguf_package(tmp_path, state, monkeypatch):
    path = gguf_of(tmp_path, state, "F32")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(K2Error) as error:
        load_dit(path)
    assert "k2[gguf]" in error.value.hint
    assert "blocks.0.attn.wq.weight" in read_header(path)  # its header can be read all the same
