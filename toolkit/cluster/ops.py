"""DeepSpeed's C++ ops: where they are built, by one process at a time, and locks that a killed build left.

torch builds an extension under a file named ``lock``. A killed build leaves it, and every later process waits for it
without end and prints nothing; ``check_locks`` refuses to start there.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from toolkit.errors import UserError

# Name as DeepSpeed prints it -> builder class, and what it is for.
OPS = {
    "shm_comm": ("ShareMemCommBuilder", "all-reduce between ranks on the CPU"),
    "cpu_adam": ("CPUAdamBuilder", "AdamW for optimiser states in main memory"),
    "fused_adam": ("FusedAdamBuilder", "AdamW in one kernel"),
    "async_io": ("AsyncIOBuilder", "offload to NVMe; needs libaio-dev"),
}
# DeepSpeed's folder and file names where they differ from the op's.
EXTENSION_NAMES = {"shm_comm": "deepspeed_shm_comm"}
# A capability as DeepSpeed's builder reads it, and what torch allows beyond: `9.0a`, the features of one GPU alone.
CAPABILITY = re.compile(r"(\d+\.\d+)[af]?(\+PTX)?")
ARCHITECTURES = "TORCH_CUDA_ARCH_LIST"
COMPILE_CACHE = "TORCHINDUCTOR_CACHE_DIR"
REBUILD = "python launch/doctor.py build-ops --force"


def use_extensions_dir() -> Path | None:
    """Point torch's extension builds into this Python environment; call before DeepSpeed is imported.

    TORCH_CUDA_ARCH_LIST becomes one that DeepSpeed's builder can read: it does so even to load an op that is built.

    A folder of the environment's own is never shared between two torch versions and is removed with the environment.
    The environment's own ninja comes first, activated or not: another version builds every op again.

    Returns:
        The folder, or None where the environment is read-only and torch's default in the user's cache is used.
    """
    if ARCHITECTURES in os.environ:
        os.environ[ARCHITECTURES] = readable_architectures(os.environ[ARCHITECTURES])
    tools = str(Path(sys.executable).parent)
    own = shutil.which("ninja", path=tools)
    if own and shutil.which("ninja") != own:
        os.environ["PATH"] = f"{tools}{os.pathsep}{os.environ.get('PATH', '')}"
    chosen = os.environ.get("TORCH_EXTENSIONS_DIR")
    if chosen:
        return Path(chosen)
    if not os.access(sys.prefix, os.W_OK):
        return None
    folder = Path(sys.prefix) / "torch_extensions"
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
    return folder


def use_compile_cache() -> str | None:
    """Keep compiled layers in this Python environment, or where TORCHINDUCTOR_CACHE_DIR says: later starts are quick.

    Returns:
        A note where that folder cannot be written; torch then keeps them in its own, among temporary files.
    """
    folder = Path(os.environ.get(COMPILE_CACHE) or Path(sys.prefix) / "torch_inductor")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        is_writable = os.access(folder, os.W_OK)
    except OSError:
        is_writable = False
    if is_writable:
        os.environ[COMPILE_CACHE] = str(folder)
        return None
    os.environ.pop(COMPILE_CACHE, None)
    return f"compiled layers cannot be kept in {folder}, and are kept among this machine's temporary files"


def readable_architectures(given: str) -> str:
    """The value of TORCH_CUDA_ARCH_LIST, corrected for DeepSpeed's builder; empty to build for the GPUs that are here.

    The builder reads ``9.0`` and ``9.0+PTX``, and fails with ``9.0a``, which NVIDIA's images set, and with names.
    """
    read = [CAPABILITY.fullmatch(word) for word in architecture_words(given)]
    corrected = [f"{match[1]}{match[2] or ''}" for match in read if match]
    return ";".join(dict.fromkeys(corrected)) if len(corrected) == len(read) else ""


def architecture_words(given: str) -> list[str]:
    """The entries of TORCH_CUDA_ARCH_LIST."""
    return [word for word in re.split(r"[;\s]", given) if word]


def op_folder(name: str) -> Path | None:
    """The folder in which an op is built, or None where torch chooses it (a read-only environment)."""
    root = use_extensions_dir()
    return root / EXTENSION_NAMES.get(name, name) if root else None


def is_built(name: str) -> bool:
    """Whether an op's library lies in its build folder."""
    folder = op_folder(name)
    return bool(folder and (folder / f"{folder.name}.so").exists())


def stale_locks() -> list[Path]:
    """Lock files in the build folder that no living process of this machine holds.

    torch keeps the file open while it builds, so a lock that no process has open belongs to a build that died. Locks of
    other users are left alone: their processes cannot be seen.
    """
    root = use_extensions_dir()
    suspects = _unheld_locks(root) if root else {}
    if suspects:
        # A lock may pass from one living process to the next meanwhile: the same file must be unheld twice.
        time.sleep(0.2)
        again = _unheld_locks(root) if root else {}
        suspects = {lock: identity for lock, identity in suspects.items() if again.get(lock) == identity}
    return sorted(suspects)


def check_locks() -> None:
    """Raise UserError where every process would wait without end for a build that was killed."""
    locks = stale_locks()
    if locks:
        raise UserError(
            f"a build of DeepSpeed's op {locks[0].parent.name} was killed and left {locks[0]}; every run waits for it",
            f"remove it by `{REBUILD}`",
        )


