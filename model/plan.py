"""How a model is held in memory: number format, bits, and what stays on disk until it is needed.

Counting needs only headers, choosing not even those: torch is imported only to query devices.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from model.errors import K2Error, TooLittleMemory

if TYPE_CHECKING:
    import torch

PRECISIONS = ("native", "int8", "fp8", "int4")  # of the blocks' matrices; native is the compute format
OFFLOADS = ("none", "text", "all")  # what is read block by block as needed: the text encoder, all but the ends
BYTES = {"float32": 4, "bfloat16": 2}
PACKED_BYTES = {"int8": 1, "fp8": 1, "int4": 9 / 16}  # bytes per number: 4 bits plus a scale shared by 16
SMALL_MODEL = 1 << 30  # bytes of weights up to which a model is held as is: there is nothing to gain
FP32_WIDTH = 1024  # width below which a CPU computes in fp32
STREAMED_BLOCKS = 3  # blocks in memory while streaming: running, arriving, and a copy in another number format
OUT_OF_MEMORY = (  # out-of-memory messages of CPU and GPU allocators
    "can't allocate memory",
    "not enough memory",  # of Windows
    "out of memory",
    "invalid buffer size",  # of Metal
    "_status_alloc_failed",  # of cuBLAS and its kin
    "cannot allocate memory",  # of a file's pages, except on Windows ...
    "error 1455",  # ... and on Windows, in any language
)
USE_LESS = "Choose a smaller size, --precision int4 or --offload all, or close other programs that use memory."
USABLE_SHARE = 0.9  # share of the free memory that k2 plans with


@dataclass(frozen=True)
class ModelSize:
    """How many numbers a model holds, by how they can be held."""

    width: int
    hidden: int  # of the feed-forwards
    blocks: int
    native: int  # side in pixels of the pictures it was trained for
    inside: int  # numbers in all blocks
    outside: int  # the transformer's other numbers
    layers: int  # of the text encoder
    text: int  # numbers in all of them
    others: int  # embedding, autoencoder, style encoder
    stored: str | None = None  # the precision of the blocks on disk, if it is a few-bit one
    packed: bool = False  # on disk, so that they must be unpacked at every read
    on_gpu: bool = False  # host memory can then cache what was unpacked of streamed blocks
    wide: int = 0  # numbers inside that the file holds in more bits; they stay so if the others are held as stored


@dataclass(frozen=True)
class Plan:
    """One way to hold a model, and the bytes it needs while rendering a picture of the model's native size."""

    dtype: str
    precision: str
    offload: str
    bytes_needed: int

    def fits(self, free: int) -> bool:
        return self.bytes_needed <= USABLE_SHARE * free


def choose_plan(
    model_size: ModelSize,
    free: int,
    *,
    dtype: str,
    fast_8_bit: str = "int8",
    supported: Sequence[str] = PRECISIONS,
    precision: str | None = None,
    offload: str | None = None,
) -> Plan:
    """The fastest way to hold a model in `free` bytes; given values are kept. Raises K2Error.

    fast_8_bit: the device's fast 8-bit precision; known: all precisions it supports. If nothing fits, the plan that
    needs the least is chosen.
    """
    for value, those, what in ((precision, PRECISIONS, "precision"), (offload, OFFLOADS, "offload")):
        if value not in (None, *those):
            raise K2Error(f'There is no {what} "{value}".', hint=one_of(those))
    if precision not in (None, *supported):
        raise K2Error(f"This device does not support {precision}.", hint=one_of(supported))
    if (model_size.inside + model_size.outside + model_size.text + model_size.others) * BYTES[dtype] < SMALL_MODEL:
        options = [(precision or "native", offload or "none")]
    else:
        options = [
            way for way in plan_options(model_size, fast_8_bit, precision, supported) if offload in (None, way[1])
        ]
    plans = [Plan(dtype, *way, bytes_needed(model_size, dtype, *way)) for way in options]
    return next((plan for plan in plans if plan.fits(free)), min(plans, key=lambda plan: plan.bytes_needed))


def plan_on(
    device: torch.device | str,
    model_size: ModelSize,
    *,
    dtype: str,
    precision: str | None = None,
    offload: str | None = None,
) -> Plan:
    """The fastest way to hold a model in what is free on a device now. Raises K2Error, like `choose_plan`."""
    return choose_plan(
        model_size,
        free_memory(device),
        dtype=dtype,
        fast_8_bit=fast_8_bit_precision(device),
        supported=supported_precisions(device),
        precision=precision,
        offload=offload,
    )


def one_of(those: Sequence[str]) -> str:
    return f"Choose {', '.join(those[:-1])} or {those[-1]}."


def plan_options(
    model_size: ModelSize, fast_8_bit: str, precision: str | None = None, supported: Sequence[str] = PRECISIONS
) -> list[tuple[str, str]]:
    """(precision, offload), exact before rounded, resident before streamed: streaming costs most."""
    if precision is not None:
        return [(precision, offload) for offload in OFFLOADS]
    # streamed weights are used as stored on disk if possible: less to read, or nothing to convert; for a card, packed
    # ones are unpacked once, and kept in the form that takes the least memory
    last = model_size.stored if model_size.stored and model_size.stored in supported else "native"
    less = last if last == "int4" else fast_8_bit
    streamed = [(last, "all")]
    if model_size.on_gpu:
        streamed = [(fast_8_bit, "all")] if model_size.packed and last == "native" else [*streamed, (fast_8_bit, "all")]
    return [("native", "none"), ("native", "text"), (less, "none"), (less, "text"), *streamed]


