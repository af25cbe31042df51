"""Prepares the next batch while the last one is trained on."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

Batches = list[dict[str, Any]]  # of a step's parts


class Prefetcher:
    """A run's batches. On a GPU the next ones are made in a thread and a stream of their own while it works on the
    last: a batch depends on the step alone, so it does not matter when it is made."""

    def __init__(self, make: Callable[[int], Batches], device: torch.device):
        self.make, self.device, self.on_gpu = make, device, device.type == "cuda"
        self.pending: dict[int, Future[Batches]] = {}
        if self.on_gpu:
            self.thread, self.stream = ThreadPoolExecutor(1), torch.cuda.Stream(device)

    def make_on_stream(self, step: int) -> Batches:
        with torch.cuda.stream(self.stream):
            made = self.make(step)
        self.stream.synchronize()
        return made

    def __call__(self, step: int) -> Batches:
        if not self.on_gpu:
            return self.make(step)
        for each in (step, step + 1, step + 2):
            if each not in self.pending:
                self.pending[each] = self.thread.submit(self.make_on_stream, each)
        batches = self.pending.pop(step).result()
        for tensor in (value for batch in batches for value in batch.values() if isinstance(value, Tensor)):
            if tensor.is_cuda:
                tensor.record_stream(torch.cuda.current_stream(self.device))
        return batches

    def stop(self) -> None:
        if self.on_gpu:
            self.thread.shutdown(cancel_futures=True)
