"""Training on several processes: how work is shared, FSDP2 shards, checkpoints that any number of processes can read.

`torchrun --nproc-per-node N --no-python k2 train RECIPE`. A step has `accumulate` parts, each a pure function of the
recipe, the step and the part; process r of N takes parts r, r + N, … So the recipe's batch, down to its noise, is the
same for every N that divides `accumulate`. If a stage names its entry points (`Stage.entry`), parameters, gradients,
averages and optimiser states are sharded; otherwise each process holds all of them, and gradients are averaged.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor

from model.atomic import atomic_write as whole_file
from model.errors import K2Error

STATE_INFO = "place.json"  # written last: a saved state without it is incomplete


@dataclass(frozen=True)
class World:
    """The processes that train together, as one of them sees them."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes and reports."""
        return self.rank == 0

    def parts(self, count: int) -> range:
        """This process's parts of a step. Raises K2Error if they cannot be divided evenly."""
        if count % self.size:
            raise K2Error(
                f"{count} parts of a step cannot be divided evenly among {self.size} processes.",
                hint=f"Set the recipe's accumulate to a multiple of {self.size}.",
            )
        return range(self.rank, count, self.size)

    def gather(self, items: list[Any]) -> list[Any]:
        """The items of all processes, each one's first, then each one's second, in the order of a single process."""
        if self.size == 1:
            return items
        gathered: list[list[Any]] = [[]] * self.size
        dist.all_gather_object(gathered, items)
        return [item for row in zip(*gathered, strict=True) for item in row]

    def broadcast(self, value: float) -> float:
        """The leader's value: clocks differ, and a process that stops alone leaves the others waiting."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values)
        return values[0]

    def wait(self) -> None:
        if self.size > 1:
            dist.barrier()


def world() -> World:
    return World(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else World()


def exit_group() -> None:
    """End this process, its work done, if it is one of several; else do nothing.

    Interpreter shutdown is skipped: a gloo thread that wants the interpreter then is stopped in the middle of C++,
    which sometimes aborts the process.
    """
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def join_group(device: str) -> str:
    """Join the other processes that torchrun started, if any -> this process's own device of the kind."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        return device
    kind = torch.device(device).type
    if kind == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    return device


# ---- sharding ---------------------------------------------------------------------------------------------------


def shard(model: nn.Module, units: Iterable[nn.Module], methods: Sequence[str], device: torch.device) -> None:
    """Give every process its share of each parameter. A unit's are gathered when it is called, the others by `methods`.

    units    modules that are gathered one by one as they run
    methods  of the model, through which a stage calls it
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy()
    if device.type == "cuda":  # fp32 master weights are sent as the bf16 that autocast would make of them
        policy = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for unit in units:
        fully_shard(unit, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    for method in methods:
        register_fsdp_forward_method(model, method)


def local(tensor: Tensor) -> Tensor:
    """This process's share, as a view; the complete tensor if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """The complete tensor; every process must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether all numbers are finite, in every process's share; every process must call this."""
    return all(world().gather([all(bool(local(tensor).isfinite().all()) for tensor in tensors)]))


def collect(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The complete tensors, gathered one by one into the leader's main memory; the others keep none."""
    leads, found = world().is_main, {}
    for name, tensor in tensors.items():
        full = full_tensor(tensor)
        if leads:
            found[name] = full.cpu() if isinstance(tensor, DTensor) else full
    return found


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A complete tensor, sharded like another."""
    if isinstance(tensor, DTensor) or not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def average_gradients(params: Sequence[Tensor]) -> None:
    """Average the gradients of parameters that every process holds completely; unused ones stay without a gradient."""
    used = torch.tensor([param.grad is not None for param in params], dtype=torch.int32, device=params[0].device)
    dist.all_reduce(used, dist.ReduceOp.MAX)
    chosen = [param for param, mark in zip(params, used.tolist(), strict=True) if mark]
    flat = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in chosen])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for param, part in zip(chosen, flat.split([param.numel() for param in chosen]), strict=True):
        param.grad = part.view_as(param).clone()


def distribute_work(shards: Sequence[Tensor], rows: int, work: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Work that needs complete matrices of one shape, each done by one process.

    shards   this process's rows of each matrix, [r, n]; rows are split as by `torch.chunk`
    rows     of a complete matrix
    work     [1, rows, n] -> the same shape
    returns  this process's rows of every result
    """
    here, columns = world(), shards[0].shape[1]
    rows_each = -(-rows // here.size)
    shares = [max(0, min(rows_each, rows - rows_each * rank)) * columns for rank in range(here.size)]
    results: list[Tensor] = []
    for start in range(0, len(shards), here.size):
        group = shards[start : start + here.size]
        has_matrix = here.rank < len(group)
        out = [shares[here.rank]] * len(group) + [0] * (here.size - len(group))
        back = shares if has_matrix else [0] * here.size
        matrix = shards[0].new_empty(sum(back))
        dist.all_to_all_single(matrix, torch.cat([each.flatten() for each in group]), back, out)
        done = work(matrix.view(1, rows, columns)).flatten() if has_matrix else matrix
        own = done.new_empty(sum(out))
        dist.all_to_all_single(own, done.contiguous(), out, back)
        results += [each.view(-1, columns) for each in own.split(out[: len(group)])]
    return results


# ---- checkpoints ------------------------------------------------------------------------------------------------


def save(folder: Path, tensors: dict[str, Tensor], progress: dict[str, Any], record: dict[str, Any]) -> None:
    """Each process writes its shares into `folder/state-STEP`; older states are removed once this one is complete."""
    import torch.distributed.checkpoint as dcp

    here, target = world(), folder / f"state-{progress['step']:08d}"
    if here.is_main and target.exists():
        shutil.rmtree(target)
    here.wait()
    dcp.save(dict(tensors), checkpoint_id=target)
    if here.is_main:
        with whole_file(target / STATE_INFO) as draft:
            draft.write_text(json.dumps({"place": progress, "record": record}))
        for old in sharded_states(folder):
            if old != target:
                shutil.rmtree(old)
    here.wait()


def sharded_states(folder: Path) -> list[Path]:
    """The sharded states of a run's folder, oldest first, without incomplete ones."""
    return sorted(path for path in folder.glob("state-*") if (path / STATE_INFO).is_file())


def read_progress(state: Path) -> dict[str, Any]:
    return json.loads((state / STATE_INFO).read_text())["place"]


def load(state: Path, allocate: Callable[[str, torch.Size, torch.dtype], Tensor]) -> dict[str, Tensor]:
    """A sharded state, whatever number of processes wrote it and reads it.

    allocate: a tensor's name, complete shape and dtype -> memory to read it into, sharded or not
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader = dcp.FileSystemReader(state)
    tensors = {
        name: allocate(name, about.size, about.properties.dtype)
        for name, about in reader.read_metadata().state_dict_metadata.items()
        if isinstance(about, TensorStorageMetadata)
    }
    dcp.load(tensors, storage_reader=reader)
    return tensors
