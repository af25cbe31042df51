"""The README's recipes for the shell, make and cron, run exactly as written; the pictures are flat colours."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PROJECT, write_weights
from test_readme import README, blocks

STAND_IN = """\
#!{python}
import sys
from pathlib import Path
from types import ModuleType
sys.path[:0] = {path!r}
from conftest import FakePipeline
from k2cli import app
from model import library
library.BUNDLED = Path({box!r})
sys.modules["model.pipeline"] = ModuleType("model.pipeline")
sys.modules["model.pipeline"].Pipeline = FakePipeline
app.main()
"""


@pytest.fixture
def shell(tmp_path):
    """A folder with two projects and a pool of prompts, and `k2` on the path, complete except for the network."""
    box, tools = tmp_path / "box", tmp_path / "tools"
    box.mkdir()
    tools.mkdir()
    write_weights(box / "mini-raw.safetensors", {"kind": "dit", "variant": "raw", "native": 128})
    write_weights(box / "mini-vae.safetensors", {"kind": "vae"})
    here = Path(__file__).parent
    script = STAND_IN.format(python=sys.executable, path=[str(here), str(here.parent)], box=str(box))
    (tools / "k2").write_text(script)
    (tools / "k2").chmod(0o755)
    home = tmp_path / "home"
    for name in ("moody", "other"):
        (home / name / "styles").mkdir(parents=True)
        (home / name / "k2.toml").write_text(PROJECT.replace("an owl at night", f"an owl, {name}"))
    (home / "prompts.txt").write_text("tea\na pear\na plum\n")

    def run(command: str, *program: str) -> str:
        for tool in program:
            if shutil.which(tool) is None:
                pytest.skip(f"there is no {tool} on this machine")
        environ = os.environ | {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "HOME": str(home)}
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command], cwd=home, env=environ, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    run.home = home
    return run


def test_shell_recipes(shell):
    pool, everywhere, newest, few, owls = blocks("bash")[0].strip().splitlines()

    assert len(shell(pool, "shuf").splitlines()) == 2
    made = shell(everywhere, "find", "xargs").splitlines()
    assert len(made) == 4 and {path.split("/")[0] for path in made} == {"moody", "other"}
    assert shell(newest, "jq") == "moody/outputs/0002-fox-and-1-more/an-owl-moody-7.png\n"
    assert shell(few, "jq").splitlines()[-2:] == [
        "moody/outputs/0002-fox-and-1-more/fox-7.png\ta red fox",
        "moody/outputs/0002-fox-and-1-more/an-owl-moody-7.png\tan owl, moody",
    ]
    packed = shell(f"{owls} && tar -tzf owls.tgz", "tar")
    assert packed == "moody/outputs/0002-fox-and-1-more/an-owl-moody-7.png\n"


def test_recipe_for_a_program_that_streams_prompts(shell):
    fox, wrong, empty, owl = shell(blocks("bash")[1], "jq").splitlines()

    assert (fox, owl) == (
        "moody/outputs/0001-a-red-fox/a-red-fox-7.png",
        "moody/outputs/0002-a-snowy-owl/a-snowy-owl-7.png",
    )
    assert (wrong, empty) == ('A reading of "{|}" is empty.', "A prompt is empty.")


def test_make_recipe(shell):
    (shell.home / "Makefile").write_text(blocks("make")[0])

    shell("make fox.png", "make")
    assert (shell.home / "fox.png").read_bytes()[:4] == b"\x89PNG"
    assert "up to date" in shell("make fox.png")
    os.utime(shell.home / "moody" / "k2.toml", (2**31, 2**31))
    assert "k2 render" in shell("make fox.png")


def test_cron_recipe(shell):
    """cron ends the line at an unescaped %."""
    *when, command = blocks("cron")[0].strip().split(maxsplit=5)
    assert len(when) == 5 and not re.search(r"(?<!\\)%", command)

    shell(command.replace(r"\%", "%"))

    assert (shell.home / "moody" / "gallery" / "index.html").exists()
    *pictures, page = (shell.home / "moody" / "cron.log").read_text().splitlines()
    assert page == "gallery/index.html" and [Path(each).stem[-2:] for each in pictures] == ["00", "00"]


def test_readme_lists_exactly_the_keys_printed_as_json(shell, tmp_path):
    """Every key printed is in the README's table, and every key in the table is printed by some command."""
    table = README.split("| key | holds |")[1].split("\n\n")[0]
    told = {key for row in re.findall(r"^\| (`[^|]*) \|", table, re.MULTILINE) for key in re.findall(r"`(\w+)`", row)}
    picture = shell("k2 render --project moody --only fox --json --quiet")
    again = shell(f"k2 rerun --json --quiet {json.loads(picture)['file']}")
    planned = shell("k2 render --project moody --dry-run --json").splitlines()[0]
    wrong = shell("echo '{|}' | k2 render --project moody --stream --json --quiet || true")

    found = set().union(*(json.loads(text) for text in (picture, again, planned, wrong)))
    rows = re.findall(r"^\| `(prompt|settings)` \| (.*) \|$", table, re.MULTILINE)
    parts = {key: set(re.findall(r"`(\w+)`", row)) for key, row in rows}

    assert found == told
    assert parts["prompt"] == set(json.loads(picture)["prompt"])
    assert parts["settings"] <= set(json.loads(picture)["settings"])
