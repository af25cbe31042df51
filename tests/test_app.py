"""The commands as a user meets them: output streams, exit codes, and when a project stays unchanged."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import signal
import stat
import subprocess
import sys
import time
import tomllib
import unicodedata
from collections.abc import Callable
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
from conftest import PROJECT, tree, write_weights
from PIL import Image
from rich.console import Console
from safetensors.numpy import save_file
from test_library import transformer, write

from k2cli import console, doctor, models, runs, sheet, workers
from k2cli.app import app
from k2cli.commands import PATH_METAVARS
from k2cli.console import Unwritable
from k2cli.execute import show_plan
from k2cli.models_app import list_models
from k2cli.planning import plan_job
from k2cli.project import Project
from k2cli.texts import shell_quote
from k2cli.toml_tables import Toml
from model import library
from model.errors import K2Error

K2 = Path(sys.executable).with_name("k2")


def test_help_imports_nothing_heavy():
    code = """if True:
        import sys
        from k2cli.app import app
        try:
            app(["--help"])
        except SystemExit:
            pass
        heavy = {"torch", "transformers", "numpy", "PIL", "rich.console", "k2cli.disk"} & set(sys.modules)
        sys.exit(f"imported: {heavy}" if heavy else 0)
    """
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_commands_that_render_nothing_do_not_import_torch(moody):
    lines = {
        "render --dry-run": 0,
        "render --dry-run --creativity high --cohesion 0.5 --matrix seed=1,2": 0,
        "render --only fux": 2,
        "render --resume": 1,
        "mix-styles nope=1": 1,
        "watch --steps 0": 2,
        "log": 0,
        "gallery": 0,
        "style list": 0,
        "models list": 0,
    }
    run = f"""if True:
        import sys
        from k2cli.app import app
        for line, code in {lines}.items():
            try:
                app(line.split())
            except SystemExit as done:
                assert done.code == code, line
            assert "torch" not in sys.modules, line
    """
    done = subprocess.run([sys.executable, "-c", run], capture_output=True, text=True)

    assert done.returncode == 0, done.stderr


def test_help_has_a_full_sentence_for_every_command(k2):
    """Help cuts what does not fit into 80 columns and ends it in dots."""
    for words in ([], ["style"], ["models"], ["moodboard"]):
        lines = k2(*words, "--help").stdout.partition("Commands:\n")[2].splitlines()

        assert lines and all(line.endswith(".") and not line.endswith("...") for line in lines)
        assert words or [line.split()[0] for line in lines][:3] == ["new", "render", "watch"]


@pytest.mark.parametrize("words", [[], ["render"], ["log"], ["style"], ["style", "add"], ["models", "info"], ["train"]])
def test_h_is_short_for_help(k2, words):
    shown = k2(*words, "-h").stdout

    assert shown == k2(*words, "--help").stdout and "Usage: " in shown
    assert "  -h, --help  " in shown and max(map(len, shown.splitlines())) <= 80
    assert not re.search(r"<[a-z]", shown)  # a Python type


def test_new_then_render(fake, k2, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    assert k2("new", "moody").stdout == "moody\n"
    monkeypatch.chdir(tmp_path / "moody")
    result = k2("render")

    paths = result.stdout.splitlines()
    assert paths == [
        f"outputs/0001-fox-and-2-more/{name}-{seed}.png" for name in ("fox", "owl", "sailboat") for seed in (7, 8)
    ]
    assert "6 pictures and a contact sheet in outputs/0001-fox-and-2-more" in result.stderr
    for path in map(Path, paths):
        with Image.open(path) as image:
            image.load()
        assert Toml.read(path.with_suffix(".toml"), path.name).table["settings"]["seed"] == int(
            path.stem.split("-")[-1]
        )
    with Image.open("outputs/0001-fox-and-2-more/sheet.png") as sheet:
        assert sheet.width > 6 * 64


def test_terminal_shows_the_model_loading(moody, k2, monkeypatch):
    monkeypatch.setattr(console, "console", Console(stderr=True, force_terminal=True))

    before, _, after = k2("render").stderr.partition("pictures")

    assert "loading the model" in before and "loading the model" not in after
    assert "loading" not in k2("render", "--quiet").stderr


def test_printed_commands_are_quoted_and_work_from_any_folder(fake, k2, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "Next: cd 'my mood' && k2 render\n" in k2("new", "my mood").stderr
    Path("here").mkdir()
    monkeypatch.chdir("here")
    assert k2("new", ".").stderr == "Next: k2 render\n"
    (tmp_path / "my mood" / "refs" / "deep").mkdir()
    monkeypatch.chdir(tmp_path / "my mood" / "refs" / "deep")
    k2("render", "-p", "tea")

    assert f"k2 show '{tmp_path}/my mood/outputs/" in k2().stdout


@pytest.mark.parametrize(
    ("there", "output", "message"),
    [("cu.toml", "cu.png", "cu.toml exists already."), ("cu.png", "cu.png", "cu.png exists already."),
     ("x", "nodir/cu.png", "There is no folder nodir.")],
)  # fmt: skip
def test_rerun_checks_first_whether_it_can_write(moody, k2, fake, there, output, message):
    (made,) = k2("render", "-p", "tea").stdout.splitlines()
    (moody / there).write_text("mine")
    fake.seen.clear()

    assert message in k2("rerun", made, "-o", output, code=1).stderr and fake.seen == []


def test_prompts_come_from_options_and_standard_input(moody, k2):
    k2("render", "-p", "tea", "-p", "a cake", "-", input="a pear\n\n  a plum \n")

    assert sorted(path.name for path in moody.glob("outputs/*/*.png")) == [
        "a-cake-7.png",
        "a-pear-7.png",
        "a-plum-7.png",
        "sheet.png",
        "tea-7.png",
    ]


def test_byte_order_marks_are_ignored(moody, k2, fake):
    """Some editors put one at the start of every text file."""
    (moody / "k2.toml").write_text(PROJECT, "utf-8-sig")
    (moody / "styles").mkdir()
    (moody / "styles" / "dusk.toml").write_text('keywords = ["dusk"]\n', "utf-8-sig")

    (made,) = k2("render", "-", "--style", "dusk=1", input="\ufeffa pear\n").stdout.splitlines()
    record = Path(made).with_suffix(".toml")
    record.write_bytes(b"\xef\xbb\xbf" + record.read_bytes())

    assert fake.seen[0].prompt == "a pear, dusk" and made.endswith("/a-pear-7.png")
    assert k2("log").stdout.startswith(made)
    joined = k2("render", "-", "--dry-run", "--json", input='\ufeffa plum\n\ufeff{"prompt": "tea"}\n').stdout
    assert [json.loads(line)["prompt"]["text"] for line in joined.splitlines()] == ["a plum", "tea"]


def test_json_prints_one_object_per_line(moody, k2):
    result = k2("render", "--json", "--quiet", "--batch", "2")

    records = [json.loads(line) for line in result.stdout.splitlines()]
    assert [record["settings"]["seed"] for record in records] == [7, 8, 7, 8]
    assert all(Path(record["file"]).exists() for record in records)
    assert result.stderr == ""


def test_dry_run_shows_everything_and_writes_nothing(moody, k2, fake):
    before = tree(moody)

    lines = k2("render", "--dry-run", "--seed", "40").stdout.splitlines()
    objects = [json.loads(line) for line in k2("render", "--dry-run", "--json").stdout.splitlines()]

    assert lines[0] == "fox-40.png\t128x128\tseed 40\t52 steps, guidance 3.5\ta red fox"
    made = objects[0]["settings"]
    assert (made["width"], made["height"], made["steps"], made["guidance"]) == (128, 128, 52, 3.5)
    assert [each["prompt"]["expanded"] for each in objects] == ["a red fox", "an owl at night"]
    assert objects[0]["model"] == {"name": "mini", "variant": None} and objects[0]["variant"] is None
    assert tree(moody) == before and fake.loaded == []


def test_dry_run_on_a_terminal_prints_a_table(moody, fake, monkeypatch, capsys):
    project = Project.open(moody)
    settings = project.resolve_settings()
    job = plan_job(project, settings, project.shots(settings), compared=False)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")

    show_plan([job], as_json=False, quiet=True)

    assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == [
        "fox-7.png              128x128  seed 7  52 steps, guidance 3.5  a red fox",
        "an-owl-at-night-7.png  128x128  seed 7  52 steps, guidance 3.5  an owl at night",
    ]


def test_dry_run_lines_show_settings_and_project(moody, k2, fake, tmp_path):
    (moody / "styles").mkdir(exist_ok=True)
    (moody / "styles" / "dusk.toml").write_text('keywords = ["dusk"]\n')
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "k2.toml").write_text('[[prompt]]\ntext = "tea"\n')

    lines = k2(
        "render", "--only", "fox", "--matrix", "steps=1,2", "--style", "dusk=-1", "--dry-run"
    ).stdout.splitlines()
    assert [line.split("\t")[3] for line in lines] == [f"{n}, guidance 3.5, dusk=-1" for n in ("1 step", "2 steps")]
    for given, told in ((("0.5",), " until 0.5"), (("1",), ""), (("0.5", "--guidance", "0"), "")):
        line = k2("render", "--only", "fox", "--guidance-until", *given, "--dry-run").stdout.splitlines()[0]
        assert line.split("\t")[3] == f"52 steps, guidance {0 if '--guidance' in given else 3.5:g}{told}"
    off = ("--guidance-until", "0.5", "--dry-run")
    told = "Guidance is off, so guidance_until = 0.5 has no effect."
    assert told in k2("render", *off, "--guidance", "0").stderr and told not in k2("render", *off).stderr
    assert told not in k2("render", *off, "--matrix", "guidance=0,1").stderr
    line = k2("render", "--only", "fox", "--sampler", "ab2", "--dry-run").stdout.splitlines()[0]
    assert line.split("\t")[3] == "52 steps of ab2, guidance 3.5"
    tied = k2("render", "--scope", "run", "--cohesion", "0.8", "--dry-run").stdout.splitlines()
    assert all("cohesion 0.8" in line for line in tied)
    of_two = k2("render", moody, tmp_path / "other", "--dry-run").stdout.splitlines()
    assert [line.split("/")[-2] for line in of_two] == [".", ".", "other"]


def test_errors_in_another_project_give_the_full_path(moody, k2, fake, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "k2.toml").write_text("[render]\nsed = 3\n")
    told = k2("render", moody, tmp_path / "other", code=1).stderr
    assert f'{tmp_path / "other" / "k2.toml"}, line 2: unknown key "sed"' in " ".join(told.split())


def test_project_file_can_select_turbo(moody, k2, fake):
    write_weights(library.BUNDLED / "mini-turbo.safetensors", {"kind": "dit", "variant": "turbo"})
    text = (moody / "k2.toml").read_text()
    (moody / "k2.toml").write_text(text.replace("[render]\n", '[render]\nvariant = "turbo"\n'))

    def used(*more: str) -> str:
        return json.loads(k2("render", "--dry-run", "--only", "fox", "--json", *more).stdout.splitlines()[0])["variant"]

    assert used() == used("--turbo") == "turbo" and used("--raw") == "raw"
    k2("render", "--only", "fox")
    k2("render", "--resume", "--raw", code=2)
    assert fake.loaded == [("mini", "turbo", None, None)]
    write_weights(moody / "lone.safetensors", {"kind": "dit", "variant": "raw"})
    refused = k2("render", "--model", "lone.safetensors", code=2).stderr
    assert "lone.safetensors holds no turbo weights." in refused and "Use --raw, or name others." in refused
    (moody / "k2.toml").write_text(text.replace("[render]\n", '[render]\nvariant = "turbe"\n'))
    assert 'Did you mean "turbo"?' in k2("render", code=1).stderr


def test_warns_about_settings_that_do_not_suit_turbo(moody, k2, fake):
    write_weights(library.BUNDLED / "mini-turbo.safetensors", {"kind": "dit", "variant": "turbo"})
    text = (moody / "k2.toml").read_text()
    (moody / "k2.toml").write_text(text.replace("seed = 7", "seed = 7\nsteps = 28\nguidance = 2.5"))

    told = k2("render", "--turbo", "--only", "fox").stderr
    assert "moody has steps = 28 and guidance = 2.5; turbo is made for --steps 8 --guidance 0" in " ".join(told.split())
    assert "made for" not in k2("render", "--turbo", "--only", "fox", "--steps", "20", "--guidance", "1").stderr
    assert "made for" not in k2("render", "--only", "fox").stderr


def test_several_projects_load_the_weights_once(moody, k2, fake, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "k2.toml").write_text('[[prompt]]\ntext = "tea"\n')

    result = k2("render", moody, tmp_path / "other")

    assert len(result.stdout.splitlines()) == 3
    assert fake.loaded == [("mini", None, None, None)]
    planned = k2("render", moody, tmp_path / "other", "--dry-run", "--json").stdout.splitlines()
    assert [json.loads(line)["project"] for line in planned] == [str(moody), str(moody), str(tmp_path / "other")]


def test_project_named_in_several_ways_is_rendered_once(moody, k2, tmp_path):
    (tmp_path / "link").symlink_to("moody")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "k2.toml").write_text('[[prompt]]\ntext = "tea"\n')
    ways = ["../link", moody, tmp_path / "other", ".", f"{moody}/", "k2.toml"]

    made = k2("render", *ways).stdout.splitlines()

    assert [Path(path).name for path in made] == ["fox-7.png", "an-owl-at-night-7.png", "tea-0.png"]
    assert len(k2("log", *ways).stdout.splitlines()) == 3


def test_command_line_options_reach_the_model(moody, k2, fake):
    write_weights(library.BUNDLED / "mini-turbo.safetensors", {"kind": "dit", "variant": "turbo"})
    k2(
        "render",
        "--only",
        "fox",
        "--turbo",
        "--device",
        "cpu",
        "--steps",
        "4",
        "--guidance",
        "0",
        "--size",
        "96x64",
        "--no-embed",
    )

    assert fake.loaded == [("mini", "turbo", "cpu", None)]
    (spec,) = fake.seen
    assert (spec.steps, spec.guidance, spec.width, spec.height) == (4, 0.0, 96, 64)
    with Image.open(moody / "outputs" / "0001-fox" / "fox-7.png") as image:
        assert image.text == {}


def test_precision_and_offload_reach_model_plan_and_record(moody, k2, fake):
    """If neither project file nor command line sets them, the model chooses, and the record says what it chose."""
    k2("render", "--only", "fox", "--precision", "int8", "--offload", "text")
    folder = moody / "outputs" / "0001-fox"
    (moody / "k2.toml").write_text(PROJECT.replace("seed = 7", 'seed = 7\nprecision = "fp8"'))
    k2("render", "--only", "fox", "--offload", "all")
    made = Path(k2("render", "-p", "tea", "--project", moody, "--precision", "native").stdout.strip())
    workers.load_pipeline.cache_clear()
    k2("rerun", folder / "fox-7.png", "-o", "again.png")

    assert fake.held == [("int8", "text"), ("fp8", "all"), ("native", None), ("int8", "text")]
    plan = tomllib.loads((folder / "run.toml").read_text())["model"]
    assert (plan["precision"], plan["offload"]) == ("int8", "text")
    used = tomllib.loads((folder / "fox-7.toml").read_text())["settings"]
    assert (used["precision"], used["offload"]) == ("int8", "text")
    assert "weights     int8\noffload     text\n" in k2("show", folder / "fox-7.png").stdout
    assert "weights" not in k2("show", made).stdout


def test_resume_uses_the_same_precision_and_offload_as_before(moody, k2, fake):
    k2("render", "--precision", "int8", "--offload", "all")
    (moody / "outputs" / "0001-fox-and-1-more" / "fox-7.png").unlink()
    (moody / "outputs" / "0001-fox-and-1-more" / "fox-7.toml").unlink()
    workers.load_pipeline.cache_clear()

    k2("render", "--resume")

    assert fake.held == [("int8", "all")] * 2
    assert "--resume" in k2("render", "--resume", "--precision", "int8", code=2).stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message", "hint"),
    [
        (["render"], 1, 'k2.toml, line 5: unknown key "sed" in [render].', 'Did you mean "seed"?'),
        (["render", "--batch", "many"], 2, "Invalid value for '--batch' / '-n': \"many\" is not a whole number", ""),
        (["render", "--steps", "1.5"], 2, "Invalid value for '--steps': \"1.5\" is not a whole number", ""),
        (["render", "--steps", "9" * 5000], 2, "Invalid value for '--steps': it has too many digits\n", ""),
        (["train", "refs", "--steps", "0"], 2, "Invalid value for '--steps': it must be at least 1\n", ""),
        (["render", "--workers", "257"], 2, "Invalid value for '--workers': it must be at most 256\n", ""),
        (["render", "--resume", "--run", "-1"], 2, "Invalid value for '--run': it must be at least 1\n", ""),
        (["render", "--cohesion", "0,5"], 2, "'--cohesion': \"0,5\" is not a number, but 0.5 is", ""),
        (["render", "--nonsense"], 2, "No such option: --nonsense", ""),
        (["rendr"], 2, "No such command 'rendr'. Did you mean 'render', 'rerun'?", ""),
        (["render", "--style", "dusk"], 2, '"dusk" is not NAME=WEIGHT', ""),
        (["render", "--precision", "int5"], 2, '--precision cannot be "int5".', 'Did you mean "int8"?'),
        (["render", "--offload", "disk"], 2, '--offload cannot be "disk".', "Known: none, text, all."),
        (["render", "--cohesion", "3"], 2, "--cohesion must be between 0 and 1, not 3.0.", ""),
        (["render", "--matrix", "steps"], 2, '--matrix: "steps" has no values to compare.', "Like steps=1,2."),
        (["render", "--matrix", "steps=1,2", "--steps", "1"], 2, '"steps" is already set by another option', ""),
        (["render", "--matrix", "size=64x64", "--aspect", "1:1"], 2, '"size" is already set by another option', ""),
        (["render", "--matrix", "style.x=1", "--style", "x=1"], 2, '"style.x" is already set by another option', ""),
        (["render", "--matrix", "steps=1", "--matrix", "steps=2"], 2, '"steps" is given twice', "steps=1,2"),
        (["render", "--only", "fox", "-p", "tea"], 2, "it selects project prompts", ""),
        (["render", "--only", "fox", "-"], 2, "it selects project prompts", ""),
        (["render", "a red owl"], 1, 'There is no project "a red owl".', "k2 render -p 'a red owl'"),
        (["render", "-p", "a", "red", "fox"], 1, 'There is no project "red".', "in quotes: k2 render -p 'a red fox'"),
        (["render", ".", "-p", "a", "red", "fox"], 1, 'There is no project "red".', "k2 render . -p 'a red fox'"),
        (
            ["render", "modoy", "-p", "a red fox"],
            1,
            'There is no project "modoy".',
            "its own -p. To create a project",
        ),
        (["render", "-p", "a", "-p", "the", "cat"], 1, 'There is no project "cat".', "k2 render -p cat"),
        (["render", ".", "../gone"], 1, 'There is no project "../gone".', "Check the path."),
        (["render", ".", "../moody/my ideas"], 1, "There is no project", "Check the path."),
        (["render", "a 1/2 moon"], 1, 'There is no project "a 1/2 moon".', "k2 render -p 'a 1/2 moon'"),
        (["render", "--matrix", "cfg=1,2"], 2, '"cfg" is not an axis.', "called guidance, and is 1 less than a CFG"),
        (["render", "a red fox " * 99], 1, 'There is no project "a red fox', "k2 render -p 'a red fox a red fox"),
        (["render", "--size", "64x64", "--aspect", "1:1"], 2, "--size excludes --aspect", "Keep --size"),
        (["show", "x" * 5000], 1, "x" * 200, ""),  # too long or missing: Python versions differ in which they report
        (["show", "k2.toml/x.png"], 1, "There is no k2.toml/x.png", ""),
        (["log", "boards"], 1, "There is no folder boards.", "k2 new NAME"),
        (["style", "add", "x", "gone.png"], 1, "There is no gone.png.", "Name pictures, or a folder of them."),
        (["show", "k2.toml"], 1, "k2.toml is not the record of a picture.", "Name a picture that k2 made"),
        (["show", "."], 1, ". is a folder.", "k2 log"),
        (["log", "--all", "-n", "1"], 2, "Invalid value for --all: it cannot be combined with --last", ""),
        (["render", "--resume", "--seed", "3"], 2, "no other setting can be given", ""),
    ],
)
def test_unknown_keys_and_wrong_usage(moody, k2, arguments, code, message, hint):
    (moody / "k2.toml").write_text(PROJECT.replace("seed = 7", "sed = 7") if arguments == ["render"] else PROJECT)
    before = tree(moody)

    result = k2(*arguments, code=code)

    assert message in result.stderr and hint in result.stderr and result.stdout == ""
    assert tree(moody) == before


@pytest.mark.parametrize(
    "arguments",
    [
        ["render", "--size", "100x100"],
        ["render", "--aspect", "99:1"],
        ["render", "--resolution", "huge"],
        ["render", "--steps", "0"],
        ["render", "--moodboard", "9"],
        ["render", "--matrix", "size=1x1"],
        ["render", "--matrix", "style.dusk=0,1"],
        ["render", "--matrix", "seed=1,2", "--batch", "2"],
        ["render", "--init-image", "gone.png"],
        ["render", "--init-image", "k2.toml"],
        ["watch", "--size", "100x100"],
        ["style", "add", "x", "k2.toml", "--method", "magic"],
        ["moodboard", "analyze", "k2.toml", "--name", "a b"],
    ],
)
def test_wrong_option_values_are_usage_errors(moody, k2, arguments):
    if "--moodboard" in arguments:
        (moody / "k2.toml").write_text(f'{PROJECT}\n[moodboard]\nimages = ["board.png"]\n')
    option = next(word for word in arguments if word.startswith("--"))

    assert f"Error: {option}" in k2(*arguments, code=2).stderr


def test_wording_of_a_message_does_not_make_it_a_usage_error(fake, moody, k2):
    """A file name may look like an option, and a wrong size may come from the project file."""
    (picture,) = k2("render", "-p", "tea").stdout.splitlines()

    assert "Error: --x.tif is not a name for a picture." in k2("rerun", picture, "--output=--x.tif", code=1).stderr

    (moody / "k2.toml").write_text(PROJECT.replace("seed = 7", 'seed = 7\nsize = "100x100"'))
    assert "the sides of 100x100" in k2("render", code=1).stderr


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (["--size", "100x100"], "--size: the sides of 100x100 are not multiples of 16.", "The nearest size is 96x96."),
        (["--size", "99999x16"], "--size: 99999x16 is out of range.", "Sides are from 64 to 4096 pixels."),
        (["--size", "4096x2048"], "--size: 4096x2048 is more than 4,194,304 pixels.", "Choose a smaller size."),
        (["--device", "tpu"], '--device cannot be "tpu".', "Like cpu, cuda, cuda:1, mps."),
        (["--device", "cuda:99"], 'There is no device "cuda:99".', "Available: "),
        (["--turbo"], "There is no bundled turbo checkpoint of mini.", "Use --raw."),
        (["--model", "minni"], '--model: There is no model "minni" here.', 'Did you mean "mini"?'),
        (["--model", ""], '--model: There is no model "" here.', "Known: mini"),
        (["--model", "."], "--model: . holds no weights: no .safetensors or .gguf.", "Name a folder or a file"),
        (["--model", "k2.toml"], "--model: k2.toml holds no weights", "Name a folder or a file that does"),
        (["--style", "dusk=1"], '--style: there is no style "dusk".', "Create styles/dusk.toml."),
        (["--only", "fux"], '--only: moody has no prompt named "fux".', 'Did you mean "fox"?'),
        (["-p", "a\x1b[2Jb"], "A prompt contains a control character.", ""),
        (["-p", "a fox \uffff"], "A prompt contains a control character.", ""),
        (["--resume"], "moody has no run to resume.", "Start one with: k2 render"),
        (["-"], "Standard input holds no prompt.", "Give one per line"),
        (["-p", ""], "A prompt is empty.", "Say what the picture should show."),
        (["-p", "tea", "-p", "   "], "A prompt is empty.", "Say what the picture should show."),
    ],
)
def test_errors_users_can_fix_are_one_sentence_and_a_hint(moody, k2, arguments, message, hint):
    before = tree(moody)

    result = k2("render", *arguments, code=2 if message.startswith("--") else 1)

    assert message in result.stderr and hint in result.stderr
    assert len(result.stderr.splitlines()) <= 2 and result.stdout == ""
    assert tree(moody) == before


def test_missing_project_and_missing_prompts(fake, k2, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    assert "There is no k2.toml in" in k2("render", code=1).stderr
    (tmp_path / "k2.toml").write_text("")
    result = k2("render", code=1)
    assert "k2.toml has no [[prompt]]." in result.stderr and 'k2 render -p "a red fox"' in result.stderr
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize("pictures_before", [0, 1])
def test_full_disk_leaves_whole_pictures_and_one_error_message(moody, k2, monkeypatch, pictures_before):
    before, real, calls = tree(moody), os.fsync, []

    def fsync(handle: int) -> None:
        calls.extend([handle] if stat.S_ISREG(os.fstat(handle).st_mode) else [])
        if len(calls) > 1 + 2 * pictures_before:  # run.toml, then one record and one picture at a time
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    result = k2("render", code=1)

    assert "The disk is full" in result.stderr and len(result.stderr.splitlines()) == 2
    assert len(result.stdout.splitlines()) == pictures_before
    if not pictures_before:  # the run is discarded
        assert tree(moody) == before and "Hint:  Free some space, and try again." in result.stderr
    else:
        assert sorted(path.name for path in moody.glob("outputs/*/*")) == ["fox-7.png", "fox-7.toml", "run.toml"]
        for said in (result.stderr, k2("render", "--resume", code=1).stderr):  # the disk is still full
            assert "Free some space, then resume with: k2 render --resume\n" in said
        monkeypatch.setattr(os, "fsync", real)
        assert k2("render", "--resume").stdout == "outputs/0001-fox-and-1-more/an-owl-at-night-7.png\n"


def test_unwritable_outputs_folder(moody, k2):
    (moody / "outputs").write_text("in the way")
    before = tree(moody)

    assert "cannot be written" in k2("render", code=1).stderr
    assert tree(moody) == before


def test_outputs_linked_outside_need_allow_outside(moody, k2, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (moody / "outputs").symlink_to(tmp_path / "elsewhere")

    assert "outputs lies outside the project" in k2("render", code=1).stderr
    assert not list((tmp_path / "elsewhere").iterdir())
    k2("render", "--allow-outside")
    assert len(list((tmp_path / "elsewhere").iterdir())) == 1


def stop_at(index: int, error: BaseException) -> Callable[[int], None]:
    def stop(at: int) -> None:
        if at == index:
            raise error

    return staticmethod(stop)  # type: ignore[return-value]


def interrupt(fake: Any, k2: Any, index: int) -> Any:
    fake.stop = stop_at(index, KeyboardInterrupt())
    result = k2("render", "--batch", "2", code=130)
    fake.stop = staticmethod(lambda at: None)
    return result


def test_printed_resume_command_resumes_the_interrupted_run(moody, k2, fake, monkeypatch):
    """From another folder, with a project folder whose name needs quoting, and with a later run in between."""
    project = moody.rename(moody.parent / "my mood")
    monkeypatch.chdir(moody.parent)

    later = project / "outputs" / "0009-later"

    def told(stop: Callable[[int], None]) -> str:
        fake.stop = stop
        said = k2("render", "my mood", code=130).stderr
        fake.stop = staticmethod(lambda at: None)
        return said.partition("Resume with: ")[2].strip()

    def begin_another(at: int) -> None:
        if at == 1:
            later.mkdir()
            (later / "run.toml").touch()
            raise KeyboardInterrupt

    assert told(stop_at(1, KeyboardInterrupt())) == "k2 render --resume --project 'my mood'"
    line = told(staticmethod(begin_another))
    assert line == "k2 render --resume --run 2 --project 'my mood'"
    assert k2(*shlex.split(line)[1:]).stdout == "my mood/outputs/0002-fox-and-1-more/an-owl-at-night-7.png\n"


def test_interrupted_rerun_counts_its_pictures(moody, k2, fake):
    folder = Path(k2("render", "--batch", "2").stdout.splitlines()[0]).parent
    made: list[int] = []

    def stop(index: int) -> None:
        made.append(index)
        if len(made) == 3:
            raise KeyboardInterrupt

    fake.stop = stop
    said = k2("rerun", "gone.png", folder, code=130).stderr
    assert said.endswith("Interrupted: 2 of 5 rendered again, 2 of them identical.\n")


def test_resume_finishes_the_run_as_planned(moody, k2, fake):
    """Interrupted, project file edited, resumed: the pictures are those of an uninterrupted run."""
    k2("render", "--batch", "2")
    undisturbed = moody / "outputs" / "0001-fox-and-1-more"
    result = interrupt(fake, k2, 3)
    assert "Interrupted: 3 of 4 pictures" in result.stderr and "k2 render --resume" in result.stderr
    (moody / "k2.toml").write_text(PROJECT.replace("a red fox", "a blue fox"))

    resumed = k2("render", "--resume").stdout.splitlines()

    folder = moody / "outputs" / "0002-fox-and-1-more"
    assert resumed == ["outputs/0002-fox-and-1-more/an-owl-at-night-8.png"]
    assert sorted(p.name for p in folder.iterdir()) == sorted(p.name for p in undisturbed.iterdir())
    for path in undisturbed.glob("*-[78].png"):
        assert Image.open(path).tobytes() == Image.open(folder / path.name).tobytes()
    assert "the run is complete" in k2("render", "--resume").stderr
    assert k2("render", "--resume", "--quiet").stderr == ""


def test_run_interrupted_before_its_first_picture_can_be_resumed(moody, k2, fake):
    k2("render", "-p", "tea")

    said = interrupt(fake, k2, 0).stderr

    folder = "outputs/0002-fox-and-1-more"
    assert said == f"Interrupted: 0 of 4 pictures are in {folder}. Resume with: k2 render --resume\n"
    fake.stop = stop_at(1, KeyboardInterrupt())
    assert f"Interrupted: 1 of 4 pictures are in {folder}." in k2("render", "--resume", code=130).stderr
    fake.stop = stop_at(0, KeyboardInterrupt())
    assert f"Interrupted: 1 of 4 pictures are in {folder}." in k2("render", "--resume", code=130).stderr
    fake.stop = staticmethod(lambda at: None)
    rest = k2("render", "--resume")
    assert len(rest.stdout.splitlines()) == 3
    assert rest.stderr == f"3 more pictures and a contact sheet in {folder}\n"
    assert k2("render", "--resume").stderr == f"{folder}: the run is complete.\n"


def test_dry_run_of_a_complete_run_says_so(moody, k2):
    k2("render")

    shown = k2("render", "--resume", "--dry-run")

    assert shown.stdout == ""
    assert shown.stderr == "outputs/0001-fox-and-1-more: the run is complete.\n"
    assert k2("render", "--resume", "--dry-run", "--quiet").stderr == ""


def test_complete_run_of_one_picture_needs_no_sheet(moody, k2):
    k2("render", "-p", "tea")

    assert k2("render", "--resume").stderr == "outputs/0001-tea: the run is complete.\n"


def test_ctrl_c_while_creating_the_run_folder_keeps_the_plan(moody, k2, monkeypatch):
    rename = Path.rename

    def press(path: Path, target: Path) -> Path:
        signal.raise_signal(signal.SIGINT)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", press)
    result = k2("render", code=130)

    assert "Interrupted: 0 of 2 pictures are in outputs/0001-fox-and-1-more." in result.stderr
    assert len(k2("render", "--resume").stdout.splitlines()) == 2


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_terminated_run_says_how_to_resume(moody, k2, fake, monkeypatch, number, code):
    """The progress bar ends, which shows the cursor again. Afterwards the earlier signal handler is restored."""
    stream = fake.stream

    def end(self, specs, on_step=None):
        signal.raise_signal(number)
        return stream(self, specs, on_step)

    monkeypatch.setattr(fake, "stream", end)
    outside = signal.signal(number, signal.SIG_DFL)  # nohup, for one, makes a process ignore some
    try:
        result = k2("render", code=code)
        after = signal.getsignal(number)
    finally:
        signal.signal(number, outside)

    there = "0 of 2 pictures are in outputs/0001-fox-and-1-more"
    assert result.stderr == f"Interrupted: {there}. Resume with: k2 render --resume\n"
    assert after == signal.SIG_DFL


def test_closed_pipe_after_the_last_picture_suggests_no_resume(moody, k2, monkeypatch):
    def leave(line: str) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr("k2cli.execute.print_result", leave)

    left = k2("render", "-p", "owl", code=1).stderr
    assert left == "The pipe was closed: 1 of 1 pictures are in outputs/0001-owl.\n"


def test_closed_pipe_leaves_a_run_that_can_be_resumed(moody, k2, monkeypatch):
    """As with `k2 render | head -1`."""

    def leave(line: str) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    with monkeypatch.context() as patch:
        patch.setattr("k2cli.execute.print_result", leave)
        left = k2("render", code=1).stderr
        assert k2("render", "--quiet", code=1).stderr == ""
    there = "outputs/0001-fox-and-1-more"
    assert left == f"The pipe was closed: 1 of 2 pictures are in {there}. Resume with: k2 render --resume\n"
    assert k2("render", "--resume", "--run", "1").stdout == f"{there}/an-owl-at-night-7.png\n"


def test_unwritable_standard_output_leaves_a_run_that_can_be_resumed(moody, k2, monkeypatch):
    """As with `k2 render > /dev/full`; after a run of one picture, nothing is left to resume."""

    def fill(line: str) -> None:
        raise Unwritable("Standard output cannot be written.", hint="Send the results somewhere else.")

    with monkeypatch.context() as patch:
        patch.setattr("k2cli.execute.print_result", fill)
        left = k2("render", "--quiet", code=1).stderr
        assert k2("render", "-p", "owl", code=1).stderr.endswith("\nHint:  Send the results somewhere else.\n")
    assert left.endswith("\nHint:  Send the results somewhere else, then resume with: k2 render --resume\n")
    made = k2("render", "--resume", "--run", "1").stdout
    assert made == "outputs/0001-fox-and-1-more/an-owl-at-night-7.png\n"


@pytest.mark.parametrize(
    ("hint", "told"),
    [
        ("Mend it, and try again.", "Mend it, then resume with: k2 render --resume"),
        ("Choose a smaller size.", "Choose a smaller size. Finish the rest as planned: k2 render --resume"),
        ("Mend it: mend -a", "Mend it: mend -a; finish the rest as planned: k2 render --resume"),
        ("", "Finish the rest as planned: k2 render --resume"),
    ],
)
def test_run_that_fails_after_a_picture_says_how_to_resume(moody, k2, fake, hint, told):
    fake.stop = stop_at(1, K2Error("The model is broken.", hint=hint))
    assert k2("render", code=1).stderr.endswith(f"Error: The model is broken.\nHint:  {told}\n")
    fake.stop = staticmethod(lambda at: None)
    assert len(k2("render", "--resume").stdout.splitlines()) == 1


@pytest.mark.parametrize("error", [K2Error("The model is broken."), MemoryError()])
def test_run_that_fails_before_its_first_picture_leaves_nothing(moody, k2, fake, error):
    before = tree(moody)
    fake.stop = stop_at(0, error)

    with suppress(MemoryError):
        k2("render", code=1)

    assert tree(moody) == before


def test_ctrl_c_while_writing_a_picture_finishes_it_first(moody, k2, monkeypatch):
    replace, placed = os.replace, []

    def press(draft: Path, path: Path) -> None:
        placed.append(path.name)
        if path.name == "fox-7.toml":
            signal.raise_signal(signal.SIGINT)
        replace(draft, path)

    monkeypatch.setattr(os, "replace", press)
    result = k2("render", code=130)

    assert result.stdout == "outputs/0001-fox-and-1-more/fox-7.png\n"
    assert placed == ["run.toml", "fox-7.toml", "fox-7.png"]
    assert "Interrupted: 1 of 2 pictures are in outputs/0001-fox-and-1-more." in result.stderr


def test_resume_adds_a_missing_sheet(moody, k2, fake):
    k2("render")
    folder = moody / "outputs" / "0001-fox-and-1-more"
    undisturbed = tree(folder)
    (folder / "sheet.png").unlink()
    workers.load_pipeline.cache_clear()
    fake.loaded.clear()

    k2("render", "--resume")

    assert tree(folder) == undisturbed and fake.loaded == []


def test_sheet_pages_never_share_a_name_with_a_picture(moody, k2, monkeypatch):
    monkeypatch.setattr(sheet, "PER_SHEET", 2)
    made = k2("render", "-p", "sheet", "--seed", "1", "--batch", "5", "--size", "64x96")
    assert "5 pictures and 3 contact sheets in outputs/0001-sheet" in made.stderr

    (folder,) = moody.glob("outputs/*")
    pictures = [f"sheet-{seed}.png" for seed in range(1, 6)]
    assert sorted(path.name for path in folder.glob("*.png")) == sorted(
        [*pictures, "sheet.png", "sheet.2.png", "sheet.3.png"]
    )
    assert {Image.open(folder / name).size for name in pictures} == {(64, 96)}


def test_sheet_subtitle_has_what_its_pictures_share(moody, k2, monkeypatch):
    told = []

    def note(entries: list[sheet.SheetEntry], title: str, subtitle: str, **form: Any) -> Any:
        told.append((title, subtitle.split(" · ")[:-1]))
        return iter(())

    monkeypatch.setattr(runs, "contact_sheets", note)
    (moody / "outputs" / "9999-fox").mkdir(parents=True)
    (moody / "styles").mkdir()
    (moody / "styles" / "dusk.toml").write_text('keywords = ["dusk"]\n')
    k2("render", "--steps", "4", "--guidance", "0", "--style", "dusk=0.5")
    k2("render", "--matrix", "steps=4,8", "--style", "dusk=0.5")
    k2("render", "--matrix", "guidance=0,1.5", "--matrix", "style.dusk=0,1")  # the captions say these
    k2("render", "--steps", "1")
    k2("render", "--guidance-until", "0.5", "--sampler", "ab2")
    k2("render", "--matrix", "sampler=euler,ab2", "--matrix", "guidance_until=0.5,1")
    k2("render", "--cohesion", "0.5", "--batch", "2", "--steps", "4")
    Image.new("RGB", (64, 64), "white").save("dot.png")
    masked = ("--steps", "4", "--init-image", "dot.png")
    k2("render", *masked, "--mask", "32x16+8+16")
    k2("render", *masked, "--mask", "dot.png", "--matrix", "seed=1,2", "--matrix", "denoise=0.5,1")
    (moody / "k2.toml").write_text(PROJECT.replace('name = "fox"', "style.dusk = 1"))
    k2("render", "--steps", "4")  # a style of one prompt only

    usual = ["mini raw", "4 steps", "guidance 2.5"]
    assert told == [
        ("moody", ["run 10000", "mini raw", "4 steps", "guidance 0", "dusk 0.5"]),
        ("moody", ["run 10001", "mini raw", "guidance 2.5", "dusk 0.5", "seed 7"]),
        ("moody", ["run 10002", "mini raw", "28 steps", "seed 7"]),
        ("moody", ["run 10003", "mini raw", "1 step", "guidance 2.5"]),
        ("moody", ["run 10004", "mini raw", "28 steps of ab2", "guidance 2.5 until 0.5"]),
        ("moody", ["run 10005", "mini raw", "seed 7"]),
        ("moody", ["run 10006", "mini raw", "4 steps", "guidance 2.5", "cohesion 0.5"]),
        ("moody", ["run 10007", *usual, "init image dot.png", "mask 32x16+8+16"]),
        ("moody", ["run 10008", *usual, "init image dot.png", "mask dot.png"]),
        ("moody", ["run 10009", *usual]),
    ]


@pytest.mark.parametrize(("zone", "day"), [("Etc/GMT-14", "2026-12-01"), ("Etc/GMT+12", "2026-11-30")])
def test_sheet_date_is_local_as_in_the_log(moody, k2, monkeypatch, zone, day):
    """Local time; records are in UTC."""
    subtitles = []
    monkeypatch.setattr(runs, "contact_sheets", lambda entries, title, common, **form: subtitles.append(common) or [])
    k2("render")
    (run,) = (moody / "outputs").iterdir()
    record = run / "fox-7.toml"
    record.write_text(re.sub(r"created = .*", "created = 2026-11-30T23:30:00Z", record.read_text()))

    with monkeypatch.context() as abroad:
        abroad.setenv("TZ", zone)
        time.tzset()
        k2("render", "--resume")
    time.tzset()

    assert subtitles[-1].endswith(day)


TWINS = """
[[prompt]]
name = "day"
text = "a fox"
avoid = "night"

