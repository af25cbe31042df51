"""Checkpoints on disk: safetensors only, checked before they are read, loaded strictly, written whole or not at all.

Our own files say in their metadata, under `k2`, what they are: kind, variant, config, recommended settings. What
others' files hold is told by names and shapes (`model/layouts.py`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from model.errors import K2Error
from model.quantize import is_auxiliary, restore, scale_of


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies: in which file, under which name, in what shape."""

    path: Path
    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Checkpoint:
    """What a file, or a folder of shards, says it holds. No tensor is read yet."""

    path: Path
    tensors: dict[str, Stored]
    metadata: dict[str, Any] = field(default_factory=dict)  # ours, `k2`; empty in others' files
    config: dict[str, Any] = field(default_factory=dict)  # a folder's config.json

    @property
    def files(self) -> list[Path]:
        return sorted({stored.path for stored in self.tensors.values()})

    def read(
        self,
        names: Iterable[str] | None = None,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> Iterator[tuple[str, Tensor]]:
        """Tensors one by one, in file order, 8-bit ones dequantised; floats in `dtype` (none: as stored)."""
        wanted = set(self.tensors) if names is None else set(names)
        with ExitStack() as stack:
            opened = {path: stack.enter_context(safe_open(path, "pt", device=str(device))) for path in self.files}

            def fetch(name: str) -> Tensor:
                stored = self.tensors[name]
                return opened[stored.path].get_tensor(stored.name)

            for name in self.tensors:
                if name in wanted and not is_auxiliary(name):
                    scale = scale_of(name, self.tensors)
                    tensor = fetch(name)
                    target = dtype or (tensor.dtype if scale is None else torch.float32)
                    yield name, restore(tensor, None if scale is None else fetch(scale), target)


def read(
    path: Path | str, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = torch.float32
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors of a file or folder, dequantised, and the `k2` metadata ({} where there is none)."""
    checkpoint = open_checkpoint(path)
    return dict(checkpoint.read(device=device, dtype=dtype)), checkpoint.metadata


def open_checkpoint(path: Path | str) -> Checkpoint:
    """Read and check the headers of a .safetensors file, or of a folder of them. Raises K2Error."""
    path = Path(path)
    if path.is_dir():
        config = read_json(path / "config.json") if (path / "config.json").exists() else {}
        parts = [open_checkpoint(file) for file in shards(path)]
        tensors = {name: stored for part in parts for name, stored in part.tensors.items()}
        return Checkpoint(path, tensors, parts[0].metadata, config)
    header = read_header(path)
    metadata = json.loads(header.pop("__metadata__", {}).get("k2", "{}"))
    tensors = {name: Stored(path, name, tuple(entry["shape"])) for name, entry in header.items()}
    return Checkpoint(path, tensors, metadata)


def shards(folder: Path) -> list[Path]:
    """The weight files of a folder: those its index names, else the only ones there are."""
    index = next(iter(sorted(folder.glob("*.safetensors.index.json"))), None)
    if index is not None:
        names = set(read_json(index).get("weight_map", {}).values())
        if not names or any(Path(name).name != name for name in names):
            raise K2Error(f"{index} names no files of its own folder.", hint=AGAIN)
        missing = sorted(name for name in names if not (folder / name).is_file())
        if missing:
            raise K2Error(f"{folder} lacks {some(missing)} of the {len(names)} files its index names.", hint=AGAIN)
        return [folder / name for name in sorted(names)]
    files = sorted(folder.glob("*.safetensors"))
    if len(files) != 1:
        found = "no .safetensors file" if not files else f"{len(files)} .safetensors files and no index"
        raise K2Error(f"{folder} holds {found}.", hint="Name the file itself.")
    return files


AGAIN = "The download may have been cut short: fetch it again."
MAGIC = {  # what is given in safetensors' place, by its first bytes
    b"PK\x03\x04": "a PyTorch pickle",
    b"\x80\x02": "a pickle",
    b"\x80\x03": "a pickle",
    b"\x80\x04": "a pickle",
    b"\x80\x05": "a pickle",
    b"GGUF": "a GGUF file",
    b"version https://git-lfs": "a Git LFS pointer, not the file itself",
    b"<!DOCTYPE": "a web page",
    b"<html": "a web page",
}
BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4}
BITS |= {"I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64}
MAX_HEADER = 100_000_000  # the format's own limit


def read_header(path: Path) -> dict[str, Any]:
    """A safetensors header: {tensor name: {dtype, shape, data_offsets}, …}, every claim of it checked against the file.

    Raises K2Error for a missing, truncated or foreign file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(32)
            length = int.from_bytes(start[:8], "little")
            file.seek(8)
            raw = file.read(length) if size >= 8 and length <= min(size - 8, MAX_HEADER) else b""
    except FileNotFoundError:
        raise K2Error(f"There is no file {path}.", hint="`k2 models list` shows the models there are.") from None
    except OSError as error:
        raise K2Error(f"{path} cannot be read: {error.strerror}.") from None

    for magic, what in MAGIC.items():
        if start.startswith(magic):
            raise K2Error(f"{path} is {what}.", hint="k2 reads weights from .safetensors files only.")
    if not raw.startswith(b"{"):
        looks_right = start[8:9] == b"{" and length <= MAX_HEADER
        problem = "is cut off in its header" if looks_right else "is not a safetensors file"
        raise K2Error(f"{path} {problem}.", hint=AGAIN)
    try:
        header = json.loads(raw)
        check_header(header, size - 8 - length)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise K2Error(f"{path} is damaged: {error}.", hint=AGAIN) from None
    return header


def check_header(header: dict[str, Any], data: int) -> None:
    """Tensors must tile the `data` bytes after the header, each as long as its shape says. Raises ValueError."""
    spans = []
    if not isinstance(json.loads(header.get("__metadata__", {}).get("k2", "{}")), dict):
        raise ValueError("its k2 metadata is no table")
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        if not all(type(number) is int and number >= 0 for number in (begin, end, *entry["shape"])):
            raise ValueError(f"{name} has a shape of {entry['shape']}")
        if entry["dtype"] not in BITS or prod(entry["shape"]) * BITS[entry["dtype"]] != 8 * (end - begin):
            raise ValueError(f"{name} is {entry['dtype']} {entry['shape']} in {end - begin} bytes")
        spans.append((begin, end))
    position = 0
    for begin, end in sorted(spans):
        if begin != position:
            raise ValueError(f"a tensor begins at byte {begin}, the one before ends at {position}")
        position = end
    if position != data:
        raise ValueError(f"it should hold {position:,} bytes of tensors and holds {data:,}")


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise K2Error(f"{path} cannot be read: {error}.", hint=AGAIN) from None
    if not isinstance(value, dict):
        raise K2Error(f"{path} is not a table.", hint=AGAIN)
    return value


def save(path: Path | str, state: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write a checkpoint with its `k2` metadata: into a draft beside it, flushed to disk, then put in place."""
    from safetensors.torch import save_file

    path = Path(path)
    draft = path.with_name(f".{path.name}.{os.getpid()}.draft")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    header = {"format": "pt"} | ({"k2": json.dumps(metadata, sort_keys=True)} if metadata else {})
    try:
        save_file(tensors, draft, header)
        with draft.open("rb+") as file:
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def load(model: nn.Module, checkpoint: Checkpoint, *, device: torch.device | str, dtype: torch.dtype) -> None:
    """Give a model built on the meta device its tensors; names and shapes are compared before any is read.

    Norm scales stay fp32, as the norms compute in it. Raises K2Error that names what does not fit.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
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
    problems = [f"{len(names)} {what} ({some(names)})" for what, names in found.items() if names]
    if problems:
        raise K2Error(f"The tensors of {checkpoint.path} do not fit the network: {', '.join(problems)}.", hint=AGAIN)
    state = {
        name: (tensor.float() if name.endswith(".scale") else tensor.to(dtype)).view(expected[name])
        for name, tensor in checkpoint.read(device=device)
    }
    model.load_state_dict(state, strict=True, assign=True)
    model.requires_grad_(False).eval()


def some(names: list[str], most: int = 3) -> str:
    """The first few of a list, and how many more there are."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")
