"""What the benchmarks share: clocks, operation counts, networks of random weights, tables and figures."""

from __future__ import annotations

import ctypes
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cache
from math import log
from pathlib import Path
from statistics import median
from typing import Any

import tomli_w
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from model.dit import PRESETS, DiTConfig, Krea2, hidden_width
from model.low_bit import SUFFIXES, default_format, few_bit_layers, pack, use_few_bits
from model.text_encoder import QWEN3_VL_4B, TextConfig

Work = Callable[[], Any]

MEDIUM = PRESETS["medium"]
SMALL = DiTConfig(width=256, heads=4, kv_heads=1, blocks=3, text_width=160, text_taps=3, text_heads=5)  # for --smoke
EXTRAPOLATED_BLOCKS = 28  # the number of blocks that a step is extrapolated to
PATTERN_SIZE = 1 << 22  # random numbers that are repeated: drawing billions takes minutes


# ---- clocks -----------------------------------------------------------------------------------------------------


def seconds(work: Work) -> float:
    """Seconds of one call, including all work on a GPU."""
    synchronise()
    started = time.perf_counter()
    work()
    synchronise()
    return time.perf_counter() - started


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def interleaved(works: Sequence[Work], rounds: int) -> list[list[float]]:
    """Seconds of each piece of work in every round; they take turns, so that other load affects all of them. One round
    shows only that they work."""
    for work in works if rounds > 1 else ():
        work()  # the first time, caches are cold
    times: list[list[float]] = [[] for _ in works]
    for _ in range(rounds):
        for mine, work in zip(times, works, strict=True):
            mine.append(seconds(work))
    return times


def product_rate(dtype: torch.dtype, device: str, side: int) -> float:
    """Operations per second of a large product: the arithmetic limit."""
    a, b = torch.randn(2, side, side, device=device).to(dtype)
    times = 1 if device == "cpu" else 16  # an idle GPU has to raise its clocks first

    def products() -> None:
        for _ in range(times):
            a @ b

    products()
    return times * 2 * side**3 / min(seconds(products) for _ in range(3))


def peak_megabytes(work: Work) -> float:
    """How much a call raises peak resident memory (Linux), or a GPU's."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        synchronise()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    ctypes.CDLL(None).malloc_trim(0)  # leftovers of earlier calls in the heap would hide this one's memory
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = resident_memory()["VmRSS"]
    work()
    return max(resident_memory()["VmHWM"] - before, 4096) / 1e6


def resident_memory() -> dict[str, int]:
    """Bytes: VmRSS now, VmHWM at the peak."""
    lines = (line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(value.split()[0]) << 10 for name, value in lines if name in ("VmRSS", "VmHWM")}


# ---- operations -------------------------------------------------------------------------------------------------


def stream_operations(c: DiTConfig, text: int, image: int, blocks: int | None = None) -> float:
    """Multiplications and additions of one evaluation of the stream for one picture."""
    tokens = text + image
    matrices = c.width * (3 * c.width + 2 * c.kv_heads * c.head_dim + 3 * hidden_width(c.width, c.multiplier))
    attention = 2 * tokens * c.width
    ends = 2 * image * c.token_dim * c.width
    return 2 * ((c.blocks if blocks is None else blocks) * tokens * (matrices + attention) + ends)


def tower_operations(c: TextConfig, tokens: int, layers: int, before: int = 0) -> float:
    """Operations of the text encoder for one prompt; `before`: tokens whose keys already exist."""
    inner, shared = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    matrices = c.hidden_size * (2 * inner + 2 * shared + 3 * c.intermediate_size)
    return 2 * layers * tokens * (matrices + 2 * (before + tokens) * inner)


# ---- networks ---------------------------------------------------------------------------------------------------


def fill_random(network: nn.Module, device: str, dtype: torch.dtype) -> nn.Module:
    """Give a network on the meta device random weights as large as a trained one's; our norms stay fp32."""
    state = {}
    for name, tensor in network.state_dict().items():
        flat = name.endswith((".scale", "norm.weight")) or tensor.ndim < 2
        if not tensor.is_floating_point():
            state[name] = torch.zeros(tensor.shape, dtype=tensor.dtype, device=device)
        else:
            kind = torch.float32 if name.endswith(".scale") else dtype
            state[name] = random_tensor(tensor.shape, 0.02 if flat else tensor[0].numel() ** -0.5, kind, device)
    network.load_state_dict(state, strict=True, assign=True)
    return network.requires_grad_(False).eval()