def bytes_needed(model_size: ModelSize, dtype: str, precision: str, offload: str) -> int:
    """Bytes for the weights and for rendering one picture with guidance."""
    size, n = BYTES[dtype], model_size
    wide = n.wide if precision == n.stored else 0
    inside = int((n.inside - wide) * PACKED_BYTES.get(precision, size)) + wide * size
    text = n.text * size
    if offload == "all":
        inside = inside * STREAMED_BLOCKS // n.blocks
    if offload != "none":
        text = text * STREAMED_BLOCKS // n.layers
    tokens = (n.native // 16) ** 2 + 512
    activations = 2 * tokens * (2 * n.hidden + 8 * n.width) * size
    decoding = 400 * n.native**2 * size  # the autoencoder's widest feature maps
    return inside + text + (n.outside + n.others) * size + activations + decoding


def native_bf16(device: torch.device | str) -> bool:
    """Whether the device multiplies bf16 natively, as cards do from Ampere on: elsewhere it is slower than fp32."""
    import torch

    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    if kind != "cpu":
        return False
    known = torch.cpu.get_capabilities()
    return bool(known.get("avx512_bf16") or known.get("amx_bf16"))


def default_dtype(device: torch.device | str, width: int) -> str:
    """The default compute format of a model of this width: bf16 where that is fast, else fp32.

    Narrow models stay in fp32 on a CPU: they are quick either way (bf16 makes mini 1.5 times as fast), and in fp32
    their pictures, of 8 bits per channel, are identical on every CPU and to diffusers'; bf16's are 46 dB away.
    """
    import torch

    kind = torch.device(device).type
    if kind == "cpu" and width < FP32_WIDTH:
        return "float32"
    return "bfloat16" if kind == "mps" or native_bf16(device) else "float32"


def fast_8_bit_precision(device: torch.device | str) -> str:
    """The 8-bit precision that a device computes fastest, or, if it supports none, widens fastest."""
    import torch

    from model.low_bit import is_native

    return "fp8" if is_native(torch.float8_e4m3fn, torch.device(device).type) else "int8"


def supported_precisions(device: torch.device | str) -> tuple[str, ...]:
    """The precisions whose numbers a device can hold: Metal has no 8-bit floats."""
    import torch

    return tuple(each for each in PRECISIONS if each != "fp8" or torch.device(device).type != "mps")


class Memory(NamedTuple):
    """A machine's own memory, in bytes."""

    total: int
    free: int
    reported: bool = True  # whether the system reported what is free; else it is an estimate


def machine_memory() -> Memory:
    """This machine's memory as reported by the system; if it does not report what is free, as on a Mac, two thirds are
    assumed."""
    if sys.platform == "win32":
        status = (ctypes.c_uint64 * 8)(64)  # a MEMORYSTATUSEX, which begins with its own size
        ctypes.windll.kernel32.GlobalMemoryStatusEx(status)
        _, total, free, _, committable, *_ = status
        return Memory(total, min(free, committable))  # allocations must also fit into the commit limit
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text("utf-8").splitlines())
        return Memory(total, int(lines["MemAvailable"].split()[0]) << 10)
    except (OSError, KeyError, ValueError):
        return Memory(total, total * 2 // 3, reported=False)


def free_memory(device: torch.device | str) -> int:
    """Bytes available on a device now: a card's own, else the machine's within this process's limit."""
    import torch

    kind = torch.device(device).type
    if kind == "cuda":
        torch.cuda.empty_cache()  # what an earlier model left counts as free
        return torch.cuda.mem_get_info(torch.device(device))[0]
    if kind == "mps":  # a share of the machine's memory
        torch.mps.empty_cache()
        return max(0, torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    free = machine_memory().free
    return min(free, cgroup_free(Path("/sys/fs/cgroup"), free))


def cgroup_free(group: Path, free: int) -> int:
    """What a control group (version 2) still allows, counting its file cache as free; `free` if it sets no limit."""
    try:
        most, used = (int((group / f"memory.{name}").read_text("utf-8")) for name in ("max", "current"))
        stat = dict(line.split() for line in (group / "memory.stat").read_text("utf-8").splitlines())
        return max(0, most - used + int(stat["inactive_file"]))
    except (OSError, KeyError, ValueError):  # "max" is not a number, and means no limit
        return free


@contextmanager
def memory_errors(what: str, hint: str = USE_LESS) -> Iterator[None]:
    """Within the context, running out of memory becomes one sentence that says what for."""
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        short = isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM
        if not (short or any(words in str(error).lower() for words in OUT_OF_MEMORY)):
            raise
        raise TooLittleMemory(f"There is not enough memory for {what}.", hint=hint) from None
