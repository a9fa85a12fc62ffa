"""Worker processes that load batches ahead of the model, started once for a whole run.

They are forked, so that they share the memory of libraries and code. They must be forked before the process group, the
GPU and all threads are started, because a process that is forked while a thread runs inherits its locks.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from toolkit.batching.collate import Batch

# Batches that each worker loads ahead: enough for a slow read, and few enough to bound memory.
PREFETCHED_BATCHES = 4
# A signal to stop often reaches all processes of a job; the parent handles it: it saves, then closes the workers.
HANDLED_BY_PARENT = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP}


def start_workers(
    dataset: Dataset[Batch], tasks: Iterable[Any], workers: int, finish: Callable[[Batch], Batch]
) -> Iterator[Batch]:
    """Start processes that load ``dataset[task]`` for each task; they end with the returned iterator or this process.

    This process reads the tasks ahead, and completes each batch by ``finish``.

    Returns:
        the batches, in the order of the tasks; on a machine with GPUs in page-locked memory.
    """
    with warnings.catch_warnings():
        # More workers than cores are useful, because workers also wait for the disk.
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        loader: DataLoader[Batch] = DataLoader(
            dataset,
            batch_size=None,
            sampler=tasks,
            num_workers=workers,
            multiprocessing_context="fork",
            worker_init_fn=_become_worker,
            prefetch_factor=PREFETCHED_BATCHES,
            # By default the iterator draws from the global generator; a resumed run, which creates the iterator in the
            # middle of an epoch, would then have another dropout than the run that it resumes.
            generator=torch.Generator(),
        )
        # Signals are blocked before the workers start; they inherit the mask and keep it.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, HANDLED_BY_PARENT)
        try:
            batches = iter(loader)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
    finished = map(finish, batches)
    return _pinned_ahead(finished) if torch.cuda.is_available() else finished


def _pinned_ahead(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The same batches in page-locked memory, one ahead.

    torch's loader can do this, but it initialises the GPU, and always the first one, as it starts the workers.
    """

    def next_one() -> Batch | None:
        batch = next(batches, None)
        return batch.pin_memory() if batch is not None else None

    thread = ThreadPoolExecutor(1, thread_name_prefix="pinning")
    try:
        ahead = thread.submit(next_one)
        while (batch := ahead.result()) is not None:
            ahead = thread.submit(next_one)
            yield batch
    finally:
        thread.shutdown(wait=False)  # without waiting for a worker that reads from a slow disk


def _become_worker(_: int) -> None:
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    assert parent and parent.pid
    threading.Thread(target=_end_with_parent, args=[parent.pid], daemon=True).start()


def _end_with_parent(parent: int) -> None:
    """End when the parent has died, or sends SIGTERM, as Python does to workers at its exit.

    torch's workers notice the death of the parent, too, but then wait for a reader of the batches they have loaded.
    """
    while os.getppid() == parent:
        received = signal.sigtimedwait({signal.SIGTERM}, 2.0)
        if received and received.si_pid == parent:
            break
    os._exit(0)
