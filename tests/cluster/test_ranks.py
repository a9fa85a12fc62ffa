"""The ranks that launchers announce, and the refusal of more ranks than devices."""

import pytest

from toolkit.cluster.ranks import Ranks, check_meeting_place, check_ranks, read_ranks
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
            "SLURM_PROCID": "5",
            "SLURM_LOCALID": "1",
            "SLURM_STEP_NUM_TASKS": "8",
            "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
        },
    ],
    ids=["deepspeed", "torchrun", "openmpi", "slurm"],
)
def test_launchers_are_understood(environment):
    ranks = read_ranks(environment)
    assert ranks == Ranks(rank=5, local_rank=1, world_size=8, local_world_size=4)
    assert not ranks.is_main and not ranks.speaks


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
        with pytest.raises(UserError, match="it has 1 GPU; start at most 1 here"):
            check_ranks(ranks, gpus=1, environment=variable)
    with pytest.raises(UserError, match="it has 2 GPUs"):
        check_ranks(ranks, gpus=2, environment=variable)


def test_a_batch_script_outside_srun_is_a_lone_process():
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
    with pytest.raises(UserError, match="RANK") as error:
        read_ranks(environment)
    assert "\n" not in str(error.value)


def test_ranks_must_not_exceed_the_devices():
    eight = Ranks(world_size=8, local_world_size=8)
    check_ranks(eight, gpus=8, cores=2)
    check_ranks(eight, gpus=0, cores=8)
    with pytest.raises(UserError, match="it has 2 GPUs; start at most 2 here"):
        check_ranks(eight, gpus=2, cores=64)
    with pytest.raises(UserError, match="it has 1 CPU core; start at most 1 here"):
        check_ranks(eight, gpus=0, cores=1)


def test_ranks_without_a_meeting_place_are_told_so():
    check_meeting_place(Ranks(), {})
    check_meeting_place(Ranks(world_size=2), {"MASTER_ADDR": "node-a"})
    with pytest.raises(UserError, match=r"2 ranks were started .* set MASTER_ADDR and MASTER_PORT"):
        check_meeting_place(Ranks(world_size=2), {"SLURM_STEP_NUM_TASKS": "2"})


def test_only_the_ranks_of_this_node_count():
    check_ranks(Ranks(rank=9, local_rank=1, world_size=16, local_world_size=2), gpus=2)
