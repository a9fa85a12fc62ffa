"""``make test``: the tests that may run beside each other, then those that start ranks; one closing line for both.

    python tests/two_parts.py -n 2 --dist loadfile

Arguments are pytest's, for the first part. Ranks need the machine for themselves, so the second part runs one test at a
time. Both parts run whatever the first one finds; the exit code is that of the first part that failed.
"""

from __future__ import annotations

import os
import re
import select
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence

FOLDERS_OF_RANKS = ("tests/gpu", "tests/as_users_do", "tests/end_to_end")
# In the order of pytest's closing line.
OUTCOMES = ("failed", "passed", "skipped", "deselected", "xfailed", "xpassed", "warnings", "errors")
LENGTH_OF_A_CLOSING_LINE = 4096  # bytes, at most
COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def main() -> int:
    colour = ["--color=yes"] if sys.stdout.isatty() else []
    pytest = [sys.executable, "-m", "pytest", *colour]
    beside = [*sys.argv[1:], *(f"--ignore={folder}" for folder in FOLDERS_OF_RANKS)]
    try:
        code, closing_line = run_both([[*pytest, *beside], [*pytest, *FOLDERS_OF_RANKS]])
    except KeyboardInterrupt:  # pytest, which got it too, has reported it
        return 130
    print(closing_line)
    return code


def run_both(commands: Sequence[Sequence[str]]) -> tuple[int, str]:
    """Run commands of pytest one after the other; the first exit code that is not 0, and one closing line for all."""
    codes, lines = zip(*map(run, commands), strict=True)
    return next(filter(None, codes), 0), add_up(lines)


def run(command: Sequence[str]) -> tuple[int, str]:
    """Run a command and show what it prints; its exit code and the last line of its output."""
    end = b""
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        for printed in outputs(process, process.stdout.fileno()):
            sys.stdout.buffer.write(printed)
            sys.stdout.buffer.flush()
            end = (end + printed)[-LENGTH_OF_A_CLOSING_LINE:]
    lines = COLOURS.sub("", end.decode(errors="replace")).strip().splitlines()
    return process.returncode, lines[-1] if lines else ""


def outputs(process: subprocess.Popen[bytes], descriptor: int) -> Iterator[bytes]:
    """What it prints, until it has ended; a process that it left behind may still have its output open."""
    while True:
        if select.select([descriptor], [], [], 0.5)[0]:
            if not (printed := os.read(descriptor, 65536)):
                return
            yield printed
        elif process.poll() is not None:
            return


def add_up(closing_lines: Sequence[str]) -> str:
    """One closing line for all; a part that has none, because pytest itself failed, counts as an error."""
    counts: Counter[str] = Counter()
    seconds = 0.0
    for line in closing_lines:
        found = re.search(r"(\d.*) in ([0-9.]+)s", line)
        if found is None:
            counts["errors"] += 1
            continue
        for number, outcome in re.findall(r"(\d+) ([a-z]+)", found[1]):
            counts[f"{outcome}s" if outcome in ("warning", "error") else outcome] += int(number)
        seconds += float(found[2])
    said = ", ".join(f"{counts[outcome]} {outcome}" for outcome in OUTCOMES if counts[outcome])
    minutes, hours = int(seconds) // 60 % 60, int(seconds) // 3600
    return f" {said} in {seconds:.2f}s ({hours}:{minutes:02d}:{int(seconds) % 60:02d}) ".center(80, "=")


if __name__ == "__main__":
    sys.exit(main())
