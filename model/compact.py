"""A transformer as one .safetensors file under native names, its blocks' matrices in few bits if that is asked for.

They are rounded once, as they would be whenever weights of more bits are held in few: what is read is less, and
nothing is left to do. A tensor at a time is in memory, so that a file larger than the memory can be written.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model.checkpoint import check, reader
from model.errors import K2Error
from model.few_bits import ENDS, few_bit_layers
from model.headers import AGAIN
from model.layouts import hold_blocks, open_dit
from model.marks import mark_of
from model.safetensors_file import NUMBERS
from model.whole import whole

WORDS = {number: word for word, number in NUMBERS.items()}
SCALES = ("_scale", "_s_channel")  # of the rows of matrices in few bits, in which a NaN or infinity among them shows
ALIGNED = 64  # bytes that the tensors begin at a multiple of, so that they can be mapped

OnTensor = Callable[[int, int], None]  # (tensors written, of how many)


def write_compact(
    source: Path, target: Path, precision: str, variant: str | None, on_tensor: OnTensor | None = None
) -> None:
    """Write a transformer of any layout that k2 reads, whole or not at all. Raises K2Error.

    source     as of `open_dit`
    precision  of the blocks' matrices: "int8", "fp8", "int4", or "native", which is bf16; all else is bf16, norm scales
               fp32
    variant    raw or turbo, where the source does not say it itself
    """
    if target.exists():
        raise K2Error(f"{target} exists already.", hint="Choose another name.")
    model, checkpoint = open_dit(source)
    check(model, checkpoint)
    hold_blocks(model, checkpoint, precision)
    read = reader(model, checkpoint, device="cpu", dtype=torch.bfloat16)
    about = {"kind": "dit", "config": asdict(model.config)} | ({"variant": variant} if variant else {})
    header, count = header_of(model, about | checkpoint.metadata), len(model.state_dict())
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with whole(target) as draft, draft.open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            for done, (name, tensor) in enumerate(zip(model.state_dict(), tensors(model, read), strict=True), 1):
                if (name.endswith(SCALES) or tensor.dtype == torch.float8_e4m3fn) and not is_sound(tensor):
                    matrix = name.removesuffix("_scale").removesuffix("_s_channel")
                    raise K2Error(f"{source} is damaged: {matrix} holds NaN or infinite numbers.", hint=AGAIN)
                raw = tensor.contiguous().flatten().view(torch.uint8).numpy()
                file.write(memoryview(raw))  # type: ignore[arg-type]
                if on_tensor:
                    on_tensor(done, count)
    except OSError as error:
        raise K2Error(f"{target} cannot be written: {error.strerror or error}.") from None


def is_sound(tensor: Tensor) -> bool:
    """Whether all of it is numbers; a matrix that lies in 8 bits already is not told by its scales."""
    return all(bool(rows.float().isfinite().all()) for rows in tensor.split(1024))


def header_of(model: nn.Module, about: Mapping[str, Any]) -> bytes:
    """safetensors' header for what `tensors` yields, in its order."""
    few = few_bit_layers(model)
    marks = {name.removesuffix(".weight"): mark for name, layer in few.items() if (mark := mark_of(*layer.format[1:]))}
    table = {"_quantization_metadata": json.dumps({"layers": marks})} if marks else {}
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", "k2": json.dumps(about, sort_keys=True), **table}}
    held = {f"{name}{end}" for name, layer in few.items() for end in ENDS[layer.format.bits]}
    end = 0
    for name, tensor in model.state_dict().items():
        if name in held:  # the bits of scales in e4m3 are bytes to us
            number = torch.float8_e4m3fn if tensor.dtype == torch.uint8 else tensor.dtype
        else:
            number = torch.float32 if name.endswith(".scale") else torch.bfloat16  # norms compute in fp32
        begin, end = end, end + tensor.numel() * number.itemsize
        entries[name] = {"dtype": WORDS[number], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    return text + b" " * (-(8 + len(text)) % ALIGNED)


def tensors(model: nn.Module, read: Callable[[Iterable[str]], dict[str, Tensor]]) -> Iterator[Tensor]:
    """What a network on the meta device holds, one after the other; a scale comes with its matrix."""
    come: dict[str, Tensor] = {}
    for name in model.state_dict():
        if name not in come:
            come |= read([name])
        yield come.pop(name)
