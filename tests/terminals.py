"""What a command may show on a terminal: its own lines, and of libraries only errors."""

from __future__ import annotations

import re
import subprocess

_OF_LIBRARIES = re.compile(
    r"\[(DEBUG|INFO|WARNING)\]|^(DEBUG|INFO|WARNING):|\w+Warning: |\bMA \d|deepspeed\.|bitsandbytes|gemm_4bit|torch\."
)


def lines_of_libraries(text: str) -> list[str]:
    """The lines that DeepSpeed, bitsandbytes, transformers or torch wrote."""
    return [line for line in text.splitlines() if _OF_LIBRARIES.search(line)]


def assert_quiet(done: subprocess.CompletedProcess[str]) -> None:
    """A command that has succeeded wrote nothing to standard error, and only its own lines to standard output."""
    assert (done.returncode, done.stderr, lines_of_libraries(done.stdout)) == (0, "", [])
