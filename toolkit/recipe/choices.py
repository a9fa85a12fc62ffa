"""Files of micro-batches that were chosen: in the run's directory, and in the user's cache for the same run again."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, replace
from pathlib import Path

from toolkit.files import write_text_atomically
from toolkit.recipe.batches import MicroBatchChoice
from toolkit.recipe.resolve import MICRO_BATCH_FILE


def choices_folder() -> Path:
    """Where a user's choices are kept: in the cache of the user."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "sign-language-translation" / "micro_batches"


def folder_of(hardware: str, settings: str) -> Path:
    """Where the choice for this hardware and these settings is kept."""
    return choices_folder() / f"{hashlib.sha256(hardware.encode()).hexdigest()[:16]}-{settings}"


def keep_choice(choice: MicroBatchChoice) -> MicroBatchChoice:
    """Keep a choice for the next run of this recipe on this machine, and return it.

    A folder that cannot be written keeps none.
    """
    folder = folder_of(choice.hardware, choice.settings)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder, choice)
    except OSError:
        pass
    return choice


def mark_too_large(run_dir: Path, choice: MicroBatchChoice, why: str) -> None:
    """Let the next start, of this run or of the same in another folder, take smaller micro-batches.

    Raises:
        OSError, UserError: the run directory cannot be written.
    """
    marked = replace(choice, too_large=why)
    keep_choice(marked)
    _write(run_dir, marked)


def _write(folder: Path, choice: MicroBatchChoice) -> None:
    write_text_atomically(folder / MICRO_BATCH_FILE, json.dumps(asdict(choice), indent=2) + "\n")
