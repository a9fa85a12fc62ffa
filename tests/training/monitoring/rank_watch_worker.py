"""One rank of test_rank_watch.py: takes steps with the others until it has to stop, die or lag."""

from __future__ import annotations

import os
import signal
import sys
import time

import torch
from torch import distributed as dist

from toolkit.cluster.ranks import read_ranks
from toolkit.training.monitoring.rank_watch import Limits, RankWatch

LOST_AT = 5


def main() -> None:
    lost_rank, how = int(sys.argv[1]), sys.argv[2]
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
            else:  # an evaluation or a save takes its time
                with watch.paused():
                    time.sleep(5)
        watch.begin(step)
        dist.all_reduce(torch.ones(1))
        watch.end()
        time.sleep(0.05)
    watch.close()
    print("done", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
