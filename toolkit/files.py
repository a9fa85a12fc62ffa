"""Text files that are either whole or not there."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from toolkit.errors import UserError


def write_text_atomically(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` by way of a temporary name beside it, so that no reader ever sees half a file.

    Raises:
        UserError: the folder cannot be written.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(aside, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error
    finally:
        with contextlib.suppress(OSError):  # it is gone when all went well, and was never there when the folder was not
            aside.unlink()


def read_text(path: Path, what: str) -> str:
    """The text of ``path``, without the byte order mark that some editors put before it.

    Raises:
        UserError: it is missing, a folder, unreadable or not UTF-8; ``what`` says in the message what it should be.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: {what} must be UTF-8 text: {error.reason} at byte {error.start}") from error
    except OSError as error:
        raise UserError(f"{path}: {what} cannot be read: {error.strerror}") from error
