"""Who makes pictures: dealt out by one rule to hands of every kind, and the same as one process makes."""

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

from k2cli import hands, stream
from k2cli.hands import TRIES, Crew, Group, Held, Lost, News, Processes, Ready, groups_of, load, spread
from k2cli.tables import Toml
from model import library
from model.errors import K2Error
from model.spec import Picture

PICTURE = Image.new("RGB", (8, 8))


def test_ctrl_c_in_a_terminal_does_not_reach_the_import_of_torch():
    """It reaches all processes there, and that from which workers are forked told of it in a page of lines."""
    code = """if __name__ == "__main__":
        import os, signal, threading
        from k2cli.hands import Held, Processes
        signal.signal(signal.SIGINT, signal.default_int_handler)
        crew = Processes(2)
        crew.begin([])
        threading.Timer(0.5, lambda: os.killpg(0, signal.SIGINT)).start()
        try:
            crew.hire(Held("mini"))
            crew.hear()
        except KeyboardInterrupt:
            print("pressed")"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, start_new_session=True)

    assert (done.returncode, done.stdout, done.stderr) == (0, "pressed\n", "")


def test_ctrl_c_waits_until_torch_is_there(monkeypatch):
    """Cut off in the middle its modules raise something else, or abort the process."""

    class Slow(ModuleType):
        def __getattr__(self, name: str) -> object:
            if name == "Pipeline":
                signal.raise_signal(signal.SIGINT)
                whole.append(name)
            return None

    whole: list[str] = []
    monkeypatch.setitem(sys.modules, "model.pipeline", Slow("model.pipeline"))
    load.cache_clear()

    with pytest.raises(KeyboardInterrupt):
        load(Held("mini"))
    assert whole == ["Pipeline"]


def test_a_model_is_gone_before_the_next_is_read(fake, monkeypatch):
    """Two may not fit. One that is made faster refers to itself."""

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
    for held in (Held("mini"), Held("mini"), Held("mini", variant="turbo")):
        load(held)

    assert still_there == [[], [False]]  # and the one that is wanted again is not read again


class Scripted(Crew):
    """Hands in name only. Which of them has news next, and whether it is a loss, is drawn by lot."""

    size, where = 3, "in this test"

    def __init__(self, batches: list[int], seed: int, losing: float):
        super().__init__()
        self.batches, self.random, self.losing = batches, random.Random(seed), losing
        self.loading: list[int] = []
        self.at_work: dict[int, Group] = {}
        self.held: list[Held] = []

    def start(self, hand: int) -> None:
        assert len(self.holds) < self.size

    def load(self, hand: int) -> None:
        assert hand not in self.at_work and hand not in self.loading
        self.held.append(self.holds[hand])
        self.loading.append(hand)

    def give(self, hand: int, group: Group) -> None:
        assert hand not in self.at_work and hand not in self.loading
        self.at_work[hand] = group

    def hear(self):
        hand = self.random.choice([*self.loading, *self.at_work])
        if self.random.random() < self.losing:
            self.dismiss([hand])
            return hand, Lost("struck")
        if hand in self.loading:
            self.loading.remove(hand)
            return hand, Ready(Held("mini", dtype="float32"), self.batches)
        return hand, [Picture(PICTURE, {"model": {}, "seed": index}) for index in self.at_work.pop(hand)]

    def stop(self, hands: Collection[int]) -> None:
        self.loading = [hand for hand in self.loading if hand not in hands]
        self.at_work = {hand: group for hand, group in self.at_work.items() if hand not in hands}

    def close(self) -> None:
        raise AssertionError("whoever hired them dismisses them")


@given(st.lists(st.integers(1, 4), min_size=1, max_size=8), st.sets(st.integers(0, 31), min_size=1), st.integers())
def test_every_picture_comes_once_whoever_is_lost(batches, wanted, seed):
    wanted = {index for index in wanted if index < sum(batches)} or {0}
    crew = Scripted(batches, seed, losing=0.1)

    try:
        made = list(spread(crew, Held("mini"), wanted))
    except K2Error as error:
        assert f"{TRIES} workers in this test were lost" in str(error)
        return
    assert sorted(index for index, _ in made) == sorted(wanted)
    assert all(picture.record["seed"] == index for index, picture in made)
    first = 1 + crew.held[1:].count(Held("mini"))
    assert set(crew.held[first:]) <= {Held("mini", dtype="float32")}  # as the first hand holds the weights
    assert set(crew.kept) == set(crew.holds) and not (crew.loading or crew.at_work)

    crew.losing, kept, hired = 0.0, len(crew.kept), crew.hired
    again = list(spread(crew, Held("mini"), wanted))  # by those that were kept, and as many more as there is room for
    assert sorted(index for index, _ in again) == sorted(wanted)
    assert crew.hired - hired <= crew.size - kept


def test_what_kills_every_hand_is_given_up():
    crew = Scripted([1], 0, losing=1.0)

    with pytest.raises(K2Error, match=f"{TRIES} workers in this test were lost loading the model: struck"):
        list(spread(crew, Held("mini"), {0}))
    assert crew.hired == TRIES


class Told(Scripted):
    """Hands whose news is written down."""

    def __init__(self, *news: tuple[int, News]):
        super().__init__([], 0, losing=0.0)
        self.news, self.given = iter(news), list[tuple[int, Group]]()

    def give(self, hand: int, group: Group) -> None:
        self.given.append((hand, group))

    def hear(self):
        hand, news = next(self.news)
        if isinstance(news, Lost):
            self.dismiss([hand])
        return hand, news


READY = Ready(Held("mini", dtype="float32"), [1, 1])
FIRST, SECOND = ([Picture(PICTURE, {"model": {}, "seed": seed})] for seed in (0, 1))


def test_a_hand_that_is_lost_while_idle_is_given_nothing_more():
    lost = Lost("struck")
    crew = Told((1, READY), (2, READY), (1, FIRST), (1, lost), (2, lost), (3, READY), (3, SECOND))

    assert [index for index, _ in spread(crew, Held("mini"), {0, 1})] == [0, 1]
    assert crew.given == [(1, (0,)), (2, (1,)), (3, (1,))] and crew.kept == [3]
    assert crew.held == [Held("mini"), READY.held, READY.held]


def test_hands_that_are_lost_with_nothing_to_do_end_no_run():
    """Nor those that do not get as far as to load, while another one works."""
    lost, ready = Lost("struck"), Ready(READY.held, [1] * TRIES + [1])
    made = [[Picture(PICTURE, {"model": {}, "seed": seed})] for seed in range(TRIES + 1)]
    others = range(2, TRIES + 2)
    crew = Told((1, ready), *((hand, ready) for hand in others), *((hand, made[hand - 1]) for hand in others),
                *((hand, lost) for hand in others), (1, made[0]))  # fmt: skip
    crew.size = TRIES + 1
    assert sorted(index for index, _ in spread(crew, Held("mini"), set(range(TRIES + 1)))) == [*range(TRIES + 1)]

    crew = Told((1, READY), (2, lost), (3, lost), (4, lost), (1, FIRST), (1, SECOND))
    crew.size = 2
    assert [index for index, _ in spread(crew, Held("mini"), {0, 1})] == [0, 1]
    assert crew.hired == 1 + TRIES  # and no more of them


def test_what_a_lost_hand_had_is_given_to_an_idle_one():
    crew = Told((1, READY), (2, READY), (1, FIRST), (2, Lost("struck")), (1, SECOND))

    assert [index for index, _ in spread(crew, Held("mini"), {0, 1})] == [0, 1]
    assert crew.given == [(1, (0,)), (2, (1,)), (1, (1,))] and crew.hired == 2


def test_what_a_lost_hand_had_is_made_next():
    """What kills every hand that has it is known early, and not once all else is made."""
    ready = Ready(READY.held, [1, 1, 1])
    crew = Told((1, ready), (2, ready), (1, Lost("struck")), (2, SECOND), (2, FIRST), (2, SECOND))
    crew.size = 2

    list(spread(crew, Held("mini"), {0, 1, 2}))
    assert crew.given == [(1, (0,)), (2, (1,)), (2, (0,)), (2, (2,))]


def test_a_kept_hand_that_holds_the_weights_is_preferred():
    """To one that would have to let go of others, and read them."""
    crew = Told()
    mini, other = Held("mini"), Held("other")
    hired = [crew.hire(held) for held in (other, mini)]
    crew.loading.clear()
    crew.keep(hired)

    assert [crew.hire(mini), crew.hire(mini)] == [2, 1]


def test_no_more_hands_are_hired_than_there_is_work_for():
    crew = Told((1, READY), (1, FIRST))

    assert len(list(spread(crew, Held("mini"), {0}))) == crew.hired == 1


def test_groups_are_the_batches_of_the_whole_run():
    assert groups_of([3, 1, 2], {1, 4}) == [(0, 1, 2), (4, 5)]
    assert groups_of([3, 1, 2], range(6)) == [(0, 1, 2), (3,), (4, 5)]


needs_weights = pytest.mark.skipif("mini" not in library.box(), reason="the box holds no weights yet")
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
    """A project for the model of the box, and one thread wherever it is rendered."""
    import torch

    (tmp_path / "k2.toml").write_text(PROJECT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    hands.load.cache_clear()
    yield tmp_path
    torch.set_num_threads(threads)
    hands.load.cache_clear()


def made(folder: Path) -> dict[str, dict]:
    """The records of a run, less what a clock says."""
    tables = {path.name: Toml.read(path, path.name).table for path in folder.glob("*-*.toml")}
    return {name: {k: v for k, v in table.items() if k not in ("created", "seconds")} for name, table in tables.items()}


@needs_weights
def test_workers_make_what_one_process_makes(den, k2):
    """Killed ones included: their pictures are made again by others. Pictures of one size are one batch."""
    k2("render", "--quiet")
    hire, give, given_to = Processes.hire, Processes.give, []

    def hire_but_kill_the_first(crew: Processes, held: Held) -> int:
        hand = hire(crew, held)
        if hand == 1:
            os.kill(crew.hands[hand][0].pid, signal.SIGKILL)
        return hand

    def give_but_kill_the_second(crew: Processes, hand: int, group: Group) -> None:
        give(crew, hand, group)
        given_to.append(hand)
        if len(given_to) == 2:
            os.kill(crew.hands[hand][0].pid, signal.SIGKILL)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Processes, "hire", hire_but_kill_the_first)
        patch.setattr(Processes, "give", give_but_kill_the_second)
        result = k2("render", "--quiet", "--workers", "2")

    assert len(given_to) == 4  # three batches, one of them twice
    local, spread_out = sorted((den / "outputs").iterdir())
    assert made(local) == made(spread_out) and len(made(local)) == 6
    assert (spread_out / "sheet.png").exists()
    assert sorted(result.stdout.splitlines()) == sorted(f"outputs/{spread_out.name}/{n[:-5]}.png" for n in made(local))


@needs_weights
def test_workers_are_kept_from_line_to_line(den, k2, monkeypatch):
    """One that is lost in between is replaced; with the last line all are gone."""
    started: list[tuple[Processes, int]] = []
    start = Processes.start

    def watched(crew: Processes, hand: int) -> None:
        started.append((crew, hand))
        start(crew, hand)

    def lines() -> Iterator[bytes]:
        yield b"a red fox"
        yield b"an owl"
        (crew, hand), *more = started
        assert not more
        os.kill(crew.hands[hand][0].pid, signal.SIGKILL)
        yield b"a sailboat"

    monkeypatch.setattr(Processes, "start", watched)
    monkeypatch.setattr(stream, "lines", lines)
    result = k2("render", "--stream", "--workers", "2", "--quiet", "--size", "64x64")

    assert len(result.stdout.splitlines()) == 6
    (crew, first), (same, second) = started
    assert crew is same and (first, second) == (1, 2) and crew.hands == {}


def unmanned(size: int) -> tuple[Processes, list[tuple[int, int]]]:
    """Workers whose processes do nothing, and the threads and the seat that each is given."""

    class Idle:
        exitcode = 0

        def __init__(self, target, args, daemon):
            _, threads, seat = args
            given.append((threads, seat))

        def start(self):
            pass

        kill = join = start

    given: list[tuple[int, int]] = []
    crew = Processes(size)
    crew.context = SimpleNamespace(get_start_method=lambda: "spawn", Pipe=multiprocessing.Pipe, Process=Idle)
    crew.begin([])
    return crew, given


@pytest.mark.parametrize(("platform", "method"), [("linux", "forkserver"), ("darwin", "spawn"), ("win32", "spawn")])
def test_workers_are_forked_only_where_what_they_use_survives_it(platform, method, monkeypatch):
    """Metal hangs or crashes in a process that was forked."""
    methods = ["spawn"] if platform == "win32" else ["fork", "spawn", "forkserver"]
    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: methods)
    monkeypatch.setattr(sys, "platform", platform)

    assert Processes(2).context.get_start_method() == method


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (EOFError(), "the process that starts them has ended"),
        (ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"), "the process that starts them has ended"),
        (BlockingIOError(errno.EAGAIN, "No more processes"), "No more processes"),
    ],
)
def test_workers_that_cannot_be_started_are_lost(error, why, monkeypatch):
    """As where the process that they are forked from is killed while it imports torch."""
    monkeypatch.setattr(hands, "DYING", 0.0)
    crew, given = unmanned(2)

    def start(self):
        raise error

    crew.context.Process.start = start
    with pytest.raises(K2Error, match=f"{TRIES} workers on this machine were lost loading the model: {why}"):
        list(spread(crew, Held("mini"), {0}))
    assert len(given) == TRIES and crew.hands == crew.seats == {}


@pytest.mark.skipif(hands.start_method() == "spawn", reason="workers are not forked here")
def test_a_long_path_of_the_temporary_folder_keeps_no_worker_from_starting(tmp_path):
    """No socket can lie there, by which they would be forked."""
    code = """if __name__ == "__main__":
        from k2cli.hands import Held, Processes
        crew = Processes(2)
        crew.begin([])
        crew.hire(Held("mini", device="cuda:99"))
        print(crew.hear())
        crew.close()"""
    (folder := tmp_path / ("t" * 120)).mkdir()
    environment = os.environ | {"TMPDIR": str(folder)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)

    assert (done.returncode, done.stderr) == (0, "") and "K2Error(" in done.stdout


def test_workers_sit_where_those_sat_who_are_lost():
    crew, given = unmanned(3)
    _, second, _ = (crew.hire(Held("mini")) for _ in range(3))
    crew.dismiss([second])
    crew.hire(Held("mini"))
    crew.close()
    crew.hire(Held("mini"))

    assert [seat for _, seat in given] == [0, 1, 2, 1, 0]
    crew.close()


@pytest.mark.parametrize(("cores", "size", "threads"), [(8, 1, 8), (8, 3, 2), (2, 4, 1)])
def test_workers_share_out_the_cores(cores, size, threads, monkeypatch):
    """All at work together take no more threads than one process would, and each has one at least."""
    monkeypatch.setattr(hands, "cores", lambda: cores)
    crew, given = unmanned(size)
    for _ in range(size):
        crew.hire(Held("mini"))
    crew.close()

    assert [each for each, _ in given] == [threads] * size


@pytest.mark.parametrize(("said", "taken"), [(None, [3]), ("2", [])])
def test_a_worker_takes_its_share_of_threads_unless_the_user_said_how_many(said, taken, monkeypatch):
    import torch

    class Over:
        def recv(self):
            raise EOFError

    counts: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", counts.append)
    monkeypatch.setattr(hands, "end_with_parent", lambda: None)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if said:
        monkeypatch.setenv("OMP_NUM_THREADS", said)

    hands.work(Over(), 3, seat=0)

    assert counts == taken


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="processes cannot be kept to some cores here")
def test_cores_are_those_that_the_process_may_use(monkeypatch):
    """Of a node that is shared out, or under taskset; k2 doctor counts the same."""
    from k2cli import doctor

    monkeypatch.setattr("model.fast.speed", lambda dtype: 1.0)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 4, 5})
    assert hands.cores() == doctor.examine()["cpu"]["cores"] == 3


@pytest.mark.parametrize(
    ("device", "seat", "cards", "chosen"),
    [(None, 0, 2, [0]), ("cuda", 3, 2, [1]), ("cuda:1", 2, 4, []), ("cpu", 1, 2, []), (None, 1, 0, [])],
)
def test_workers_take_the_cards_in_turn(device, seat, cards, chosen, monkeypatch):
    """Unless they are told which; a machine without cards, or a run on its processor, asks for none."""
    import torch

    class Pipe:
        orders = iter([(Held("mini", device=device), [])])
        send = print

        def recv(self):
            try:
                return next(self.orders)
            except StopIteration:
                raise EOFError from None

    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cards)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(hands, "Hand", lambda held, specs: SimpleNamespace(ready=lambda held: (held, list(taken))))
    monkeypatch.setattr(hands, "end_with_parent", lambda: None)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    hands.work(Pipe(), 1, seat)

    assert taken == chosen


@needs_weights
def test_workers_end_with_a_process_that_is_killed():
    """In the middle of a picture that nobody waits for any more; its output stays open as long as one of them lives."""
    code = """if __name__ == "__main__":
        import os, signal
        from k2cli.hands import Held, Processes
        from model.spec import RenderSpec
        crew = Processes(1)
        crew.begin([RenderSpec("a red fox", steps=1000)])
        hand = crew.hire(Held("mini"))
        crew.hear()
        crew.give(hand, (0,))
        os.kill(os.getpid(), signal.SIGKILL)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60)

    assert done.returncode == -signal.SIGKILL


@needs_weights
def test_a_worker_says_what_is_wrong_in_one_sentence(den, k2):
    result = k2("render", "--quiet", "--workers", "2", "--device", "cuda:99", code=1)

    assert 'There is no device "cuda:99".' in result.stderr and len(result.stderr.splitlines()) == 2
    assert not (den / "outputs").exists()
