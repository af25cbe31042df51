"""How a command ends that a signal ends."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from k2cli.app import app

pty = pytest.importorskip("pty", reason="signals and terminals as POSIX has them")


def on_a_terminal(*arguments: str) -> tuple[int, int]:
    """A command in a process of its own, with the pipeline of this one -> its id, and the other end of its terminal."""
    process, terminal = pty.fork()
    if process == 0:
        sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whatever the tests were told, as under nohup
        code = 255
        try:
            app([*arguments])
        except SystemExit as end:
            code = end.code
        finally:
            os._exit(code)
    return process, terminal


@pytest.mark.parametrize("command", ["render", "rerun", "watch"])
def test_a_closed_terminal_ends_a_command_by_its_code(moody, k2, fake, monkeypatch, command):
    """That neither bars nor last words can be written is no error; what was made stays."""
    k2("render", "--only", "fox")
    monkeypatch.setenv("FORCE_COLOR", "1")  # so that a terminal that is gone is taken for one
    monkeypatch.setattr("k2cli.console.console", Console(stderr=True, force_interactive=True))
    monkeypatch.setattr(fake, "stop", lambda index: os.write(1, b"begun") and time.sleep(60))

    process, terminal = on_a_terminal(command, *["outputs/0001-fox/fox-7.png"] * (command == "rerun"))
    seen = b""
    while b"begun" not in seen:
        seen += os.read(terminal, 65536)
    os.close(terminal)

    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 128 + signal.SIGHUP
    assert b"0/" in seen  # of the bar
    assert command == "rerun" or [*Path("outputs").glob("0002-*/run.toml")]


def test_a_command_without_last_words_ends_by_the_code_of_its_signal(moody, k2, monkeypatch):
    monkeypatch.setattr("model.compact.write_compact", lambda *_: signal.raise_signal(signal.SIGTERM))

    assert not k2("models", "export", "mini", "x.safetensors", code=128 + signal.SIGTERM).stdout
    assert not Path("x.safetensors").exists()
