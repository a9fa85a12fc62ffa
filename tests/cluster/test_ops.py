"""Ops are built in the environment's own folder, by one process at a time; a lock of a killed build is an error."""

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import deepspeed.accelerator
import pytest

from tests.time_limits import limit
from toolkit.cluster import ops
from toolkit.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def extensions(tmp_path, monkeypatch) -> Path:
    """An empty build folder."""
    folder = tmp_path / "torch_extensions"
    folder.mkdir()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(folder))
    return folder


def leave_lock(extensions: Path, name: str = "deepspeed_shm_comm") -> Path:
    lock = extensions / name / "lock"
    lock.parent.mkdir()
    lock.touch()
    return lock


def test_the_build_folder_is_the_environments_own_unless_the_user_chose(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", os.environ["PATH"])  # restored afterwards
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert ops.use_extensions_dir() == tmp_path
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    assert ops.use_extensions_dir() == tmp_path / "torch_extensions"
    assert os.environ["TORCH_EXTENSIONS_DIR"] == str(tmp_path / "torch_extensions")


def test_compiled_layers_are_kept_in_the_environment_unless_the_user_chose(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "chosen"))
    assert ops.use_compile_cache() is None
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "chosen")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    assert ops.use_compile_cache() is None
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "torch_inductor")
    assert (tmp_path / "torch_inductor").is_dir()


