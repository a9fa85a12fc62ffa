"""Reading and writing text files: a file is written whole or not at all."""

from __future__ import annotations

import contextlib
import itertools
import os
from pathlib import Path

from toolkit.errors import UserError


def check_place(folder: Path, given: str, hint: str) -> None:
    """See whether a folder can be created and written, before long work whose result belongs there.

    Args:
        folder: need not be there.
        given: what the command line says, ``run.dir=FOLDER``.
        hint: the remedy.

    Raises:
        UserError: it cannot.
    """
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not (place.is_dir() and os.access(place, os.W_OK | os.X_OK)):
        reason = "cannot be written" if place.is_dir() else "is no folder"
        raise UserError(f"{given}: {place} {reason}", hint)


def write_text_atomically(path: Path, text: str) -> None:
    """Write ``text`` to a temporary file beside ``path`` and rename it, so that no reader sees half a file.

    Raises:
        UserError: the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written: {error.strerror}",
            "check its folder's permissions and the space on the disk",
        ) from error
    finally:
        with contextlib.suppress(OSError):  # it is renamed by now, or was never made
            temporary.unlink()


def give_usual_modes(folder: Path) -> None:
    """Make the files in a folder that was just made as readable as it is: safetensors writes for the owner alone."""
    mode = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file() and path.stat().st_mode & 0o777 != mode:
            with contextlib.suppress(PermissionError):  # a link to a file of another user, who chose its mode
                path.chmod(mode)


def next_free(path: Path, ending: str) -> Path:
    """``path`` with an ending and the first number from 1 by which there is nothing yet: ``NAME.1``, ``NAME.2``, ..."""
    numbered = (path.with_name(f"{path.name}{ending}{number}") for number in itertools.count(1))
    return next(name for name in numbered if not name.exists())


def read_text(path: Path, what: str) -> str:
    """The text of ``path``, without the byte order mark that some editors put before it.

    Raises:
        UserError: it is missing, a folder, unreadable or not UTF-8; ``what`` says in the message what it should be.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: {what} must be UTF-8 text: {error.reason} at byte {error.start}", "save the file as UTF-8"
        ) from error
    except OSError as error:
        raise UserError(
            f"{path}: {what} cannot be read: {error.strerror}", "check the path and the permissions of the file"
        ) from error
