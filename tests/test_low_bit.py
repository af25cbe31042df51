"""Low-bit layers: right within their rounding, independent of the batch, and holding the file's own bits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from test_dit import inputs, random_model, relative_error
from test_lora import TINY, dense, linears, random_pairs

from model import low_bit
from model.checkpoint import save
from model.compact import write_compact
from model.layouts import load_dit
from model.lora import applied
from model.lora_match import read_lora
from model.low_bit import (
    FORMATS,
    SUFFIXES,
    FewBitLinear,
    default_format,
    dequantised_state,
    few_bit_layers,
    is_native_on,
    pack,
    use_few_bits,
)
from model.quantize import cached_hadamard, quantise, to_8_bits, to_int8

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def layer(matrix: torch.Tensor, precision: str, bias: torch.Tensor | None = None) -> FewBitLinear:
    format = default_format(precision, matrix.shape[1])
    made = FewBitLinear(matrix.shape[1], matrix.shape[0], bias is not None, format)
    held = pack(matrix, None, 0, format)
    state = {f"weight{end}": tensor for end, tensor in zip(SUFFIXES[format.bits], held, strict=True)}
    made.load_state_dict(state | ({} if bias is None else {"bias": bias}), assign=True)
    return made.requires_grad_(False)


@pytest.fixture(params=[True, False], ids=["multiplied in 8 bits", "widened"])
def way(request, monkeypatch):
    """Both ways of computing the product, whatever this processor is good at."""
    monkeypatch.setattr(low_bit, "is_native", lambda number, device: request.param and number == torch.int8)


@pytest.mark.parametrize(("precision", "most"), [("int8", 0.01), ("fp8", 0.03), ("int4", 0.06)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_right_within_rounding(way, precision, most, dtype):
    """Rows and tokens of very different magnitudes: each has its own scale, and errors are measured relative to it."""
    matrix = torch.randn(96, 64) * torch.logspace(-3, 2, 96)[:, None]
    x = torch.randn(2, 21, 64) * torch.logspace(-2, 2, 21)[:, None]

    answer = layer(matrix, precision)(x.to(dtype))

    assert answer.dtype == dtype and answer.shape == (2, 21, 96)
    error = (answer.float() - F.linear(x, matrix)).abs() / (x.norm(dim=-1)[..., None] * matrix.norm(dim=-1))
    assert error.max() < most
    bias = torch.randn(96)
    assert torch.equal(layer(matrix, precision, bias)(x.to(dtype)), answer + bias.to(dtype))


def test_dequantised_products_use_the_rounded_matrix(monkeypatch):
    monkeypatch.setattr(low_bit, "is_native", lambda number, device: False)
    matrix, x = torch.randn(48, 32), torch.randn(5, 32)
    for precision in FORMATS:
        small = layer(matrix, precision)
        assert 0 < relative_error(small.matrix(), matrix) < 0.1
        torch.testing.assert_close(small(x), F.linear(x, small.matrix()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_token_does_not_depend_on_others(way, precision):
    small, tokens = layer(torch.randn(64, 128), precision), torch.randn(700, 128)
    alone = small(tokens[300:301])
    if small.runs_in_8_bits(tokens):
        assert torch.equal(small(tokens)[300:301], alone)
    torch.testing.assert_close(small(tokens)[300:301], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("precision", FORMATS)
def test_gradients_use_the_rounded_matrix(way, precision):
    """Tokens that need a gradient are not rounded, whatever this processor can multiply."""
    small, tokens = layer(torch.randn(48, 32), precision), torch.randn(5, 32, requires_grad=True)
    rounded, slope = small.matrix(), torch.randn(5, 48)

    answer = small(tokens)

    torch.testing.assert_close(answer, F.linear(tokens, rounded), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.autograd.grad(answer, tokens, slope)[0], slope @ rounded, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("device", "tokens", "inward", "outward", "expected"),
    [
        ("cpu", 1, 8, 8, True),
        ("mps", 17, 64, 64, False),
        ("cuda", 16, 64, 64, False),
        ("cuda", 17, 64, 64, True),
        ("cuda", 17, 72, 64, False),
        ("cuda", 17, 64, 72, False),
    ],
)
def test_gpus_have_kernels_for_some_shapes_only(monkeypatch, device, tokens, inward, outward, expected):
    rows = type("Rows", (list,), {"device": torch.device(device)})(range(tokens))
    monkeypatch.setattr(low_bit, "is_native", lambda number, device: number == torch.int8 and device != "mps")
    assert FewBitLinear(inward, outward, False, FORMATS["int8"]).runs_in_8_bits(rows) is expected


def test_which_devices_multiply_in_8_bits(monkeypatch):
    def both(device: str) -> tuple[bool, bool]:
        return tuple(bool(is_native_on.__wrapped__(FORMATS[each].dtype, device, 0)) for each in ("int8", "fp8"))

    for known, able in (({}, False), ({"avx512_vnni": False, "amx_int8": True}, True), ({"avx512_bf16": True}, False)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda known=known: known)
        assert both("cpu") == (able, False) and both("mps") == (False, False)
    for system, version, able in (
        ("linux", (7, 5), (False, False)),
        ("linux", (8, 0), (True, False)),
        ("linux", (8, 9), (True, False)),
        ("linux", (9, 0), (True, True)),
        ("linux", (12, 0), (True, True)),
        ("win32", (9, 0), (True, True)),
        ("win32", (12, 0), (True, False)),  # whose builds have no kernel with row scales
    ):
        monkeypatch.setattr("sys.platform", system)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda card, version=version: version)
        assert both("cuda") == able
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert both("cuda") == (False, False)


def test_each_gpu_is_asked_separately(monkeypatch):
    hopper_and_ampere = [(9, 0), (8, 6)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda card: hopper_and_ampere[card])
    is_native_on.cache_clear()
    for card, able in enumerate((True, False, True)):
        monkeypatch.setattr(torch.cuda, "current_device", lambda card=card: card % 2)
        assert low_bit.is_native(torch.float8_e4m3fn, "cuda") is able
    is_native_on.cache_clear()


@pytest.mark.parametrize("precision", FORMATS)
def test_training_works_after_rendering(precision):
    """What rendering caches must not be inference tensors, through which no gradient could pass."""
    few_bits_of_rows = layer(torch.randn(64, 64), precision)
    cached_hadamard.cache_clear()
    with torch.inference_mode():
        few_bits_of_rows(torch.randn(2, 64))
    x = torch.randn(2, 64, requires_grad=True)
    few_bits_of_rows(x).sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0


@pytest.mark.parametrize("precision", FORMATS)
def test_empty_and_zero_inputs(precision):
    small = layer(torch.zeros(16, 16), precision)
    assert small(torch.empty(0, 16)).shape == (0, 16)
    assert torch.equal(small(torch.zeros(3, 16)), torch.zeros(3, 16))
    assert torch.equal(small(torch.randn(3, 16)), torch.zeros(3, 16))


@torch.no_grad()
@pytest.mark.parametrize(("precision", "most"), [("int8", 0.02), ("fp8", 0.05), ("int4", 0.1)])
def test_rounded_network(tmp_path, precision, most):
    """From a wide file, whose matrices are rounded as they are read; only those of the blocks are."""
    model = random_model(TINY)
    save(tmp_path / "wide.safetensors", model.state_dict(), {})
    small, _ = load_dit(tmp_path / "wide.safetensors", precision=precision)

    few = few_bit_layers(small)
    assert set(few) == {f"{name}.weight" for name in linears(model) if name.startswith("blocks.")}
    assert {layer.format[:2] for layer in few.values()} == {FORMATS[precision][:2]}
    tokens, sigma, embeds, grid = inputs(TINY)
    assert relative_error(small(tokens, sigma, embeds, grid), model(tokens, sigma, embeds, grid)) < most
    assert list(dequantised_state(small, torch.float32)) == list(model.state_dict())


def test_stored_8_bits_are_not_rounded_again(tmp_path):
    """Our files have a scale per row, other tools' one per matrix, or none if the weights were cast to fp8."""
    state = random_model(TINY).state_dict()
    stored, name = quantise(state), "blocks.0.mlp.up.weight"
    rows, scale = stored[name], stored[f"{name}_scale"]
    save(tmp_path / "ours.safetensors", stored, {})
    one = stored | {f"{name}_scale": torch.tensor(0.25)}
    save(tmp_path / "one.safetensors", one, {})
    eight = {n: t.to(torch.float8_e4m3fn) if t.dtype == torch.int8 else t for n, t in stored.items()}
    save(tmp_path / "fp8.safetensors", eight, {})
    cast = {n: t.to(torch.float8_e4m3fn) if n in eight and eight[n].itemsize == 1 else t for n, t in state.items()}
    save(tmp_path / "cast.safetensors", cast, {})

    def held(file: str, precision: str) -> tuple[torch.Tensor, torch.Tensor]:
        layer = load_dit(tmp_path / file, precision=precision)[0].get_submodule(name.removesuffix(".weight"))
        return layer.weight, layer.weight_scale

    assert torch.equal(held("ours.safetensors", "int8")[0], rows)
    assert torch.equal(held("ours.safetensors", "int8")[1], scale)
    assert torch.equal(held("one.safetensors", "int8")[0], rows)
    assert torch.equal(held("one.safetensors", "int8")[1], torch.full_like(scale, 0.25))
    weight, factor = held("fp8.safetensors", "fp8")
    assert torch.equal(weight.float(), eight[name].float()) and torch.equal(factor, scale)
    weight, factor = held("cast.safetensors", "fp8")
    assert torch.equal(weight.float(), cast[name].float()) and torch.equal(factor, torch.ones_like(scale))
    weight, factor = held("fp8.safetensors", "int8")  # another format: rounded, once
    exact = eight[name].float() * scale[:, None]
    assert ((weight * factor[:, None] - exact).abs() <= factor[:, None] * 0.5001).all()


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_matrices_stored_in_more_bits_stay_so(tmp_path, precision):
    """In memory, streamed, and written again; in a format other than the file's, all are rounded alike."""
    state, plain = random_model(TINY).state_dict(), "blocks.0.attn.wq.weight"
    save(tmp_path / "wide.safetensors", state, {})
    write_compact(tmp_path / "wide.safetensors", tmp_path / "eight.safetensors", precision, None)
    stored = {name: t for name, t in load_file(tmp_path / "eight.safetensors").items() if name != f"{plain}_scale"}
    save(tmp_path / "mixed.safetensors", stored | {plain: state[plain].bfloat16()}, {})
    write_compact(tmp_path / "mixed.safetensors", tmp_path / "again.safetensors", precision, None)

    for file in ("mixed", "again"):
        for streamed in (False, True):
            held, _ = load_dit(tmp_path / f"{file}.safetensors", precision=precision, streamed=streamed)
            assert plain not in few_bit_layers(held) and len(few_bit_layers(held)) == len(linears(held.blocks)) - 1
            assert streamed or torch.equal(held.get_parameter(plain), state[plain].bfloat16().float())
    other, _ = load_dit(tmp_path / "mixed.safetensors", precision="fp8" if precision == "int8" else "int8")
    assert plain in few_bit_layers(other)


