"""Versions, devices, memory and the toolkit's commit, for ``environment.json`` and ``launch/doctor.py``.

Only the variables of a list are read, never the environment as a whole, so that no secret reaches a run directory.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from toolkit import __version__

PACKAGES = (
    "torch",
    "deepspeed",
    "transformers",
    "peft",
    "bitsandbytes",
    "tokenizers",
    "safetensors",
    "numpy",
    "datasets",
    "pyarrow",
    "pose-format",
    "sacrebleu",
    "jiwer",
    "wandb",
)
# Variables that change speed or results; each holds a number, a list of devices or an interface, never a secret.
VARIABLES = (
    "OMP_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
    "ARROW_DEFAULT_MEMORY_POOL",
    "LRU_CACHE_CAPACITY",
    "MALLOC_ARENA_MAX",
    "MALLOC_MMAP_MAX_",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TRIM_THRESHOLD_",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY",
    "GLOO_SOCKET_IFNAME",
    "NCCL_SOCKET_IFNAME",
    "NCCL_IB_DISABLE",
    "NCCL_P2P_DISABLE",
    "PYTORCH_CUDA_ALLOC_CONF",
    "TOOLKIT_CPU_CODE",
)
GIB = 2**30


def describe_environment() -> dict[str, Any]:
    """Facts about the machine and the software, ready for JSON.

    Imports torch to ask for devices; call it where torch is imported anyway.
    """
    import psutil
    import torch

    return {
        "toolkit": __version__,
        "git_commit": git_commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": package_versions(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / GIB, 1),
        "gpus": gpus(),
        "cuda": torch.version.cuda,
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def package_versions() -> dict[str, str]:
    """Installed versions of the packages that shape a run; read from their metadata, nothing is imported."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def gpus() -> list[dict[str, Any]]:
    """Name and memory in GiB of each GPU that torch sees; empty on a CPU machine."""
    import torch

    if not torch.cuda.is_available():
        return []
    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [{"name": gpu.name, "memory_gib": round(gpu.total_memory / GIB, 1)} for gpu in properties]


def git_commit() -> str | None:
    """Commit of the clone that this code runs from, ``+changes`` where files differ; None for an installed package."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        commit = _git(root, "rev-parse", "HEAD")
        changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None  # no git here, or a clone that another user owns
    return f"{commit}+changes" if changed else commit


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(root), *arguments],
        capture_output=True,
        text=True,
        check=True,
        timeout=10,
        stdin=subprocess.DEVNULL,
    )
    return done.stdout.strip()


def cpu_name() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
