"""Loading: every rank reads its shards from a checkpoint's files, whichever ranks and ZeRO stage wrote them.

A run that resumes with the same layout reads its own rank's files and continues bit for bit. With another number of
ranks, ZeRO stage, offload or precision it reads the same files at other places.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch import distributed as dist

from toolkit.checkpointing.checkpoints import RANK_FILES, SavedState
from toolkit.checkpointing.random_states import seed_everything, set_random_states
from toolkit.checkpointing.tensor_files import read_metadata
from toolkit.checkpointing.writer import COUNTERS, loss_scaler, persistent_buffers
from toolkit.checkpointing.zero_shards import (
    base_optimizer,
    replay_steps,
    rewrite_shards,
    saved_shapes,
    set_scalars,
    state_dtype,
    steps_of,
)
from toolkit.cluster.ranks import Ranks
from toolkit.cluster.tensor_parallel import ranks_of
from toolkit.errors import UserError

# Optimizers of one method with the same states, so that each can resume from the state of another.
ADAMS = {"Adam", "AdamW", "DeepSpeedCPUAdam", "FusedAdam"}
# Optimizers whose state is one number for each weight, independent of the other weights in its shard.
ELEMENTWISE = ADAMS | {"Lion"}


class _Files:
    """The tensors in all files of a checkpoint, by parameter."""

    def __init__(self, checkpoint: Path) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.scalars: dict[str, dict[str, Any]] = {}
        self.random: dict[int, dict[str, Any]] = {}  # by rank
        # parameter -> weights, exp_avg, ... -> of each part: start in the flattened parameter, number of elements, file
        self.parts: dict[str, dict[str, list[tuple[int, int, Any]]]] = defaultdict(lambda: defaultdict(list))
        # (rank, group of tensors) -> name -> file
        self.whole: dict[tuple[int, str], dict[str, Any]] = defaultdict(dict)
        for path in sorted(checkpoint.glob(RANK_FILES)):
            rank = int(path.stem.split("_")[1])
            metadata, file = read_metadata(path), safe_open(path, framework="pt")
            if "random" in metadata:
                self.random[rank] = metadata["random"]
            for stored in file.keys():  # noqa: SIM118 - it is no dict
                fragment = metadata["fragments"].get(stored.rsplit("/", 1)[0])
                if fragment is None:
                    group, name = stored.split("/", 1)
                    self.whole[rank, group][name] = file
                    continue
                name, key = stored.rsplit("/", 1)
                numel = file.get_slice(stored).get_shape()[0]
                self.parts[name][key].append((fragment["start"], numel, file))
                self.shapes[name] = tuple(fragment["shape"])
                self.scalars[name] = fragment["scalars"]

    def of_rank(self, rank: int, group: str) -> dict[str, Tensor]:
        """The tensors that one rank stored whole as ``group``: ``random``, ``buffer`` or ``shard_0``."""
        return {name: file.get_tensor(f"{group}/{name}") for name, file in self.whole[rank, group].items()}

    def dtype(self, name: str, key: str) -> torch.dtype:
        _, _, file = self.parts[name][key][0]
        return file.get_slice(f"{name}/{key}")[:1].dtype

    def fill(self, target: Tensor, name: str, key: str, start: int) -> None:
        """Fill ``target`` [elements] with the stored elements of a flattened parameter, from ``start`` on."""
        missing = target.numel()
        for begin, numel, file in self.parts[name][key]:
            first, last = max(start, begin), min(start + target.numel(), begin + numel)
            if first < last:
                values = file.get_slice(f"{name}/{key}")[first - begin : last - begin]
                target.narrow(0, first - start, last - first).copy_(values)
                missing -= last - first
        if missing:
            raise UserError(
                f"the checkpoint lacks {missing} elements of {name}/{key}",
                "resume from another checkpoint with --resume, or start again with --new",
            )


def load_checkpoint(
    engine: Any, checkpoint: Path, state: SavedState, *, layout: dict[str, Any], seed: int
) -> list[str]:
    """Load a verified checkpoint into the engine, and this rank's random state; all ranks must call this.

    Where the run's ``layout`` differs from the checkpoint's, the state is converted. Ranks that the checkpoint does not
    have are seeded by the run's ``seed``.

    Returns:
        lines that say what has changed.

    Raises:
        UserError: the checkpoint is of another model, or its optimizer's state cannot be converted.
    """
    files = _Files(checkpoint)
    _check_division(state, layout, checkpoint)
    _check_parameters(engine.module, files, checkpoint)
    notes = _differences(state, layout)
    _check_optimizer(engine, state, checkpoint, changed=bool(notes))
    _load_shards(engine, files, state)
    _load_buffers(engine, files)
    _load_counters(engine, state)
    return notes + _load_random_states(files, ranks_of(engine.module), seed, state.progress.step)


def _load_shards(engine: Any, files: _Files, state: SavedState) -> None:
    """Weights and optimizer states."""
    same_optimizer = state.optimizer == type(base_optimizer(engine)).__name__
    steps: set[int] = set()
    for number, shard in enumerate(rewrite_shards(engine)):
        for fragment in shard.fragments:
            for key in files.parts[fragment.name]:
                target = shard.values if key == "weights" else shard.state.get(key)
                if target is None:
                    dtype = state_dtype(engine, shard, key, files.dtype(fragment.name, key))
                    target = shard.state[key] = torch.zeros_like(shard.values, dtype=dtype, requires_grad=False)
                part = target.data.view(-1).narrow(0, fragment.offset, fragment.numel)
                files.fill(part, fragment.name, key, fragment.start)
            scalars = files.scalars[fragment.name]
            set_scalars(engine, shard, scalars, same_optimizer=same_optimizer)
            steps.add(steps_of(scalars))
        for key, tensor in files.of_rank(dist.get_rank(), f"shard_{number}").items():
            shard.state[key] = tensor.to(shard.values.device)
    replay_steps(engine, steps)


def _load_buffers(engine: Any, files: _Files) -> None:
    buffers = files.of_rank(dist.get_rank(), "buffer") or files.of_rank(0, "buffer")
    for name, buffer in persistent_buffers(engine.module):
        buffer.copy_(buffers[name])


def _load_counters(engine: Any, state: SavedState) -> None:
    """The engine's counters, and fp16's loss scale."""
    for name in COUNTERS:
        setattr(engine, name, state.counters[name])
    if scaler := loss_scaler(engine):
        for name, value in state.counters["loss_scaler"].items():
            setattr(scaler, name, value)


def _load_random_states(files: _Files, ranks: Ranks, seed: int, step: int) -> list[str]:
    """This rank's random states; a rank that the checkpoint does not have is seeded. Returns a note on such ranks."""
    if ranks.rank in files.random:
        set_random_states(files.of_rank(ranks.rank, "random"), files.random[ranks.rank])
    else:
        seed_everything(seed + 1 + ranks.data_parallel_rank + 1_000_003 * step)
    new = ranks.world_size - len(files.random)
    if new <= 0:
        return []
    words = "1 rank is new: its" if new == 1 else f"{new} ranks are new: their"
    return [f"{words} dropout is drawn from training.seed={seed}, the rank and the step"]


