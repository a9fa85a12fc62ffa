"""Loading: every rank takes from a checkpoint's files what it keeps now, whichever ranks and ZeRO stage had kept it.

A run that goes on as it was finds all it needs in its own rank's files, to the last bit. One that goes on with another
number of ranks, ZeRO stage, offload or precision reads the same files, at other places.
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
    set_scalars,
    state_dtype,
    steps_of,
)
from toolkit.errors import UserError

# Optimizers that keep the same state of the same method, so that one can go on where another left off.
ADAMS = {"Adam", "AdamW", "DeepSpeedCPUAdam", "FusedAdam"}
# Optimizers whose state is one number for each weight, whatever other weights are in its shard.
ELEMENTWISE = ADAMS | {"Lion"}


class _Files:
    """What all files of a checkpoint hold, by parameter.

    Args:
        checkpoint: its folder.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.scalars: dict[str, dict[str, Any]] = {}
        self.random: dict[int, dict[str, Any]] = {}  # by rank
        # parameter -> weights, exp_avg, ... -> where a piece begins in the flattened parameter, its elements, its file
        self.pieces: dict[str, dict[str, list[tuple[int, int, Any]]]] = defaultdict(lambda: defaultdict(list))
        # (rank, what it is part of) -> name -> its file
        self.whole: dict[tuple[int, str], dict[str, Any]] = defaultdict(dict)
        for path in sorted(checkpoint.glob(RANK_FILES)):
            rank = int(path.stem.split("_")[1])
            metadata, file = read_metadata(path), safe_open(path, framework="pt")
            if "random" in metadata:
                self.random[rank] = metadata["random"]
            for stored in file.keys():  # noqa: SIM118 - it is no dict
                fragment = metadata["fragments"].get(stored.rsplit("/", 1)[0])
                if fragment is None:
                    part, name = stored.split("/", 1)
                    self.whole[rank, part][name] = file
                    continue
                name, key = stored.rsplit("/", 1)
                numel = file.get_slice(stored).get_shape()[0]
                self.pieces[name][key].append((fragment["start"], numel, file))
                self.shapes[name] = tuple(fragment["shape"])
                self.scalars[name] = fragment["scalars"]

    def of_rank(self, rank: int, part: str) -> dict[str, Tensor]:
        """The tensors that one rank has stored whole as ``part``: ``random``, ``buffer`` or ``shard_0``."""
        return {name: file.get_tensor(f"{part}/{name}") for name, file in self.whole[rank, part].items()}

    def dtype(self, name: str, key: str) -> torch.dtype:
        _, _, file = self.pieces[name][key][0]
        return file.get_slice(f"{name}/{key}")[:1].dtype

    def fill(self, target: Tensor, name: str, key: str, start: int) -> None:
        """Fill ``target`` [elements] with what is stored from element ``start`` of a flattened parameter on."""
        missing = target.numel()
        for begin, numel, file in self.pieces[name][key]:
            first, last = max(start, begin), min(start + target.numel(), begin + numel)
            if first < last:
                piece = file.get_slice(f"{name}/{key}")[first - begin : last - begin]
                target.narrow(0, first - start, last - first).copy_(piece)
                missing -= last - first
        if missing:
            raise UserError(f"the checkpoint lacks {missing} elements of {name}/{key}: start again with --new")