def needed_ops(deepspeed: dict[str, Any]) -> list[str]:
    """Names of the ops that DeepSpeed loads for a resolved DeepSpeed JSON, besides shm_comm for ranks on the CPU."""
    optimizer, zero = deepspeed.get("optimizer", {}), deepspeed["zero_optimization"]
    devices = {key: section.get("device", "none") for key, section in zero.items() if isinstance(section, dict)}
    names = []
    if optimizer.get("type") == "AdamW" and not optimizer["params"].get("torch_adam"):
        names.append("fused_adam" if devices.get("offload_optimizer", "none") == "none" else "cpu_adam")
    return [*names, "async_io"] if "nvme" in devices.values() else names


def check_needed_ops(deepspeed: dict[str, Any]) -> None:
    """Raise UserError for offload to NVMe without async_io, which takes minutes to build and needs a library."""
    if "async_io" in needed_ops(deepspeed) and op_folder("async_io") and not is_built("async_io"):
        raise UserError(
            "offload to NVMe needs DeepSpeed's op async_io, which is not built",
            "install libaio-dev, then run `python launch/doctor.py build-ops async_io`; or choose --ds zero3_offload",
        )


def build_missing_ops(names: Iterable[str], echo: Callable[[str], None]) -> None:
    """Build those of the ops that are not built, before every rank would; one rank of a node calls this.

    Raises:
        UserError: a build failed.
    """
    missing = [name for name in names if op_folder(name) and not is_built(name)]
    if missing:
        build_ops(missing, echo=echo)


def build_ops(names: Iterable[str], *, force: bool = False, echo: Callable[[str], None] = print) -> dict[str, float]:
    """Build ops one after the other in this process, and load each to prove that it works.

    ``force`` removes what a killed build left behind and builds from scratch; ``echo`` receives lines for the user.

    Returns:
        Seconds taken by each op that this machine can use.

    Raises:
        UserError: an unknown name, a stale lock without ``force``, or a build that failed.
    """
    names = list(names)
    unknown = [name for name in names if name not in OPS]
    if unknown:
        raise UserError(f"no op is called {unknown[0]!r}", f"choose from {', '.join(OPS)}")
    if force:
        for lock in stale_locks():
            echo(f"removed {lock}, left by a build that was killed")
            lock.unlink()
    check_locks()
    with _silence():
        from deepspeed.accelerator import get_accelerator

    seconds = {}
    for name in names:
        with building(name, echo):
            folder = op_folder(name)
            if force and folder and folder.exists():
                shutil.rmtree(folder)
            taken = _build(name, get_accelerator(), echo)
        if taken is not None:
            seconds[name] = taken
    return seconds


@contextlib.contextmanager
def building(name: str, echo: Callable[[str], None]) -> Iterator[None]:
    """Within it no other process builds the op; one that does is waited for, and ``echo`` says so.

    The lock is the kernel's, so that it ends with its process. torch's own file stays when its process is killed.
    """
    folder = op_folder(name)
    if folder is None:
        yield
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / f"{folder.name}.building", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            echo(f"op {name}: another process builds it; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _build(name: str, accelerator: Any, echo: Callable[[str], None]) -> float | None:
    builder_class, purpose = OPS[name]
    started = time.monotonic()
    try:
        with _silence():
            builder = accelerator.create_op_builder(builder_class)
            usable = builder is not None and builder.is_compatible(verbose=False)
        if not usable:
            echo(f"op {name} ({purpose}): not for this machine, skipped")
            return None
        if not is_built(name):
            echo(f"op {name} ({purpose}): building, one to four minutes on two cores, once per environment")
        with _silence():
            builder.load(verbose=False)
    except Exception as error:  # the compiler, ninja, CUDA and the loader fail with classes of their own
        raise UserError(
            f"DeepSpeed's op {name} could not be built: {_reason(str(error))}",
            "run `python launch/doctor.py`, which lists what is missing",
        ) from error
    seconds = time.monotonic() - started
    echo(f"op {name} ({purpose}): ready after {seconds:.0f} s")
    return seconds


def _reason(output: str) -> str:
    """The line of a build's output that says why it failed, without the command lines around it."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    for word in ("error:", "not found", "No such file", "Permission denied", "No space left"):
        for line in lines:
            if word in line and len(line) < 300:
                return line
    return lines[0][:300] if lines else "the compiler gave no reason"


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keep what DeepSpeed prints while it probes compilers off the terminal; errors arrive as exceptions.

    A real file: DeepSpeed's probe for libaio uses the descriptor of stderr, and takes a stream without one for a
    missing library.
    """
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield


def _unheld_locks(root: Path) -> dict[Path, tuple[int, int]]:
    """Locks under ``root`` that no process has open, each with its inode and time of making."""
    locks = {}
    for lock in root.glob("*/lock"):
        with contextlib.suppress(FileNotFoundError):  # released meanwhile
            status = lock.stat()
            if os.geteuid() in (0, status.st_uid):
                locks[lock] = (status.st_ino, status.st_mtime_ns)
    held = _open_files() if locks else set()
    return {lock: identity for lock, identity in locks.items() if os.path.realpath(lock) not in held}


def _open_files() -> set[str]:
    """Every file that a process we may look at has open, read from Linux's /proc."""
    opened = set()
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            opened.add(os.readlink(descriptor))
        except OSError:
            continue  # closed meanwhile, or another user's
    return opened
