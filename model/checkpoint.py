"""Checkpoints on disk: safetensors or GGUF, checked before reading, loaded strictly; written completely or not at all.

Our own files state in their metadata, under `k2`, what they are: kind, variant, config, recommended settings. What
other files hold is inferred from names and shapes (`model/layouts.py`).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model import blockwise, four_bit
from model.atomic import atomic_write
from model.comfy_formats import (
    ALL_SCALE_SUFFIXES,
    BLOCK_SIZES,
    CODE_FORMATS,
    OTHER_TOOLS,
    SECOND_SCALE,
    UNSUPPORTED_SCALES,
    W4A8_SUFFIXES,
    Mark,
    find_problem,
    is_auxiliary,
    rotation,
    special_format,
)
from model.errors import K2Error, listed
from model.four_bit import Codes, read_codes
from model.gguf_file import GGUFTensors
from model.headers import FETCH_AGAIN, StoredTensor, own_metadata, read_json, shards, stored_tensors
from model.low_bit import SUFFIXES, Format, few_bit_layers, pack
from model.plan import free_memory
from model.quantize import Rows, restore, scale_name
from model.safetensors_file import USE_PLAIN_FILE, SafeTensors, StreamedMatrix

WIDE_DTYPES = ("F64", "F32", "F16", "BF16")
INTEGER_DTYPES = ("BOOL", "U8", "I16", "U16", "I32", "U32", "I64", "U64")  # as weights these pack another format


@dataclass(frozen=True)
class Checkpoint:
    """The contents of a file or a folder of shards, by its headers. No tensor is read yet."""

    path: Path
    tensors: dict[str, StoredTensor]
    metadata: dict[str, Any] = field(default_factory=dict)  # our own, `k2`; empty for other files
    config: dict[str, Any] = field(default_factory=dict)  # a folder's config.json
    stray_marks: tuple[Mark, ...] = ()  # marks for weights that the file lacks

    @property
    def files(self) -> list[Path]:
        return sorted({stored.path for stored in self.tensors.values()})

    def can_be_cached(self) -> bool:
        """Whether free memory can hold the files plus half as much for what is made of them; then the next read finds
        them cached."""
        return 1.5 * sum(path.stat().st_size for path in self.files) <= free_memory("cpu")

    def read(
        self,
        names: Iterable[str] | None = None,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        formats: Mapping[str, Format] | None = None,
    ) -> Iterator[tuple[str, Tensor]]:
        """Tensors one by one, in file order, few-bit ones dequantised; floats in `dtype` (None: as stored).

        Anything that `refuse_unreadable` lets pass is read correctly.

        formats: matrices wanted in few bits, and their formats; each is followed by what is needed to read it, named as
        in `low_bit.SUFFIXES`. They are rounded a few rows at a time while the next are read, or kept as stored if the
        file holds the very same format.
        """
        wanted, formats = set(self.tensors) if names is None else set(names), formats or {}
        order = [name for name in self.tensors if name in wanted and not is_auxiliary(name)]

        def fetch(index: int) -> tuple[Rows | Codes, Tensor | None]:
            name = order[index]
            stored, scale = self.tensors[name], scale_name(name, self.tensors)
            if scale is None and name in formats and stored.dtype in WIDE_DTYPES:
                return files.rows(stored, executor), None
            tensor = files.get(stored)
            factor = None if scale is None else files.get(self.tensors[scale])
            if factor is None:
                return tensor, None
            if kind := special_format(stored.marks, CODE_FORMATS):
                groups, levels = (
                    files.get(s) if (s := self.tensors.get(name + end)) else None for end in W4A8_SUFFIXES
                )
                return read_codes(kind, tensor, factor, groups, levels), factor
            if kind := special_format(stored.marks, BLOCK_SIZES):
                whole = self.tensors.get(name + SECOND_SCALE)
                return blockwise.unpack_blocks(kind, tensor, factor, None if whole is None else files.get(whole))
            return tensor, factor

        device = torch.device(device)
        if device.type == "cuda" and device.index is None:  # the current one, which is per thread
            device = torch.device("cuda", torch.cuda.current_device())
        read_device = "cpu" if device.type == "mps" else str(device)  # Metal has no 8-bit floats
        with (
            OpenFiles(read_device, not formats or self.can_be_cached()) as files,
            ThreadPoolExecutor(1, "weights") as executor,
        ):
            pending = executor.submit(fetch, 0) if order else None
            for index, name in enumerate(order):
                assert pending is not None
                tensor, factor = pending.result()
                pending = executor.submit(fetch, index + 1) if index + 1 < len(order) else None
                group = rotation(self.tensors[name].marks)
                if name in formats:
                    held = pack(tensor, factor, group, formats[name])
                    for end, part in zip(SUFFIXES[formats[name].bits], held, strict=True):
                        yield name + end, part.to(device)
                else:
                    tensor = tensor.numbers if isinstance(tensor, Codes) else tensor
                    assert isinstance(tensor, Tensor)
                    wide = dtype or (tensor.dtype if factor is None else torch.float32)
                    yield name, restore(tensor, factor, wide, group).to(device)


class OpenFiles(ExitStack):
    """Weights files, open for reading."""

    def __init__(self, device: str, cached: bool):
        super().__init__()
        self.device, self.cached, self._files = device, cached, dict[Path, Any]()

    def get(self, stored: StoredTensor) -> Tensor:
        """A tensor as stored; on a CPU a view of the mapping, which lives as long as the tensor does."""
        return self._file(stored.path).get_tensor(stored.name)

    def rows(self, stored: StoredTensor, executor: Executor) -> Rows:
        """A matrix as stored; on a CPU possibly still being read, by `executor`."""
        file = self._file(stored.path)
        streamable = self.device == "cpu" and isinstance(file, SafeTensors)
        return StreamedMatrix(file, stored.name, executor) if streamable else file.get_tensor(stored.name)

    def _file(self, path: Path) -> Any:
        if path not in self._files:
            self._files[path] = self.enter_context(open_tensors(path, self.device, self.cached))
        return self._files[path]


def read(
    path: Path | str, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = torch.float32
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors of a file or folder, dequantised, and the `k2` metadata ({} if there is none)."""
    checkpoint = open_checkpoint(path)
    return dict(checkpoint.read(device=device, dtype=dtype)), checkpoint.metadata


