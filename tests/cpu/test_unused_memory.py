"""Pages of tables that were read go back to the system, and no others."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import pytest

from toolkit.cpu.unused_memory import UnusedMemory

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc")
SIZE = 8 << 20


def resident_of(path: Path) -> int:
    """Bytes of a file that this process has mapped and read."""
    lines = Path("/proc/self/smaps").read_text().splitlines()
    begin = next(number for number, line in enumerate(lines) if line.endswith(str(path)))
    return int(next(line for line in lines[begin:] if line.startswith("Rss:")).split()[1]) * 1024


@pytest.mark.parametrize(
    ("name", "rights", "forgets"),
    [
        ("data-0.arrow", mmap.PROT_READ, True),
        ("data-0.arrow", mmap.PROT_READ | mmap.PROT_WRITE, False),
        ("weights.bin", mmap.PROT_READ, False),
    ],
)
def test_pages_that_are_read_from_the_file_again_are_forgotten(
    tmp_path: Path, name: str, rights: int, forgets: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("toolkit.cpu.unused_memory.SHARE", 1e-6)  # the next time is in minutes
    path = tmp_path / name
    path.write_bytes(bytes(range(256)) * (SIZE // 256))
    with path.open("rb") as file, mmap.mmap(file.fileno(), SIZE, mmap.MAP_PRIVATE, rights) as mapped:
        if rights & mmap.PROT_WRITE:
            mapped[0] = 77
        first, total = mapped[0], sum(mapped[::4096])
        assert resident_of(path) == SIZE
        unused = UnusedMemory()
        unused.after_step()
        assert (resident_of(path) == 0) is forgets
        assert (mapped[0], sum(mapped[::4096])) == (first, total)
        held = resident_of(path)
        unused.after_step()
        assert resident_of(path) == held, "the next time is not yet due"