def _differences(state: SavedState, layout: dict[str, Any]) -> list[str]:
    """A line on how the layout differs from that of the checkpoint, if it does."""
    changed = [
        f"{key.replace('_', ' ')} {state.layout[key]} -> {value}"
        for key, value in layout.items()
        if state.layout[key] != value
    ]
    return [f"converted from another layout: {', '.join(changed)}"] if changed else []


def _check_division(state: SavedState, layout: dict[str, Any], checkpoint: Path) -> None:
    """Raise UserError where AutoTP has split the layers into other parts than now."""
    before, now = (found.get("tensor_parallel_size", 1) for found in (state.layout, layout))
    if before != now:
        size = (
            f"tensor_parallel.autotp_size={before} on a multiple of {before} ranks"
            if before > 1
            else "tensor_parallel=null"
        )
        raise UserError(
            f"{checkpoint} was saved with tensor_parallel.autotp_size={before}, and this run has {now}: the parts of "
            "weights are not converted",
            f"resume with ds.{size}, or start again from its best/ with model.init_from",
        )


def _check_parameters(module: Any, files: _Files, checkpoint: Path) -> None:
    here = saved_shapes(module)
    if here == files.shapes:
        return
    found = files.shapes
    differing = {
        "it lacks": sorted(here.keys() - found.keys()),
        "it has": sorted(found.keys() - here.keys()),
        "another shape has": sorted(name for name in here.keys() & found.keys() if here[name] != found[name]),
    }
    listed = [
        f"{what} {names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
        for what, names in differing.items()
        if names
    ]
    raise UserError(
        f"{checkpoint} is of another model ({'; '.join(listed)})",
        "use the recipe that it was saved with, or start from scratch in another run.dir",
    )


def _check_optimizer(engine: Any, state: SavedState, checkpoint: Path, *, changed: bool) -> None:
    now = type(base_optimizer(engine)).__name__
    if state.optimizer != now and not {state.optimizer, now} <= ADAMS:
        raise UserError(
            f"{checkpoint} holds the state of {state.optimizer}, and this run uses {now}",
            "resume with the training.optimizer and the offload that it was saved with, or start again with --new",
        )
    if changed and state.optimizer not in ELEMENTWISE:
        layout = ", ".join(f"{key} {value}" for key, value in state.layout.items())
        raise UserError(
            f"{checkpoint} holds states of {state.optimizer}, which cannot be converted from its layout ({layout})",
            "resume with that layout, or start again with --new",
        )
