"""Ranks share the cores that they may use."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.hidden_gpus import python_path
from tests.time_limits import limit
from toolkit.cluster.cores import Cores, cgroup_quotas, share_of_cores, usable_cores

ROOT = Path(__file__).parents[2]


def cores(*numbers: int, host: str = "a", **quotas: float) -> Cores:
    return Cores(host, frozenset(numbers), quotas)


@pytest.mark.parametrize(
    ("ranks", "threads"),
    [
        ([cores(0, 1)], [2]),
        ([cores(0, 1), cores(0, 1)], [1, 1]),
        ([cores(0, 1, 2, 3), cores(0, 1, 2, 3, host="b")], [4, 4]),
        ([cores(0, 1, 2, 3), cores(4, 5)], [4, 2]),  # srun, mpirun or numactl bound each rank to its own
        ([cores(*range(8))] * 2 + [cores(*range(8, 16))] * 2, [4] * 4),  # two ranks a socket
        ([cores(0)] * 3, [1, 1, 1]),
        ([cores(*range(64), container=6.0)] * 2, [3, 3]),
        ([cores(*range(64), container=0.5)], [1]),
        ([cores(*range(64), container=8.0, task1=2.0), cores(*range(64), container=8.0)], [2, 4]),
    ],
)
def test_the_share_of_each_rank(ranks: list[Cores], threads: list[int]) -> None:
    assert [share_of_cores(rank, ranks) for rank in ranks] == threads


@given(st.lists(st.sets(st.integers(0, 31), min_size=1), min_size=1, max_size=12))
def test_all_ranks_together_take_no_more_threads_than_cores_or_one_each(sets: list[set[int]]) -> None:
    ranks = [cores(*numbers) for numbers in sets]
    threads = [share_of_cores(rank, ranks) for rank in ranks]
    assert all(1 <= count <= len(numbers) for count, numbers in zip(threads, sets, strict=True))
    assert sum(count for count in threads if count > 1) <= len(set().union(*sets))


@pytest.mark.process
def test_the_affinity_counts_and_not_the_machine() -> None:
    mine = min(os.sched_getaffinity(0))
    script = "import sys, os; os.sched_setaffinity(0, {int(sys.argv[1])}); "
    script += "from toolkit.cluster.cores import usable_cores; print(sorted(usable_cores().numbers))"
    said = subprocess.run([sys.executable, "-c", script, str(mine)], cwd=ROOT, capture_output=True, text=True)
    assert said.stdout.strip() == f"[{mine}]"
    assert usable_cores().numbers == os.sched_getaffinity(0)


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(content + "\n")


def test_quotas_of_all_enclosing_cgroups_are_found(tmp_path: Path) -> None:
    (tmp_path / "self").write_text("0::/slurm/job_7/task_1\n")
    root = tmp_path / "cgroup"
    write(root / "slurm" / "job_7" / "task_1", cpu__max="200000 100000")
    write(root / "slurm" / "job_7", cpu__max="max 100000")
    write(root / "slurm", cpu__max="3200000 100000")
    assert cgroup_quotas(tmp_path / "self", root) == {":/slurm/job_7/task_1": 2.0, ":/slurm": 32.0}


def test_quotas_of_the_first_version_of_cgroups_are_found(tmp_path: Path) -> None:
    (tmp_path / "self").write_text("5:memory:/docker/7\n4:cpu,cpuacct:/docker/7\n1:name=systemd:/docker/7\n")
    root = tmp_path / "cgroup"
    write(root / "cpu,cpuacct" / "docker" / "7", cpu__cfs_quota_us="150000", cpu__cfs_period_us="100000")
    write(root / "cpu,cpuacct", cpu__cfs_quota_us="-1", cpu__cfs_period_us="100000")
    write(root / "memory" / "docker" / "7", cpu__cfs_quota_us="1", cpu__cfs_period_us="100000")
    assert cgroup_quotas(tmp_path / "self", root) == {"cpu,cpuacct:/docker/7": 1.5}


def test_no_cgroups_are_no_limit(tmp_path: Path) -> None:
    assert cgroup_quotas(tmp_path / "none", tmp_path) == {}


TWO_RANKS = """
    import torch
    from torch import distributed as dist
    from toolkit.cluster.ranks import read_ranks
    from toolkit.cluster.process_group import use_threads
    before = torch.get_num_threads()
    dist.init_process_group("gloo")
    use_threads(read_ranks())
    print(before, torch.get_num_threads())
    dist.destroy_process_group()
"""


def start(rank: int, port: int, **changed: str) -> subprocess.Popen[str]:
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    kept = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(TWO_RANKS)],
        env=kept | group | {"WORLD_SIZE": "2", "LOCAL_SIZE": "2", "PYTHONPATH": python_path(ROOT)} | changed,
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.process
def test_two_ranks_share_the_cores_unless_somebody_said_how_many(free_port: int) -> None:
    all_cores = len(os.sched_getaffinity(0))
    ranks = [start(0, free_port), start(1, free_port, OMP_NUM_THREADS=str(all_cores))]
    first, second = (rank.communicate(timeout=limit(120))[0].split() for rank in ranks)
    assert int(first[1]) == min(int(first[0]), share_of_cores(usable_cores(), [usable_cores()] * 2))
    assert int(first[1]) <= max(1, all_cores // 2)
    assert second[1] == second[0]
