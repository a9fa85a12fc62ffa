"""Ops are built in the environment's own folder, and a lock that a killed build left is named instead of waited for."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from toolkit.cluster import ops
from toolkit.errors import UserError


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


def test_a_lock_that_nobody_holds_is_an_error_that_says_how_to_mend_it(extensions):
    lock = leave_lock(extensions)
    assert ops.stale_locks() == [lock]
    with pytest.raises(UserError, match=r"deepspeed_shm_comm was killed.*build-ops --force") as error:
        ops.check_locks()
    assert str(lock) in str(error.value) and "\n" not in str(error.value)


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
    with pytest.raises(UserError, match=r"not built: .*build-ops async_io.*--ds zero3_offload"):
        ops.check_needed_ops({"zero_optimization": zero})
    ops.check_needed_ops({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}})
    (extensions / "async_io").mkdir()
    (extensions / "async_io" / "async_io.so").touch()
    ops.check_needed_ops({"zero_optimization": zero})


def test_force_removes_the_lock(extensions):
    lock = leave_lock(extensions)
    said = []
    assert ops.build_ops([], force=True, echo=said.append) == {}
    assert not lock.exists()
    assert len(said) == 1 and str(lock) in said[0]


def test_an_unknown_op_is_refused_before_anything_is_touched(extensions):
    lock = leave_lock(extensions)
    with pytest.raises(UserError, match="no op is called 'cpu_adm': choose from shm_comm, cpu_adam"):
        ops.build_ops(["cpu_adm"], force=True)
    assert lock.exists()


def test_probing_for_a_library_works_while_deepspeed_is_kept_quiet(capfd):
    """DeepSpeed's probe for libaio uses the descriptor of stderr, and takes any failure for a missing library."""
    with ops._silence():
        print("compiler's chatter")
        assert sys.stderr.fileno() > 2
    assert capfd.readouterr().out == ""
