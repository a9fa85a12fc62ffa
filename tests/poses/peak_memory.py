"""The largest address space that reading a file needs, each file in a process of its own.

python tests/poses/peak_memory.py FILE...    prints how many bytes it grew for each file, -1 if reading died

Address space is counted, and not only what is resident: memory that a header's count asks for may never be touched.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from toolkit.poses.features import extract_features
from toolkit.poses.landmarks import LandmarkSet, load_landmark_set
from toolkit.poses.pose_file import PoseError


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


def _read(path: Path, landmarks: LandmarkSet) -> None:
    with contextlib.suppress(PoseError):
        extract_features(path.read_bytes(), landmarks, 12.5, max_frames=512)


if __name__ == "__main__":
    landmarks = load_landmark_set("unisign_69")
    for name in sys.argv[1:]:
        print(growth(lambda name=name: _read(Path(name), landmarks)), flush=True)
