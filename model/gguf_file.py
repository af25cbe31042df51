"""GGUF files: every claim of the header is checked, tensors are dequantised one at a time.

The format is that of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Headers are parsed here and not by the
`gguf` package, whose reader trusts every length that a file states; the package (our extra `gguf`) knows the number
formats. Reading a header needs neither it nor torch.
"""

from __future__ import annotations

import struct
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from model.errors import K2Error, brief

if TYPE_CHECKING:
    from torch import Tensor

FORMATS = {  # number in the file: name, numbers in a block, bytes of a block
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
}
UNSUPPORTED = {  # known by name, but never read
    9: "Q8_1", 15: "Q8_K", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 40: "NVFP4", 41: "Q1_0",
}  # fmt: skip
BLOCK_LAYOUTS = {name: (numbers, size) for name, numbers, size in FORMATS.values()}
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
SHAPE_KEY = "comfy.gguf.orig_shape."  # of a tensor that was reshaped to fill whole blocks
SPLIT_COUNT = "split.count"
MAX_HEADER = 1 << 24  # 16 MiB; an image network's is a few dozen KiB
MAX_LIST = 16  # longer lists are vocabularies, and skipped


class Cursor:
    """Reads a file from front to back, never past `limit`."""

    def __init__(self, file: BinaryIO, limit: int):
        self.file, self.limit = file, limit

    def take(self, count: int) -> bytes:
        if count > self.limit - self.file.tell():
            raise ValueError("its header is truncated, or states an impossible length")
        return self.file.read(count)

    def number(self, kind: str) -> Any:
        return struct.unpack(f"<{kind}", self.take(struct.calcsize(f"<{kind}")))[0]

    def text(self) -> str:
        return self.take(self.number("Q")).decode("utf-8")

    def value(self) -> Any:
        """The next value, preceded by its type; None for a long list."""
        kind = self.number("I")
        if kind == STRING:
            return self.text()
        if kind != ARRAY:
            return self.number(SCALARS[kind])
        kind, count = self.number("I"), self.number("Q")
        if kind == STRING:
            texts = [self.text()[: 0 if count > MAX_LIST else None] for _ in range(count)]
            return texts if count <= MAX_LIST else None
        raw = self.take(count * struct.calcsize(f"<{SCALARS[kind]}"))
        return list(struct.unpack(f"<{count}{SCALARS[kind]}", raw)) if count <= MAX_LIST else None


