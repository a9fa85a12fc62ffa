"""Requests to stop: signals, a dead launcher and a time limit set one flag, which the loop reads between steps.

A signal handler only sets the flag. Ranks agree on it by the all-reduce of their step, so that all save the same step.
Each rank watches the launcher, which may die without a signal to its ranks.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType

from toolkit.cluster.launchers import has_died, launcher_processes
from toolkit.errors import EXIT_AT_ONCE, Interrupted

# Ctrl-C, a scheduler's end, SLURM's warning, and a terminal that went away.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
LAUNCHER_POLL_SECONDS = 1.0
# One Ctrl-C can arrive twice, from the terminal and from a launcher; a second one comes later than that.
SECOND_CTRL_C_SECONDS = 1.0
NO_SIGNAL = 0  # the byte that ends the thread


class Interruptions:
    """Collects reasons to stop, from now until :meth:`close`.

    A Ctrl-C after another request ends the process at once, without saving, even while it waits in a collective for
    another rank, where no Python handler runs.

    ``time_limit`` is in minutes; ``at_once`` is called, from another thread, before the process is ended at once.
    """

    def __init__(self, time_limit: float | None = None, at_once: Callable[[], None] = lambda: None) -> None:
        self.reason: str | None = None
        self._asked_at: float | None = None
        self._at_once = at_once
        self._deadline = time.monotonic() + 60 * time_limit if time_limit else None
        self._launcher = launcher_processes()
        # Signals that were ignored (nohup ignores SIGHUP) stay ignored. SIGINT does not: a shell ignores it for what
        # it starts in the background, but DeepSpeed's launcher handles it.
        handled = [n for n in SIGNALS if n == signal.SIGINT or signal.getsignal(n) is not signal.SIG_IGN]
        self._reader, self._writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._previous_writer = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._previous = {number: signal.signal(number, self._on_signal) for number in handled}
        self._thread = threading.Thread(target=self._watch, daemon=True, name="interruptions")
        self._thread.start()

    def wanted(self) -> bool:
        """Whether this rank has a reason to stop."""
        if self._deadline is not None and time.monotonic() >= self._deadline:
            self._ask("the time limit")
        return self.reason is not None

    def close(self) -> None:
        """Restore the signal handlers that were there before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_writer)
        # Closing the pipe would not end the thread: loader processes, which are forked, hold its other end, too.
        os.write(self._writer, bytes([NO_SIGNAL]))
        self._thread.join()
        os.close(self._writer)
        os.close(self._reader)

    def _ask(self, reason: str) -> None:
        if self.reason is None:
            self.reason = reason
            self._asked_at = time.monotonic()

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        self._ask(signal.Signals(number).name)

    def _watch(self) -> None:
        """Receive every signal at once, whatever call the main thread is in, and watch the launcher."""
        while True:
            ready, _, _ = select.select([self._reader], [], [], LAUNCHER_POLL_SECONDS)
            if ready:
                numbers = os.read(self._reader, 64)
                if NO_SIGNAL in numbers:
                    return
                # Every signal with a handler in Python is written to the pipe: a loader's SIGCHLD at the end of each
                # epoch, a progress bar's SIGWINCH. Only these are requests to stop.
                numbers = bytes(number for number in numbers if number in self._previous)
                asked_before = self._asked_at is not None and time.monotonic() - self._asked_at > SECOND_CTRL_C_SECONDS
                if asked_before and signal.SIGINT in numbers:
                    self._at_once()
                    os._exit(EXIT_AT_ONCE)
                if numbers:
                    # The main thread's handler does the same as soon as that thread is back in Python.
                    self._ask(signal.Signals(numbers[0]).name)
            if self._launcher and has_died(self._launcher):
                self._ask("the launcher's death")
                self._launcher = []


def interrupted_by(reason: str | None, step: int, steps: int) -> Interrupted:
    """What ends a run that was requested to stop after a step, of so many, and has saved; None = by another rank."""
    return Interrupted(
        f"stopped by {reason or 'a signal to another rank'} after step {step} of {steps}",
        "everything is saved; the same command resumes the run",
    )