def test_matrix_is_rounded_in_parts(monkeypatch):
    matrix = torch.randn(37, 64)
    whole = to_8_bits(matrix, torch.int8)
    monkeypatch.setattr("model.quantize._CHUNK", 64 * 5)
    for a, b in zip(whole, to_8_bits(matrix, torch.int8), strict=True):
        assert torch.equal(a, b)


def test_stored_rows_keep_their_scales_in_parts(monkeypatch):
    rows, scales = to_int8(torch.randn(40, 64) * torch.logspace(-3, 2, 40)[:, None])
    whole = to_8_bits(rows, torch.float8_e4m3fn, scales)
    monkeypatch.setattr("model.quantize._CHUNK", 64 * 5)
    for a, b in zip(whole, to_8_bits(rows, torch.float8_e4m3fn, scales), strict=True):
        assert torch.equal(a.float(), b.float())


@torch.no_grad()
@pytest.mark.parametrize(("precision", "most"), [("int8", 0.05), ("int4", 0.1)])
def test_adapters_work_on_few_bits(tmp_path, precision, most):
    model = random_model(TINY)
    save(tmp_path / "wide.safetensors", model.state_dict(), {})
    small, _ = load_dit(tmp_path / "wide.safetensors", precision=precision)
    pairs = random_pairs(model)
    lora = {f"{n}.lora_{half}.weight": t for n, pair in pairs.items() for half, t in zip("AB", pair, strict=True)}
    save(tmp_path / "lora.safetensors", lora, {})
    adapter = read_lora(tmp_path / "lora.safetensors", small)
    given = inputs(TINY)
    before = small(*given)

    with applied(small, [(adapter, 0.5)]):
        changed = small(*given)

    assert len(adapter.layers) == len(pairs) and not adapter.unmatched
    assert relative_error(changed, dense(model, (pairs, 0.5))(*given)) < most
    assert relative_error(changed, before) > 0.1
    assert torch.equal(small(*given), before)


def test_only_linear_layers_are_converted():
    with torch.device("meta"):
        network = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2, bias=False))
    use_few_bits(network, lambda name, layer: FORMATS["int8"] if name == "2" else None)
    assert list(few_bit_layers(network)) == ["2.weight"] and type(network[0]) is torch.nn.Linear
    use_few_bits(network, lambda name, layer: FORMATS["fp8"])
    assert {name: layer.format for name, layer in few_bit_layers(network).items()} == {
        f"{n}.weight": FORMATS["fp8"] for n in "02"
    }
    assert network[0].bias is not None and network[2].bias is None


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize(("precision", "most"), [("int8", 0.03), ("fp8", 0.05), ("int4", 0.1)])
def test_on_a_gpu(precision, most):
    matrix, x = torch.randn(512, 256, device="cuda"), torch.randn(100, 256, device="cuda")
    small = layer(matrix, precision)
    for work in (small, torch.compile(small)):
        assert relative_error(work(x.bfloat16()).float(), F.linear(x, matrix)) < most
