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
NUMBERS = {  # safetensors' names of number formats
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
        self.first = self.last = 0
        return self

    def __exit__(self, *problem: object) -> None:
        self.file.close()

    def place_of(self, name: str) -> tuple[int, int, torch.dtype, list[int]]:
        """Where a tensor begins and ends in the file, its number format and its shape. Raises K2Error."""
        entry = self.header[name]
        begin, end = (self.start + offset for offset in entry["data_offsets"])
        if entry["dtype"] not in NUMBERS:
            raise K2Error(
                f"{name} of {self.path} is stored as {entry['dtype']}, which k2 does not read.", hint=USE_PLAIN_FILE
            )
        return begin, end, NUMBERS[entry["dtype"]], entry["shape"]

    def read_into(self, room: Tensor, begin: int, end: int, dtype: torch.dtype) -> Tensor:
        """The file's bytes from `begin` up to `end`, as numbers in a buffer from `page_buffer`. Raises OSError."""
        early = begin % PAGE
        self.file.seek(begin - early)
        filled, view = 0, memoryview(room.numpy())[: whole_pages(early + end - begin)]  # type: ignore[arg-type]
        while filled < early + end - begin:
            if not (count := self.file.readinto(view[filled:])):
                raise OSError(f"{self.path} has become shorter")
            filled += count
        return torch.frombuffer(view, dtype=dtype, count=(end - begin) // dtype.itemsize, offset=early)

    def get_tensor(self, name: str) -> Tensor:
        begin, end, dtype, shape = self.place_of(name)
        if begin == end:
            return torch.empty(shape, dtype=dtype, device=self.device)
        if begin < self.first or end > self.last:
            self.first = begin - begin % mmap.ALLOCATIONGRANULARITY
            self.last = min(max(end, self.first + MAX_MAPPED), self.size)
            length = self.last - self.first
            self.pages = mmap.mmap(self.file.fileno(), length, access=mmap.ACCESS_COPY, offset=self.first)
        tensor = torch.frombuffer(self.pages, dtype=dtype, count=prod(shape), offset=begin - self.first)
        tensor = tensor.clone() if end - begin < MAX_COPIED else tensor
        return tensor.view(shape).to(self.device)


class StreamedMatrix:
    """A matrix read part by part through little memory, which stays in the CPU's cache: some rows are read while those
    before them are processed."""

    device = torch.device("cpu")

    def __init__(self, file: SafeTensors, name: str, reader: Executor):
        self.file, self.name, self.reader = file, name, reader
        begin, end, self.dtype, shape = file.place_of(name)
        self.shape = torch.Size(shape)
        self.row = (end - begin) // len(self)  # bytes

    def __len__(self) -> int:
        return self.shape[0]

    def split(self, count: int) -> Iterator[Tensor]:
        """All rows, `count` at a time; each part is valid until the next is requested. Raises OSError."""
        begin, end, *_ = self.file.place_of(self.name)
        rooms = [page_buffer(count * self.row) for _ in range(READ_AHEAD + 1)]

        def fetch(start: int, room: Tensor) -> Tensor:
            first, last = begin + start * self.row, min(begin + (start + count) * self.row, end)
            return self.file.read_into(room, first, last, self.dtype).view(-1, *self.shape[1:])

        coming = deque[Future[Tensor]]()
        for start, room in zip(range(0, len(self), count), cycle(rooms)):
            coming.append(self.reader.submit(fetch, start, room))
            if len(coming) > READ_AHEAD:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()


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
    room = torch.empty(whole_pages(count) + 2 * PAGE, dtype=torch.uint8)
    return room[-room.data_ptr() % PAGE :][: whole_pages(count) + PAGE]


def whole_pages(count: int) -> int:
    return -(-count // PAGE) * PAGE