[[prompt]]
text = "a fox"
"""


@pytest.mark.parametrize(
    ("asked", "strips"),
    [
        (["--batch", "2"], {"day: a fox": ["seed 0", "seed 1"], "a-fox: a fox": ["seed 0", "seed 1"]}),
        (["-p", "a fox", "--batch", "2"], {"a fox": ["seed 0", "seed 1"]}),
        (["--matrix", "steps=4,8"], {"day: a fox": ["steps 4", "steps 8"], "a-fox: a fox": ["steps 4", "steps 8"]}),
        (["-p", "a fox", "--matrix", "steps=4,8"], {"a fox": ["steps 4", "steps 8"]}),
        (["--only", "day", "--matrix", "seed=1,2", "--matrix", "steps=4"], {
            "seed 1 · a fox": ["steps 4"], "seed 2 · a fox": ["steps 4"]
        }),
    ],
)  # fmt: skip
def test_strips_separate_prompts_with_the_same_text(moody, k2, monkeypatch, asked, strips):
    told = []
    monkeypatch.setattr(runs, "contact_sheets", lambda entries, *_, **form: told.extend(entries) or iter(()))
    (moody / "k2.toml").write_text(TWINS)

    k2("render", *asked)

    found = [list(each) for _, each in groupby(told, key=lambda entry: entry.strip)]
    assert {strip[0].label: [entry.caption for entry in strip] for strip in found} == strips


def test_resume_keeps_no_embed_and_the_sheet_layout(moody, k2, fake):
    """No metadata where none was wanted; a sweep's sheet is still laid out as a sweep."""
    (moody / "styles").mkdir()
    for name in ("dusk", "riso"):
        (moody / "styles" / f"{name}.toml").write_text(f'keywords = ["{name}"]\n')
    sweep = ("mix-styles", "dusk=1", "riso=1", "--sweep", "4", "-p", "tea", "--no-embed")
    k2(*sweep)
    undisturbed = tree(moody / "outputs" / "0001-mix-dusk-riso")
    fake.stop = stop_at(1, KeyboardInterrupt())
    k2(*sweep, code=130)
    fake.stop = staticmethod(lambda at: None)

    k2("render", "--resume")

    folder = moody / "outputs" / "0002-mix-dusk-riso"
    assert [Image.open(path).text for path in folder.glob("tea-*.png")] == [{}] * 4
    (folder / "sheet.png").unlink()
    (moody / "outputs" / "0001-mix-dusk-riso").rename(moody / "elsewhere")
    folder = folder.rename(moody / "outputs" / "0001-mix-dusk-riso")
    k2("render", "--resume")
    assert tree(folder)["sheet.png"] == undisturbed["sheet.png"]


