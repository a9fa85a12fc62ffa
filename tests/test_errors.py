"""Exit codes: what each kind of ending leaves behind."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from toolkit.errors import Interrupted, TooManyRejects, UserError, as_one, exit_code_of


def failing(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UserError("no such table"), 2, "error: no such table\n"),
        (TooManyRejects("3 of 9"), 3, "error: 3 of 9\n"),
        (Interrupted("saved"), 75, "interrupted: saved\n"),
        (KeyboardInterrupt(), 130, "interrupted: stopped by Ctrl-C\n"),
    ],
)
def test_each_ending_has_a_code_and_a_line(
    error: BaseException, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code_of(lambda: failing(error), debug=False) == code
    assert capsys.readouterr().err == said


def test_nothing_wrong_is_zero() -> None:
    assert exit_code_of(lambda: None, debug=False) == 0


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(UserError):
        exit_code_of(lambda: failing(UserError("no such table")), debug=True)


def test_a_bug_is_never_dressed_up_as_the_users_mistake() -> None:
    with pytest.raises(ZeroDivisionError):
        exit_code_of(lambda: failing(ZeroDivisionError()), debug=False)


def make_a_folder_in_a_file(folder: Path) -> None:
    (folder / "file").touch()
    (folder / "file" / "results").mkdir()


def write_to_a_full_disk(folder: Path) -> None:
    with open("/dev/full", "w") as file:
        file.write("x" * 100_000)


def write_tensors_below_a_file(folder: Path) -> None:
    (folder / "file").touch()
    save_file({"weight": torch.zeros(4)}, folder / "file" / "model.safetensors")


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        (make_a_folder_in_a_file, errno.ENOTDIR),
        (write_to_a_full_disk, errno.ENOSPC),
        (write_tensors_below_a_file, errno.ENOTDIR),
    ],
)
def test_what_the_system_refuses_is_an_error_with_a_hint(command, reason, tmp_path, capsys) -> None:
    assert exit_code_of(lambda: command(tmp_path), debug=False) == 2
    error, hint = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ") and os.strerror(reason) in error and hint.startswith("hint: ")


def test_a_refusal_without_a_path_is_a_bug(capsys) -> None:
    with pytest.raises(PermissionError):
        exit_code_of(lambda: failing(PermissionError(errno.EPERM, "not permitted")), debug=False)


def test_a_pipe_that_nobody_reads_is_one_line(monkeypatch, capsys) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as output:
        monkeypatch.setattr("sys.stdout", output)
        assert exit_code_of(lambda: print("text"), debug=False) == 141
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_broken_pipe_elsewhere_is_a_bug() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with pytest.raises(BrokenPipeError):
        exit_code_of(lambda: os.write(writer, b"text"), debug=False)
    os.close(writer)


def test_several_problems_are_one_error_whose_hints_have_their_numbers() -> None:
    first, second = UserError("a=1 is wrong", "set a=2"), UserError("b=1 is wrong", "set b=2")
    assert as_one([first], "recipe r") is first
    both = as_one([first, second], "recipe r")
    assert "recipe r" in both.message and both.message.endswith(f"(1) {first.message}; (2) {second.message}")
    assert both.hint == f"(1) {first.hint}; (2) {second.hint}"
