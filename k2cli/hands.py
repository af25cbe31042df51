"""What renders a run: this process, worker processes, or a cluster. The results are the same.

A hand is a worker: a pipeline somewhere that has all specs of a run and renders the groups it is given. A crew hires
hands, hears from them, and keeps them from run to run, so that weights are read once. How groups are handed out, and
what happens when a hand is lost, is the same for every crew: `spread`.
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
from k2cli.disk import undisturbed
from k2cli.models import Held
from model.errors import K2Error
from model.spec import Picture, RenderSpec

if TYPE_CHECKING:
    from model.pipeline import Pipeline

TRIES = 3  # of a group whose hands keep getting lost: something about it kills them
DYING = 0.5  # seconds until the system, too, sees that the fork server is gone, so that it is started again

Group = tuple[int, ...]  # places in the run's list of specs
OnStep = Callable[[int, int], None]  # (steps done, steps in all) of the pictures being rendered


class Unreachable(K2Error):
    """The crew cannot be reached, or has no room: nor will it for the runs that come next."""


@lru_cache(maxsize=1)
def load(held: Held) -> Pipeline:
    """Load the weights; projects rendered one after another share them, and different ones do not pile up in memory."""
    licence.require_for(held.name, held.variant)
    if load.cache_info().currsize:
        load.cache_clear()  # before the next one is read: two may not fit
        gc.collect()  # an accelerated network refers to itself
    with undisturbed():  # interrupting torch's import raises something else, or aborts
        from model.pipeline import Pipeline  # which imports torch

    return Pipeline.load(
        held.name,
        variant=held.variant,
        device=held.device,
        dtype=held.dtype,
        precision=held.precision,
        offload=held.offload,
    )


def check_device(held: Held) -> None:
    """Refuse, before runs begin, a device that this machine lacks. Raises K2Error."""
    if held.device not in (None, "cpu"):  # else torch may be imported later
        with undisturbed():
            from model.parts import pick_device
        pick_device(held.device)


class Hand:
    """The far end: one pipeline, and all specs of a run, each checked before the first is rendered."""

    def __init__(self, held: Held, specs: Sequence[RenderSpec]):
        self.pipeline, self.specs = load(held), specs
        self.batches = self.pipeline.batches(specs)

    def make(self, group: Group, on_step: OnStep | None = None) -> Iterator[Picture]:
        return self.pipeline.stream([self.specs[index] for index in group], on_step=on_step)

    def ready(self, held: Held) -> Ready:
        """How this pipeline is actually held, and its batches."""
        plan, device = self.pipeline.plan, held.device or str(self.pipeline.device)
        held = replace(held, device=device, dtype=plan.dtype, precision=plan.precision, offload=plan.offload)
        return Ready(held, self.batches)


def groups_of(batches: Sequence[int], wanted: Collection[int]) -> list[Group]:
    """The batches of a complete run in which something is wanted.

    They are rendered as in an uninterrupted run by one process: in another batch, a picture may differ in the last bits
    of its numbers.
    """
    ends = list(accumulate(batches))
    groups = (tuple(range(end - size, end)) for size, end in zip(batches, ends, strict=True))
    return [group for group in groups if any(index in wanted for index in group)]


def make_here(
    held: Held, specs: Sequence[RenderSpec], wanted: Collection[int], on_step: OnStep | None
) -> Iterator[tuple[int, Picture]]:
    """Render what is wanted of a run in this process -> pictures with their places."""
    hand = Hand(held, specs)
    for group in groups_of(hand.batches, wanted):
        for index, picture in zip(group, hand.make(group, on_step), strict=True):
            if index in wanted:
                yield index, picture


# ---- the near end -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ready:
    """A hand has loaded its pipeline, which is held like this, and would render the run in these batches."""

    held: Held
    batches: list[int]


@dataclass(frozen=True)
class Lost:
    """A hand is gone, with whatever it was rendering."""

    why: str


News = Ready | list[Picture] | Lost | Exception


class Crew(ABC):
    """Hands of one kind, known by numbers; their news arrives in the order in which it happens."""

    size: int  # hands at work at a time
    where: str  # for messages
    here = True  # on this machine, and its devices

    def __init__(self) -> None:
        self.holds: dict[int, Held] = {}  # every hand, and what it was told to hold
        self.kept: list[int] = []  # idle hands of earlier runs
        self.hired = 0

    def begin(self, specs: Sequence[RenderSpec]) -> None:
        """Begin a run, for which hands are hired from now on. Raises K2Error."""
        self.specs = specs

    def hire(self, held: Held) -> int:
        """Have a hand load a pipeline, if possible one that still holds it from an earlier run -> its number."""
        hand = min(self.kept, key=lambda each: self.holds[each] != held, default=None)
        if hand is None:
            self.hired += 1
            self.start(hand := self.hired)
        else:
            self.kept.remove(hand)
        self.holds[hand] = held
        self.load(hand)
        return hand

    def keep(self, idle: Collection[int]) -> None:
        """The run is done: idle hands stay, and the others go, as they would still send answers for it."""
        self.kept = [hand for hand in self.holds if hand in idle or hand in self.kept]
        self.dismiss(set(self.holds) - set(self.kept))

    def dismiss(self, hands: Collection[int]) -> None:
        """End these hands at once; those that are lost are forgotten."""
        self.stop(hands)
        for hand in hands:
            del self.holds[hand]
        self.kept = [hand for hand in self.kept if hand in self.holds]

    def close(self) -> None:
        """Dismiss all hands."""
        self.dismiss(set(self.holds))

    @abstractmethod
    def start(self, hand: int) -> None:
        """Start a hand with this number, somewhere."""

    @abstractmethod
    def load(self, hand: int) -> None:
        """Have it load the pipeline that it is to hold, and answer with Ready for the run."""

    @abstractmethod
    def give(self, hand: int, group: Group) -> None:
        """Give a group to a hand that is ready and idle."""

    @abstractmethod
    def hear(self) -> tuple[int, News]:
        """Wait for the next news of any hand; one that is lost is dismissed."""

    @abstractmethod
    def stop(self, hands: Collection[int]) -> None:
        """End them, whatever they are doing."""


def spread(crew: Crew, held: Held, wanted: Collection[int]) -> Iterator[tuple[int, Picture]]:
    """Render what is wanted of a run with a crew -> pictures with their places, as they are finished; each once.

    The first hand decides how the weights are held and what is rendered together; the others follow. What a lost hand
    was rendering is rendered again by another. Raises K2Error.
    """
    left, at_work, losses = deque[Group](), dict[int, Group](), Counter[Group]()  # () stands for loading
    idle: list[int] = []
    agreed: Held | None = None
    weights: Any = None
    loading = {crew.hire(held)}
    while agreed is None or left or at_work:
        hand, news = crew.hear()
        if isinstance(news, Exception):
            raise news
        group = at_work.pop(hand, ())
        if isinstance(news, Lost):
            idle = [each for each in idle if each != hand]
            left.extendleft([group] if group else [])
            losses[group] += bool(group) or hand in loading
            loading.discard(hand)
            alone = not (at_work or idle or loading)
            if losses[group] >= TRIES and (group or alone):  # without one that cannot load, others may go on
                over = "rendering the same pictures" if group else "loading the model"
                raise K2Error(
                    f"{losses[group]} workers {crew.where} were lost {over}: {news.why}.",
                    hint="There may be too little memory for so many: try fewer, or none.",
                )
            if (alone and (agreed is None or left)) or (left and not idle and losses[()] < TRIES):
                loading.add(crew.hire(agreed or held))
        elif isinstance(news, Ready):
            if agreed is None:
                agreed = news.held
                left.extend(groups_of(news.batches, wanted))
                loading |= {crew.hire(agreed) for _ in range(min(crew.size, len(left)) - 1)}
            loading.discard(hand)
            losses.pop((), None)
            idle.append(hand)
        else:
            for index, picture in zip(group, news, strict=True):
                weights = weights or picture.record["model"]
                if picture.record["model"] != weights:
                    raise K2Error(
                        f"A worker {crew.where} has different weights from the rest.", hint="Install the same weights."
                    )
                if index in wanted:
                    yield index, picture
            idle.append(hand)
        while left and idle:
            hand = idle.pop()
            at_work[hand] = left.popleft()
            crew.give(hand, at_work[hand])
    crew.keep(idle)


# ---- processes of this machine ----------------------------------------------------------------------------------


def cores() -> int:
    """How many cores this process may use: a cluster, a container or taskset may allow fewer than exist."""
    if sys.version_info >= (3, 13):
        return os.process_cpu_count() or 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def start_method() -> str:
    """How processes start: forked from one that has torch, which is quick; afresh where Metal may be used, which does
    not survive a fork, and where fork does not exist."""
    forks = sys.platform != "darwin" and "forkserver" in multiprocessing.get_all_start_methods()
    return "forkserver" if forks else "spawn"


class Processes(Crew):
    """Hands that are processes on this machine. They end with this one, however it ends."""

    where = "on this machine"

    def __init__(self, size: int):
        super().__init__()
        self.size = size
        self.context: Any = multiprocessing.get_context(start_method())
        self.hands: dict[int, tuple[Any, Connection]] = {}  # None for a process that could not be started
        self.seats: dict[int, int] = {}  # each hand's, from 0; a lost hand's seat goes to the next

    def start(self, hand: int) -> None:
        if self.context.get_start_method() == "forkserver":  # torch is imported once for all
            self.context.set_forkserver_preload(["model.pipeline"])
            try:
                start_server()
            except OSError:  # the temporary folder's path may be too long for its socket
                self.context = multiprocessing.get_context("spawn")
        ours, theirs = self.context.Pipe()
        threads = max(1, cores() // self.size)
        self.seats[hand] = next(seat for seat in count() if seat not in self.seats.values())
        process: Any = self.context.Process(target=work, args=(theirs, threads, self.seats[hand]), daemon=True)
        try:
            with installed_modules_only():
                process.start()
        except (EOFError, ConnectionError):
            theirs.send(Lost("the process that starts them has ended"))
            process = None
            time.sleep(DYING)
        except OSError as error:
            theirs.send(Lost(str(error.strerror)))
            process = None
        theirs.close()
        self.hands[hand] = process, ours

    def load(self, hand: int) -> None:
        self.send(hand, (self.holds[hand], self.specs))

    def give(self, hand: int, group: Group) -> None:
        self.send(hand, group)

    def send(self, hand: int, order: Any) -> None:
        with suppress(OSError):  # it is gone, which `hear` will find
            self.hands[hand][1].send(order)

    def hear(self) -> tuple[int, News]:
        by_pipe: dict[Any, int] = {pipe: hand for hand, (_, pipe) in self.hands.items()}
        pipe: Any = wait(list(by_pipe))[0]  # another class on Windows
        hand = by_pipe[pipe]
        try:
            news = pipe.recv()
            if isinstance(news, Lost):  # before it began
                self.dismiss([hand])
            return hand, news
        except (EOFError, OSError):
            process, _ = self.hands[hand]
            process.join()
            self.dismiss([hand])
            code = process.exitcode
            return hand, Lost(f"ended by signal {-code}" if code and code < 0 else f"ended with {code}")

    def stop(self, hands: Collection[int]) -> None:
        ending = [self.hands.pop(hand) for hand in hands if hand in self.hands]  # gone if Ctrl-C cut this off before
        self.seats = {hand: seat for hand, seat in self.seats.items() if hand in self.hands}
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


def work(pipe: Connection, threads: int, seat: int) -> None:
    """The life of a hand in a process: for each run it receives what to hold and the specs, then groups.

    By their seats, hands take the machine's GPUs in turn, unless told one by its number.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal; the main process decides
    threading.Thread(target=end_with_parent, daemon=True).start()
    try:
        import torch

        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(threads)
        while True:
            match pipe.recv():
                case (Held() as held, specs):
                    if held.device in (None, "cuda") and (cards := torch.cuda.device_count()):
                        torch.cuda.set_device(seat % cards)
                    hand = Hand(held, specs)
                    pipe.send(hand.ready(held))
                case group:
                    pipe.send(list(hand.make(group)))
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