@pytest.mark.parametrize(
    ("toml", "message", "hint"),
    [
        (
            '[render]\nmodel = "turbo"\n',
            'There is no model "turbo" here.',
            'variant = "turbo" under [render], or --turbo',
        ),
        ('[render]\nmodel = "mini-raw"\n', 'There is no model "mini-raw" here.', 'variant = "raw" under [render]'),
        ('[render]\nmodel = "my-turbo"\n', 'There is no model "my-turbo" here.', "Did you mean"),
        ('[moodboard]\nimages = [""]\n', "the path is empty.", "Name a picture, a folder, or a glob of pictures."),
    ],
)
def test_errors_found_only_when_rendering(moody, k2, toml, message, hint):
    text = (moody / "k2.toml").read_text()
    changed = text.replace("[render]\n", toml, 1) if "[render]" in toml else text + toml
    (moody / "k2.toml").write_text(changed)

    said = k2("render", code=1).stderr
    assert message in said and hint in said


def test_earlier_run_is_resumed_by_number(moody, k2, fake):
    interrupt(fake, k2, 3)
    k2("render", "-p", "tea")

    assert k2("render", "--resume", "--run", "1").stdout == "outputs/0001-fox-and-1-more/an-owl-at-night-8.png\n"
    none = k2("render", "--resume", "--run", "7", code=1).stderr
    assert "has no run 0007 to resume" in none and "To list the runs: k2 log" in none
    assert "needs --resume" in k2("render", "--run", "1", code=2).stderr


