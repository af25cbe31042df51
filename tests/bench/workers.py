"""How pictures per minute grow with the workers: processes with one thread each, and Ray nodes with one core each.

`python tests/bench/workers.py [--pictures 192] [--sizes 1,2,4] [--out .cache/bench/workers.toml]`, with the bundled
model. Timed from when all workers have their weights: a run pays for loading only once. More workers than cores cannot
be faster; the output file has the number of cores.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: one core per worker

from measure import write_toml

from k2cli.models import ModelSpec
from k2cli.workers import Group, Message, ProcessPool, Ready, WorkerPool, distribute
from model.spec import RenderSpec

SUBJECTS = ("fox", "owl", "cat", "dog", "car", "bus", "tree", "house")


class TimedPool:
    """A pool that times its pictures."""

    def __init__(self, pool: WorkerPool):
        self.pool, self.size, self.where = pool, pool.size, pool.where
        self.ready, self.started_at = 0, 0.0
        self.rendered = 0

    def acquire(self, held: ModelSpec) -> int:
        return self.pool.acquire(held)

    def submit(self, worker: int, group: Group) -> None:
        self.pool.submit(worker, group)

    def next_message(self) -> tuple[int, Message]:
        worker, news = self.pool.next_message()
        self.ready += isinstance(news, Ready)
        if self.ready == self.size:
            self.started_at = self.started_at or time.perf_counter()
            self.rendered += len(news) if isinstance(news, list) else 0
        return worker, news

    def close(self) -> None:
        self.pool.close()


def rate(make_pool: Callable[[list[RenderSpec]], WorkerPool], count: int) -> float:
    """Pictures per minute, once all workers are running."""
    specs = [RenderSpec(f"a red {SUBJECTS[seed % len(SUBJECTS)]}", seed=seed) for seed in range(count)]
    pool = TimedPool(make_pool(specs))
    try:
        found = list(distribute(pool, ModelSpec("mini", "turbo"), range(count)))
    finally:
        pool.close()
    assert len(found) == count
    return 60 * pool.rendered / (time.perf_counter() - pool.started_at)


def ray_rates(sizes: list[int], count: int) -> dict[int, float]:
    """The same on Ray, with one single-core node per worker."""
    from ray.cluster_utils import Cluster as Nodes

    from k2cli.cluster import RayPool

    found = {}
    for size in sizes:
        nodes = Nodes()
        for _ in range(size):
            nodes.add_node(num_cpus=1)
        try:
            found[size] = rate(partial(RayPool, nodes.address, size), count)
        finally:
            nodes.shutdown()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=192)
    parser.add_argument("--sizes", default="1,2,4")
    parser.add_argument("--out", type=Path, default=Path(".cache/bench/workers.toml"))
    options = parser.parse_args()
    sizes = [int(size) for size in options.sizes.split(",")]

    found: dict[str, Any] = {}
    ways = {"processes": lambda: {size: rate(partial(ProcessPool, size), options.pictures) for size in sizes}}
    try:
        import ray  # noqa: F401

        ways["ray"] = lambda: ray_rates(sizes, options.pictures)
    except ImportError:
        print("Ray is not installed: measuring processes only")
    for way, measure in ways.items():
        rates = measure()
        found[way] = {str(size): round(each, 1) for size, each in rates.items()}
        for size, each in rates.items():
            print(f"{way:<10}{size:>3} {each:8.1f} pictures per minute {each / rates[sizes[0]]:6.2f} ×", flush=True)
    write_toml(options.out, pictures=options.pictures, **found)


if __name__ == "__main__":
    main()
