"""Exit codes: what each kind of ending leaves behind, and which rank says so."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest

from toolkit import errors
from toolkit.errors import Interrupted, TooManyRejects, UserError, exit_code_of


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


def test_another_rank_waits_to_be_killed_and_speaks_only_if_it_is_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [0.0]
    monkeypatch.setattr(errors.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(errors.time, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds))
    assert exit_code_of(lambda: failing(UserError("no disk")), debug=False, local_rank=3) == 2
    assert clock[0] >= errors.OTHER_RANKS_WAIT_SECONDS
    assert capsys.readouterr().err == "error (local rank 3): no disk\n"


def test_nobody_waits_for_a_launcher_that_is_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    parents = iter([os.getppid(), 1])
    # In this module alone: a thread of another test may ask for its parent, too.
    monkeypatch.setattr(errors, "os", SimpleNamespace(getppid=lambda: next(parents)))
    monkeypatch.setattr(errors.time, "sleep", lambda seconds: pytest.fail("it waits"))
    assert exit_code_of(lambda: failing(Interrupted("saved")), debug=False, local_rank=1) == 75


def test_an_interruption_is_told_by_one_rank(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(errors, "OTHER_RANKS_WAIT_SECONDS", 0.0)
    assert exit_code_of(lambda: failing(Interrupted("saved")), debug=False, local_rank=1) == 75
    assert capsys.readouterr().err == ""
