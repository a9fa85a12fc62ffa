"""Being asked to stop: signals, a dead parent and a time limit become one flag that the loop looks at between steps.

Nothing is done inside a signal handler but raising the flag. Ranks agree on it by their step's all-reduce, so that all
of them save the same step. The ``deepspeed`` launcher may die without a word to its ranks, so each watches its parent.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType

# Ctrl-C, a scheduler's end, SLURM's warning, and a terminal that went away.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
PARENT_POLL_SECONDS = 1.0


class Interruptions:
    """Collects reasons to stop, from now until :meth:`close`.

    A second Ctrl-C stops at once, without saving.

    Args:
        time_limit: minutes after which to stop; None for no limit.
    """

    def __init__(self, time_limit: float | None = None) -> None:
        self.reason: str | None = None
        self._deadline = time.monotonic() + 60 * time_limit if time_limit else None
        self._parent = os.getppid()
        self._closed = threading.Event()
        # What the user had ignored (nohup ignores SIGHUP) stays ignored.
        heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        self._previous = {number: signal.signal(number, self._on_signal) for number in heard}
        threading.Thread(target=self._watch_parent, daemon=True, name="parent watch").start()

    def wanted(self) -> bool:
        """Whether this rank has a reason to stop."""
        if self.reason is None and self._deadline is not None and time.monotonic() >= self._deadline:
            self.reason = "the time limit"
        return self.reason is not None

    def close(self) -> None:
        """Give the signals back to whoever had them."""
        self._closed.set()
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if self.reason is not None and number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            raise KeyboardInterrupt
        self.reason = self.reason or signal.Signals(number).name

    def _watch_parent(self) -> None:
        while not self._closed.wait(PARENT_POLL_SECONDS):
            if os.getppid() != self._parent:
                self.reason = self.reason or "the launcher's death"
                return
