"""Checkpoints on disk: every layout gives the same network, and everything else one clear error message."""

from __future__ import annotations

import io
import json
import os
import struct
import sys
import weakref
from dataclasses import asdict, replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from test_dit import diffusers_key, random_model, reference

from model import checkpoint, quantize, safetensors_file
from model.checkpoint import open_checkpoint, read, save
from model.dit import DiTConfig
from model.errors import K2Error
from model.layouts import diffusers_names, load_dit, to_diffusers
from model.low_bit import FORMATS
from model.quantize import quantise, to_8_bits
from model.safetensors_file import MAX_COPIED, READ_AHEAD, SafeTensors, open_uncached, page_buffer

if sys.platform == "linux":
    import fcntl

linux = pytest.mark.skipif(sys.platform != "linux", reason="no file is read past the system's cache elsewhere")

TINY = DiTConfig(width=64, heads=4, kv_heads=2, blocks=3, text_width=32, text_taps=3, text_heads=2, channels=4)


@pytest.fixture(scope="module")
def model():
    return random_model(TINY)


@pytest.fixture
def state(model):
    return model.state_dict()


@pytest.fixture
def file(tmp_path, state):
    path = tmp_path / "tiny.safetensors"
    save(path, state, {"kind": "dit", "variant": "raw", "config": asdict(TINY)})
    return path


def assert_same(loaded: torch.nn.Module, state) -> None:
    assert list(loaded.state_dict()) == list(state)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def test_saved_weights_are_read_back(file, state):
    loaded, metadata = read(file)

    assert metadata["config"] == asdict(TINY)
    assert all(torch.equal(loaded[name], state[name]) for name in state)
    assert [path.name for path in file.parent.iterdir()] == ["tiny.safetensors"]  # no draft is left behind


def test_same_content_gives_same_bytes(tmp_path):
    """The safetensors library orders metadata differently in every file."""
    more = {name: f'{name} "ü"\u2028\n\x01\x7f' for name in "qwertzuiop"}
    for index in range(3):
        save(tmp_path / f"{index}.safetensors", {"a": torch.ones(3)}, {"kind": "lora"}, **more)

    assert len({(tmp_path / f"{index}.safetensors").read_bytes() for index in range(3)}) == 1
    with safe_open(tmp_path / "0.safetensors", "pt") as file:
        assert file.metadata()["q"] == more["q"] and torch.equal(file.get_tensor("a"), torch.ones(3))


def test_a_failed_save_leaves_the_old_file(file, state):
    before = file.read_bytes()
    with pytest.raises(TypeError):
        save(file, state, {"kind": object()})
    with pytest.raises(AttributeError):
        save(file, {"first.weight": "no tensor"}, {})
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == ["tiny.safetensors"]


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
def test_native_names_under_any_prefix(tmp_path, state, prefix):
    """Without our metadata the configuration follows from the tensors' shapes."""
    path = tmp_path / "comfy.safetensors"
    passengers = {"vae.decoder.conv_in.weight": torch.zeros(2)} if prefix else {}
    save_file({prefix + name: tensor for name, tensor in state.items()} | passengers, path)

    loaded, _ = load_dit(path)

    assert loaded.config == TINY
    assert_same(loaded, state)


@pytest.mark.parametrize("variant", [None, "bf16"])
def test_diffusers_folder_in_shards(tmp_path, model, state, variant):
    """Written by diffusers itself, in several files with an index whose name includes the variant's."""
    reference(model).save_pretrained(tmp_path / "transformer", max_shard_size="100KB", variant=variant)
    index = "diffusion_pytorch_model.safetensors.index" + (f".{variant}" if variant else "")
    assert (tmp_path / "transformer" / f"{index}.json").exists()

    loaded, _ = load_dit(tmp_path / "transformer")

    assert loaded.config == TINY
    assert_same(loaded, state)


@pytest.mark.parametrize(
    "changes",
    [
        {"time_dim": 128, "multiplier": 2, "width": 128, "kv_heads": 1},
        {"width": 32, "heads": 2, "text_width": 64},  # its feed-forward would be as wide with a multiplier of 1
    ],
    ids=str,
)
def test_config_follows_from_tensors_and_config_json(tmp_path, changes):
    config = replace(TINY, rope_base=500.0, eps=1e-6, **changes)
    save(tmp_path / "model.safetensors", random_model(config).state_dict(), {})
    (tmp_path / "config.json").write_text('{"rope_theta": 500, "norm_eps": 1e-6}')
    assert load_dit(tmp_path)[0].config == config


