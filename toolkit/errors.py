"""What can go wrong in a way that the user can mend, and the exit code that each case leaves behind.

Every command in ``launch/`` ends with one of these codes; docs and tests refer to them by these names.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

EXIT_DONE = 0
EXIT_FAILED = 1  # as Python says it: an error that is none of the user's
EXIT_USER_ERROR = 2
EXIT_TOO_MANY_REJECTS = 3
EXIT_INTERRUPTED = 75
EXIT_AT_ONCE = 130  # as shells say it: Ctrl-C where there is nothing to save, or a second one


class UserError(Exception):
    """The user's input is wrong.

    The message is one line that says what is wrong, where, and how to mend it.
    """

    exit_code = EXIT_USER_ERROR


class TooManyRejects(UserError):
    """More of the data was rejected than the user allowed; nothing was half-written."""

    exit_code = EXIT_TOO_MANY_REJECTS


class Interrupted(Exception):
    """The run was asked to stop, has saved everything, and goes on when started again."""

    exit_code = EXIT_INTERRUPTED


def exit_code_of(command: Callable[[], None], *, debug: bool) -> int:
    """Run ``command`` and turn its outcome into a documented exit code; ``cluster/failures.py`` does so on many ranks.

    Args:
        command: does the work of one launch script.
        debug: raise the user's errors with their traceback instead of printing one line.
    """
    try:
        command()
    except (UserError, Interrupted) as error:
        if debug:
            raise
        kind = "error" if isinstance(error, UserError) else "interrupted"
        print(f"{kind}: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except KeyboardInterrupt:
        if debug:
            raise
        print("interrupted: stopped by Ctrl-C", file=sys.stderr, flush=True)
        return EXIT_AT_ONCE
    return EXIT_DONE
