"""The open weights' true size on this machine, loaded in few bits and streamed: memory and time to the first step.

`python tests/bench/true_size.py FOLDER [--stored bf16|int8|int4] [--size 256] [--keep] [--smoke]`. Writes a file of
random weights into FOLDER, block by block (26 GB; 14 as int8, 8 as int4), and measures each way to hold it in its own
process: peak resident memory, and the time to the first step compared with plainly reading the file once. The file's
pages are dropped from the system's cache before every read. It is deleted at the end unless --keep is given.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path

import torch
from measure import MEDIUM, SMALL, random_tensor, write_toml

from model.compact import iter_tensors, make_header
from model.dit import DiTConfig, Krea2
from model.fast import keep_freed_memory
from model.layouts import load_dit
from model.low_bit import FORMATS, SUFFIXES, default_format, few_bit_layers, pack, use_few_bits
from model.plan import FP32_WIDTH, native_bf16

MODES = {  # what is measured: precision, streamed, limit in GiB, formats of the stored file
    "int8": ("int8", False, 15, ("bf16", "int8")),
    "int4": ("int4", False, 9, ("bf16", "int4")),
    "streamed": ("native", True, 6, ("bf16", "int8")),
    "int4, streamed": ("int4", True, 4, ("int4",)),
}
CHUNK = 1 << 24
GIB = 1 << 30


def write_random(path: Path, config: DiTConfig, stored: str) -> None:
    """Write a native checkpoint of random weights; at most one matrix is in memory at a time."""
    with torch.device("meta"):
        network = Krea2(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    if stored in FORMATS:
        use_few_bits(network.blocks, lambda name, layer: default_format(stored, layer.in_features))
    low_bit_layers = few_bit_layers(network)

    def make_tensor(names: Iterable[str]) -> dict[str, torch.Tensor]:
        (name,) = names
        tensor = random_tensor(
            shapes[name], 0.02 if len(shapes[name]) < 2 else shapes[name][-1] ** -0.5, torch.bfloat16, "cpu"
        )
        if name not in low_bit_layers:
            return {name: tensor.float() if name.endswith(".scale") else tensor}
        layer_format = low_bit_layers[name].format
        return {
            name + end: part
            for end, part in zip(SUFFIXES[layer_format.bits], pack(tensor, None, 0, layer_format), strict=True)
        }

    header = make_header(network, {"kind": "dit", "config": asdict(config)})
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for tensor in iter_tensors(network, make_tensor):
            file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


def drop_cached_pages(path: Path) -> None:
    """Drop a file's pages from the system's cache, so that it is read from the disk again."""
    file = os.open(path, os.O_RDONLY)
    os.fsync(file)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(file)


def read_once(path: Path) -> float:
    drop_cached_pages(path)
    started, room = time.perf_counter(), bytearray(CHUNK)
    with path.open("rb", buffering=0) as file:
        while file.readinto(room):
            pass
    return time.perf_counter() - started


@torch.inference_mode()
def measure(path: Path, way: str, side: int) -> None:
    """Run in its own process: prints a line of JSON."""
    precision, streamed, *_ = MODES[way]
    keep_freed_memory()  # as a pipeline does
    started = time.perf_counter()
    wide = torch.float32 if not native_bf16("cpu") else torch.bfloat16
    dit, _ = load_dit(path, dtype=wide, precision=precision, streamed=streamed)
    loaded = time.perf_counter() - started
    c, grid = dit.config, (side // 16, side // 16)
    context = dit.encode_text(torch.randn(1, 45, c.text_taps, c.text_width).to(wide))
    tokens, mods = torch.randn(1, grid[0] * grid[1], c.token_dim).to(wide), dit.modulate(torch.tensor([1.0]))
    rope = dit.rope(45, grid)
    times = []
    for _ in range(2):
        answer = dit.velocity(tokens, context, mods, rope)
        times.append(time.perf_counter() - started)
    assert answer.isfinite().all()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (GIB if sys.platform == "darwin" else 1 << 20)
    print(json.dumps({"load": loaded, "first": times[0], "second": times[1] - times[0], "peak_gib": peak}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--stored", choices=("bf16", "int8", "int4"), default="bf16")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--out", type=Path, default=Path(".cache/bench/true-size.toml"))
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--measure", choices=MODES, help=argparse.SUPPRESS)
    options = parser.parse_args()

    path = options.folder / f"random-{options.stored}{'-small' * options.smoke}.safetensors"
    if options.measure:
        return measure(path, options.measure, options.size)
    config = replace(SMALL, width=FP32_WIDTH // 4, blocks=6) if options.smoke else MEDIUM
    options.folder.mkdir(parents=True, exist_ok=True)
    try:
        if not path.exists():
            write_random(path, config, options.stored)
        once, found = read_once(path), []
        print(f"{path.stat().st_size / 1e9:.1f} GB, read once in {once:.1f} s")
        for way, (_, _, limit_gib, formats) in MODES.items():
            if options.stored not in formats:
                continue
            drop_cached_pages(path)
            command = [sys.executable, __file__, str(options.folder), "--stored", options.stored]
            command += ["--size", str(options.size), "--measure", way, *(["--smoke"] if options.smoke else [])]
            row = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
            row |= {"way": way, "most_gib": limit_gib, "over_reading": row["first"] / once}
            found.append(row)
            print(
                f"{way:<15} loaded in {row['load']:.1f} s, first step done at {row['first']:.1f} s "
                f"({row['over_reading']:.2f} × reading), second {row['second']:.1f} s, "
                f"peak {row['peak_gib']:.2f} of {limit_gib} GiB",
                flush=True,
            )
        write_toml(options.out, way=found, stored=options.stored, read_once=once, bytes=path.stat().st_size)
        print(f"written to {options.out}")
    finally:
        if not options.keep:
            path.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