def random_tensor(shape: Sequence[int], std: float, dtype: torch.dtype, device: str) -> Tensor:
    """Normal numbers, the same few million repeated."""
    whole = torch.empty(shape, dtype=dtype, device=device)
    pattern = (random_pattern()[: whole.numel()] * std).to(dtype).to(device)
    for part in whole.view(-1).split(PATTERN_SIZE):
        part.copy_(pattern[: len(part)])
    return whole


@cache
def random_pattern() -> Tensor:
    return torch.randn(PATTERN_SIZE, generator=torch.Generator().manual_seed(0))


def low_bit_copy(network: Krea2, precision: str) -> Krea2:
    """The same network with its blocks' matrices in few bits, sharing everything else."""
    with torch.device("meta"):
        small = Krea2(network.config)
    use_few_bits(small.blocks, lambda name, layer: default_format(precision, layer.in_features))
    state = dict(network.state_dict())
    for name, layer in few_bit_layers(small).items():
        held = pack(state.pop(name), None, 0, layer.format)
        state |= {name + end: part for end, part in zip(SUFFIXES[layer.format.bits], held, strict=True)}
    small.load_state_dict(state, strict=True, assign=True)
    return small.requires_grad_(False).eval()


def small_tower() -> TextConfig:
    values = vars(QWEN3_VL_4B) | {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 500}
    return TextConfig(**values | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16})


# ---- tables and figures -----------------------------------------------------------------------------------------


@dataclass
class Row:
    """Two ways to the same result. `ratio`: how much longer (or larger) the other way is, the rounds' median."""

    name: str
    ours: float
    theirs: float
    ratio: float
    unit: str = "s"
    aim: float | None = None  # target of the ratio
    limit: float | None = None  # seconds for the operations alone
    rounds: list[list[float]] = field(default_factory=list)

    def line(self) -> str:
        share = "" if self.limit is None else f"{self.limit / self.ours:.0%}"
        aim = "" if self.aim is None else f"{self.aim:.2f}"
        return (
            f"{self.name:<52}{self.ours:>10.4g}{self.theirs:>10.4g} {self.unit:<3}{self.ratio:>7.2f}{aim:>7}{share:>7}"
        )


HEAD = f"{'':<52}{'ours':>10}{'other':>10}    {'ratio':>7}{'aim':>7}{'limit':>7}"


def make_row(name: str, ours: Sequence[float], theirs: Sequence[float], **more: Any) -> Row:
    pairs = list(zip(ours, theirs, strict=True))
    ratio = median(other / mine for mine, other in pairs)
    return Row(name, median(ours), median(theirs), ratio, rounds=[list(pair) for pair in pairs], **more)


def save(path: Path, title: str, rows: Sequence[Row], **facts: Any) -> None:
    """rows -> path.toml and path.png."""
    write_rows(path, rows, **facts)
    draw_bars(path.with_suffix(".png"), title, rows)
    print(f"written to {path.with_suffix('.toml')} and .png")


def write_rows(path: Path, rows: Sequence[Row], **facts: Any) -> None:
    """rows -> path.toml, even if more rows follow."""
    found = [{key: value for key, value in asdict(each).items() if value is not None} for each in rows]
    write_toml(path.with_suffix(".toml"), row=found, **facts)