@pytest.mark.parametrize("lost", ["first.weight", "blocks.0.attn.qknorm.qnorm.scale", "tmlp.0.weight"])
def test_missing_tensors_that_define_the_config_are_named(tmp_path, state, lost):
    save(tmp_path / "part.safetensors", {name: tensor for name, tensor in state.items() if name != lost}, {})
    with pytest.raises(K2Error, match=f"lacks {lost}"):
        load_dit(tmp_path / "part.safetensors")


def test_the_key_map_is_a_bijection_onto_diffusers(model, state):
    assert {name: diffusers_key(name) for name in state} == diffusers_names(TINY.blocks)
    theirs = reference(model).state_dict()
    ours = to_diffusers(state, TINY)
    assert {name: tensor.shape for name, tensor in ours.items()} == {name: t.shape for name, t in theirs.items()}


@pytest.mark.parametrize("layout", ["native", "diffusers"])
def test_int8_files_load_like_any_other(tmp_path, state, layout):
    stored = quantise(state if layout == "native" else to_diffusers(state, TINY))
    assert torch.int8 in {tensor.dtype for tensor in stored.values()}
    path = tmp_path / "int8.safetensors"
    save(path, stored, {})

    loaded = load_dit(path)[0].state_dict()

    for name, tensor in state.items():
        torch.testing.assert_close(loaded[name], tensor, rtol=0.01, atol=0.02 * tensor.abs().max().item())


@pytest.mark.parametrize("suffix", ["weight_scale", "scale_weight"])
def test_fp8_with_a_scale_per_tensor(tmp_path, state, suffix):
    name = "blocks.0.mlp.up"
    weight = state[f"{name}.weight"]
    stored = dict(state) | {
        f"{name}.weight": (weight / 0.01).to(torch.float8_e4m3fn),
        f"{name}.{suffix}": torch.tensor(0.01),
        f"{name}.scale_input": torch.tensor(1.0),
        "scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn),
    }
    path = tmp_path / "fp8.safetensors"
    save(path, stored, {})

    loaded = load_dit(path)[0].state_dict()[f"{name}.weight"]

    torch.testing.assert_close(loaded, weight, rtol=0.07, atol=1e-3)


def test_half_precision_keeps_norms_in_fp32(file):
    loaded = load_dit(file, dtype=torch.bfloat16)[0]
    assert loaded.first.weight.dtype == torch.bfloat16
    assert loaded.last.norm.scale.dtype == torch.float32


# ---- refused files ------------------------------------------------------------------------------


def refused(path) -> str:
    with pytest.raises(K2Error) as error:
        load_dit(path)
    assert path.name in str(error.value)
    assert error.value.hint
    return str(error.value)


