"""Several projects in one command: whatever is planned can be finished, and one failure does not hold up the others."""

from __future__ import annotations

import errno
import json
import os
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import tree, write_weights
from PIL import Image
from safetensors.numpy import save_file

from k2cli import multi_project, pictures
from k2cli.folder import Folder
from k2cli.outputs import Run
from model.errors import K2Error

NAMES = ("one", "two", "three")
PLAIN = (
    '[render]\nseed = 7\n\n[[prompt]]\nname = "fox"\ntext = "a red fox"\n\n[[prompt]]\nname = "owl"\ntext = "an owl"\n'
)


@pytest.fixture
def three(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake: Any) -> Path:
    """The current folder, with three identical projects."""
    folder = tmp_path / "all"
    for name in NAMES:
        (folder / name).mkdir(parents=True)
        (folder / name / "k2.toml").write_text(PLAIN)
    monkeypatch.chdir(folder)
    return folder


def test_missing_device_is_reported_once_before_rendering(three, k2, fake):
    """Also if only one project names it: known errors keep all projects from being rendered."""
    before = tree(three)

    told = k2("render", *NAMES, "--device", "cuda:99", code=1).stderr
    assert told.count('There is no device "cuda:99".') == 1 and len(told.splitlines()) == 2

    (three / "two" / "k2.toml").write_text(PLAIN.replace("seed = 7", 'seed = 7\ndevice = "cuda:99"'))
    for workers in ((), ("--workers", "2")):
        told = k2("render", *NAMES, *workers, code=1).stderr
        assert told.startswith('Error: two: There is no device "cuda:99".') and not fake.loaded
    (three / "one" / "k2.toml").write_text(PLAIN.replace("seed = 7", 'seed = 7\ndevice = "cuda:98"'))
    told = k2("render", *NAMES, code=1).stderr
    assert 'one: There is no device "cuda:98".' in told and 'two: There is no device "cuda:99".' in told
    for name in ("one", "two"):
        (three / name / "k2.toml").write_text(PLAIN)
    assert tree(three) == before


def stop_at(fake: Any, turn: int, act: Callable[[], object]) -> None:
    """Do something before the picture with this number, counted over all rendered from now on."""
    made: list[int] = []

    def stop(index: int) -> None:
        made.append(index)
        if len(made) == turn + 1:
            act()

    fake.stop = staticmethod(stop)


def fail(error: BaseException) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act


def runs_in(folder: Path) -> list[str]:
    return sorted(str(path.parent.relative_to(folder)) for path in folder.glob("*/outputs/*/run.toml"))


def made_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.glob("*/outputs/*/*-7.png"))


@pytest.mark.parametrize(
    ("said", "whole"),
    [
        ('Style "dusk": refs/a.png is not a readable picture.', False),  # ends like the project's folder
        ("s/k2.toml, line 3: unknown key.", True),
        ('"s/k2.toml" is not valid TOML.', True),
        ("s has no run to resume.", True),
        ("its has no end.", False),
        ("{root}/outputs cannot be written.", True),
        ("{root}-models/x.safetensors cannot be read.", False),
    ],
)
def test_errors_get_their_projects_name(three, said, whole):
    home = Folder(root=three / "s", allow_outside=False)
    error = K2Error(said.format(root=home.root), hint="Mend it.")

    told = multi_project.name_project(home, error, [home])

    assert str(told) == (str(error) if whole else f"s: {error}") and told.hint == error.hint


def test_option_invalid_for_one_project_names_it(three, k2):
    (three / "one" / "styles").mkdir()
    (three / "one" / "styles" / "dusk.toml").write_text('keywords = ["dusk"]\n')

    said = k2("render", *NAMES, "--style", "dusk=0.5", code=2).stderr

    for name in ("two", "three"):
        assert f'Error: {name}: --style: there is no style "dusk".' in said
    assert "one: " not in said


def test_error_names_the_current_project_by_its_folder(three, k2, monkeypatch):
    (three / "one" / "styles").mkdir()
    (three / "one" / "styles" / "dusk.toml").write_text('keywords = ["dusk"]\n')
    monkeypatch.chdir(three / "two")

    said = k2("render", ".", "../one", "--style", "dusk=0.5", code=2).stderr

    assert said.startswith('Error: two: --style: there is no style "dusk".') and "one: " not in said