def test_resume_keeps_what_the_model_chose(moody, k2, fake):
    """Precision and offload may depend on free memory; the pictures of one run must not."""
    interrupt(fake, k2, 3)
    workers.load_pipeline.cache_clear()

    k2("render", "--resume")

    assert fake.held == [(None, None), ("native", "none")] and fake.loaded[1] == ("mini", "raw", "cpu", "float32")


def test_resume_refuses_changed_weights(moody, k2, fake):
    interrupt(fake, k2, 3)
    box = moody.parent / "box" / "mini-vae.safetensors"
    box.write_bytes(box.read_bytes() + b" ")

    assert "mini-vae.safetensors has changed since" in k2("render", "--resume", code=1).stderr


def test_resume_refuses_changed_references_before_any_picture(moody, k2, fake):
    (moody / "styles").mkdir()
    (moody / "styles" / "dusk.toml").write_text('[[reference]]\nimage = "a.png"\n')
    (moody / "k2.toml").write_text(PROJECT + "[style]\ndusk = 1.0\n")
    Image.new("RGB", (64, 64), "navy").save(moody / "a.png")
    interrupt(fake, k2, 0)
    Image.new("RGB", (64, 64), "teal").save(moody / "a.png")

    assert "a.png has changed since" in k2("render", "--resume", code=1).stderr


