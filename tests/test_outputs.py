"""Run folders: numbers are never shared, and failed runs leave nothing behind."""

from __future__ import annotations

import errno
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
from conftest import tree

from k2cli import disk, history, outputs
from k2cli.disk import O_DIRECTORY, new_draft, opened, try_lock, write_files
from k2cli.outputs import Run, claim_number
from model.errors import K2Error


def claim_many(folder: Path, name: str, count: int) -> list[str]:
    return [Run.claim(folder, name).folder.name for _ in range(count)]


def test_run_numbers_continue_after_the_highest(tmp_path):
    for name in ("0007-fox", "12-no-run", "notes", "10000-late"):
        (tmp_path / name).mkdir()

    assert Run.claim(tmp_path, "owl").folder.name == "10001-owl"


def test_last_run_has_the_highest_number(tmp_path):
    """By name, 9999 would sort last."""
    for name in ("9999-fox", "10000-owl"):
        Run(tmp_path / name).folder.mkdir()
        (tmp_path / name / "run.toml").touch()

    assert Run.last(tmp_path).folder.name == "10000-owl"


def test_linked_runs_are_ignored(tmp_path):
    """A link leads to a run made elsewhere or earlier, which could not be resumed properly."""
    for folder in ("outputs/0001-fox", "elsewhere/0002-owl"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "run.toml").touch()
    (tmp_path / "outputs" / "0002-owl").symlink_to(tmp_path / "elsewhere" / "0002-owl")

    assert Run.last(tmp_path / "outputs").folder.name == "0001-fox"
    assert Run.last(tmp_path / "outputs", 2) is None


def test_number_just_taken_by_another_run_is_skipped(tmp_path, monkeypatch):
    """Where locks do not work, two processes may both create 0001."""
    mkdir = Path.mkdir

    def slower(path: Path) -> None:
        mkdir(path)
        if path.name == "0001":
            mkdir(tmp_path / "0001-another")

    monkeypatch.setattr(Path, "mkdir", slower)

    assert claim_number(tmp_path).name == "0002"
    assert sorted(tree(tmp_path)) == ["0001-another", "0002"]


def test_processes_never_share_a_number(tmp_path):
    with ProcessPoolExecutor(4) as pool:
        claimed = [name for names in pool.map(claim_many, [tmp_path] * 4, "abcd", [25] * 4) for name in names]

    assert sorted(int(name.split("-")[0]) for name in claimed) == list(range(1, 101))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(claimed)


def test_failed_run_without_pictures_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), Run.claim(tmp_path / "outputs", "fox") as run:
        write_files({run["run.toml"]: b"planned"})
        raise ZeroDivisionError

    assert tree(tmp_path) == {}


def test_discarded_run_leaves_a_new_run_of_its_name_alone(tmp_path):
    """Its number is free again; whoever claims it next keeps it when the first run ends."""
    with pytest.raises(ZeroDivisionError), Run.claim(tmp_path / "outputs", "fox") as run:
        run.discard()
        other = Run.claim(tmp_path / "outputs", "fox", {"run.toml": b"planned"})
        raise ZeroDivisionError

    assert other.folder == run.folder
    assert tree(tmp_path / "outputs") == {"0001-fox": None, "0001-fox/run.toml": b"planned"}


def test_interrupted_run_keeps_its_plan(tmp_path):
    with pytest.raises(KeyboardInterrupt), Run.claim(tmp_path / "outputs", "fox", {"run.toml": b"planned"}) as run:
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt), Run.claim(tmp_path / "outputs", "owl"):
        raise KeyboardInterrupt

    assert tree(tmp_path / "outputs") == {"0001-fox": None, "0001-fox/run.toml": b"planned"}
    Run(run.folder).lock()


def test_run_interrupted_before_it_is_named_leaves_nothing(tmp_path, monkeypatch):
    def press(path: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "rename", press)
    with pytest.raises(KeyboardInterrupt):
        Run.claim(tmp_path / "outputs", "fox", {"run.toml": b"planned"})

    assert tree(tmp_path) == {}


@pytest.mark.parametrize("suffix", [".png", ".webp", ".jpg"])
def test_failed_run_with_a_picture_stays(tmp_path, suffix):
    with pytest.raises(ZeroDivisionError), Run.claim(tmp_path / "outputs", "fox", {"run.toml": b"planned"}) as run:
        run.save("fox-7", b"picture", b"record", suffix)
        raise ZeroDivisionError

    assert tree(run.folder) == {f"fox-7{suffix}": b"picture", "fox-7.toml": b"record", "run.toml": b"planned"}


def test_failed_run_with_a_blocked_picture_stays(tmp_path):
    with pytest.raises(ZeroDivisionError), Run.claim(tmp_path / "outputs", "fox", {"run.toml": b"planned"}) as run:
        run.save_blocked("fox-7", b"record")
        raise ZeroDivisionError

    assert tree(run.folder) == {"fox-7.blocked.toml": b"record", "run.toml": b"planned"}


def test_missing_picture_defaults_to_png(tmp_path):
    assert Run(tmp_path).picture_path("fox-7").name == "fox-7.png"


