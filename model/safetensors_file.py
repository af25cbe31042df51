"""The tensors of a .safetensors file: views of its pages, or matrices read part by part through little memory."""

from __future__ import annotations

import io
import mmap
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Executor, Future
from contextlib import suppress
from itertools import cycle
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from model.errors import K2Error
from model.headers import read_header

MAX_MAPPED = 1 << 30  # bytes spanned by one mapping: while it lives, the pages read count as this process's
PAGE = 4096  # bytes that a disk reads at once
READ_AHEAD = 4  # parts of a matrix read ahead while one is processed
MAX_COPIED = 1 << 20  # bytes up to which a tensor is copied: a view would keep an entire mapping and its pages alive
TORCH_DTYPES = {  # safetensors' names of number formats
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
USE_PLAIN_FILE = "Use the bf16 or the fp8_scaled file of the same model."


class SafeTensors:
    """The tensors of a .safetensors file by name: views of its pages, which are read when touched.

    Only a window of the file is mapped at a time, and lives as long as any of its tensors: mapping all of a file larger
    than the machine's memory would be refused. Mappings are copy-on-write.

    cached: whether the system should cache what `read_into` reads. If a file does not fit into the cache, each page
    evicts another that is needed just as soon, and costs a copy: bypassing the cache halves the time.
    """

    def __init__(self, path: Path, device: str, cached: bool = True):
        self.path, self.device, self.cached = path, device, cached
        self.header = {name: entry for name, entry in read_header(path).items() if name != "__metadata__"}

    def __enter__(self) -> SafeTensors:
        self.file = self.path.open("rb", buffering=0) if self.cached else open_uncached(self.path)
        self.size = os.fstat(self.file.fileno()).st_size
        self.start = self.size - max((entry["data_offsets"][1] for entry in self.header.values()), default=0)
        self.map_start = self.map_end = 0
        return self

    def __exit__(self, *problem: object) -> None:
        self.file.close()

    def locate(self, name: str) -> tuple[int, int, torch.dtype, list[int]]:
        """Where a tensor begins and ends in the file, its number format and its shape. Raises K2Error."""
        entry = self.header[name]
        begin, end = (self.start + offset for offset in entry["data_offsets"])
        if entry["dtype"] not in TORCH_DTYPES:
            raise K2Error(
                f"{name} of {self.path} is stored as {entry['dtype']}, which k2 does not read.", hint=USE_PLAIN_FILE
            )
        return begin, end, TORCH_DTYPES[entry["dtype"]], entry["shape"]

    def read_into(self, buffer: Tensor, begin: int, end: int, dtype: torch.dtype) -> Tensor:
        """The file's bytes from `begin` up to `end`, as numbers in a buffer from `page_buffer`. Raises OSError."""
        early = begin % PAGE
        self.file.seek(begin - early)
        filled, view = 0, memoryview(buffer.numpy())[: round_to_pages(early + end - begin)]  # type: ignore[arg-type]
        while filled < early + end - begin:
            if not (count := self.file.readinto(view[filled:])):
                raise OSError(f"{self.path} has become shorter")
            filled += count
        return torch.frombuffer(view, dtype=dtype, count=(end - begin) // dtype.itemsize, offset=early)

    def get_tensor(self, name: str) -> Tensor:
        begin, end, dtype, shape = self.locate(name)
        if begin == end:
            return torch.empty(shape, dtype=dtype, device=self.device)
        if begin < self.map_start or end > self.map_end:
            self.map_start = begin - begin % mmap.ALLOCATIONGRANULARITY
            self.map_end = min(max(end, self.map_start + MAX_MAPPED), self.size)
            length = self.map_end - self.map_start
            self.mapping = mmap.mmap(self.file.fileno(), length, access=mmap.ACCESS_COPY, offset=self.map_start)
        tensor = torch.frombuffer(self.mapping, dtype=dtype, count=prod(shape), offset=begin - self.map_start)
        tensor = tensor.clone() if end - begin < MAX_COPIED else tensor
        return tensor.view(shape).to(self.device)


class StreamedMatrix:
    """A matrix read part by part through little memory, which stays in the CPU's cache: some rows are read while those
    before them are processed."""

    device = torch.device("cpu")

    def __init__(self, file: SafeTensors, name: str, executor: Executor):
        self.file, self.name, self.executor = file, name, executor
        begin, end, self.dtype, shape = file.locate(name)
        self.shape = torch.Size(shape)
        self.row_bytes = (end - begin) // len(self)  # bytes

    def __len__(self) -> int:
        return self.shape[0]

    def split(self, count: int) -> Iterator[Tensor]:
        """All rows, `count` at a time; each part is valid until the next is requested. Raises OSError."""
        begin, end, *_ = self.file.locate(self.name)
        buffers = [page_buffer(count * self.row_bytes) for _ in range(READ_AHEAD + 1)]

        def fetch(start: int, room: Tensor) -> Tensor:
            first, last = begin + start * self.row_bytes, min(begin + (start + count) * self.row_bytes, end)
            return self.file.read_into(room, first, last, self.dtype).view(-1, *self.shape[1:])

        pending = deque[Future[Tensor]]()
        for start, room in zip(range(0, len(self), count), cycle(buffers)):
            pending.append(self.executor.submit(fetch, start, room))
            if len(pending) > READ_AHEAD:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def open_uncached(path: Path) -> io.FileIO:
    """A file opened to bypass the system's cache, where that is possible (Linux, on most disks). It must be read in
    whole pages, into page-aligned memory."""
    if hasattr(os, "O_DIRECT"):
        with suppress(OSError):
            file = io.FileIO(path, opener=lambda name, flags: os.open(name, flags | os.O_DIRECT))
            try:
                file.readinto(memoryview(page_buffer(0).numpy()))  # type: ignore[arg-type]
                return file
            except OSError:
                file.close()
    return io.FileIO(path)


def page_buffer(count: int) -> Tensor:
    """Page-aligned memory for this many bytes of a file, plus the rest of the pages they begin and end in."""
    buffer = torch.empty(round_to_pages(count) + 2 * PAGE, dtype=torch.uint8)
    return buffer[-buffer.data_ptr() % PAGE :][: round_to_pages(count) + PAGE]


def round_to_pages(count: int) -> int:
    return -(-count // PAGE) * PAGE