def test_hint_belongs_to_its_own_project(three, k2):
    for name, style in zip(NAMES, ("dusk", "ink", "dusk"), strict=True):
        (three / name / "styles").mkdir()
        (three / name / "styles" / f"{style}.toml").write_text('keywords = ["x"]\n')

    said = k2("render", *NAMES, "--style", "nix=1", code=2).stderr

    assert [said.count(f"Known: {style}.") for style in ("dusk", "ink")] == [2, 1]


def test_option_invalid_for_all_is_reported_once(three, k2):
    said = k2("render", *NAMES, "--size", "1x1", code=2).stderr

    assert said.count("Error: ") == 1 and "Error: --size: " in said


def test_same_error_in_each_project_is_reported_for_each(three, k2):
    """As with a project and its copies, whose references have the same names."""
    for name in NAMES:
        (three / name / "styles").mkdir()
        (three / name / "refs").mkdir()
        Image.effect_noise((64, 64), 50).save(picture := three / name / "refs" / "a.png")
        picture.write_bytes(picture.read_bytes()[:1000])
        (three / name / "styles" / "dusk.toml").write_text('[[reference]]\nimage = "refs/a.png"\n')

    said = k2("render", *NAMES, "--style", "dusk=0.5", "--dry-run", code=1).stderr

    assert [line.split(":")[1] for line in said.splitlines() if line.startswith("Error: ")] == [
        f" {name}" for name in NAMES
    ]


def test_projects_are_named_by_their_folders(three, k2):
    """A copied or renamed project keeps the name in its k2.toml; folders of the same name are shown with their path."""
    (three / "two" / "k2.toml").write_text('[project]\nname = "one"\n\n' + PLAIN)
    (three / "old").mkdir()
    shutil.copytree(three / "three", three / "old" / "three")

    said = k2("render", *NAMES, "old/three", "--only", "nope", code=2).stderr

    wrong = 'has no prompt named "nope".'
    told = [line.removeprefix("Error: ") for line in said.splitlines() if line.startswith("Error: ")]
    alike = [f"three: --only: three {wrong}", f"old/three: --only: three {wrong}"]
    assert told == [f"--only: one {wrong}", f"--only: two {wrong}", *alike]


def test_killed_command_is_resumed_in_all_projects(three, k2, fake):
    """Including those whose turn had not come, and without touching the runs they had before."""
    k2("render", "two", "three", "--only", "fox", "-q")
    stop_at(fake, 1, fail(KeyboardInterrupt()))

    said = k2("render", *NAMES, "--only", "owl", "--batch", "2", code=130).stderr

    line = "k2 render --resume one two three"
    assert said == f"Interrupted: 1 of 2 pictures are in one/outputs/0001-owl. Resume with: {line}\n"
    made = k2(*shlex.split(line)[1:], "-q").stdout.splitlines()
    assert len(made) == 5 and {str(Path(path).parent) for path in made} == {
        "one/outputs/0001-owl",
        "two/outputs/0002-owl",
        "three/outputs/0002-owl",
    }


def test_waiting_runs_are_planned_and_locked(three, k2, fake):
    seen: list[Any] = []

    def look() -> None:
        run = Run.last(three / "three" / "outputs")
        seen.extend([runs_in(three), run and run.is_busy, k2("log", "three").stdout])
        with pytest.raises(K2Error, match="is being rendered by another process"):
            run.lock()

    stop_at(fake, 0, look)
    k2("render", *NAMES, "-q")

    assert seen == [sorted(f"{name}/outputs/0001-fox-and-1-more" for name in NAMES), True, ""]
    assert not any(run.is_busy for name in NAMES for run in Run.planned_in(three / name / "outputs"))


