"""Run commands one after the other, each on two ranks with pretended GPUs, for the price of one start.

    python tests/gpu/forked_ranks.py PLAN.json

The plan is a list of ``{"name": ..., "words": [script, argument, ...], "environment": {...}, "out": file}``. This
process imports everything and forks the ranks of each command, as ``tests/end_to_end/warm_launcher.py`` does for CPU
ranks; both write into ``out``. It prints a JSON object: the exit codes of each command's ranks by its name.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).parent))

import pretend_gpus

from tests.forks import end_with, import_all, write_to
from tests.time_limits import limit

RANKS = 2
# Seconds, on an idle machine.
LONGEST = 300.0  # of a command
ALONE = 5.0  # that a rank may run when the other has failed; it would wait three times as long for its end


def main() -> None:
    plan = json.loads(Path(sys.argv[1]).read_text())
    import_all([])
    print(json.dumps({command["name"]: codes_of(command) for command in plan}), flush=True)


def codes_of(command: dict[str, Any]) -> list[int]:
    """Run a command to its end; the exit codes of its ranks."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    ranks = [fork(rank, port, command) for rank in range(RANKS)]
    codes: dict[int, int] = {}
    end = time.monotonic() + limit(LONGEST)
    while len(codes) < RANKS:
        for rank, process in enumerate(ranks):
            if rank not in codes and (ended := os.waitpid(process, os.WNOHANG))[0]:
                codes[rank] = os.waitstatus_to_exitcode(ended[1])
                if codes[rank]:
                    end = min(end, time.monotonic() + limit(ALONE))
        if time.monotonic() > end:
            for rank in set(range(RANKS)) - codes.keys():
                os.kill(ranks[rank], signal.SIGKILL)
        time.sleep(0.05)
    return [codes[rank] for rank in range(RANKS)]


def fork(rank: int, port: int, command: dict[str, Any]) -> int:
    """Start a rank; its process id."""
    process = os.fork()
    if process == 0:
        be(rank, port, command)
    return process


def be(rank: int, port: int, command: dict[str, Any]) -> NoReturn:
    """Be a rank, to its end."""
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "LOCAL_SIZE": RANKS, "MASTER_PORT": port}
    os.environ |= {key: str(value) for key, value in places.items()} | {"MASTER_ADDR": "127.0.0.1"}
    os.environ |= command.get("environment", {})
    write_to(command["out"])
    end_with(lambda: pretend_gpus.run(command["words"]))


if __name__ == "__main__":
    main()
