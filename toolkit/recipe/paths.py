"""Where the shipped recipes, model cards and DeepSpeed JSONs lie, in a clone and in an installed package."""

from __future__ import annotations

import hashlib
from pathlib import Path

BEST = "best"  # the folder of a run's best model, in its run directory
SWAP = "nvme_swap"
PACKAGE = Path(__file__).resolve().parents[1]


def _shipped(folder: str) -> Path:
    installed = PACKAGE / f"_{folder}"
    return installed if installed.is_dir() else PACKAGE.parent / folder


def recipes_dir() -> Path:
    """The folder of shipped recipes (``NAME.yaml``; names that begin with ``_`` are parents only)."""
    return _shipped("recipes")


def models_dir() -> Path:
    """The folder of shipped model cards (``NAME.yaml``)."""
    return recipes_dir() / "models"


def ds_configs_dir() -> Path:
    """The folder of shipped DeepSpeed JSONs (``NAME.json``)."""
    return _shipped("ds_configs")


def is_clone() -> bool:
    """Whether this package runs from a clone, where the user's own recipes belong in ``recipes/``."""
    return not (PACKAGE / "_recipes").is_dir()


def swap_folder(run_dir: Path, disk: str | None = None) -> Path:
    """The folder in which one run keeps what it offloads to NVMe, and nobody else keeps anything.

    DeepSpeed names its files by rank alone, so that two runs that share a folder would overwrite each other. It is in
    ``disk``, the user's ``nvme_path``, or else in the run directory.
    """
    if disk is None:
        return run_dir / SWAP
    identity = hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:8]
    return Path(disk) / f"{SWAP}-{run_dir.name}-{identity}"


def shown(path: Path) -> str:
    """``path`` as a message should name it: relative to the current folder or to the package where that is shorter."""
    path = Path(path)
    for base in (Path.cwd(), PACKAGE.parent):
        try:
            return str(path.resolve().relative_to(base))
        except ValueError:
            continue
    return str(path)
