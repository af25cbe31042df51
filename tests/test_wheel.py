"""What an installation contains: the packages with their weights, recipes and page, and nothing else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIST = """
from setuptools.dist import Distribution

project = Distribution({"script_name": "setup.py"})
project.parse_config_files(["pyproject.toml"])
command = project.get_command_obj("build_py")
command.ensure_finalized()
data = [f"{source}/{name}" for _, source, _, names in command.data_files for name in names]
print(*(path for *_, path in command.find_all_modules()), *data, sep="\\n")
"""


@pytest.fixture(scope="module")
def files() -> set[str]:
    """The files that a wheel is built from, as setuptools finds them; building one takes many times as long."""
    pytest.importorskip("setuptools", minversion="77", reason="setuptools is not installed")
    done = subprocess.run([sys.executable, "-c", LIST], cwd=ROOT, check=True, capture_output=True, text=True)
    return set(done.stdout.splitlines())


def test_wheel_holds_exactly_the_package_files(files):
    there = {
        path.relative_to(ROOT).as_posix()
        for package in ("k2cli", "model")
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }

    assert files == there


def test_wheel_holds_the_bundled_weights_and_stays_small(files):
    weights = [name for name in files if name.endswith(".safetensors")]

    assert {"model/weights/mini-raw.safetensors", "model/weights/mini-turbo.safetensors"} <= set(weights)
    assert all(name.startswith("model/weights/") for name in weights)
    assert sum((ROOT / name).stat().st_size for name in files) < 70e6
