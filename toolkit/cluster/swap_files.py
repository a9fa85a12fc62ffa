"""Files that a run offloads to NVMe: useless to any other run, so they are removed with it.

    nvme_path/HOST/owner.json      which process made the folder, while that process lives
    nvme_path/HOST/zero_stage_3/   DeepSpeed's files

Every node has a folder of its own, because the path may be on a disk that all nodes share. A run removes its folder at
its end; the next run that swaps to the same place removes the folder of a killed one.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
from pathlib import Path
from typing import Any

import psutil

from toolkit.errors import UserError
from toolkit.recipe.paths import SWAP

OWNER = "owner.json"


def swap_to_this_node(deepspeed: dict[str, Any]) -> list[Path]:
    """Put this node's name into every ``nvme_path`` of a resolved DeepSpeed JSON, and return these folders."""
    folders = []
    for section in deepspeed.get("zero_optimization", {}).values():
        if isinstance(section, dict) and section.get("device") == "nvme":
            folder = Path(section["nvme_path"]) / platform.node()
            section["nvme_path"] = str(folder)
            folders.append(folder)
    return sorted(set(folders))


def claim_swap_folders(folders: list[Path]) -> None:
    """Make the folders, and remove those beside them whose owners are dead; one rank of a node calls this.

    Raises:
        UserError: a living run swaps there, or nothing can be written there.
    """
    for folder in folders:
        try:
            for other in folder.parent.parent.glob(f"{SWAP}*/{folder.name}"):
                if not _owner_lives(other):
                    _remove(other)
            if folder.exists():
                raise UserError(
                    f"{folder} is in use by another process of the same run", "wait until that process has ended"
                )
            folder.mkdir(parents=True)
            owner = {"pid": os.getpid(), "started": psutil.Process().create_time()}
            (folder / OWNER).write_text(json.dumps(owner), encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"cannot swap to {folder}: {error.strerror}",
                "name a folder of a local disk with ds.zero_optimization.offload_optimizer.nvme_path=FOLDER",
            ) from error


def remove_swap_folders(folders: list[Path]) -> None:
    """Remove the folders of this node after its ranks have stopped swapping; the rank that claimed them calls this."""
    for folder in folders:
        _remove(folder)


def _owner_lives(folder: Path) -> bool:
    try:
        owner = json.loads((folder / OWNER).read_text(encoding="utf-8"))
        return bool(psutil.Process(owner["pid"]).create_time() == owner["started"])
    except (OSError, ValueError, KeyError, TypeError, psutil.Error):
        return False


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    if folder.parent.is_dir() and not any(folder.parent.iterdir()):
        folder.parent.rmdir()
