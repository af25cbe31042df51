"""Exit codes of commands that a signal ends."""

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
    """Run a command in its own process, with this one's pipeline -> its id, and the other end of its terminal."""
    process, terminal = pty.fork()
    if process == 0:
        sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whatever the tests inherited, as under nohup
        code = 255
        try:
            app([*arguments])
        except SystemExit as end:
            code = end.code
        finally:
            os._exit(code)
    return process, terminal


@pytest.mark.parametrize("command", ["render", "rerun", "watch"])
def test_a_closed_terminal_gives_exit_code_129(moody, k2, fake, monkeypatch, command):
    """Failing to write progress bars or final messages is not an error; what was made stays."""
    k2("render", "--only", "fox")
    monkeypatch.setenv("FORCE_COLOR", "1")  # so that a closed terminal still counts as one
    monkeypatch.setattr("k2cli.console.console", Console(stderr=True, force_interactive=True))
    monkeypatch.setattr(fake, "stop", lambda index: os.write(1, b"begun") and time.sleep(60))

    process, terminal = on_a_terminal(command, *["outputs/0001-fox/fox-7.png"] * (command == "rerun"))
    seen = b""
    while b"begun" not in seen:
        seen += os.read(terminal, 65536)
    os.close(terminal)

    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 128 + signal.SIGHUP
    assert b"0/" in seen  # of the progress bar
    assert command == "rerun" or [*Path("outputs").glob("0002-*/run.toml")]


def test_sigterm_without_a_final_message_gives_exit_code_143(moody, k2, monkeypatch):
    monkeypatch.setattr("model.compact.write_compact", lambda *_: signal.raise_signal(signal.SIGTERM))

    assert not k2("models", "export", "mini", "x.safetensors", code=128 + signal.SIGTERM).stdout
    assert not Path("x.safetensors").exists()
