"""The processes that benchmarks compare: their command line, their turns, and their ends."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from tests.scripts import load_script

# A side that answers each order, and ends with the reason on its errors at an order of 0 steps.
SIDE = """
import sys
print("ready", flush=True)
for line in sys.stdin:
    if not int(line):
        sys.exit("out of memory")
    print('{"clips": %d}' % int(line), flush=True)
    if int(line) == 13:
        sys.exit("killed between turns")
"""
MUTE = "import time; time.sleep(60)"
# A side with a worker, whose number it writes to a file.
WITH_WORKER = """
import subprocess, sys
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open(sys.argv[1], "w").write(str(worker.pid))
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def sides() -> Iterator[ModuleType]:
    module = load_script("benchmarks/sides.py")
    yield module
    module.begin_again()


def test_overrides_may_come_before_and_after_options() -> None:
    words = ["ours", "folder", "deepspeed=zero1", "--as-on-gpu", "--threads", "1", "ds.bf16.enabled=false"]
    arguments = load_script("benchmarks/training_side.py").read_arguments(words)
    assert arguments.overrides == ["deepspeed=zero1", "ds.bf16.enabled=false"]
    assert arguments.as_on_gpu and arguments.threads == 1


def test_a_side_that_ends_says_why_and_leaves_no_error_behind(sides: ModuleType) -> None:
    with sides.started(["-c", SIDE]) as process:
        assert sides.take_turn(process, 4) == {"clips": 4}
        with pytest.raises(SystemExit, match="out of memory"):
            sides.take_turn(process, 0)
    noisy = "import sys; sys.exit('out of memory\\n[rank0] WARNING: destroy_process_group() was not called')"
    with pytest.raises(SystemExit, match=r"out of memory$"), sides.started(["-c", noisy]):
        pass
    with sides.started(["-c", SIDE]) as process:
        assert sides.take_turn(process, 13) == {"clips": 13}
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it has ended before the next order
        with pytest.raises(SystemExit, match="killed between turns"):
            sides.take_turn(process, 4)


def test_workers_of_a_side_end_with_it(sides: ModuleType, tmp_path: Path) -> None:
    with sides.started(["-c", WITH_WORKER, str(tmp_path / "pid")]):
        worker = int((tmp_path / "pid").read_text())
        assert is_running(worker)
    while is_running(worker):  # the kernel ends it
        time.sleep(0.01)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_when_the_time_is_over_nothing_waits_and_nothing_starts(sides: ModuleType) -> None:
    with sides.ended_after(0.1) as is_over:
        with pytest.raises(SystemExit, match="no time was left"), sides.started(["-c", MUTE]):
            pass
        assert is_over.is_set()
        with pytest.raises(SystemExit, match="no time was left"), sides.started(["-c", SIDE]):
            pass
    sides.begin_again()
    with sides.started(["-c", SIDE]) as process:
        assert sides.take_turn(process, 2) == {"clips": 2}


def test_a_side_that_hangs_fails_alone(sides: ModuleType) -> None:
    with pytest.raises(SystemExit, match=r"did not start within 0 s"), sides.started(["-c", MUTE], limit=0.1):
        pass
    idle = "import sys, time; print('ready', flush=True); time.sleep(60)"
    with sides.started(["-c", idle], limit=60) as process, sides.started(["-c", SIDE], limit=60) as other:
        with pytest.raises(SystemExit, match="more than 0 s"):
            sides.take_turn(process, 4, limit=0.1)
        assert sides.take_turn(other, 4, limit=60) == {"clips": 4}


def test_a_command_that_fails_says_why(sides: ModuleType) -> None:
    assert sides.output_of(["-c", "print(6 * 7)"]) == "42\n"
    with pytest.raises(RuntimeError, match="out of memory"):
        sides.output_of(["-c", "import sys; sys.exit('out of memory')"])


