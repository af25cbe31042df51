"""Standard streams that are full, closed, or read by nobody."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")


@pytest.mark.parametrize("buffered", ["", "1"])
@pytest.mark.parametrize(
    ("words", "code", "results"),
    [
        ("new other", 0, "other\n"),  # and what to do next
        ("render --dry-run", 0, None),
        ("render --only nobody", 2, ""),
        ("render --nosuch", 2, ""),
        ("show nothing.png", 1, ""),
    ],
)
def test_words_that_find_no_room_keep_nothing_from_being_done(moody, words, code, results, buffered):
    line = [sys.executable, "-m", "k2cli", *words.split()]
    environment = os.environ | {"PYTHONUNBUFFERED": buffered}
    with open("/dev/full", "w") as full:
        done = subprocess.run(line, stdout=subprocess.PIPE, stderr=full, text=True, env=environment)

    assert done.returncode == code
    assert done.stdout == results if results is not None else done.stdout


def test_words_come_as_they_are(moody):
    line = [sys.executable, "-m", "k2cli", "render", "--only", "füx"]
    done = subprocess.run(line, capture_output=True, env=os.environ | {"PYTHONIOENCODING": "latin-1"})

    assert done.returncode == 2 and done.stderr.startswith(b"Error: ") and b'named "f\xfcx".' in done.stderr
