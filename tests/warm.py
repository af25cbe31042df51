"""A `k2` for a shell's path that starts at once: every command is a fork of one process that has imported torch.

`python warm.py` serves the folder it runs in; `k2_in` writes the program that calls it, passing on its own streams,
folder and arguments.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from socketserver import BaseRequestHandler, ForkingMixIn, UnixStreamServer

SOCKET = "socket"
CALLER = """\
import json, os, socket, sys

asked = json.dumps([os.getcwd(), *sys.argv[1:]]).encode()
os.chdir({folder!r})  # whose path may be longer than a socket's
with socket.socket(socket.AF_UNIX) as line:
    line.connect({name!r})
    socket.send_fds(line, [asked], [0, 1, 2])
    sys.exit(int(line.recv(8) or 1))
"""


class Command(BaseRequestHandler):
    def handle(self) -> None:
        from k2cli.__main__ import main

        text, streams, *_ = socket.recv_fds(self.request, 1 << 16, 3)
        folder, *arguments = json.loads(text)
        for stream, theirs in enumerate(streams):
            os.dup2(theirs, stream)
            os.close(theirs)
        os.chdir(folder)
        sys.argv = ["k2", *arguments]
        code = 1
        try:
            main()
            code = 0
        except SystemExit as done:
            code = done.code if isinstance(done.code, int) else int(done.code is not None)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            self.request.sendall(str(code).encode())


class Server(ForkingMixIn, UnixStreamServer):
    """Forks a process per command."""


@contextmanager
def k2_in(folder: Path) -> Iterator[None]:
    """Provide a program `k2` in a folder for the duration of the context."""
    (caller := folder / "caller.py").write_text(CALLER.format(folder=str(folder), name=SOCKET))
    (script := folder / "k2").write_text(f'#!/bin/sh\nexec "{sys.executable}" -IS "{caller}" "$@"\n')
    script.chmod(0o755)
    with subprocess.Popen([sys.executable, __file__], cwd=folder, stdout=subprocess.PIPE) as server:
        try:
            assert server.stdout and server.stdout.readline()
            yield
        finally:
            server.terminate()


if __name__ == "__main__":
    import k2cli.app  # noqa: F401
    import model.pipeline  # noqa: F401

    with Server(SOCKET, Command) as server:
        print("ready", flush=True)
        server.serve_forever()
