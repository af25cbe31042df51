"""How a model is held: as it is if it fits, otherwise rounded, then streamed; explicit choices are respected."""

from __future__ import annotations

import ctypes
import errno
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import tiny, tiny_box  # noqa: F401

from model import library, plan
from model.checkpoint import save
from model.errors import K2Error
from model.parts import count_numbers, has_kernels, pick_device, pick_dtype, release_size
from model.pipeline import Pipeline
from model.plan import (
    OFFLOADS,
    PRECISIONS,
    STREAMED_BLOCKS,
    ModelSize,
    bytes_needed,
    cgroup_free,
    choose_plan,
    default_dtype,
    memory_errors,
    supported_precisions,
)

GB = 10**9


@pytest.fixture(scope="module")
def release():
    return release_size()


def test_open_weights_have_their_published_size(release):
    assert release.inside + release.outside == pytest.approx(12.9e9, rel=0.01)
    assert release.text + release.others == pytest.approx(4.0e9, rel=0.05)
    assert (release.blocks, release.layers, release.width) == (28, 35, 6144)


@pytest.mark.parametrize(
    ("free", "way"),
    [
        (80, ("native", "none")),
        (36, ("native", "text")),
        (30, ("int8", "none")),
        (24, ("int8", "text")),
        (16, ("native", "all")),
        (7.5, ("int8", "all")),
    ],
)
def test_prefers_exact_to_rounded_and_resident_to_streamed(release, free, way):
    chosen = choose_plan(replace(release, on_gpu=True), free * GB, dtype="bfloat16")
    assert (chosen.precision, chosen.offload) == way
    assert chosen.fits(free * GB)


@pytest.mark.parametrize("free", [3, 8, 14])
def test_streaming_on_a_processor_never_rounds_unasked(release, free):
    """It would round again at every step, as there is no other memory to keep the result in."""
    chosen = choose_plan(release, free * GB, dtype="float32")
    assert (chosen.precision, chosen.offload) == ("native", "all")


def test_explicit_choices_are_respected(release):
    for precision in PRECISIONS:
        for offload in OFFLOADS:
            chosen = choose_plan(release, GB, dtype="bfloat16", precision=precision, offload=offload)
            assert (chosen.precision, chosen.offload) == (precision, offload)
    assert choose_plan(release, 24 * GB, dtype="bfloat16", precision="native").offload == "all"
    assert choose_plan(release, 24 * GB, dtype="bfloat16", offload="text").precision == "int8"
    assert choose_plan(release, 30 * GB, dtype="bfloat16", fast_8_bit="fp8").precision == "fp8"


