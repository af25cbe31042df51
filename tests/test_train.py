"""`k2 train`: recipes are read strictly, runs can be resumed, and every error is one sentence."""

import csv
import errno
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from workshop import TINY, with_box, workshop  # noqa: F401

from k2cli import app as commands
from model.errors import K2Error
from model.library import BUNDLED
from model.train import recipe as recipes
from model.train.states import read_progress

README = Path(commands.__file__).parents[1] / "README.md"
SMALL = """
name = "small"
size = 64
steps = 4
batch = 2
repeats = 2
every = 2
lr = 1e-3
muon_lr = 1e-3
mu = 0.0
"""


def written(folder, text):
    (folder / "small.toml").write_text(text)
    return "small.toml"


def test_lengthened_recipe_continues_its_run(k2, workshop):  # noqa: F811
    path = written(workshop, SMALL + TINY)

    done = k2("train", path)
    assert done.stdout == ".runs/small/state.safetensors\n"
    assert "small 4: loss" in done.stderr and "min left" in done.stderr
    assert read_progress(Path(done.stdout.strip()))["step"] == 4

    more = k2("train", path, "--steps", "6")
    assert "steps 4 → 6" in more.stderr
    assert read_progress(Path(done.stdout.strip()))["step"] == 6
    with Path(".runs/small/log.csv").open() as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["2", "4", "6"]
    assert Path(".runs/small/curves.png").exists()
    assert k2("train", path, "--quiet").stderr == ""


def test_edited_network_of_a_run_is_reported(k2, workshop):  # noqa: F811
    path = written(workshop, SMALL + TINY)
    k2("train", path)
    deeper = written(workshop, SMALL + TINY.replace("blocks = 1", "blocks = 2"))
    said = k2("train", deeper, "--steps", "6", code=1).stderr
    assert '"small" was saved with other' in said and "network" in said and "remove .runs/small to start" in said

    (workshop / "merged.toml").write_text('name = "merged"\nstage = "merge"\nruns = ["small"]\nweights = [1]\n')
    k2("train", "merged.toml")
    said = k2("train", written(workshop, SMALL.replace("small", "merged") + TINY), code=1).stderr
    assert '"merged" was saved with other weights than its recipe now trains' in said


def test_sample_sheets_are_drawn_during_the_run(k2, workshop, monkeypatch):  # noqa: F811
    from model.train import loop, samples

    monkeypatch.setattr(loop, "SAVE_EVERY", -1.0)
    monkeypatch.setattr(samples, "PROMPTS", ["a dog"] * 8)
    done = k2("train", written(workshop, SMALL + "sheets = 1e-6\n" + TINY))

    assert done.stdout == ".runs/small/state.safetensors\n"
    assert sorted(path.name for path in Path(".runs/small").glob("samples-*")) == ["samples-2.png", "samples-4.png"]


def test_readmes_training_commands_work(k2, workshop, monkeypatch):  # noqa: F811
    """Every recipe that the README names is in the package, and the first that it runs works, cut short."""
    text = README.read_text("utf-8").split("## Training")[1].split("\n## ")[0]
    named = re.findall(r"^\$ k2 train (\S+)", text, re.MULTILINE)
    assert named
    for name in named + re.findall(r"`([a-z]+-[a-z0-9]+)`", text):
        recipes.load(name)

    load = recipes.load
    monkeypatch.setattr(recipes, "load", lambda name: replace(load(name), batch=2))  # one of some thousand steps
    with_box(BUNDLED, monkeypatch)
    assert k2("train", named[0], "--steps", "1").stdout == f".runs/{named[0]}/state.safetensors\n"


@pytest.mark.parametrize("path", sorted(recipes.FOLDER.glob("*.toml")), ids=lambda path: path.stem)
def test_packaged_recipes_are_valid_and_named_like_their_files(path):
    assert recipes.load(path.stem).name == path.stem
    assert recipes.load(str(path)) == recipes.load(path.stem)


@pytest.mark.parametrize(
    ("change", "message", "hint"),
    [
        (("lr = 1e-3", "lrr = 1e-3"), 'unknown key "lrr"', '"lr"'),
        (("lr = 1e-3", 'lr = "fast"'), "lr must be a number", ""),
        (("steps = 4", "steps = 4.5"), "steps must be a whole number", ""),
        (("steps = 4", "steps = true"), "steps must be a whole number", ""),
        (("size = 64\n", ""), "size is missing", ""),
        (("size = 64", 'size = 64\nstage = "pretrian"'), 'no stage "pretrian"', '"pretrain"'),
        (("size = 64", "size = 64\nstage = 3"), 'no stage "3"', "pretrain"),
        (("size = 64", 'size = 64\nstage = ["lora"]'), "there is no stage", '"lora"'),
        (("size = 64", "size = 64\nforms = [1, 2]"), "forms must be a list of 3, each a number", ""),
        (("size = 64", "size = 64\nfresh = [1]"), "fresh must be a list, each text", ""),
        (("size = 64", "size = 64\nnetwork = {width = 0.5}"), "network must be a table, each value a whole number", ""),
        (("steps = 4", "steps = 4\nminutes = 2"), "either minutes or steps", ""),
        (("size = 64", "size = 64\nforms = [1, 2, 3]"), "forms must be three shares that sum to 1", ""),
        (("batch = 2", f"batch = {10**20}"), "batch must be at most 1,000,000,000", ""),
        (("batch = 2", "batch = 0"), "batch must be at least 1", ""),
        (("repeats = 2", "repeats = 0"), "repeats must be at least 1", ""),
        (("muon_lr = 1e-3", "muon_lr = nan"), "muon_lr must be a number", ""),
        (("muon_lr = 1e-3", "muon_lr = -1e-3"), "muon_lr must be at least 0", ""),
        (('"small"', '"../small"'), "cannot name a run", "letters"),
        (("small", "ß" * 101), "is too long to name a run", "200 bytes"),
        (("steps = 4", "steps = ="), "not valid TOML", ""),
    ],
)
def test_recipe_errors_are_one_sentence(k2, tmp_path, monkeypatch, change, message, hint):
    monkeypatch.chdir(tmp_path)
    failed = k2("train", written(tmp_path, SMALL.replace(*change)), code=1)

    sentence, *rest = failed.stderr.splitlines()
    assert sentence.startswith("Error: ") and message in sentence
    assert len(rest) <= 1 and hint in "".join(rest)
    assert not Path(".runs").exists()