def open_checkpoint(path: Path | str) -> Checkpoint:
    """Read and check the headers of a .safetensors or .gguf file, or of a folder of shards. Raises K2Error."""
    path = Path(path)
    if path.is_dir():
        config = read_json(path / "config.json") if (path / "config.json").exists() else {}
        parts = [open_checkpoint(file) for file in shards(path)]
        times = Counter(name for part in parts for name in part.tensors if not is_auxiliary(name))
        if twice := [name for name, count in times.items() if count > 1]:
            hint = "It is unclear which one counts: fetch the folder again."
            raise K2Error(f"{path} holds {listed(twice, 3)} in more than one file.", hint=hint)
        tensors = {name: stored for part in parts for name, stored in part.tensors.items()}
        stray_marks = tuple(mark for part in parts for mark in part.stray_marks)
        return Checkpoint(path, tensors, parts[0].metadata, config, stray_marks=stray_marks)
    tensors, about, stray_marks = stored_tensors(path)
    return Checkpoint(path, tensors, own_metadata(about), stray_marks=stray_marks)


def open_tensors(path: Path, device: str, cached: bool) -> Any:
    """A context in which `get_tensor(name)` reads from the file."""
    with path.open("rb") as file:
        gguf = file.read(4) == b"GGUF"
    return GGUFTensors(path, device) if gguf else SafeTensors(path, device, cached)


def save(path: Path | str, state: Mapping[str, Tensor], metadata: Mapping[str, Any], **extra: str) -> None:
    """Write a checkpoint with its `k2` metadata, completely or not at all.

    extra: further header entries, for other tools.
    """
    tensors = {name: tensor.detach().cpu() for name, tensor in state.items()}
    header = {"format": "pt", **extra} | ({"k2": json.dumps(metadata, sort_keys=True)} if metadata else {})
    write(Path(path), tensors, header)


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a .safetensors file, completely or not at all: the same content gives the same bytes."""
    from safetensors.torch import save_file

    with atomic_write(path) as draft:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, draft, dict(metadata))
        sort_metadata(draft)


def sort_metadata(path: Path) -> None:
    """Sort a file's metadata in place: safetensors leaves its order to chance."""
    with path.open("rb+") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()  # as safetensors writes it
        assert len(text) <= size
        file.seek(8)
        file.write(text.ljust(size))


def load(
    model: nn.Module,
    checkpoint: Checkpoint,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    skip: Callable[[str], bool] = lambda name: False,
) -> None:
    """Load the tensors of a model built on the meta device; names and shapes are compared before any is read.

    Norm scales stay fp32, since norms compute in fp32. Tensors to skip are compared and stay on meta. Raises K2Error
    naming what does not fit.
    """
    check_tensors(model, checkpoint)
    state = tensor_reader(model, checkpoint, device=device, dtype=dtype)(
        name for name in expected_shapes(model) if not skip(name)
    )
    left = {name: tensor for name, tensor in model.state_dict().items() if name not in state}
    model.load_state_dict(state | left, strict=True, assign=True)
    model.requires_grad_(False).eval()


