"""Checkpoints on disk: safetensors or GGUF, checked before they are read, loaded strictly; written whole or not at all.

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
from model.gguf_file import GGUFTensors
from model.headers import AGAIN, read_header, read_json, shards, some
from model.quantize import is_auxiliary, marks_of, restore, scale_of, unreadable


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies: in which file, under which name, in what shape and number format (the file's own word)."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Checkpoint:
    """What a file, or a folder of shards, says it holds. No tensor is read yet."""

    path: Path
    tensors: dict[str, Stored]
    metadata: dict[str, Any] = field(default_factory=dict)  # ours, `k2`; empty in others' files
    config: dict[str, Any] = field(default_factory=dict)  # a folder's config.json
    layout: str = ""  # whose names the file uses, once `model/layouts.py` has recognised it
    unused: tuple[str, ...] = ()  # tensors that lie in the file and are known to be no part of the network

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
            opened = {path: stack.enter_context(open_tensors(path, str(device))) for path in self.files}

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
    """Read and check the headers of a .safetensors or .gguf file, or of a folder of shards. Raises K2Error."""
    path = Path(path)
    if path.is_dir():
        config = read_json(path / "config.json") if (path / "config.json").exists() else {}
        parts = [open_checkpoint(file) for file in shards(path)]
        tensors = {name: stored for part in parts for name, stored in part.tensors.items()}
        return Checkpoint(path, tensors, parts[0].metadata, config)
    header = read_header(path)
    metadata = json.loads(header.pop("__metadata__", {}).get("k2", "{}"))
    tensors = {name: Stored(path, name, tuple(entry["shape"]), entry["dtype"]) for name, entry in header.items()}
    return Checkpoint(path, tensors, metadata)


def open_tensors(path: Path, device: str) -> Any:
    """A context in which `get_tensor(name)` reads from the file."""
    with path.open("rb") as file:
        gguf = file.read(4) == b"GGUF"
    return GGUFTensors(path, device) if gguf else safe_open(path, "pt", device=device)


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
    problems = [f"{len(names)} {what} ({some(names)})" for what, names in found.items() if names]
    if problems:
        raise K2Error(f"The tensors of {checkpoint.path} do not fit the network: {', '.join(problems)}.", hint=AGAIN)
    state = {
        name: (tensor.float() if name.endswith(".scale") else tensor.to(dtype)).view(expected[name])
        for name, tensor in checkpoint.read(device=device)
    }
    model.load_state_dict(state, strict=True, assign=True)
    model.requires_grad_(False).eval()


def refuse_unreadable(checkpoint: Checkpoint) -> None:
    """Some tools store weights in ways that would load without complaint and mean something else. Raises K2Error."""
    formats: set[str] = set()
    for path in checkpoint.files:
        table = read_header(path).get("__metadata__", {}).get("_quantization_metadata")
        formats |= {unreadable(how) for how in marks_of(table)} if table else set()
        with open_tensors(path, "cpu") as file:
            for name, stored in checkpoint.tensors.items():
                if stored.path == path and name.endswith(".comfy_quant"):
                    formats.add(unreadable(bytes(file.get_tensor(stored.name).flatten().tolist())))
    for name, stored in checkpoint.tensors.items():
        scale = scale_of(name, checkpoint.tensors)
        if scale and prod(checkpoint.tensors[scale].shape) not in (1, *stored.shape[:1]):
            formats.add(f"{stored.dtype} with scales of {list(checkpoint.tensors[scale].shape)}")
    formats.discard("")
    if formats:
        raise K2Error(
            f"{checkpoint.path} holds weights stored as {some(sorted(formats))}, which k2 does not read.",
            hint="Take the bf16 or the fp8_scaled file of the same model.",
        )
