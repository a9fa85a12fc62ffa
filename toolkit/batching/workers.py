"""Processes that prepare batches ahead of the model: started once for a whole run, and gone when it is.

They are forked, so that corpus, libraries and code cost no worker anything: before the process group, the GPU and all
threads, because a process that is forked beside a thread inherits the locks which that thread holds, and a copy of all
that is written later.
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

# Batches that each worker keeps ready: enough to ride out a slow read, few enough to bound memory.
PREFETCHED_BATCHES = 4
# A request to stop often goes to all processes of a job, but only the main one decides what it means: it saves, then
# closes the workers.
FOR_THE_PARENT = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP}


def start_workers(
    dataset: Dataset[Batch], tasks: Iterable[Any], workers: int, finish: Callable[[Batch], Batch]
) -> Iterator[Batch]:
    """Start processes that make ``dataset[task]`` of each task; they end with what is returned, or with this process.

    Args:
        dataset: makes a batch of a task, in the workers.
        tasks: what to make; read ahead in this process.
        workers: number of processes.
        finish: does the rest to a batch, in this process.

    Returns:
        the batches, in the order of the tasks; on a machine with GPUs in page-locked memory.
    """
    with warnings.catch_warnings():
        # Workers wait for the disk as well: more of them than cores are no mistake.
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        loader: DataLoader[Batch] = DataLoader(
            dataset,
            batch_size=None,
            sampler=tasks,
            num_workers=workers,
            multiprocessing_context="fork",
            worker_init_fn=_become_worker,
            prefetch_factor=PREFETCHED_BATCHES,
            # By default the iterator draws from the global generator, and a resumed run, which makes one in the middle
            # of an epoch, would drop out other units than the run that it continues.
            generator=torch.Generator(),
        )
        # No moment in which a worker would take a signal for its own; it inherits the mask, and keeps it.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, FOR_THE_PARENT)
        try:
            batches = iter(loader)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
    finished = map(finish, batches)
    return _pinned_ahead(finished) if torch.cuda.is_available() else finished


def _pinned_ahead(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The same batches in page-locked memory, one ahead.

    torch's loader would do it, but as it starts the workers it takes hold of the GPU, and of the first one at that.
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
        thread.shutdown(wait=False)  # a worker may wait for its disk


def _become_worker(_: int) -> None:
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    assert parent and parent.pid
    threading.Thread(target=_end_with_the_parent, args=[parent.pid], daemon=True).start()


def _end_with_the_parent(parent: int) -> None:
    """End when the parent is dead, or says so by SIGTERM, by which Python ends the workers of a run left half-way.

    torch's workers see by themselves that the parent died, but then wait for somebody to read what they have prepared.
    """
    while os.getppid() == parent:
        told = signal.sigtimedwait({signal.SIGTERM}, 2.0)
        if told and told.si_pid == parent:
            break
    os._exit(0)