def test_a_folder_that_cannot_hold_compiled_layers_is_named_and_not_used(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file" / "cache"))
    assert str(tmp_path / "file" / "cache") in (ops.use_compile_cache() or "")
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ


def test_tools_of_an_environment_that_was_not_activated_are_found(monkeypatch, extensions):
    tools = str(Path(sys.executable).parent)
    if not (Path(tools) / "ninja").exists():
        pytest.skip("this environment has no ninja of its own")
    monkeypatch.setenv("PATH", "/nonexistent")
    ops.use_extensions_dir()
    assert os.environ["PATH"].split(os.pathsep) == [tools, "/nonexistent"]
    ops.use_extensions_dir()
    assert os.environ["PATH"].split(os.pathsep) == [tools, "/nonexistent"], "once is enough"


def test_the_environments_own_ninja_comes_before_the_systems(monkeypatch, extensions, tmp_path):
    """Two versions of ninja do not know each other's builds: each would build every op again, for minutes."""
    own = Path(sys.executable).parent / "ninja"
    if not own.exists():
        pytest.skip("this environment has no ninja of its own")
    systems = tmp_path / "ninja"
    systems.write_text("#!/bin/sh\n")
    systems.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    ops.use_extensions_dir()
    assert shutil.which("ninja") == str(own)


def test_no_lock_no_complaint(extensions):
    assert ops.stale_locks() == []
    ops.check_locks()


def test_a_lock_that_no_process_holds_is_an_error(extensions):
    lock = leave_lock(extensions)
    assert ops.stale_locks() == [lock]
    with pytest.raises(UserError, match="deepspeed_shm_comm") as error:
        ops.check_locks()
    assert str(lock) in error.value.message and "build-ops --force" in error.value.hint


@pytest.mark.process
def test_a_lock_of_a_living_build_is_left_alone(extensions):
    lock = leave_lock(extensions)
    holder = subprocess.Popen(
        [sys.executable, "-c", f"lock = open({str(lock)!r}); print('held', flush=True); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout.readline() == "held\n"
        assert ops.stale_locks() == []
        ops.check_locks()
    finally:
        holder.kill()
        holder.communicate()
    assert ops.stale_locks() == [lock]  # the build died, its lock stayed


def test_a_run_that_swaps_to_disk_needs_its_op_beforehand(extensions):
    zero = {"stage": 3, "offload_optimizer": {"device": "nvme"}, "offload_param": {"device": "cpu"}}
    with pytest.raises(UserError, match="async_io") as error:
        ops.check_needed_ops({"zero_optimization": zero})
    assert "build-ops async_io" in error.value.hint and "--ds zero3_offload" in error.value.hint
    ops.check_needed_ops({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}})
    (extensions / "async_io").mkdir()
    (extensions / "async_io" / "async_io.so").touch()
    ops.check_needed_ops({"zero_optimization": zero})


@pytest.mark.parametrize(
    ("optimizer", "zero", "names"),
    [
        ({"type": "AdamW", "params": {"torch_adam": True}}, {"stage": 2}, []),
        ({"type": "AdamW", "params": {}}, {"stage": 2}, ["fused_adam"]),
        ({"type": "AdamW", "params": {}}, {"offload_optimizer": {"device": "cpu"}}, ["cpu_adam"]),
        ({"type": "Lion", "params": {}}, {"offload_param": {"device": "nvme"}}, ["async_io"]),
    ],
)
def test_the_ops_of_a_run_follow_from_its_json(optimizer, zero, names):
    assert ops.needed_ops({"optimizer": optimizer, "zero_optimization": zero}) == names


# A process that builds an op with a command of our own: the build ends when the other process waits for it.
BUILDER = """
import sys, time
from pathlib import Path
from toolkit.cluster import ops

log, library, folder = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])

class Builder:
    def is_compatible(self, verbose):
        return True

    def load(self, verbose):
        if library.exists():
            return
        with log.open("a") as file:
            file.write("build\\n")
        while not any("waiting" in path.read_text() for path in folder.glob("*.txt")):
            time.sleep(0.01)
        library.parent.mkdir(exist_ok=True)
        library.touch()

class Accelerator:
    def create_op_builder(self, name):
        return Builder()

import deepspeed.accelerator
deepspeed.accelerator.get_accelerator = Accelerator
ops.build_missing_ops(["cpu_adam"], lambda line: print(line, flush=True))
"""


@pytest.mark.process
def test_two_processes_never_build_one_op_at_the_same_time(extensions, tmp_path):
    log, library = tmp_path / "log", extensions / "cpu_adam" / "cpu_adam.so"
    texts = [tmp_path / "first.txt", tmp_path / "second.txt"]
    command = [sys.executable, "-c", BUILDER, str(log), str(library), str(tmp_path)]
    processes = []
    for text in texts:
        with text.open("w") as out:
            processes.append(subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT))
    try:
        codes = [process.wait(limit(60)) for process in processes]
    finally:
        for process in processes:
            process.kill()
    printed = [text.read_text() for text in texts]
    assert codes == [0, 0], printed
    assert log.read_text() == "build\n"
    building, waiting = sorted(printed, key=lambda text: "waiting" in text)
    assert "building, one to four minutes" in building and "ready after" in building
    assert "building" not in waiting


class Waiting:
    """A thread that wants to build an op, and what it says."""

    def __init__(self, work: Callable[[Callable[[str], None]], object]) -> None:
        self.lines: list[str] = []
        self.thread = threading.Thread(target=lambda: work(self.lines.append))
        self.thread.start()

    def waits(self) -> bool:
        """Whether it says that it waits, rather than that it builds or nothing before it ends."""
        while not self.lines and self.thread.is_alive():
            time.sleep(0.01)
        return "waiting" in "".join(self.lines)


def test_a_build_from_scratch_waits_for_another_build_and_is_waited_for(extensions, monkeypatch):
    """Nothing is removed under a build, nor is the lock with the folder that is removed."""
    product, order = extensions / "cpu_adam" / "product.o", []

    def lock_and_note(echo):
        with ops.building("cpu_adam", echo):
            order.append("third")

    def load(verbose):
        third.append(Waiting(lock_and_note))
        assert third[0].waits()
        order.append("second")

    third: list[Waiting] = []
    builder = SimpleNamespace(is_compatible=lambda verbose: True, load=load)
    monkeypatch.setattr(
        deepspeed.accelerator, "get_accelerator", lambda: SimpleNamespace(create_op_builder=lambda name: builder)
    )
    with ops.building("cpu_adam", print):
        product.parent.mkdir()
        product.touch()
        second = Waiting(lambda echo: ops.build_ops(["cpu_adam"], force=True, echo=echo))
        assert second.waits()
        assert product.exists()
        order.append("first")
    second.thread.join()
    third[0].thread.join()
    assert not product.exists()
    assert order == ["first", "second", "third"]


def test_force_removes_the_lock(extensions):
    lock = leave_lock(extensions)
    lines: list[str] = []
    assert ops.build_ops([], force=True, echo=lines.append) == {}
    assert not lock.exists()
    assert len(lines) == 1 and str(lock) in lines[0]


def test_an_unknown_op_is_refused_before_anything_is_touched(extensions):
    lock = leave_lock(extensions)
    with pytest.raises(UserError, match="'cpu_adm'") as error:
        ops.build_ops(["cpu_adm"], force=True)
    assert "shm_comm, cpu_adam" in error.value.hint
    assert lock.exists()


def test_probing_for_a_library_works_while_deepspeed_is_kept_quiet(capfd):
    """DeepSpeed's probe for libaio uses the descriptor of stderr, and takes any failure for a missing library."""
    with ops._silence():
        print("compiler's chatter")
        assert sys.stderr.fileno() > 2
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(
    ("given", "corrected"),
    [
        ("9.0a", "9.0"),  # as NVIDIA's images have it
        ("8.0 9.0a+PTX", "8.0;9.0+PTX"),
        ("9.0;9.0a;", "9.0"),
        ("10.0f", "10.0"),
        ("8.0;9.0+PTX", "8.0;9.0+PTX"),
        ("Hopper", ""),  # the GPUs that are here
        ("8.0;Hopper", ""),
        ("", ""),
    ],
)
def test_capabilities_that_the_builder_cannot_read_are_corrected(given, corrected, monkeypatch, extensions):
    monkeypatch.setenv("PATH", os.environ["PATH"])
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", given)
    ops.use_extensions_dir()
    assert os.environ["TORCH_CUDA_ARCH_LIST"] == corrected


def test_the_builder_reads_what_was_corrected_and_nothing_else(monkeypatch):
    from deepspeed.ops.op_builder.fused_adam import FusedAdamBuilder

    builder = FusedAdamBuilder()
    builder.jit_mode = True
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0a")
    with pytest.raises(ValueError, match="0a"):
        builder.compute_capability_args()
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", ops.readable_architectures("9.0a"))
    builder.compute_capability_args()
    assert os.environ["TORCH_CUDA_ARCH_LIST"] == "9.0+PTX"