def test_dry_and_refused_runs_claim_nothing(three, k2, monkeypatch):
    before = tree(three)
    k2("render", *NAMES, "--dry-run")

    def refuse(name: str, variant: str | None = None) -> None:
        raise K2Error(f"The licence of {name} has not been accepted.")

    monkeypatch.setattr("k2cli.licence.require_for_model", refuse)
    k2("render", *NAMES, code=1)

    assert tree(three) == before


def test_many_runs_are_locked_only_at_their_turn(three, k2, fake, monkeypatch):
    """Each lock is an open file. A run that another process has taken meanwhile is left to it, and reported."""
    monkeypatch.setattr(multi_project, "MAX_LOCKED", 1)
    taken = Run(three / "two" / "outputs" / "0001-fox-and-1-more")
    stop_at(fake, 0, taken.lock)

    result = k2("render", *NAMES, "-q", code=1)
    taken.unlock()

    assert "two/outputs/0001-fox-and-1-more is being rendered by another process." in result.stderr
    assert len(result.stdout.splitlines()) == 4 and "1 of 3 projects failed: two." in result.stderr
    assert len(k2("render", "--resume", "two").stdout.splitlines()) == 2


def test_project_without_a_run_to_resume_is_reported(three, k2, fake):
    stop_at(fake, 0, fail(KeyboardInterrupt()))
    k2("render", "one", "three", code=130)

    result = k2("render", "--resume", *NAMES, code=1)

    assert "two has no run to resume." in result.stderr
    assert len(result.stdout.splitlines()) == 4
    assert "run to resume" in k2("render", "--resume", "two", code=1).stderr


@pytest.mark.parametrize("more", [(), ("--json",)])
def test_picture_deleted_meanwhile_is_left_for_the_next_command(three, k2, fake, more):
    """Only the remaining pictures are numbered; no other project gets a turn without a picture, or another's."""
    for name in NAMES:
        stop_at(fake, 1, fail(KeyboardInterrupt()))
        k2("render", name, code=130)
    there = three / "two" / "outputs" / "0001-fox-and-1-more" / "fox-7.png"
    stop_at(fake, 0, there.unlink)

    made = k2("render", "--resume", *NAMES, "-q", *more).stdout.splitlines()

    assert len(made) == 3 and all("owl-7.png" in line for line in made)
    assert not more or [json.loads(line)["of"] for line in made] == [[1, 3], [2, 3], [3, 3]]
    assert len(k2("render", "--resume", *NAMES, "-q").stdout.splitlines()) == 1 and there.exists()


def test_older_run_gets_its_own_resume_command(three, k2, fake):
    def act() -> None:
        later = three / "two" / "outputs" / "0009-later"
        later.mkdir()
        (later / "run.toml").touch()
        raise KeyboardInterrupt

    stop_at(fake, 0, act)
    said = k2("render", *NAMES, code=130).stderr

    told = said.partition("Resume with: ")[2]
    assert told == "k2 render --resume one three; k2 render --resume --run 1 --project two\n"


@pytest.mark.parametrize("turn", [0, 1])
def test_error_in_one_project_leaves_the_others(three, k2, fake, turn):
    stop_at(fake, 2 + turn, fail(K2Error("The lamp is out.", hint="Light it.")))

    result = k2("render", *NAMES, "--json", code=1)

    assert "Error: two: The lamp is out.\nHint:  Light it.\n" in result.stderr
    assert "Error: 1 of 3 projects failed: two.\n" in result.stderr
    whose = [(Path(each["file"]).parts[0], each["of"]) for each in map(json.loads, result.stdout.splitlines())]
    there = [("two", [3, 6])] * turn
    assert whose == [("one", [1, 6]), ("one", [2, 6]), *there, ("three", [5, 6]), ("three", [6, 6])]
    assert (three / "two" / "outputs").exists() == bool(turn)  # a run with a picture stays
    line = "k2 render --resume --project two"
    more = f" Resume with: {line}" if turn else ""
    assert f"Hint:  The errors are above; the others are done.{more}\n" in result.stderr
    if turn:
        assert len(k2(*shlex.split(line)[1:], "-q").stdout.splitlines()) == 1 and len(made_in(three)) == 6


