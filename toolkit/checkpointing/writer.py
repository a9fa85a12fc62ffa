"""Saving: the ranks copy what they train into memory and train on; a thread of each writes the copy to the disk.

Each rank writes, flushes and checksums its files in a folder with a temporary name. The threads report over a process
group of their own. When every rank has succeeded, rank 0 adds ``state.json`` and the manifest, renames the folder and
updates ``latest``. A crash or a full disk in between leaves the previous checkpoint intact.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from toolkit.checkpointing.checkpoints import (
    LATEST,
    MANIFEST,
    STATE,
    Progress,
    SavedState,
    complete_checkpoints,
    flush_folder,
    name_of,
    partial_name_of,
    remove_checkpoint,
    remove_unfinished,
)
from toolkit.checkpointing.random_states import random_states
from toolkit.checkpointing.tensor_files import checksum, write_tensors
from toolkit.checkpointing.zero_shards import Fragment, Shard, base_optimizer, saved_name, scalars_of, shards
from toolkit.cluster.devices import barrier
from toolkit.cluster.ranks import Ranks
from toolkit.cluster.tensor_parallel import parts_by_name, ranks_of
from toolkit.errors import UserError
from toolkit.files import write_text_atomically

FILE_BYTES = 1 << 29  # size of a file, about
COPIED_BYTES = 1 << 31  # the most that waits in memory to be written; beyond that, training waits
COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")
FINISH_SECONDS = 6.0  # after a failure, how long a checkpoint may take to become complete
SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class CheckpointWriter:
    """Writes the checkpoints of a run; its methods are collective.

    ``identity`` gives layout, recipe, corpus and base; progress, optimizer and counters are filled in at each save. All
    but the ``keep_last`` newest checkpoints are removed.
    """

    def __init__(self, folder: Path, identity: SavedState, *, keep_last: int, echo: Callable[[str], None]) -> None:
        self.folder = folder
        self.identity = identity
        self.keep_last = keep_last
        self.echo = echo
        self._group = dist.new_group(backend="gloo")
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._last: Future[UserError | None] | None = None
        # The models that the newest complete checkpoint lists, and those of the checkpoint that is being written.
        self._kept = [identity.progress.kept]
        self._naming = threading.Lock()
        self._discarded = False
        self._partial: Path | None = None  # of the last checkpoint
        if dist.get_rank() == 0:
            remove_unfinished(folder)
        barrier()

    def save(self, engine: Any, progress: Progress) -> None:
        """Start writing a checkpoint; returns when everything in it has been copied.

        It is complete after :meth:`wait` or the next :meth:`save`. If it cannot be written, ``echo`` prints why,
        training continues and the previous checkpoint stays.
        """
        self._finish_last()
        partial = self._partial = self.folder / partial_name_of(name_of(progress.step))
        files: dict[str, Future[str]] = {}
        waiting: deque[tuple[Future[str], int]] = deque()
        scaler = loss_scaler(engine)
        counters: dict[str, Any] = {name: int(getattr(engine, name)) for name in COUNTERS}
        counters["loss_scaler"] = {name: getattr(scaler, name) for name in SCALER_FIELDS if hasattr(scaler, name)}
        for number, (tensors, metadata, size) in enumerate(_portions(engine)):
            name = f"rank_{dist.get_rank():02d}_{number:02d}.safetensors"
            files[name] = self._thread.submit(_write, partial / name, tensors, metadata)
            waiting.append((files[name], size))
            while sum(size for _, size in waiting) > COPIED_BYTES:
                waiting.popleft()[0].exception()  # waits; _complete reports what went wrong
        state = replace(
            self.identity,
            progress=replace(progress),
            optimizer=type(base_optimizer(engine)).__name__,
            counters=counters,
        )
        self._last = self._thread.submit(self._complete, partial, state, files)
        self._kept.append(progress.kept)

    @property
    def models(self) -> set[int]:
        """Steps of the models that the checkpoint from which this run would resume may list."""
        return {step for kept in self._kept for step, _ in kept}

    def wait(self) -> None:
        """Wait until the last checkpoint is complete.

        Raises:
            UserError: it could not be written.
        """
        if (error := self._finish_last()) is not None:
            raise error

    def close(self) -> None:
        """Wait for a checkpoint that is being written, without reporting a problem, and end the thread."""
        with contextlib.suppress(RuntimeError):  # another rank has died
            self._finish_last()
        self._thread.shutdown()

    def finish_or_discard(self) -> None:
        """After a failure on any rank: wait shortly for a checkpoint that is being written, then discard it.

        Any thread may call this. Later calls of other methods have no effect.
        """
        last, self._last = self._last, None
        if last is not None:
            futures.wait([last], timeout=FINISH_SECONDS)
        self._thread.shutdown(wait=False, cancel_futures=True)
        with self._naming:  # a checkpoint that is complete stays
            self._discarded = True
        # By every rank: one that ends later may have written into the folder after the others removed it.
        if self._partial is not None:
            shutil.rmtree(self._partial, ignore_errors=True)

    def _finish_last(self) -> UserError | None:
        last, self._last = self._last, None
        if last is None:
            return None
        error = last.result()
        self._kept = self._kept[-1:] if error is None else self._kept[:-1]
        return error

    def _complete(self, partial: Path, state: SavedState, files: dict[str, Future[str]]) -> UserError | None:
        """Runs in the thread: agree with the other ranks, and rename the checkpoint; returns what went wrong."""
        mine: tuple[dict[str, str], str | None]
        try:
            mine = ({name: written.result() for name, written in files.items()}, None)
        except OSError as error:
            mine = ({}, f"{error.strerror or error} on rank {dist.get_rank()}")
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine, group=self._group)
        problem = [next((reason for _, reason in everyone if reason), None)]
        if dist.get_rank() == 0:
            if problem[0] is None:
                checksums = {name: value for written, _ in everyone for name, value in written.items()}
                problem[0] = self._name(partial, state, checksums)
            if problem[0] is not None:
                shutil.rmtree(partial, ignore_errors=True)
        dist.broadcast_object_list(problem, src=0, group=self._group)
        if problem[0] is None:
            return None
        found = complete_checkpoints(self.folder)
        kept = f"the last complete one is {found[-1]}" if found else "there is none yet"
        outcome = UserError(
            f"the checkpoint after step {state.progress.step} could not be written ({problem[0]}); {kept}",
            "make the disk of run.dir writable, with free space, and run the same command again",
        )
        if dist.get_rank() == 0:
            self.echo(outcome.message)
        return outcome

    def _name(self, partial: Path, state: SavedState, checksums: dict[str, str]) -> str | None:
        """Rename a folder with all ranks' files to a complete checkpoint; returns what went wrong."""
        with self._naming:
            return "the run has ended" if self._discarded else self._name_now(partial, state, checksums)

    def _name_now(self, partial: Path, state: SavedState, checksums: dict[str, str]) -> str | None:
        if unseen := [name for name in checksums if not (partial / name).is_file()]:
            return f"rank 0 does not see {unseen[0]}: run.dir must be on a file system that all nodes share"
        try:
            write_text_atomically(partial / STATE, json.dumps(asdict(state), indent=2) + "\n")
            checksums[STATE] = checksum(partial / STATE)
            write_text_atomically(partial / MANIFEST, json.dumps(checksums, indent=2) + "\n")
            flush_folder(partial)
            final = self.folder / name_of(state.progress.step)
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            flush_folder(self.folder)
            write_text_atomically(self.folder / LATEST, final.name + "\n")
            flush_folder(self.folder)
        except OSError as error:
            return error.strerror or str(error)
        except UserError as error:
            return str(error)
        for old in complete_checkpoints(self.folder)[: -self.keep_last]:
            remove_checkpoint(old)
        return None


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_tensors(path, tensors, metadata)