def test_file_in_place_of_outputs_is_one_sentence(tmp_path):
    (tmp_path / "outputs").write_text("a file")

    with pytest.raises(K2Error, match=r"outputs.* cannot be written: Not a directory\.") as caught:
        Run.claim(tmp_path / "outputs", "fox")
    assert caught.value.hint == "A file is where a folder belongs: move it away."


def test_outputs_linked_to_an_unmounted_drive(tmp_path):
    (tmp_path / "outputs").symlink_to(tmp_path / "drive" / "outputs")

    for ask in (lambda folder: Run.claim(folder, "fox"), Run.last, history.run_folders):
        with pytest.raises(K2Error, match=r"outputs links to .*/drive/outputs, which does not exist\.") as caught:
            ask(tmp_path / "outputs")
        assert caught.value.hint == "Is its drive mounted?"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_folder_without_permission_is_one_sentence(tmp_path):
    tmp_path.chmod(0o500)

    with pytest.raises(K2Error, match="permission denied"):
        Run.claim(tmp_path / "outputs", "fox")


def test_run_is_resumed_by_one_process_at_a_time(tmp_path):
    with Run.claim(tmp_path, "fox") as run, pytest.raises(K2Error, match="being rendered by another process"):
        Run(run.folder).lock()
    with Run(run.folder) as again:
        again.lock()


def test_file_system_without_locks_does_not_block_runs(tmp_path, monkeypatch):
    def flock(handle: int, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(disk.fcntl, "flock", flock)
    run = Run.claim(tmp_path, "fox", {"run.toml": b"planned"})

    assert not Run(run.folder).is_busy
    Run(run.folder).lock()


def test_plan_exists_before_the_run_gets_its_name(tmp_path, monkeypatch):
    seen = []
    rename = Path.rename

    def spy(path: Path, target: Path) -> Path:
        seen.append(tree(path))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", spy)
    with Run.claim(tmp_path, "fox", {"run.toml": b"planned"}) as run:
        assert seen == [{"run.toml": b"planned"}] == [tree(run.folder)]


def leave_behind(folder: Path, half: Path) -> None:
    """A process that dies between claiming a number and naming its run, with another file half written."""
    draft, handle = new_draft(half)
    os.write(handle, b"half")
    assert claim_number(folder).is_dir() and draft.exists()
    os._exit(9)


def test_next_start_removes_only_leftovers_of_dead_processes(tmp_path):
    run = Run.claim(tmp_path, "fox")
    mine, handle = new_draft(run.folder)
    dead = multiprocessing.get_context("fork").Process(target=leave_behind, args=(tmp_path, run.folder))
    dead.start()
    dead.join()
    assert dead.exitcode == 9 and len(list(run.folder.iterdir())) == 2 and (tmp_path / "0002").exists()

    outputs.SWEPT_OUTPUTS.clear()  # as in a process that has just started
    second = Run.claim(tmp_path, "owl")

    assert list(run.folder.iterdir()) == [mine]
    assert {path.name for path in tmp_path.iterdir()} == {"0001-fox", "0002-owl"} and second.folder.is_dir()
    os.close(handle)


def test_nothing_is_removed_while_another_process_holds_the_folder(tmp_path, monkeypatch):
    """That process may be about to name the number that it holds."""
    monkeypatch.setattr(outputs, "LOCK_TIMEOUT", 0.0)
    (tmp_path / "0001").mkdir()

    with opened(tmp_path, O_DIRECTORY) as handle:
        assert try_lock(handle)
        assert Run.claim(tmp_path, "fox").folder.name == "0002-fox"
    assert (tmp_path / "0001").is_dir()


def test_number_held_by_a_living_process_is_not_removed(tmp_path):
    """It gave up waiting for a stalled process, and is about to name its run."""
    (tmp_path / "0001").mkdir()

    with opened(tmp_path / "0001", O_DIRECTORY) as handle:
        assert try_lock(handle)
        assert Run.claim(tmp_path, "fox").folder.name == "0002-fox"
    assert (tmp_path / "0001").is_dir()


def test_nothing_is_removed_behind_a_link(tmp_path):
    half = tmp_path / "elsewhere" / ".1-0abc.draft"
    half.parent.mkdir()
    half.touch()
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / "0001-fox").symlink_to(half.parent)

    Run.claim(tmp_path / "outputs", "owl")

    assert half.exists()


def test_numbered_folder_with_content_is_left_alone(tmp_path):
    (tmp_path / "0003").mkdir()
    (tmp_path / "0003" / "notes.txt").write_text("mine")
    (tmp_path / "0003" / "run.toml").touch()
    (tmp_path / "12").mkdir()  # not a run number

    assert Run.claim(tmp_path, "fox").folder.name == "0004-fox"
    assert tree(tmp_path / "0003") == {"notes.txt": b"mine", "run.toml": b""} and (tmp_path / "12").is_dir()


def test_leftover_drafts_are_swept_once_per_process(tmp_path, monkeypatch):
    looked: list[str] = []
    monkeypatch.setattr(outputs, "remove_dead_drafts", lambda folder: looked.append(folder.name))
    Run.claim(tmp_path / "outputs", "fox", {"run.toml": b""})
    outputs.SWEPT_OUTPUTS.clear()

    for name in ("owl", "hen"):
        Run.claim(tmp_path / "outputs", name, {"run.toml": b""})

    assert [name for name in looked if "-" in name] == ["0001-fox"]
