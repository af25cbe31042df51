"""NVFP4 and MXFP8 as ComfyUI's own library writes them, read back as that library reads them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import comfy_kitchen.tensor as kitchen
import pytest
import torch
from comfy_kitchen.float_utils import from_blocked, to_blocked
from safetensors.torch import save_file
from test_comfy_formats import PREFIX, TEXT, assert_means, prefixed, raw, with_table
from test_dit import inputs, random_model, relative_error
from test_layouts import TINY, native, refused, velocity
from tiny import tiny, tiny_box  # noqa: F401
from torch import Tensor

from model import library
from model.blockwise import pad_to_tiles, unpack_blocks, unswizzle
from model.layouts import is_packed, load_dit, stored_precision, to_diffusers
from model.parts import count_numbers
from model.plan import USABLE_SHARE
from model.stream import cached_bytes, pin

LAYOUTS = {"nvfp4": kitchen.TensorCoreNVFP4Layout, "mxfp8": kitchen.TensorCoreMXFP8Layout}
KINDS = pytest.mark.parametrize("kind", LAYOUTS)


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return random_model(TINY).state_dict()


def packed(kind: str, matrix: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """What comfy-kitchen stores for a matrix, by name suffix, and the matrix that it stands for."""
    layout = LAYOUTS[kind]
    numbers, how = layout.quantize(matrix)
    return layout.state_dict_tensors(numbers, how), layout.dequantize(numbers, how)


def stored(kind: str, state: dict[str, Tensor], mark: object = None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A state dict as ComfyUI saves it, the blocks' matrices in few bits, and the weights it stands for."""
    saved, means = dict(state), dict(state)
    for name in [n for n, t in state.items() if n.startswith("blocks.") and t.ndim == 2]:
        ends, means[name] = packed(kind, state[name])
        saved |= {name + end: tensor for end, tensor in ends.items()}
        if mark is not False:
            saved[name.removesuffix("weight") + "comfy_quant"] = raw(mark or {"format": kind})
    return saved, means


# ---- numbers and scales -------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "blocks"), [(1, 1), (16, 4), (128, 4), (130, 5), (300, 96), (33, 3)])
def test_swizzled_scales_are_put_in_order(rows, blocks):
    scales = torch.randint(0, 255, (rows, blocks), dtype=torch.uint8)
    swizzled = to_blocked(scales, flatten=False)

    assert tuple(swizzled.shape) == tuple(pad_to_tiles(rows, blocks))
    assert torch.equal(unswizzle(swizzled, rows, blocks), scales)
    assert torch.equal(unswizzle(swizzled.flatten(), rows, blocks), from_blocked(swizzled, rows, blocks))


@KINDS
@pytest.mark.parametrize("shape", [(32, 32), (160, 96), (256, 1024)])
def test_matrices_are_read_as_their_writer_reads_them(kind, shape):
    ends, means = packed(kind, torch.randn(shape) * torch.logspace(-6, 2, shape[0])[:, None])
    numbers, scales = unpack_blocks(kind, ends[""], ends["_scale"], ends.get("_scale_2"))

    assert numbers.shape == shape and scales.dtype == torch.float32
    assert torch.equal((numbers.float().view(*scales.shape, -1) * scales[..., None]).view(shape), means)


def test_every_4_bit_number():
    codes = torch.arange(16, dtype=torch.uint8).repeat_interleave(16) << 4 | torch.arange(16, dtype=torch.uint8).repeat(
        16
    )
    scale = to_blocked(torch.ones(16, 2), flatten=False).to(torch.float8_e4m3fn)
    numbers, scales = unpack_blocks("nvfp4", codes.view(16, 16), scale, torch.tensor(1.0))
    ours = numbers.float() * scales.repeat_interleave(16, 1)

    e2m1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    assert torch.equal(ours[0, 1::2], torch.cat([e2m1, -e2m1]))  # the low half of a byte comes second
    assert torch.equal(ours[:, 0], torch.cat([e2m1, -e2m1]))


# ---- whole networks -----------------------------------------------------------------------------