def load_checkpoint(
    engine: Any, checkpoint: Path, state: SavedState, *, layout: dict[str, Any], seed: int
) -> list[str]:
    """Load a verified checkpoint into the engine, and this rank's random state; all ranks must call this.

    Args:
        engine: the DeepSpeed engine, of any ZeRO stage.
        checkpoint: folder of the checkpoint.
        state: as ``read_state`` gave it.
        layout: of this run; where it is another than the checkpoint's, the state is converted on the way.
        seed: of the run, for ranks that did not exist before.

    Returns:
        lines that say what is not as it was.

    Raises:
        UserError: the checkpoint is of another model, or its optimizer's state cannot be converted.
    """
    files = _Files(checkpoint)
    _check_parameters(engine.module, files, checkpoint)
    notes = _differences(state, layout)
    _check_optimizer(engine, state, checkpoint, changed=bool(notes))
    rank = dist.get_rank()
    same_optimizer = state.optimizer == type(base_optimizer(engine)).__name__
    steps: set[int] = set()
    for number, shard in enumerate(rewrite_shards(engine)):
        for fragment in shard.fragments:
            for key in files.pieces[fragment.name]:
                target = shard.values if key == "weights" else shard.state.get(key)
                if target is None:
                    dtype = state_dtype(engine, shard, key, files.dtype(fragment.name, key))
                    target = shard.state[key] = torch.zeros_like(shard.values, dtype=dtype, requires_grad=False)
                part = target.data.view(-1).narrow(0, fragment.offset, fragment.numel)
                files.fill(part, fragment.name, key, fragment.start)
            scalars = files.scalars[fragment.name]
            set_scalars(engine, shard, scalars, same_optimizer=same_optimizer)
            steps.add(steps_of(scalars))
        for key, tensor in files.of_rank(rank, f"shard_{number}").items():
            shard.state[key] = tensor.to(shard.values.device)
    replay_steps(engine, steps)
    buffers = files.of_rank(rank, "buffer") or files.of_rank(0, "buffer")
    for name, buffer in persistent_buffers(engine.module):
        buffer.copy_(buffers[name])
    for name in COUNTERS:
        setattr(engine, name, state.counters[name])
    if scaler := loss_scaler(engine):
        for name, value in state.counters["loss_scaler"].items():
            setattr(scaler, name, value)
    if rank in files.random:
        set_random_states(files.of_rank(rank, "random"), files.random[rank])
    else:
        seed_everything(seed + 1 + rank + 1_000_003 * state.progress.step)
    new = dist.get_world_size() - len(files.random)
    if new > 0:
        who = "1 rank is new: its" if new == 1 else f"{new} ranks are new: their"
        notes.append(f"{who} dropout is drawn from training.seed={seed}, the rank and the step")
    return notes


def _differences(state: SavedState, layout: dict[str, Any]) -> list[str]:
    """What is not as it was when the checkpoint was saved."""
    changed = [
        f"{key.replace('_', ' ')} {state.layout[key]} -> {value}"
        for key, value in layout.items()
        if state.layout[key] != value
    ]
    return [f"converted from another layout: {', '.join(changed)}"] if changed else []


def _check_parameters(module: Any, files: _Files, checkpoint: Path) -> None:
    here = {
        name: tuple(getattr(parameter, "ds_shape", parameter.shape))
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }
    if here == files.shapes:
        return
    lacking, strange = sorted(here.keys() - files.shapes.keys()), sorted(files.shapes.keys() - here.keys())
    other = sorted(name for name in here.keys() & files.shapes.keys() if here[name] != files.shapes[name])
    told = [
        f"{what} {names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
        for what, names in (("it lacks", lacking), ("it has", strange), ("another shape has", other))
        if names
    ]
    raise UserError(
        f"{checkpoint} is of another model ({'; '.join(told)}): use the recipe that it was saved with, or another "
        "run.dir to begin anew"
    )


def _check_optimizer(engine: Any, state: SavedState, checkpoint: Path, *, changed: bool) -> None:
    now = type(base_optimizer(engine)).__name__
    if state.optimizer != now and not {state.optimizer, now} <= ADAMS:
        raise UserError(
            f"{checkpoint} holds the state of {state.optimizer}, and this run uses {now}: go on with the "
            "training.optimizer and the offload that it was saved with, or begin anew with --new"
        )
    if changed and state.optimizer not in ELEMENTWISE:
        raise UserError(
            f"{checkpoint} holds states of {state.optimizer} that only the layout which saved them can read "
            f"({', '.join(f'{key} {value}' for key, value in state.layout.items())}): go on with that, or begin anew "
            "with --new"
        )
