"""Standard error that is full, for good or for now, or that nobody reads, and characters outside ASCII."""

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, as on Linux")


@pytest.mark.parametrize("buffered", ["", "1"])
@pytest.mark.parametrize(
    ("words", "code", "results"),
    [
        ("new other", 0, "other\n"),  # standard error says what to do next
        ("render --dry-run", 0, None),
        ("render --only nobody", 2, ""),
        ("render --nosuch", 2, ""),
        ("show nothing.png", 1, ""),
    ],
)
def test_full_stderr_does_not_stop_the_work(moody, words, code, results, buffered):
    line = [sys.executable, "-m", "k2cli", *words.split()]
    environment = os.environ | {"PYTHONUNBUFFERED": buffered}
    with open("/dev/full", "w") as full:
        done = subprocess.run(line, stdout=subprocess.PIPE, stderr=full, text=True, env=environment)

    assert done.returncode == code
    assert done.stdout == results if results is not None else done.stdout


@pytest.mark.parametrize("read", [True, False])
def test_unread_stderr_does_not_stop_the_work(moody, read):
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    if read:  # by a slow reader
        with suppress(BlockingIOError):
            while os.write(writer, b"." * 4096):
                pass
    else:
        os.close(reader)
    done = subprocess.run([sys.executable, "-m", "k2cli", "new", "other"], stdout=subprocess.PIPE, stderr=writer)

    assert (done.returncode, done.stdout) == (0, b"other\n")
    for end in (writer, *([reader] if read else [])):
        os.close(end)


def test_stderr_uses_the_requested_encoding(moody):
    line = [sys.executable, "-m", "k2cli", "render", "--only", "füx"]
    done = subprocess.run(line, capture_output=True, env=os.environ | {"PYTHONIOENCODING": "latin-1"})

    assert done.returncode == 2 and done.stderr.startswith(b"Error: ") and b'named "f\xfcx".' in done.stderr
