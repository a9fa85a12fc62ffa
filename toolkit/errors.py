"""Errors that the user can correct, and the exit code of each.

Every command in ``launch/`` ends with one of these codes; docs and tests refer to them by these names.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import io
import os
import re
import select
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

Parsed = TypeVar("Parsed")

EXIT_DONE = 0
EXIT_FAILED = 1  # Python's own: an error that is none of the user's
EXIT_USER_ERROR = 2
EXIT_TOO_MANY_REJECTS = 3
EXIT_OUT_OF_MEMORY = 4  # the hint says which settings need less
EXIT_SMALLER_NEXT = 5  # out of memory; the same command resumes with smaller micro-batches
EXIT_INTERRUPTED = 75
EXIT_AT_ONCE = 130  # the shells' own: Ctrl-C where nothing is to be saved, or a second one
EXIT_OUTPUT_CLOSED = 141  # the shells' own: the program that read standard output has ended, as `| head` does

# Some of what every environment of the toolkit has, and a Python of the system has not.
_PACKAGES = ("torch", "deepspeed", "transformers", "pydantic", "psutil")

_FULL = "free space there, or write to another disk"
_REFUSED = "change its permissions, or give another path"
_IS_A_FILE = "give a path of which no folder is a file"
# What a system answers where a file cannot be written, and the remedy.
_REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), _FULL),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), _REFUSED),
    **dict.fromkeys((errno.ENOTDIR, errno.EEXIST, errno.EISDIR), _IS_A_FILE),
    errno.ENAMETOOLONG: "give a shorter name",
}


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

    kind = "error"
    exit_code = EXIT_USER_ERROR


class OutOfMemory(UserError):
    """A GPU or the machine had no memory left; the hint says which settings need less."""

    exit_code = EXIT_OUT_OF_MEMORY


class TooManyRejects(UserError):
    """More of the data was rejected than the user allowed; nothing was half-written."""

    exit_code = EXIT_TOO_MANY_REJECTS


class Interrupted(_Explained):
    """The run was requested to stop and has saved everything; the same command resumes it."""

    kind = "interrupted"
    exit_code = EXIT_INTERRUPTED


class OutputClosed(_Explained):
    """The program that read standard output has ended, as ``| head`` does when it has enough."""

    kind = "interrupted"
    exit_code = EXIT_OUTPUT_CLOSED


def explained(error: BaseException) -> UserError | Interrupted | OutputClosed | None:
    """An error as the user can correct it, also one of the system: a full disk, a refused path, a closed pipe.

    Returns:
        None for an error that says something about the toolkit and needs its traceback.
    """
    if isinstance(error, UserError | Interrupted | OutputClosed):
        return error
    if isinstance(error, BrokenPipeError) and _output_is_closed():
        return OutputClosed("standard output was closed by the program that read it")
    in_rust = re.search(r"\(os error (\d+)\)", str(error))  # safetensors and tokenizers raise errors of their own
    code = error.errno if isinstance(error, OSError) else int(in_rust[1]) if in_rust else None
    path = getattr(error, "filename", None)
    if code is None or code not in _REMEDIES or not (path or in_rust or _REMEDIES[code] == _FULL):
        return None
    return UserError(f"{path or 'writing a file'}: {os.strerror(code)}", _REMEDIES[code])


def _output_is_closed() -> bool:
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def discard_unwritten_output() -> None:
    """Write what is still buffered for standard output, or drop it: Python would fail with it again at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def require_packages() -> None:
    """End a command here that runs on a Python without the toolkit's packages, such as the system's.

    It stands before the imports that need them, and needs none itself.
    """
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if sys.version_info >= (3, 11) and not missing:
        return
    lacks = f"has no {', '.join(missing)}" if missing else "is older than Python 3.11"
    made = Path(__file__).resolve().parents[1] / ".venv" / "bin" / "activate"
    hint = f"source {made}" if made.exists() else "run `make setup`, then `source .venv/bin/activate`"
    print(f"error: {sys.executable} {lacks}\nhint: {hint}", file=sys.stderr, flush=True)
    sys.exit(EXIT_USER_ERROR)


def as_one(problems: Sequence[UserError], about: str) -> UserError:
    """One error that lists every problem, numbered when there are several, and their hints by the same numbers."""
    if len(problems) == 1:
        return problems[0]
    messages = "; ".join(f"({number}) {problem.message}" for number, problem in enumerate(problems, start=1))
    hints = "; ".join(f"({number}) {problem.hint}" for number, problem in enumerate(problems, start=1))
    return UserError(f"{len(problems)} problems in {about}: {messages}", hints)


def first_line(error: BaseException) -> str:
    """What an error of another library says first, as part of a message of ours."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].strip().rstrip(".:")


def parsed(parse: Callable[[], Parsed]) -> Parsed:
    """Parse a command line; help that cannot be printed ends as other output does: ``--help | head``.

    Args:
        parse: calls an ``argparse`` parser, which prints help itself and ignores that it could not be written.
    """
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            return parse()
    except SystemExit as end:
        sys.exit(exit_code_of(lambda: print(printed.getvalue(), end=""), debug=False) or end.code)


def exit_code_of(command: Callable[[], None], *, debug: bool) -> int:
    """Run ``command`` and turn its outcome into a documented exit code; ``cluster/failures.py`` does so on many ranks.

    ``debug`` raises the user's errors with their traceback instead of printing the message and its hint.
    """
    try:
        command()
        sys.stdout.flush()  # here a full disk or a closed pipe is still an outcome of the command
    except KeyboardInterrupt:
        if debug:
            raise
        print("interrupted: stopped by Ctrl-C", file=sys.stderr, flush=True)
        return EXIT_AT_ONCE
    except Exception as error:
        known = explained(error)
        if debug or known is None:
            raise
        discard_unwritten_output()
        print(f"{known.kind}: {known.lines}", file=sys.stderr, flush=True)
        return known.exit_code
    return EXIT_DONE
