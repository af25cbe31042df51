"""Runs on a Ray cluster: with a stand-in that keeps its actors in this process, and with Ray itself if installed."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from test_workers import PROJECT, made, needs_weights

from k2cli import cluster, stdin_prompts, workers
from k2cli.cluster import pack_files, relocate, unpack_files
from model.errors import K2Error
from model.hashes import peft_settings_file, spec_files
from model.spec import Lora, Reference, RenderSpec, Style


class RayError(Exception):
    pass


class ActorDiedError(RayError):
    pass


class RaySystemError(RayError):
    pass


class NotBegun(RayError):
    """Like Ray's error for an actor that dies while it is created."""

    actor_init_failed = True


class RayTaskError(RayError):
    def __init__(self, cause: Exception):
        super().__init__(str(cause))
        self.cause = cause


class StandIn(ModuleType):
    """As much of Ray as is used. Calls run when their result is fetched; some, by number, kill their actor."""

    exceptions = SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError, RaySystemError=RaySystemError)

    def __init__(self, cores: int, deadly: tuple[int, ...] = ()):
        super().__init__("ray")
        self.deadly, self.calls, self.dead, self.hired = deadly, 0, set(), 0
        self.at: str | None = None
        self.room: dict[str, float] = {"CPU": cores}
        self.patience: list[float | None] = []
        self.alive = True  # this machine's node

    def init(self, address: str, **options: Any) -> None:
        if address == "nowhere":
            raise ConnectionError("no answer")
        self.at = address

    def shutdown(self) -> None:
        self.at = None

    def cluster_resources(self) -> dict[str, float]:
        return self.room

    def get_runtime_context(self) -> Any:
        return SimpleNamespace(get_node_id=lambda: "home")

    def nodes(self) -> list[dict[str, Any]]:
        return [{"NodeID": "home", "Alive": self.alive}, {"NodeID": "other", "Alive": True}]

    def put(self, value: Any) -> Any:
        return value

    def kill(self, actor: Any) -> None:
        self.dead.add(actor)

    def remote(self, cls: type) -> Any:
        ray = self

        class Actor:
            def __init__(self, *arguments: Any):
                self.inner = cls(*arguments)
                ray.hired += 1

            def __getattr__(self, name: str) -> Any:
                actor = self
                return SimpleNamespace(remote=lambda *arguments: Call(ray, actor, name, arguments))

        return SimpleNamespace(options=lambda **options: SimpleNamespace(remote=Actor))

    def wait(self, calls: list[Call], num_returns: int, timeout: float | None) -> tuple[list[Call], list[Call]]:
        self.patience.append(timeout)
        return calls[:1], calls[1:]

    def get(self, call: Call, timeout: float | None = None) -> Any:
        self.calls += 1
        if self.calls in self.deadly:
            self.dead.add(call.actor)
        if call.actor in self.dead:
            raise ActorDiedError
        try:
            return getattr(call.actor.inner, call.name)(*call.arguments)
        except K2Error as error:
            raise RayTaskError(error) from None


class Call:
    def __init__(self, *parts: Any):
        self.ray, self.actor, self.name, self.arguments = parts


@pytest.fixture
def painted(moody, fake, monkeypatch) -> Path:
    """A project whose four pictures are four batches, with a style made from a reference."""
    monkeypatch.setattr(fake, "batches", lambda self, specs: [1] * len(specs))
    (moody / "styles").mkdir()
    Image.new("RGB", (64, 64), "navy").save(moody / "a.png")
    (moody / "styles" / "dusk.toml").write_text('[[reference]]\nimage = "a.png"\n')
    return moody


@pytest.mark.parametrize("deadly", [(), (1,), (2, 5), (7,), (6, 9, 12)])
def test_cluster_makes_the_same_pictures_as_one_process(painted, k2, monkeypatch, deadly):
    ray = StandIn(3, deadly)
    monkeypatch.setitem(sys.modules, "ray", ray)
    options = ("render", "--quiet", "--batch", "2", "--style", "dusk=0.5")
    k2(*options)
    workers.load_pipeline.cache_clear()

    k2(*options, "--ray", "here")

    local, spread_out = sorted((painted / "outputs").iterdir())
    assert made(local) == made(spread_out) and len(made(local)) == 4
    assert {path.name for path in local.iterdir()} == {path.name for path in spread_out.iterdir()}
    assert ray.at is None
    if not deadly:  # once a worker has started, its pictures may take as long as they need
        assert ray.patience[0] == cluster.PLACEMENT_TIMEOUT and set(ray.patience[1:]) == {None}


