"""Render a run on the machines of a Ray cluster. Needs the extra `ray`, and k2 installed on every machine.

A project's files (references, LoRAs) travel with the run; models do not: every machine has its own under the same
name, and a picture made with different weights from the rest ends the run.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import chdir, contextmanager, suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from k2cli.workers import Group, Lost, Message, ModelSpec, Ready, Unreachable, Worker, WorkerPool, load_pipeline
from model.errors import K2Error
from model.hashes import PEFT_SETTINGS, PEFT_WEIGHTS, spec_files
from model.spec import Picture, RenderSpec

PLACEMENT_TIMEOUT = 300.0  # seconds that a cluster may take to place the first worker
CONNECT_TIMEOUT = 5.0  # seconds that a machine may take to answer
CLEANUP_TIMEOUT = 5.0  # seconds that a worker may take to clean up
VERSIONS = ("k2", "torch", "pillow")  # that pictures depend on


class RayPool(WorkerPool):
    """Workers that are actors: one for every GPU of the cluster, or for every processor core if it has none."""

    where, here = "of the cluster", False
    ray: Any = None

    def __init__(self, address: str, max_size: int | None):
        """max_size: workers at work at a time; default: as many as there is room for."""
        super().__init__()
        self.address, self.max_size = address, max_size
        self.actors: dict[int, Any] = {}
        self.pending: dict[Any, int] = {}  # a pending answer -> the worker's number
        self.placed: set[int] = set()  # workers that have found room

    def begin_run(self, specs: Sequence[RenderSpec]) -> None:
        super().begin_run(specs)
        if self.ray is None:
            self.connect()
        self.files = self.ray.put(pack_files(specs))

    def connect(self) -> None:
        """Raises K2Error."""
        try:
            import ray
        except ImportError:
            raise Unreachable("Ray is not installed.", hint='To use a cluster: pip install "k2[ray]"') from None
        check_port(self.address)
        try:
            with chdir(os.sep):  # Ray's workers import from the caller's folder: not from a project's
                ray.init(self.address, log_to_driver=False, logging_level=logging.ERROR, configure_logging=True)
        except Exception as error:  # whatever keeps it from answering
            what = f"No Ray cluster answers at {self.address}: {error}."
            raise Unreachable(what, hint="Start one with: ray start --head") from None
        room = ray.cluster_resources()
        gpus = int(room.get("GPU", 0))
        self.resources = {"num_cpus": 1, "num_gpus": 1 if gpus else 0}
        self.node_id = ray.get_runtime_context().get_node_id()
        self.size = max(1, min(gpus or int(room.get("CPU", 1)), self.max_size or 1 << 30))
        self.ray = ray

    def start(self, worker: int) -> None:
        options = {**self.resources, "max_restarts": 0, "max_task_retries": 0, "scheduling_strategy": "SPREAD"}
        with self.connected():
            self.actors[worker] = self.ray.remote(RemoteWorker).options(**options).remote()
            self.pending[self.actors[worker].ping.remote()] = worker

    def load(self, worker: int) -> None:
        with self.connected():
            self.pending[self.actors[worker].ready.remote(self.models[worker], self.specs, self.files)] = worker

    def submit(self, worker: int, group: Group) -> None:
        with self.connected():
            self.pending[self.actors[worker].render.remote(group)] = worker

    def own_node_alive(self) -> bool:
        """Whether this machine's own node is alive: Ray silently ends a process that asks anything of a dead one."""
        with self.connected():
            return any(node["Alive"] for node in self.ray.nodes() if node["NodeID"] == self.node_id)

    @contextmanager
    def connected(self) -> Iterator[None]:
        """Turn what Ray raises when the cluster cannot be reached any more into one sentence."""
        try:
            yield
        except (self.ray.exceptions.RayError, OSError) as error:
            raise unreachable(last_line(error)) from None

    def next_message(self) -> tuple[int, Message]:
        with self.connected():
            done, _ = self.ray.wait(
                list(self.pending), num_returns=1, timeout=None if self.placed else PLACEMENT_TIMEOUT
            )
        if not done:
            raise Unreachable("The cluster has no room for a single worker.", hint="See its resources: ray status")
        worker = self.pending.pop(done[0])
        try:
            message = self.ray.get(done[0])
        except self.ray.exceptions.RayTaskError as error:
            return worker, error.cause if isinstance(error.cause, K2Error) else RuntimeError(str(error))
        except (self.ray.exceptions.RaySystemError, OSError) as error:
            raise unreachable(last_line(error)) from None
        except self.ray.exceptions.RayError as error:
            if getattr(error, "actor_init_failed", False):
                what = f"A machine of the cluster cannot start k2: {last_line(error)}."
                raise K2Error(what, hint="Install the same versions as here.") from None
            if not self.own_node_alive():
                raise unreachable("its node on this machine has ended") from None
            self.terminate([worker])
            return worker, Lost(last_line(error))
        if message is None:  # it is placed, and begins to load
            self.placed.add(worker)
            return self.next_message()
        if isinstance(message, tuple):
            message, versions = message
            if versions != own_versions():
                theirs = ", ".join(f"{name} {number}" for name, number in versions.items())
                raise K2Error(
                    f"A machine of the cluster has other versions: {theirs}.", hint="Install the same versions as here."
                )
        return worker, message

    def kill(self, workers: Collection[int]) -> None:
        for worker in workers:
            with suppress(Exception):  # it is gone
                self.ray.kill(self.actors.pop(worker))
        self.placed.difference_update(workers)
        self.pending = {answer: worker for answer, worker in self.pending.items() if worker not in workers}

    def close(self) -> None:
        for worker in self.idle:
            with suppress(Exception):  # it is gone
                self.ray.get(self.actors[worker].clean_up.remote(), timeout=CLEANUP_TIMEOUT)
        super().close()
        if self.ray:
            with suppress(Exception):  # so is the cluster
                self.ray.shutdown()
            self.ray = None


