"""Where the shipped recipes, model cards and DeepSpeed JSONs lie, in a clone and in an installed package."""

from __future__ import annotations

from pathlib import Path

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


def shown(path: Path) -> str:
    """``path`` as a message should name it: relative to the current folder or to the package where that is shorter."""
    path = Path(path)
    for base in (Path.cwd(), PACKAGE.parent):
        try:
            return str(path.resolve().relative_to(base))
        except ValueError:
            continue
    return str(path)
