"""Errors that users can fix end in one sentence, wherever they come from."""

from __future__ import annotations

import runpy
import sys
import warnings

import pytest

from model.errors import K2Error, exit_on_error


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (K2Error("It is torn.", hint="Mend it."), "Error: It is torn.\nHint:  Mend it."),
        (K2Error("It is torn."), "Error: It is torn."),
        (FileNotFoundError("No such file: judge"), "Error: No such file: judge."),
        (FileNotFoundError(2, "No such file or directory", "judge"), "Error: judge: No such file or directory."),
    ],
)
def test_fixable_errors_end_in_one_sentence(error, told):
    with pytest.raises(SystemExit) as ended, exit_on_error():
        raise error
    assert ended.value.code == told  # which Python writes to standard error, and exits with 1


@pytest.mark.parametrize("error", [ValueError("a bug"), OSError("of no file")])
def test_bug_keeps_its_traceback(error):
    with pytest.raises(type(error)), exit_on_error():
        raise error


def called(module: str, *arguments: str) -> int | str | None:
    """The exit code of `python -m model.train.MODULE`, run in this process: a new one would import PyTorch again."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the module is imported already
        patch.setattr(sys, "argv", ["", *arguments])
        runpy.run_module(f"model.train.{module}", run_name="__main__", alter_sys=True)
    return ended.value.code


@pytest.mark.parametrize("module", ["data", "judge", "release", "samples"])
def test_wrong_arguments_print_the_usage(module, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert called(module, *(["x"] if module in ("data", "judge") else [])) == 2
    assert capsys.readouterr().err.startswith("usage: ")


def test_encoding_without_data_says_how_to_build_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert str(called("encode", "256")).splitlines()[-1] == "Hint:  Build it with: python -m model.train.data"