class RemoteWorker:
    """A worker in an actor; the project's files are in a folder of its own."""

    def ping(self) -> None:
        """Answered as soon as the worker is placed."""

    def ready(
        self, model: ModelSpec, specs: Sequence[RenderSpec], files: Mapping[Path, bytes]
    ) -> tuple[Ready, dict[str, str]]:
        """Prepare for a run: unpack its files here, once the model is loaded. A worker killed before leaves none."""
        load_pipeline(model)
        self.folder = tempfile.TemporaryDirectory(prefix="k2-")
        local_paths = unpack_files(files, Path(self.folder.name))
        self.original_paths = {str(here): str(home) for home, here in local_paths.items()}
        self.worker = Worker(model, [relocate(spec, local_paths.__getitem__) for spec in specs])
        return self.worker.ready(model), own_versions()

    def clean_up(self) -> None:
        """Clean up: a killed worker cannot."""
        self.folder.cleanup()

    def render(self, group: Group) -> list[Picture]:
        return [Picture(each.image, self.with_original_paths(each.record)) for each in self.worker.render(group)]

    def with_original_paths(self, value: Any) -> Any:
        """A record, with its files' paths as they are where the run began."""
        if isinstance(value, Mapping):
            return {key: self.with_original_paths(each) for key, each in value.items()}
        if isinstance(value, list):
            return [self.with_original_paths(each) for each in value]
        return self.original_paths.get(value, value) if isinstance(value, str) else value


def check_port(address: str) -> None:
    """If an address names a port, check that somebody answers there: Ray tries for a minute and a half, silently.
    Raises K2Error."""
    match = re.fullmatch(r"(?:ray://)?\[?([^/]+?)\]?:(\d+)", address)
    if match is None:  # auto
        return
    try:
        socket.create_connection((match[1], int(match[2])), CONNECT_TIMEOUT).close()
    except (OSError, OverflowError, UnicodeError) as error:
        what = f"No Ray cluster answers at {address}: {getattr(error, 'strerror', None) or error}."
        raise Unreachable(what, hint="Start one with: ray start --head") from None


def unreachable(why: str) -> Unreachable:
    return Unreachable(f"The connection to the cluster was lost: {why}.", hint="Check the cluster, and try again.")


def last_line(error: Exception) -> str:
    """The last line of what Ray says, which is the reason; before it come traceback lines."""
    lines = str(error).strip().splitlines()
    return lines[-1].strip().rstrip(".") if lines else type(error).__name__


def own_versions() -> dict[str, str]:
    return {name: version(name) for name in VERSIONS}


def pack_files(specs: Sequence[RenderSpec]) -> dict[Path, bytes]:
    """The files of all pictures, each read once."""
    return {path: path.read_bytes() for path in {path for spec in specs for path in spec_files(spec)}}


def unpack_files(files: Mapping[Path, bytes], folder: Path) -> dict[Path, Path]:
    """Write the files, each in a numbered folder, in their order -> where each is now. An adapter's settings stay
    beside it, and both keep their names, or nobody would find them."""
    paths, numbers = {}, {path: f"{number:05}" for number, path in enumerate(sorted(files))}
    for path, data in files.items():
        weights = path.with_name(PEFT_WEIGHTS) if path.name == PEFT_SETTINGS else path
        paths[path] = folder / numbers.get(weights, numbers[path]) / path.name
        paths[path].parent.mkdir(exist_ok=True)
        paths[path].write_bytes(data)
    return paths


def relocate(spec: RenderSpec, moved: Callable[[Path], Path]) -> RenderSpec:
    """The spec with its files elsewhere."""
    return replace(
        spec,
        styles=tuple(
            replace(
                style,
                references=tuple(replace(each, image=moved(each.image)) for each in style.references),
                lora=moved(style.lora) if style.lora else None,
            )
            for style in spec.styles
        ),
        loras=tuple(replace(lora, path=moved(lora.path)) for lora in spec.loras),
        init_image=moved(spec.init_image) if spec.init_image else None,
        mask=moved(spec.mask) if isinstance(spec.mask, Path) else spec.mask,
    )
