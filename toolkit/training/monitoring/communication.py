"""Write a table of what DeepSpeed's ``comms_logger`` has counted.

Its times are left out: DeepSpeed 0.19.8 never resets the timer of an operation, so the time of each call includes that
of all calls before it.
"""

from __future__ import annotations

from collections.abc import Callable

from toolkit.files import write_text_atomically
from toolkit.recipe.resolve import ResolvedRun, value_at

FILE = "communication.txt"


def report_communication(resolved: ResolvedRun, echo: Callable[[str], None]) -> None:
    """Write what this rank has sent and received where the DeepSpeed JSON asks for it, and print the path.

    No rank waits for another, so a run that was stopped has its table, too.
    """
    if not value_at(resolved.deepspeed, "comms_logger.enabled"):
        return
    from deepspeed.comm import comm

    recorded = comm.comms_logger.log_all(print_log=False, return_dict=True)["summary"]
    if not recorded:
        echo("comms_logger has recorded nothing: name operations in ds.comms_logger.prof_ops, or set prof_all=true")
        return
    rows = [(name, size, figures["count"]) for name, sizes in recorded.items() for size, figures in sizes.items()]
    path = resolved.run_dir / FILE
    write_text_atomically(path, _table(rows))
    calls, gib = sum(row[2] for row in rows), sum(size * count for _, size, count in rows) / 2**30
    echo(f"communication of rank 0: {calls} calls, {gib:.2f} GiB; by operation in {path}")


def _table(rows: list[tuple[str, int, int]]) -> str:
    """One line for each operation and message size, most bytes first."""
    lines = [f"{'operation':<32}{'bytes a call':>14}{'calls':>10}{'MiB':>12}"]
    for name, size, count in sorted(rows, key=lambda row: -row[1] * row[2]):
        lines.append(f"{name:<32}{size:>14}{count:>10}{size * count / 2**20:>12.3f}")
    return "\n".join(lines) + "\n"