@pytest.mark.parametrize(("old", "new"), [("schema = 1\n", "schema = 2\n"), ("[picture", "[pictures")])
def test_unreadable_plan_is_one_sentence_and_a_hint(moody, k2, fake, old, new):
    interrupt(fake, k2, 3)
    plan = moody / "outputs" / "0001-fox-and-1-more" / "run.toml"
    plan.write_text(plan.read_text().replace(old, new))

    told = k2("render", "--resume", code=1).stderr
    assert "run.toml is not a plan that this version of k2 can read." in told and "Start a new run" in told


def test_bug_keeps_its_traceback(moody, k2, fake):
    fake.stop = stop_at(0, ZeroDivisionError())

    with pytest.raises(ZeroDivisionError):
        k2("render")
    assert not (moody / "outputs").exists()


def test_models_are_listed_and_described(moody, k2):
    assert k2("models", "list").stdout == "mini\traw\t128 px\t4 parameters\t0.0 MB\tbox\n"
    (listed,) = [json.loads(line) for line in k2("models", "list", "--json").stdout.splitlines()]
    assert (listed["name"], listed["native"]) == ("mini", 128)
    assert "native       128" in k2("models", "info", "mini").stdout
    assert models.entry_text({"native": 128, "mirror": False}).splitlines() == [
        "native       128",
        "mirror       false",
    ]
    assert models.entry_text({"mu": (0.3, 0.1 + 0.8)}) == "mu           0.3 at 256 tokens, 0.9 at 6400"
    assert models.entry_text({"sides": [256, 320]}) == "sides        256, 320"
    trained = models.entry_text({"config": {"width": 64}, "training": {"steps": 7, "recipe": {"lr": 1.0}}})
    assert trained.splitlines() == ["training", "  steps      7"]
    (moody / "x.safetensors").write_bytes(b"PK\x03\x04 a pickle in a zip")
    assert "PyTorch pickle" in k2("models", "info", "x.safetensors", code=1).stderr