@pytest.mark.parametrize(
    ("keep", "what"),
    [(0, "not a safetensors file"), (8, "not a safetensors file"), (40, "header"), (0.5, "damaged"), (-1, "damaged")],
)
def test_truncated_files_are_refused(file, keep, what):
    whole = file.read_bytes()
    file.write_bytes(whole[: int(keep * len(whole)) if 0 < keep < 1 else keep])
    assert what in refused(file)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"PK\x03\x04" + bytes(100), "pickle"),
        (b"\x80\x02}q\x00." + bytes(100), "pickle"),
        (b"GGUF" + bytes(100), "GGUF"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "is a picture"),
        (struct.pack("<Q", 3) + b"{]}", "damaged"),
        (struct.pack("<Q", 2) + b"{}" + bytes(8), "damaged"),
        (struct.pack("<Q", 1 << 60) + b"{}", "not a safetensors file"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_file_types_are_refused(tmp_path, content, what):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    assert what in refused(path)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [-1, -2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]},
        {"dtype": "PICKLE", "shape": [2], "data_offsets": [0, 8]},
        {"dtype": "F32", "data_offsets": [0, 8]},
        [],
    ],
    ids=str,
)
def test_invalid_headers_are_refused(tmp_path, entry):
    header = json.dumps({"first.weight": entry}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    assert "damaged" in refused(path)


@pytest.mark.parametrize(
    ("names", "what"),
    [
        (["decoder.conv_in.weight", "encoder.conv_in.weight"], "an autoencoder"),
        (["model.language_model.layers.0.self_attn.q_proj.weight"], "a text encoder"),
        (["diffusion_model.blocks.0.attn.wq.lora_A.weight"], "a LoRA"),
        (["double_blocks.0.img_mod.lin.weight"], "another kind of image model"),
        (["weight"], "is not a Krea 2 transformer"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_networks_are_recognised(tmp_path, names, what):
    path = tmp_path / "model.safetensors"
    save_file({name: torch.zeros(2) for name in names}, path)
    assert what in refused(path)


@pytest.mark.parametrize(
    ("kind", "what"),
    [("text", "a text encoder"), ("words", "a table of words"), ("lora", "a LoRA, which goes on top of a model")],
)
def test_our_own_other_files_are_recognised(tmp_path, kind, what):
    path = tmp_path / "mini.safetensors"
    save(path, {"embed_tokens.weight": torch.zeros(2)}, {"kind": kind})
    assert f"is {what}, not a Krea 2 transformer" in refused(path)


@pytest.mark.parametrize("about", [{}, {"kind": "lora"}])
def test_a_lora_used_as_a_model_gets_a_hint(tmp_path, about):
    save(tmp_path / "ink.safetensors", {"blocks.0.attn.wq.lora_A.weight": torch.zeros(2)}, about)
    with pytest.raises(K2Error) as error:
        load_dit(tmp_path / "ink.safetensors")
    assert "k2 style add NAME FILE" in error.value.hint


def test_every_mismatched_tensor_is_named(tmp_path, state):
    path = tmp_path / "model.safetensors"
    wrong = dict(state)
    del wrong["blocks.1.attn.wq.weight"]
    wrong["blocks.1.attn.extra"] = torch.zeros(2)
    wrong["last.linear.bias"] = torch.zeros(3)
    save(path, wrong, {"kind": "dit", "config": asdict(TINY)})

    message = refused(path)

    assert "1 missing (blocks.1.attn.wq.weight)" in message
    assert "1 unknown (blocks.1.attn.extra)" in message
    assert "last.linear.bias is [3] instead of [16]" in message


@pytest.mark.parametrize("case", ["missing", "unknown", "of another shape"])
def test_only_missing_tensors_suggest_an_incomplete_file(tmp_path, state, case):
    wrong = {
        "missing": {name: tensor for name, tensor in state.items() if name != "blocks.1.attn.wq.weight"},
        "unknown": state | {"vae.decoder.conv_in.weight": torch.zeros(2)},
        "of another shape": state | {"last.linear.bias": torch.zeros(3)},
    }
    save(tmp_path / "model.safetensors", wrong[case], {"kind": "dit", "config": asdict(TINY)})
    with pytest.raises(K2Error, match=f"1 {case}") as error:
        load_dit(tmp_path / "model.safetensors")
    assert ("incomplete" in error.value.hint) == (case == "missing")


def test_many_missing_tensors_are_counted(tmp_path, state):
    path = tmp_path / "model.safetensors"
    save(
        path, {name: t for name, t in state.items() if "qknorm" not in name or name.startswith(("txt", "blocks.0"))}, {}
    )
    assert "4 missing (blocks.1.attn.qknorm.qnorm.scale" in (message := refused(path)) and "and 1 more" in message


@pytest.mark.parametrize(
    ("config", "what"),
    [
        (asdict(TINY) | {"window": 4}, "window"),
        (asdict(TINY) | {"heads": 3}, "multiples of their head counts"),
        (asdict(TINY) | {"blocks": 10**9}, "3 of 1000000000 blocks"),
        ({"width": 64}, "missing"),
        (5, "shape"),
    ],
    ids=["unknown", "impossible", "too-many-blocks", "incomplete", "not-a-table"],
)
def test_metadata_is_not_trusted(tmp_path, state, config, what):
    path = tmp_path / "model.safetensors"
    save(path, state, {"kind": "dit", "config": config})
    assert what in refused(path)


def test_plain_file_is_preferred_to_its_variants(tmp_path):
    for name in ("model", "model.fp16"):
        save(tmp_path / f"{name}.safetensors", {name: torch.ones(2)}, {})
    assert list(open_checkpoint(tmp_path).tensors) == ["model"]
    save(tmp_path / "other.safetensors", {"other": torch.ones(2)}, {})
    with pytest.raises(K2Error, match=r"3 \.safetensors files and no index"):
        open_checkpoint(tmp_path)


def test_folders_without_their_weights_are_refused(tmp_path):
    with pytest.raises(K2Error, match=r"no \.safetensors or \.gguf file"):
        open_checkpoint(tmp_path)
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "part-1.safetensors"}}))
    with pytest.raises(K2Error, match=r"lacks part-1\.safetensors"):
        open_checkpoint(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))
    with pytest.raises(K2Error, match="its own folder"):
        open_checkpoint(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}))
    save_file({"a": torch.zeros(2)}, tmp_path / "1.safetensors")
    save_file({"b": torch.zeros(2)}, tmp_path / "2.safetensors")
    assert open_checkpoint(tmp_path).tensors.keys() == {"a", "b"}
    save_file({"a": torch.ones(2), "b": torch.zeros(2)}, tmp_path / "2.safetensors")
    with pytest.raises(K2Error, match="holds a in more than one file"):
        open_checkpoint(tmp_path)