@pytest.fixture
def own_signals() -> Iterator[None]:
    """Signals are handled afterwards as before."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("own_signals")
def test_a_signal_ends_all_sides_before_the_benchmark(sides: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = load_script("benchmarks/gpu.py")
    monkeypatch.setattr(gpu, "end_all", sides.end_all)

    def open_side() -> str:
        try:
            with sides.started(["-c", MUTE]):
                return "it is ready"
        except SystemExit as error:
            return str(error)

    stop = gpu.Stop()
    with pytest.raises(SystemExit, match="SIGTERM"):
        stop(signal.SIGTERM, None)
    stop.is_taking = True
    with ThreadPoolExecutor(1) as threads:
        opening = threads.submit(open_side)
        stop(signal.SIGTERM, None)
        assert "ready" not in opening.result()
    assert stop.name == "SIGTERM"
    assert signal.getsignal(signal.SIGINT) == signal.getsignal(signal.SIGTERM) == signal.SIG_IGN, "it comes twice"


def test_what_a_run_has_compiled_captured_and_warned_of_is_read_from_its_log() -> None:
    figures = load_script("benchmarks/turn_figures.py")
    log = (
        "2026-01-01 toolkit INFO compiling a layer took 1.5 s\n"
        "2026-01-01 toolkit INFO compiling a layer took 12.0 s\n"
        "2026-01-01 toolkit INFO a CUDA graph: passes of 16 clips, 96 frames, 32 tokens\n"
        "2026-01-01 toolkit WARNING the loss jumped\n"
    )
    assert figures.made_by(log) == {"compiled": 2, "compile_seconds": 13.5, "captured": 1}
    warned = figures.made_by(log + "2026-01-01 toolkit WARNING layers run without compilation from here on: no gcc\n")
    assert warned["warning"] == "layers run without compilation from here on: no gcc"


def event(name: str, start: int, end: int, number: int, *, on_gpu: bool = True, marks: bool = False) -> Any:
    """One of torch's profiler, with the methods that are asked."""
    kind = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    answers = {"name": name, "start_ns": start, "end_ns": end, "correlation_id": number, "device_type": kind}
    return SimpleNamespace(
        **{key: lambda value=value: value for key, value in answers.items()}, is_user_annotation=lambda: marks
    )


def test_the_gpu_is_busy_with_kernels_and_copies_of_all_streams_and_a_graph_is_one_launch() -> None:
    turns = load_script("benchmarks/turns.py")
    profile = turns.Profile.__new__(turns.Profile)
    events = [
        event("cudaLaunchKernel", 0, 10, 1, on_gpu=False),
        event("cuLaunchKernel", 1, 9, 1, on_gpu=False),  # within it
        event("cudaGraphLaunch", 20, 30, 2, on_gpu=False),
        event("cudaStreamSynchronize", 30, 99, 3, on_gpu=False),
        event("Optimizer.step", 0, 10**9, 4, marks=True),
        event("gemm", 10**8, 3 * 10**8, 1),
        event("Memcpy HtoD", 2 * 10**8, 4 * 10**8, 5),
        event("norm of the graph", 6 * 10**8, 7 * 10**8, 2),
        event("dropout of the graph", 7 * 10**8, 8 * 10**8, 2),
    ]
    profile.own = SimpleNamespace(profiler=SimpleNamespace(kineto_results=SimpleNamespace(events=lambda: events)))
    assert turns.covered(profile.spans()) == pytest.approx(0.5)
    assert (len(profile.spans()), profile.launches()) == (4, 2)


def test_an_error_in_short_has_its_end_and_what_a_compiler_called_an_error() -> None:
    sides = load_script("benchmarks/sides.py")
    log = f"[1/7] c++ {'-I include ' * 200}x.h:10:10: fatal error: cusparse.h: No such file\ncompilation terminated\n"
    error = RuntimeError(f"{log}{'[2/7] nvcc -O3 ' * 400}\nRuntimeError: Error building extension 'quantizer'\n")
    assert "fatal error: cusparse.h: No such file\n" in sides.in_short(error)
    assert sides.in_short(error).endswith("RuntimeError: Error building extension 'quantizer'")
    assert len(sides.in_short(error)) < 800
    assert sides.in_short(SystemExit("ended during its turn:\nOutOfMemoryError: no room")).endswith(
        "\nOutOfMemoryError: no room"
    )
