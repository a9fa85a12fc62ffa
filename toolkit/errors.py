"""What can go wrong in a way that the user can mend, and the exit code that each case leaves behind.

Every command in ``launch/`` ends with one of these codes; docs and tests refer to them by these names.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable

EXIT_DONE = 0
EXIT_USER_ERROR = 2
EXIT_TOO_MANY_REJECTS = 3
EXIT_INTERRUPTED = 75
EXIT_AT_ONCE = 130  # as shells say it: Ctrl-C where there is nothing to save, or a second one

# Within this time the first rank of a node has printed and left, and the launcher has killed the others.
OTHER_RANKS_WAIT_SECONDS = 15.0


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


def exit_code_of(command: Callable[[], None], *, debug: bool, local_rank: int = 0) -> int:
    """Run ``command`` and turn its outcome into a documented exit code.

    Exactly one rank of a node prints an error that all of them meet: the launcher kills the others as soon as one has
    left, so the others wait for that. One that is still alive then met the error alone, and says so. An interruption
    is agreed on by all ranks; there one word is enough.

    Args:
        command: does the work of one launch script.
        debug: raise the user's errors with their traceback instead of printing one line.
        local_rank: number of this process on its node.
    """
    launcher = os.getppid()
    try:
        command()
    except (UserError, Interrupted) as error:
        if debug:
            raise
        who = ""
        if local_rank > 0:
            _wait_for(launcher)
            who = f" (local rank {local_rank})"
        if isinstance(error, UserError):
            print(f"error{who}: {error}", file=sys.stderr, flush=True)
        elif local_rank == 0:
            print(f"interrupted: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except KeyboardInterrupt:
        if debug:
            raise
        if local_rank == 0:
            print("interrupted: stopped by Ctrl-C", file=sys.stderr, flush=True)
        return EXIT_AT_ONCE
    return EXIT_DONE


def _wait_for(launcher: int) -> None:
    """Give the launcher the time to end this rank, unless the launcher itself has ended."""
    end = time.monotonic() + OTHER_RANKS_WAIT_SECONDS
    while time.monotonic() < end and os.getppid() == launcher:
        time.sleep(0.1)
