"""The benchmarks run from end to end, at toy size; what they measure then means nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

BENCH = Path(__file__).parent / "bench"
ARGUMENTS = {
    "speed.py": [],
    "growth.py": [],
    "style.py": [],
    "gpu.py": [],
    "products.py": [],
    "modulation.py": ["--seeds", "2"],
    "true_size.py": ["scratch", "--stored", "int4"],
}


@pytest.mark.slow
@pytest.mark.parametrize("script", ARGUMENTS)
def test_it_measures_and_writes(tmp_path, script):
    pytest.importorskip("diffusers")
    command = [sys.executable, BENCH / script, *ARGUMENTS[script], "--smoke", "--out", "found.toml"]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True
    )

    assert done.returncode == 0, done.stderr[-3000:]
    assert tomllib.loads((tmp_path / "found.toml").read_text())["machine"]["threads"]
    assert (tmp_path / "found.png").exists() or script == "true_size.py"
    assert not list(tmp_path.glob("scratch/*"))