def check_tensors(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Compare names, shapes and storage formats. Raises K2Error naming what does not fit."""
    expected = expected_shapes(model)
    refuse_unreadable(checkpoint)
    stored = {name: s.shape for name, s in checkpoint.tensors.items() if not is_auxiliary(name)}
    misfits = [
        f"{name} is {list(stored[name])} instead of {list(shape)}"
        for name, shape in expected.items()
        if stored.get(name, shape) != shape
    ]
    found = {
        "missing": [name for name in expected if name not in stored],
        "unknown": [name for name in stored if name not in expected],
        "of another shape": misfits,
    }
    problems = [f"{len(names)} {what} ({listed(names, 3)})" for what, names in found.items() if names]
    if problems:
        hint = FETCH_AGAIN if found["missing"] else "Give only this network's own weights."
        raise K2Error(f"The tensors of {checkpoint.path} do not fit the network: {', '.join(problems)}.", hint=hint)


def expected_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The tensors that a checkpoint must hold for a network; missing few-bit scales are computed."""
    few = {name: (layer.out_features, layer.in_features) for name, layer in few_bit_layers(model).items()}
    whole = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if not is_auxiliary(name)}
    return whole | few


def tensor_reader(
    model: nn.Module, checkpoint: Checkpoint, *, device: torch.device | str, dtype: torch.dtype
) -> Callable[[Iterable[str]], dict[str, Tensor]]:
    """A function that reads some of a network's tensors as it needs them: norm scales in fp32, few bits by layer."""
    shapes, formats = expected_shapes(model), {name: layer.format for name, layer in few_bit_layers(model).items()}

    def wanted(name: str, tensor: Tensor) -> Tensor:
        if name in formats or name not in shapes:
            return tensor
        return (tensor.float() if name.endswith(".scale") else tensor.to(dtype)).view(shapes[name])

    def read(names: Iterable[str]) -> dict[str, Tensor]:
        return {name: wanted(name, tensor) for name, tensor in checkpoint.read(names, device=device, formats=formats)}

    return read


def refuse_unreadable(checkpoint: Checkpoint) -> None:
    """Refuse storage formats that would load without complaint but wrongly, or that hide the network's shape. Raises
    K2Error."""
    formats = {"marks without their weights" for mark in checkpoint.stray_marks if find_problem([mark], "", ())}
    marked = set[str]()
    for name, stored in checkpoint.tensors.items():
        scale = scale_name(name, checkpoint.tensors)
        factor = checkpoint.tensors[scale] if scale else None
        if problem := find_problem(stored.marks, stored.dtype, stored.shape):
            marked.add(problem)
        if kind := special_format(stored.marks, BLOCK_SIZES):
            formats.add(blockwise.find_problem(kind, stored, factor, checkpoint.tensors.get(name + SECOND_SCALE)))
            continue
        if kind := special_format(stored.marks, CODE_FORMATS):
            formats.add(
                four_bit.find_problem(
                    kind, stored, factor, *(checkpoint.tensors.get(name + end) for end in W4A8_SUFFIXES)
                )
            )
            continue
        if problem:  # the shapes and scales of such a format are unknown
            continue
        if factor and not is_per_row(factor.shape, stored.shape):
            formats.add(f"{stored.dtype} with scales of {list(factor.shape)}")
        if not factor and stored.dtype == "I8" and name.endswith(".weight"):
            formats.add("I8 without scales")
        if unexplained := next(
            (end for end in (SECOND_SCALE, *W4A8_SUFFIXES) if name + end in checkpoint.tensors), None
        ):
            formats.add(f'{stored.dtype} with an unexplained "weight{unexplained}" beside it')
        elif stored.dtype in INTEGER_DTYPES and name.endswith(".weight"):
            formats.add(f"{stored.dtype}, which packs another format")
        if UNSUPPORTED_SCALES.search(name):
            formats.add(f'8 bits with "{name.rpartition(".")[2]}" beside them')
        stem = next((name.removesuffix(suffix) for suffix in ALL_SCALE_SUFFIXES if name.endswith(suffix)), None)
        if stem is not None and f"{stem}.weight" not in checkpoint.tensors:
            formats.add("scales without their weights")
    formats.discard("")
    tools = [tool for tool, ends in OTHER_TOOLS.items() if any(re.search(ends, name) for name in checkpoint.tensors)]
    if tools or marked or formats:
        found = tools or [*stated_format(checkpoint), *sorted(marked), *sorted(formats)]
        raise K2Error(
            f"{checkpoint.path} holds weights stored as {listed(found, 3)}, which k2 does not read.",
            hint=USE_PLAIN_FILE,
        )


def is_per_row(scales: tuple[int, ...], weight: tuple[int, ...]) -> bool:
    """Whether there is one scale, or one per row: [out], [out, 1]. As many in a grid belong to blocks, and [1, out]
    would be broadcast over columns."""
    return prod(scales) == 1 or (scales[:1] == weight[:1] and prod(scales[1:]) == 1)


def stated_format(checkpoint: Checkpoint) -> list[str]:
    """The quantisation tool that a folder's config names, if any."""
    settings = checkpoint.config.get("quantization_config")
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    return [method] if isinstance(method, str) else []
