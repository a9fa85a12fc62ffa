"""The ranks of test_rank_watch.py: two a case take steps until one of them has to stop, die or lag.

    rank_watch_worker.py FOLDER RANK:HOW:PORT ...

All cases run side by side, in forks of one process that has imported torch. Of each case FOLDER/HOW_RANK gets the files
``0.out``, ``0.err``, ``0.pid`` of rank 0, the same of rank 1, and ``code`` of the rank that was not lost.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import torch
from torch import distributed as dist

from tests.forks import end_with, write_to
from toolkit.cluster.ranks import read_ranks
from toolkit.training.monitoring.rank_watch import Limits, RankWatch

LOST_AT = 5
ENDS = ("waits for data", "starves")  # cases in which the rank that is lost ends by itself


def main() -> None:
    cases = [case.split(":") for case in sys.argv[2:]]
    started = [(Path(sys.argv[1]) / f"{how}_{lost}", int(lost), how, int(port)) for lost, how, port in cases]
    ranks = [[start(rank, *case) for rank in range(2)] for case in started]
    for (folder, lost, how, _), pids in zip(started, ranks, strict=True):
        code = os.waitstatus_to_exitcode(os.waitpid(pids[1 - lost], 0)[1])
        if how not in ENDS:
            os.kill(pids[lost], signal.SIGKILL)
        os.waitpid(pids[lost], 0)
        (folder / "code").write_text(str(code))


def start(rank: int, folder: Path, lost_rank: int, how: str, port: int) -> int:
    """Fork a rank; its process id."""
    folder.mkdir(exist_ok=True)
    pid = os.fork()
    if pid == 0:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
        os.environ |= {"LOCAL_WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)}
        write_to(folder / f"{rank}.out", folder / f"{rank}.err")
        end_with(lambda: take_steps(lost_rank, how))
    (folder / f"{rank}.pid").write_text(str(pid))
    return pid


def take_steps(lost_rank: int, how: str) -> None:
    """Be a rank."""
    ranks = read_ranks()
    dist.init_process_group("gloo")
    data = 4.0 if how == "starves" else 60.0
    limits = Limits(shortest=1.5, median_steps=3, data=data, silence=3.0, poll=0.1)
    watch = RankWatch(ranks, lambda reason: print(f"lost: {reason}", flush=True), limits)
    watch.start()
    for step in range(1, 8):
        if step == LOST_AT and ranks.rank == lost_rank:
            if how == "stops":
                os.kill(os.getpid(), signal.SIGSTOP)
            elif how == "lags":
                time.sleep(60)
            elif how == "waits for data":
                with watch.waiting_for_data():
                    time.sleep(7)
            elif how == "starves":
                with watch.waiting_for_data():
                    time.sleep(60)
            elif how == "stops while it waits for data":
                with watch.waiting_for_data():
                    time.sleep(1)
                    os.kill(os.getpid(), signal.SIGSTOP)
            elif how == "evaluates":  # or saves
                with watch.paused():
                    time.sleep(5)
        watch.begin(step)
        if step == LOST_AT and ranks.rank == lost_rank and how == "compiles":
            watch.exempt()
            time.sleep(5)
        dist.all_reduce(torch.ones(1))
        watch.end()
        time.sleep(0.05)
    watch.close()
    print("done", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