def test_message_when_all_projects_fail(three, k2):
    for name in NAMES:
        (three / name / "outputs").write_text("in the way")

    said = k2("render", *NAMES, code=1).stderr

    assert "3 of 3 projects failed: one, two, three.\nHint:  The errors are above.\n" in said


def test_unwritable_project_is_reported_and_skipped(three, k2):
    (three / "two" / "outputs").write_text("in the way")

    result = k2("render", *NAMES, "-q", code=1)

    assert result.stderr.count("two/outputs cannot be written: ") == 1
    assert len(made_in(three)) == 4 and {Path(path).parts[0] for path in made_in(three)} == {"one", "three"}


def test_stream_renders_every_project(three, k2):
    """And whoever reads only its objects learns what is wrong with a project, and what helps."""
    (three / "one" / "outputs").write_text("in the way")

    result = k2("render", "one", "two", "--stream", "--json", input="a\nb\n", code=1)

    made, wrong, *_ = lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert ["error" in each for each in lines] == [False, True] * 2 and made["file"].startswith("two/")
    cause, summary = wrong["error"].splitlines()
    assert "one/outputs cannot be written: " in cause and summary == "1 of 2 projects failed: one."
    hints = wrong["hint"].splitlines()
    assert hints[-1] == "The errors are above; the others are done." and all(each in result.stderr for each in hints)


def test_unplannable_line_reports_all_errors_in_its_object(three, k2):
    """Identical errors are reported once."""
    (three / "two" / "styles").mkdir()
    (three / "two" / "styles" / "dusk.toml").write_text("keywords = 1\n")
    line = '{"prompt": "a", "styles": {"dusk": 1}}\n{"prompt": ""}\n'

    said = k2("render", *NAMES, "--stream", "--json", input=line, code=1).stdout.splitlines()

    each, same = (json.loads(line)["error"] for line in said)
    assert 'there is no style "dusk"' in each.splitlines()[0] and '"keywords" must be' in each.splitlines()[1]
    assert same.splitlines() == ["The line: the prompt is empty."]


@pytest.mark.parametrize("whole", [0, 1])
def test_full_disk_ends_all_and_they_can_be_resumed(three, k2, monkeypatch, whole):
    before, write = tree(three), os.fsync

    def fsync(handle: int) -> None:
        if len(made_in(three)) >= 2 * whole and len(runs_in(three)) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        said = k2("render", *NAMES, "-q", code=1).stderr

    assert said.count("The disk is full") == 1 and "projects" not in said
    if not whole:  # there is nothing to resume
        assert tree(three) == before and "Free some space, and try again." in said
        return
    line = said.partition("then resume with: ")[2].strip()
    assert line == "k2 render --resume one two three"  # the first project's sheet is missing
    k2(*shlex.split(line)[1:])
    assert len(made_in(three)) == 6


def test_closed_pipe_ends_all_and_they_can_be_resumed(three, k2, monkeypatch):
    def leave(line: str) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr("k2cli.execute.print_result", leave)

    assert "Resume with: k2 render --resume one two three\n" in k2("render", *NAMES, code=1).stderr


def test_unforeseen_error_keeps_resumable_runs(three, k2, fake):
    stop_at(fake, 2, fail(MemoryError()))
    with pytest.raises(MemoryError):
        k2("render", *NAMES, "-q")

    assert len(runs_in(three)) == 3
    assert len(k2("render", "--resume", *NAMES, "-q").stdout.splitlines()) == 4


def test_all_errors_are_reported_before_rendering(three, k2):
    (three / "one" / "k2.toml").write_text("[[prompt]\n")
    (three / "three" / "k2.toml").write_text(PLAIN.replace("seed = 7", "sed = 7"))
    before = tree(three)

    said = k2("render", "gone", *NAMES, code=1).stderr

    assert said.count("Error: ") == 3 and 'There is no project "gone".' in said
    assert "one/k2.toml" in said and "three/k2.toml" in said and tree(three) == before
    (three / "one" / "k2.toml").write_text("")
    (three / "three" / "k2.toml").write_text("")
    said = k2("render", *NAMES, code=1).stderr
    assert "one: k2.toml has no [[prompt]]." in said and "three: k2.toml has no [[prompt]]." in said
    assert k2("render", *NAMES, "-p", "tea", "--size", "100x100", code=2).stderr.count("--size: ") == 1
    assert k2("render", "a", "red", "fox", code=1).stderr.count("Error: ") == 1
    (three / "bare").mkdir()
    said = k2("render", "gone", "bare", code=1).stderr
    assert 'There is no project "gone".' in said and "bare is not a project: it has no k2.toml." in said
    assert [k2(each, "bare", code=1).stderr.count("Error: ") for each in ("render", "log", "gallery")] == [1, 1, 1]


