"""Exit codes: what each kind of ending leaves behind."""

from __future__ import annotations

import pytest

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
