"""Checkpoints on disk: which are there, which one a run resumes from, and whether its files are intact.

    checkpoints/step_000500/rank_00_00.safetensors   of rank 0: its weights, optimizer states and random states
                            rank_01_00.safetensors   the same of rank 1; a large one continues in rank_01_01, ...
                            state.json               progress, layout, recipe and corpus
                            manifest.json            the checksum of each of these files
    checkpoints/latest      the name of the newest complete one

``writer.py`` and ``reader.py`` store everything by parameter name and by position in the parameter, so a run can resume
with another number of ranks and another ZeRO stage. Frozen weights are not stored: building the model restores them.
Nothing here needs a process group.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from toolkit.checkpointing.kept_models import Kept
from toolkit.checkpointing.tensor_files import checksum
from toolkit.errors import UserError
from toolkit.files import next_free, write_text_atomically

LATEST = "latest"
MANIFEST = "manifest.json"
STATE = "state.json"
RANK_FILES = "rank_*.safetensors"
FORMAT = 2


@dataclass(frozen=True)
class Extension:
    """Where ``--extend`` made a run longer."""

    step: int  # optimizer steps done by then
    ratio: float  # the learning rate at that step over that of the longer schedule, 0..1
    warmup_steps: int  # optimizer steps of the run's warm-up, which is neither repeated nor made longer


@dataclass
class Progress:
    """Where a run stands."""

    step: int = 0  # optimizer steps done
    epoch: int = 0  # the current one, from 0
    epoch_step: int = 0  # optimizer steps done in this epoch
    kept: Kept = field(default_factory=list)  # the best first; see ``kept_models.py``
    seconds: float = 0.0  # spent in training steps
    clips: int = 0  # trained on; a clip counts once per epoch
    evaluations_since_best: int = 0  # in a row without a better score
    extension: Extension | None = None  # where ``--extend`` made the run longer; None where it did not

    @property
    def best_step(self) -> int | None:
        """Optimizer step of the best model; None before the first evaluation."""
        return self.kept[0][0] if self.kept else None


@dataclass(frozen=True)
class SavedState:
    """What ``state.json`` says."""

    progress: Progress  # where the run stood
    layout: dict[str, Any]  # its ``world_size``, ``zero_stage`` and ``precision``
    optimizer: str  # class of the optimizer
    recipe: dict[str, Any]  # the resolved recipe
    corpus: dict[str, Any]  # identity of the training data; see ``run_directory.corpus_identity``
    base: str  # fingerprint of frozen weights that the checkpoint does not hold
    counters: dict[str, Any]  # of the DeepSpeed engine
    format: int = FORMAT  # of the checkpoint


def name_of(step: int) -> str:
    """Name of the checkpoint after ``step`` optimizer steps."""
    return f"step_{step:06d}"


def complete_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in ``folder``, oldest first; unfinished ones have another name."""
    found = (path for path in folder.glob("step_*") if (path / MANIFEST).is_file() and path.name[5:].isdigit())
    return sorted(found, key=lambda path: int(path.name[5:]))


def choose_checkpoint(folder: Path, wanted: str) -> Path | None:
    """The checkpoint that a run resumes from: the one at a path, or with "auto" the newest complete one, if any.

    Raises:
        UserError: there is no complete checkpoint at that path.
    """
    if wanted == "auto":
        found = complete_checkpoints(folder)
        return found[-1] if found else None
    path = Path(wanted)
    if not (path / MANIFEST).is_file():
        places = (path if path.is_dir() else path.parent, path / folder.name, folder)  # the second where it is a run
        nearby = next(filter(None, map(complete_checkpoints, places)), [])
        raise UserError(
            f"--resume {path}: no complete checkpoint (a folder with {MANIFEST})",
            f"choose one of {', '.join(map(str, nearby))}" if nearby else "leave out --resume: no checkpoint is nearby",
        )
    return path


def read_state(checkpoint: Path, *, verify: bool = True) -> SavedState:
    """Read where a checkpoint stands; ``verify`` compares every file with its checksum.

    Raises:
        UserError: a file is missing or changed, or the checkpoint is of another version of this toolkit.
    """
    try:
        manifest: dict[str, str] = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        for name, expected in manifest.items() if verify else ():
            path = checkpoint / name
            if not path.is_file() or checksum(path) != expected:
                raise _damaged(checkpoint, f"{name} is {'damaged' if path.is_file() else 'missing'}")
        content = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
        if content.get("format") != FORMAT:
            raise UserError(
                f"{checkpoint} has format {content.get('format')} of another version of this toolkit, not {FORMAT}",
                "resume with the version that saved it, or start again with --new",
            )
        return SavedState(**content | {"progress": _progress(content["progress"])})
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise _damaged(checkpoint, f"{type(error).__name__}: {error}") from error


def _progress(content: dict[str, Any]) -> Progress:
    extension = content.get("extension")
    content = content | {"extension": Extension(**extension) if extension else None}
    known = {item.name: content[item.name] for item in fields(Progress) if item.name in content}
    return Progress(**known | {"kept": [(step, value) for step, value in content["kept"]]})


def _damaged(checkpoint: Path, what: str) -> UserError:
    older = [path for path in complete_checkpoints(checkpoint.parent) if path.name < checkpoint.name]
    before = f"resume from the checkpoint before it with --resume {older[-1]}, or " if older else ""
    return UserError(f"the checkpoint {checkpoint} is damaged ({what})", f"{before}start again with --new")


def archive_newer(folder: Path, step: int) -> list[Path]:
    """Rename the checkpoints after ``step``, so that a run which resumes from ``step`` never resumes from them.

    Returns:
        their new paths, which ``--resume`` still takes.
    """
    found = complete_checkpoints(folder)
    older = [path for path in found if int(path.name[5:]) <= step]
    newer = found[len(older) :]
    if newer and older:
        write_text_atomically(folder / LATEST, older[-1].name + "\n")
    elif newer:
        (folder / LATEST).unlink(missing_ok=True)
    return [path.rename(next_free(path, ".aside_")) for path in newer]


def partial_name_of(name: str) -> str:
    """Name of a checkpoint while it is incomplete."""
    return f".{name}.partial"


def remove_checkpoint(checkpoint: Path) -> None:
    """Remove a checkpoint; it is renamed first, so that no incomplete one ever has its name."""
    partial = checkpoint.rename(checkpoint.with_name(partial_name_of(checkpoint.name)))
    shutil.rmtree(partial, ignore_errors=True)


def remove_unfinished(folder: Path) -> None:
    """Remove what is left of a run that died while it saved or removed a checkpoint."""
    for path in folder.glob(partial_name_of("step_*")):
        shutil.rmtree(path, ignore_errors=True)


def flush_folder(folder: Path) -> None:
    """Flush a folder's entries to the disk, so that a renamed file keeps its name when the power fails."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