def test_endless_steps_are_refused(k2, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = k2("train", written(tmp_path, SMALL), "--steps", 10**20, code=1).stderr

    assert "steps must be at most 1,000,000,000" in said


@pytest.mark.parametrize(
    ("key", "message", "hint"),
    [
        ('preset = "huge"', 'no preset "huge"', "mini, medium"),
        ("network = {widht = 32}", 'a network has no "widht"', "width"),
        ("network = {kv_heads = 5}", "cannot share 5 key-value heads evenly", ""),
    ],
)
def test_unknown_network_is_one_sentence(k2, workshop, key, message, hint):  # noqa: F811
    said = k2("train", written(workshop, f"{SMALL}{key}\n"), code=1).stderr
    assert said.startswith('Error: Recipe "small": ') and message in said and hint in said


@pytest.mark.parametrize("key", ["frozen", "fresh"])
def test_unknown_modules_are_named(k2, workshop, key):  # noqa: F811
    """Otherwise it would silently be trained, or taken over."""
    k2("train", written(workshop, f'{SMALL}{key} = ["style", "dit.blocks.0"]\n{TINY}'))
    said = k2("train", written(workshop, f'{SMALL}{key} = ["stile"]\n{TINY}'), code=1).stderr
    assert f'{key} names no module "stile"' in said and "Name dit, style, look_head" in said


def test_missing_recipe(k2, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "pretrain-128" in k2("train", "pretrain-218", code=1).stderr
    assert "cannot be read" not in k2("train", "nowhere.toml", code=1).stderr


def test_long_folder_name_is_shortened_for_the_run(tmp_path):
    folder = tmp_path / ("ß" * 120)
    folder.mkdir()

    assert recipes.load(str(folder)).name == "ß" * 100


def test_empty_name_is_not_the_current_folder():
    with pytest.raises(K2Error, match="neither a folder"):
        recipes.load("")


@pytest.mark.parametrize("name", ["nope", "pretrain-218", "picture.png"])
def test_mistyped_folder_has_a_hint(k2, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 64)).save("picture.png")

    said = k2("train", name, code=1).stderr

    assert "is neither a folder of pictures nor a recipe." in said and "ame a folder of pictures" in said
    assert "judge-77" not in said  # none of the 28 names is more likely than the others


def test_missing_data_says_how_to_get_it(k2, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "python -m model.train.data" in k2("train", "pretrain-128", code=1).stderr


def test_missing_latents_say_how_to_get_them(k2, workshop):  # noqa: F811
    failed = k2("train", written(workshop, SMALL.replace("size = 64", "size = 256")), code=1)
    assert "python -m model.train.encode 256" in failed.stderr


def test_interrupted_run_says_how_to_resume(k2, workshop, monkeypatch):  # noqa: F811
    from model.train import loop

    monkeypatch.setattr(loop.Run, "advance", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    stopped = k2("train", written(workshop, SMALL + TINY), "--steps", 9, code=130)

    assert "k2 train small.toml --steps 9" in stopped.stderr and stopped.stdout == ""


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
)
def test_out_of_memory_is_one_sentence(k2, workshop, monkeypatch, error):  # noqa: F811
    from model.train import loop

    monkeypatch.setattr(loop.Run, "advance", lambda *_: (_ for _ in ()).throw(error))
    said = k2("train", written(workshop, SMALL + TINY), code=1).stderr

    assert 'Error: There is not enough memory for the run "small".' in said
    assert "lower batch or size" in said and "recompute = true" in said


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_full_disk_is_one_sentence_and_the_run_resumes(k2, workshop, monkeypatch, error):  # noqa: F811
    path = written(workshop, SMALL + TINY)
    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", lambda *_: (_ for _ in ()).throw(error))
        said = k2("train", path, code=1).stderr
    assert "Error: The disk is full: .runs/small was not written." in said and "resume" in said
    assert not list(Path(".runs/small").glob(".*"))
    assert k2("train", path).stdout == ".runs/small/state.safetensors\n"


def test_damaged_run_folder_is_one_sentence(k2, workshop):  # noqa: F811
    path = written(workshop, SMALL + TINY)
    Path(".runs").mkdir()
    Path(".runs/small").touch()
    said = k2("train", path, code=1).stderr
    assert "Error: .runs/small cannot be used: File exists." in said and "move it away" in said

    Path(".runs/small").unlink()
    state = Path(k2("train", path).stdout.strip())
    state.write_bytes(state.read_bytes()[:-100])
    said = k2("train", path, "--steps", "6", code=1).stderr
    assert 'Error: A saved state of "small" cannot be read' in said and ".runs/small" in said


def test_recipe_may_start_with_a_byte_order_mark(tmp_path):
    (tmp_path / "small.toml").write_text(SMALL, "utf-8-sig")
    assert recipes.load(str(tmp_path / "small.toml")).name == "small"


def test_recipe_of_an_unknown_stage_is_an_error():
    with pytest.raises(K2Error, match="no stage"):
        recipes.stage_module("none", "here")
