"""The ranks that launchers announce, and the refusal of more ranks than devices."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolkit.cluster.ranks import (
    Ranks,
    check_master_address,
    check_ranks,
    read_local_rank,
    read_ranks,
    tasks_per_node,
)
from toolkit.errors import UserError


def test_a_lone_process_is_rank_0_of_1():
    assert read_ranks({}) == Ranks(0, 0, 1, 1)


@pytest.mark.parametrize(
    "environment",
    [
        {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_SIZE": "4"},  # deepspeed
        {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"},  # torchrun
        {
            "OMPI_COMM_WORLD_RANK": "5",
            "OMPI_COMM_WORLD_LOCAL_RANK": "1",
            "OMPI_COMM_WORLD_SIZE": "8",
            "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
        },
        {
            "MV2_COMM_WORLD_RANK": "5",
            "MV2_COMM_WORLD_LOCAL_RANK": "1",
            "MV2_COMM_WORLD_SIZE": "8",
            "MV2_COMM_WORLD_LOCAL_SIZE": "4",
        },
        {
            "PMI_RANK": "5",
            "MPI_LOCALRANKID": "1",
            "PMI_SIZE": "8",
            "MPI_LOCALNRANKS": "4",
            # Its daemons are tasks of srun, one a node.
            "SLURM_PROCID": "1",
            "SLURM_LOCALID": "0",
            "SLURM_STEP_NUM_TASKS": "2",
            "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
        },
        {
            "SLURM_PROCID": "5",
            "SLURM_LOCALID": "1",
            "SLURM_STEP_NUM_TASKS": "8",
            "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
            "SLURM_NODEID": "1",
            "PMI_RANK": "5",  # `srun --mpi=pmi2` sets these two as well
            "PMI_SIZE": "8",
        },
    ],
    ids=["deepspeed", "torchrun", "openmpi", "mvapich2", "hydra", "slurm"],
)
def test_launchers_are_understood(environment):
    ranks = read_ranks(environment)
    assert ranks == Ranks(rank=5, local_rank=1, world_size=8, local_world_size=4)
    assert not ranks.is_main and not ranks.is_local_main
    assert read_local_rank(environment) == 1


def of_slurm(rank: int, local_rank: int, tasks: str, node: int | None) -> dict[str, str]:
    environment = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(local_rank), "SLURM_STEP_TASKS_PER_NODE": tasks}
    if node is not None:
        environment["SLURM_NODEID"] = str(node)
    return environment | {"SLURM_STEP_NUM_TASKS": "12"}


@pytest.mark.parametrize(
    ("rank", "local_rank", "tasks", "node", "here"),
    [(7, 7, "8,4", 0, 8), (11, 3, "8,4", 1, 4), (9, 1, "4(x2),3,1", 2, 3), (11, 0, "4(x2),3,1", 3, 1)],
)
def test_nodes_of_a_slurm_step_may_differ(rank, local_rank, tasks, node, here):
    ranks = read_ranks(of_slurm(rank, local_rank, tasks, node))
    assert ranks == Ranks(rank, local_rank, 12, here)
    check_ranks(ranks, gpus=here, environment={})


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        (of_slurm(11, 5, "8,4", 1), "SLURM_LOCALID=5"),
        (of_slurm(11, 3, "8,4", 2), "SLURM_NODEID=2 .* 2 nodes"),
        (of_slurm(11, 3, "8,4", None), "SLURM_NODEID"),
        (of_slurm(11, 3, "eight", 0), "SLURM_STEP_TASKS_PER_NODE .*'eight'"),
    ],
)
def test_a_slurm_step_that_contradicts_itself_is_refused(environment, named):
    with pytest.raises(UserError, match=named) as error:
        read_ranks(environment)
    assert "start" in error.value.hint


@given(st.lists(st.tuples(st.integers(1, 128), st.integers(1, 20)), min_size=1, max_size=6))
def test_slurms_short_form_of_tasks_is_written_out(runs):
    text = ",".join(f"{tasks}(x{nodes})" if nodes > 1 else str(tasks) for tasks, nodes in runs)
    assert tasks_per_node(text) == [tasks for tasks, nodes in runs for _ in range(nodes)]


@given(st.text("0123456789(x), ", max_size=12))
def test_what_slurm_does_not_write_is_refused_or_read_to_its_end(text):
    try:
        tasks = tasks_per_node(text)
    except ValueError:
        return
    assert len(tasks) >= text.count(",") + 1 or "(x0" in text


@pytest.mark.parametrize(
    ("environment", "local_rank"),
    [
        ({}, 0),
        ({"RANK": "3", "WORLD_SIZE": "4"}, 0),
        ({"RANK": "x", "LOCAL_RANK": "2", "WORLD_SIZE": "4"}, 2),
        ({"RANK": "3", "LOCAL_RANK": "two", "WORLD_SIZE": "4"}, 0),
        ({"RANK": "3", "LOCAL_RANK": "-1", "WORLD_SIZE": "4"}, 0),
        (of_slurm(11, 3, "nonsense", 7), 3),
    ],
)
def test_who_prints_an_error_is_known_whatever_the_environment_says(environment, local_rank):
    assert read_local_rank(environment) == local_rank


@pytest.mark.parametrize(
    ("variable", "one_each"),
    [
        ({"SLURM_STEP_TASKS_PER_NODE": "4(x2)"}, True),  # srun --gpus-per-task=1
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, True),
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x2)"}, False),  # torchrun or deepspeed as a task of srun
        ({}, False),
    ],
)
def test_several_ranks_see_one_gpu_only_where_each_can_have_its_own(variable, one_each):
    ranks = Ranks(rank=3, local_rank=3, world_size=8, local_world_size=4)
    if one_each:
        check_ranks(ranks, gpus=1, environment=variable)
    else:
        with pytest.raises(UserError, match=r"--num_gpus 4 .* 1 GPU "):
            check_ranks(ranks, gpus=1, environment=variable)
    with pytest.raises(UserError, match="2 GPUs "):
        check_ranks(ranks, gpus=2, environment=variable)


def test_a_batch_script_outside_srun_is_a_single_process():
    assert read_ranks({"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8"}) == Ranks()


@pytest.mark.parametrize(
    "environment",
    [
        {"RANK": "8", "LOCAL_RANK": "0", "WORLD_SIZE": "8"},
        {"RANK": "0", "LOCAL_RANK": "4", "WORLD_SIZE": "8", "LOCAL_SIZE": "4"},
        {"RANK": "zero", "LOCAL_RANK": "0", "WORLD_SIZE": "8"},
    ],
)
def test_variables_that_do_not_fit_are_named(environment):
    with pytest.raises(UserError, match="RANK"):
        read_ranks(environment)


def test_ranks_must_not_exceed_the_devices():
    eight = Ranks(world_size=8, local_world_size=8)
    check_ranks(eight, gpus=8, cores=2)
    check_ranks(eight, gpus=0, cores=8)
    with pytest.raises(UserError, match=r"--num_gpus 8 .* 2 GPUs ") as error:
        check_ranks(eight, gpus=2, cores=64)
    assert "--num_gpus 2" in error.value.hint
    with pytest.raises(UserError, match="1 CPU core "):
        check_ranks(eight, gpus=0, cores=1)


def test_ranks_without_a_master_address_are_refused():
    check_master_address(Ranks(), {})
    check_master_address(Ranks(world_size=2), {"MASTER_ADDR": "node-a"})
    with pytest.raises(UserError, match=r"2 ranks .* MASTER_ADDR") as error:
        check_master_address(Ranks(world_size=2), {"SLURM_STEP_NUM_TASKS": "2"})
    assert "MASTER_ADDR and MASTER_PORT" in error.value.hint


def test_only_the_ranks_of_this_node_count():
    check_ranks(Ranks(rank=9, local_rank=1, world_size=16, local_world_size=2), gpus=2)
