"""One run of benchmarks/planning.py: ranks that are forked from a process with everything imported, and their peaks.

A rank's code pages are made resident before anything is measured, so that its resident set grows by what it allocates.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import socket
import sys
import traceback
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

POPULATE_READ = 22  # of madvise, sys/mman.h, from Linux 5.14 on
GIB = 2**30


def import_all() -> None:
    """Import what a rank needs, so that it is forked with it."""
    import deepspeed  # noqa: F401

    import toolkit.batching.loader
    import toolkit.training.run  # noqa: F401


def run_ranks(order: dict[str, Any], ranks: int, folder: Path) -> dict[str, Any]:
    """Fork the ranks of a run, and gather what they measured: of each figure that of the rank with the most.

    Args:
        order: ``recipe``, ``ds``, ``overrides`` and ``steps``; ``tensors`` = whether to print those alive at the peak.
        ranks: how many.
        folder: theirs alone.

    Raises:
        RuntimeError: a rank failed; the message holds what they printed.
    """
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    sys.stdout.flush()
    children = {}
    for rank in range(ranks):
        child = os.fork()
        if not child:
            _rank(order, rank, ranks, port, folder)
        children[child] = rank
    failed = False
    for child in children:
        _, status = os.waitpid(child, 0)
        failed |= status != 0
    if failed:
        outputs = [(folder / f"output_{rank}.txt").read_bytes()[-3000:] for rank in range(ranks)]
        raise RuntimeError("\n".join(text.decode("utf-8", "replace") for text in outputs))
    found = [json.loads((folder / f"rank_{rank}.json").read_text(encoding="utf-8")) for rank in range(ranks)]
    return {key: max(figures[key] for figures in found) for key in found[0]}


def _rank(order: dict[str, Any], rank: int, ranks: int, port: int, folder: Path) -> None:
    """A forked rank, to its end."""
    code = 1
    try:
        output = os.open(folder / f"output_{rank}.txt", os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
        (folder / f"rank_{rank}.json").write_text(json.dumps(measure(order, folder)), encoding="utf-8")
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def measure(order: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Build a model, train some steps, and say what that took of this rank's memory."""
    from toolkit.batching.loader import train_batches
    from toolkit.cluster.ranks import read_ranks
    from toolkit.corpus.packed import Corpus
    from toolkit.cpu.allocator import return_freed_memory
    from toolkit.recipe.resolve import resolve_named
    from toolkit.training.run import open_run, open_trainer
    from toolkit.training.start import Start

    return_freed_memory()
    ranks = read_ranks()
    resolved = resolve_named(order["recipe"], order["overrides"], ranks.world_size, has_gpu=False, ds=order["ds"])
    corpus = Corpus.open(Path(resolved.recipe.data.corpus or ""))
    log: Any = nullcontext()
    if order.get("tensors"):
        from planning_tensors import TensorLog

        log = TensorLog()
    make_code_resident()
    base = reset_peak()
    with ExitStack() as stack:
        interruptions = stack.enter_context(open_run(resolved, ranks, corpus))
        stack.enter_context(log)
        trainer = stack.enter_context(open_trainer(resolved, ranks, corpus, Start(), interruptions, lambda _: None))
        start = held("VmHWM")
        reset_peak()
        if order.get("tensors"):
            (folder / f"start_{ranks.rank}.txt").write_text(log.at_peak(), encoding="utf-8")
            log.forget()
        trainer.engine.train()
        batches = train_batches(
            trainer.train_split, trainer.processor.tokenizer, resolved, landmark_set=corpus.landmark_set,
            epoch=0, start_step=0, epochs=None, rank=ranks.rank // resolved.tensor_parallel_size,
        )  # fmt: skip
        steps = [next(batches) for _ in range(order["steps"])]
        heaviest = steps[-1][-1]  # when moments and sums of gradients are there; all before it is short
        shapes = set()
        for step in steps:
            computed = [batch if batch is heaviest else one_clip(batch) for batch in step]
            shapes |= {(*batch.frame_mask.shape, batch.labels.shape[1]) for batch in computed}
            trainer.step(computed)
        peak = held("VmHWM")
        if order.get("tensors"):
            (folder / f"step_{ranks.rank}.txt").write_text(log.at_peak(), encoding="utf-8")
        return {
            "base_gib": in_gib(base), "start_gib": in_gib(start - base), "step_gib": in_gib(peak - base),
            "held_gib": in_gib(held("VmRSS") - base), "frames": heaviest.poses.shape[1],
            "tokens": heaviest.labels.shape[1], "rows": len(trainer.processor.tokenizer), "shapes": sorted(shapes),
        }  # fmt: skip


def in_gib(size: int) -> float:
    return round(size / GIB, 4)


def make_code_resident() -> None:
    """Read every page of every file that this process maps (its libraries) into its resident set."""
    libc = ctypes.CDLL(None, use_errno=True)
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        span, access, *_, path = [*line.split(maxsplit=5), ""][:6]
        if path.startswith("/") and access.startswith("r"):
            begin, end = (int(number, 16) for number in span.split("-"))
            libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), POPULATE_READ)


def held(line: str) -> int:
    """Resident bytes of this process: now (``VmRSS``) or at most since the mark was last set back (``VmHWM``)."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(next(row for row in status.splitlines() if row.startswith(line)).split()[1]) * 1024


def reset_peak() -> int:
    """Set the mark back; what is held now."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return held("VmRSS")


def one_clip(batch: Any) -> Any:
    """The first clip of a batch, as long as it was."""
    tensors = {name: value[:1] for name, value in vars(batch).items() if hasattr(value, "shape")}
    return replace(batch, uids=batch.uids[:1], texts=batch.texts[:1], **tensors)
