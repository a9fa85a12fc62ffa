"""The rendezvous of a run's ranks: the store that rank 0 keeps, who the ranks are, and work that one rank does for all.

A collective waits up to half an hour for a dead rank. So what one rank does for all (read the run directory, download a
model) is reported in the store, as a value or as the error that stopped it, and the other ranks poll for it. The
process group that follows uses the same store, at MASTER_ADDR and MASTER_PORT.
"""

from __future__ import annotations

import json
import os
import pickle
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import psutil

from toolkit.cluster.ranks import Ranks
from toolkit.errors import Interrupted, UserError, first_line

Value = TypeVar("Value")

# Nodes of a job may start many minutes after each other; torch's process group waits as long.
RENDEZVOUS_TIMEOUT = timedelta(minutes=30)
# An answer of the store takes milliseconds where rank 0 lives.
ANSWER_TIMEOUT = timedelta(seconds=30)
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.002, 0.5
LONGER = 1.25  # each pause than the one before: a rank learns of a value after at most so much of the time it took
# The store takes 8 MiB at once.
PART_BYTES = 4 * 2**20


class OtherRankFailed(Exception):
    """Another rank met an error that the user cannot correct; that rank reports it."""


@dataclass(frozen=True)
class Member:
    """One process of the run."""

    rank: int  # its number
    host: str  # name of its machine
    node: str  # name of the machine and its process-id namespace; processes of one node see each other's ids
    pid: int  # its process id on that node
    started: float  # when it began, in seconds since the epoch; process ids are reused

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.host}, process {self.pid})"


class Rendezvous:
    """All ranks of a run, and their store: torch's, None for a single process. ``members`` are by rank."""

    def __init__(self, ranks: Ranks, store: Any, members: list[Member]) -> None:
        self.ranks = ranks
        self.store = store
        self.members = members
        self.outcomes = 0  # how many outcomes the ranks have waited for
        self.is_working = False  # this rank does work for others at this moment

    @property
    def me(self) -> Member:
        return self.members[self.ranks.rank]

    @property
    def first_ranks(self) -> list[int]:
        """The lowest rank of each node."""
        return list({member.node: member.rank for member in reversed(self.members)}.values())

    @property
    def first_on_node(self) -> int:
        """The lowest rank of this node."""
        return next(member.rank for member in self.members if member.node == self.me.node)


_rendezvous: Rendezvous | None = None


def join_rendezvous(ranks: Ranks) -> Rendezvous:
    """Wait until all ranks are here; a second call returns at once.

    Raises:
        UserError: rank 0 cannot keep a store at MASTER_PORT, cannot be reached there, or another run uses the port.
    """
    global _rendezvous
    if _rendezvous is None:
        store = _open_store(ranks) if ranks.world_size > 1 else None
        _rendezvous = Rendezvous(ranks, store, _exchange_members(ranks, store))
    return _rendezvous


def leave_rendezvous() -> None:
    """Forget the rendezvous, so that this process can join another one."""
    global _rendezvous
    _rendezvous = None


def on_rank_0(work: Callable[[], Value]) -> Value:
    """Run ``work`` on rank 0 and return its value on every rank; all ranks call this, and it may take hours.

    Only rank 0 calls ``work``, whose value can be pickled.

    Raises:
        UserError, Interrupted: rank 0 met it, and so does every rank.
        OtherRankFailed: rank 0 met another error.
    """
    return _outcome_of([0], work)


def on_each_node(work: Callable[[], Value]) -> Value:
    """Run ``work`` on the first rank of each node; all ranks of the node return its value, when all nodes are done.

    Args, Raises: as for :func:`on_rank_0`; all ranks meet the error of any node.
    """
    return _outcome_of(_rendezvous.first_ranks if _rendezvous else [0], work)


def exchange(value: Value) -> list[Value]:
    """The values of all ranks, by rank; all ranks call this, each with its own, which can be pickled."""
    rendezvous = _rendezvous
    if rendezvous is None or rendezvous.store is None:
        return [value]
    rendezvous.outcomes += 1
    keys = [f"value {rendezvous.outcomes} of rank {rank}" for rank in range(rendezvous.ranks.world_size)]
    _send(rendezvous.store, keys[rendezvous.ranks.rank], value)
    return [_receive(rendezvous.store, key) for key in keys]