def test_needs_are_the_weights_held_plus_a_picture(release):
    """Of streamed parts, only the blocks in use count; the picture costs the same however the weights are held."""
    n, rest = release, release.outside + release.others

    def picture(numbers: ModelSize) -> int:
        return bytes_needed(numbers, "bfloat16", "native", "none") - 2 * (numbers.inside + numbers.text + rest)

    for precision, size in (("native", 2), ("int8", 1), ("fp8", 1)):
        for offload, inside, text in (
            ("none", 1.0, 1.0),
            ("text", 1.0, STREAMED_BLOCKS / n.layers),
            ("all", STREAMED_BLOCKS / n.blocks, STREAMED_BLOCKS / n.layers),
        ):
            held = size * inside * n.inside + 2 * (text * n.text + rest)
            assert bytes_needed(n, "bfloat16", precision, offload) == pytest.approx(held + picture(n), abs=8)
    assert bytes_needed(n, "float32", "native", "none") == 2 * bytes_needed(n, "bfloat16", "native", "none")
    mixed = replace(n, stored="int8", wide=n.inside // 4)  # these stay as they are if the others do
    assert bytes_needed(mixed, "bfloat16", "int8", "none") - bytes_needed(n, "bfloat16", "int8", "none") == mixed.wide
    assert bytes_needed(mixed, "bfloat16", "fp8", "none") == bytes_needed(n, "bfloat16", "fp8", "none")
    tokens = (n.native // 16) ** 2  # with guidance, two rows of them hold both halves of a feed-forward
    assert picture(n) > 2 * 2 * tokens * 2 * n.hidden
    assert 3 < picture(replace(n, native=2 * n.native)) / picture(n) < 4


def test_takes_the_smallest_if_nothing_fits(release):
    chosen = choose_plan(replace(release, on_gpu=True), GB, dtype="bfloat16")
    assert chosen.offload == "all" and not chosen.fits(GB)
    least = min(
        bytes_needed(release, "bfloat16", each, "all") for each in PRECISIONS if each != "int4"
    )  # int4 is only taken on request
    assert chosen.bytes_needed == least


def test_streamed_weights_keep_their_stored_precision(release):
    stored = replace(release, stored="int8")
    assert choose_plan(stored, 6 * GB, dtype="bfloat16").precision == "int8"


def test_packed_streamed_weights_are_unpacked_once(release):
    """At the precision that takes the least room to keep; if there is room for all, they are held like any other."""
    packed = replace(release, packed=True, on_gpu=True)
    assert choose_plan(packed, 6 * GB, dtype="bfloat16", fast_8_bit="fp8").precision == "fp8"
    assert choose_plan(packed, 80 * GB, dtype="bfloat16") == choose_plan(release, 80 * GB, dtype="bfloat16")
    elsewhere = replace(packed, on_gpu=False)  # no other memory to keep them in
    assert choose_plan(elsewhere, 6 * GB, dtype="bfloat16").precision == "native"
    assert choose_plan(packed, 6 * GB, dtype="bfloat16", precision="native").precision == "native"


def test_device_gets_a_precision_that_it_supports(release):
    """Metal has no 8-bit floats: files of them are widened while streaming, and asking for them is an error."""
    known, stored = supported_precisions("mps"), replace(release, stored="fp8")
    assert supported_precisions("cuda") == supported_precisions("cpu") == PRECISIONS

    assert choose_plan(stored, 16 * GB, dtype="bfloat16").precision == "fp8"
    chosen = choose_plan(stored, 16 * GB, dtype="bfloat16", supported=known)
    assert (chosen.precision, chosen.offload) == ("native", "all")
    with pytest.raises(K2Error, match="does not support fp8") as error:
        choose_plan(release, 80 * GB, dtype="bfloat16", supported=known, precision="fp8")
    assert error.value.hint == "Choose native, int8 or int4."


def test_small_model_is_held_as_it_is_however_little_is_free(tiny):  # noqa: F811
    numbers = count_numbers(library.find_parts(library.find("tiny")), "cpu")
    chosen = choose_plan(numbers, 0, dtype="float32")
    assert (chosen.precision, chosen.offload) == ("native", "none")
    assert choose_plan(numbers, 0, dtype="float32", precision="int8").precision == "int8"
    assert (
        choose_plan(replace(numbers, text=GB, layers=99), 0, dtype="float32").offload == "text"
    )  # every part has to be small
    streamed = choose_plan(replace(numbers, stored="int8"), 0, dtype="float32", offload="all")
    assert (streamed.precision, streamed.offload) == ("native", "all")  # nothing is rounded unasked


def test_numbers_match_the_files(tiny, tmp_path):  # noqa: F811
    """Without the vision tower, which is read only to look at a picture."""
    pipeline, parts = Pipeline.load("tiny", device="cpu"), library.find_parts(library.find("tiny"))
    numbers = count_numbers(parts, "cpu")
    total = sum(p.numel() for p in pipeline.dit.parameters())
    inside = sum(p.numel() for p in pipeline.dit.blocks.parameters())
    assert (numbers.inside, numbers.outside) == (inside, total - inside)
    assert numbers.layers == 3 and numbers.native == 64 and numbers.stored is None and numbers.wide == inside
    seeing = pipeline.text.tower.state_dict() | {"visual.layers.0.weight": torch.zeros(8)}
    save(tmp_path / "seeing.safetensors", seeing, {"kind": "text"})
    assert count_numbers(replace(parts, text=tmp_path / "seeing.safetensors"), "cpu") == numbers


def test_unknown_precision_and_offload_are_refused(tiny):  # noqa: F811
    with pytest.raises(K2Error, match='no precision "int3"') as error:
        Pipeline.load("tiny", device="cpu", precision="int3")
    assert error.value.hint == "Choose native, int8, fp8 or int4."
    with pytest.raises(K2Error, match='no offload "disk"') as error:
        Pipeline.load("tiny", device="cpu", offload="disk")
    assert error.value.hint == "Choose none, text or all."


def test_number_formats(monkeypatch):
    """bf16 if the device multiplies it, but never for narrow networks on a processor unless asked."""
    for native, expected in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(plan, "native_bf16", lambda device, native=native: native)
        assert default_dtype("cpu", 6144) == expected
        assert default_dtype("cpu", 384) == "float32"
        assert default_dtype("cuda", 6144) == default_dtype("cuda", 384) == expected
        assert default_dtype("mps", 384) == "bfloat16"
    assert pick_dtype("bfloat16", torch.device("cpu"), 384) == "bfloat16"
    with pytest.raises(K2Error, match="not a number format"):
        pick_dtype("float64", torch.device("cpu"), 384)


def test_native_bf16_and_8_bit_formats_of_devices(monkeypatch):
    for known, able in (({}, False), ({"avx512_bf16": True}, True), ({"amx_bf16": True, "avx512_bf16": False}, True)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda known=known: known)
        assert plan.native_bf16("cpu") is able
    for card, able in (((7, 5), False), ((8, 0), True), ((12, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, card=card: card)
        assert plan.native_bf16("cuda") is able
    assert not plan.native_bf16("mps")
    for number, precision in ((torch.float8_e4m3fn, "fp8"), (torch.int8, "int8"), (None, "int8")):
        monkeypatch.setattr("model.low_bit.is_native", lambda asked, device, number=number: asked == number)
        assert plan.fast_8_bit_precision("cpu") == precision


@pytest.mark.parametrize(("promised", "free"), [(30, 20), (12, 12)])
def test_free_memory_on_windows(monkeypatch, promised, free):
    """Memory beyond the commit limit does not count as free."""

    def fill(status: ctypes.Array) -> None:
        assert ctypes.sizeof(status) == status[0] == 64  # a MEMORYSTATUSEX; the load is in the upper half
        status[:5] = [64 | 40 << 32, 32 * GB, 20 * GB, 50 * GB, promised * GB]

    windows = SimpleNamespace(kernel32=SimpleNamespace(GlobalMemoryStatusEx=fill))
    monkeypatch.setattr("sys.platform", "win32")
    monkeypatch.setattr(ctypes, "windll", windows, raising=False)
    assert plan.machine_memory() == (32 * GB, free * GB, True)


def test_free_memory_on_linux(monkeypatch):
    """A control group may allow less."""
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr(Path, "read_text", lambda *_: "MemTotal: 9000 kB\nMemAvailable: 1000 kB\n")
    assert plan.machine_memory().free == plan.free_memory("cpu") == 1_024_000
    monkeypatch.setattr(plan, "cgroup_free", lambda group, free: 5)
    assert plan.free_memory("cpu") == 5


def test_free_memory_is_estimated_at_two_thirds_if_unknown(monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda *_: (_ for _ in ()).throw(FileNotFoundError()))
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert plan.machine_memory() == (whole, whole * 2 // 3, False)
    assert plan.free_memory("cpu") == whole * 2 // 3


def test_free_memory_on_metal(monkeypatch):
    for name, value in (("empty_cache", None), ("recommended_max_memory", 12 * GB), ("driver_allocated_memory", GB)):
        monkeypatch.setattr(torch.mps, name, lambda value=value: value)
    assert plan.free_memory("mps") == 11 * GB


@pytest.mark.parametrize(
    ("built", "card", "able"),
    [
        ("sm_75 sm_80 sm_90 compute_90", (6, 1), False),
        ("sm_75 sm_80 sm_90", (8, 9), True),  # binaries run on later GPUs of their generation
        ("sm_86 sm_90", (8, 0), False),
        ("sm_75 sm_80 sm_90", (12, 0), False),
        ("sm_75 sm_80 sm_90 compute_90", (12, 0), True),  # PTX runs on any later one
        ("sm_90a sm_120", (9, 0), True),
        ("", (6, 1), True),
    ],
)
def test_kernels_of_a_build_fit_the_gpu(monkeypatch, built, card, able):
    monkeypatch.setattr(torch.cuda, "get_arch_list", built.split)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: card)
    assert has_kernels(0) is able
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert has_kernels(0)


def test_gpu_without_kernels_is_never_picked(monkeypatch):
    for name, value in (("is_available", True), ("device_count", 2), ("current_device", 0)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "GeForce GTX 1080")
    usable = {0: True, 1: True}
    monkeypatch.setattr("model.parts.has_kernels", usable.get)
    assert str(pick_device(None)) == "cuda" and str(pick_device("cuda:1")) == "cuda:1"

    usable[0] = False
    assert str(pick_device(None)) == "cuda:1"
    for name in ("cuda", "cuda:0"):
        with pytest.raises(K2Error, match="This PyTorch has no kernels for GeForce GTX 1080") as error:
            pick_device(name)
        assert "older CUDA" in error.value.hint
    with pytest.raises(K2Error, match="no device") as error:
        pick_device("cuda:2")
    assert error.value.hint == "Available: cuda:1, cpu."
    usable[1] = False
    assert str(pick_device(None)) == "cpu"


def test_control_group_limit_counts(tmp_path):
    assert cgroup_free(tmp_path, 5) == 5  # no such control group
    for name, text in (("max", "1000"), ("current", "700"), ("stat", "anon 1\ninactive_file 50\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    assert cgroup_free(tmp_path, 5000) == 350
    (tmp_path / "memory.max").write_text("max\n")
    assert cgroup_free(tmp_path, 5000) == 5000


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 72.00 MiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried to"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] data. DefaultCPUAllocator: not enough memory: you tried to"),
        RuntimeError("Invalid buffer size: 20.25 GiB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        OSError(errno.ENOMEM, "Nicht genug Speicher"),
        OSError("Cannot allocate memory (os error 12)"),
        OSError("[WinError 1455] Die Auslagerungsdatei ist zu klein, um diesen Vorgang durchzuführen"),
    ],
    ids=str,
)
def test_out_of_memory_is_recognised_on_every_system(error):
    with pytest.raises(K2Error, match="not enough memory for a picture of 8x8"), memory_errors("a picture of 8x8"):
        raise error


@pytest.mark.parametrize("error", [RuntimeError("mat1 and mat2 shapes"), OSError(errno.ENOSPC, "No space left")])
def test_other_errors_pass_unchanged(error):
    with pytest.raises(type(error)) as raised, memory_errors("a picture"):
        raise error
    assert raised.value is error
