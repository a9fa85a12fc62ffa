"""Random recipes and DeepSpeed JSONs under limits of memory that bind: does a run with ``auto`` ever run out of it?

Each run is two steps and an evaluation of a model of its published width and few layers. Its limit lies between what
the plan says of one clip in a micro-batch and of all clips of a rank, by addresses (``ulimit -v``) or by a memory
cgroup, so that some sizes do not fit, and sometimes not one.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import psutil
from planning_cells import MODELS, Cell, jsons_of, shallow_backbone
from training_corpus import make_corpus

from toolkit.cluster.process_group import free_port
from toolkit.corpus.packed import Corpus
from toolkit.cpu.allocator import keep_few_kernels
from toolkit.errors import EXIT_OUT_OF_MEMORY, EXIT_SMALLER_NEXT, EXIT_USER_ERROR
from toolkit.fitting.memory_limits import (
    LEAST_RESERVE,
    LEAST_RESERVE_OF_ADDRESSES,
    RESERVE,
    RESERVE_OF_ADDRESSES,
    addresses_of_a_run,
    with_reserve,
)
from toolkit.planning.cpu_plan import make_cpu_plan
from toolkit.planning.hardware import CPU_LIBRARIES, GIB
from toolkit.planning.subject import Subject
from toolkit.planning.workload import Workload
from toolkit.recipe.resolve import read_choice, resolve_named

ROOT = Path(__file__).resolve().parents[1]
CLIPS, HELD_OUT = 64, 4
STEPS = 2
OPS = ("shm_comm", "cpu_adam", "async_io")
MEMORY_CGROUPS = Path("/sys/fs/cgroup/memory")  # of version 1
# Where a limit lies between the memory of the smallest micro-batches and that of the largest.
TIGHTEST, LOOSEST = -0.1, 0.8
# What a rehearsal leaves: a share of what is free, and at least so many bytes.
RESERVES = {"addresses": (RESERVE_OF_ADDRESSES, LEAST_RESERVE_OF_ADDRESSES), "cgroup": (RESERVE, LEAST_RESERVE)}
POLLED_EVERY = 0.2  # seconds
OUT_OF_MEMORY = "out of memory"
ENDS = {0: "trained", EXIT_OUT_OF_MEMORY: OUT_OF_MEMORY, EXIT_SMALLER_NEXT: OUT_OF_MEMORY}


@dataclass(frozen=True)
class Draw:
    """One random run.

    Attributes:
        cell: its model and DeepSpeed JSON.
        ranks: how many.
        settings: of the recipe, which decide what it takes.
        by: what limits it, ``addresses`` of each rank or a ``cgroup`` of all.
        place: of the limit, from the memory of the smallest micro-batches (0) to that of the largest (1).
    """

    cell: Cell
    ranks: int
    settings: tuple[str, ...]
    by: str
    place: float


def random_runs(rows: Any, runs: int, folder: Path) -> None:
    """Draw and take runs, as rows of ``random``, and count those that ran out of memory."""
    # A compiler would not fit below the limit of a run.
    subprocess.run([sys.executable, str(ROOT / "launch" / "doctor.py"), "build-ops", *OPS], check=True)
    corpus = make_corpus(folder / "random_corpus", CLIPS, held_out=HELD_OUT)
    for number in range(runs):
        rows.measured("random", {"run": number}, lambda number=number: measure(number, corpus, folder))
    found = rows.results["random"]
    figure = {
        "ours_runs_out_of_memory": sum(row["end"] == OUT_OF_MEMORY for row in found),
        "runs": len(found),
        "trained": sum(row["end"] == ENDS[0] for row in found),
        "trained_with_less_than_all_clips": sum(row["end"] == ENDS[0] and row["binds"] for row in found),
        "refused_before_step_1": sum(row["end"] == "refused before step 1" for row in found),
        "other": sum(row["end"].startswith("other") for row in found),
        "target": "0",
    }
    rows.conclude("out_of_memory", figure)


def drawn(number: int) -> Draw:
    """The run of a number: always the same."""
    draw = random.Random(number)
    model = draw.choice(list(MODELS))
    ds = draw.choice(sorted(jsons_of(model)))
    settings = (
        f"training.global_batch_size={draw.choice((8, 16, 24))}",
        f"training.gradient_checkpointing={str(draw.random() < 0.3).lower()}",
        f"model.pose_encoder.stride={draw.choice((1, 2, 4))}",
        f"evaluation.num_beams={draw.choice((1, 2, 5))}",
        *(["training.ema=0.99"] if draw.random() < 0.3 and "nvme" not in ds else []),
    )
    by = draw.choice(("addresses", "cgroup") if has_cgroups() else ("addresses",))
    ranks, place = draw.choice((1, 1, 2)), round(draw.uniform(TIGHTEST, LOOSEST), 2)
    return Draw(Cell(model, ds, 1, recomputed=False), ranks, settings, by, place)


def has_cgroups() -> bool:
    """Whether this process may make memory cgroups, of version 1."""
    return os.access(MEMORY_CGROUPS, os.W_OK) and (MEMORY_CGROUPS / "cgroup.procs").exists()


def measure(number: int, corpus: Corpus, folder: Path) -> dict[str, Any]:
    """Take the run of a number."""
    draw = drawn(number)
    run = folder / f"run_{number}"
    overrides = [
        "model.from_scratch=true", "model.tokenizer=train", "data.source=table", f"data.corpus={corpus.path}",
        *draw.cell.spec.overrides, *shallow_backbone(draw.cell.spec, folder), *draw.settings,
        f"run.dir={run}", f"training.max_steps={STEPS}", "training.workers=0", "evaluation.max_new_tokens=8",
        "evaluation.samples=0",
    ]  # fmt: skip
    smallest, largest = planned(draw, overrides, corpus)
    # A rank may take what it holds and what is free, less a reserve: the limit that permits so much.
    own = libraries()[draw.by]
    own += addresses_of_a_run(draw.ranks) if draw.by == "addresses" else 0
    reserve = RESERVES[draw.by]
    needs = [own + with_reserve(size - CPU_LIBRARIES, *reserve) for size in (smallest, largest)]
    limit = needs[0] + draw.place * (needs[1] - needs[0])
    words = [sys.executable, str(ROOT / "launch" / "train.py"), "--recipe", draw.cell.spec.recipe]
    ended = run_limited([*words, "--ds", draw.cell.ds, "--new", *overrides], draw, int(limit), folder / str(number))
    choice = read_choice(run) if run.exists() else None
    found = {
        "model": draw.cell.model,
        "ds": draw.cell.ds,
        "ranks": draw.ranks,
        "settings": " ".join(draw.settings),
        "limited": draw.by,
        "limit_gib_a_rank": round(limit / GIB, 2),
        "planned_gib": f"{smallest / GIB:.2f} to {largest / GIB:.2f}",
        "chosen": f"{choice.clips} clips, {choice.frames or 'all'} frames" if choice else "",
        "binds": bool(choice) and " do not fit" in (choice.reason if choice else ""),
    }
    return found | ended


def planned(draw: Draw, overrides: list[str], corpus: Corpus) -> tuple[int, int]:
    """What a rank takes by its plan with one clip in a micro-batch, and with its whole share of a step."""
    resolved = resolve_named(draw.cell.spec.recipe, overrides, draw.ranks, has_gpu=False, ds=draw.cell.ds)
    train = corpus.splits["train"]
    frames = int(train.frames.max())
    tokens = min(resolved.recipe.training.max_target_tokens, 1 + max(len(text.encode()) for text in train.texts))
    workload = Workload(frames, tokens, frames, ((1, frames),), None, "the corpus")
    share = -(-resolved.recipe.training.global_batch_size // draw.ranks)
    subject = Subject.of(resolved.recipe)
    with few_kernels():
        plans = [make_cpu_plan(subject, resolved, workload, micro_batch_size=size) for size in (1, share)]
    smallest, largest = (int(max(plan.phases.values())) for plan in plans)
    return smallest, largest


@contextmanager
def few_kernels() -> Iterator[None]:
    """As in a rank whose memory or addresses are limited, which sees to it by itself."""
    before = dict(os.environ)
    keep_few_kernels()
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


# As a rank is after its first backward pass, in a process group; any limit decides how its threads take addresses.
READY = """
import resource
from toolkit.cpu.allocator import keep_freed_memory
resource.setrlimit(resource.RLIMIT_AS, (2**40, resource.getrlimit(resource.RLIMIT_AS)[1]))
keep_freed_memory()
import psutil, torch, toolkit.training.run, toolkit.fitting.rehearsal
from deepspeed.runtime.zero.muon import muon_optimizer
from toolkit.cluster.process_group import join_process_group
from toolkit.cluster.ranks import Ranks
join_process_group(Ranks())
torch.ones(2**20, requires_grad=True).square().sum().backward()
own = psutil.Process().memory_info()
print(own.rss, own.vms)
"""


@cache
def libraries() -> dict[str, int]:
    """Bytes of main memory and of addresses that a rank has without a model."""
    done = subprocess.run([sys.executable, "-c", READY], capture_output=True, text=True, check=True, cwd=ROOT)
    resident, addresses = map(int, done.stdout.splitlines()[-1].split())
    return {"cgroup": resident, "addresses": addresses}


def run_limited(command: list[str], draw: Draw, limit: int, out: Path) -> dict[str, Any]:
    """Start the ranks of a run under its limit; how it ended, and the most that one of them and all took."""
    out.mkdir()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    with limited(draw, limit) as enter:
        ranks: list[subprocess.Popen[bytes]] = []
        for rank in range(draw.ranks):
            own = environment | {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(draw.ranks), "LOCAL_SIZE": str(draw.ranks)
            }  # fmt: skip
            with (out / f"{rank}.txt").open("wb") as output:
                ranks.append(
                    subprocess.Popen(command, stdout=output, stderr=output, cwd=out, env=own, preexec_fn=enter)
                )
        peak = wait(ranks, "VmPeak" if draw.by == "addresses" else "VmHWM")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    codes = [rank.returncode for rank in ranks]
    output = "\n".join(
        (out / f"{rank}.txt").read_text(encoding="utf-8", errors="replace") for rank in range(len(ranks))
    )
    end = end_of(codes, output)
    return {
        "peak_gib_a_rank": round(peak / GIB, 2),
        "end": end,
        "last_line": "" if end == ENDS[0] else last_line(output),
        "seconds": round(time.monotonic() - started),
        "cpu_seconds": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime),
    }


@contextmanager
def limited(draw: Draw, limit: int) -> Iterator[Callable[[], None]]:
    """What each rank calls to be limited to so many bytes, in a cgroup together with the others."""
    if draw.by == "addresses":
        yield lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        return
    group = MEMORY_CGROUPS / f"auto-micro-batch-{os.getpid()}"

    def enter() -> None:
        (group / "cgroup.procs").write_text(str(os.getpid()), encoding="utf-8")

    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(limit * draw.ranks), encoding="utf-8")
        yield enter
    finally:
        end_all_in(group)
        group.rmdir()


def end_all_in(group: Path) -> None:
    """End what a rank has left behind, such as the compiler of an op."""
    while left := (group / "cgroup.procs").read_text().split():
        for pid in map(int, left):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(POLLED_EVERY)


def wait(ranks: list[subprocess.Popen[bytes]], line: str) -> int:
    """Wait for the ranks; the most that the status of one of them, or of a process that it started, had in a line."""
    most = 0
    while any(rank.poll() is None for rank in ranks):
        for rank in ranks:
            most = max([most, *(status_of(process, line) for process in family(rank.pid))])
        time.sleep(POLLED_EVERY)
    return most


def family(pid: int) -> list[int]:
    try:
        return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
    except psutil.Error:
        return []


def status_of(pid: int, name: str) -> int:
    """Bytes in a line of a process's status; 0 where it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def end_of(codes: list[int], output: str) -> str:
    """How a run ended, in words."""
    if not any(codes):
        return ENDS[0]
    memory = ("allocate memory", "MemoryError", "OutOfMemory", OUT_OF_MEMORY, "bad_alloc", "start new thread")
    if any(ENDS.get(code) == OUT_OF_MEMORY for code in codes):
        return OUT_OF_MEMORY
    if EXIT_USER_ERROR in codes and "micro_batch_size=auto: not one" in output:
        return "refused before step 1"
    if any(code < 0 for code in codes) or any(word in output for word in memory):
        return OUT_OF_MEMORY
    return f"other, exit codes {json.dumps(codes)}"


def last_line(output: str) -> str:
    lines = [line for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error:")]
    return (errors or lines or [""])[-1][:300]
