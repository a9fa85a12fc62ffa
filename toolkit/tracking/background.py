"""A tracker on a thread of its own: when it fails or hangs, the run prints one line and continues without it."""

from __future__ import annotations

import contextlib
import logging
import queue
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any, Protocol

log = logging.getLogger("toolkit")

# Calls that wait for the thread. A tracker that leaves so many undone hangs.
MOST_WAITING = 10_000


class Sink(Protocol):
    """A place that figures go to."""

    def log(self, step: int, values: Mapping[str, float | str], kind: str) -> None: ...

    def table(self, step: int, name: str, rows: list[dict[str, Any]]) -> None: ...

    def close(self) -> None: ...


class BackgroundSink:
    """Passes every call to a sink that lives on a thread; the first call that fails or hangs is the last one.

    The error's text is not shown, because it may quote a key or an address that holds one.
    """

    def __init__(self, name: str, open_sink: Callable[[], Sink], timeout: float) -> None:
        """Open the sink on the thread; opening and closing may take ``timeout`` seconds each."""
        self._name, self._open_sink, self._timeout = name, open_sink, timeout
        self._calls: queue.Queue[Callable[[Sink], None] | None] = queue.Queue(MOST_WAITING)
        self._opened = threading.Event()
        self._failed = False
        self._thread = threading.Thread(target=self._work, daemon=True, name=f"tracker-{name}")
        self._thread.start()
        # Loader workers are forked later: they must not inherit the locks of an import that this thread is in.
        if not self._opened.wait(timeout):
            self._give_up(f"did not start within {timeout:g} s")

    def log(self, step: int, values: Mapping[str, float | str], kind: str) -> None:
        """Pass on named figures of one step."""
        values = dict(values)
        self._put(lambda sink: sink.log(step, values, kind))

    def table(self, step: int, name: str, rows: list[dict[str, Any]]) -> None:
        """Pass on a table."""
        self._put(lambda sink: sink.table(step, name, rows))

    def close(self, timeout: float | None = None) -> None:
        """Let the thread finish what it has, within ``timeout`` seconds where that is less; later calls do nothing."""
        timeout = self._timeout if timeout is None else min(timeout, self._timeout)
        self._put(None)
        if not self._failed:
            self._thread.join(timeout)
            if self._thread.is_alive():
                self._give_up(f"did not finish within {timeout:g} s")

    def _put(self, call: Callable[[Sink], None] | None) -> None:
        if self._failed:
            return
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            self._give_up(f"is {MOST_WAITING:,} calls behind")

    def _work(self) -> None:
        try:
            sink = self._open_sink()
            self._opened.set()
            while not self._failed and (call := self._calls.get()):
                call(sink)
            sink.close()
        except Exception as error:  # whatever it is, it is the tracker's
            self._give_up(f"failed ({error.strerror if isinstance(error, OSError) else type(error).__name__})")
        self._opened.set()

    def _give_up(self, why: str) -> None:
        if not self._failed:
            self._failed = True
            warn(f"{self._name} {why}: the run continues without it, its figures are in metrics.jsonl")


def warn(line: str) -> None:
    """Print a line on the terminal and log it, so that the report shows it, too."""
    with contextlib.suppress(OSError):  # what the terminal shows may go to a full disk, too
        print(line, file=sys.stderr, flush=True)
    log.warning(line)
