"""How a model is held in memory: which numbers, in how many bits, and what stays on disk until it is needed.

Counting needs headers only, choosing needs none: torch is asked about devices, and not before.
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

PRECISIONS = ("native", "int8", "fp8", "int4")  # of the blocks' matrices; native is the numbers that are computed with
OFFLOADS = ("none", "text", "all")  # what is read block by block as it is needed: the text encoder, all but the ends
BYTES = {"float32": 4, "bfloat16": 2}
HELD = {"int8": 1, "fp8": 1, "int4": 9 / 16}  # bytes of a number: of 4 bits with the scale that 16 share
SMALL = 1 << 30  # bytes of weights up to which a model is held as it is: there is nothing to gain
NARROW = 1024  # width below which a CPU computes in fp32
IN_HAND = 3  # blocks in memory while they are streamed: at work, on the way, and a copy in other numbers
OUT_OF_IT = (  # what the allocators of processors and of cards say
    "can't allocate memory",
    "not enough memory",  # of Windows
    "out of memory",
    "invalid buffer size",  # of Metal
    "_status_alloc_failed",  # of cuBLAS and its kin
    "cannot allocate memory",  # of a file's pages, elsewhere than under Windows ...
    "error 1455",  # ... and there, whatever its language
)
SMALLER = "Choose a smaller size, --precision int4 or --offload all, or close other programs that use memory."
SPARE = 0.9  # of the memory that is free now may be counted on


@dataclass(frozen=True)
class Numbers:
    """How many numbers a model holds, sorted by what may become of them."""

    width: int
    hidden: int  # of the feed-forwards
    blocks: int
    native: int  # pixels along the side of the pictures that it is made for
    inside: int  # numbers in all blocks
    outside: int  # the transformer's others
    layers: int  # of the text encoder
    text: int  # numbers in all of them
    others: int  # embedding, autoencoder, style encoder
    stored: str | None = None  # the precision of the blocks on disk, where it is one of few bits
    packed: bool = False  # on disk, so that they have to be worked out whenever they are read
    on_card: bool = False  # beside whose memory there is another, to keep in what of streamed blocks was worked out
    wide: int = 0  # of those inside, what the file holds in more: it stays so where the others are held as they lie


@dataclass(frozen=True)
class Plan:
    """One way to hold a model, and the bytes that it takes with a picture of the model's own size in the making."""

    dtype: str
    precision: str
    offload: str
    needs: int

    def fits(self, free: int) -> bool:
        return self.needs <= SPARE * free


def choose(
    numbers: Numbers,
    free: int,
    *,
    dtype: str,
    eight: str = "int8",
    known: Sequence[str] = PRECISIONS,
    precision: str | None = None,
    offload: str | None = None,
) -> Plan:
    """The fastest way to hold a model that fits into `free` bytes; what is given is kept to. Raises K2Error.

    eight: the 8-bit precision that the device is fast in; known: all whose numbers it has. Where nothing fits, what
    needs the least is taken.
    """
    for value, those, what in ((precision, PRECISIONS, "precision"), (offload, OFFLOADS, "offload")):
        if value not in (None, *those):
            raise K2Error(f'There is no {what} "{value}".', hint=one_of(those))
    if precision not in (None, *known):
        raise K2Error(f"This device does not support {precision}.", hint=one_of(known))
    if (numbers.inside + numbers.outside + numbers.text + numbers.others) * BYTES[dtype] < SMALL:
        open_ways = [(precision or "native", offload or "none")]
    else:
        open_ways = [way for way in ways(numbers, eight, precision, known) if offload in (None, way[1])]
    plans = [Plan(dtype, *way, needs(numbers, dtype, *way)) for way in open_ways]
    return next((plan for plan in plans if plan.fits(free)), min(plans, key=lambda plan: plan.needs))


def plan_on(
    device: torch.device | str,
    numbers: Numbers,
    *,
    dtype: str,
    precision: str | None = None,
    offload: str | None = None,
) -> Plan:
    """The fastest way to hold a model that fits into what is free on a device now. Raises K2Error, as `choose`."""
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
    numbers: Numbers, eight: str, precision: str | None = None, known: Sequence[str] = PRECISIONS
) -> list[tuple[str, str]]:
    """(precision, offload), exact before rounded, resident before streamed: streaming costs most."""
    if precision is not None:
        return [(precision, offload) for offload in OFFLOADS]
    # streamed weights are taken as they lie on disk, if they can be: less to read, or nothing to do; for a card, what
    # has to be worked out is, once, and kept where it takes the least
    last = numbers.stored if numbers.stored and numbers.stored in known else "native"
    less = last if last == "int4" else eight
    streamed = [(last, "all")]
    if numbers.on_card:
        streamed = [(eight, "all")] if numbers.packed and last == "native" else [*streamed, (eight, "all")]
    return [("native", "none"), ("native", "text"), (less, "none"), (less, "text"), *streamed]


