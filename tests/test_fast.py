"""On a GPU: recorded and compiled results equal the plain network's, and adapters are noticed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_dit import inputs, random_model, relative_error
from test_lora import TINY, random_pairs

from model import fast
from model.checkpoint import save
from model.dit import Krea2
from model.lora import applied
from model.lora_match import read_lora
from model.low_bit import FORMATS, SUFFIXES, default_format, few_bit_layers, pack, use_few_bits

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def parts(model: Krea2) -> tuple[torch.Tensor, ...]:
    """What a sampler passes to `velocity`."""
    tokens, sigma, embeds, grid = (each.cuda() if isinstance(each, torch.Tensor) else each for each in inputs(TINY))
    context = model.encode_text(embeds)
    return tokens, context, model.modulate(sigma), model.rope(context.shape[1], grid)


@pytest.mark.gpu
@gpu
@torch.no_grad()
@pytest.mark.parametrize("narrow", [1, 1024], ids=["compiled", "recorded"])
def test_fast_velocity_equals_the_plain_one(monkeypatch, tmp_path, narrow):
    monkeypatch.setattr(fast, "FP32_WIDTH", narrow)
    model = random_model(replace(TINY, blocks=2)).cuda()
    given = parts(model)
    exact, other = model.velocity(*given), model.velocity(given[0], given[1] * 2, *given[2:])

    fast.accelerate(model)

    for _ in range(2):
        assert relative_error(model.velocity(*given), exact) < 1e-4
        assert relative_error(model.velocity(given[0], given[1] * 2, *given[2:]), other) < 1e-4
    pairs = random_pairs(model)
    lora = {f"{n}.lora_{half}.weight": t for n, pair in pairs.items() for half, t in zip("AB", pair, strict=True)}
    save(tmp_path / "lora.safetensors", lora, {})
    with applied(model, [(read_lora(tmp_path / "lora.safetensors", model), 1.0)]):
        assert relative_error(model.velocity(*given), exact) > 0.01
    assert relative_error(model.velocity(*given), exact) < 1e-4


def test_adapters_are_noticed(monkeypatch):
    """A recording is replayed only if nothing but the network itself takes part; needs no GPU."""
    model = random_model(TINY)
    taken: list[str] = []
    quick = fast.FastVelocity(model, compiled=False)
    monkeypatch.setattr(fast, "Graph", lambda plain, inputs: lambda *same: taken.append("replayed"))
    monkeypatch.setattr(quick, "eager", lambda *inputs, **others: taken.append("plain"))

    quick(*torch.zeros(4, 1))
    with model.blocks[0].attn.wq.register_forward_hook(lambda *_: None):
        quick(*torch.zeros(4, 1))
    quick(*torch.zeros(4, 1), prompt_mask=torch.ones(1))
    quick(*torch.zeros(4, 1), prompt_mask=None)

    assert taken == ["replayed", "plain", "plain", "replayed"]


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_few_bit_block_compiles_without_graph_breaks(monkeypatch, tmp_path, precision):
    """Tracing needs no answer from the device, and no rotation matrix is built in the block; needs no GPU."""
    monkeypatch.setattr(fast, "FP32_WIDTH", 1)
    monkeypatch.setattr(fast, "can_compile", lambda: False)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model, made = random_model(TINY), []
    exact, given = model.state_dict(), (torch.randn(1, 20, TINY.width), torch.randn(1, 1, 6 * TINY.width))
    use_few_bits(model.blocks, lambda name, layer: default_format(precision, layer.in_features))
    for name, layer in few_bit_layers(model).items():
        held = pack(exact[name], None, 0, layer.format)
        exact |= {name + end: part for end, part in zip(SUFFIXES[layer.format.bits], held, strict=True)}
    model.load_state_dict(exact, assign=True)

    fast.accelerate(model)

    def backend(graph, inputs):
        made.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    block, rope = model.blocks[0], model.rope(4, (4, 4))
    whole = torch.compile(block, backend=backend, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(whole(*given, rope, None), block(*given, rope, None), rtol=1e-4, atol=1e-4)
    assert made and not any("kron" in name for name in made)


@pytest.mark.parametrize(
    ("precision", "card", "rocm", "compiled"),
    [
        ("fp8", (8, 6), None, False),
        ("fp8", (8, 9), None, True),
        ("int8", (8, 6), None, True),
        ("fp8", (11, 0), "7.0", False),
        ("int8", (11, 0), "7.0", True),
    ],
)
def test_unsupported_formats_are_not_compiled(monkeypatch, tmp_path, precision, card, rocm, compiled):
    """Triton has no e4m3 before Ada, and would only fail in the middle of the first picture; needs no GPU."""
    monkeypatch.setattr(fast, "FP32_WIDTH", 1)
    monkeypatch.setattr(fast, "can_compile", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: card)
    monkeypatch.setattr(torch.version, "hip", rocm)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model = random_model(TINY)
    use_few_bits(model.blocks, lambda name, layer: FORMATS[precision])

    fast.accelerate(model)

    assert model.velocity.compiled == compiled