@pytest.mark.parametrize("more", [("--dry-run",), ()])
def test_warning_names_its_project(three, k2, more):
    """Whether it is about the plan or about a picture; with a single project no name is needed."""
    two = PLAIN.replace("seed = 7", "seed = 7\ndenoise = 0.5").replace("a red fox", "a ((red)) fox")
    (three / "two" / "k2.toml").write_text(two)
    idle, signs = "No picture has an init image, so denoise has no effect.\n", "Read as words: ((red)) ("

    several, one = k2("render", *NAMES, *more).stderr, k2("render", "two", *more).stderr

    assert several.count(f"two: {idle}") == several.count(idle) == several.count(f"two: {signs}") == 1
    assert idle in one and signs in one and "two: " not in one


def test_unchanged_pictures_are_reported_with_their_project(three, k2):
    k2("render", *NAMES)
    (three / "two" / "k2.toml").write_text(PLAIN.replace("seed = 7", "seed = 8"))

    several, one = k2("render", *NAMES).stderr, k2("render", "one").stderr

    said = "The same pictures as run 000"
    assert [line.split(said)[0] for line in several.splitlines() if said in line] == ["one: ", "three: "]
    assert f"\n{said}2" in one


@pytest.fixture
def spoilt(three: Path) -> Callable[[str], None]:
    def spoil(what: str) -> None:
        """Give the last project a style with a truncated picture, or with a LoRA that is not one, or is FLUX's."""
        project = three / "three"
        (project / "styles").mkdir()
        Image.effect_noise((64, 64), 50).save(project / "a.png")
        raw = (project / "a.png").read_bytes()
        (project / "cut.png").write_bytes(raw[: len(raw) // 2])
        write_weights(project / "no.safetensors", {})
        layer = "transformer.single_transformer_blocks.0.attn.to_q"
        save_file({f"{layer}.lora_{half}.weight": np.zeros((1, 1)) for half in "AB"}, project / "flux.safetensors")
        lora = what.endswith(".safetensors")
        text = f'lora = "{what}"\n' if lora else f'[[reference]]\nimage = "{what}"\n'
        (project / "styles" / "dusk.toml").write_text(text)
        (project / "k2.toml").write_text(f"{PLAIN}\n[style]\ndusk = 1\n")

    return spoil


@pytest.mark.parametrize("more", [(), ("--dry-run",)])
@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("cut.png", "cut.png is not a readable picture"),
        ("no.safetensors", "is not a LoRA: it holds"),
        ("flux.safetensors", "is made for FLUX: it has layers like transformer.single_transformer_blocks.0.attn.to_q"),
    ],
)
def test_style_files_are_checked_before_the_first_run(three, k2, spoilt, what, said, more):
    spoilt(what)
    before = tree(three)

    result = k2("render", *NAMES, *more, code=1)

    assert (
        said in result.stderr and "three" in result.stderr and 'Style "dusk": ' in result.stderr and result.stdout == ""
    )
    assert tree(three) == before
    k2("render", "three", "--style", "dusk=0", *more)  # a style that is off is not checked


def test_reference_is_decoded_once(three, k2, spoilt, monkeypatch):
    spoilt("a.png")
    begun: list[Image.Image] = []
    monkeypatch.setattr(Image.Image, "draft", lambda image, *_: begun.append(image))
    monkeypatch.setattr(pictures, "DECODED", set())

    k2("render", "three", "--batch", "3", "--dry-run")
    k2("render", "three", "--batch", "3", "-q")

    assert len(begun) == 1
