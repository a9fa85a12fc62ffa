"""Who is missing: a rank that died, or hangs, ends the run with its name instead of making the others wait.

A collective that waits for a dead rank says at best that a connection closed, and DeepSpeed's all-reduce over shared
memory waits for ever. So every rank shows a sign of life once a second, and how far it has come, in the store over
which the process group met. A rank whose step takes far longer than steps do looks there for whom it is waiting.

A rank whose batches are late is not lost. It says that it waits for them, the others wait for it, and it gives up by
itself when that takes too long.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from statistics import median
from typing import Any, Literal

from torch import distributed as dist

from toolkit.cluster import failures
from toolkit.cluster.ranks import Ranks

EXIT_RANK_LOST = 1
HINT = "the last checkpoint is intact, the same command goes on from it"
REMEMBERED_STEPS = 50
Phase = Literal["step", "data", "aside"]

log = logging.getLogger("toolkit")


@dataclass(frozen=True)
class Limits:
    """When waiting becomes too long, in seconds.

    Attributes:
        shortest: no step is too long before this, and no wait for data worth a word.
        median_steps: nor before so many median steps.
        data: a rank that waits for a batch so long gives up.
        silence: without a sign of life for so long a rank counts as dead.
        poll: between two signs of life.
    """

    shortest: float = 60.0
    median_steps: float = 10.0
    data: float = 900.0
    silence: float = 10.0
    poll: float = 1.0


@dataclass(frozen=True)
class Sign:
    """A rank's sign of life."""

    count: int
    step: int
    phase: Phase
    host: str
    pid: int