def read_gguf_header(path: Path) -> dict[str, Any]:
    """{tensor name: {dtype, shape, data_offsets}, …}, like a safetensors header; offsets are from the file's start.

    Raises K2Error for a damaged file, for a piece of a split one, and for number formats that k2 does not read.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            header, pieces = read_entries(Cursor(file, min(size, MAX_HEADER)), size)
    except (ValueError, KeyError, OverflowError, struct.error) as error:
        reason = f"unknown kind {error}" if isinstance(error, KeyError) else error
        raise K2Error(f"{path} is a damaged GGUF file: {brief(reason)}.", hint="Fetch it again.") from None
    if pieces > 1:
        raise K2Error(
            f"{path} is one of {pieces} pieces of a GGUF file.",
            hint="Join them with llama.cpp: llama-gguf-split --merge FIRST_PIECE WHOLE.gguf",
        )
    strange = sorted({entry["dtype"] for entry in header.values()} - set(BLOCK_LAYOUTS))
    if strange:
        raise K2Error(
            f"{path} is a GGUF file with tensors in {', '.join(strange)}, which k2 does not read.",
            hint="Use one in Q8_0, Q6_K, Q5_K or Q4_K.",
        )
    return header


def read_entries(cursor: Cursor, size: int) -> tuple[dict[str, Any], int]:
    """Fields, then tensors; each must lie within the `size` bytes of the file without overlaps. Raises ValueError.

    Returns the tensors, and the number of pieces of the split file (`gguf-split`) that this belongs to.
    """
    magic, version = cursor.take(4), cursor.number("I")
    if magic != b"GGUF" or version not in (2, 3):
        raise ValueError("it is big-endian" if version and version & 0xFFFF == 0 else f"it states version {version}")
    tensors, count = cursor.number("Q"), cursor.number("Q")
    fields: dict[str, Any] = {}
    for _ in range(count):
        name = cursor.text()
        if name in fields:
            raise ValueError(f"it states {name} twice")
        fields[name] = cursor.value()
    found: dict[str, tuple[str, list[int], int]] = {}
    for _ in range(tensors):
        name, dims = cursor.text(), [cursor.number("Q") for _ in range(min(cursor.number("I"), 5))]
        if name in found or not 0 < len(dims) < 5 or not all(dims):
            raise ValueError(f"{name} appears twice, or has the shape {dims}")
        kind, offset = cursor.number("I"), cursor.number("Q")
        found[name] = (format_name(kind), dims, offset)

    alignment = fields.get("general.alignment", 32)
    if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
        raise ValueError(f"it states an alignment of {alignment}")
    start = -(-cursor.file.tell() // alignment) * alignment
    header = {}
    for name, (dtype, dims, offset) in found.items():
        numbers, block = BLOCK_LAYOUTS.get(dtype, (1, 0))
        shape = fields.get(SHAPE_KEY + name, dims[::-1])  # the fastest dimension comes first in GGUF
        whole = isinstance(shape, list) and all(type(n) is int and n > 0 for n in shape) and prod(shape) == prod(dims)
        if dims[0] % numbers or not whole:
            raise ValueError(f"{name} is {dtype} of shape {shape}")
        begin = start + offset
        header[name] = {
            "dtype": dtype,
            "shape": shape,
            "data_offsets": [begin, begin + prod(dims) // numbers * block],
        }
    position = start
    for begin, end in sorted(entry["data_offsets"] for entry in header.values()):
        if begin < position or end > size:
            raise ValueError(f"a tensor lies at bytes {begin:,} to {end:,} of {size:,}, {position:,} of them in use")
        position = end
    pieces = fields.get(SPLIT_COUNT, 1)
    return header, pieces if type(pieces) is int else 1


def format_name(kind: int) -> str:
    return FORMATS[kind][0] if kind in FORMATS else UNSUPPORTED.get(kind, f"number format {kind}")


class GGUFTensors:
    """The tensors of a file by name, in fp32; same interface as `safetensors.safe_open`."""

    CHUNK = 1 << 22  # numbers dequantised at once: the working copies stay small
    MAX_READ = 1 << 30  # bytes read through one mapping: while it lives, its pages count as this process's

    def __init__(self, path: Path, device: str = "cpu"):
        try:
            import gguf
            import numpy
        except ImportError:
            raise K2Error(f"{path} is a GGUF file.", hint='To read it, run: pip install "k2[gguf]"') from None
        self.gguf, self.numpy, self.device = gguf, numpy, device
        self.header = read_gguf_header(path)
        self.path, self.data, self.read = path, numpy.memmap(path, numpy.uint8, "r"), 0

    def __enter__(self) -> GGUFTensors:
        return self

    def __exit__(self, *problem: object) -> None:
        del self.data

    def get_tensor(self, name: str) -> Tensor:
        import torch

        entry = self.header[name]
        numbers, size = BLOCK_LAYOUTS[entry["dtype"]]
        kind, step = self.gguf.GGMLQuantizationType[entry["dtype"]], self.CHUNK // numbers
        begin, end = entry["data_offsets"]
        if self.read > self.MAX_READ:
            self.data, self.read = self.numpy.memmap(self.path, self.numpy.uint8, "r"), 0
        self.read += end - begin
        raw, result = self.data[begin:end], self.numpy.empty(prod(entry["shape"]), self.numpy.float32)
        for block in range(0, len(result) // numbers, step):
            piece = raw[block * size : (block + step) * size]
            result[block * numbers : (block + step) * numbers] = self.gguf.quants.dequantize(piece, kind)
        return torch.from_numpy(result).view(entry["shape"]).to(self.device)
