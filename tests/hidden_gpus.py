"""GPUs are hidden from all tests but those of ``make test-gpu``, and from every process that a test starts.

CUDA_VISIBLE_DEVICES alone does not reach the ranks: DeepSpeed's launcher sets it to their numbers, on CPUs too, which
shows the GPUs again. So PYTHONPATH begins with a folder whose ``sitecustomize.py`` each Python process imports first.

It must not import torch: ``tests/conftest.py`` hides the GPUs before anything can ask for them.
"""

from __future__ import annotations

import os
from pathlib import Path

# Set by `make test-gpu`: the GPUs are shown, and only tests that are marked `gpu` or `gpu2` run.
SHOWN = os.environ.get("TEST_GPUS") == "1"
FOLDER = str(Path(__file__).with_name("without_gpus"))
# What processes of a pretended GPU begin with; `python -m tests.pretended_cuda` sets it.
PRETENDED = os.environ.get("PRETENDED_CUDA", "")


def hide_gpus() -> None:
    """Hide the GPUs from this process and those that it starts, unless they are shown."""
    if not SHOWN:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        others = [folder for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder not in ("", FOLDER)]
        os.environ["PYTHONPATH"] = python_path(*others)


def python_path(*folders: Path | str) -> str:
    """PYTHONPATH of a process that a test starts, with these folders."""
    first = (PRETENDED if SHOWN else FOLDER,)
    return os.pathsep.join(map(str, filter(None, (*first, *folders))))
