"""What makes a network faster on its device, with the same answers up to rounding.

On a CUDA card a wide network's time goes into kernels: its blocks are compiled, so that norms, modulation, rotation
and gates become few passes over memory. A narrow one's goes into launching them: they are recorded once for each shape
and replayed. Whatever changes the network from outside (adapters, attention of one's own) takes the plain path. On a
processor large pictures spend their time on fresh pages of memory, so old ones are kept.
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
from model.few_bits import few_bit_layers, native
from model.hashes import cache_folder
from model.plan import NARROW
from model.quantize import hadamard
from model.recent import Recent

MOST_GRAPHS = 8  # shapes kept; each holds its own working memory
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h
MEASURED = 512  # side of the matrices that tell a processor's speed
WARM_UP = 3  # runs before a recording, in which libraries choose their kernels

Work = Callable[..., Tensor]


def accelerate(dit: Krea2) -> None:
    """Make `dit.velocity` fast, for good. The network is on a CUDA card, with its weights in place."""
    if wide := dit.config.width >= NARROW:
        # Compiled kernels outlive the process: the next one finds them in a second.
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "inductor"))
        torch.compiler.assume_constant_result(native)  # a question to the device would cut every block in pieces
        torch.compiler.assume_constant_result(hadamard)  # or it would be made anew by every call
    compiled = wide and compilers_know(layer.format.number for layer in few_bit_layers(dit).values()) and can_compile()
    if compiled:
        for block in dit.blocks:
            block.compile()  # one after the other: they share code, so one compilation serves all
    dit.velocity = FastVelocity(dit, compiled)  # type: ignore[assignment, method-assign]


def speed(dtype: torch.dtype) -> float:
    """Billions of multiplications and additions a second that the processor does in a product of two square matrices;
    the best of a few."""
    a, b = torch.ones(2, MEASURED, MEASURED, dtype=dtype)
    best, end = float("inf"), time.perf_counter() + 0.3
    while time.perf_counter() < end:
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return 2 * MEASURED**3 / best / 1e9


def keep_pages() -> None:
    """Let this process keep the memory that a large tensor frees, for the next one of its kind; for good.

    glibc gives every block of more than 32 MB back at once, and the system hands out pages one by one, zeroed: for a
    picture of 1024 px that takes longer than most of what is computed in them. Elsewhere nothing happens.
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another C library
            libc = ctypes.CDLL(None)
            libc.mallopt(M_MMAP_MAX, 0)
            libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def compilers_know(numbers: Iterable[torch.dtype]) -> bool:
    """Whether Triton can read these number formats on the card: e4m3 from Ada on, and on few of AMD's; plain kernels
    widen it anywhere.

    `can_compile` would not find out: Triton says so when such a matrix is met, in the middle of the first picture.
    """
    if torch.float8_e4m3fn not in numbers:
        return True
    return torch.version.hip is None and torch.cuda.get_device_capability() >= (8, 9)


def can_compile(device: torch.device | str = "cuda") -> bool:
    """Whether a kernel can be compiled for a device: a card takes Triton and a C compiler, a processor one of C++."""
    try:
        torch.compile(torch.sin)(torch.ones(1, device=device))
    except Exception:  # whatever is missing
        return False
    return True


class FastVelocity:
    """Takes the place of `Krea2.velocity`."""

    def __init__(self, dit: Krea2, compiled: bool):
        self.plain: Work = dit.velocity
        self.compiled, self.narrow = compiled, dit.config.width < NARROW
        self.layers = list(dit.modules())
        self.graphs: Recent[Graph] = Recent(MOST_GRAPHS)

    def __call__(self, *inputs: Tensor, **others: Any) -> Tensor:
        """The velocity, of what `Krea2.velocity` takes: tokens, context, step_mod, rope; and what is seldom there."""
        seldom = any(value is not None for value in others.values()) or len(inputs) > 4
        if seldom or any(layer._forward_hooks for layer in self.layers):  # a recording would not notice either
            with torch.compiler.set_stance("force_eager") if self.compiled else nullcontext():
                return self.plain(*inputs, **others)
        if not self.narrow:
            return self.plain(*inputs, **others)
        shapes = tuple(each.shape for each in inputs)
        return self.graphs.ask(shapes, lambda: Graph(self.plain, inputs))(*inputs)


class Graph:
    """All kernels of one call, recorded on inputs of its own; a replay costs one launch."""

    @torch.inference_mode()
    def __init__(self, work: Work, inputs: tuple[Tensor, ...]):
        self.inputs = [each.clone() for each in inputs]
        here, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(here)
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                work(*self.inputs)
        here.wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        # other threads may go on meanwhile: one reads the text encoder's next layer, where that is streamed
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.answer = work(*self.inputs)

    @torch.inference_mode()
    def __call__(self, *inputs: Tensor) -> Tensor:
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        self.graph.replay()
        return self.answer.clone()
