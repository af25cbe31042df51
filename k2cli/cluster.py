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

from k2cli.hands import Crew, Group, Hand, Held, Lost, News, Ready, Unreachable, load
from model.errors import K2Error
from model.hashes import PEFT_SETTINGS, PEFT_WEIGHTS, files_of
from model.spec import Picture, RenderSpec

PATIENCE = 300.0  # seconds that a cluster may take to place the first hand
KNOCKING = 5.0  # seconds that a machine may take to answer
LEAVING = 5.0  # seconds that a hand may take to clean up
VERSIONS = ("k2", "torch", "pillow")  # that pictures depend on


class Cluster(Crew):
    """Hands that are actors: one for every GPU of the cluster, or for every processor core if it has none."""

    where, here = "of the cluster", False
    ray: Any = None

    def __init__(self, address: str, most: int | None):
        """most: hands at work at a time; default: as many as there is room for."""
        super().__init__()
        self.address, self.most = address, most
        self.actors: dict[int, Any] = {}
        self.awaited: dict[Any, int] = {}  # a pending answer -> the hand's number
        self.placed: set[int] = set()  # hands that have found room

    def begin(self, specs: Sequence[RenderSpec]) -> None:
        super().begin(specs)
        if self.ray is None:
            self.connect()
        self.parcel = self.ray.put(pack(specs))

    def connect(self) -> None:
        """Raises K2Error."""
        try:
            import ray
        except ImportError:
            raise Unreachable("Ray is not installed.", hint='To use a cluster: pip install "k2[ray]"') from None
        knock(self.address)
        try:
            with chdir(os.sep):  # Ray's workers import from the caller's folder: not from a project's
                ray.init(self.address, log_to_driver=False, logging_level=logging.ERROR, configure_logging=True)
        except Exception as error:  # whatever keeps it from answering
            what = f"No Ray cluster answers at {self.address}: {error}."
            raise Unreachable(what, hint="Start one with: ray start --head") from None
        room = ray.cluster_resources()
        gpus = int(room.get("GPU", 0))
        self.needs = {"num_cpus": 1, "num_gpus": 1 if gpus else 0}
        self.home = ray.get_runtime_context().get_node_id()
        self.size = max(1, min(gpus or int(room.get("CPU", 1)), self.most or 1 << 30))
        self.ray = ray

    def start(self, hand: int) -> None:
        options = {**self.needs, "max_restarts": 0, "max_task_retries": 0, "scheduling_strategy": "SPREAD"}
        with self.reached():
            self.actors[hand] = self.ray.remote(FarHand).options(**options).remote()
            self.awaited[self.actors[hand].here.remote()] = hand

    def load(self, hand: int) -> None:
        with self.reached():
            self.awaited[self.actors[hand].ready.remote(self.holds[hand], self.specs, self.parcel)] = hand

    def give(self, hand: int, group: Group) -> None:
        with self.reached():
            self.awaited[self.actors[hand].make.remote(group)] = hand

    def at_home(self) -> bool:
        """Whether this machine's own node is alive: Ray silently ends a process that asks anything of a dead one."""
        with self.reached():
            return any(node["Alive"] for node in self.ray.nodes() if node["NodeID"] == self.home)

    @contextmanager
    def reached(self) -> Iterator[None]:
        """Turn what Ray raises when the cluster cannot be reached any more into one sentence."""
        try:
            yield
        except (self.ray.exceptions.RayError, OSError) as error:
            raise unreachable(last_line(error)) from None

    def hear(self) -> tuple[int, News]:
        with self.reached():
            done, _ = self.ray.wait(list(self.awaited), num_returns=1, timeout=None if self.placed else PATIENCE)
        if not done:
            raise Unreachable("The cluster has no room for a single worker.", hint="See its resources: ray status")
        hand = self.awaited.pop(done[0])
        try:
            news = self.ray.get(done[0])
        except self.ray.exceptions.RayTaskError as error:
            return hand, error.cause if isinstance(error.cause, K2Error) else RuntimeError(str(error))
        except (self.ray.exceptions.RaySystemError, OSError) as error:
            raise unreachable(last_line(error)) from None
        except self.ray.exceptions.RayError as error:
            if getattr(error, "actor_init_failed", False):
                what = f"A machine of the cluster cannot start k2: {last_line(error)}."
                raise K2Error(what, hint="Install the same versions as here.") from None
            if not self.at_home():
                raise unreachable("its node on this machine has ended") from None
            self.dismiss([hand])
            return hand, Lost(last_line(error))
        if news is None:  # it is placed, and begins to load
            self.placed.add(hand)
            return self.hear()
        if isinstance(news, tuple):
            news, versions = news
            if versions != own_versions():
                theirs = ", ".join(f"{name} {number}" for name, number in versions.items())
                raise K2Error(
                    f"A machine of the cluster has other versions: {theirs}.", hint="Install the same versions as here."
                )
        return hand, news

    def stop(self, hands: Collection[int]) -> None:
        for hand in hands:
            with suppress(Exception):  # it is gone
                self.ray.kill(self.actors.pop(hand))
        self.placed.difference_update(hands)
        self.awaited = {answer: hand for answer, hand in self.awaited.items() if hand not in hands}

    def close(self) -> None:
        for hand in self.kept:
            with suppress(Exception):  # it is gone
                self.ray.get(self.actors[hand].leave.remote(), timeout=LEAVING)
        super().close()
        if self.ray:
            with suppress(Exception):  # so is the cluster
                self.ray.shutdown()
            self.ray = None