@pytest.mark.parametrize(
    ("room", "most", "size", "gpus"),
    [
        ({"CPU": 3.0}, None, 3, 0),
        ({"CPU": 3.0}, 2, 2, 0),
        ({"CPU": 8.0, "GPU": 2.0}, None, 2, 1),
        ({"CPU": 8.0, "GPU": 2.0}, 4, 2, 1),
        ({}, None, 1, 0),
    ],
)
def test_one_worker_per_gpu_or_else_per_core(monkeypatch, room, most, size, gpus):
    monkeypatch.setitem(sys.modules, "ray", ray := StandIn(0))
    ray.room = room
    pool = cluster.RayPool("here", most)
    pool.begin_run([])
    assert (pool.size, pool.resources) == (size, {"num_cpus": 1, "num_gpus": gpus})


def test_streaming_keeps_actors_between_lines(painted, k2, monkeypatch):
    """What the project brings is sent with each line."""
    ray = StandIn(2)
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setattr(stdin_prompts, "input_lines", lambda: iter([b"a pear", b"a plum"]))

    result = k2("render", "--stream", "--ray", "here", "--batch", "2", "--style", "dusk=0.5", "--json")

    answers = [json.loads(line) for line in result.stdout.splitlines()]
    assert [each["style"][0]["reference"][0]["image"] for each in answers] == ["a.png"] * 4
    assert ray.hired == 2 and ray.at is None


def test_workers_leave_no_project_files_behind(painted, k2, monkeypatch, tmp_path):
    """They are killed at the end, so they cannot clean up themselves."""
    monkeypatch.setitem(sys.modules, "ray", StandIn(2))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "far"))
    (tmp_path / "far").mkdir()

    k2("render", "--ray", "here", "--style", "dusk=0.5")

    assert not list((tmp_path / "far").glob("k2-*"))


def test_errors_are_one_sentence(painted, k2, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", StandIn(2))
    assert "No Ray cluster answers at nowhere: no answer." in k2("render", "--ray", "nowhere", code=1).stderr
    assert 'There is no device "cuda:99".' in k2("render", "--ray", "here", "--device", "cuda:99", code=1).stderr

    monkeypatch.setattr(cluster, "version", lambda name: "0.1" if len(seen.append(name) or seen) < 4 else "0.2")
    seen: list[str] = []
    assert "A machine of the cluster has other versions: k2 0.1" in k2("render", "--ray", "here", code=1).stderr

    monkeypatch.setitem(sys.modules, "ray", None)
    assert "Ray is not installed." in k2("render", "--ray", "here", code=1).stderr
    assert not (painted / "outputs").exists()


def test_unreachable_cluster_is_reported_once_for_all_projects(painted, k2, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", StandIn(2))
    other = painted.parent / "other"
    other.mkdir()
    (other / "k2.toml").write_text('[[prompt]]\ntext = "tea"\n')

    told = k2("render", ".", other, "--ray", "nowhere", code=1).stderr

    assert told.count("Error: ") == 1 and "No Ray cluster answers at nowhere" in told
    assert not (painted / "outputs").exists() and not (other / "outputs").exists()


@pytest.mark.parametrize("form", ["127.0.0.1:{}", "localhost:{}", "ray://127.0.0.1:{}"])
def test_unreachable_address_fails_before_ray_connects(form):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = form.format(server.getsockname()[1])
        cluster.check_port(address)
    with pytest.raises(K2Error, match=f"No Ray cluster answers at {address}: Connection refused."):
        cluster.check_port(address)


@pytest.mark.parametrize("address", ["[::1]:1", "::1:1", "127.0.0.1:70000", "no host:1", f"{'x' * 70}.org:1"])
def test_invalid_addresses_get_one_sentence(address):
    with pytest.raises(K2Error, match="No Ray cluster answers at "):
        cluster.check_port(address)


@pytest.mark.parametrize("address", ["auto", "local", "ray://somewhere", ""])
def test_addresses_without_a_port_are_left_to_ray(address):
    cluster.check_port(address)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            NotBegun("It died.\n  a place\nNo module named 'k2cli'"),
            "cannot start k2: No module named 'k2cli'.\nHint:  Ins",
        ),
        (
            ActorDiedError("It died.\n\tits node was terminated.\n"),
            "lost loading the model: its node was terminated.",
        ),
    ],
)
def test_reason_for_a_lost_worker_is_the_last_line_of_rays_error(painted, k2, monkeypatch, error, said):
    """A worker on a machine without k2 is not blamed on memory."""

    def get(self, call, timeout=None):
        raise error

    monkeypatch.setattr(StandIn, "get", get)
    monkeypatch.setitem(sys.modules, "ray", StandIn(2))

    assert said in k2("render", "--ray", "here", code=1).stderr


