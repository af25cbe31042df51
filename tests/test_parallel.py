"""Several processes train as one does, and one resumes from what several wrote."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import together
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from model.errors import K2Error
from model.train import loop, optim, parallel, states
from model.train.parallel import World

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")

STEPS, KINDS = 20, ("sharded", "whole")


def torchrun(*arguments: object, processes: int = 2) -> None:
    """Run `together.py` on some processes of this machine."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    script = Path(together.__file__)
    paths = os.pathsep.join([str(script.parent), str(script.parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*launch, str(script), *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch):
    """`together.run` sets these for its own process, which here runs all other tests too."""
    for module in (loop, optim):
        monkeypatch.setattr(module, "native_bf16", module.native_bf16)


@pytest.fixture(scope="module")
def by_two(tmp_path_factory) -> Path:
    """A folder with what two processes made in both kinds of stage; started once, as starting takes the longest."""
    folder = tmp_path_factory.mktemp("two")
    torchrun(folder, STEPS, *KINDS)
    return folder


def found(folder: Path) -> dict:
    return json.loads((folder / "losses.json").read_text())


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_have_the_same_losses_as_one(by_two, kind, tmp_path):
    """20 steps of AdamW and Muon with the same global batch, to 1e-5."""
    alone, two = together.run(kind, tmp_path), found(by_two / kind)
    expected = together.losses(alone, STEPS)

    assert two["losses"] == pytest.approx(expected, abs=1e-5)
    assert min(expected) < 0.95 * expected[0]  # it did learn: equal losses alone would not show that
    if kind == "sharded":
        numbers = sum(param.numel() for param in alone.model.parameters())
        assert two["held"] < 0.6 * numbers  # each of two processes holds half of every parameter


@pytest.mark.parametrize("kind", KINDS)
def test_one_process_resumes_where_two_stopped(by_two, kind, tmp_path):
    """From the state that two wrote halfway: every further loss is theirs, and the last state can be resumed too."""
    folder = by_two / kind
    for saved in (*folder.glob("state-*"), *folder.glob("state.safetensors")):
        (shutil.copytree if saved.is_dir() else shutil.copy)(saved, tmp_path / saved.name)
    assert bool(parallel.sharded_states(tmp_path)) == (kind == "sharded")

    alone = together.run(kind, tmp_path)

    assert alone.step == STEPS // 2 and not alone.recipe_changes
    assert together.losses(alone, STEPS) == pytest.approx(found(folder)["losses"][STEPS // 2 :], abs=1e-5)
    alone.save(last=True)
    assert not parallel.sharded_states(tmp_path)
    state = load_file(tmp_path / "state.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in state.values())
    assert together.run(kind, tmp_path).step == STEPS


def test_incomplete_state_is_left_alone(tmp_path):
    (tmp_path / "state-00000010").mkdir()
    assert parallel.sharded_states(tmp_path) == [] and states.newest_state(tmp_path) is None


def test_parts_are_distributed_evenly():
    assert [list(World(rank, 2).parts(4)) for rank in range(2)] == [[0, 2], [1, 3]]
    assert list(World().parts(3)) == [0, 1, 2]
    with pytest.raises(K2Error, match="3 parts") as error:
        World(0, 2).parts(3)
    assert "accumulate" in error.value.hint


def test_without_torchrun_no_group_is_joined(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert parallel.join_group("cpu") == "cpu" and parallel.world() == World()
