"""Make a network faster on its device, with the same results up to rounding.

On a CUDA card a wide network spends its time in kernels: its blocks are compiled, so that norms, modulation, rotation
and gates become a few passes over memory. A narrow one spends it launching kernels: they are recorded once per shape
and replayed. Anything that changes the network from outside (adapters, custom attention) takes the plain path. On a
CPU large pictures spend their time on fresh memory pages, so freed ones are kept.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext, suppress
from typing import Any

import torch
from torch import Tensor

from model.dit import Krea2
from model.hashes import cache_folder
from model.low_bit import few_bit_layers, is_native
from model.lru import LRU
from model.plan import FP32_WIDTH
from model.quantize import hadamard

MAX_GRAPHS = 8  # shapes kept; each holds working memory
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h
MATRIX_SIDE = 512  # side of the matrices that measure a CPU's speed
WARM_UP_RUNS = 3  # runs before recording, in which libraries choose their kernels

TensorFunction = Callable[..., Tensor]


def accelerate(dit: Krea2) -> None:
    """Make `dit.velocity` fast, permanently. The network must be on a CUDA card, with its weights loaded."""
    if wide := dit.config.width >= FP32_WIDTH:
        # Compiled kernels outlive the process: the next one finds them in a second.
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "inductor"))
        torch.compiler.assume_constant_result(is_native)  # a device query would break every block's graph
        torch.compiler.assume_constant_result(hadamard)  # or every call would rebuild it
    compiled = wide and triton_supports(layer.format.dtype for layer in few_bit_layers(dit).values()) and can_compile()
    if compiled:
        for block in dit.blocks:
            block.compile()  # one by one: they share code, so one compilation serves all
    dit.velocity = FastVelocity(dit, compiled)  # type: ignore[assignment, method-assign]


def measure_speed(dtype: torch.dtype) -> float:
    """Billions of multiplications and additions per second that the CPU does in a product of two square matrices; the
    best of a few runs."""
    a, b = torch.ones(2, MATRIX_SIDE, MATRIX_SIDE, dtype=dtype)
    best, end = float("inf"), time.perf_counter() + 0.3
    while time.perf_counter() < end:
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return 2 * MATRIX_SIDE**3 / best / 1e9


def keep_freed_memory() -> None:
    """Have this process keep the memory that large tensors free, to reuse it, permanently.

    glibc returns every block of more than 32 MB at once, and the system hands out pages one by one, zeroed: for a
    picture of 1024 px that takes longer than most of the computation. Without glibc this does nothing.
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another C library
            libc = ctypes.CDLL(None)
            libc.mallopt(M_MMAP_MAX, 0)
            libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def triton_supports(dtypes: Iterable[torch.dtype]) -> bool:
    """Whether Triton supports these number formats on the card: e4m3 from Ada on, and on few AMD cards; plain kernels
    can widen it anywhere.

    `can_compile` would not find out: Triton only fails when it meets such a matrix, in the middle of the first picture.
    """
    if torch.float8_e4m3fn not in dtypes:
        return True
    return torch.version.hip is None and torch.cuda.get_device_capability() >= (8, 9)


def can_compile(device: torch.device | str = "cuda") -> bool:
    """Whether kernels can be compiled for a device: a card needs Triton and a C compiler, a CPU a C++ compiler."""
    try:
        torch.compile(torch.sin)(torch.ones(1, device=device))
    except Exception:  # whatever is missing
        return False
    return True


class FastVelocity:
    """Replaces `Krea2.velocity`."""

    def __init__(self, dit: Krea2, compiled: bool):
        self.eager: TensorFunction = dit.velocity
        self.compiled, self.narrow = compiled, dit.config.width < FP32_WIDTH
        self.layers = list(dit.modules())
        self.graphs: LRU[Graph] = LRU(MAX_GRAPHS)

    def __call__(self, *inputs: Tensor, **others: Any) -> Tensor:
        """The velocity, with `Krea2.velocity`'s arguments: tokens, context, step_mod, rope, and rarely others."""
        seldom = any(value is not None for value in others.values()) or len(inputs) > 4
        if seldom or any(layer._forward_hooks for layer in self.layers):  # a recording would ignore them
            with torch.compiler.set_stance("force_eager") if self.compiled else nullcontext():
                return self.eager(*inputs, **others)
        if not self.narrow:
            return self.eager(*inputs, **others)
        shapes = tuple(each.shape for each in inputs)
        return self.graphs.get(shapes, lambda: Graph(self.eager, inputs))(*inputs)


class Graph:
    """All kernels of one call, recorded on its own input buffers; a replay costs one launch."""

    @torch.inference_mode()
    def __init__(self, function: TensorFunction, inputs: tuple[Tensor, ...]):
        self.inputs = [each.clone() for each in inputs]
        here, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(here)
        with torch.cuda.stream(side):
            for _ in range(WARM_UP_RUNS):
                function(*self.inputs)
        here.wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        # other threads may continue meanwhile: one reads the next layer of a streamed text encoder
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.output = function(*self.inputs)

    @torch.inference_mode()
    def __call__(self, *inputs: Tensor) -> Tensor:
        for buffer, given in zip(self.inputs, inputs, strict=True):
            buffer.copy_(given)
        self.graph.replay()
        return self.output.clone()