def test_windows_of_a_file_hold_the_same_numbers(tmp_path, monkeypatch):
    """In every number format, across the edges of small windows; and writing to a tensor does not change the file."""
    monkeypatch.setattr(safetensors_file, "MAX_MAPPED", 4096)
    kinds = (torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.uint8, torch.float8_e4m3fn, torch.int64)
    state = {f"{i}.{kind}": torch.randn(3, 700).to(kind) for i in range(3) for kind in kinds}
    state |= {"empty": torch.empty(0, 4), "one": torch.tensor(7.0)}
    save_file(state, tmp_path / "kinds.safetensors")

    found = dict(open_checkpoint(tmp_path / "kinds.safetensors").read())
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)) if tensor.ndim else True
    before = (tmp_path / "kinds.safetensors").read_bytes()
    found["0.torch.float32"].zero_()
    assert (tmp_path / "kinds.safetensors").read_bytes() == before


def test_small_tensors_do_not_keep_a_window_mapped(tmp_path):
    """Or they would hold on to all that was read of it. A large tensor is the window's own pages, and costs no copy."""
    state = {"small": torch.ones(3), "large": torch.ones(MAX_COPIED)}
    save_file(state, tmp_path / "two.safetensors")
    for name, kept in (("small", False), ("large", True)):
        with SafeTensors(tmp_path / "two.safetensors", "cpu") as opened:
            found, window = opened.get_tensor(name), weakref.ref(opened.mapping)
        del opened
        assert torch.equal(found, state[name]) and (window() is not None) is kept


def test_weights_go_to_the_current_gpu_whichever_thread_reads(file, monkeypatch):
    """Which GPU "cuda" means differs from thread to thread; in a new thread it is the first."""
    opened: list[str] = []

    class Elsewhere(checkpoint.OpenFiles):
        def __init__(self, device: str, cached: bool):
            opened.append(device)
            raise RuntimeError("no card here")

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(checkpoint, "OpenFiles", Elsewhere)
    for device in ("cuda", "cuda:1", "cpu", "mps"):
        with pytest.raises(RuntimeError, match="no card here"):
            next(open_checkpoint(file).read(device=device))

    assert opened == ["cuda:3", "cuda:1", "cpu", "cpu"]


@pytest.mark.parametrize("length", [0x0280, 0x0380, 0x0480, 0x0580])
def test_header_lengths_that_look_like_pickle_are_fine(tmp_path, length):
    """A file begins with the length of its header; with these lengths it begins as pickles do."""
    header = {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    raw = json.dumps(header).encode().ljust(length)
    (tmp_path / "a.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + struct.pack("<f", 0.5))

    assert dict(open_checkpoint(tmp_path / "a.safetensors").read())["a"].item() == 0.5


def test_reading_from_a_file_larger_than_memory(tmp_path):
    """It has one tensor of a terabyte, which takes no space on the disk, and one that is wanted."""
    size, wanted = 1 << 40, torch.arange(6.0)
    header = {
        "huge": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]},
        "wanted": {"dtype": "F32", "shape": [2, 3], "data_offsets": [size, size + 24]},
    }
    raw = json.dumps(header).encode()
    path = tmp_path / "large.safetensors"
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.seek(size, 1)
        file.write(wanted.numpy().tobytes())

    (found,) = dict(open_checkpoint(path).read(["wanted"])).values()
    assert torch.equal(found, wanted.view(2, 3))


