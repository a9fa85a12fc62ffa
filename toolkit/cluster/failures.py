"""How one rank of many ends: the rank that fails reports why, at once, and all other ranks end with it.

A rank that fails or is killed breaks the collectives of all others, or leaves them waiting. So a rank that fails claims
in the store that it is the cause; the first claim wins, and that rank prints the error and writes the run's status. A
thread of every rank polls the store each second, and the processes of its own node, because a killed rank claims
nothing. After a failure no rank enters a collective or leaves the process group, which would wait for the others.
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

from toolkit.cluster.host_memory import memory_is_tight
from toolkit.cluster.ranks import Ranks, check_master_address, read_local_rank, read_ranks
from toolkit.cluster.rendezvous import Member, OtherRankFailed, Rendezvous, join_rendezvous
from toolkit.cpu.allocator import spare_memory
from toolkit.errors import (
    EXIT_AT_ONCE,
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_USER_ERROR,
    Interrupted,
    UserError,
    discard_unwritten_output,
    explained,
)

POLL_SECONDS = 1.0
# The main thread has this long to end by itself after another rank failed.
GRACE_SECONDS = 2.0
# A broken collective is a consequence: a rank waits this long for its cause before it reports its own error.
CAUSE_SECONDS = 5.0
# What to do about a failure may be computed for this long, after it was printed.
ADVICE_SECONDS = 6.0
# The clean-ups of at_failure have this long.
CLEAN_UP_SECONDS = 10.0
# Rank 0 keeps the store, so it ends last: after a failure within CLEAN_UP_SECONDS, else after this.
RANK_0_WAITS_SECONDS = 60.0
CLAIM = "failure"
# Of what collectives raise when another rank is gone; gloo's errors have no class of their own.
BROKEN_COLLECTIVE = ("closed by peer", "reset by peer", "Broken pipe", "gloo/transport")


@dataclass(frozen=True)
class Failure:
    """Why a run ends."""

    rank: int  # which rank failed
    host: str  # its machine
    reason: str  # for the run directory
    lines: str  # for the terminal, once a node
    code: int = EXIT_FAILED  # exit code of all ranks
    reported_by: int = -1  # the rank that claims it
    who: str = ""  # which rank failed, in words
    has_died: bool = False  # whether its process is gone and claimed nothing
    is_explained: bool = False  # whether its lines say what to do: its traceback is left out, and advice follows


class Explainer:
    """What a command knows of its failures; this one knows nothing."""

    def explain(self, failure: Failure, error: BaseException | None) -> Failure:
        """The failure with what is known of it, at once; ``error`` is this rank's own, None of a rank that is lost."""
        return failure

    def advise(self, failure: Failure) -> str:
        """Further lines for the terminal, below those of the failure; may take ADVICE_SECONDS."""
        return ""


