"""How one rank of many ends: the rank that fails says why, at once, and the others leave without a word over it.

What ends one rank breaks the collectives of all others, or leaves them in one for ever. So a rank that fails claims in
the store that it is the cause; one claim wins, and the rank that made it tells the terminal and the run directory. A
thread of every rank looks there each second, and at the processes of its own node, because one that was killed claims
nothing. After a failure nobody enters a collective or leaves the process group, which would wait for those that do.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, NoReturn

import psutil

from toolkit.cluster.meeting import Meeting, Member, OtherRankFailed, meet
from toolkit.cluster.ranks import Ranks, check_meeting_place, read_local_rank, read_ranks
from toolkit.errors import EXIT_AT_ONCE, EXIT_DONE, EXIT_FAILED, EXIT_USER_ERROR, Interrupted, UserError

LOOK_SECONDS = 1.0
# A rank that hears of another's failure gives its main thread this long to end by itself.
GRACE_SECONDS = 2.0
# A broken collective is no cause. A rank waits so long to hear of one before it tells of its own error.
CAUSE_SECONDS = 5.0
# Then it has so long to finish what it writes and to tidy up; see at_failure.
CLEAN_UP_SECONDS = 10.0
# Rank 0 keeps the store, so it ends last: after a failure within the time to clean up, else after this.
LAST_SECONDS = 60.0
CLAIM = "failure"
# Of what collectives raise when another rank is gone; gloo's errors have no class of their own.
BROKEN_COLLECTIVE = ("closed by peer", "reset by peer", "Broken pipe", "gloo/transport")


@dataclass(frozen=True)
class Failure:
    """Why a run ends.

    Attributes:
        rank: which rank failed.
        host: its machine.
        reason: for the run directory.
        line: for the terminal, once a node.
        code: with which all ranks end.
        told_by: the rank that claims it.
    """

    rank: int
    host: str
    reason: str
    line: str
    code: int = EXIT_FAILED
    told_by: int = -1


class Ending:
    """The end of this process, which one of its threads brings about.

    Args:
        meeting: of the ranks.
        debug: show the traceback of the user's errors, too.
    """

    def __init__(self, meeting: Meeting, *, debug: bool = False) -> None:
        self.debug = debug
        self.record: Callable[[int, str, str], None] = lambda rank, host, reason: None
        self.clean_ups: list[Callable[[], None]] = []
        self.failure: Failure | None = None
        self._ranks, self._me, self._members = meeting.ranks, meeting.me, meeting.members
        here = (member for member in meeting.members if member.node == self._me.node and member != self._me)
        self._neighbours = {member.rank: member for member in here}
        self._store = meeting.store
        self._stays = False
        self._by: int | None = None  # the thread that ends this process
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._own: Any = None  # the thread's own connection: the main thread may wait in the other
        self._thread = threading.Thread()
        self.watch()

    def watch(self) -> None:
        """Begin to look after the other ranks."""
        if self._store is not None:
            self._closed.clear()
            self._thread = threading.Thread(target=self._watch, daemon=True, name="failures")
            self._thread.start()

    def look_away(self) -> None:
        """Stop doing so."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()

    def tell(self, error: BaseException) -> Failure:
        """Tell of an error that ends this rank, unless it follows from another rank's, and tidy up."""
        self._begin()
        if self.failure is None:
            cause = self._cause() if _is_consequence(error) else None
            is_plain = isinstance(error, UserError | KeyboardInterrupt) and not self.debug
            trace = "" if is_plain or cause else "".join(traceback.format_exception(error))
            self._settle(cause or _failure_of(error, self._me), trace)
        assert self.failure is not None
        return self.failure

    def lose(self, cause: Failure, *, store_answers: bool = True) -> NoReturn:
        """Tell of a failure that another rank met, tidy up and end this process."""
        self._begin()
        self._store = self._store if store_answers else None
        if self.failure is None:
            self._settle(cause, "")
        self.leave(cause.code)

    def leave(self, code: int) -> NoReturn:
        """End this process; rank 0, which keeps the store, as the last one."""
        self._closed.set()
        sys.stdout.flush()
        sys.stderr.flush()
        with contextlib.suppress(RuntimeError):
            if self._store is not None:
                self._store.set(_left(self._ranks.rank), "")
                if self._ranks.rank == 0:
                    self._outlast_the_others(CLEAN_UP_SECONDS if self.failure else LAST_SECONDS)
        end = time.monotonic() + CLEAN_UP_SECONDS
        while self._stays and self.failure and self._living(self.failure.rank) and time.monotonic() < end:
            time.sleep(LOOK_SECONDS / 20)
        # Threads of gloo may linger; all that is worth writing is written, so none may hold up the exit code.
        os._exit(code)

    def _begin(self) -> None:
        """From now on this thread ends the process; any other that would, waits for that."""
        with self._lock:
            first = self._by is None
            self._by = self._by or threading.get_ident()
        if self._by != threading.get_ident():
            threading.Event().wait()
        if first:
            threading.Thread(target=self._end_late, daemon=True, name="end").start()

    def _end_late(self) -> None:
        """Whatever hangs, the process ends."""
        time.sleep(CAUSE_SECONDS + CLEAN_UP_SECONDS)
        os._exit(self.failure.code if self.failure else EXIT_FAILED)

    def _settle(self, failure: Failure, trace: str) -> None:
        """Tell this node of the failure that was claimed first, if that is this one the run directory, and tidy up."""
        failure = replace(failure, told_by=self._ranks.rank) if failure.told_by < 0 else failure
        first = self._ask(lambda store: store.compare_set(CLAIM, "", json.dumps(asdict(failure))))
        self.failure = Failure(**json.loads(first)) if first else failure
        is_own = self.failure.told_by == self._ranks.rank
        is_local_main = self._speaks_for_its_node(self.failure)
        if is_local_main:
            print(f"{trace if is_own else ''}{self.failure.line}", file=sys.stderr, flush=True)
        if is_own and (first or is_local_main):
            with contextlib.suppress(Exception):  # a full disk must not keep the process from its end
                self.record(failure.rank, failure.host, failure.reason)
        while self.clean_ups:
            with contextlib.suppress(Exception):
                self.clean_ups.pop()()

    def _speaks_for_its_node(self, failure: Failure) -> bool:
        """Whether no other rank of this node tells of the failure."""
        rank = str(self._ranks.rank)
        if self._store is not None and failure.told_by in (self._ranks.rank, *self._neighbours):
            return failure.told_by == self._ranks.rank
        speaker = self._ask(lambda store: store.compare_set(f"told on {self._me.node}", "", rank))
        if speaker is not None:
            return bool(speaker.decode() == rank)
        # Without a store the first that lives speaks, and stays until the others have seen that it lives.
        self._stays = self._ranks.rank < min(self._living(failure.rank), default=self._ranks.world_size)
        return self._stays

    def _living(self, lost: int) -> list[int]:
        return [rank for rank, member in self._neighbours.items() if rank != lost and not _died(member)]

    def _ask(self, question: Callable[[Any], bytes]) -> bytes | None:
        """The store's answer; None where there is no store, or none that answers any more."""
        try:
            return question(self._store) if self._store is not None else None
        except RuntimeError:
            self._store = None
            return None

    def _cause(self) -> Failure | None:
        """What broke a collective of this rank, if that shows soon."""
        end = time.monotonic() + CAUSE_SECONDS
        while self._store is not None and time.monotonic() < end:
            if cause := self._look(self._store):
                return cause
            time.sleep(LOOK_SECONDS / 5)
        return None

    def _look(self, store: Any) -> Failure | None:
        """The failure that was claimed, or the loss of a rank that claimed nothing."""
        try:
            dead = [rank for rank, member in self._neighbours.items() if _died(member)]
            lost = [rank for rank in dead if not store.check([_left(rank)])]
            # A rank claims before it ends, so one that is seen dead, and has claimed nothing by now, never will.
            if store.check([CLAIM]):
                return Failure(**json.loads(store.get(CLAIM)))
        except RuntimeError:  # the connection to rank 0 is broken
            lost = [0]
        return _loss_of(self._members[lost[0]]) if lost else None

    def _watch(self) -> None:
        while not self._closed.wait(LOOK_SECONDS):
            with contextlib.suppress(RuntimeError):  # rank 0 may be gone already
                self._own = self._own or self._store.clone()
            if cause := self._look(self._own) if self._own else _loss_of(self._members[0]):
                if not self._closed.wait(GRACE_SECONDS) and self._by is None:
                    self.lose(cause)
                return

    def _outlast_the_others(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        waiting = list(range(1, self._ranks.world_size))
        while waiting and time.monotonic() < end:
            waiting = [rank for rank in waiting if not self._store.check([_left(rank)])]
            waiting = [rank for rank in waiting if rank not in self._neighbours or not _died(self._neighbours[rank])]
            time.sleep(LOOK_SECONDS / 20)


def _left(rank: int) -> str:
    return f"rank {rank} has left"


def _died(member: Member) -> bool:
    try:
        process = psutil.Process(member.pid)
        return bool(process.create_time() != member.started or process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True
    except psutil.AccessDenied:
        return False


def _loss_of(member: Member) -> Failure:
    reason = f"{member} has ended without a word, as when the kernel kills it because memory is short"
    return Failure(member.rank, member.host, reason, f"error: {reason}")


def _failure_of(error: BaseException, me: Member) -> Failure:
    if isinstance(error, KeyboardInterrupt):
        return Failure(me.rank, me.host, "stopped by Ctrl-C", "interrupted: stopped by Ctrl-C", EXIT_AT_ONCE)
    reason = f"{type(error).__name__}: {error}"
    if isinstance(error, UserError):
        return Failure(me.rank, me.host, reason, f"error: {error.lines}", error.exit_code)
    line = " ".join(reason.split())
    return Failure(me.rank, me.host, reason, f"error: {me} failed: {line}")


def _is_consequence(error: BaseException) -> bool:
    """Whether an error may follow from what another rank met."""
    from torch import distributed as dist

    if isinstance(error, OtherRankFailed | dist.DistError) or isinstance(error.__cause__, OtherRankFailed):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in BROKEN_COLLECTIVE)


_ending: Ending | None = None


def run_rank(command: Callable[[Ranks], None], *, debug: bool) -> NoReturn:
    """Run ``command`` on this rank, and end the process with a documented exit code.

    Whichever rank meets an error first tells of it, at once; every node is told once.

    Args:
        command: does the work of a launch script.
        debug: show the traceback of the user's errors, too.
    """
    global _ending
    # When rank 0 is gone, torch's store says so at length in C++ and on every rank, before anybody says why.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        ranks = read_ranks()
        check_meeting_place(ranks)
        meeting = meet(ranks)
    except UserError as error:
        # What is wrong before the ranks have met is wrong with the environment of all of them.
        if read_local_rank() == 0:
            print(f"error: {error.lines}", file=sys.stderr, flush=True)
        os._exit(EXIT_USER_ERROR)
    _ending = Ending(meeting, debug=debug)
    code = EXIT_DONE
    try:
        command(ranks)
    except Interrupted as error:  # all ranks have agreed on it
        code = error.exit_code
        if ranks.is_local_main:
            print(f"interrupted: {error.lines}", file=sys.stderr, flush=True)
    except BaseException as error:
        code = _ending.tell(error).code
    _ending.leave(code)


def tell(error: BaseException) -> bool:
    """Tell of an error that ends this rank and tidy up, before an exception that passes on closes anything.

    Returns:
        whether it was told; not outside of :func:`run_rank`, where whoever called sees the exception.
    """
    if _ending is None or isinstance(error, Interrupted):
        return False
    _ending.tell(error)
    return True


@contextlib.contextmanager
def told() -> Iterator[None]:
    """Within it an error is told of before it leaves."""
    try:
        yield
    except BaseException as error:
        tell(error)
        raise


def lose(rank: int, host: str, reason: str, line: str) -> None:
    """End this process because another rank is lost; does nothing outside of :func:`run_rank`.

    Args:
        rank, host: of the lost one.
        reason: for the run directory.
        line: for the terminal.
    """
    if _ending is not None:
        _ending.lose(Failure(rank, host, reason, line), store_answers=rank != 0)


@contextlib.contextmanager
def unwatched() -> Iterator[None]:
    """Within it this process may fork: no thread of ours lives."""
    if _ending is not None:
        _ending.look_away()
    yield
    if _ending is not None:
        _ending.watch()


@contextlib.contextmanager
def recorded_by(record: Callable[[int, str, str], None]) -> Iterator[None]:
    """Within it ``record`` writes a failure's rank, host and reason down, on the rank that tells of it."""
    if _ending is None:
        yield
        return
    before, _ending.record = _ending.record, record
    yield  # a failure on its way out is recorded after this, too
    _ending.record = before


@contextlib.contextmanager
def at_failure(clean_up: Callable[[], None]) -> Iterator[None]:
    """Within it a failure of any rank calls ``clean_up`` on this one before the process ends.

    It may be called by another thread, while the main one waits in a collective, has some seconds, and is followed by
    what was registered before it.
    """
    if _ending is None:
        yield
        return
    _ending.clean_ups.append(clean_up)
    yield
    _ending.clean_ups.remove(clean_up)
