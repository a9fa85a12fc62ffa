"""Errors that the user can correct, and the exit code of each.

Every command in ``launch/`` ends with one of these codes; docs and tests refer to them by these names.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

EXIT_DONE = 0
EXIT_FAILED = 1  # Python's own: an error that is none of the user's
EXIT_USER_ERROR = 2
EXIT_TOO_MANY_REJECTS = 3
EXIT_INTERRUPTED = 75
EXIT_AT_ONCE = 130  # the shells' own: Ctrl-C where nothing is to be saved, or a second one


class _Explained(Exception):
    """An outcome that the terminal shows in two lines.

    Args:
        message: one line: what happened, and where.
        hint: what to do now, as one line; may be empty where nothing is to do.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message

    @property
    def lines(self) -> str:
        """The message and, below it, the hint."""
        return f"{self.message}\nhint: {self.hint}" if self.hint else self.message


class UserError(_Explained):
    """The input is wrong: the message says what and where, the hint gives the remedy."""

    exit_code = EXIT_USER_ERROR


class TooManyRejects(UserError):
    """More of the data was rejected than the user allowed; nothing was half-written."""

    exit_code = EXIT_TOO_MANY_REJECTS


class Interrupted(_Explained):
    """The run was requested to stop and has saved everything; the same command resumes it."""

    exit_code = EXIT_INTERRUPTED


def exit_code_of(command: Callable[[], None], *, debug: bool) -> int:
    """Run ``command`` and turn its outcome into a documented exit code; ``cluster/failures.py`` does so on many ranks.

    Args:
        command: does the work of one launch script.
        debug: raise the user's errors with their traceback instead of printing the message and its hint.
    """
    try:
        command()
    except (UserError, Interrupted) as error:
        if debug:
            raise
        kind = "error" if isinstance(error, UserError) else "interrupted"
        print(f"{kind}: {error.lines}", file=sys.stderr, flush=True)
        return error.exit_code
    except KeyboardInterrupt:
        if debug:
            raise
        print("interrupted: stopped by Ctrl-C", file=sys.stderr, flush=True)
        return EXIT_AT_ONCE
    return EXIT_DONE