def _outcome_of(leaders: list[int], work: Callable[[], Value]) -> Value:
    rendezvous = _rendezvous
    if rendezvous is None or rendezvous.store is None:
        return work()
    assert not rendezvous.is_working, "work that one rank does for all must not wait for the others"
    rendezvous.outcomes += 1
    keys = {leader: f"outcome {rendezvous.outcomes} of rank {leader}" for leader in leaders}
    if key := keys.get(rendezvous.ranks.rank):
        rendezvous.is_working = True
        try:
            _publish_outcome(work, lambda outcome: _send(rendezvous.store, key, outcome))
        finally:
            rendezvous.is_working = False
    outcomes = {leader: _receive(rendezvous.store, key) for leader, key in keys.items()}
    for leader, (kind, content) in outcomes.items():
        if kind is not None:
            raise kind(*content) from OtherRankFailed(f"the error is rank {leader}'s")
    first = rendezvous.first_on_node
    return outcomes[first if first in outcomes else leaders[0]][1]


def _publish_outcome(work: Callable[[], Any], publish: Callable[[tuple[type[Exception] | None, Any]], None]) -> None:
    try:
        publish((None, work()))
    except (UserError, Interrupted) as error:
        publish((type(error), error.args))
        raise
    except BaseException as error:
        publish((OtherRankFailed, (f"{type(error).__name__}: {error}",)))
        raise


def _send(store: Any, key: str, value: Any) -> None:
    """Publish a value of any size: a tokenizer of 150,000 tokens is larger than what the store takes at once."""
    content = pickle.dumps(value)
    starts = range(0, len(content), PART_BYTES)
    for number, start in enumerate(starts):
        store.set(f"{key}, part {number}", content[start : start + PART_BYTES])
    store.set(key, str(len(starts)))


def _receive(store: Any, key: str) -> Any:
    """The value that a rank has published, as soon as it has."""
    parts = range(int(wait_for(store, key)))
    return pickle.loads(b"".join(bytes(store.get(f"{key}, part {number}")) for number in parts))


def wait_for(store: Any, key: str) -> bytes:
    """The value of ``key``, as soon as it is set.

    Polls: the store's own wait would block other threads that use the store, and Ctrl-C.
    """
    pause = FIRST_PAUSE_SECONDS
    while not store.check([key]):
        time.sleep(pause)
        pause = min(LONGER * pause, LONGEST_PAUSE_SECONDS)
    return bytes(store.get(key))


def _open_store(ranks: Ranks) -> Any:
    """The store at MASTER_ADDR and MASTER_PORT, when all ranks have reached it."""
    from torch import distributed as dist
    from torch.distributed.rendezvous import rendezvous

    place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    try:
        store, _, _ = next(iter(rendezvous("env://", ranks.rank, ranks.world_size, timeout=RENDEZVOUS_TIMEOUT)))
    except (dist.DistError, ValueError) as error:
        reason = first_line(error)
        if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
            reason = "another process uses this port"
        raise UserError(
            f"the {ranks.world_size} ranks cannot reach each other at {place}: {reason}",
            "choose another port by --master_port or MASTER_PORT, and check that every node reaches MASTER_ADDR",
        ) from error
    store.set_timeout(ANSWER_TIMEOUT)
    return store


def _exchange_members(ranks: Ranks, store: Any) -> list[Member]:
    """Publish who this rank is, and read who the others are."""
    me = Member(ranks.rank, socket.gethostname(), _node_name(), os.getpid(), psutil.Process().create_time())
    if store is None:
        return [me] * ranks.world_size
    text = json.dumps(asdict(me))
    if store.compare_set(f"member {me.rank}", "", text) != text.encode():
        raise UserError(
            f"another run with a rank {me.rank} uses {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}",
            "choose another port by --master_port or MASTER_PORT",
        )
    members = [Member(**json.loads(wait_for(store, f"member {rank}"))) for rank in range(ranks.world_size)]
    store.set(f"rank {me.rank} knows all", "")
    for rank in range(ranks.world_size if ranks.is_main else 0):  # from then on every rank notices when rank 0 is lost
        wait_for(store, f"rank {rank} knows all")
    return members


def _node_name() -> str:
    """The machine and its process-id namespace: containers of one machine do not see each other's processes."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{socket.gethostname()} {boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return socket.gethostname()
