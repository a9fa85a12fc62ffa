"""Checkpoints: DeepSpeed's sharded state and everything else that a run needs to go on as if it had never stopped.

    checkpoints/step_000500/   DeepSpeed's shards, rng_rank_00.pt of every rank, state.json, manifest.json
    checkpoints/latest         the name of the newest complete one

A checkpoint is written under another name, checksummed, flushed to the disk and only then renamed; ``latest`` follows
last. Whatever dies in between leaves the previous checkpoint intact. Shards are pickles, so their checksums are
verified before they are read.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import distributed as dist

from toolkit.errors import UserError
from toolkit.recipe.files import write_text_atomically

LATEST = "latest"
MANIFEST = "manifest.json"
STATE = "state.json"


@dataclass
class Progress:
    """Where a run stands.

    Attributes:
        step: optimizer steps done.
        epoch: the epoch that goes on, from 0.
        epoch_step: optimizer steps of it that are done.
        best: the best dev scores so far, as ``dataclasses.asdict`` of ``Scores``; None before the first evaluation.
        best_step: optimizer steps done when they were reached.
        seconds: spent in training steps.
        clips: trained on, each as often as it came.
    """

    step: int = 0
    epoch: int = 0
    epoch_step: int = 0
    best: dict[str, Any] | None = None
    best_step: int | None = None
    seconds: float = 0.0
    clips: int = 0


def save_checkpoint(engine: Any, folder: Path, progress: Progress, *, layout: dict[str, Any], keep_last: int) -> Path:
    """Write a checkpoint; all ranks must call this after the same step.

    Args:
        engine: the DeepSpeed engine.
        folder: the run's ``checkpoints``.
        progress: saved as ``state.json``.
        layout: what a resuming run must share (world size, ZeRO stage).
        keep_last: older checkpoints beyond this number are removed.

    Raises:
        OSError: the disk is full or not writable; the previous checkpoint is intact.
    """
    name = f"step_{progress.step:06d}"
    partial = folder / f".{name}.partial"
    rank = dist.get_rank()
    if rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    engine.save_checkpoint(str(folder), tag=partial.name, save_latest=False, exclude_frozen_parameters=False)
    torch.save(_random_state(), partial / f"rng_rank_{rank:02d}.pt")
    dist.barrier()
    if rank == 0:
        write_text_atomically(partial / STATE, json.dumps({"progress": asdict(progress), "layout": layout}, indent=2))
        write_text_atomically(partial / MANIFEST, json.dumps(_checksums(partial), indent=2))
        final = folder / name
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        write_text_atomically(folder / LATEST, name + "\n")
        for old in complete_checkpoints(folder)[:-keep_last]:
            shutil.rmtree(old)
    dist.barrier()
    return folder / name


def complete_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in ``folder``, oldest first; unfinished ones have another name."""
    return sorted(path for path in folder.glob("step_*") if (path / MANIFEST).is_file())


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint, if there is one."""
    found = complete_checkpoints(folder)
    return found[-1] if found else None


def read_progress(checkpoint: Path, layout: dict[str, Any], *, verify: bool = True) -> Progress:
    """Read where a checkpoint stands; needs no process group.

    Args:
        checkpoint: its folder.
        layout: what this run shares with the one that saved.
        verify: compare every file with its checksum.

    Raises:
        UserError: a file is missing or changed, or the checkpoint has another layout.
    """
    manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
    for name, checksum in manifest.items() if verify else ():
        path = checkpoint / name
        if not path.is_file() or _checksum(path) != checksum:
            raise UserError(
                f"{path} is {'damaged' if path.is_file() else 'missing'}: remove {checkpoint} to go on from the "
                "checkpoint before it, or start again with --new"
            )
    state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    for key, value in layout.items():
        saved = state["layout"].get(key)
        if saved != value:
            raise UserError(
                f"{checkpoint} was saved with {key.replace('_', ' ')} {saved} and cannot go on with {value}: "
                f"use {saved} again, or start anew with --new or run.dir=FOLDER"
            )
    return Progress(**state["progress"])


def load_checkpoint(engine: Any, checkpoint: Path) -> None:
    """Load a verified checkpoint into the engine, and this rank's random state; all ranks must call this."""
    engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
    restore = torch.load(checkpoint / f"rng_rank_{dist.get_rank():02d}.pt", weights_only=True)
    _set_random_state(restore)


def _random_state() -> dict[str, Any]:
    """The state of every generator that a step may draw from, as tensors and plain values."""
    numpy_state: Any = np.random.get_state(legacy=True)
    name, keys, position, has_gauss, gauss = numpy_state
    version, internal, gauss_next = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss],
        "python": [version, list(internal), gauss_next],
    }


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    name, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))


def _checksums(folder: Path) -> dict[str, str]:
    """xxh3 of every file, which is flushed to the disk on the way."""
    return {
        str(path.relative_to(folder)): _checksum(path, flush=True)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }


def _checksum(path: Path, *, flush: bool = False) -> str:
    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
        if flush:
            os.fsync(file.fileno())
    return digest.hexdigest()
