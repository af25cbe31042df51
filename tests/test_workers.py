"""Workers: work is distributed by one rule to every kind, and the pictures are those of a single process."""

from __future__ import annotations

import errno
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import weakref
from collections.abc import Collection, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from k2cli import stdin_prompts, workers
from k2cli.toml_tables import Toml
from k2cli.workers import (
    MAX_TRIES,
    Group,
    Lost,
    Message,
    ModelSpec,
    ProcessPool,
    Ready,
    WorkerPool,
    distribute,
    load_pipeline,
    wanted_groups,
)
from model import library
from model.errors import K2Error
from model.spec import Picture

PICTURE = Image.new("RGB", (8, 8))


def test_ctrl_c_does_not_interrupt_the_fork_servers_import():
    """In a terminal it reaches all processes, and the one that workers are forked from would print a page about it."""
    code = """if __name__ == "__main__":
        import os, signal, threading
        from k2cli.workers import ModelSpec, ProcessPool
        signal.signal(signal.SIGINT, signal.default_int_handler)
        pool = ProcessPool(2)
        pool.begin_run([])
        threading.Timer(0.5, lambda: os.killpg(0, signal.SIGINT)).start()
        try:
            pool.acquire(ModelSpec("mini"))
            pool.next_message()
        except KeyboardInterrupt:
            print("pressed")"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, start_new_session=True)

    assert (done.returncode, done.stdout, done.stderr) == (0, "pressed\n", "")


def test_ctrl_c_waits_for_the_import_of_torch(monkeypatch):
    """Interrupted halfway, its modules raise something else, or abort the process."""

    class Slow(ModuleType):
        def __getattr__(self, name: str) -> object:
            if name == "Pipeline":
                signal.raise_signal(signal.SIGINT)
                whole.append(name)
            return None

    whole: list[str] = []
    monkeypatch.setitem(sys.modules, "model.pipeline", Slow("model.pipeline"))
    load_pipeline.cache_clear()

    with pytest.raises(KeyboardInterrupt):
        load_pipeline(ModelSpec("mini"))
    assert whole == ["Pipeline"]


def test_model_is_freed_before_the_next_is_loaded(fake, monkeypatch):
    """Two may not fit in memory. A model that was sped up refers to itself."""

    class Model:
        def __init__(self) -> None:
            self.itself = self

    def read(*_: object, **__: object) -> Model:
        still_there.append([known() is not None for known in models])
        models.append(weakref.ref(model := Model()))
        return model

    models: list[weakref.ref[Model]] = []
    still_there: list[list[bool]] = []
    monkeypatch.setattr(fake, "load", read)
    for held in (ModelSpec("mini"), ModelSpec("mini"), ModelSpec("mini", variant="turbo")):
        load_pipeline(held)

    assert still_there == [[], [False]]  # and the one wanted a second time is not loaded again


class Scripted(WorkerPool):
    """Workers in name only. Which of them reports next, and whether it is lost instead, is random."""

    size, where = 3, "in this test"

    def __init__(self, batches: list[int], seed: int, losing: float):
        super().__init__()
        self.batches, self.random, self.losing = batches, random.Random(seed), losing
        self.loading: list[int] = []
        self.at_work: dict[int, Group] = {}
        self.held: list[ModelSpec] = []

    def start(self, worker: int) -> None:
        assert len(self.models) < self.size

    def load(self, worker: int) -> None:
        assert worker not in self.at_work and worker not in self.loading
        self.held.append(self.models[worker])
        self.loading.append(worker)

    def submit(self, worker: int, group: Group) -> None:
        assert worker not in self.at_work and worker not in self.loading
        self.at_work[worker] = group

    def next_message(self):
        worker = self.random.choice([*self.loading, *self.at_work])
        if self.random.random() < self.losing:
            self.terminate([worker])
            return worker, Lost("struck")
        if worker in self.loading:
            self.loading.remove(worker)
            return worker, Ready(ModelSpec("mini", dtype="float32"), self.batches)
        return worker, [Picture(PICTURE, {"model": {}, "seed": index}) for index in self.at_work.pop(worker)]

    def kill(self, workers: Collection[int]) -> None:
        self.loading = [worker for worker in self.loading if worker not in workers]
        self.at_work = {worker: group for worker, group in self.at_work.items() if worker not in workers}

    def close(self) -> None:
        raise AssertionError("whoever started the workers ends them")


@given(st.lists(st.integers(1, 4), min_size=1, max_size=8), st.sets(st.integers(0, 31), min_size=1), st.integers())
def test_every_picture_comes_once_despite_lost_workers(batches, wanted, seed):
    wanted = {index for index in wanted if index < sum(batches)} or {0}
    pool = Scripted(batches, seed, losing=0.1)

    try:
        made = list(distribute(pool, ModelSpec("mini"), wanted))
    except K2Error as error:
        assert f"{MAX_TRIES} workers in this test were lost" in str(error)
        return
    assert sorted(index for index, _ in made) == sorted(wanted)
    assert all(picture.record["seed"] == index for index, picture in made)
    first = 1 + pool.held[1:].count(ModelSpec("mini"))
    assert set(pool.held[first:]) <= {ModelSpec("mini", dtype="float32")}  # as the first worker loaded the weights
    assert set(pool.idle) == set(pool.models) and not (pool.loading or pool.at_work)

    pool.losing, kept, hired = 0.0, len(pool.idle), pool.count
    # by the workers that were kept, and as many more as there is room for
    again = list(distribute(pool, ModelSpec("mini"), wanted))
    assert sorted(index for index, _ in again) == sorted(wanted)
    assert pool.count - hired <= pool.size - kept


def test_group_that_kills_every_worker_is_given_up():
    pool = Scripted([1], 0, losing=1.0)

    with pytest.raises(K2Error, match=f"{MAX_TRIES} workers in this test were lost loading the model: struck"):
        list(distribute(pool, ModelSpec("mini"), {0}))
    assert pool.count == MAX_TRIES


class Told(Scripted):
    """Workers whose messages are given beforehand."""

    def __init__(self, *news: tuple[int, Message]):
        super().__init__([], 0, losing=0.0)
        self.news, self.given = iter(news), list[tuple[int, Group]]()

    def submit(self, worker: int, group: Group) -> None:
        self.given.append((worker, group))

    def next_message(self):
        worker, news = next(self.news)
        if isinstance(news, Lost):
            self.terminate([worker])
        return worker, news


READY = Ready(ModelSpec("mini", dtype="float32"), [1, 1])
FIRST, SECOND = ([Picture(PICTURE, {"model": {}, "seed": seed})] for seed in (0, 1))


def test_worker_lost_while_idle_gets_no_more_work():
    lost = Lost("struck")
    pool = Told((1, READY), (2, READY), (1, FIRST), (1, lost), (2, lost), (3, READY), (3, SECOND))

    assert [index for index, _ in distribute(pool, ModelSpec("mini"), {0, 1})] == [0, 1]
    assert pool.given == [(1, (0,)), (2, (1,)), (3, (1,))] and pool.idle == [3]
    assert pool.held == [ModelSpec("mini"), READY.model, READY.model]


def test_idle_workers_lost_do_not_end_the_run():
    """Nor do workers lost before they have loaded, while another one works."""
    lost, ready = Lost("struck"), Ready(READY.model, [1] * MAX_TRIES + [1])
    made = [[Picture(PICTURE, {"model": {}, "seed": seed})] for seed in range(MAX_TRIES + 1)]
    others = range(2, MAX_TRIES + 2)
    pool = Told((1, ready), *((worker, ready) for worker in others), *((worker, made[worker - 1]) for worker in others),
                *((worker, lost) for worker in others), (1, made[0]))  # fmt: skip
    pool.size = MAX_TRIES + 1
    assert sorted(index for index, _ in distribute(pool, ModelSpec("mini"), set(range(MAX_TRIES + 1)))) == [
        *range(MAX_TRIES + 1)
    ]

    pool = Told((1, READY), (2, lost), (3, lost), (4, lost), (1, FIRST), (1, SECOND))
    pool.size = 2
    assert [index for index, _ in distribute(pool, ModelSpec("mini"), {0, 1})] == [0, 1]
    assert pool.count == 1 + MAX_TRIES  # and no more


def test_lost_workers_group_goes_to_an_idle_one():
    pool = Told((1, READY), (2, READY), (1, FIRST), (2, Lost("struck")), (1, SECOND))

    assert [index for index, _ in distribute(pool, ModelSpec("mini"), {0, 1})] == [0, 1]
    assert pool.given == [(1, (0,)), (2, (1,)), (1, (1,))] and pool.count == 2


def test_lost_workers_group_is_rendered_next():
    """A group that kills every worker is found out early, not after everything else is rendered."""
    ready = Ready(READY.model, [1, 1, 1])
    pool = Told((1, ready), (2, ready), (1, Lost("struck")), (2, SECOND), (2, FIRST), (2, SECOND))
    pool.size = 2

    list(distribute(pool, ModelSpec("mini"), {0, 1, 2}))
    assert pool.given == [(1, (0,)), (2, (1,)), (2, (0,)), (2, (2,))]


def test_idle_worker_with_the_weights_is_preferred():
    """Over one that would have to unload other weights and load these."""
    pool = Told()
    mini, other = ModelSpec("mini"), ModelSpec("other")
    hired = [pool.acquire(held) for held in (other, mini)]
    pool.loading.clear()
    pool.end_run(hired)

    assert [pool.acquire(mini), pool.acquire(mini)] == [2, 1]


def test_no_more_workers_start_than_there_is_work_for():
    pool = Told((1, READY), (1, FIRST))

    assert len(list(distribute(pool, ModelSpec("mini"), {0}))) == pool.count == 1


def test_groups_are_the_batches_of_the_whole_run():
    assert wanted_groups([3, 1, 2], {1, 4}) == [(0, 1, 2), (4, 5)]
    assert wanted_groups([3, 1, 2], range(6)) == [(0, 1, 2), (3,), (4, 5)]


needs_weights = pytest.mark.skipif("mini" not in library.bundled_models(), reason="there are no bundled weights yet")
PROJECT = """\
[render]
steps = 1
batch = 2

