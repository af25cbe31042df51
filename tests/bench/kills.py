"""Renders killed at random moments: what exists is complete, and `--resume` makes the rest, to the same pixels.

`python tests/bench/kills.py [--kills 200] [--workers N] [--together 20] [--seed 0]`, with the bundled model. A render
is a fork of this process, which already has the weights, so that kills hit rendering and writing and not imports; with
--workers the forks have worker processes of their own. --together instead starts this many processes at once in one
project, each with its own interpreter.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from k2cli import records
from k2cli.app import app
from k2cli.disk import DRAFT_SUFFIX
from k2cli.models import ModelSpec
from k2cli.toml_tables import Toml
from k2cli.workers import load_pipeline

PROJECT = """\
[render]
size = "64x64"
steps = 1
batch = 3

[[prompt]]
text = "a red fox"

[[prompt]]
text = "an owl"
"""


class KillTest:
    """A project in which renders are killed."""

    def __init__(self, folder: Path, workers: int = 0, seed: int = 0):
        self.root, self.rng = folder / "arena", random.Random(seed)
        self.options = ["--quiet", *(["--workers", str(workers)] if workers else [])]
        self.root.mkdir()
        (self.root / "k2.toml").write_text(PROJECT)
        if not workers:
            load_pipeline(ModelSpec("mini")).hashes()  # computed by a thread, which a fork would not have
        started = time.monotonic()
        assert self.wait(self.start("render")) == 0
        self.seconds = time.monotonic() - started
        (self.reference_run,) = (self.root / "outputs").iterdir()
        self.expected = self.pictures(self.reference_run)
        self.names = {path.name for path in self.reference_run.iterdir()}
        assert len(self.expected) == 6

    def start(self, *arguments: str) -> int:
        """`k2 …` in a fork -> its process id."""
        if process := os.fork():
            return process
        code = 1
        try:
            os.setpgid(0, 0)
            os.chdir(self.root)
            null = os.open(os.devnull, os.O_RDWR)
            for stream in (0, 1, 2):
                os.dup2(null, stream)
            app([*arguments, *self.options])
        except SystemExit as done:
            code = int(done.code or 0)
        finally:
            os._exit(code)

    def wait(self, process: int) -> int:
        """The exit code, or minus the signal that ended it."""
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])

    def start_and_kill(self, *arguments: str) -> bool:
        """Start, kill at a random moment -> whether the kill came before the end."""
        process = self.start(*arguments)
        time.sleep(self.rng.uniform(0, 1.5 * self.seconds))  # some finish, even on a busy machine
        os.kill(process, signal.SIGKILL)
        code = self.wait(process)
        assert code in (0, -signal.SIGKILL), code
        return code != 0

    def kill_until_done(self) -> int:
        """One run, killed repeatedly and resumed until it is complete -> the number of kills."""
        kills, before, arguments = 0, set((self.root / "outputs").glob("*-*")), ["render"]
        while self.start_and_kill(*arguments):
            kills += 1
            started = set((self.root / "outputs").glob("*-*")) - before
            for folder in started:
                assert self.pictures(folder).items() <= self.expected.items()
                arguments = ["render", "--resume"]
        (folder,) = set((self.root / "outputs").glob("*-*")) - before
        assert self.pictures(folder) == self.expected
        assert {path.name for path in folder.iterdir()} == self.names
        shutil.rmtree(folder)
        return kills

    def pictures(self, folder: Path) -> dict[str, str]:
        """Every picture by its hash, each complete and matching its record."""
        found = {}
        for path in folder.glob("*-*.png"):
            with Image.open(path) as image:
                found[path.name] = records.pixel_hash(image)
            assert Toml.read(path.with_suffix(".toml"), path.name).table["pixels"] == found[path.name]
        return found


def render_together(folder: Path, commands: Sequence[Sequence[str]]) -> None:
    """Simultaneous renders in one project, one picture each: no number, picture or record is lost or duplicated."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    processes = [subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE) for command in commands]
    printed = [process.communicate()[0].decode().splitlines() for process in processes]
    assert [process.returncode for process in processes] == [0] * len(commands)
    paths = [folder / line for lines in printed for line in lines]
    assert len(set(paths)) == len(commands) and all(path.is_file() for path in paths)
    assert sorted(int(path.name[:4]) for path in (folder / "outputs").iterdir()) == list(range(1, len(commands) + 1))
    for path in paths:
        table = Toml.read(path.with_suffix(".toml"), path.name).table
        with Image.open(path) as image:
            assert records.pixel_hash(image) == table["pixels"]
        assert path.parent.name.endswith(table["prompt"]["name"])
    assert not list(folder.rglob(f"*{DRAFT_SUFFIX}"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--together", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        if options.together:
            (Path(folder) / "k2.toml").write_text(PROJECT.replace("batch = 3", "batch = 1"))
            k2 = [sys.executable, "-c", "from k2cli.app import main; main()"]
            render_together(
                Path(folder), [[*k2, "render", "-q", "-p", f"picture {i}"] for i in range(options.together)]
            )
            print(f"{options.together} processes at once: nothing lost, nothing duplicated", end=", ")
        else:
            arena, kills, rounds = KillTest(Path(folder), options.workers, options.seed), 0, 0
            while kills < options.kills:
                kills, rounds = kills + arena.kill_until_done(), rounds + 1
            print(f"{kills} kills in {rounds} runs of {arena.seconds:.1f} s: all complete, all finished", end=", ")
    print(f"{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
