"""8-bit products in training: answers and gradients within their rounding, and a network that learns all the same."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from test_dit import inputs, random_model, relative_error
from test_lora import TINY
from torch import Tensor, nn

from model.errors import K2Error
from model.train.products import (
    PRODUCT_NAMES,
    EightBitLinear,
    EightBitProduct,
    Products,
    parse_products,
    use_8_bit_products,
)

HERE = ["int8-tensorwise", "int8-rowwise", "fp8-emulated-tensorwise", "fp8-emulated-rowwise"]
MOST = {"int8": 0.015, "fp8": 0.04}  # relative error of a product of normal numbers: answer and gradients
MOST_GRADIENT = {"int8": 0.015, "fp8": 0.07}  # e5m2 has two bits of fraction


def products(name: str) -> Products:
    found = parse_products(name)
    assert found is not None
    return found


def both(name: str, x: Tensor, weight: Tensor, gradient: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(8-bit, exact) of the answer and of both gradients."""
    pairs = []
    for product in (lambda a, b: EightBitProduct.apply(a, b, products(name)), F.linear):
        a, b = x.clone().requires_grad_(), weight.clone().requires_grad_()
        answer = product(a, b)
        pairs.append((answer, *torch.autograd.grad(answer, (a, b), gradient)))
    return list(zip(*pairs, strict=True))


@pytest.mark.parametrize("name", HERE)
def test_answer_and_gradients(name):
    x, weight, gradient = torch.randn(160, 96), torch.randn(64, 96), torch.randn(160, 64)
    answer, for_x, for_weight = both(name, x, weight, gradient)
    kind = name.partition("-")[0]
    assert relative_error(*answer) < MOST[kind]
    assert relative_error(*for_x) < MOST_GRADIENT[kind]
    assert relative_error(*for_weight) < MOST_GRADIENT[kind]


@pytest.mark.parametrize("end", ["int8", "fp8-emulated"])
def test_row_scales_tolerate_outliers(end):
    """One row is a thousand (fp8: a million) times larger; with a scale of its own it costs the others nothing."""
    x, weight, gradient = torch.randn(64, 96), torch.randn(64, 96), torch.randn(64, 64)
    x[0] *= 1e3 if end == "int8" else 1e6  # e4m3 has an exponent of its own
    (rows, exact), *_ = both(f"{end}-rowwise", x, weight, gradient)
    (one, _), *_ = both(f"{end}-tensorwise", x, weight, gradient)
    assert relative_error(rows[1:], exact[1:]) < 0.04
    assert relative_error(one[1:], exact[1:]) > 0.3


@pytest.mark.parametrize("name", HERE)
def test_zeros_stay_zeros(name):
    for pair in both(name, torch.zeros(32, 16), torch.randn(16, 16), torch.zeros(32, 16)):
        assert torch.equal(*pair)


@pytest.mark.parametrize("name", HERE)
def test_transposed_rounding_equals_rounding_the_transpose(name):
    matrix, how = torch.randn(48, 32) * torch.logspace(-2, 2, 32), products(name)
    turned, plain = how.quantise_transposed(how.quantise(matrix), matrix), how.quantise(matrix.t())
    assert torch.equal(turned.numbers.float(), plain.numbers.float()) and torch.equal(turned.scale, plain.scale)
    assert turned.numbers.is_contiguous()


def test_int8s_weight_gradient_is_wide():
    _, _, (ours, exact) = both("int8-tensorwise", torch.randn(64, 32), torch.randn(32, 32), torch.randn(64, 32))
    assert torch.equal(ours, exact)


