"""What renders a run: this process, worker processes, or a cluster. The results are the same.

A worker is a pipeline somewhere that has all specs of a run and renders the groups it is given. A pool starts workers,
receives their messages, and keeps them from run to run, so that weights are read once. How groups are distributed, and
what happens when a worker is lost, is the same for every pool: `distribute`.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate, count
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any

from k2cli import licence
from k2cli.disk import uninterrupted
from k2cli.models import ModelSpec
from model.errors import K2Error
from model.spec import Picture, RenderSpec

if TYPE_CHECKING:
    from model.pipeline import Pipeline

MAX_TRIES = 3  # of a group whose workers keep getting lost: something about it kills them
SERVER_EXIT_DELAY = 0.5  # seconds until the system, too, sees that the fork server is gone, so that it is started again

Group = tuple[int, ...]  # places in the run's list of specs
OnStep = Callable[[int, int], None]  # (steps done, steps in all) of the pictures being rendered


class Unreachable(K2Error):
    """The pool cannot be reached, or has no room: nor will it for the runs that come next."""


@lru_cache(maxsize=1)
def load_pipeline(model: ModelSpec) -> Pipeline:
    """Load the weights; projects rendered one after another share them, and different ones do not pile up in memory."""
    licence.require_for_model(model.name, model.variant)
    if load_pipeline.cache_info().currsize:
        load_pipeline.cache_clear()  # before the next one is read: two may not fit
        gc.collect()  # an accelerated network refers to itself
    with uninterrupted():  # interrupting torch's import raises something else, or aborts
        from model.pipeline import Pipeline  # which imports torch

    return Pipeline.load(
        model.name,
        variant=model.variant,
        device=model.device,
        dtype=model.dtype,
        precision=model.precision,
        offload=model.offload,
    )


def check_device(model: ModelSpec) -> None:
    """Refuse, before runs begin, a device that this machine lacks. Raises K2Error."""
    if model.device not in (None, "cpu"):  # else torch may be imported later
        with uninterrupted():
            from model.parts import pick_device
        pick_device(model.device)


class Worker:
    """The far end: one pipeline, and all specs of a run, each checked before the first is rendered."""

    def __init__(self, model: ModelSpec, specs: Sequence[RenderSpec]):
        self.pipeline, self.specs = load_pipeline(model), specs
        self.batches = self.pipeline.batches(specs)

    def render(self, group: Group, on_step: OnStep | None = None) -> Iterator[Picture]:
        return self.pipeline.stream([self.specs[index] for index in group], on_step=on_step)

    def ready(self, model: ModelSpec) -> Ready:
        """How this pipeline is actually held, and its batches."""
        plan, device = self.pipeline.plan, model.device or str(self.pipeline.device)
        model = replace(model, device=device, dtype=plan.dtype, precision=plan.precision, offload=plan.offload)
        return Ready(model, self.batches)


def wanted_groups(batches: Sequence[int], wanted: Collection[int]) -> list[Group]:
    """The batches of a complete run in which something is wanted.

    They are rendered as in an uninterrupted run by one process: in another batch, a picture may differ in the last bits
    of its numbers.
    """
    ends = list(accumulate(batches))
    groups = (tuple(range(end - size, end)) for size, end in zip(batches, ends, strict=True))
    return [group for group in groups if any(index in wanted for index in group)]


def render_here(
    model: ModelSpec, specs: Sequence[RenderSpec], wanted: Collection[int], on_step: OnStep | None
) -> Iterator[tuple[int, Picture]]:
    """Render what is wanted of a run in this process -> pictures with their places."""
    worker = Worker(model, specs)
    for group in wanted_groups(worker.batches, wanted):
        for index, picture in zip(group, worker.render(group, on_step), strict=True):
            if index in wanted:
                yield index, picture


# ---- the near end -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ready:
    """A worker has loaded its pipeline, which is held like this, and would render the run in these batches."""

    model: ModelSpec
    batches: list[int]


@dataclass(frozen=True)
class Lost:
    """A worker is gone, with whatever it was rendering."""

    reason: str


Message = Ready | list[Picture] | Lost | Exception


class WorkerPool(ABC):
    """Workers of one kind, known by numbers; their messages arrive in the order in which they are sent."""

    size: int  # workers at work at a time
    where: str  # for messages
    is_local = True  # on this machine, and its devices

    def __init__(self) -> None:
        self.models: dict[int, ModelSpec] = {}  # every worker, and what it was told to hold
        self.idle: list[int] = []  # idle workers of earlier runs
        self.count = 0

    def begin_run(self, specs: Sequence[RenderSpec]) -> None:
        """Begin a run, for which workers are acquired from now on. Raises K2Error."""
        self.specs = specs

    def acquire(self, model: ModelSpec) -> int:
        """Have a worker load a pipeline, if possible one that still holds it from an earlier run -> its number."""
        worker = min(self.idle, key=lambda each: self.models[each] != model, default=None)
        if worker is None:
            self.count += 1
            self.start(worker := self.count)
        else:
            self.idle.remove(worker)
        self.models[worker] = model
        self.load(worker)
        return worker

    def end_run(self, idle: Collection[int]) -> None:
        """The run is done: idle workers stay, and the others go, as they would still send answers for it."""
        self.idle = [worker for worker in self.models if worker in idle or worker in self.idle]
        self.terminate(set(self.models) - set(self.idle))

    def terminate(self, workers: Collection[int]) -> None:
        """End these workers at once; those that are lost are forgotten."""
        self.kill(workers)
        for worker in workers:
            del self.models[worker]
        self.idle = [worker for worker in self.idle if worker in self.models]

    def close(self) -> None:
        """End all workers."""
        self.terminate(set(self.models))

    @abstractmethod
    def start(self, worker: int) -> None:
        """Start a worker with this number, somewhere."""

    @abstractmethod
    def load(self, worker: int) -> None:
        """Have it load the pipeline that it is to hold, and answer with Ready for the run."""

    @abstractmethod
    def submit(self, worker: int, group: Group) -> None:
        """Give a group to a worker that is ready and idle."""

    @abstractmethod
    def next_message(self) -> tuple[int, Message]:
        """Wait for the next message of any worker; one that is lost is terminated."""

    @abstractmethod
    def kill(self, workers: Collection[int]) -> None:
        """End them, whatever they are doing."""


def distribute(pool: WorkerPool, model: ModelSpec, wanted: Collection[int]) -> Iterator[tuple[int, Picture]]:
    """Render what is wanted of a run with a pool -> pictures with their places, as they are finished; each once.

    The first worker decides how the weights are held and what is rendered together; the others follow. What a lost
    worker was rendering is rendered again by another. Raises K2Error.
    """
    queue, busy, losses = deque[Group](), dict[int, Group](), Counter[Group]()  # () stands for loading
    idle: list[int] = []
    agreed: ModelSpec | None = None
    weights: Any = None
    loading = {pool.acquire(model)}
    while agreed is None or queue or busy:
        worker, message = pool.next_message()
        if isinstance(message, Exception):
            raise message
        group = busy.pop(worker, ())
        if isinstance(message, Lost):
            idle = [each for each in idle if each != worker]
            queue.extendleft([group] if group else [])
            losses[group] += bool(group) or worker in loading
            loading.discard(worker)
            no_others = not (busy or idle or loading)
            if losses[group] >= MAX_TRIES and (group or no_others):  # without one that cannot load, others may go on
                over = "rendering the same pictures" if group else "loading the model"
                raise K2Error(
                    f"{losses[group]} workers {pool.where} were lost {over}: {message.reason}.",
                    hint="There may be too little memory for so many: try fewer, or none.",
                )
            if (no_others and (agreed is None or queue)) or (queue and not idle and losses[()] < MAX_TRIES):
                loading.add(pool.acquire(agreed or model))
        elif isinstance(message, Ready):
            if agreed is None:
                agreed = message.model
                queue.extend(wanted_groups(message.batches, wanted))
                loading |= {pool.acquire(agreed) for _ in range(min(pool.size, len(queue)) - 1)}
            loading.discard(worker)
            losses.pop((), None)
            idle.append(worker)
        else:
            for index, picture in zip(group, message, strict=True):
                weights = weights or picture.record["model"]
                if picture.record["model"] != weights:
                    raise K2Error(
                        f"A worker {pool.where} has different weights from the rest.", hint="Install the same weights."
                    )
                if index in wanted:
                    yield index, picture
            idle.append(worker)
        while queue and idle:
            worker = idle.pop()
            busy[worker] = queue.popleft()
            pool.submit(worker, busy[worker])
    pool.end_run(idle)


# ---- processes of this machine ----------------------------------------------------------------------------------


def core_count() -> int:
    """How many cores this process may use: a cluster, a container or taskset may allow fewer than exist."""
    if sys.version_info >= (3, 13):
        return os.process_cpu_count() or 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def start_method() -> str:
    """How processes start: forked from one that has torch, which is quick; afresh where Metal may be used, which does
    not survive a fork, and where fork does not exist."""
    forks = sys.platform != "darwin" and "forkserver" in multiprocessing.get_all_start_methods()
    return "forkserver" if forks else "spawn"


class ProcessPool(WorkerPool):
    """Workers that are processes on this machine. They end with this one, however it ends."""

    where = "on this machine"

    def __init__(self, size: int):
        super().__init__()
        self.size = size
        self.context: Any = multiprocessing.get_context(start_method())
        self.processes: dict[int, tuple[Any, Connection]] = {}  # None for a process that could not be started
        self.slots: dict[int, int] = {}  # each worker's, from 0; a lost worker's slot goes to the next

    def start(self, worker: int) -> None:
        if self.context.get_start_method() == "forkserver":  # torch is imported once for all
            self.context.set_forkserver_preload(["model.pipeline"])
            try:
                start_server()
            except OSError:  # the temporary folder's path may be too long for its socket
                self.context = multiprocessing.get_context("spawn")
        ours, theirs = self.context.Pipe()
        threads = max(1, core_count() // self.size)
        self.slots[worker] = next(slot for slot in count() if slot not in self.slots.values())
        process: Any = self.context.Process(target=run_worker, args=(theirs, threads, self.slots[worker]), daemon=True)
        try:
            with installed_modules_only():
                process.start()
        except (EOFError, ConnectionError):
            theirs.send(Lost("the process that starts them has ended"))
            process = None
            time.sleep(SERVER_EXIT_DELAY)
        except OSError as error:
            theirs.send(Lost(str(error.strerror)))
            process = None
        theirs.close()
        self.processes[worker] = process, ours

    def load(self, worker: int) -> None:
        self.send(worker, (self.models[worker], self.specs))

    def submit(self, worker: int, group: Group) -> None:
        self.send(worker, group)

    def send(self, worker: int, message: Any) -> None:
        with suppress(OSError):  # it is gone, which `next_message` will find
            self.processes[worker][1].send(message)

    def next_message(self) -> tuple[int, Message]:
        by_pipe: dict[Any, int] = {pipe: worker for worker, (_, pipe) in self.processes.items()}
        pipe: Any = wait(list(by_pipe))[0]  # another class on Windows
        worker = by_pipe[pipe]
        try:
            message = pipe.recv()
            if isinstance(message, Lost):  # before it began
                self.terminate([worker])
            return worker, message
        except (EOFError, OSError):
            process, _ = self.processes[worker]
            process.join()
            self.terminate([worker])
            code = process.exitcode
            return worker, Lost(f"ended by signal {-code}" if code and code < 0 else f"ended with {code}")

    def kill(self, workers: Collection[int]) -> None:
        here = [worker for worker in workers if worker in self.processes]  # the others if Ctrl-C cut this off before
        ending = [self.processes.pop(worker) for worker in here]
        self.slots = {worker: slot for worker, slot in self.slots.items() if worker in self.processes}
        begun = [process for process, _ in ending if process is not None]
        for process in begun:
            process.kill()  # it has nothing of its own to lose
        for process in begun:
            process.join()
        for _, pipe in ending:
            pipe.close()


def start_server() -> None:
    """Start the process that workers are forked from, deaf to Ctrl-C, which reaches every process of a terminal: torch,
    interrupted during its import there, would print a long traceback."""
    from multiprocessing import forkserver, resource_tracker

    with installed_modules_only():
        resource_tracker.ensure_running()  # first, as it unblocks the signal
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            forkserver.ensure_running()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def installed_modules_only() -> Iterator[None]:
    """Interpreters that start meanwhile import nothing from the current folder: a project there may be a stranger's.

    multiprocessing starts them with `-c`, with which Python would search there first, even for its own modules.
    """
    before = os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONSAFEPATH"]
        else:
            os.environ["PYTHONSAFEPATH"] = before


def run_worker(pipe: Connection, threads: int, slot: int) -> None:
    """The life of a worker in a process: for each run it receives what to hold and the specs, then groups.

    By their slots, workers take the machine's GPUs in turn, unless told one by its number.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal; the main process decides
    threading.Thread(target=end_with_parent, daemon=True).start()
    try:
        import torch

        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(threads)
        while True:
            match pipe.recv():
                case (ModelSpec() as model, specs):
                    if model.device in (None, "cuda") and (gpus := torch.cuda.device_count()):
                        torch.cuda.set_device(slot % gpus)
                    worker = Worker(model, specs)
                    pipe.send(worker.ready(model))
                case group:
                    pipe.send(list(worker.render(group)))
    except EOFError:
        return
    except K2Error as error:
        pipe.send(error)
    except Exception:
        pipe.send(RuntimeError(f"a worker failed:\n{traceback.format_exc()}"))


def end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
