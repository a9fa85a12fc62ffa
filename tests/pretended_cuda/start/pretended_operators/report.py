"""What a process has asked of the runtime: counts of calls, and the lines of Python that waited."""

from __future__ import annotations

import atexit
import os
import sys
import traceback
from collections import Counter

from pretended_operators import runtime

KINDS = ("device", "stream", "event", "copy")  # `Wait` in runtime/shared.h
CALLERS = 3
OWN = os.path.dirname(os.path.abspath(__file__))

_waits: Counter[str] = Counter()


def begin() -> None:
    """Listen to waits from here on, and print all at the end of the process."""
    runtime.RUNTIME.pretended_listen_to_waits(_note)
    atexit.register(_print)


@runtime.Listener
def _note(kind: int) -> None:
    stack = [
        frame
        for frame in reversed(traceback.extract_stack())
        if not frame.filename.startswith(OWN) and f"{os.sep}torch{os.sep}" not in frame.filename
    ]
    places = " < ".join(f"{frame.filename}:{frame.lineno} {frame.name}" for frame in stack[:CALLERS])
    _waits[f"{KINDS[kind]}: {places or 'a thread without Python'}"] += 1


def _print() -> None:
    runtime.RUNTIME.pretended_listen_to_waits(runtime.Listener())
    lines = [f"{name} {number}" for name, number in runtime.counts().items()]
    print(f"pretended CUDA: process {os.getpid()}: {', '.join(lines)}", file=sys.stderr)
    for place, number in _waits.most_common():
        print(f"pretended CUDA: {number} waits for a {place}", file=sys.stderr)
