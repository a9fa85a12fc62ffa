"""``python -m tests.pretended_cuda COMMAND...``: run a command that finds the pretended runtime."""

from __future__ import annotations

import os
import sys

from tests.pretended_cuda.environment import find_environment
from tests.pretended_cuda.libraries import built_libraries, variables
from toolkit.errors import UserError


def main(command: list[str]) -> None:
    """Become the command; it does not return."""
    if not command:
        raise UserError("no command is given", "python -m tests.pretended_cuda COMMAND...")
    changed = variables(built_libraries(find_environment()))
    # The command's Python is this one, however its environment was activated.
    path = os.pathsep.join((os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)))
    try:
        os.execvpe(command[0], command, os.environ | changed | {"PATH": path})
    except OSError as error:
        raise UserError(f"{command[0]} cannot be started: {error.strerror}", "give a command on PATH") from None


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error.lines}", file=sys.stderr)
        sys.exit(error.exit_code)