def test_models_list_aligns_columns_on_a_terminal(monkeypatch, capsys):
    about = {"variant": "turbo", "native": 256, "parameters": 31_305_047, "megabytes": 35.1, "source": "box"}
    named = [about | {"name": name} for name in ("mini", "a-model-of-a-longer-name")]
    monkeypatch.setattr(models, "inventory", lambda: named)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "100")

    list_models(json=False)

    first, second = capsys.readouterr().out.splitlines()
    assert first.index("turbo") == second.index("turbo") and first.index("box") == second.index("box")
    assert "\t" not in first

    monkeypatch.setenv("COLUMNS", "40")
    list_models(json=False)

    facts = ["  turbo  256 px  31,305,047 parameters", "  35.1 MB  box"]  # no number is cut
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines == ["mini", *facts, "a-model-of-a-longer-name", *facts]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--seed", "7", "--seed", "9"), "--seed is given twice: k2 uses 9; to compare, use --matrix seed=V,V.\n"),
        (("--seed=7", "-n", "2", "--batch", "3", "-n1"), "--batch is given 3 times: k2 uses 1.\n"),
        (("--turbo", "--raw"), "--turbo/--raw is given twice: k2 uses --raw.\n"),
        (("--project", ".", "--project", "../moody"), "--project is given twice: k2 uses ../moody.\n"),
        (("-p", "a fox", "-p", "an owl", "--json", "--json", "--style", "dusk=0", "--style", "sea=0"), ""),
        (
            ("--style", "dusk=1", "--style", "sea=1", "--style", "dusk=0"),
            "--style dusk is given twice: k2 uses 0; to compare, use --matrix style.dusk=V,V.\n",
        ),
        (("--seed", "7", "--seed", "9", "--quiet"), ""),
    ],
)
def test_warns_about_options_given_twice(moody, k2, arguments, told):
    (moody / "styles").mkdir()
    for name in ("dusk", "sea"):
        (moody / "styles" / f"{name}.toml").write_text('keywords = ["dusk"]\n')
    assert k2("render", "--dry-run", *arguments).stderr == told
    for command in (("log",), ("models", "list"), ("style", "list")):
        said = k2(*command, "--project", ".", "--project", ".", code=2 if command[0] == "models" else 0).stderr
        assert ("--project is given twice: k2 uses ..\n" in said) is (command[0] != "models")
    assert "matrix" not in k2("mix-styles", "dusk=1", "--seed", "1", "--seed", "2").stderr
    last = k2("render", "--dry-run", "--json", "--style", "dusk=1", "--style", "dusk=0.5").stdout.splitlines()[0]
    assert [style["strength"] for style in json.loads(last)["style"]] == [0.5]


def test_warns_once_about_other_tools_syntax_in_prompt_and_avoid(moody, k2):
    said = k2(
        "render", "--dry-run", "-p", "a (fox:1.4), ((red)) --ar 3:2", "-p", "__animal__", "--avoid", "[snow]"
    ).stderr
    assert said.count("Read as words: ") == 1
    assert (
        "(fox:1.4), ((red)), [snow] (words have no weights, styles do: --style NAME=0.6); "
        "--ar 3:2 (--aspect goes after the prompt); __animal__ (choices go in braces: {red|green})."
    ) in said
    assert "Read as words" not in k2("render", "--dry-run", "-p", "a {red|green} (sleepy) fox").stderr


@pytest.mark.parametrize("name", ["a\nb", "a\tb", "a\x1b[2J", "a\n"])
def test_new_refuses_control_characters_in_a_project_name(moody, k2, name):
    """Its path is one line of the results, and part of the command to type next."""
    before = tree(moody)

    refused = k2("new", name, code=1)

    assert "The project's name contains a control character." in refused.stderr and refused.stdout == ""
    assert tree(moody) == before


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["gallery", ""], "PROJECT"),
        (["log", "other", ""], "PROJECT"),
        (["render", "--project", ""], "--project"),
        (["render", "--ray", ""], "--ray"),
        (["log", "--run", ""], "--run"),
        (["gallery", "-o", ""], "--output"),
        (["new", "taken", "--from", "fox.png", "--from", ""], "--from"),
        (["show", ""], "FILE"),
        (["models", "export", "mini", ""], "TARGET"),
    ],
)
def test_empty_paths_are_usage_errors(moody, k2, arguments, name):
    """Not the current folder: "$PROJECT" is empty when the variable is unset."""
    before = tree(moody)

    refused = k2(*arguments, code=2)

    assert f"Error: {name} is empty." in refused.stderr and refused.stdout == ""
    assert ("leave it out" in refused.stderr) == (name not in ("FILE", "TARGET"))
    assert tree(moody) == before


def test_every_path_parameter_is_in_places():
    """By its metavar, the name that help shows."""
    apps = [app, *(group.typer_instance for group in app.registered_groups)]
    found = set()
    for command in (info.callback for each in apps for info in each.registered_commands):
        for hint in get_type_hints(command, include_extras=True).values():
            (kind, about) = get_args(hint) if hasattr(hint, "__metadata__") else (hint, None)
            if Path in (kind, *get_args(kind), *(part for each in get_args(kind) for part in get_args(each))):
                found.add(about.metavar)

    assert found and found <= PATH_METAVARS


