"""The allocator settings do what they are for, in a process of their own."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tests.time_limits import limit

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="glibc")

# Large blocks come and go, so that glibc raises its thresholds; then blocks are freed below others that stay.
SCRIPT = """
import ctypes, os, sys
from toolkit.cpu.allocator import return_freed_memory

def resident():
    line = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
    return int(line.split()[1]) / 1024

if sys.argv[1] == "set":
    assert return_freed_memory()
    assert os.environ["MALLOC_MMAP_THRESHOLD_"] == "65536"
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
libc.free(libc.malloc(30 << 20))
before = resident()
blocks = []
for _ in range(64):
    block = libc.malloc(1 << 20)
    ctypes.memset(block, 1, 1 << 20)
    blocks.append(block)
    libc.malloc(1024)
for block in blocks:
    libc.free(ctypes.c_void_p(block))
print(resident() - before)
"""


def outcome(script: str, choice: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script, choice],
        cwd=Path(__file__).parents[2],
        env={},
        capture_output=True,
        text=True,
        check=True,
        timeout=limit(60),
    )
    return done.stdout


@pytest.mark.process
def test_freed_blocks_leave_the_process() -> None:
    def kept(choice: str) -> float:
        return float(outcome(SCRIPT, choice))

    assert kept("set") < 8
    assert kept("leave") > 32, "without the settings glibc was to keep what was freed"


# The same large blocks come and go twice.
KEEP = """
from toolkit.cpu.allocator import keep_freed_memory
import ctypes, resource, sys

if sys.argv[1] == "set":
    assert keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]

def touch():
    blocks = [libc.malloc(64 << 20) for _ in range(2)]
    for block in blocks:
        ctypes.memset(block, 1, 64 << 20)
    for block in blocks:
        libc.free(ctypes.c_void_p(block))

touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
touch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.process
def test_kept_blocks_serve_the_next_ones_without_new_pages() -> None:
    def new_pages(choice: str) -> int:
        return int(outcome(KEEP, choice))

    assert new_pages("set") < 1000
    assert new_pages("leave") > 30_000, "without the settings every large block was to get new pages"


# Blocks of a size come and go among small ones that stay.
LARGE = """
from toolkit.cpu.allocator import give_back_heap, keep_freed_memory, keeps_memory
import ctypes, sys

def resident():
    line = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
    return int(line.split()[1]) / 1024

choice, size = sys.argv[1].split()
assert keep_freed_memory(maps_large=choice == "set") and keeps_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
before = resident()
blocks = []
for _ in range(128 // int(size)):
    blocks.append(libc.malloc(int(size) << 20))
    ctypes.memset(blocks[-1], 1, int(size) << 20)
    libc.malloc(1024)
for block in blocks:
    libc.free(block)
kept = resident() - before
give_back_heap()
print(kept, resident() - before)
"""


@pytest.mark.process
@pytest.mark.parametrize(("choice", "keeps"), [("set 64", False), ("set 8", True), ("leave 64", True)])
def test_large_blocks_go_back_where_they_are_asked_to_and_all_free_ones_when_a_phase_ends(
    choice: str, keeps: bool
) -> None:
    kept, after = map(float, outcome(LARGE, choice).split())
    assert (kept > 120) if keeps else (kept < 8)
    assert after < 8


# Threads that hold a small block each, under a limit on addresses.
LIMITED = """
from toolkit.cpu.allocator import keep_freed_memory
import ctypes, resource, sys, threading

resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
if sys.argv[1] == "set":
    assert keep_freed_memory()
libc = ctypes.CDLL(None)

def addresses():
    line = next(line for line in open("/proc/self/status") if line.startswith("VmSize"))
    return int(line.split()[1]) / 1024

def hold():
    libc.malloc(1000)
    held.wait()
    counted.wait()

before, count = addresses(), 4
held, counted = threading.Barrier(count + 1), threading.Barrier(count + 1)
threads = [threading.Thread(target=hold) for _ in range(count)]
for thread in threads:
    thread.start()
held.wait()
print((addresses() - before) / count)
counted.wait()
"""


@pytest.mark.process
def test_where_addresses_are_limited_a_thread_has_no_heap_of_its_own() -> None:
    stack = resource.getrlimit(resource.RLIMIT_STACK)[0]
    stack_mib = 8 if stack == resource.RLIM_INFINITY else stack / 2**20

    def mib_a_thread(choice: str) -> float:
        return float(outcome(LIMITED, choice)) - stack_mib

    assert mib_a_thread("set") < 8
    assert mib_a_thread("leave") > 32, "without the settings each thread was to map a heap"


# Tables and matrix products of many sizes, under a limit on addresses.
LIBRARIES = """
import resource, sys

resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))
if sys.argv[1] == "set":
    from toolkit.cpu.allocator import spare_memory
    spare_memory(tight=False)
import pyarrow, torch

def addresses():
    line = next(line for line in open("/proc/self/status") if line.startswith("VmSize"))
    return int(line.split()[1]) / 1024

torch.ones(2, 2) @ torch.ones(2, 2)
before = addresses()
pyarrow.array(range(1000)).to_pandas()
table = addresses() - before
layer = torch.nn.Linear(64, 64).bfloat16()
for size in range(1, 200):
    layer(torch.zeros(size, 64, dtype=torch.bfloat16))
print(table, addresses() - before - table)
"""


@pytest.mark.process
def test_where_addresses_are_limited_libraries_map_what_they_use() -> None:
    (table, kernels), (usual_table, usual_kernels) = (
        map(float, outcome(LIBRARIES, choice).split()) for choice in ("set", "leave")
    )
    assert table < 64 and usual_table > 512, "MiB; Arrow's own allocator maps a GiB"
    # Without kernels of bf16 there is nothing to keep.
    assert kernels <= 128 and kernels <= usual_kernels


TIGHT = """
import os, sys
from toolkit.cpu.allocator import keep_freed_memory, keeps_memory, spare_memory

spare_memory(tight=sys.argv[1] == "set")
assert keep_freed_memory()
print(int(keeps_memory()), os.environ.get("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "none"))
"""


@pytest.mark.process
def test_where_memory_is_tight_freed_memory_goes_back_and_few_kernels_are_kept() -> None:
    assert outcome(TIGHT, "set").split() == ["0", "64"]
    assert outcome(TIGHT, "leave").split() == ["1", "none"]
