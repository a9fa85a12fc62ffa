"""Where the ranks of a run meet before they share a process group, and beside it: a store that rank 0 keeps.

A collective waits for every rank, for at most half an hour, and says nothing of one that is dead. What one rank does
for all of them (it looks at the run directory, downloads a model) ends here instead, in an outcome that the others wait
for by looking: a value, or the error that stopped it.

The process group that comes later meets over the same store, at MASTER_ADDR and MASTER_PORT.
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
from toolkit.errors import Interrupted, UserError

Value = TypeVar("Value")

# Nodes of a job may start many minutes after each other; torch's process group waits as long.
MEETING_TIMEOUT = timedelta(minutes=30)
# An answer of the store takes milliseconds where rank 0 lives.
ANSWER_TIMEOUT = timedelta(seconds=30)
FIRST_LOOK_SECONDS, LONGEST_LOOK_SECONDS = 0.01, 0.5


class OtherRankFailed(Exception):
    """Another rank met an error that is none of the user's; that rank tells of it."""


@dataclass(frozen=True)
class Member:
    """One process of the run.

    Attributes:
        rank: its number.
        host: name of its machine.
        node: what only processes share that see each other's process ids.
        pid: its process id on that node.
        started: when it began, in seconds since the epoch; a process id is used again.
    """

    rank: int
    host: str
    node: str
    pid: int
    started: float

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.host}, process {self.pid})"


class Meeting:
    """All ranks of a run, and the store between them.

    Args:
        ranks: which rank this is.
        store: torch's; None for a lone process.
        members: by rank.
    """

    def __init__(self, ranks: Ranks, store: Any, members: list[Member]) -> None:
        self.ranks = ranks
        self.store = store
        self.members = members
        self.agreements = 0  # how often the ranks have waited for one of them
        self.works = False  # this rank does something for others at this moment

    @property
    def me(self) -> Member:
        return self.members[self.ranks.rank]

    @property
    def first_ranks(self) -> list[int]:
        """The lowest rank of each node."""
        return list({member.node: member.rank for member in reversed(self.members)}.values())

    @property
    def first_here(self) -> int:
        """The lowest rank of this node."""
        return next(member.rank for member in self.members if member.node == self.me.node)


_meeting: Meeting | None = None


def meet(ranks: Ranks) -> Meeting:
    """Bring the ranks together; the second call finds them together.

    Raises:
        UserError: rank 0 cannot keep a store at MASTER_PORT, is not to be found there, or another run is.
    """
    global _meeting
    if _meeting is None:
        store = _open_store(ranks) if ranks.world_size > 1 else None
        _meeting = Meeting(ranks, store, _introduce(ranks, store))
    return _meeting


def part() -> None:
    """Forget the meeting; a process that goes on may meet others anew."""
    global _meeting
    _meeting = None


def on_rank_0(work: Callable[[], Value]) -> Value:
    """What ``work`` gives on rank 0, on every rank; all ranks call this, and it may take hours.

    Args:
        work: gives something that can be pickled; called on rank 0 alone.

    Raises:
        UserError, Interrupted: rank 0 met it, and so does every rank.
        OtherRankFailed: rank 0 met another error.
    """
    return _outcome_of([0], work)


def on_each_node(work: Callable[[], Value]) -> Value:
    """What ``work`` gives on the first rank of a node, on all ranks of that node, when all nodes have it.

    Args, Raises: as for :func:`on_rank_0`; all ranks meet the error of any node.
    """
    return _outcome_of(_meeting.first_ranks if _meeting else [0], work)


def _outcome_of(leaders: list[int], work: Callable[[], Value]) -> Value:
    if _meeting is None or _meeting.store is None:
        return work()
    meeting = _meeting
    assert not meeting.works, "what one rank does for all may not wait for what all do"
    meeting.agreements += 1
    keys = {leader: f"outcome {meeting.agreements} of rank {leader}" for leader in leaders}
    if meeting.ranks.rank in keys:
        meeting.works = True
        try:
            _do(work, lambda outcome: meeting.store.set(keys[meeting.ranks.rank], pickle.dumps(outcome)))
        finally:
            meeting.works = False
    outcomes = {leader: pickle.loads(wait_for(meeting.store, key)) for leader, key in keys.items()}
    for leader, (kind, content) in outcomes.items():
        if kind is not None:
            raise kind(*content) from OtherRankFailed(f"rank {leader} met it")
    return outcomes[meeting.first_here if meeting.first_here in outcomes else leaders[0]][1]


def _do(work: Callable[[], Any], tell: Callable[[tuple[type[Exception] | None, Any]], None]) -> None:
    try:
        tell((None, work()))
    except (UserError, Interrupted) as error:
        tell((type(error), error.args))
        raise
    except BaseException as error:
        tell((OtherRankFailed, (f"{type(error).__name__}: {error}",)))
        raise


def wait_for(store: Any, key: str) -> bytes:
    """What ``key`` holds, as soon as it holds anything.

    Other threads may use the store meanwhile, and Ctrl-C ends the wait, as neither may in the store's own waiting.
    """
    pause = FIRST_LOOK_SECONDS
    while not store.check([key]):
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_LOOK_SECONDS)
    return bytes(store.get(key))


def _open_store(ranks: Ranks) -> Any:
    """The store at MASTER_ADDR and MASTER_PORT, when all ranks have found it."""
    from torch import distributed as dist
    from torch.distributed.rendezvous import rendezvous

    place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    try:
        store, _, _ = next(iter(rendezvous("env://", ranks.rank, ranks.world_size, timeout=MEETING_TIMEOUT)))
    except (dist.DistError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
            reason = "another process uses this port"
        raise UserError(
            f"the {ranks.world_size} ranks cannot meet at {place} ({reason}): choose another port by --master_port or "
            "MASTER_PORT, and see that every node reaches rank 0's at MASTER_ADDR"
        ) from error
    store.set_timeout(ANSWER_TIMEOUT)
    return store


def _introduce(ranks: Ranks, store: Any) -> list[Member]:
    """Say who this rank is, and hear who the others are."""
    me = Member(ranks.rank, socket.gethostname(), _node(), os.getpid(), psutil.Process().create_time())
    if store is None:
        return [me] * ranks.world_size
    said = json.dumps(asdict(me))
    if store.compare_set(f"member {me.rank}", "", said) != said.encode():
        raise UserError(
            f"another run with a rank {me.rank} has met at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}: "
            "choose another port by --master_port or MASTER_PORT"
        )
    members = [Member(**json.loads(wait_for(store, f"member {rank}"))) for rank in range(ranks.world_size)]
    store.set(f"rank {me.rank} knows all", "")
    for rank in range(ranks.world_size if ranks.is_main else 0):  # from then on all can tell when rank 0 is lost
        wait_for(store, f"rank {rank} knows all")
    return members


def _node() -> str:
    """Machine, and the space of process ids on it: containers of one machine do not see each other's."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{socket.gethostname()} {boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return socket.gethostname()
