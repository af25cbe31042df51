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
    on_card: bool = False  # host memory can then cache what was unpacked of streamed blocks
    wide: int = 0  # numbers inside that the file holds in more bits; they stay so if the others are held as stored


@dataclass(frozen=True)
class Plan:
    """One way to hold a model, and the bytes it needs while rendering a picture of the model's native size."""

    dtype: str
    precision: str
    offload: str
    needs: int

    def fits(self, free: int) -> bool:
        return self.needs <= USABLE_SHARE * free


def choose(
    numbers: ModelSize,
    free: int,
    *,
    dtype: str,
    eight: str = "int8",
    known: Sequence[str] = PRECISIONS,
    precision: str | None = None,
    offload: str | None = None,
) -> Plan:
    """The fastest way to hold a model in `free` bytes; given values are kept. Raises K2Error.

    eight: the device's fast 8-bit precision; known: all precisions it supports. If nothing fits, the plan that needs
    the least is chosen.
    """
    for value, those, what in ((precision, PRECISIONS, "precision"), (offload, OFFLOADS, "offload")):
        if value not in (None, *those):
            raise K2Error(f'There is no {what} "{value}".', hint=one_of(those))
    if precision not in (None, *known):
        raise K2Error(f"This device does not support {precision}.", hint=one_of(known))
    if (numbers.inside + numbers.outside + numbers.text + numbers.others) * BYTES[dtype] < SMALL_MODEL:
        open_ways = [(precision or "native", offload or "none")]
    else:
        open_ways = [way for way in ways(numbers, eight, precision, known) if offload in (None, way[1])]
    plans = [Plan(dtype, *way, needs(numbers, dtype, *way)) for way in open_ways]
    return next((plan for plan in plans if plan.fits(free)), min(plans, key=lambda plan: plan.needs))


def plan_on(
    device: torch.device | str,
    numbers: ModelSize,
    *,
    dtype: str,
    precision: str | None = None,
    offload: str | None = None,
) -> Plan:
    """The fastest way to hold a model in what is free on a device now. Raises K2Error, like `choose`."""
    return choose(
        numbers,
        free_memory(device),
        dtype=dtype,
        eight=eight_bits(device),
        known=known_precisions(device),
        precision=precision,
        offload=offload,
    )


def one_of(those: Sequence[str]) -> str:
    return f"Choose {', '.join(those[:-1])} or {those[-1]}."


def ways(
    numbers: ModelSize, eight: str, precision: str | None = None, known: Sequence[str] = PRECISIONS
) -> list[tuple[str, str]]:
    """(precision, offload), exact before rounded, resident before streamed: streaming costs most."""
    if precision is not None:
        return [(precision, offload) for offload in OFFLOADS]
    # streamed weights are used as stored on disk if possible: less to read, or nothing to convert; for a card, packed
    # ones are unpacked once, and kept in the form that takes the least memory
    last = numbers.stored if numbers.stored and numbers.stored in known else "native"
    less = last if last == "int4" else eight
    streamed = [(last, "all")]
    if numbers.on_card:
        streamed = [(eight, "all")] if numbers.packed and last == "native" else [*streamed, (eight, "all")]
    return [("native", "none"), ("native", "text"), (less, "none"), (less, "text"), *streamed]


def needs(numbers: ModelSize, dtype: str, precision: str, offload: str) -> int:
    """Bytes for the weights and for rendering one picture with guidance."""
    size, n = BYTES[dtype], numbers
    wide = n.wide if precision == n.stored else 0
    inside = int((n.inside - wide) * PACKED_BYTES.get(precision, size)) + wide * size
    text = n.text * size
    if offload == "all":
        inside = inside * STREAMED_BLOCKS // n.blocks
    if offload != "none":
        text = text * STREAMED_BLOCKS // n.layers
    tokens = (n.native // 16) ** 2 + 512
    at_work = 2 * tokens * (2 * n.hidden + 8 * n.width) * size
    decoding = 400 * n.native**2 * size  # the autoencoder's widest feature maps
    return inside + text + (n.outside + n.others) * size + at_work + decoding


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


def eight_bits(device: torch.device | str) -> str:
    """The 8-bit precision that a device computes fastest, or, if it supports none, widens fastest."""
    import torch

    from model.low_bit import is_native

    return "fp8" if is_native(torch.float8_e4m3fn, torch.device(device).type) else "int8"


def known_precisions(device: torch.device | str) -> tuple[str, ...]:
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
        _, whole, free, _, promised, *_ = status
        return Memory(whole, min(free, promised))  # allocations must also fit into the commit limit
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text("utf-8").splitlines())
        return Memory(whole, int(lines["MemAvailable"].split()[0]) << 10)
    except (OSError, KeyError, ValueError):
        return Memory(whole, whole * 2 // 3, reported=False)


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
    return min(free, limit_left(Path("/sys/fs/cgroup"), free))


def limit_left(group: Path, free: int) -> int:
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
