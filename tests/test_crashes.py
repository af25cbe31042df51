"""Runs that die at every file operation in turn: what they leave is whole, and `--resume` renders the rest."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import tree
from PIL import Image

from k2cli import records
from k2cli.app import app
from k2cli.toml_tables import Toml
from model import library

OPERATIONS = ("mkdir", "rename", "replace", "unlink", "rmdir", "fsync", "open")
FORK = multiprocessing.get_context("fork")  # the child inherits the fake pipeline of this process


def die_at(fatal: int) -> None:
    """Die at the file operation of this number, before it is done; a file that was to be flushed stays half written."""
    count = 0

    def counted(name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            nonlocal count
            count += 1
            if count == fatal:
                if name == "fsync":
                    half(args[0])
                os.kill(os.getpid(), signal.SIGKILL)
            return operation(*args, **named)

        return call

    for name in OPERATIONS:
        setattr(os, name, counted(name, getattr(os, name)))


def half(handle: int) -> None:
    about = os.fstat(handle)
    if stat.S_ISREG(about.st_mode):  # folders are flushed too
        os.ftruncate(handle, about.st_size // 2)


def render(fatal: int, arguments: tuple[str, ...]) -> None:
    die_at(fatal)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)
    app(["render", *arguments])


def died(fatal: int, *arguments: str) -> bool:
    """Whether a render in a process of its own got as far as that operation, and died."""
    process = FORK.Process(target=render, args=(fatal, arguments))
    process.start()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return bool(process.exitcode)


def pictures(outputs: Path) -> dict[str, str]:
    """The hash of every picture there, each checked against its record."""
    found = {}
    for path in outputs.rglob("*-*.png"):
        with Image.open(path) as image:
            pixels = records.pixel_hash(image)
        assert Toml.read(path.with_suffix(".toml"), path.name).table["pixels"] == pixels
        found[path.name] = pixels
    return found


def test_crash_at_any_file_operation_leaves_whole_files(moody, k2):
    k2("render")
    undisturbed = moody / "outputs" / "0001-fox-and-1-more"
    expected = pictures(undisturbed)
    folders, fatal, begun = 1, 0, 0
    while died(fatal := fatal + 1):
        left = pictures(moody / "outputs")
        assert left.items() <= expected.items()
        runs = sorted(path.name for path in moody.glob("outputs/*-*") if (path / "run.toml").exists())
        if len(runs) > folders:  # its plan was written, so it can be finished
            begun += 1
            last = moody / "outputs" / runs[-1]
            whole = dict(tree(last))
            k2("render", "--resume")
            assert pictures(last) == expected
            assert {name: tree(last)[name] for name in whole if name.endswith(".png")}.items() <= whole.items()
            assert sorted(tree(last)) == sorted(tree(undisturbed))  # and nothing half written
            folders = len(runs)
    assert fatal > 30 and begun > 15
    k2("render", "-p", "tea")
    names = [path.name for path in moody.glob("outputs/*")]
    assert all("-" in name for name in names) and len({name[:4] for name in names}) == len(names)
    assert not list(moody.rglob(".*"))


@pytest.mark.parametrize("first", [17, 22, 29])
def test_crash_during_resume(moody, k2, first):
    k2("render")
    expected = pictures(moody / "outputs" / "0001-fox-and-1-more")
    assert died(first)
    fatal = 0
    while died(fatal := fatal + 1, "--resume"):
        assert pictures(moody / "outputs").items() <= expected.items()
    folder = moody / "outputs" / "0002-fox-and-1-more"
    assert pictures(folder) == expected
    assert sorted(tree(folder)) == sorted(tree(moody / "outputs" / "0001-fox-and-1-more"))


def test_a_few_random_kills(tmp_path):
    """As `tests/bench/kills.py` does 200 times, with the bundled model, in processes that know nothing of pytest."""
    if "mini" not in library.bundled_models():
        pytest.skip("there are no bundled weights yet")
    bench = Path(__file__).parent / "bench" / "kills.py"
    done = subprocess.run(
        [sys.executable, bench, "--kills", "6"],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )

    assert done.returncode == 0, done.stderr[-3000:]
    assert "all complete, all finished" in done.stdout


def paint(barrier: Any, number: int) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    barrier.wait()
    app(["render", "--quiet", "-p", f"picture {number}", "--batch", "2"])


def test_twenty_concurrent_renders_lose_and_duplicate_nothing(moody):
    barrier = FORK.Barrier(20)
    painters = [FORK.Process(target=paint, args=(barrier, number)) for number in range(20)]
    for each in painters:
        each.start()
    for each in painters:
        each.join()

    assert [each.exitcode for each in painters] == [0] * 20
    folders = sorted((moody / "outputs").iterdir())
    assert [int(folder.name[:4]) for folder in folders] == list(range(1, 21))
    assert sorted(folder.name[5:] for folder in folders) == sorted(f"picture-{number}" for number in range(20))
    for folder in folders:
        names = {f"{folder.name[5:]}-{seed}.{kind}" for seed in (7, 8) for kind in ("png", "toml")}
        assert {path.name for path in folder.iterdir()} == names | {"run.toml", "sheet.png"}
    assert len(pictures(moody / "outputs")) == 40


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system with little room."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=96k", "none", disk]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here")
    yield disk
    os.chdir(tmp_path)
    subprocess.run(["umount", "--lazy", disk], check=True)


def test_full_disk_keeps_whole_files(moody, k2, small_disk, monkeypatch):
    """Whatever was written before is whole; once there is room again, the rest is rendered."""
    k2("render", "--batch", "9")
    expected = pictures(moody / "outputs")
    shutil.copy(moody / "k2.toml", small_disk)
    monkeypatch.chdir(small_disk)

    result = k2("render", "--batch", "9", code=1)

    left = pictures(small_disk / "outputs")
    assert "The disk is full" in result.stderr and 0 < len(left) < 18 and left.items() <= expected.items()
    assert not list(small_disk.rglob(".*"))
    assert "The disk is full" in k2("render", "--resume", code=1).stderr
    subprocess.run(["mount", "-o", "remount,size=4m", small_disk], check=True)
    k2("render", "--resume")
    assert pictures(small_disk / "outputs") == expected