@KINDS
def test_networks_load_as_the_weights_they_stand_for(tmp_path, state, kind):
    saved, means = stored(kind, state)
    loaded, checkpoint = load_dit(native(tmp_path, saved))

    assert loaded.config == TINY and stored_precision(checkpoint) is None and is_packed(checkpoint)
    assert not is_packed(load_dit(native(tmp_path, state))[1])
    assert_means(loaded, means)
    whole = random_model(TINY)
    assert 0 < relative_error(velocity(loaded), velocity(whole)) < (0.2 if kind == "nvfp4" else 0.05)


@KINDS
def test_marks_in_metadata_and_prefixed_names(tmp_path, state, kind):
    saved, means = stored(kind, state, mark=False)
    layers = {name.removesuffix(".weight_scale") for name in saved if name.endswith(".weight_scale")}
    marks = {PREFIX + layer: {"format": kind, "full_precision_matrix_mult": True} for layer in layers}
    assert_means(load_dit(with_table(tmp_path, prefixed(saved), marks))[0], means)

    beside = {f"{TEXT}.weight": torch.ones(8, 16, dtype=torch.uint8), f"{TEXT}.weight_scale_2": torch.ones(())}
    whole, _ = stored(kind, state)
    loaded, checkpoint = load_dit(native(tmp_path, prefixed(whole) | beside))
    assert_means(loaded, means)
    assert not set(beside) & set(checkpoint.tensors)


@KINDS
def test_diffusers_names(tmp_path, state, kind):
    saved, means = stored(kind, state)
    back = {id(tensor): name for name, tensor in to_diffusers(state, TINY).items() if tensor.ndim == 2}
    theirs = to_diffusers(state, TINY)
    for name, tensor in state.items():
        if name + "_scale" in saved:
            other = back[id(tensor)].removesuffix("weight")
            own = name.removesuffix("weight")
            theirs |= {other + n.removeprefix(own): t for n, t in saved.items() if n.startswith(own)}
    assert_means(load_dit(native(tmp_path, theirs))[0], means)


@torch.no_grad()
@KINDS
@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_other_8_bit_precisions_round_again(tmp_path, state, kind, precision):
    """Numbers scaled per block cannot be used with a scale per row."""
    saved, means = stored(kind, state)
    loaded, _ = load_dit(native(tmp_path, saved), precision=precision)

    layer, name = loaded.blocks[0].mlp.down, "blocks.0.mlp.down.weight"
    back = layer.weight.float() * layer.weight_scale[:, None]
    step = means[name].abs().amax(1, keepdim=True) / (127 if precision == "int8" else 14)
    assert ((back - means[name]).abs() <= step * 0.5001).all()
    given = inputs(TINY)
    assert relative_error(loaded(*given), load_dit(native(tmp_path, saved))[0](*given)) < 0.08


@KINDS
def test_streamed_and_resident_answers_are_equal(tmp_path, state, kind):
    path = native(tmp_path, stored(kind, state)[0])
    assert torch.equal(velocity(load_dit(path, streamed=True)[0]), velocity(load_dit(path)[0]))


@KINDS
def test_plan_knows_which_weights_are_packed(tmp_path, state, tiny, kind):  # noqa: F811
    parts = library.find_parts(library.find("tiny"))
    for tensors, told in ((state, False), (stored(kind, state)[0], True)):
        assert count_numbers(replace(parts, dit=native(tmp_path, tensors)), "cpu").packed is told


@pytest.mark.parametrize(("over", "kept"), [(8, True), (-8, False)])
def test_rounded_weights_are_kept_if_there_is_room(tmp_path, state, monkeypatch, over, kept):
    told, path = [], native(tmp_path, stored("nvfp4", state)[0])
    room = sum(tensor.nbytes for tensor in load_dit(path, precision="int8")[0].blocks.state_dict().values())
    monkeypatch.setattr("model.layouts.stream", lambda *_, keep: told.append(keep))
    monkeypatch.setattr("model.layouts.free_memory", lambda device: room / USABLE_SHARE + over)
    for precision in ("int8", "native"):
        load_dit(path, precision=precision, streamed=True)
    assert told == [kept, False]  # at native precision they would take twice the room


