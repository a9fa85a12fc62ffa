"""What works on this machine, and the remedy for what does not: the findings that ``launch/doctor.py`` prints."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from toolkit.cluster.environment import GIB, gpus
from toolkit.cluster.ops import (
    ARCHITECTURES,
    OPS,
    REBUILD,
    architecture_words,
    is_built,
    readable_architectures,
    stale_locks,
    use_extensions_dir,
)
from toolkit.cpu.shared_memory import SHARED_MEMORY, orphaned_buffers

# DeepSpeed's all-reduce buffer of one rank on the CPU.
BUFFER_GIB = 0.07


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's list."""

    name: str  # of the check
    state: Literal["ok", "note", "missing"]  # ``ok``; ``note``: works with a limit; ``missing``: something will fail
    detail: str  # what was found
    remedy: str = ""  # how to correct it; empty where nothing is wrong


def examine(architectures: str = "") -> list[Finding]:
    """Check everything that a run needs, the most basic first.

    ``architectures`` is TORCH_CUDA_ARCH_LIST as the user gave it, before it was corrected.
    """
    devices = gpus()
    return [
        _device(devices),
        _compiler(),
        *([_cuda_toolkit()] if devices else []),
        *_architectures(architectures),
        *(_op(name) for name in OPS),
        *_locks(),
        _memory(),
        *([] if devices else [_shared_memory()]),
        _disk(),
    ]


def _device(devices: list[dict[str, Any]]) -> Finding:
    if devices:
        kinds = Counter(f"{gpu['name']} ({gpu['memory_gib']:g} GiB)" for gpu in devices)
        return Finding("device", "ok", f"GPU: {', '.join(f'{number} x {kind}' for kind, number in kinds.items())}")
    if shutil.which("nvidia-smi"):
        return Finding(
            "device",
            "missing",
            "torch sees no GPU although nvidia-smi is here",
            "set TORCH_INDEX to a CUDA build's index and run `make setup`, or update the driver",
        )
    return Finding("device", "ok", f"CPU, {os.cpu_count()} cores: up to {os.cpu_count()} ranks")


def _compiler() -> Finding:
    missing = []
    if not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        missing.append("C++ compiler")
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        missing.append("Python headers")
    use_extensions_dir()  # finds ninja in an environment that was not activated
    if not shutil.which("ninja"):
        missing.append("ninja")
    if missing:
        return Finding(
            "compiler",
            "missing",
            f"no {', no '.join(missing)}: DeepSpeed's ops cannot be built",
            "Debian, Ubuntu: apt-get install g++ python3-dev ninja-build",
        )
    return Finding("compiler", "ok", "C++ compiler, Python headers and ninja are here")


def _cuda_toolkit() -> Finding:
    from torch.utils.cpp_extension import CUDA_HOME

    if CUDA_HOME and shutil.which("nvcc", path=str(Path(CUDA_HOME) / "bin")):
        return Finding("CUDA toolkit", "ok", CUDA_HOME)
    return Finding(
        "CUDA toolkit",
        "note",
        "no nvcc: DeepSpeed's GPU ops cannot be built",
        'install the CUDA toolkit, or keep `"torch_adam": true` in the DeepSpeed JSON',
    )


def _architectures(given: str) -> list[Finding]:
    used = readable_architectures(given)
    if set(architecture_words(used)) == set(architecture_words(given)):
        return []
    return [
        Finding(
            ARCHITECTURES,
            "note",
            f"DeepSpeed cannot read '{given}': its ops are built for {used or 'the GPUs that are here'}",
            f"export {ARCHITECTURES}='{used}'" if used else f"unset {ARCHITECTURES}",
        )
    ]


def _op(name: str) -> Finding:
    purpose = OPS[name][1]
    if is_built(name):
        return Finding(f"op {name}", "ok", f"{purpose}: built")
    return Finding(
        f"op {name}",
        "note",
        f"{purpose}: not built; the first run that needs it waits a minute or more",
        f"python launch/doctor.py build-ops {name}",
    )


def _locks() -> list[Finding]:
    return [
        Finding("build lock", "missing", f"{lock} was left by a build that was killed; runs would wait for it", REBUILD)
        for lock in stale_locks()
    ]


def _memory() -> Finding:
    import psutil

    memory = psutil.virtual_memory()
    return Finding("memory", "ok", f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB free")


def _shared_memory() -> Finding:
    if sys.platform != "linux" or not SHARED_MEMORY.exists():
        return Finding("shared memory", "note", "no /dev/shm: ranks on the CPU use gloo alone, which is slower")
    free = shutil.disk_usage(SHARED_MEMORY).free / GIB
    orphans = orphaned_buffers()
    left = f"; {len(orphans)} buffer(s) of dead runs, which the next run removes" if orphans else ""
    needed = BUFFER_GIB * (os.cpu_count() or 1)
    if free < needed:
        return Finding(
            "shared memory",
            "missing",
            f"{free:.2f} GiB free in /dev/shm, {needed:.2f} GiB needed for a rank on every core{left}",
            "containers: start with --shm-size=1g or more",
        )
    return Finding("shared memory", "ok", f"{free:.1f} GiB free in /dev/shm{left}")


def _disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free / GIB
    if free < 2:
        return Finding(
            "disk",
            "note",
            f"{free:.1f} GiB free here: checkpoints of large models will not fit",
            "free some, or set run.dir",
        )
    return Finding("disk", "ok", f"{free:.0f} GiB free here")
