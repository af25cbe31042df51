"""`k2 watch`: what a change affects is rendered again, and nothing else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import PROJECT, write_weights
from PIL import Image
from rich.console import Console

from k2cli import console, watch
from k2cli.console import Unwritable
from model.errors import K2Error

K2 = Path(sys.executable).with_name("k2")


@pytest.fixture
def changes(monkeypatch):
    """Edits made one after the other, each while k2 waits; after the last one somebody presses Ctrl-C."""
    edits = []

    def wait(root, before):
        if not edits:
            raise KeyboardInterrupt
        edits.pop(0)()

    monkeypatch.setattr(watch, "wait_for_change", wait)
    return edits


def test_only_affected_pictures_are_rendered_again(moody, k2, changes, fake):
    toml = moody / "k2.toml"
    changes += [
        lambda: toml.write_text(PROJECT.replace("a red fox", "a blue fox")),
        lambda: toml.write_text(PROJECT.replace("a red fox", "a blue fox") + "# a remark\n"),
        lambda: toml.write_text(PROJECT),
    ]

    result = k2("watch", code=130)

    assert result.stdout.splitlines() == [
        "outputs/0001-fox-and-1-more/fox-7.png",
        "outputs/0001-fox-and-1-more/an-owl-at-night-7.png",
        "outputs/0002-fox/fox-7.png",
    ]
    assert result.stderr.count("No picture changes.") == 2
    assert len(fake.loaded) == 1


def test_pictures_of_the_last_runs_are_not_rendered_again(moody, k2, changes):
    owl = k2("render").stdout.splitlines()[1]

    assert "No picture changes." in k2("watch", code=130).stderr
    (moody / owl).unlink()
    (moody / "outputs/0001-fox-and-1-more/an-owl-at-night-7.toml").unlink()
    assert k2("watch", code=130).stdout.splitlines() == ["outputs/0002-an-owl-at-night/an-owl-at-night-7.png"]
    assert not k2("watch", code=130).stdout
    assert k2("watch", "--steps", "3", code=130).stdout.count("outputs/0003-") == 2
    (moody / "outputs/0003-fox-and-1-more/run.toml").write_text("broken")
    assert k2("watch", "--steps", "3", code=130).stdout.count("outputs/0004-") == 2


def test_random_seed_stays_during_a_watch(moody, k2, changes):
    toml, said = moody / "k2.toml", PROJECT.replace("seed = 7", 'seed = "random"')
    toml.write_text(said)
    changes += [lambda: toml.write_text(said.replace("a red fox", "a blue fox"))]

    fox, owl, blue = k2("watch", code=130).stdout.splitlines()

    assert Path(fox).name == Path(blue).name != Path(owl).name


def test_deleted_picture_stays_deleted_until_requested_again(moody, k2, changes):
    toml = moody / "k2.toml"
    changes += [
        (moody / "outputs/0001-fox-and-1-more/fox-7.png").unlink,
        lambda: toml.write_text(PROJECT.replace("fox", "wolf")),
        lambda: toml.write_text(PROJECT),
    ]

    made = k2("watch", code=130).stdout.splitlines()[2:]

    assert made == ["outputs/0002-wolf/wolf-7.png", "outputs/0003-fox/fox-7.png"]


def test_error_is_reported_and_waited_out(moody, k2, changes):
    toml = moody / "k2.toml"
    changes += [lambda: toml.write_text("[render\n"), lambda: toml.write_text(PROJECT.replace("owl", "emu"))]

    result = k2("watch", code=130)

    assert "k2.toml is not valid TOML" in result.stderr
    assert result.stdout.splitlines()[2:] == ["outputs/0002-an-emu-at-night/an-emu-at-night-7.png"]


def test_unencodable_path_is_waited_out(moody, k2, changes, monkeypatch):
    monkeypatch.setattr(watch, "plan_missing", lambda *_: "ä".encode("ascii"))

    assert 'No file name can contain "' in (result := k2("watch", code=130)).stderr
    assert "Waiting for a change" in result.stderr


def test_full_output_is_not_waited_out(moody, k2, changes, monkeypatch):
    def fill(line: str) -> None:
        raise Unwritable("Standard output cannot be written.")

    monkeypatch.setattr("k2cli.execute.print_result", fill)
    changes += [lambda: pytest.fail("it was waited")]

    assert "resume with: k2 render --resume" in k2("watch", code=1).stderr


def test_pictures_before_an_error_are_not_rendered_again(moody, k2, changes, fake):
    def fail(at: int) -> None:
        if at == 1:
            raise K2Error("The owl cannot be drawn.")

    fake.stop = staticmethod(fail)

    def mend() -> None:
        fake.stop = staticmethod(lambda at: None)

    changes.append(mend)
    result = k2("watch", code=130)

    assert "The owl cannot be drawn." in result.stderr
    assert result.stdout.splitlines() == [
        "outputs/0001-fox-and-1-more/fox-7.png",
        "outputs/0002-an-owl-at-night/an-owl-at-night-7.png",
    ]


def test_changed_styles_and_references_rerender(moody, k2, changes):
    (moody / "styles").mkdir()
    (moody / "refs").mkdir()
    style, picture = moody / "styles" / "dusk.toml", moody / "refs" / "a.png"
    Image.new("RGB", (64, 64), "navy").save(picture)
    style.write_text('[[reference]]\nimage = "refs/a.png"\n')
    (moody / "k2.toml").write_text(PROJECT + "[style]\ndusk = 1.0\n")
    changes += [
        lambda: Image.new("RGB", (64, 64), "red").save(picture),
        lambda: style.write_text('keywords = ["film"]\n[[reference]]\nimage = "refs/a.png"\n'),
    ]

    assert len(k2("watch", "--only", "fox", code=130).stdout.splitlines()) == 3


@pytest.mark.parametrize("line", ['format = "webp"', 'precision = "int8"', 'offload = "text"'])
def test_changed_settings_and_format_rerender(moody, k2, changes, line):
    changes += [lambda: (moody / "k2.toml").write_text(PROJECT.replace("seed = 7", f"seed = 7\n{line}"))]

    assert len(k2("watch", "--only", "fox", code=130).stdout.splitlines()) == 2


NOTHING_NEW = """steps = 52
guidance = 3.5
size = "128x128"
sampler = "euler"
guidance_until = 1
style_guidance = 2
leak_guard = "shift"
variant = "raw"
device = "cpu"
precision = "native"
offload = "none"
cohesion = 0.5
"""


def saying(lines: str) -> str:
    """The project with more lines in [render]."""
    return PROJECT.replace("seed = 7\n", f"seed = 7\n{lines}")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        *(("", f"{line}\n") for line in NOTHING_NEW.splitlines()),
        ("", NOTHING_NEW),
        ("guidance = 0\n", "guidance = 0\nguidance_until = 0.5\n"),
    ],
)
def test_stating_a_default_changes_nothing(moody, k2, changes, monkeypatch, before, after):
    """What the model uses by default, and settings that have nothing to act on."""
    monkeypatch.setattr("model.parts.pick_device", lambda name: name or "cpu")
    toml = moody / "k2.toml"
    toml.write_text(saying(before))
    changes += [lambda: toml.write_text(saying(after))]

    result = k2("watch", "--only", "fox", code=130)

    assert result.stdout.splitlines() == ["outputs/0001-fox/fox-7.png"]
    assert result.stderr.count("No picture changes.") == 1
    assert not k2("watch", "--only", "fox", code=130).stdout  # compared with what is on disk


def test_stating_the_default_mu_changes_nothing(moody, k2, changes, fake):
    write_weights(moody.parent / "box" / "mini-turbo.safetensors", {"kind": "dit", "variant": "turbo", "native": 128})
    toml = moody / "k2.toml"
    changes += [lambda: toml.write_text(saying("mu = 1.15\n")), lambda: toml.write_text(saying("mu = 1.1\n"))]

    made = k2("watch", "--only", "fox", "--turbo", code=130).stdout.splitlines()

    assert made == ["outputs/0001-fox/fox-7.png", "outputs/0002-fox/fox-7.png"]


def test_cohesion_change_rerenders_followers(moody, k2, changes):
    toml = moody / "k2.toml"
    toml.write_text(saying("batch = 2\n"))
    changes += [lambda: toml.write_text(saying("batch = 2\ncohesion = 0.5\n"))]

    made = k2("watch", "--only", "fox", code=130).stdout.splitlines()

    assert made[2:] == ["outputs/0002-fox/fox-8.png"]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (NOTHING_NEW, NOTHING_NEW.replace("steps = 52", "steps = 51")),
        ("", "guidance = 0\n"),
        ("", "guidance_until = 0.5\n"),
        ("", 'sampler = "ab2"\n'),
        ("", "mu = 0.7\n"),
    ],
)
def test_stating_a_non_default_rerenders(moody, k2, changes, before, after):
    toml = moody / "k2.toml"
    toml.write_text(saying(before))
    changes += [lambda: toml.write_text(saying(after))]

    made = k2("watch", "--only", "fox", code=130).stdout.splitlines()

    assert made == ["outputs/0001-fox/fox-7.png", "outputs/0002-fox/fox-7.png"]


def test_outside_files_are_used_if_allowed(moody, k2, changes):
    Image.new("RGB", (64, 64), "navy").save(moody.parent / "a.png")
    (moody / "styles").mkdir()
    (moody / "styles" / "dusk.toml").write_text('[[reference]]\nimage = "../a.png"\n')
    (moody / "k2.toml").write_text(PROJECT + "[style]\ndusk = 1.0\n")

    assert k2("watch", "--allow-outside", code=130).stdout.count(".png\n") == 2
    assert "lies outside the project" in k2("watch", code=130).stderr


def test_own_outputs_are_no_change(tmp_path):
    before = watch.project_stamps(tmp_path)
    for folder in ("outputs/0001-x", "gallery", ".git"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "x").write_text("x")
    assert watch.project_stamps(tmp_path) == before
    for name in ("styles/a.toml", "styles/a.safetensors", "refs/outputs/a.png"):
        before = watch.project_stamps(tmp_path)
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
        assert watch.project_stamps(tmp_path) != before, name
    before, then = watch.project_stamps(tmp_path), (tmp_path / name).stat().st_mtime_ns
    (tmp_path / name).write_text("more")
    os.utime(tmp_path / name, ns=(then, then))  # as with a clock that ticks rarely
    assert watch.project_stamps(tmp_path) != before


@pytest.mark.parametrize("name", ["watch.log", "nohup.out", "4913", ".k2.toml.swp", ".#k2.toml", "k2.toml~", "a.psd"])
def test_unrelated_files_are_no_change(tmp_path, name):
    """Watch's messages may go to a log in the project: if that were a change, it would write more, forever."""
    (tmp_path / "k2.toml").touch()
    before = watch.project_stamps(tmp_path)
    (tmp_path / name).write_text("x")

    assert watch.project_stamps(tmp_path, before) == before