@pytest.mark.parametrize("place", ["wait", "get"])
def test_lost_connection_leaves_a_run_that_can_be_resumed(painted, k2, monkeypatch, place):
    ray = StandIn(1)
    monkeypatch.setitem(sys.modules, "ray", ray)
    reach = getattr(ray, place)

    def lose(*arguments, **options):
        if ray.calls > 3:  # starting the worker, learning that it is ready, and a picture
            raise RaySystemError("System error: Broken pipe")
        return reach(*arguments, **options)

    def shutdown():
        raise ConnectionError

    monkeypatch.setattr(ray, place, lose)
    monkeypatch.setattr(ray, "shutdown", shutdown)
    told = k2("render", "--quiet", "--batch", "2", "--ray", "here", code=1).stderr

    assert "The connection to the cluster was lost: System error: Broken pipe." in told
    assert "Check the cluster, then resume with: k2 render --resume" in told
    assert len(k2("render", "--resume", "--quiet").stdout.splitlines()) < 4


def test_dead_node_on_this_machine_counts_as_a_lost_connection(painted, k2, monkeypatch):
    """Nothing more may be asked of the cluster then."""
    monkeypatch.setitem(sys.modules, "ray", ray := StandIn(1, deadly=(4,)))
    ray.alive = False

    told = k2("render", "--quiet", "--batch", "2", "--ray", "here", code=1).stderr

    assert (
        "The connection to the cluster was lost: its node on this machine has ended." in told
        and "k2 render --resume" in told
    )
    assert ray.hired == 1


def test_packed_files_keep_their_order(tmp_path):
    for name in ("a.png", "b.png", "l.safetensors"):
        (tmp_path / name).write_text(name)
    references, lora = (Reference(tmp_path / "b.png"), Reference(tmp_path / "a.png")), tmp_path / "l.safetensors"
    spec = RenderSpec("a fox", styles=(Style("x", 1.0, references, lora=lora),), loras=(Lora(lora),))
    (tmp_path / "there").mkdir()

    places = unpack_files(pack_files([spec]), tmp_path / "there")
    far = relocate(spec, places.__getitem__)

    assert spec_files(spec) == set(places) and spec_files(far) == set(places.values())
    assert [each.image.read_text() for each in far.styles[0].references] == ["b.png", "a.png"]
    assert far.loras[0].path.read_text() == "l.safetensors"
    assert relocate(far, {here: home for home, here in places.items()}.__getitem__) == spec


def test_adapter_settings_are_packed_with_the_adapter(tmp_path, monkeypatch):
    names = ("adapter_config.json", "adapter_model.safetensors", "ink.png")
    for name in names:
        (tmp_path / name).write_text(name)
    monkeypatch.setattr(Path, "read_bytes", lambda path: read.append(path) or path.read_text().encode())
    read: list[Path] = []
    lora = Lora(tmp_path / "adapter_model.safetensors")
    specs = [RenderSpec("a fox", seed=seed, loras=(lora,), init_image=tmp_path / "ink.png") for seed in range(3)]
    (tmp_path / "there").mkdir()

    places = unpack_files(pack_files(specs), tmp_path / "there")

    assert sorted(read) == [tmp_path / name for name in names]  # each only once
    assert {path.name for path in places.values()} == set(names)
    assert peft_settings_file(relocate(specs[0], places.__getitem__).loras[0].path) == places[tmp_path / names[0]]


@needs_weights
def test_real_ray_survives_a_dying_node(tmp_path):
    """Two nodes on this machine; one of them is killed mid-run."""
    pytest.importorskip("ray", reason="Ray is not installed: the extra `ray`")
    from ray.cluster_utils import Cluster

    (tmp_path / "k2.toml").write_text(PROJECT)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    k2 = [sys.executable, "-c", "from k2cli.app import main; main()", "render", "--quiet"]
    subprocess.run(k2, cwd=tmp_path, env=environment, check=True)
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        doomed = nodes.add_node(num_cpus=1)
        run = subprocess.Popen([*k2, "--ray", nodes.address], cwd=tmp_path, env=environment, stdout=subprocess.PIPE)
        assert run.stdout is not None and run.stdout.readline()
        nodes.remove_node(doomed, allow_graceful=False)
        assert run.wait() == 0
    finally:
        nodes.shutdown()
    local, spread_out = sorted((tmp_path / "outputs").iterdir())
    assert made(local) == made(spread_out) and len(made(local)) == 6
