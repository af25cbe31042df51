"""The README's commands work, in the order in which they appear."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import warm
from PIL import Image

from k2cli.project import Project
from model import library

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
INSTALLS = ("pip install -e . && k2 render projects_example/stickers", 'pip install -e ".[test]" && pytest')

SMALL = r"sed -i 's/^\[render\]$/&\nresolution = 128\nsteps = 8/' k2.toml"  # commands as printed, but faster to render

needs_weights = pytest.mark.skipif("mini" not in library.bundled_models(), reason="the box holds no weights yet")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """The part of a fresh clone that commands write into; `k2` itself is installed."""
    folder = tmp_path_factory.mktemp("clone")
    shutil.copytree(ROOT / "projects_example", folder / "projects_example", ignore=shutil.ignore_patterns("outputs"))
    return folder


def test_the_first_two_blocks_install():
    assert tuple(block.strip() for block in blocks("sh")[:2]) == INSTALLS


def test_the_pytorch_it_names_is_one_that_k2_accepts():
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["dependencies"]
    (bounds,) = re.findall(r"^torch(\S+)$", "\n".join(needed), re.MULTILINE)
    assert f'"torch{bounds.split(",")[-1]}"' in README


@needs_weights
def test_all_commands_work_in_order(clone, tmp_path):
    """One shell runs all blocks, as a reader would, except for installing k2 and running this suite."""
    render = INSTALLS[0].removeprefix("pip install -e . && ")
    tour = "\n".join(blocks("sh")[2:]).replace("\ncd moody\n", f"\ncd moody\n{SMALL}\n", 1)
    script = "\n".join(["set -eux -o pipefail", render, tour])
    path = os.pathsep.join([str(tmp_path), os.environ["PATH"]])

    with warm.k2_in(tmp_path):
        done = subprocess.run(
            ["bash", "-c", script], cwd=clone, env=os.environ | {"PATH": path}, capture_output=True, text=True
        )

    assert done.returncode == 0, done.stderr[-3000:]
    assert len(list(clone.glob("projects_example/stickers/outputs/*/sheet.png"))) == 1
    assert "Identical, pixel for pixel." in done.stderr


@needs_weights
def test_the_python_example_works(clone):
    done = subprocess.run([sys.executable, "-c", *blocks("python")], cwd=clone, capture_output=True, text=True)

    assert done.returncode == 0, done.stderr[-3000:]
    assert (clone / "fox.png").exists()


def test_the_example_project_is_valid(fake, tmp_path):
    (tmp_path / "styles").mkdir()
    (tmp_path / "refs" / "dusk").mkdir(parents=True)
    Image.new("RGB", (64, 64)).save(tmp_path / "refs" / "dusk" / "a.png")
    for text in blocks("toml"):
        name = re.match(r"# (\S+?\.toml)", text)
        assert name and tomllib.loads(text)
        (tmp_path / name[1]).write_text(text)
    (tmp_path / "styles" / "riso.toml").write_text('keywords = ["riso print"]\n')

    project = Project.open(tmp_path)
    planned = project.shots(project.resolve_settings(), None, {"blend": 0.5})

    assert [shot.stem for shot in planned] == ["fox-7", "fox-8"]


@needs_weights
def test_links_and_pictures_exist():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