@pytest.mark.parametrize(("there", "asked"), [("NFD", "NFC"), ("NFC", "NFD")])
def test_paths_are_found_in_either_unicode_normal_form(moody, k2, there, asked):
    """Some systems and archives store accents as separate characters."""
    folder = moody.rename(moody.with_name(unicodedata.normalize(there, "Süß")))
    os.chdir(folder.parent)
    project = ("--project", unicodedata.normalize(asked, "Süß"))

    made = k2("render", *project, "--only", "fox", "--batch", "1").stdout.strip()
    said = unicodedata.normalize(asked, made)

    assert made != said and (folder.parent / made).is_file()
    k2("show", said)
    k2("rerun", said)
    k2("render", *project, "--like", said, "--dry-run")
    k2("style", "add", "warm", said, *project)
    k2("new", "taken", f"--from={said}")
    k2("gallery", *project, "-o", unicodedata.normalize(asked, "Süß/page"))
    write_weights(folder / unicodedata.normalize(there, "ö.safetensors"), {"kind": "dit", "native": 128})
    k2("render", *project, "--model", folder / unicodedata.normalize(asked, "ö.safetensors"), "--dry-run")
    (folder / unicodedata.normalize(there, "ö.toml")).write_text('stage = "none"')
    assert "no stage" in k2("train", folder / unicodedata.normalize(asked, "ö.toml"), code=1).stderr
    assert [path.name for path in folder.parent.glob("S*")] == [folder.name] and (folder / "page").exists()


def test_new_refuses_an_empty_name_and_an_existing_project(moody, k2):
    assert "The project's name is empty." in k2("new", "", code=1).stderr
    assert f"{moody} is already a k2 project." in k2("new", ".", code=1).stderr


def test_new_on_an_existing_project_says_how_to_continue(k2, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    k2("new", "my mood")
    told = k2("new", "my mood", code=1).stderr
    assert told.startswith(f"Error: {tmp_path / 'my mood'} is already a k2 project.\n")
    assert told.endswith("or continue with this one: cd 'my mood' && k2 render\n")


@pytest.mark.parametrize(
    ("size", "broken"), [("128x128", False), ("192x112", False), ("192x128", False), ("256x128", True), ("64x64", True)]
)
def test_warns_about_sizes_far_from_the_native_one(moody, k2, size, broken):
    said = k2("render", "--size", size, "--dry-run").stderr

    assert (f"{size} is far from the model's native 128x128: expect broken pictures." in said) is broken
    assert "far from" not in k2("render", "--size", size, "--dry-run", "--quiet").stderr


def test_size_warning_depends_on_what_the_weights_declare(moody, k2):
    about = {"kind": "dit", "variant": "raw"}
    write_weights(library.BUNDLED / "mini-raw.safetensors", about)
    assert "far from" not in k2("render", "--size", "64x64", "--dry-run").stderr

    write_weights(library.BUNDLED / "mini-raw.safetensors", about | {"native": 128, "shapes": ["96x64", "256x128"]})
    for size, far in (("64x64", False), ("272x128", False), ("256x144", True), ("256x192", True)):
        assert ("far from" in k2("render", "--size", size, "--dry-run").stderr) is far


def test_warns_about_weights_that_declare_no_variant(moody, k2):
    file, silent = "dreamy_v12.safetensors", "does not say whether it is Raw or Turbo"
    write(moody / file, transformer())
    told = f"{file} {silent}; k2 assumes Raw, or Turbo with --turbo."

    for more in (["--dry-run"], []):
        run = k2("render", "--model", file, "--json", *more)
        assert run.stderr.count(told) == 1
        assert [json.loads(line)["warnings"] for line in run.stdout.splitlines()] == [[told]] * 2
        for named in ("--turbo", "--raw"):
            assert silent not in k2("render", "--model", file, named, *more).stderr
    assert told in k2("models", "info", file).stderr
    write(moody / "dreamy_turbo.safetensors", transformer())
    assert silent not in k2("render", "--model", "dreamy_turbo.safetensors", "--dry-run").stderr
    assert not k2("models", "info", "dreamy_turbo.safetensors").stderr and not k2("models", "info", "mini").stderr


def test_doctor_finds_damaged_weights(moody, k2):
    (moody / "styles").mkdir()
    (moody / "styles" / "dusk.toml").write_text('keywords = ["dusk"]\n')
    healthy = k2("doctor")
    assert healthy.stdout.endswith("\nresult     Everything is in place.\n")
    assert "moody: 2 prompts, 1 style, in" in healthy.stdout
    found = json.loads(k2("doctor", "--json").stdout)
    assert found["device"] and found["gflops"]["float32"] > 0 and found["versions"]["torch"]

    box = moody.parent / "box" / "mini-raw.safetensors"
    box.write_bytes(box.read_bytes()[:-3])
    assert "mini-raw.safetensors is damaged" in k2("doctor", code=1).stdout


def test_doctor_wraps_between_words():
    found = doctor.examine()
    lines = doctor.describe(found, 60).splitlines()

    assert " ".join(" ".join(lines).split()) == " ".join(doctor.describe(found).split())
    assert max(len(line) for line in lines if len(line.split()) > 2) <= 60
    assert len(lines) > len(found["notes"]) and any(line.startswith(" " * 11) for line in lines)


def test_unicode_line_separators_do_not_split_prompts(moody, k2):
    shots = k2("render", "--dry-run", "--json", "-", input="a pear\u2028of glass\r\na plum\n").stdout.splitlines()
    assert [json.loads(shot)["prompt"]["text"] for shot in shots] == ["a pear of glass", "a plum"]


def test_paths_with_a_leading_dash_are_not_options(moody, k2):
    assert "cd ./-dash && k2 render" in k2("new", "--", "-dash").stderr
    (moody / "-empty").mkdir()
    assert "Hint:  Create one: k2 new ./-empty\n" in k2("render", "--", "-empty", code=1).stderr

    png = k2("render", "--only", "fox", "--quiet").stdout.strip()
    (moody / png).rename("-x.png")
    assert k2("rerun", "--output", "-y.png", "--", "-x.png").stdout == "./-y.png\n"
    assert "a red fox\n" in k2("show", "--", "-x.png").stdout
    assert k2("style", "add", "dash", "--", "-x.png").stdout == "styles/dash.toml\n"


def test_prompts_with_a_leading_dash_are_not_options(moody, k2, fake):
    hint = k2("render", "--", "-5 degrees", code=1).stderr.strip().partition("Hint:  Give a prompt with -p: ")[2]
    assert hint == "k2 render -p '-5 degrees'"

    k2(*shlex.split(hint)[1:], "--batch", "1")
    k2("render", "-", input="--help\n-\n")
    assert [spec.prompt for spec in fake.seen] == ["-5 degrees", "--help", "-"]


@pytest.mark.parametrize(
    ("word", "linux", "windows"),
    [
        (r"C:\pics\fox-7.png", r"'C:\pics\fox-7.png'", r"C:\pics\fox-7.png"),
        ("a red fox.png", "'a red fox.png'", '"a red fox.png"'),
        ("a&b", "'a&b'", '"a&b"'),
        ('a "fox"', "'a \"fox\"'", r'"a \"fox\""'),
        ("C:\\my pics\\", "'C:\\my pics\\'", r'"C:\my pics\\"'),
        (r'a \"fox\\"', r"""'a \"fox\\"'""", r'"a \\\"fox\\\\\""'),
    ],
)
def test_quoting_suits_the_shell_of_the_platform(word, linux, windows, monkeypatch):
    """cmd.exe passes single quotes on as part of the word."""
    monkeypatch.setattr(sys, "platform", "linux")
    assert shell_quote(word) == linux
    monkeypatch.setattr(sys, "platform", "win32")
    assert shell_quote(word) == windows


@pytest.mark.parametrize(("word", "meant"), [("fox", "--only fox"), ("a blue owl", "-p 'a blue owl'")])
def test_prompt_given_in_place_of_a_project_gets_a_hint(moody, k2, fake, word, meant):
    hint = k2("render", word, code=1).stderr.strip().rpartition("k2 render ")[2]
    assert hint == meant

    k2("render", *shlex.split(hint), "--batch", "1")
    assert len(fake.seen) == 1


@pytest.mark.parametrize(
    ("bf16", "free", "said"),
    [
        (True, 80, ""),
        (True, 18, "it fits in memory only in 4 bits"),
        (True, 10, "it does not fit in memory"),
        (False, 80, ""),
        (False, 20, "it fits in memory only in 4 bits"),
        (False, 18, "it does not fit in memory"),
    ],
)
def test_doctor_says_which_models_must_be_streamed(monkeypatch, bf16, free, said):
    """A processor that cannot multiply bf16 holds the weights it computes with in twice the bytes."""
    monkeypatch.setattr("model.plan.native_bf16", lambda device: bf16)
    monkeypatch.setattr("model.plan.free_memory", lambda device: free << 30)
    found = doctor.examine()

    (plan,) = [plan for plan in found["plans"] if plan["model"] == "krea-2 (12.9B)"]
    notes = [note for note in found["notes"] if note.startswith("krea-2")]
    assert [said in note for note in notes] == [True] * bool(said)
    if notes:  # 25 GB in the time that 12.9e9 multiplications and additions take for each of 64 x 64 tokens
        rate = float(re.search(r"reads (\d+) MB/s keeps up", notes[0])[1])
        gflops = found["gflops"]["bfloat16" if bf16 else "float32"]
        assert rate == pytest.approx(25e3 / (2 * 12.9 * 64 * 64 / gflops), rel=0.1, abs=1)
    assert (plan["offload"] == "all") == bool(said)
    assert plan["blocks_gb"] == pytest.approx(25, rel=0.05)  # on disk, whatever precision they are held in
    sizes = list(plan["ways_gb"].values())
    assert sizes == sorted(sizes, reverse=True) and plan["ways_gb"]["int4, offload text"] < (13 if bf16 else 18)


@pytest.mark.parametrize(("told", "said"), [(True, " GB, 20 GB free\n"), (False, " GB, about 20 GB free\n")])
def test_doctor_marks_estimated_memory(moody, k2, monkeypatch, told, said):
    monkeypatch.setattr("model.plan.machine_memory", lambda: (32 * 10**9, 20 * 10**9, told))
    monkeypatch.setattr("model.plan.free_memory", lambda device: 20 * 10**9)
    found = k2("doctor").stdout
    assert said in found and (", about 20 GB are free\n" in found) is not told
    assert json.loads(k2("doctor", "--json").stdout)["memory_gb"] == {"total": 32, "free": 20, "estimated": not told}


def test_doctor_names_a_gpu_that_cannot_be_used(monkeypatch):
    card = SimpleNamespace(name="GeForce GTX 1080", total_memory=8 * 10**9)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: card)
    monkeypatch.setattr("model.parts.has_kernels", lambda _: False)
    found = doctor.examine()

    assert found["device"] == "cpu" and found["gpus"][0]["usable"] is False
    assert "GeForce GTX 1080 is not used: this PyTorch has no kernels for it." in found["notes"][0]
    assert found["notes"][1].startswith("No GPU is used: everything runs on the processor")


