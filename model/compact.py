"""Write a transformer as one .safetensors file under native names, optionally with its blocks' matrices in few bits.

They are rounded once, exactly as when wider weights are loaded in few bits: then there is less to read and nothing left
to convert. Only one tensor at a time is in memory, so files larger than the memory can be written.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model.atomic import atomic_write
from model.checkpoint import check_tensors, tensor_reader
from model.comfy_formats import make_mark
from model.errors import K2Error
from model.headers import FETCH_AGAIN
from model.layouts import open_dit, prepare_blocks
from model.low_bit import SUFFIXES, few_bit_layers
from model.safetensors_file import TORCH_DTYPES

DTYPE_NAMES = {number: word for word, number in TORCH_DTYPES.items()}
ROW_SCALE_SUFFIXES = ("_scale", "_s_channel")  # they show any NaN or infinity in their rows
ALIGNMENT = 64  # tensors start at a multiple of this many bytes, so that they can be mapped

OnTensor = Callable[[int, int], None]  # (tensors written, of how many)


def write_compact(
    source: Path, target: Path, precision: str, variant: str | None, on_tensor: OnTensor | None = None
) -> None:
    """Write a transformer of any layout that k2 reads, completely or not at all. Raises K2Error.

    source     as for `open_dit`
    precision  of the blocks' matrices: "int8", "fp8", "int4", or "native", which is bf16; all else is bf16, norm scales
               fp32
    variant    raw or turbo, if the source does not state it
    """
    if target.exists():
        raise K2Error(f"{target} exists already.", hint="Choose another name.")
    model, checkpoint = open_dit(source)
    check_tensors(model, checkpoint)
    prepare_blocks(model, checkpoint, precision)
    read = tensor_reader(model, checkpoint, device="cpu", dtype=torch.bfloat16)
    about = {"kind": "dit", "config": asdict(model.config)} | ({"variant": variant} if variant else {})
    header, count = make_header(model, about | checkpoint.metadata), len(model.state_dict())
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(target) as draft, draft.open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            for done, (name, tensor) in enumerate(zip(model.state_dict(), iter_tensors(model, read), strict=True), 1):
                if (name.endswith(ROW_SCALE_SUFFIXES) or tensor.dtype == torch.float8_e4m3fn) and not is_finite(tensor):
                    matrix = name.removesuffix("_scale").removesuffix("_s_channel")
                    raise K2Error(f"{source} is damaged: {matrix} holds NaN or infinite numbers.", hint=FETCH_AGAIN)
                raw = tensor.contiguous().flatten().view(torch.uint8).numpy()
                file.write(memoryview(raw))  # type: ignore[arg-type]
                if on_tensor:
                    on_tensor(done, count)
    except OSError as error:
        raise K2Error(f"{target} cannot be written: {error.strerror or error}.") from None


def is_finite(tensor: Tensor) -> bool:
    """Whether all numbers are finite; for a matrix already stored in 8 bits its scales do not show it."""
    return all(bool(rows.float().isfinite().all()) for rows in tensor.split(1024))


def make_header(model: nn.Module, about: Mapping[str, Any]) -> bytes:
    """safetensors' header for what `iter_tensors` yields, in its order."""
    few = few_bit_layers(model)
    marks = {
        name.removesuffix(".weight"): mark for name, layer in few.items() if (mark := make_mark(*layer.format[1:]))
    }
    table = {"_quantization_metadata": json.dumps({"layers": marks})} if marks else {}
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", "k2": json.dumps(about, sort_keys=True), **table}}
    few_bit_names = {f"{name}{end}" for name, layer in few.items() for end in SUFFIXES[layer.format.bits]}
    end = 0
    for name, tensor in model.state_dict().items():
        if name in few_bit_names:  # k2 holds e4m3 scales as raw bytes
            dtype = torch.float8_e4m3fn if tensor.dtype == torch.uint8 else tensor.dtype
        else:
            dtype = torch.float32 if name.endswith(".scale") else torch.bfloat16  # norms compute in fp32
        begin, end = end, end + tensor.numel() * dtype.itemsize
        entries[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    return text + b" " * (-(8 + len(text)) % ALIGNMENT)


def iter_tensors(model: nn.Module, read: Callable[[Iterable[str]], dict[str, Tensor]]) -> Iterator[Tensor]:
    """The tensors of a network on the meta device, one after the other; scales are read with their matrix."""
    come: dict[str, Tensor] = {}
    for name in model.state_dict():
        if name not in come:
            come |= read([name])
        yield come.pop(name)
