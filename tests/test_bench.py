"""The benchmarks run from end to end, at toy size; what they measure then means nothing."""

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
def test_it_measures_and_writes(tmp_path, monkeypatch, script):
    """Each as the program that it is, but in this process: most of what one takes is the import of diffusers."""
    pytest.importorskip("diffusers")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(BENCH)
    monkeypatch.setattr(sys, "argv", [script, *ARGUMENTS[script], "--smoke", "--out", "found.toml"])
    runpy.run_path(str(BENCH / script), run_name="__main__")

    assert tomllib.loads((tmp_path / "found.toml").read_text())["machine"]["threads"]
    assert (tmp_path / "found.png").exists() or script == "true_size.py"
    assert not list(tmp_path.glob("scratch/*"))