def test_any_referenced_file_is_watched(moody, k2, monkeypatch):
    """If a style names it, even when everything is rendered; and if it disappears, its return is a change as well."""
    picture = moody.parent / "sketch"
    Image.new("RGB", (64, 64), "navy").save(picture, "PNG")
    (moody / "styles").mkdir()
    (moody / "styles" / "dusk.toml").write_text('[[reference]]\nimage = "../sketch"\n')
    (moody / "k2.toml").write_text(PROJECT + "[style]\ndusk = 1.0\n")
    stamps = []

    def wait(root, before):
        stamps.append(before)
        edit = [picture.touch, picture.unlink, lambda: Image.new("RGB", (64, 64), "red").save(picture, "PNG")]
        if len(stamps) > len(edit):
            raise KeyboardInterrupt
        edit[len(stamps) - 1]()
        assert watch.project_stamps(root, before) != before

    monkeypatch.setattr(watch, "wait_for_change", wait)
    result = k2("watch", "--allow-outside", "--only", "fox", code=130)

    assert result.stdout.splitlines() == ["outputs/0001-fox/fox-7.png", "outputs/0002-fox/fox-7.png"]
    stamps.clear()
    assert not k2("watch", "--allow-outside", "--only", "fox", code=130).stdout


def test_new_picture_in_a_linked_folder_is_noticed(moody, k2, monkeypatch):
    """Other new files there are not, as in the project."""
    far = moody.parent / "far"
    far.mkdir()
    Image.new("RGB", (64, 64), "navy").save(far / "a.png")
    (moody / "linked").symlink_to(far)
    (moody / "styles").mkdir()
    (moody / "styles" / "dusk.toml").write_text('[[reference]]\nimage = "linked/*"\n')
    (moody / "k2.toml").write_text(PROJECT + "[style]\ndusk = 1.0\n")
    looks = []

    def wait(root, before):
        looks.append(before)
        if len(looks) == 2:
            raise KeyboardInterrupt
        (far / "notes.txt").touch()
        assert watch.project_stamps(root, before) == before
        Image.new("RGB", (64, 64), "red").save(far / "b.png")
        assert watch.project_stamps(root, before) != before

    monkeypatch.setattr(watch, "wait_for_change", wait)
    result = k2("watch", "--allow-outside", "--only", "fox", code=130)

    assert result.stdout.splitlines() == ["outputs/0001-fox/fox-7.png", "outputs/0002-fox/fox-7.png"]


