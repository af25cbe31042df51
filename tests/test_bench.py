"""The benchmarks run end to end at toy size, where their figures mean nothing."""

from __future__ import annotations

import runpy
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
def test_benchmark_runs_and_writes_its_results(tmp_path, monkeypatch, script):
    """Each runs as a program, but in this process: most of the time would go into importing diffusers."""
    pytest.importorskip("diffusers")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(BENCH)
    monkeypatch.setattr(sys, "argv", [script, *ARGUMENTS[script], "--smoke", "--out", "found.toml"])
    runpy.run_path(str(BENCH / script), run_name="__main__")

    assert tomllib.loads((tmp_path / "found.toml").read_text())["machine"]["threads"]
    assert (tmp_path / "found.png").exists() or script == "true_size.py"
    assert not list(tmp_path.glob("scratch/*"))