@pytest.mark.parametrize(
    ("cuda", "platform", "said"),
    [("13.0", "linux", "No GPU"), (None, "linux", "This PyTorch is built without CUDA"), (None, "darwin", "No GPU")],
)
def test_doctor_says_why_no_gpu_can_be_used(monkeypatch, cuda, platform, said):
    """pip's PyTorch for Windows has no CUDA and finds no GPU even if there is one."""
    monkeypatch.setattr("torch.version.cuda", cuda)
    monkeypatch.setattr("torch.version.hip", None)
    monkeypatch.setattr(sys, "platform", platform)

    rates, cores = {"float32": 9.0, "bfloat16": 9.0}, {"threads": 2, "cores": 2}
    found = {"device": "cpu", "gpus": [], "cpu": cores, "gflops": rates, "memory_gb": {"free": 9.0}, "plans": []}
    assert [note.startswith(said) for note in doctor.notes(found)] == [True]


def test_refuses_a_lone_transformer_without_a_matching_text_encoder(moody, k2):
    """As ComfyUI stores the open weights: a transformer alone, beside mini's text encoder. Dry runs refuse it, too."""
    write_weights(
        library.BUNDLED / "mini-text.safetensors", {"kind": "text", "config": {"hidden_size": 8, "taps": [1]}}
    )
    heard = {"txtmlp.0.scale": (2560,), "txtfusion.projector.weight": (1, 12), "first.weight": (4, 4)}
    save_file({name: np.zeros(shape, np.float32) for name, shape in heard.items()}, moody / "lone.safetensors")

    for dry in ((), ("--dry-run",)):
        refused = k2("render", "--model", "lone.safetensors", *dry, code=1).stderr
        assert "lone.safetensors needs 12 text layers of width 2560" in refused and "k2 models pull" in refused


def test_refuses_files_that_are_not_transformers(moody, k2):
    write_weights(moody / "words.safetensors", {"kind": "words"})
    save_file({"double_blocks.0.img_mod.lin.weight": np.zeros(2)}, moody / "flux.safetensors")

    for file, what in (("words.safetensors", "a table of words"), ("flux.safetensors", "another kind of image model")):
        for dry in ((), ("--dry-run",)):
            refused = k2("render", "--model", file, *dry, code=1)
            assert f"{file} is {what}, not a Krea 2 transformer." in refused.stderr and not refused.stdout
    assert not (moody / "outputs").exists()


def test_doctor_examines_the_project_given(moody, k2, tmp_path, monkeypatch):
    monkeypatch.chdir(moody.parent)
    assert "moody: 2 prompts" in k2("doctor", "--project", moody).stdout
    assert "There is no" in k2("doctor", "--project", "gone", code=1).stdout


def test_missing_model_is_reported_with_its_line(moody, k2):
    (moody / "k2.toml").write_text(PROJECT.replace("[render]\n", '[render]\nmodel = "mimi"\n'))
    error = k2("render", code=1).stderr
    assert 'There is no model "mimi" here.' in error and "k2.toml, line 5: " in error
    assert "k2.toml" not in k2("render", "--model", "mimi", code=2).stderr


def test_doctor_finds_a_filter_that_cannot_be_loaded(moody, k2, monkeypatch):
    from model import safety

    class Broken:
        name, value = "eyes", "eyes:check"

        def load(self):
            raise ImportError("no module named eyes")

    monkeypatch.setattr(safety, "entry_points", lambda group: [Broken()])
    assert 'The output filter "eyes" failed: no module named eyes.' in k2("doctor", code=1).stdout


def test_resume_command_allows_a_model_outside_the_project(moody):
    from k2cli.models import ModelSpec
    from k2cli.multi_project import resume_commands
    from k2cli.outputs import Run

    def line(model: str) -> str:
        return resume_commands(
            [runs.Job(Project.open(moody), [], ModelSpec(model), run=Run(moody / "outputs" / "0001-fox"))]
        )

    assert line("mini") == line(str(moody / "in.safetensors")) == "k2 render --resume --run 1"
    assert line("/else/where.safetensors") == "k2 render --resume --run 1 --allow-outside"


def test_console_script_keeps_the_two_streams_apart(moody):
    """The real process: errors and version, with nothing patched."""
    version = subprocess.run([K2, "--version"], capture_output=True, text=True, check=True)
    assert version.stdout.startswith("k2 ") and version.stderr == ""
    (moody / "k2.toml").write_text("[[prompt]\n")
    failed = subprocess.run([K2, "render"], capture_output=True, text=True)
    assert failed.returncode == 1 and failed.stdout == ""
    assert failed.stderr.startswith("Error: k2.toml is not valid TOML") and "Traceback" not in failed.stderr


@pytest.mark.parametrize("way", ["script", "module"])
def test_ctrl_c_during_imports_prints_no_traceback(tmp_path, way):
    root = Path(__file__).parents[1]
    scripts = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["project"]["scripts"]
    module, _, name = scripts["k2"].partition(":")
    line = ["-c", f"from {module} import {name}; {name}()"] if way == "script" else ["-m", "k2cli"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(root)])}

    def run() -> tuple[int, str, str]:
        done = subprocess.run([sys.executable, *line, "--version"], env=environment, capture_output=True, text=True)
        return done.returncode, done.stdout.partition(" ")[0], done.stderr

    assert run() == (0, "k2", "")
    (tmp_path / "typer.py").write_text("import signal\nsignal.raise_signal(signal.SIGINT)\n")
    assert run() == (130, "", "")


@pytest.mark.parametrize(("before", "after"), [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")])
def test_threads_do_not_spin_unless_asked_to(before: dict[str, str], after: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"} | before
    code = "import os; from k2cli import app; app.app = lambda **_: print(os.environ['OMP_WAIT_POLICY']); app.main()"
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == after


def test_says_when_pictures_are_the_same_as_the_last_run(moody, k2):
    first = k2("render").stderr
    again, other, more = k2("render"), k2("render", "--seed", "8"), k2("render", "--seed", "8", "--batch", "2")
    once, twice = (k2("render", "-p", "tea") for _ in range(2))

    said = "The same pictures as run 0001; for others: --seed N or --seed random"
    assert said in again.stderr and len(again.stdout.splitlines()) == 2
    assert not any("The same picture" in each for each in (first, other.stderr, more.stderr, once.stderr))
    assert "The same picture as run 0005;" in twice.stderr
    assert "The same picture" not in k2("render", "-p", "tea", "--quiet").stderr
    (moody / "outputs" / "0007-tea" / "tea-7.toml").unlink()
    assert "The same picture" not in k2("render", "-p", "tea").stderr


def test_renamed_run_folder_is_not_the_last_run(moody, k2):
    first = Path(k2("render").stdout.splitlines()[0]).parent
    first.rename(first.with_name("for the client"))
    k2("render"), k2("render", "--seed", "9")

    assert "The same pictures as run 0002" in k2("render", "--seed", "9").stderr