@pytest.mark.parametrize(("bytes_", "pinned_as"), [(1, 1), (64, 64), (65, 128), (3 << 20, 4 << 20)])
def test_pinned_memory_for_a_gpu_comes_in_powers_of_two(bytes_, pinned_as):
    tensor = torch.empty(bytes_, dtype=torch.uint8)
    assert [cached_bytes(tensor, torch.device(name)) for name in ("cuda", "cpu")] == [pinned_as, bytes_]


@pytest.mark.parametrize("short", [True, False])
def test_tensors_that_cannot_be_pinned_are_used_as_they_are(monkeypatch, short):
    def pin_memory(tensor: Tensor) -> Tensor:
        if short:
            raise torch.AcceleratorError("CUDA error: out of memory")
        return tensor + 1

    monkeypatch.setattr(Tensor, "pin_memory", pin_memory)
    assert pin(torch.zeros(3)).tolist() == [float(not short)] * 3


@KINDS
def test_description_counts_the_networks_parameters_not_the_bytes(tmp_path, state, kind):
    """Two numbers per byte do not make the network narrower, and its licence still covers it."""
    plain, few = (library.describe(native(tmp_path, tensors)) for tensors in (state, stored(kind, state)[0]))

    assert few["shape"] == plain["shape"] and few["parameters"] == plain["parameters"]
    assert ("NVFP4" if kind == "nvfp4" else "F8_E4M3") in few["precision"]


# ---- refusals -----------------------------------------------------------------------------------

ONE = "blocks.0.attn.wq."


def changed(saved: dict[str, Tensor], **ends: object) -> dict[str, Tensor]:
    """The same with other tensors for one layer; None removes one."""
    new = {ONE + end: tensor for end, tensor in ends.items()}
    return {name: tensor for name, tensor in (saved | new).items() if tensor is not None}


@pytest.mark.parametrize(
    ("ends", "said"),
    [
        (
            {"comfy_quant": None},
            'unexplained "weight_scale_2" beside it',
        ),  # other tools pack the halves the other way round
        ({"weight_scale": None}, "nvfp4 without scales"),
        ({"weight_scale": torch.ones(256, 16)}, "nvfp4 with scales of F32"),
        ({"weight_scale": torch.ones(128, 16).to(torch.float8_e4m3fn)}, "nvfp4 with scales of F8_E4M3 [128, 16]"),
        ({"weight_scale_2": None}, "nvfp4 without a scale of the whole"),
        ({"weight_scale_2": torch.ones(256)}, "nvfp4 with F32 [256] as the scale"),
        ({"weight": torch.ones(256, 256).to(torch.float8_e4m3fn)}, "F8_E4M3 with marks of nvfp4"),
        ({"comfy_quant": raw({"format": "mxfp8"})}, "U8 with marks of mxfp8"),
        ({"comfy_quant": raw({"format": "nvfp4", "convrot": True})}, "rotated"),
        ({"comfy_quant": raw({"format": "nvfp4", "hadamard": True})}, "nvfp4 with hadamard"),
        ({"comfy_quant": raw({"format": ["nvfp4"]})}, "an unknown format"),
        ({"weight": None}, "without their weights"),
    ],
)
def test_refuses_what_cannot_be_read_correctly(tmp_path, state, ends, said):
    assert said in refused(native(tmp_path, changed(stored("nvfp4", state)[0], **ends)))


def test_mxfp8_scales_must_be_powers_of_2(tmp_path, state):
    saved, means = stored("mxfp8", state)
    scale = saved[f"{ONE}weight_scale"]
    assert_means(load_dit(native(tmp_path, changed(saved, weight_scale=scale.view(torch.uint8))))[0], means)
    wide = changed(saved, weight_scale=scale.float())
    assert "mxfp8 with scales of F32" in refused(native(tmp_path, wide))
    assert "mxfp8 with a scale of the whole" in refused(native(tmp_path, changed(saved, weight_scale_2=torch.ones(()))))


def test_refuses_contradicting_marks(tmp_path: Path, state):
    saved, _ = stored("nvfp4", state)
    save_file(
        saved,
        tmp_path / "x.safetensors",
        {"_quantization_metadata": json.dumps({"layers": {ONE[:-1]: {"format": "int8_tensorwise"}}})},
    )
    assert "U8 with marks of int8_tensorwise and nvfp4" in refused(tmp_path / "x.safetensors")
