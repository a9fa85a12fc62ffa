"""Find the rank that died or hangs, and end the run with its name instead of a wait without end.

A collective that waits for a dead rank reports at best a closed connection, and DeepSpeed's all-reduce over shared
memory waits without end. So every rank writes a heartbeat and its step to the store of the process group once a
second. A rank whose step takes far longer than steps do reads there which rank it waits for.

A rank whose batches are late is not lost: it reports that it waits for data, the others wait for it, and it ends the
run itself when that takes too long.
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
from typing import Any, Literal, NoReturn

from torch import distributed as dist

from toolkit.cluster import failures
from toolkit.cluster.ranks import Ranks

EXIT_RANK_LOST = 1
HINT = "the last checkpoint is intact; the same command resumes from it"
REMEMBERED_STEPS = 50
Phase = Literal["step", "data", "paused"]

log = logging.getLogger("toolkit")


@dataclass(frozen=True)
class Limits:
    """When waiting becomes too long, in seconds."""

    shortest: float = 60.0  # no step is too long before this, and no wait for data is reported
    median_steps: float = 10.0  # nor is a step too long before so many median steps
    data: float = 900.0  # a rank that waits longer for a batch ends the run
    silence: float = 10.0  # a rank without a heartbeat for so long counts as dead
    poll: float = 1.0  # between two heartbeats


@dataclass(frozen=True)
class Heartbeat:
    """What a rank writes to the store."""

    count: int
    step: int
    phase: Phase
    host: str
    pid: int


class RankWatch:
    """Watches the ranks in its own thread; all ranks of the default process group have one.

    It judges steps, from the second on, that compile no layer; saves and evaluations have no limit. Waits for data have
    a limit of their own, from the first on.

    ``on_loss`` is called with the reason on one surviving rank, before that process ends.
    """

    def __init__(self, ranks: Ranks, on_loss: Callable[[str], None], limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self._ranks = ranks
        self._on_loss = on_loss
        self._store = _own_connection(timedelta(seconds=self.limits.silence))
        self._durations: deque[float] = deque(maxlen=REMEMBERED_STEPS)
        self._step = 0
        self._phase: Phase = "step"
        self._since: float | None = None  # when the current step began
        self._data_since: float | None = None  # when the current wait for data began
        self._has_reported_wait = False
        self._count = 0
        self._hosts: dict[int, str] = {}
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="rank watch")

    def start(self) -> None:
        """Begin to write heartbeats and to read the others'."""
        if self._store is not None and self._ranks.world_size > 1:
            self._thread.start()

    def begin(self, step: int) -> None:
        """This rank enters the collectives of step ``step``."""
        self._step, self._since = step, time.monotonic()

    def exempt(self) -> None:
        """The current step has no limit: this rank compiles a layer in it, and the others wait for it."""
        self._phase = "paused"

    def end(self) -> None:
        """The step is done."""
        self._phase = "step"
        if self._since is not None:
            self._durations.append(time.monotonic() - self._since)
            self._since = None

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Within it this rank waits for its batches; the others wait for it."""
        self._phase, self._data_since = "data", time.monotonic()
        try:
            yield
        finally:
            self._phase, self._data_since = "step", None

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Within it this rank saves or evaluates, for which there is no limit."""
        self._phase = "paused"
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
        """Seconds after which the current step has taken too long; None before the first step has ended."""
        if not self._durations:
            return None
        return max(self.limits.shortest, self.limits.median_steps * median(self._durations))

    def _run(self) -> None:
        while not self._closed.wait(self.limits.poll):
            since, limit = self._since, self.limit()
            lost: dict[int, str] | None
            try:
                self._write_heartbeat()
                self._check_data()
                if since is None or limit is None or time.monotonic() - since < limit:
                    continue
                lost = self._find_lost()
            except (RuntimeError, queue.Empty):  # rank 0 holds the store, which does not answer
                lost = {0: "rank 0 has no heartbeat"}
            late = limit is not None and since is not None and self._since == since
            if lost is not None and late and not self._closed.is_set():
                self._end_step(lost)

    def _check_data(self) -> None:
        """Report once that this rank waits for its data; end the run when the wait takes too long."""
        since = self._data_since
        if since is None or time.monotonic() - since < self.limits.shortest:
            return
        seconds = time.monotonic() - since
        rank = self._ranks.rank
        who = f"rank {rank} ({socket.gethostname()}, process {os.getpid()})"
        if seconds > self.limits.data and self._data_since == since and not self._closed.is_set():
            self._end(rank, f"{who} has waited for its data for {seconds:.0f} s, the limit of training.data_timeout")
        if not self._has_reported_wait:
            self._has_reported_wait = True
            note = f"{who} has waited for its data for {seconds:.0f} s: check the disk or file server of the corpus"
            log.warning(note)
            print(f"note: {note}", file=sys.stderr, flush=True)

    def _write_heartbeat(self) -> None:
        self._count += 1
        heartbeat = Heartbeat(self._count, self._step, self._phase, socket.gethostname(), os.getpid())
        self._store.set(f"heartbeat of rank {self._ranks.rank}", json.dumps(asdict(heartbeat)))

    def _find_lost(self) -> dict[int, str] | None:
        """The ranks that this step waits for, each described; empty where all are there, None to wait longer."""
        before = self._heartbeats()
        end = time.monotonic() + self.limits.silence
        while time.monotonic() < end and not self._closed.wait(self.limits.poll):
            self._write_heartbeat()
        after = self._heartbeats()
        lost = {}
        for rank, seen in after.items():
            who = f"rank {rank} ({seen.host}, process {seen.pid})"
            if rank != self._ranks.rank and seen.count == before[rank].count:
                lost[rank] = f"{who} has no heartbeat"
            elif seen.phase == "step" and seen.step < self._step:
                lost[rank] = f"{who} is alive and has not reached step {self._step}"
        busy = any(
            seen.phase == "paused" or (seen.phase == "data" and seen.step < self._step) for seen in after.values()
        )
        return lost if lost or not busy else None

    def _heartbeats(self) -> dict[int, Heartbeat]:
        keys = [f"heartbeat of rank {rank}" for rank in range(self._ranks.world_size)]
        answer: queue.SimpleQueue[list[bytes]] = queue.SimpleQueue()

        def ask() -> None:
            with contextlib.suppress(RuntimeError):
                answer.put(self._store.multi_get(keys))

        # The store does not keep its own timeout when its process is stopped (torch 2.13).
        threading.Thread(target=ask, daemon=True).start()
        values = answer.get(timeout=self.limits.silence)
        heartbeats = {rank: Heartbeat(**json.loads(value)) for rank, value in enumerate(values)}
        self._hosts = {rank: heartbeat.host for rank, heartbeat in heartbeats.items()}
        return heartbeats

    def _end_step(self, lost: dict[int, str]) -> None:
        """End this process. The first living rank records the reason; the first of each node prints it."""
        found = "; ".join(lost[rank] for rank in sorted(lost)) or "every rank is there: the step itself hangs"
        reason = f"step {self._step} has waited for {time.monotonic() - (self._since or 0):.0f} s: {found}"
        alive = [rank for rank in range(self._ranks.world_size) if rank not in lost]
        first_here = self._ranks.rank - self._ranks.local_rank
        here = range(first_here, first_here + self._ranks.local_world_size)
        records, prints = alive[:1], [rank for rank in alive if rank in here][:1]
        rank = self._ranks.rank
        self._end(min(lost, default=rank), reason, records=rank in records, prints=rank in prints)

    def _end(self, failed: int, reason: str, *, records: bool = True, prints: bool = True) -> NoReturn:
        """End this process, and so the run: through ``failures`` in a command, else here."""
        lines = f"error: {reason}\nhint: {HINT}"
        failures.exit_for_lost_rank(failed, self._hosts.get(failed, socket.gethostname()), reason, lines)
        try:
            if records:
                self._on_loss(reason)
        finally:
            if prints:
                print(lines, file=sys.stderr, flush=True)
            os._exit(EXIT_RANK_LOST)


def _own_connection(timeout: timedelta) -> Any:
    """A separate connection to the group's store, which no collective can block."""
    store: Any = dist.distributed_c10d._get_default_store()
    try:
        own = store.clone()
    except RuntimeError:  # a file store, as in tests, has no connections
        return None
    own.set_timeout(timeout)
    return own