def write_toml(path: Path, **tables: Any) -> None:
    machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    machine |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
    if torch.cuda.is_available():
        machine["gpu"] = torch.cuda.get_device_name()
    when = datetime.now(UTC).replace(microsecond=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(tomli_w.dumps({"when": when, "machine": machine} | tables))


INK, SOFT, OURS, OTHER = "#1d1d1f", "#c8c8cc", "#2f6f5e", "#c9722f"


MAX_SHOWN_RATIO = 64.0  # larger ratios are drawn at this length


def draw_bars(path: Path, title: str, rows: Sequence[Row]) -> None:
    """One bar per row, by the ratio's logarithm: to the right of the line ours is better. A tick marks the aim."""
    left, high, wide = 400, 26, 560
    image = Image.new("RGB", (left + wide + 90, 70 + high * len(rows)), "white")
    draw, font, large = ImageDraw.Draw(image), ImageFont.load_default(13), ImageFont.load_default(17)
    draw.text((16, 14), title, INK, large)
    across = log_scale([0.5, MAX_SHOWN_RATIO])

    def at(ratio: float) -> float:
        return left + wide * across(min(max(ratio, 0.5), MAX_SHOWN_RATIO))

    for index, each in enumerate(rows):
        y = 50 + high * index
        draw.text((16, y + 3), each.name, INK, font)
        ends = sorted((at(1), at(each.ratio)))
        draw.rectangle((ends[0], y + 3, ends[1], y + high - 6), OURS if each.ratio >= 1 else OTHER)
        draw.text((ends[1] + 8, y + 3), f"{each.ratio:.2f}", INK, font)
        if each.aim:
            draw.line((at(each.aim), y, at(each.aim), y + high - 3), INK, 2)
    draw.line((at(1), 44, at(1), image.height - 12), SOFT, 1)
    image.save(path)


@dataclass
class Panel:
    """Seconds against a variable, and the expectation from the operations."""

    title: str
    xs: list[float]
    measured: list[float]  # seconds
    operations: list[float]


def draw_growth(path: Path, title: str, panels: Sequence[Panel]) -> None:
    """Log-log panels side by side; operations are scaled to meet the measured seconds at the largest point."""
    side, gap = 300, 70
    image = Image.new("RGB", (gap + (side + gap) * len(panels), side + 140), "white")
    draw, font, large = ImageDraw.Draw(image), ImageFont.load_default(13), ImageFont.load_default(17)
    draw.text((gap, 14), title, INK, large)
    for index, panel in enumerate(panels):
        x0, y0 = gap + index * (side + gap), 60
        expected = [each * panel.measured[-1] / panel.operations[-1] for each in panel.operations]
        across, up = log_scale(panel.xs), log_scale([*panel.measured, *expected])
        draw.rectangle((x0, y0, x0 + side, y0 + side), outline=SOFT)
        for x in panel.xs:
            draw.text((x0 + across(x) * side - 8, y0 + side + 4), f"{x:g}", INK, font)
        for y in (min(panel.measured), max(panel.measured)):
            draw.text((x0 - gap + 10, y0 + (1 - up(y)) * side - 7), f"{y:.3g} s", INK, font)
        for values, colour in ((expected, OTHER), (panel.measured, OURS)):
            points = [(x0 + across(x) * side, y0 + (1 - up(y)) * side) for x, y in zip(panel.xs, values, strict=True)]
            draw.line(points, colour, 3)
            for x, y in points:
                draw.ellipse((x - 4, y - 4, x + 4, y + 4), colour)
        draw.text((x0, y0 + side + 24), panel.title, INK, font)
    draw.text((gap, side + 112), "measured", OURS, font)
    draw.text((gap + 80, side + 112), "operations", OTHER, font)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def log_scale(values: Sequence[float]) -> Callable[[float], float]:
    """From a value to 0.05 … 0.95 of an axis, by its logarithm."""
    low, high = log(min(values)), log(max(values))
    return lambda value: 0.05 + 0.9 * ((log(value) - low) / (high - low) if high > low else 0.5)
