"""Eight-bit storage: small errors, and none where they would hurt."""

from __future__ import annotations

import torch
from test_dit import SIZES, inputs, random_model, relative_error

from model.quantize import dequantise, quantise, restore, to_8_bits, to_int8


def test_rows_have_their_own_scale():
    """A row's error is bounded by its own largest number, however large the numbers in other rows are."""
    matrix = torch.randn(256, 128) * torch.logspace(-6, 3, 256)[:, None]
    matrix[7] = 0

    stored = quantise({"wq.weight": matrix})
    back = dequantise(stored)["wq.weight"]

    assert stored["wq.weight"].dtype == torch.int8 and stored["wq.weight_scale"].shape == (256,)
    assert ((back - matrix).abs() <= matrix.abs().amax(1, keepdim=True) / 127 * 0.5001).all()


def test_quantising_again_changes_nothing():
    once = dequantise(quantise({"wq.weight": torch.randn(128, 128)}))
    torch.testing.assert_close(dequantise(quantise(once)), once, rtol=1e-6, atol=0)


def test_stored_scales_of_any_shape_become_one_per_row():
    """As other tools write them: per tensor or per row, flat or as a column."""
    rows, scales = to_int8(torch.randn(8, 4))
    for stored in (scales, scales[:, None], scales[:1], scales[0]):
        kept, each = to_8_bits(rows, torch.int8, stored)
        assert torch.equal(kept, rows) and torch.equal(each, stored.flatten().expand(8))
        anew = to_8_bits(rows, torch.float8_e4m3fn, stored)
        for got, expected in zip(anew, to_8_bits(restore(rows, each, torch.float32), torch.float8_e4m3fn), strict=True):
            assert torch.equal(got.float(), expected.float())
    of_convolution = restore(torch.ones(8, 4, 3, 3), scales, torch.float32)
    assert torch.equal(of_convolution, scales.view(8, 1, 1, 1).expand(8, 4, 3, 3))


def test_fp8_keeps_three_bits_of_small_numbers():
    """e4m3: half a step is a sixteenth of a number, or 2^−10 for those below 2^−6."""
    matrix = torch.randn(64, 128) * torch.logspace(-3, 0, 128)
    rows, scales = to_8_bits(matrix, torch.float8_e4m3fn)
    off = (restore(rows, scales, torch.float32) - matrix).abs()
    assert (off <= torch.maximum(matrix.abs() / 16, 2**-10 * scales[:, None]) * 1.001).all()


def test_small_and_sensitive_weights_stay_in_bf16():
    state = random_model(SIZES["mini"]).state_dict() | {
        "table": torch.randn(256, 128)
    }  # its scale would not be found again
    stored = quantise(state)

    assert list(back := dequantise(stored)) == list(state)
    assert {tensor.dtype for tensor in back.values()} == {torch.float32}
    eight = {name for name, tensor in stored.items() if tensor.dtype == torch.int8}
    assert not [n for n in eight if n.startswith(("first", "last", "tmlp", "tproj")) or "norm" in n or "mod" in n]
    assert {"blocks.0.attn.wq.weight", "blocks.7.mlp.down.weight", "txtfusion.refiner_blocks.1.attn.wo.weight"} <= eight
    rest = {n: t.dtype for n, t in stored.items() if n not in eight and not n.endswith("_scale")}
    assert set(rest.values()) == {torch.bfloat16}
    small = quantise({"wq.weight": torch.randn(64, 64)})
    assert {name: tensor.dtype for name, tensor in small.items()} == {"wq.weight": torch.bfloat16}


@torch.no_grad()
def test_network_answer_hardly_changes():
    model = random_model(SIZES["mini"])
    tokens, sigma, embeds, grid = inputs(model.config)
    exact = model(tokens, sigma, embeds, grid)

    model.load_state_dict(dequantise(quantise(model.state_dict())))

    assert relative_error(model(tokens, sigma, embeds, grid), exact) < 0.05


def test_whole_numbers_pass_through():
    counts = {"steps": torch.arange(3)}
    back = dequantise(quantise(counts))["steps"]
    assert torch.equal(back, counts["steps"]) and back.dtype == torch.int64
