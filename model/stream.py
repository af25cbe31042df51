"""Weights streamed block by block: read while the block before runs, and dropped once their own block has run.

So a network needs memory for two blocks and for what lies outside them. The weights are the same as if it held them
all, so its results are bit for bit the same, if neither is compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

PAGE = 4096  # bytes; larger pages are just touched more than once

ReadTensors = Callable[[Iterable[str]], dict[str, Tensor]]  # a network's tensors by name, on the CPU
Arrival = tuple[dict[str, Tensor], Any]  # a block's tensors, and the event of their arrival on a card (CUDA)


def stream(network: nn.Module, stem: str, read: ReadTensors, device: torch.device, *, keep: bool = False) -> None:
    """Have the blocks in a network's list `stem` read when they are needed.

    network  its blocks are on the meta device, and return there; adapters can be applied all the same
    read     opens the file each time, so that none of its pages stay mapped
    keep     cache in host memory what was read and unpacked; not where that is the device's own memory, as on a CPU and
             on Apple's chips, since that would defeat streaming
    """
    blocks = network.get_submodule(stem)
    names: list[dict[str, str]] = [{} for _ in blocks.children()]
    for name in network.state_dict():
        if name.startswith(f"{stem}."):
            _, index, own = name.removeprefix(stem).split(".", 2)
            names[int(index)][name] = own

    def read_block(index: int) -> dict[str, Tensor]:
        return {names[index][name]: tensor for name, tensor in read(names[index]).items()}

    streamed = BlockStream(list(blocks.children()), read_block, device, keep and device.type == "cuda")
    loaders = {f"{stem}.{index}.": partial(streamed.loaded, index) for index in range(len(names))}
    network.__dict__["block_loaders"] = loaders  # not part of its state


def block_loaded(network: nn.Module, name: str) -> AbstractContextManager[None]:
    """A context in which the block that contains the named layer has its weights, even if the network is streamed."""
    streamed: dict[str, Callable[[], AbstractContextManager[None]]] = network.__dict__.get("block_loaders", {})
    return next((fill for block, fill in streamed.items() if name.startswith(block)), nullcontext)()


def pin(tensor: Tensor) -> Tensor:
    """The tensor in pinned memory, which a card can copy from by itself; unpinned, with slower copies, if no more is
    available: Windows allows half of all memory."""
    try:
        return tensor.pin_memory()
    except RuntimeError:
        return tensor


def cached_bytes(tensor: Tensor, device: torch.device) -> int:
    """The bytes that a cached tensor takes: for a card it is pinned, and PyTorch rounds that up to a power of two."""
    return 1 << (tensor.nbytes - 1).bit_length() if device.type == "cuda" else tensor.nbytes


class BlockStream:
    """Fills blocks and empties them, by hooks before and after each."""

    def __init__(
        self, blocks: list[nn.Module], read: Callable[[int], dict[str, Tensor]], device: torch.device, keep: bool
    ):
        self.blocks, self.read, self.device, self.keep = blocks, read, device, keep
        self.cached: dict[int, dict[str, Tensor]] = {}
        self.empty = [block.state_dict() for block in blocks]
        self.executor = ThreadPoolExecutor(1, "weights")
        self.arriving: tuple[int, Future[Arrival]] | None = None
        self.copy_stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.done_event: Any = None  # the event after which the block before has run (CUDA)
        for index, block in enumerate(blocks):
            block.register_forward_pre_hook(partial(self._fill, index))
            block.register_forward_hook(partial(self._unload, index), always_call=True)  # even after an error

    def _fill(self, index: int, block: nn.Module, inputs: Any) -> None:
        coming, self.arriving = self.arriving, None  # taken, so that a failed read is started again
        self._load(block, *(coming[1].result() if coming and coming[0] == index else self._fetch(index)))
        after = (index + 1) % len(self.blocks)  # the last block is followed by the next step's first
        self.arriving = after, self.executor.submit(self._fetch, after)

    @contextmanager
    def loaded(self, index: int) -> Iterator[None]:
        """A context in which a block has its weights out of turn."""
        self._load(self.blocks[index], *self.executor.submit(self._fetch, index).result())
        try:
            yield
        finally:
            self._unload(index, self.blocks[index], None, None)

    def _load(self, block: nn.Module, state: dict[str, Tensor], arrived: Any) -> None:
        if arrived is not None:
            compute_stream = torch.cuda.current_stream(self.device)
            compute_stream.wait_event(arrived)
            for tensor in state.values():
                tensor.record_stream(compute_stream)
        else:  # in this thread: two using Metal at once would crash the process
            state = {name: tensor.to(self.device) for name, tensor in state.items()}
        block.load_state_dict(state, strict=True, assign=True)

    def _unload(self, index: int, block: nn.Module, inputs: Any, output: Any) -> None:
        block.load_state_dict(self.empty[index], strict=True, assign=True)
        if self.copy_stream is not None:
            self.done_event = torch.cuda.current_stream(self.device).record_event()

    def _fetch(self, index: int) -> Arrival:
        """A block's tensors, being copied to a card; otherwise still in host memory."""
        if self.done_event is not None:
            self.done_event.synchronize()  # or copies would run ahead of the computation and fill the card
        state = self.cached.get(index) or self.read(index)
        if self.copy_stream is not None:
            state = {name: tensor if tensor.is_pinned() else pin(tensor) for name, tensor in state.items()}
        if self.keep:
            self.cached[index] = state
        if self.copy_stream is not None:
            with torch.cuda.stream(self.copy_stream):
                there = {name: tensor.to(self.device, non_blocking=True) for name, tensor in state.items()}
                return there, self.copy_stream.record_event()
        for tensor in state.values():  # brings in the pages of a mapped file
            tensor.flatten().view(torch.uint8)[::PAGE].sum()
        return state, None