def test_a_file_truncated_while_being_read_does_not_hang(file):
    with SafeTensors(file, "cpu") as opened:
        os.truncate(file, opened.size - 1)

        with pytest.raises(OSError, match="has become shorter"):
            opened.read_into(page_buffer(2), opened.size - 2, opened.size, torch.uint8)


def is_uncached(file) -> bool:
    return bool(fcntl.fcntl(file, fcntl.F_GETFL) & os.O_DIRECT)


@linux
def test_files_too_large_for_memory_bypass_the_cache(file, monkeypatch):
    """Unless it fits beside the result, it would evict itself. What is read again, as in streaming, stays mapped."""
    opened, few = list[bool](), dict.fromkeys(("a",), FORMATS["int8"])
    before = SafeTensors.__exit__
    monkeypatch.setattr(SafeTensors, "__exit__", lambda self, *p: (opened.append(is_uncached(self.file)), before(self)))
    for free, wanted in ((file.stat().st_size * 1.5, few), (file.stat().st_size * 1.5 - 1, few), (0, None)):
        monkeypatch.setattr(checkpoint, "free_memory", lambda device, free=free: free)
        dict(open_checkpoint(file).read(formats=wanted))

    assert opened == [False, True, False]


@pytest.mark.parametrize("cached", [True, False])
def test_any_byte_range_can_be_read(tmp_path, cached):
    save_file({"a": torch.randint(256, (20_001,), dtype=torch.uint8)}, tmp_path / "a.safetensors")
    raw = (tmp_path / "a.safetensors").read_bytes()
    with SafeTensors(tmp_path / "a.safetensors", "cpu", cached) as opened:
        for begin, end in ((0, 1), (4095, 4097), (4096, 8192), (7, 12_289), (1, len(raw)), (len(raw) - 1, len(raw))):
            assert bytes(opened.read_into(page_buffer(end - begin), begin, end, torch.uint8).numpy()) == raw[begin:end]


@linux
@pytest.mark.parametrize("where", ["open", "readinto"])
def test_disks_without_direct_io_are_read_through_the_cache(file, monkeypatch, where):
    def refuses(*those):
        raise OSError(22, "Invalid argument")

    class Picky(io.FileIO):
        def readinto(self, room):
            return refuses() if is_uncached(self) else super().readinto(room)

    if where == "open":
        monkeypatch.setattr(os, "open", refuses)
    else:
        monkeypatch.setattr(io, "FileIO", Picky)
    with open_uncached(file) as opened:
        assert not is_uncached(opened) and opened.read(8) == file.read_bytes()[:8]


@pytest.mark.parametrize("free", [0, 1 << 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_quantising_in_parts_equals_quantising_at_once(tmp_path, monkeypatch, dtype, free):
    monkeypatch.setattr(checkpoint, "free_memory", lambda device: free)
    monkeypatch.setattr(quantize, "_CHUNK", 7 * 48)  # numbers: seven rows
    matrix = torch.randn(100, 48, dtype=dtype)
    save_file({"last": matrix[:3].clone(), "matrix": matrix}, tmp_path / "a.safetensors")
    (expected, scales), places = to_8_bits(matrix, torch.int8), set()
    part = quantize.restore

    def noted(tensor, *others):
        places.add(tensor.data_ptr() // safetensors_file.PAGE)
        return part(tensor, *others)

    monkeypatch.setattr(quantize, "restore", noted)
    found = dict(open_checkpoint(tmp_path / "a.safetensors").read(formats=dict.fromkeys(("matrix",), FORMATS["int8"])))
    assert torch.equal(found["matrix"], expected) and torch.equal(found["matrix_scale"], scales)
    assert torch.equal(found["last"], matrix[:3])
    assert len(places) == READ_AHEAD + 1  # for fifteen parts


def test_saved_files_have_default_permissions(tmp_path):
    (tmp_path / "any").touch()
    save(tmp_path / "model.safetensors", {"a": torch.ones(2)}, {})
    assert (tmp_path / "model.safetensors").stat().st_mode == (tmp_path / "any").stat().st_mode