[[prompt]]
text = "a red fox"
size = "64x64"

[[prompt]]
text = "an owl"
size = "64x96"

[[prompt]]
text = "a sailboat"
size = "96x64"
"""


@pytest.fixture
def den(tmp_path, monkeypatch) -> Iterator[Path]:
    """A project for the bundled model, rendered with one thread everywhere."""
    import torch

    (tmp_path / "k2.toml").write_text(PROJECT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    workers.load_pipeline.cache_clear()
    yield tmp_path
    torch.set_num_threads(threads)
    workers.load_pipeline.cache_clear()


def made(folder: Path) -> dict[str, dict]:
    """The records of a run, without times."""
    tables = {path.name: Toml.read(path, path.name).table for path in folder.glob("*-*.toml")}
    return {name: {k: v for k, v in table.items() if k not in ("created", "seconds")} for name, table in tables.items()}


@needs_weights
def test_workers_render_what_one_process_renders(den, k2):
    """Even if some are killed: others render their pictures again. Pictures of one size are one batch."""
    k2("render", "--quiet")
    hire, give, given_to = ProcessPool.acquire, ProcessPool.submit, []

    def hire_but_kill_the_first(pool: ProcessPool, held: ModelSpec) -> int:
        worker = hire(pool, held)
        if worker == 1:
            os.kill(pool.processes[worker][0].pid, signal.SIGKILL)
        return worker

    def give_but_kill_the_second(pool: ProcessPool, worker: int, group: Group) -> None:
        give(pool, worker, group)
        given_to.append(worker)
        if len(given_to) == 2:
            os.kill(pool.processes[worker][0].pid, signal.SIGKILL)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ProcessPool, "acquire", hire_but_kill_the_first)
        patch.setattr(ProcessPool, "submit", give_but_kill_the_second)
        result = k2("render", "--quiet", "--workers", "2")

    assert len(given_to) == 4  # three batches, one of them twice
    local, spread_out = sorted((den / "outputs").iterdir())
    assert made(local) == made(spread_out) and len(made(local)) == 6
    assert (spread_out / "sheet.png").exists()
    assert sorted(result.stdout.splitlines()) == sorted(f"outputs/{spread_out.name}/{n[:-5]}.png" for n in made(local))


@needs_weights
def test_workers_are_kept_between_stream_lines(den, k2, monkeypatch):
    """One that is lost in between is replaced; after the last line all have ended."""
    started: list[tuple[ProcessPool, int]] = []
    start = ProcessPool.start

    def watched(pool: ProcessPool, worker: int) -> None:
        started.append((pool, worker))
        start(pool, worker)

    def lines() -> Iterator[bytes]:
        yield b"a red fox"
        yield b"an owl"
        (pool, worker), *more = started
        assert not more
        os.kill(pool.processes[worker][0].pid, signal.SIGKILL)
        yield b"a sailboat"

    monkeypatch.setattr(ProcessPool, "start", watched)
    monkeypatch.setattr(stdin_prompts, "input_lines", lines)
    result = k2("render", "--stream", "--workers", "2", "--quiet", "--size", "64x64")

    assert len(result.stdout.splitlines()) == 6
    (pool, first), (same, second) = started
    assert pool is same and (first, second) == (1, 2) and pool.processes == {}


def unmanned(size: int) -> tuple[ProcessPool, list[tuple[int, int]]]:
    """Workers whose processes do nothing, and the threads and the slot that each is given."""

    class Idle:
        exitcode = 0

        def __init__(self, target, args, daemon):
            _, threads, seat = args
            given.append((threads, seat))

        def start(self):
            pass

        kill = join = start

    given: list[tuple[int, int]] = []
    pool = ProcessPool(size)
    pool.context = SimpleNamespace(get_start_method=lambda: "spawn", Pipe=multiprocessing.Pipe, Process=Idle)
    pool.begin_run([])
    return pool, given


@pytest.mark.parametrize(("platform", "method"), [("linux", "forkserver"), ("darwin", "spawn"), ("win32", "spawn")])
def test_workers_are_forked_only_where_that_is_safe(platform, method, monkeypatch):
    """Metal hangs or crashes in a forked process."""
    methods = ["spawn"] if platform == "win32" else ["fork", "spawn", "forkserver"]
    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: methods)
    monkeypatch.setattr(sys, "platform", platform)

    assert ProcessPool(2).context.get_start_method() == method


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (EOFError(), "the process that starts them has ended"),
        (ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"), "the process that starts them has ended"),
        (BlockingIOError(errno.EAGAIN, "No more processes"), "No more processes"),
    ],
)
def test_unstartable_workers_count_as_lost(error, why, monkeypatch):
    """As when the process that they are forked from is killed while it imports torch."""
    monkeypatch.setattr(workers, "SERVER_EXIT_DELAY", 0.0)
    pool, given = unmanned(2)

    def start(self):
        raise error

    pool.context.Process.start = start
    with pytest.raises(K2Error, match=f"{MAX_TRIES} workers on this machine were lost loading the model: {why}"):
        list(distribute(pool, ModelSpec("mini"), {0}))
    assert len(given) == MAX_TRIES and pool.processes == pool.slots == {}


@pytest.mark.skipif(workers.start_method() == "spawn", reason="workers are not forked here")
def test_long_temporary_path_does_not_prevent_workers(tmp_path):
    """It cannot hold the socket through which they would be forked."""
    code = """if __name__ == "__main__":
        from k2cli.workers import ModelSpec, ProcessPool
        pool = ProcessPool(2)
        pool.begin_run([])
        pool.acquire(ModelSpec("mini", device="cuda:99"))
        print(pool.next_message())
        pool.close()"""
    (folder := tmp_path / ("t" * 120)).mkdir()
    environment = os.environ | {"TMPDIR": str(folder)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)

    assert (done.returncode, done.stderr) == (0, "") and "K2Error(" in done.stdout


def test_new_workers_take_the_slots_of_lost_ones():
    pool, given = unmanned(3)
    _, second, _ = (pool.acquire(ModelSpec("mini")) for _ in range(3))
    pool.terminate([second])
    pool.acquire(ModelSpec("mini"))
    pool.close()
    pool.acquire(ModelSpec("mini"))

    assert [seat for _, seat in given] == [0, 1, 2, 1, 0]
    pool.close()


@pytest.mark.parametrize(("cores", "size", "threads"), [(8, 1, 8), (8, 3, 2), (2, 4, 1)])
def test_workers_share_the_cores(cores, size, threads, monkeypatch):
    """Together they use no more threads than one process would, but each has at least one."""
    monkeypatch.setattr(workers, "core_count", lambda: cores)
    pool, given = unmanned(size)
    for _ in range(size):
        pool.acquire(ModelSpec("mini"))
    pool.close()

    assert [each for each, _ in given] == [threads] * size


@pytest.mark.parametrize(("said", "taken"), [(None, [3]), ("2", [])])
def test_worker_takes_its_share_of_threads_unless_the_user_set_it(said, taken, monkeypatch):
    import torch

    class Over:
        def recv(self):
            raise EOFError

    counts: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", counts.append)
    monkeypatch.setattr(workers, "end_with_parent", lambda: None)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if said:
        monkeypatch.setenv("OMP_NUM_THREADS", said)

    workers.run_worker(Over(), 3, slot=0)

    assert counts == taken


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="processes cannot be limited to some cores here")
def test_cores_are_those_the_process_may_use(monkeypatch):
    """As on a shared node, or under taskset; k2 doctor counts the same."""
    from k2cli import doctor

    monkeypatch.setattr("model.fast.measure_speed", lambda dtype: 1.0)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 4, 5})
    assert workers.core_count() == doctor.examine()["cpu"]["cores"] == 3


@pytest.mark.parametrize(
    ("device", "seat", "cards", "chosen"),
    [(None, 0, 2, [0]), ("cuda", 3, 2, [1]), ("cuda:1", 2, 4, []), ("cpu", 1, 2, []), (None, 1, 0, [])],
)
def test_workers_take_the_gpus_in_turn(device, seat, cards, chosen, monkeypatch):
    """Unless they are told which; on a machine without GPUs, or on its CPU, they ask for none."""
    import torch

    class Pipe:
        orders = iter([(ModelSpec("mini", device=device), [])])
        send = print

        def recv(self):
            try:
                return next(self.orders)
            except StopIteration:
                raise EOFError from None

    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cards)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(workers, "Worker", lambda held, specs: SimpleNamespace(ready=lambda held: (held, list(taken))))
    monkeypatch.setattr(workers, "end_with_parent", lambda: None)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    workers.run_worker(Pipe(), 1, seat)

    assert taken == chosen


@needs_weights
def test_workers_end_with_a_killed_parent():
    """In the middle of a picture that nobody waits for any more; the output stays open as long as one of them lives."""
    code = """if __name__ == "__main__":
        import os, signal
        from k2cli.workers import ModelSpec, ProcessPool
        from model.spec import RenderSpec
        pool = ProcessPool(1)
        pool.begin_run([RenderSpec("a red fox", steps=1000)])
        worker = pool.acquire(ModelSpec("mini"))
        pool.next_message()
        pool.submit(worker, (0,))
        os.kill(os.getpid(), signal.SIGKILL)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60)

    assert done.returncode == -signal.SIGKILL


@needs_weights
def test_worker_reports_errors_in_one_sentence(den, k2):
    result = k2("render", "--quiet", "--workers", "2", "--device", "cuda:99", code=1)

    assert 'There is no device "cuda:99".' in result.stderr and len(result.stderr.splitlines()) == 2
    assert not (den / "outputs").exists()
