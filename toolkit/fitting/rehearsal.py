"""A rehearsal: micro-batches of chosen shapes through the run's own engine, in a process that is thrown away.

Each rank starts one process beside it. It builds the run's model and DeepSpeed engine on the rank's device, and takes
steps in it: forward and backward passes, the gradient's norm, clipping, the update, at any ZeRO stage and with any
offload. Nothing of it reaches the training run: neither gradients nor moments nor random states, and all of its memory
is free again when it ends, also after it ran out of memory or was killed by the kernel. Gradients that are thrown away
in the run's own engine would not be gone: each of DeepSpeed's optimizers keeps others between two backward passes.

No rank waits for another in a rehearsal: the process group is torch's ``fake`` backend, whose collectives return at
once. A rank that runs out of memory therefore leaves no other in a collective; the ranks compare their results
afterwards. What is gathered and summed has no meaning, only its size.
"""

from __future__ import annotations

import contextlib
import copy
import multiprocessing
import os
import shutil
import signal
import traceback
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from toolkit.cluster import failures
from toolkit.cluster.memory_shortage import is_out_of_memory
from toolkit.cluster.ranks import Ranks
from toolkit.corpus.packed import Corpus
from toolkit.errors import UserError, first_line
from toolkit.fitting.rehearsal_engine import Measured, RehearsalEngine
from toolkit.planning.sizes.shapes import Lengths, Shape
from toolkit.recipe.resolve import ResolvedRun
from toolkit.training.engine import out_of_collections

KILLED_FIRST = 1000  # of /proc/PID/oom_score_adj: the kernel ends the rehearsal and not the run


class Rehearsal:
    """The rehearsing process of one rank, from the first question to :meth:`close`."""

    def __init__(
        self, resolved: ResolvedRun, ranks: Ranks, corpus: Corpus, lengths: Lengths, threads: int, *, has_gpu: bool
    ) -> None:
        self._arguments = (_with_own_swap(resolved, ranks.rank), ranks, corpus, lengths, threads)
        self._has_gpu = has_gpu
        self._process: Any = None
        self._connection: Connection | None = None

    def step(self, shapes: Sequence[Shape], *, recomputes: bool) -> Measured:
        """One optimizer step over micro-batches of these shapes, whose activations are recomputed or kept."""
        return self._ask("step", shapes, recomputes=recomputes)

    def passes(self, shape: Shape) -> Measured:
        """One forward and backward pass, without a step."""
        return self._ask("passes", [shape])

    def at_most(self, shapes: Sequence[Shape]) -> Measured:
        """What a step over these micro-batches takes on CPUs at most, by the passes until now; it is not taken."""
        return self._ask("at_most", shapes)

    def traced(self, shapes: Sequence[Shape]) -> Measured:
        """The same, closer: a second's work."""
        return self._ask("traced", shapes)

    def translation(self, shapes: Sequence[Shape]) -> Measured:
        """The search of an evaluation over the heaviest of some batches, to the last token."""
        return self._ask("translation", shapes)

    def start(self) -> Measured:
        """Build the engine, which the first question does otherwise."""
        return self._ask("start", [])

    def close(self) -> None:
        """End the process and wait for its end, when its memory is free again."""
        if self._process is not None:
            if self._connection:
                self._connection.close()
            self._process.kill()
            self._process.join()
            self._process = self._connection = None
        for folder in _swap_folders(self._arguments[0]):
            shutil.rmtree(folder, ignore_errors=True)

    def _ask(self, task: str, shapes: Sequence[Shape], **settings: bool) -> Measured:
        try:
            if self._process is None:
                self._open()
            assert self._connection
            self._connection.send((task, list(shapes), settings))
            answer: Measured = self._connection.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self._process.join()
            answer = Measured(problem=f"its process ended with exit code {self._process.exitcode}")
        if answer.problem or answer.error:
            self.close()  # an engine that was left in the middle of a pass is of no use
        return answer

    def _open(self) -> None:
        # A fork has the memory of the libraries already, and costs no start. CUDA does not survive one.
        context: Any = multiprocessing.get_context("spawn" if self._has_gpu else "fork")
        self._connection, theirs = context.Pipe()
        # Of a fork the end of this rank is closed there, too: else the process would not see that this rank is gone.
        other = None if self._has_gpu else self._connection
        self._process = context.Process(target=_rehearse, args=(theirs, other, *self._arguments), daemon=True)
        with failures.without_watching(), out_of_collections():
            self._process.start()
        theirs.close()


def _with_own_swap(resolved: ResolvedRun, rank: int) -> ResolvedRun:
    """The run with folders of its own for what it offloads to NVMe: all rehearsals take themselves for rank 0."""
    config = copy.deepcopy(resolved.deepspeed)
    for section in _nvme_sections(config):
        section["nvme_path"] = f"{section['nvme_path']}-rehearsal-{os.getpid()}-{rank}"
    return replace(resolved, deepspeed=config)


def _swap_folders(resolved: ResolvedRun) -> list[str]:
    return [section["nvme_path"] for section in _nvme_sections(resolved.deepspeed)]


def _nvme_sections(config: dict[str, Any]) -> list[dict[str, Any]]:
    sections = config.get("zero_optimization", {}).values()
    return [section for section in sections if isinstance(section, dict) and section.get("device") == "nvme"]


def _rehearse(
    connection: Connection,
    other: Connection | None,
    resolved: ResolvedRun,
    ranks: Ranks,
    corpus: Corpus,
    lengths: Lengths,
    threads: int,
) -> None:
    """The process: answer one question after the other, until the other end is closed."""
    if other:
        other.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal; the rank ends this one
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # Progress bars make semaphores, which those of the method "spawn" would leave behind: this process is killed.
    multiprocessing.set_start_method("fork", force=True)
    _be_quiet()
    engine = None
    while True:
        try:
            task, shapes, settings = connection.recv()
        except (EOFError, OSError):
            os._exit(0)
        try:
            if engine is None:
                engine = RehearsalEngine.build(resolved, ranks, corpus, lengths, threads)
            answer = getattr(engine, task)(shapes, **settings)
        except UserError as error:
            answer = Measured(error=(UserError, error.args))
        except Exception as error:
            if is_out_of_memory(error):
                answer = Measured(problem="out of memory")
            else:
                answer = Measured(error=(RuntimeError, (_where_and_what(error),)))
        connection.send(answer)


def _where_and_what(error: Exception) -> str:
    """A line on an error that the run did not expect. CUDA's errors say first what happened, and then how to debug."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{place.filename} line {place.lineno}: {place.line} | {type(error).__name__}: {first_line(error)}"


def _be_quiet() -> None:
    """Libraries print as they do when a run starts, which then prints it again."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nothing, stream)
    with contextlib.suppress(OSError):  # not Linux
        Path("/proc/self/oom_score_adj").write_text(str(KILLED_FIRST))
