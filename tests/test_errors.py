"""What a user can mend ends in a sentence wherever it comes from."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from model.errors import K2Error, reported

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (K2Error("It is torn.", hint="Mend it."), "Error: It is torn.\nHint:  Mend it."),
        (K2Error("It is torn."), "Error: It is torn."),
        (FileNotFoundError("No such file: judge"), "Error: No such file: judge."),
        (FileNotFoundError(2, "No such file or directory", "judge"), "Error: judge: No such file or directory."),
    ],
)
def test_a_module_that_is_run_ends_in_a_sentence(error, told):
    with pytest.raises(SystemExit) as ended, reported():
        raise error
    assert ended.value.code == told  # which Python writes to standard error, and exits with 1


@pytest.mark.parametrize("error", [ValueError("a bug"), OSError("of no file")])
def test_a_bug_keeps_its_traceback(error):
    with pytest.raises(type(error)), reported():
        raise error


@pytest.mark.parametrize("module", ["data", "judge", "release", "samples"])
def test_a_module_that_is_called_wrongly_says_how_it_is_called(module, tmp_path):
    asked = ["x"] if module in ("data", "judge") else []
    command = [sys.executable, "-m", f"model.train.{module}", *asked]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.startswith("usage: ") and "Traceback" not in done.stderr


def test_encoding_without_data_says_how_to_get_some(tmp_path):
    command = [sys.executable, "-m", "model.train.encode", "256"]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == "Hint:  build it with: python -m model.train.data"