def test_waits_until_writing_has_finished(monkeypatch, tmp_path):
    stamps = iter([{}, {"a": (1, 1)}, {"a": (2, 9)}, {"a": (2, 9)}])
    monkeypatch.setattr(watch, "project_stamps", lambda root, before: next(stamps))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)

    watch.wait_for_change(tmp_path, {})

    assert next(stamps, None) is None


@pytest.mark.parametrize("terminal", [True, False])
def test_ctrl_c_ends_the_terminal_line(moody, k2, changes, monkeypatch, terminal):
    """Otherwise the shell's prompt would follow the ^C."""
    monkeypatch.setattr(console, "console", Console(stderr=True, force_terminal=terminal))

    assert k2("watch", "--quiet", code=130).stderr == "\n" * terminal


@pytest.mark.skipif(os.name != "posix", reason="signals as POSIX has them")
def test_real_process_ends_on_ctrl_c(moody):
    """An error that is there from the start is waited out as well."""
    (moody / "k2.toml").write_text("[render]\nsed = 1\n")
    process = subprocess.Popen([K2, "watch"], stderr=subprocess.PIPE, text=True)
    said = ""
    for line in process.stderr:
        said += line
        if "Waiting for a change" in line:
            break
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130 and "Traceback" not in process.stderr.read()
    assert 'Did you mean "seed"?' in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps must be between 1 and 1,000, not 0."),
        (["--batch", "0"], "--batch must be between 1 and 1,000, not 0."),
        (["--size", "65x65"], "--size: the sides of 65x65 are not multiples of 16."),
        (["--size", "big"], '--size: "big" is not a size.'),
        (["--device", "foo"], '--device cannot be "foo".'),
        (["--device", "cuda:99"], 'There is no device "cuda:99".'),
    ],
)
def test_command_line_error_ends_at_once(moody, k2, changes, arguments, message):
    result = k2("watch", *arguments, code=2 if message.startswith("--") else 1)

    assert message in result.stderr and "Waiting" not in result.stderr


@pytest.mark.parametrize("arguments", [["--only", "emu"], ["--size", "80x80"], ["--turbo"]])
def test_error_that_a_file_can_fix_is_waited_out(moody, k2, changes, arguments):
    assert "Waiting for a change" in k2("watch", *arguments, code=130).stderr


def test_project_may_be_given_by_option(moody, k2, changes, monkeypatch):
    monkeypatch.chdir(moody.parent)

    assert len(k2("watch", "--project", "moody", code=130).stdout.splitlines()) == 2
    assert "not both" in k2("watch", "moody", "--project", "moody", code=2).stderr


def test_non_project_ends_at_once(k2, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    assert "There is no k2.toml in" in k2("watch", code=1).stderr
    assert "is not a project" in k2("watch", tmp_path, code=1).stderr


def test_file_of_a_project_is_refused(moody, k2, changes):
    (moody / "notes.txt").write_text("owls")

    assert "notes.txt is not a project: it is a file." in k2("watch", "notes.txt", code=1).stderr
    assert not (moody / "outputs").exists()
