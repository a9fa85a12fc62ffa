"""DeepSpeed's shared-memory buffers on the CPU: none outlives its run.

On the CPU every rank makes one file of 69 MB in /dev/shm, which is RAM, and DeepSpeed never removes it. Once every rank
has mapped a file, it can be unlinked: the mapping lives until the last process ends. So a run unlinks its files right
after the process group is made, and before that removes the files that killed runs left.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")
PREFIX = "deepspeed_allreduce_buffer"
# A buffer is made by one system call and mapped by the next; younger files may be between the two.
GRACE_SECONDS = 10.0


def own_buffer(rank: int, folder: Path = SHARED_MEMORY) -> Path:
    """The file that DeepSpeed makes for this rank: named by user, rendezvous address, port and rank."""
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    return folder / f"{PREFIX}_{os.getuid()}_{address}_{port}_{rank}"


def release_own_buffer(rank: int, folder: Path = SHARED_MEMORY) -> None:
    """Unlink this rank's buffer, if it has one; the memory stays usable and is freed when the last rank ends.

    Call it after a barrier that follows ``deepspeed.init_distributed``: until then another rank may open it.
    """
    own_buffer(rank, folder).unlink(missing_ok=True)


def remove_orphaned_buffers(folder: Path = SHARED_MEMORY) -> None:
    """Remove this user's buffers that no living process maps; one rank of a node does so before the group is built."""
    for path in orphaned_buffers(folder):
        path.unlink(missing_ok=True)  # another run may remove it at the same moment


def orphaned_buffers(folder: Path = SHARED_MEMORY) -> list[Path]:
    """This user's buffers that no living process maps and that are older than ``GRACE_SECONDS``."""
    now = time.time()
    candidates = []
    for path in folder.glob(f"{PREFIX}_{os.getuid()}_*"):
        try:
            status = path.stat()
        except FileNotFoundError:
            continue
        if status.st_uid == os.getuid() and now - status.st_mtime > GRACE_SECONDS:
            candidates.append(path)
    if not candidates:
        return []
    mapped = _mapped_files()
    return [path for path in candidates if str(path) not in mapped]


def _mapped_files() -> set[str]:
    """Every file that a process of this user maps by name, read from Linux's /proc."""
    mapped: set[str] = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            lines = maps.read_text(errors="replace").splitlines()
        except OSError:
            continue  # the process ended, or is another user's and cannot map this user's files
        # address permissions offset device inode path; a path may hold blanks
        mapped.update(fields[5] for fields in (line.split(maxsplit=5) for line in lines) if len(fields) == 6)
    return mapped