class RankWatch:
    """Watches the ranks from a thread of its own; all ranks of the default process group have one.

    It only watches during steps, from the second on: the first may compile, and saving and evaluating take as long as
    they take. Waits for data have a limit of their own, from the first on.

    Args:
        ranks: which rank this is.
        on_loss: called with the reason on one surviving rank, before that process ends.
        limits: how long to wait.
    """

    def __init__(self, ranks: Ranks, on_loss: Callable[[str], None], limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self._ranks = ranks
        self._on_loss = on_loss
        self._store = _own_connection(timedelta(seconds=self.limits.silence))
        self._durations: deque[float] = deque(maxlen=REMEMBERED_STEPS)
        self._step = 0
        self._phase: Phase = "step"
        self._since: float | None = None  # when the step that goes on began
        self._data_since: float | None = None  # when the wait for data that goes on began
        self._has_told_of_data = False
        self._count = 0
        self._hosts: dict[int, str] = {}
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="rank watch")

    def start(self) -> None:
        """Begin to show signs of life and to look for the others'."""
        if self._store is not None and self._ranks.world_size > 1:
            self._thread.start()

    def begin(self, step: int) -> None:
        """This rank is about to meet the others in step ``step``."""
        self._step, self._since = step, time.monotonic()

    def end(self) -> None:
        """The step is done."""
        if self._since is not None:
            self._durations.append(time.monotonic() - self._since)
            self._since = None

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Within it this rank waits for its batches, and the others wait for it."""
        self._phase, self._data_since = "data", time.monotonic()
        try:
            yield
        finally:
            self._phase, self._data_since = "step", None

    @contextlib.contextmanager
    def lifted(self) -> Iterator[None]:
        """Within it this rank saves or evaluates, and nobody holds against it how long that takes."""
        self._phase = "aside"
        try:
            yield
        finally:
            self._phase = "step"

    def close(self) -> None:
        """Stop watching; safe to call twice."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join(timeout=self.limits.silence)

    def limit(self) -> float | None:
        """Seconds after which the present step has taken too long; None while that cannot be known."""
        if not self._durations:
            return None
        return max(self.limits.shortest, self.limits.median_steps * median(self._durations))

    def _run(self) -> None:
        while not self._closed.wait(self.limits.poll):
            since, limit = self._since, self.limit()
            lost: dict[int, str] | None
            try:
                self._show()
                self._mind_the_data()
                if since is None or limit is None or time.monotonic() - since < limit:
                    continue
                lost = self._look()
            except (RuntimeError, queue.Empty):  # the store is kept by rank 0, and does not answer
                lost = {0: "rank 0 gives no sign of life"}
            late = limit is not None and since is not None and self._since == since
            if lost is not None and late and not self._closed.is_set():
                self._leave(lost)

    def _mind_the_data(self) -> None:
        """Say once that this rank waits for its data; give up when nothing has come for too long."""
        since = self._data_since
        if since is None or time.monotonic() - since < self.limits.shortest:
            return
        seconds = time.monotonic() - since
        who = f"rank {self._ranks.rank} ({socket.gethostname()}, process {os.getpid()})"
        if seconds > self.limits.data and self._data_since == since and not self._closed.is_set():
            self._give_up(f"{who} has waited for its data for {seconds:.0f} s, the limit of training.data_timeout")
        if not self._has_told_of_data:
            self._has_told_of_data = True
            told = f"{who} waits for its data for {seconds:.0f} s: is the disk of the corpus slow, or its server away?"
            log.warning(told)
            print(f"note: {told}", file=sys.stderr, flush=True)

    def _give_up(self, reason: str) -> None:
        """End this process, and so the run, for a reason of its own."""
        self._tell(self._ranks.rank, reason)
        try:
            self._on_loss(reason)
        finally:
            self._say_why(reason)
            os._exit(EXIT_RANK_LOST)

    def _show(self) -> None:
        self._count += 1
        sign = Sign(self._count, self._step, self._phase, socket.gethostname(), os.getpid())
        self._store.set(f"sign of rank {self._ranks.rank}", json.dumps(asdict(sign)))

    def _look(self) -> dict[int, str] | None:
        """Whom this step waits for: rank -> in words; empty where nobody is missing, None to go on waiting."""
        before = self._signs()
        end = time.monotonic() + self.limits.silence
        while time.monotonic() < end and not self._closed.wait(self.limits.poll):
            self._show()
        after = self._signs()
        lost = {}
        for rank, sign in after.items():
            who = f"rank {rank} ({sign.host}, process {sign.pid})"
            if rank != self._ranks.rank and sign.count == before[rank].count:
                lost[rank] = f"{who} gives no sign of life"
            elif sign.phase == "step" and sign.step < self._step:
                lost[rank] = f"{who} lives, and has not come to step {self._step}"
        busy = any(
            sign.phase == "aside" or (sign.phase == "data" and sign.step < self._step) for sign in after.values()
        )
        return lost if lost or not busy else None

    def _signs(self) -> dict[int, Sign]:
        keys = [f"sign of rank {rank}" for rank in range(self._ranks.world_size)]
        answer: queue.SimpleQueue[list[bytes]] = queue.SimpleQueue()

        def ask() -> None:
            with contextlib.suppress(RuntimeError):
                answer.put(self._store.multi_get(keys))

        # The store has a timeout of its own and does not keep it when its process is stopped (torch 2.13).
        threading.Thread(target=ask, daemon=True).start()
        values = answer.get(timeout=self.limits.silence)
        signs = {rank: Sign(**json.loads(value)) for rank, value in enumerate(values)}
        self._hosts = {rank: sign.host for rank, sign in signs.items()}
        return signs

    def _leave(self, lost: dict[int, str]) -> None:
        """End this process. The first living rank tells the run, the first of each node the terminal."""
        told = "; ".join(lost[rank] for rank in sorted(lost)) or "every rank is there: the step itself hangs"
        reason = f"step {self._step} has waited for {time.monotonic() - (self._since or 0):.0f} s: {told}"
        alive = [rank for rank in range(self._ranks.world_size) if rank not in lost]
        first_here = self._ranks.rank - self._ranks.local_rank
        here = range(first_here, first_here + self._ranks.local_world_size)
        self._tell(min(lost, default=self._ranks.rank), reason)
        try:
            if alive and self._ranks.rank == alive[0]:
                self._on_loss(reason)
        finally:
            if self._ranks.rank == next((rank for rank in alive if rank in here), None):
                self._say_why(reason)
            os._exit(EXIT_RANK_LOST)

    def _tell(self, rank: int, reason: str) -> None:
        """End this process where the ranks tell each other of failures; else it has to see to that itself."""
        failures.exit_for_lost_rank(
            rank, self._hosts.get(rank, socket.gethostname()), reason, f"error: {reason}; {HINT}"
        )

    @staticmethod
    def _say_why(reason: str) -> None:
        print(f"error: {reason}; {HINT}", file=sys.stderr, flush=True)


def _own_connection(timeout: timedelta) -> Any:
    """A connection of our own to the group's store, so that a collective that sets itself up cannot hold it."""
    store: Any = dist.distributed_c10d._get_default_store()
    try:
        own = store.clone()
    except RuntimeError:  # a store that is a file, as in tests, has no connections
        return None
    own.set_timeout(timeout)
    return own
