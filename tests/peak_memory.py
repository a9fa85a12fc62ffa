"""The largest address space that reading an input needs, each input in a process of its own.

python tests/peak_memory.py READER FILE...    prints how many bytes it grew for each file, -1 if reading died

Address space is counted, and not only what is resident: memory that a header's count asks for may never be touched.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from toolkit.corpus.archives.files import open_poses
from toolkit.corpus.table import read_table
from toolkit.errors import UserError
from toolkit.poses.features import extract_features
from toolkit.poses.landmarks import load_landmark_set
from toolkit.poses.pose_file import PoseError

SLACK = 200 << 20


def _size(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))


def growth(read: Callable[[], object]) -> int:
    """Bytes by which the address space of a forked process grows while it calls ``read``; -1 if it dies."""
    readable, writable = os.pipe()
    if not os.fork():
        try:
            before = _size("VmSize:")
            read()
            os.write(writable, str(_size("VmPeak:") - before).encode())
        finally:
            os._exit(0)
    os.close(writable)
    with os.fdopen(readable) as pipe:
        answer = pipe.read()
    os.wait()
    return int(answer) if answer else -1


def over_limit(reader: str, files: Mapping[str, tuple[Path, int]]) -> dict[str, str]:
    """Read each file in a process of its own; those that took more than 10 times their size and 200 MiB.

    Args:
        reader: one of ``READERS``.
        files: path and uncompressed size by name.

    Returns:
        by name, how much was taken and allowed, or that reading died.
    """
    done = subprocess.run(
        [sys.executable, __file__, reader, *(path for path, _ in files.values())],
        capture_output=True,
        text=True,
        check=True,
    )
    grown = [int(line) for line in done.stdout.split()]
    allowed = [10 * size + SLACK for _, size in files.values()]
    return {
        name: f"{taken / 2**20:.0f} MiB, allowed {limit / 2**20:.0f}" if taken >= 0 else "another error than documented"
        for name, taken, limit in zip(files, grown, allowed, strict=True)
        if not 0 <= taken <= limit
    }


def _read_clip(path: Path) -> None:
    with contextlib.suppress(PoseError):
        extract_features(path.read_bytes(), load_landmark_set("unisign_69"), 12.5, max_frames=512)


def _read_table(path: Path) -> None:
    with contextlib.suppress(UserError):
        read_table(path)


def _read_archive(path: Path) -> None:
    """List an archive, and read all of its members."""
    with contextlib.suppress(UserError):
        poses = open_poses(path)
        for key in poses.files.values():
            with contextlib.suppress(PoseError):
                poses.read(key)


READERS: dict[str, Callable[[Path], None]] = {
    "clip": _read_clip,
    "table": _read_table,
    "archive": _read_archive,
}

if __name__ == "__main__":
    read = READERS[sys.argv[1]]
    load_landmark_set("unisign_69")  # is kept, and is not part of any file
    for name in sys.argv[2:]:
        print(growth(lambda name=name: read(Path(name))), flush=True)