def needs(numbers: Numbers, dtype: str, precision: str, offload: str) -> int:
    """Bytes of weights and of one picture in the making, guidance on."""
    size, n = BYTES[dtype], numbers
    wide = n.wide if precision == n.stored else 0
    inside = int((n.inside - wide) * HELD.get(precision, size)) + wide * size
    text = n.text * size
    if offload == "all":
        inside = inside * IN_HAND // n.blocks
    if offload != "none":
        text = text * IN_HAND // n.layers
    tokens = (n.native // 16) ** 2 + 512
    at_work = 2 * tokens * (2 * n.hidden + 8 * n.width) * size
    decoding = 400 * n.native**2 * size  # the autoencoder's widest feature maps
    return inside + text + (n.outside + n.others) * size + at_work + decoding


def native_bf16(device: torch.device | str) -> bool:
    """Whether the device multiplies bf16 numbers itself, as cards do from Ampere on: elsewhere it is slower than fp32,
    not faster."""
    import torch

    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    if kind != "cpu":
        return False
    known = torch.cpu.get_capabilities()
    return bool(known.get("avx512_bf16") or known.get("amx_bf16"))


def default_dtype(device: torch.device | str, width: int) -> str:
    """What a model of this width computes in where nobody says: bf16 where that is fast, else fp32.

    Narrow models stay in fp32 on a CPU: they are quick either way (bf16 makes mini 1.5 times as fast), and in fp32
    their pictures are the same, to the last of 8 bits, on every processor and beside diffusers; bf16's are 46 dB away.
    """
    import torch

    kind = torch.device(device).type
    if kind == "cpu" and width < NARROW:
        return "float32"
    return "bfloat16" if kind == "mps" or native_bf16(device) else "float32"


def eight_bits(device: torch.device | str) -> str:
    """The 8-bit precision that a device is fastest in, or, where it knows none, that is widened fastest."""
    import torch

    from model.few_bits import native

    return "fp8" if native(torch.float8_e4m3fn, torch.device(device).type) else "int8"


def known_precisions(device: torch.device | str) -> tuple[str, ...]:
    """The precisions whose numbers a device can hold: Metal has no 8-bit floats."""
    import torch

    return tuple(each for each in PRECISIONS if each != "fp8" or torch.device(device).type != "mps")


class Memory(NamedTuple):
    """A machine's own memory, in bytes."""

    whole: int
    free: int
    told: bool = True  # what is free; else it is an estimate


def machine_memory() -> Memory:
    """What the system says of this machine's memory; where it does not say what is free, as on a Mac, two thirds are
    taken for it."""
    if sys.platform == "win32":
        status = (ctypes.c_uint64 * 8)(64)  # a MEMORYSTATUSEX, which begins with its own size
        ctypes.windll.kernel32.GlobalMemoryStatusEx(status)
        _, whole, free, _, promised, *_ = status
        return Memory(whole, min(free, promised))  # what the paging file has no room for cannot be had
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text("utf-8").splitlines())
        return Memory(whole, int(lines["MemAvailable"].split()[0]) << 10)
    except (OSError, KeyError, ValueError):
        return Memory(whole, whole * 2 // 3, told=False)


def free_memory(device: torch.device | str) -> int:
    """Bytes that can be had on a device now: a card's own, else the machine's within the limit set for this process."""
    import torch

    kind = torch.device(device).type
    if kind == "cuda":
        torch.cuda.empty_cache()  # what a model before this one left is free too
        return torch.cuda.mem_get_info(torch.device(device))[0]
    if kind == "mps":  # which lends a part of the machine's
        torch.mps.empty_cache()
        return max(0, torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    free = machine_memory().free
    return min(free, limit_left(Path("/sys/fs/cgroup"), free))


def limit_left(group: Path, free: int) -> int:
    """What a control group (version 2) still allows, its file cache counted as free; `free` where it sets no limit."""
    try:
        most, used = (int((group / f"memory.{name}").read_text("utf-8")) for name in ("max", "current"))
        stat = dict(line.split() for line in (group / "memory.stat").read_text("utf-8").splitlines())
        return max(0, most - used + int(stat["inactive_file"]))
    except (OSError, KeyError, ValueError):  # "max" is no number, and no limit
        return free


@contextmanager
def lacking_memory(what: str, hint: str = SMALLER) -> Iterator[None]:
    """Memory that runs out for a picture of some size, or whatever is made, in one sentence."""
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        short = isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM
        if not (short or any(words in str(error).lower() for words in OUT_OF_IT)):
            raise
        raise TooLittleMemory(f"There is not enough memory for {what}.", hint=hint) from None
