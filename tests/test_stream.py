"""Weights read block by block: the same answers, bit for bit, and next to nothing held."""

from __future__ import annotations

import gc
import threading
from dataclasses import replace

import pytest
import torch
from test_dit import inputs, random_model, relative_error
from test_lora import TINY, dense, random_pairs
from tiny import tiny, tiny_box  # noqa: F401

from model.checkpoint import save
from model.errors import K2Error
from model.layouts import load_dit
from model.lora import laid_over, read_lora
from model.pipeline import Pipeline
from model.quantize import quantise
from model.spec import RenderSpec
from model.stream import stream
from model.text_encoder import TextEncoder

DEEP = replace(TINY, blocks=5)
CPU = torch.device("cpu")
FOX = RenderSpec("a red fox", seed=7)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder, state = tmp_path_factory.mktemp("stream"), random_model(DEEP).state_dict()
    save(folder / "wide.safetensors", state, {})
    save(folder / "int8.safetensors", quantise(state), {})
    return folder


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("precision", ["native", "int8", "fp8"])
@pytest.mark.parametrize("file", ["wide", "int8"])
def test_streamed_is_resident_bit_for_bit(files, file, precision, dtype):
    path = files / f"{file}.safetensors"
    resident, _ = load_dit(path, precision=precision, dtype=dtype)
    streamed, _ = load_dit(path, precision=precision, dtype=dtype, streamed=True)
    tokens, sigma, embeds, grid = inputs(DEEP)
    given = tokens.to(dtype), sigma, embeds.to(dtype), grid

    for _ in range(2):  # steps
        assert torch.equal(streamed(*given), resident(*given))


@torch.no_grad()
def test_no_more_than_two_blocks_are_in_memory(files):
    streamed, _ = load_dit(files / "wide.safetensors", streamed=True)
    one = sum(p.numel() for p in streamed.blocks[0].parameters())
    outside = sum(p.numel() for p in streamed.parameters()) - DEEP.blocks * one
    most = []

    def weigh(*_: object) -> None:
        held = {t.data_ptr(): t.numel() for t in streamed.state_dict().values() if not t.is_meta}
        most.append(sum(held.values()) - outside)

    for block in streamed.blocks:
        block.mlp.register_forward_hook(weigh)
    streamed(*inputs(DEEP))
    gc.collect()

    assert len(most) == DEEP.blocks and max(most) == one  # and one more is on its way
    assert all(p.is_meta for p in streamed.blocks.parameters())
    assert not any(p.is_meta for name, p in streamed.named_parameters() if not name.startswith("blocks."))


@torch.no_grad()
def test_a_block_out_of_turn_is_read_all_the_same(files):
    resident, _ = load_dit(files / "wide.safetensors")
    streamed, _ = load_dit(files / "wide.safetensors", streamed=True)
    x, mod, rope = torch.randn(1, 4, DEEP.width), torch.randn(1, 1, 6 * DEEP.width), resident.rope(0, (2, 2))
    for index in (3, 0, 0, 4, 1):
        given = x, mod, rope, None
        assert torch.equal(streamed.blocks[index](*given), resident.blocks[index](*given))


@torch.no_grad()
def test_adapters_lie_over_blocks_that_come_and_go(files, tmp_path):
    model = random_model(DEEP)
    pairs = random_pairs(model)
    lora = {f"{n}.lora_{half}.weight": t for n, pair in pairs.items() for half, t in zip("AB", pair, strict=True)}
    save(tmp_path / "lora.safetensors", lora, {})
    streamed, _ = load_dit(files / "wide.safetensors", streamed=True)
    adapter, given = read_lora(tmp_path / "lora.safetensors", streamed), inputs(DEEP)

    with laid_over(streamed, [(adapter, 0.5)]):
        changed = streamed(*given)

    assert len(adapter.layers) == len(pairs)
    assert relative_error(changed, dense(model, (pairs, 0.5))(*given)) < 1e-5


@torch.no_grad()
def test_a_file_that_goes_away_is_a_problem_and_not_a_picture(files, tmp_path):
    path = tmp_path / "gone.safetensors"
    path.write_bytes((files / "wide.safetensors").read_bytes())
    streamed, _ = load_dit(path, streamed=True)
    path.unlink()
    with pytest.raises((K2Error, FileNotFoundError)):
        streamed(*inputs(DEEP))


def test_a_text_encoder_layer_by_layer(tiny):  # noqa: F811
    resident, streamed = (TextEncoder.load(tiny / "tiny-text.safetensors", streamed=s) for s in (False, True))
    prompts = ["a red fox", "an owl at night"]
    for ours, theirs in zip(streamed.encode(prompts), resident.encode(prompts), strict=True):
        assert torch.equal(ours, theirs)
    assert all(p.is_meta for p in streamed.tower.layers.parameters())


@pytest.mark.parametrize("offload", ["text", "all"])
def test_whole_pictures(tiny, offload):  # noqa: F811
    plain, ours = Pipeline.load("tiny", device="cpu"), Pipeline.load("tiny", device="cpu", offload=offload)
    (expected,), (picture,) = plain.render([FOX]), ours.render([FOX])

    assert picture.record["pixels"] == expected.record["pixels"]
    assert (picture.record["precision"], picture.record["offload"]) == ("native", offload)
    assert expected.record["offload"] == "none"
    with pytest.raises(K2Error, match="cannot be exported"):
        ours.export(tiny / "nowhere")


@torch.no_grad()
def test_a_reading_that_failed_is_made_again_and_leaves_nothing_behind(monkeypatch):
    network = torch.nn.Sequential(*(torch.nn.Linear(4, 4, bias=False) for _ in range(3)))
    weights, asked = {name: tensor.clone() for name, tensor in network.state_dict().items()}, []
    x = torch.randn(2, 4)
    whole = network(x)
    model = torch.nn.ModuleDict({"blocks": network.to("meta")})

    def read(names):
        asked.append(list(names))
        if len(asked) == 4:  # the first block again, ahead of the next pass
            raise OSError("stale file handle")
        return {name: weights[name.removeprefix("blocks.")] for name in asked[-1]}

    stream(model, "blocks", read, CPU)
    assert torch.equal(network(x), whole)
    with pytest.raises(OSError, match="stale"):
        network(x)
    assert torch.equal(network(x), whole)

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "linear", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            network(x)
    assert all(p.is_meta for p in network.parameters())
    assert torch.equal(network(x), whole)


@torch.no_grad()
def test_a_device_without_streams_hears_one_thread_and_nothing_is_kept(monkeypatch):
    """As Metal needs it, whose memory is the host's, too; the meta device stands in for it."""
    device = torch.device("meta")
    network = torch.nn.Sequential(*(torch.nn.Linear(4, 4, bias=False) for _ in range(3)))
    weights = {f"blocks.{name}": tensor.clone() for name, tensor in network.state_dict().items()}
    model, asked, movers, move = torch.nn.ModuleDict({"blocks": network.to(device)}), [], set(), torch.Tensor.to

    def read(names):
        asked.append(list(names))
        return {name: weights[name] for name in asked[-1]}

    def to(tensor, *where, **how):
        movers.add(threading.current_thread())
        return move(tensor, *where, **how)

    monkeypatch.setattr(torch.Tensor, "to", to)
    stream(model, "blocks", read, device, keep=True)
    for _ in range(2):
        assert network(torch.empty(2, 4, device=device)).shape == (2, 4)

    assert movers == {threading.current_thread()}
    assert len(asked) >= 6  # each block for each pass, and the next one's first