class FarHand:
    """A hand in an actor; the project's files are in a folder of its own."""

    def here(self) -> None:
        """Answered as soon as the hand is placed."""

    def ready(
        self, held: Held, specs: Sequence[RenderSpec], parcel: Mapping[Path, bytes]
    ) -> tuple[Ready, dict[str, str]]:
        """Prepare for a run: unpack its files here, once the model is loaded. A hand killed before leaves none."""
        load(held)
        self.folder = tempfile.TemporaryDirectory(prefix="k2-")
        here_of = unpack(parcel, Path(self.folder.name))
        self.home_of = {str(here): str(home) for home, here in here_of.items()}
        self.hand = Hand(held, [moved(spec, here_of.__getitem__) for spec in specs])
        return self.hand.ready(held), own_versions()

    def leave(self) -> None:
        """Clean up: a killed hand cannot."""
        self.folder.cleanup()

    def make(self, group: Group) -> list[Picture]:
        return [Picture(each.image, self.as_at_home(each.record)) for each in self.hand.make(group)]

    def as_at_home(self, value: Any) -> Any:
        """A record, with its files' paths as they are where the run began."""
        if isinstance(value, Mapping):
            return {key: self.as_at_home(each) for key, each in value.items()}
        if isinstance(value, list):
            return [self.as_at_home(each) for each in value]
        return self.home_of.get(value, value) if isinstance(value, str) else value


def knock(address: str) -> None:
    """If an address names a port, check that somebody answers there: Ray tries for a minute and a half, silently.
    Raises K2Error."""
    match = re.fullmatch(r"(?:ray://)?\[?([^/]+?)\]?:(\d+)", address)
    if match is None:  # auto
        return
    try:
        socket.create_connection((match[1], int(match[2])), KNOCKING).close()
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


def pack(specs: Sequence[RenderSpec]) -> dict[Path, bytes]:
    """The files of all pictures, each read once."""
    return {path: path.read_bytes() for path in {path for spec in specs for path in files_of(spec)}}


def unpack(parcel: Mapping[Path, bytes], folder: Path) -> dict[Path, Path]:
    """Write the files, each in a numbered folder, in their order -> where each is now. An adapter's settings stay
    beside it, and both keep their names, or nobody would find them."""
    places, numbers = {}, {path: f"{number:05}" for number, path in enumerate(sorted(parcel))}
    for path, data in parcel.items():
        beside = path.with_name(PEFT_WEIGHTS) if path.name == PEFT_SETTINGS else path
        places[path] = folder / numbers.get(beside, numbers[path]) / path.name
        places[path].parent.mkdir(exist_ok=True)
        places[path].write_bytes(data)
    return places


def moved(spec: RenderSpec, place: Callable[[Path], Path]) -> RenderSpec:
    """The spec with its files elsewhere."""
    return replace(
        spec,
        styles=tuple(
            replace(
                style,
                references=tuple(replace(each, image=place(each.image)) for each in style.references),
                lora=place(style.lora) if style.lora else None,
            )
            for style in spec.styles
        ),
        loras=tuple(replace(lora, path=place(lora.path)) for lora in spec.loras),
        init_image=place(spec.init_image) if spec.init_image else None,
        mask=place(spec.mask) if isinstance(spec.mask, Path) else spec.mask,
    )