def _portions(engine: Any) -> Iterator[tuple[dict[str, Tensor], dict[str, Any], int]]:
    """Copies of what this rank saves, in portions of one file; a portion is copied when the caller asks for it.

    Yields:
        tensors by name, their metadata, and their size in bytes.
    """
    states, values = random_states()
    tensors = {f"random/{name}": tensor for name, tensor in states.items()}
    tensors |= {f"buffer/{name}": _copy(buffer) for name, buffer in persistent_buffers(engine.module)}
    metadata: dict[str, Any] = {"random": values, "fragments": {}}
    size, ranks = 0, ranks_of(engine.module)
    split = {saved_name(name, parameter) for name, parameter, _ in parts_by_name(engine.module)}
    for number, shard in enumerate(shards(engine)):
        whole = {"weights": shard.values, **shard.state}
        by_element = {key: value for key, value in whole.items() if _has_shape(value, shard.values.shape)}
        for key, value in whole.items():
            if isinstance(value, Tensor) and value.dim() > 0 and key not in by_element:
                tensors[f"shard_{number}/{key}"] = _copy(value)
        scalars = scalars_of(shard)
        for fragment in shard.fragments:
            start, numel = _own_part(shard, fragment, ranks)
            if numel == 0 or not (ranks.is_first_of_copy or fragment.name in split):
                continue
            metadata["fragments"][fragment.name] = {"start": start, "shape": fragment.shape, "scalars": scalars}
            begin = fragment.offset + start - fragment.start
            for key, value in by_element.items():
                copy = _copy(value.reshape(-1).narrow(0, begin, numel))
                tensors[f"{fragment.name}/{key}"] = copy
                size += copy.numel() * copy.element_size()
            if size >= FILE_BYTES:
                yield tensors, metadata, size
                tensors, metadata, size = {}, {"fragments": {}}, 0
    yield tensors, metadata, size


def _has_shape(value: Any, shape: torch.Size) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape == shape


def _own_part(shard: Shard, fragment: Fragment, ranks: Ranks) -> tuple[int, int]:
    """First element and number of elements of a fragment that this rank saves; ranks share a replicated one."""
    if not shard.replicated:
        return fragment.start, fragment.numel
    share = -(-fragment.numel // ranks.data_parallel_size)
    begin = min(share * ranks.data_parallel_rank, fragment.numel)
    return fragment.start + begin, min(share, fragment.numel - begin)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def persistent_buffers(module: Any) -> Iterator[tuple[str, Tensor]]:
    """Buffers that belong to the model's state, such as running means, by name."""
    for prefix, part in module.named_modules():
        for name, buffer in part.named_buffers(prefix, recurse=False):
            if name.removeprefix(f"{prefix}.") not in part._non_persistent_buffers_set:
                yield name, buffer


def loss_scaler(engine: Any) -> Any:
    """DeepSpeed's loss scaler, or None outside fp16."""
    if not engine.fp16_enabled():
        return None
    return getattr(engine.optimizer, "loss_scale_config", None) or engine.optimizer.loss_scaler
