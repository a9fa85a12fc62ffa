"""The ranks of test_failures.py: each case ends them in its own way.

All are forks of one process that has imported torch, which saves seconds per rank.

    failing_worker.py FOLDER CASE:RANKS:PORT ...      side by side; FOLDER/CASE_RANK.out, .err, .pid and .code
    failing_worker.py FOLDER CASE:RANKS:PORT+ ...     a case with a plus is only started, and killed at the end
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import torch.distributed.rendezvous  # noqa: F401 - before the forks

from toolkit.cluster import failures
from toolkit.cluster.failures import at_failure, recording_failures, run_rank
from toolkit.cluster.ranks import Ranks
from toolkit.cluster.rendezvous import exchange, on_each_node, on_rank_0
from toolkit.errors import UserError

LARGE = bytes(range(256)) * 2**16  # 16 MiB, as the tokenizers of large vocabularies have
HANGS = 120.0  # as in a collective that another rank never enters


def record(rank: int, host: str, reason: str) -> None:
    print(f"recorded: rank {rank} of {host}: {reason}", flush=True)


def look(ranks: Ranks) -> dict[str, int]:
    print(f"rank {ranks.rank} looks", flush=True)
    time.sleep(1)
    return {"seen by": ranks.rank}


def hangs(ranks: Ranks) -> None:
    print("all ranks are here", flush=True)
    time.sleep(HANGS)


def refuse() -> None:
    raise UserError("no such table", "name one")


def agrees(ranks: Ranks) -> None:
    print(on_rank_0(lambda: look(ranks)), on_each_node(lambda: look(ranks)), flush=True)
    assert on_rank_0(lambda: LARGE) == LARGE and exchange(LARGE) == [LARGE] * ranks.world_size


def rank_0_refuses(ranks: Ranks) -> None:
    on_rank_0(refuse)


def all_refuse(ranks: Ranks) -> None:
    refuse()


def rank_0_cannot_write(ranks: Ranks) -> None:
    on_rank_0(lambda: Path("/dev/null/folder").mkdir())


def rank_0_has_no_reader(ranks: Ranks) -> None:
    if ranks.rank > 0:
        time.sleep(HANGS)
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, sys.stdout.fileno())
    print("results")


def last_rank_breaks(ranks: Ranks) -> None:
    with recording_failures(record), at_failure(lambda: print(f"rank {ranks.rank} tidies up", flush=True)):
        if ranks.rank == ranks.world_size - 1:
            raise ZeroDivisionError("on the last rank alone")
        time.sleep(HANGS)


def rank_0_breaks_for_others(ranks: Ranks) -> None:
    on_rank_0(lambda: 1 // 0)


def last_rank_is_killed(ranks: Ranks) -> None:
    with recording_failures(record):
        if ranks.rank == ranks.world_size - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(HANGS)


def rank_0_is_killed(ranks: Ranks) -> None:
    with recording_failures(record):
        on_rank_0(lambda: os.kill(os.getpid(), signal.SIGKILL))


def consequence_comes_first(ranks: Ranks) -> None:
    if ranks.rank == 0:
        time.sleep(2)
        raise ZeroDivisionError("the cause")
    raise RuntimeError("gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4711")


def reporter_dies_before_the_consequence(ranks: Ranks) -> None:
    """The watching thread of rank 1 knows the cause when rank 0 and its store are gone and a collective breaks."""
    if ranks.rank == 0:
        raise ZeroDivisionError("the cause")
    failures.GRACE_SECONDS = HANGS
    rank_exit = failures._rank_exit
    assert rank_exit is not None
    while rank_exit._cause is None:
        time.sleep(0.01)
    reporter = rank_exit._members[0]
    os.kill(reporter.pid, signal.SIGKILL)
    while not failures._has_died(reporter):
        time.sleep(0.01)
    raise RuntimeError("gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4711")


def begin(folder: Path, case: str, rank: int, size: str, port: str) -> int:
    """Be one rank of a case, in a fork."""
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    pid = os.fork()
    if pid == 0:
        os.environ |= place | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for stream, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(folder / f"{case}_{rank}.{name}", os.O_WRONLY | os.O_CREAT), stream)
        run_rank(globals()[case], debug=False)
    (folder / f"{case}_{rank}.pid").write_text(str(pid))
    return pid


def main() -> None:
    folder, waiting, living = Path(sys.argv[1]), {}, []
    for word in sys.argv[2:]:
        case, size, port = word.split(":")
        pids = {begin(folder, case, rank, size, port.rstrip("+")): f"{case}_{rank}" for rank in range(int(size))}
        if not port.endswith("+"):
            waiting.update(pids)
            continue
        living += pids
        while not all((folder / f"{name}.out").stat().st_size for name in pids.values()):
            time.sleep(0.05)  # until all are here
    for pid, name in waiting.items():
        (folder / f"{name}.code").write_text(str(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])))
    for pid in living:
        assert os.waitpid(pid, os.WNOHANG) == (0, 0), f"{pid} has ended"
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