class RankExit:
    """Ends this process, in one of its threads, and watches the other ranks until then."""

    def __init__(self, rendezvous: Rendezvous, *, debug: bool = False) -> None:
        self.debug = debug
        self.record: Callable[[int, str, str], None] = lambda rank, host, reason: None
        self.clean_ups: list[Callable[[], None]] = []
        self.explainer = Explainer()
        self.failure: Failure | None = None
        self._ranks, self._me, self._members = rendezvous.ranks, rendezvous.me, rendezvous.members
        here = (member for member in self._members if member.node == self._me.node and member != self._me)
        self._neighbours = {member.rank: member for member in here}
        self._store = rendezvous.store
        self._exits_last = False
        self._exiting_thread: int | None = None
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._cause: Failure | None = None  # what the watching thread has found
        self._watch_store: Any = None  # the watching thread's own connection: the main thread may wait in the other
        self._thread = threading.Thread()
        self.start_watching()

    def start_watching(self) -> None:
        """Start the thread that watches the other ranks."""
        if self._store is not None:
            self._closed.clear()
            self._thread = threading.Thread(target=self._watch, daemon=True, name="failures")
            self._thread.start()

    def stop_watching(self) -> None:
        """End that thread."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()

    def report(self, error: BaseException) -> Failure:
        """Report an error that ends this rank, unless it follows from another rank's, and clean up."""
        self._enter()
        if self.failure is None:
            cause = self._wait_for_cause() if _is_consequence(error) else None
            own = cause or self.explainer.explain(_failure_of(error, self._me), error)
            is_known = isinstance(error, KeyboardInterrupt) or explained(error) is not None or own.is_explained
            is_plain = is_known and not self.debug
            trace = "" if is_plain or cause else "".join(traceback.format_exception(error))
            self._publish(own, trace)
        assert self.failure is not None
        return self.failure

    def exit_for(self, cause: Failure, *, store_answers: bool = True) -> NoReturn:
        """Report a failure of another rank, clean up and end this process."""
        self._enter()
        self._store = self._store if store_answers else None
        if self.failure is None:
            self._publish(cause, "")
        self.exit(cause.code)

    def exit(self, code: int) -> NoReturn:
        """End this process; rank 0, which keeps the store, ends last."""
        self._closed.set()
        discard_unwritten_output()
        sys.stderr.flush()
        with contextlib.suppress(RuntimeError):
            if self._store is not None:
                self._store.set(_exit_key(self._ranks.rank), "")
                if self._ranks.rank == 0:
                    self._wait_for_exits(CLEAN_UP_SECONDS if self.failure else RANK_0_WAITS_SECONDS)
        end = time.monotonic() + CLEAN_UP_SECONDS
        while self._exits_last and self.failure and self._living(self.failure.rank) and time.monotonic() < end:
            time.sleep(POLL_SECONDS / 20)
        # Threads of gloo may still run; everything is written by now, so none may delay the exit code.
        os._exit(code)

    def _enter(self) -> None:
        """Make this thread the one that ends the process; any other one waits until it has ended."""
        with self._lock:
            first = self._exiting_thread is None
            self._exiting_thread = self._exiting_thread or threading.get_ident()
        if self._exiting_thread != threading.get_ident():
            threading.Event().wait()
        if first:
            threading.Thread(target=self._exit_at_deadline, daemon=True, name="end").start()

    def _exit_at_deadline(self) -> None:
        time.sleep(CAUSE_SECONDS + ADVICE_SECONDS + CLEAN_UP_SECONDS)
        os._exit(self.failure.code if self.failure else EXIT_FAILED)

    def _publish(self, failure: Failure, trace: str) -> None:
        """Claim the failure, print the one that was claimed first, record it if it is this rank's, and clean up."""
        if failure.reported_by < 0:
            failure = self.explainer.explain(failure, None) if failure.has_died else failure
            failure = replace(failure, reported_by=self._ranks.rank)
        claimed = self._ask_store(lambda store: store.compare_set(CLAIM, "", json.dumps(asdict(failure))))
        self.failure = Failure(**json.loads(claimed)) if claimed else failure
        is_own = self.failure.reported_by == self._ranks.rank
        prints = self._prints_for_node(self.failure)
        if prints:
            print(f"{trace if is_own else ''}{self.failure.lines}", file=sys.stderr, flush=True)
        if is_own and (claimed or prints):
            with contextlib.suppress(Exception):  # a full disk must not keep the process from ending
                self.record(failure.rank, failure.host, failure.reason)
            with contextlib.suppress(Exception):  # it is computed where memory is short
                print(end=self.explainer.advise(self.failure), file=sys.stderr, flush=True)
        while self.clean_ups:
            with contextlib.suppress(Exception):
                self.clean_ups.pop()()

    def _prints_for_node(self, failure: Failure) -> bool:
        """Whether this rank is the one of its node that prints the failure."""
        rank = str(self._ranks.rank)
        if failure.reported_by in self._neighbours:
            return False
        if self._store is not None and failure.reported_by == self._ranks.rank:
            return True
        printer = self._ask_store(lambda store: store.compare_set(f"printed on {self._me.node}", "", rank))
        if printer is not None:
            return bool(printer.decode() == rank)
        # Without a store the first living rank prints, and exits after the others, which look whether it lives.
        self._exits_last = self._ranks.rank < min(self._living(failure.rank), default=self._ranks.world_size)
        return self._exits_last

    def _living(self, lost: int) -> list[int]:
        return [rank for rank, member in self._neighbours.items() if rank != lost and not _has_died(member)]

    def _ask_store(self, question: Callable[[Any], bytes]) -> bytes | None:
        """The store's answer; None where there is no store, or none that answers any more."""
        try:
            return question(self._store) if self._store is not None else None
        except RuntimeError:
            self._store = None
            return None

    def _wait_for_cause(self) -> Failure | None:
        """What broke a collective of this rank, if that is known within CAUSE_SECONDS."""
        end = time.monotonic() + CAUSE_SECONDS
        while self._store is not None and time.monotonic() < end:
            if cause := self._cause or self._find_failure(self._store):
                return cause
            time.sleep(POLL_SECONDS / 5)
        return None

    def _find_failure(self, store: Any) -> Failure | None:
        """The failure that was claimed, or the loss of a rank that claimed nothing."""
        try:
            dead = [rank for rank, member in self._neighbours.items() if _has_died(member)]
            lost = [rank for rank in dead if not store.check([_exit_key(rank)])]
            # A rank claims before it ends, so one that is dead and has not claimed by now was killed.
            if store.check([CLAIM]):
                return Failure(**json.loads(store.get(CLAIM)))
        except RuntimeError:  # the connection to rank 0 is broken
            lost = [0]
        return _loss_of(self._members[lost[0]]) if lost else None

    def _watch(self) -> None:
        while not self._closed.wait(POLL_SECONDS):
            with contextlib.suppress(RuntimeError):  # rank 0 may be gone already
                self._watch_store = self._watch_store or self._store.clone()
            store = self._watch_store
            self._cause = self._find_failure(store) if store else _loss_of(self._members[0])
            if self._cause:
                if not self._closed.wait(GRACE_SECONDS) and self._exiting_thread is None:
                    self.exit_for(self._cause)
                return

    def _wait_for_exits(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        waiting = list(range(1, self._ranks.world_size))
        while waiting and time.monotonic() < end:
            waiting = [rank for rank in waiting if not self._store.check([_exit_key(rank)])]
            waiting = [
                rank for rank in waiting if rank not in self._neighbours or not _has_died(self._neighbours[rank])
            ]
            time.sleep(POLL_SECONDS / 20)


def _exit_key(rank: int) -> str:
    return f"rank {rank} exits"


def _has_died(member: Member) -> bool:
    try:
        process = psutil.Process(member.pid)
        return bool(process.create_time() != member.started or process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True
    except psutil.AccessDenied:
        return False


def _loss_of(member: Member) -> Failure:
    reason = f"{member} has ended without an error, as when the kernel kills it because memory is short"
    return Failure(member.rank, member.host, reason, f"error: {reason}", who=str(member), has_died=True)


def _failure_of(error: BaseException, me: Member) -> Failure:
    if isinstance(error, KeyboardInterrupt):
        return Failure(me.rank, me.host, "stopped by Ctrl-C", "interrupted: stopped by Ctrl-C", EXIT_AT_ONCE)
    reason = f"{type(error).__name__}: {error}"
    if known := explained(error):
        return Failure(me.rank, me.host, reason, f"{known.kind}: {known.lines}", known.exit_code)
    return Failure(me.rank, me.host, reason, f"error: {me} failed: {' '.join(reason.split())}", who=str(me))


def _is_consequence(error: BaseException) -> bool:
    """Whether an error may follow from an error of another rank."""
    from torch import distributed as dist

    if isinstance(error, OtherRankFailed | dist.DistError) or isinstance(error.__cause__, OtherRankFailed):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in BROKEN_COLLECTIVE)


_rank_exit: RankExit | None = None


def run_rank(command: Callable[[Ranks], None], *, debug: bool) -> NoReturn:
    """Run ``command`` on this rank, and end the process with a documented exit code.

    The rank that meets an error first reports it, at once, and once per node. ``debug`` shows the traceback of the
    user's errors, too.
    """
    global _rank_exit
    # When rank 0 is gone, torch's store logs that at length in C++ and on every rank, before the cause is printed.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        ranks = read_ranks()
        spare_memory(tight=memory_is_tight(ranks.local_world_size))
        check_master_address(ranks)
        rendezvous = join_rendezvous(ranks)
    except UserError as error:
        # Before the rendezvous an error is one of the environment, which all ranks share.
        if read_local_rank() == 0:
            print(f"error: {error.lines}", file=sys.stderr, flush=True)
        os._exit(EXIT_USER_ERROR)
    _rank_exit = RankExit(rendezvous, debug=debug)
    code = EXIT_DONE
    try:
        command(ranks)
        sys.stdout.flush()  # here a full disk or a closed pipe is still an outcome of the command
    except Interrupted as error:  # all ranks have agreed on it
        code = error.exit_code
        if ranks.is_local_main:
            print(f"interrupted: {error.lines}", file=sys.stderr, flush=True)
    except BaseException as error:
        code = _rank_exit.report(error).code
    _rank_exit.exit(code)


def report_failure(error: BaseException) -> bool:
    """Report an error that ends this rank and clean up, before the exception closes anything on its way out.

    Returns:
        whether it was reported; not outside of :func:`run_rank`, where the caller sees the exception.
    """
    if _rank_exit is None or isinstance(error, Interrupted):
        return False
    _rank_exit.report(error)
    return True


@contextlib.contextmanager
def reporting_failures() -> Iterator[None]:
    """Within it an error is reported before it leaves."""
    try:
        yield
    except BaseException as error:
        report_failure(error)
        raise


def exit_for_lost_rank(rank: int, host: str, reason: str, lines: str) -> None:
    """End this process because another rank is lost; does nothing outside of :func:`run_rank`.

    ``reason`` is for the run directory, ``lines`` are for the terminal.
    """
    if _rank_exit is not None:
        _rank_exit.exit_for(Failure(rank, host, reason, lines), store_answers=rank != 0)


@contextlib.contextmanager
def without_watching() -> Iterator[None]:
    """Within it no thread watches the other ranks, so that this process may fork."""
    if _rank_exit is not None:
        _rank_exit.stop_watching()
    yield
    if _rank_exit is not None:
        _rank_exit.start_watching()


@contextlib.contextmanager
def recording_failures(record: Callable[[int, str, str], None]) -> Iterator[None]:
    """Within it ``record`` receives a failure's rank, host and reason, on the rank that reports it."""
    if _rank_exit is None:
        yield
        return
    before, _rank_exit.record = _rank_exit.record, record
    yield  # a failure on its way out is recorded after this, too
    _rank_exit.record = before


def explain_by(explainer: Explainer) -> None:
    """From now on failures of this run are explained by ``explainer``; does nothing outside of :func:`run_rank`."""
    if _rank_exit is not None:
        _rank_exit.explainer = explainer


@contextlib.contextmanager
def at_failure(clean_up: Callable[[], None]) -> Iterator[None]:
    """Within it a failure of any rank calls ``clean_up`` on this one before the process ends.

    It may be called by another thread, while the main one waits in a collective; it has some seconds, and the clean-ups
    registered before it follow.
    """
    if _rank_exit is None:
        yield
        return
    _rank_exit.clean_ups.append(clean_up)
    yield
    _rank_exit.clean_ups.remove(clean_up)