def test_tensor_scale_keeps_8_bits_for_the_backward_pass():
    """fp8 with one scale: the tokens are kept in 8 bits, not as they were."""
    kept: list[Tensor] = []
    x, weight = torch.randn(64, 32, requires_grad=True), torch.randn(48, 32, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        EightBitProduct.apply(x, weight, products("fp8-emulated-tensorwise"))
    assert not [t for t in kept if t.shape == x.shape and t.dtype == torch.float32]
    assert [t for t in kept if t.shape == x.shape and t.dtype == torch.float8_e4m3fn]


@pytest.mark.parametrize("name", HERE)
def test_whole_network(name):
    """Only the blocks' matrices change; the velocity and every gradient stay near the wide ones."""
    wide, small = (random_model(TINY).requires_grad_(True) for _ in range(2))
    state = {key: value.data_ptr() for key, value in small.state_dict().items()}
    changed = use_8_bit_products(small.blocks, products(name))
    assert len(changed) == 8 * TINY.blocks
    assert {key: value.data_ptr() for key, value in small.state_dict().items()} == state

    answers = []
    for model in (small, wide):
        answers.append(model(*inputs(TINY)))
        answers[-1].square().mean().backward()
    assert relative_error(*(each.detach() for each in answers)) < 0.1
    ours = torch.cat([param.grad.flatten() for param in small.parameters()])
    assert relative_error(ours, torch.cat([param.grad.flatten() for param in wide.parameters()])) < 0.2


def test_autocast_dtype_matches_a_linear_layer():
    layer = nn.Sequential(nn.Linear(32, 48))
    use_8_bit_products(layer, products("int8-rowwise"))
    assert isinstance(layer[0], EightBitLinear)
    with torch.autocast("cpu", torch.bfloat16):
        answer = layer(torch.randn(2, 20, 32))
        assert layer(torch.randn(3, 32)).shape == (3, 48)  # too few to round
    assert answer.dtype == torch.bfloat16 and answer.shape == (2, 20, 48)
    answer.float().sum().backward()
    assert layer[0].weight.grad.dtype == torch.float32


@pytest.mark.parametrize("name", HERE)
def test_any_number_of_tokens_works(name):
    """Kernels need all sides but the first to be multiples of 16, and in a transpose the tokens are one of those."""
    how = products(name)

    def strict(a, b):
        assert a.numbers.shape[1] % 16 == b.numbers.shape[1] % 16 == len(b.numbers) % 16 == 0
        return how.multiply(a, b)

    layer = nn.Sequential(nn.Linear(32, 48))
    use_8_bit_products(layer, replace(how, multiply=strict))
    x = torch.randn(3, 17, 32, requires_grad=True)
    answer = layer(x)
    answer.square().sum().backward()
    exact = F.linear(x, layer[0].weight, layer[0].bias)
    wanted = torch.autograd.grad(exact.square().sum(), (x, layer[0].weight))
    assert answer.shape == (3, 17, 48) and relative_error(answer, exact) < 0.05
    assert relative_error(x.grad, wanted[0]) < 0.1 and relative_error(layer[0].weight.grad, wanted[1]) < 0.1


def test_unsupported_sizes_are_left_alone():
    assert use_8_bit_products(
        nn.Sequential(nn.Linear(20, 32), nn.Linear(32, 20), nn.Linear(32, 64)), products(HERE[0])
    ) == ["2"]
    assert use_8_bit_products(nn.Sequential(nn.Linear(32, 64)), None) == []


def descend(name: str, steps: int = 60) -> float:
    """The last loss of a small network that learns a fixed function."""
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 32))
    student = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 32))
    use_8_bit_products(student, parse_products(name))
    optimiser = torch.optim.AdamW(student.parameters(), 1e-2)
    for _ in range(steps):
        x = torch.randn(128, 32)
        loss = F.mse_loss(student(x), teacher(x).detach())
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return loss.item()


def test_trains_as_well_as_wide_products():
    wide = descend("wide")
    assert all(descend(name) < 1.1 * wide + 1e-3 for name in HERE)


def test_recipe_values():
    assert parse_products("wide") is None and set(HERE) < set(PRODUCT_NAMES)
    with pytest.raises(K2Error, match="int4"):
        parse_products("int4-rowwise")
    with pytest.raises(K2Error, match="fp8"):
        parse_products("fp8-rowwise", "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["int8-tensorwise", "int8-rowwise", "fp8-tensorwise", "fp8-rowwise"])
def test_on_a_gpu(name):
    x, weight, gradient = (torch.randn(n, 128, device="cuda", dtype=torch.bfloat16) for n in (256, 128, 256))
    how = parse_products(name, "cuda")
    a, b = x.clone().requires_grad_(), weight.float().requires_grad_()
    answer = EightBitProduct.apply(a, b, how)
    answer.backward(gradient)
    assert relative_error(answer.float(), x.float() @ weight.float().t()) < 0.05
    assert relative_error(b.grad, gradient.float().t() @ x.float()) < 0.08
