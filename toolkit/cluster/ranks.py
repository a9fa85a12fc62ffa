"""Which process of how many this is, read from what the launcher left in the environment.

No process group is needed, so that wrong input is reported, once per node, before one exists.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from toolkit.errors import UserError

# rank, local rank, world size, ranks on this node: DeepSpeed's and torch's launchers, Open MPI, SLURM's srun.
# DeepSpeed says LOCAL_SIZE where torchrun says LOCAL_WORLD_SIZE.
LAUNCHERS = (
    ("RANK", "LOCAL_RANK", "WORLD_SIZE", ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")),
    (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_SIZE",
        ("OMPI_COMM_WORLD_LOCAL_SIZE",),
    ),
    ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS", ("SLURM_STEP_TASKS_PER_NODE",)),
)


@dataclass(frozen=True)
class Ranks:
    """This process's place in the run.

    Attributes:
        rank: number of this process, 0 to ``world_size - 1``.
        local_rank: number of this process on its node.
        world_size: processes in the whole run.
        local_world_size: processes on this node.
    """

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is the one process that writes the run directory."""
        return self.rank == 0

    @property
    def speaks(self) -> bool:
        """Whether this is the one process of its node that prints errors."""
        return self.local_rank == 0


def read_ranks(environment: Mapping[str, str] = os.environ) -> Ranks:
    """The ranks that a launcher gave to this process; a lone process is rank 0 of 1.

    Raises:
        UserError: a launcher's variable is not a number, or the ranks do not fit each other.
    """
    for rank, local_rank, world_size, local_sizes in LAUNCHERS:
        if rank in environment and world_size in environment:
            size = _number(environment, world_size)
            ranks = Ranks(
                rank=_number(environment, rank),
                local_rank=_number(environment, local_rank) if local_rank in environment else 0,
                world_size=size,
                local_world_size=next(
                    (_number(environment, name) for name in local_sizes if name in environment), size
                ),
            )
            if not (0 <= ranks.rank < ranks.world_size and 0 <= ranks.local_rank < ranks.local_world_size):
                raise UserError(
                    f"{rank}={ranks.rank} does not fit {world_size}={ranks.world_size} "
                    f"with {ranks.local_world_size} on this node: "
                    "start the run by `deepspeed`, or unset these variables to run a single process"
                )
            return ranks
    return Ranks()


def check_ranks(
    ranks: Ranks, *, gpus: int, cores: int | None = None, environment: Mapping[str, str] = os.environ
) -> None:
    """Refuse more ranks on this node than it has devices.

    Args:
        ranks: this process's place in the run.
        gpus: GPUs that this process sees; 0 runs on the CPU.
        cores: CPU cores of this node; None counts them.
        environment: says whether srun or mpirun started the ranks, which can bind a GPU to each.

    Raises:
        UserError: more ranks than GPUs, or than cores where the CPU does the work.
    """
    if gpus == 1 and _are_tasks(environment):
        return  # `--gpus-per-task=1`: the one GPU that a rank sees is its own
    cores = cores or os.cpu_count() or 1
    devices, kind = (gpus, "GPU") if gpus else (cores, "CPU core")
    if ranks.local_world_size > devices:
        plural = "" if devices == 1 else "s"
        raise UserError(
            f"--num_gpus {ranks.local_world_size} asks for more ranks than this machine has {kind}s: "
            f"it has {devices} {kind}{plural}; start at most {devices} here"
        )


def check_meeting_place(ranks: Ranks, environment: Mapping[str, str] = os.environ) -> None:
    """Refuse ranks that would wait for each other without end, because nobody told them where rank 0 is.

    Raises:
        UserError: no MASTER_ADDR, as under a bare ``srun`` or ``mpirun``.
    """
    if ranks.world_size > 1 and "MASTER_ADDR" not in environment:
        raise UserError(
            f"{ranks.world_size} ranks were started and none is told where rank 0 is: start the run by `deepspeed` or "
            "by launch/train_slurm.sh, or set MASTER_ADDR and MASTER_PORT to rank 0's host and a free port of it"
        )


def _are_tasks(environment: Mapping[str, str]) -> bool:
    """Whether the ranks of this node are tasks of srun or mpirun, not processes of a launcher that is one itself."""
    sizes = ("SLURM_STEP_TASKS_PER_NODE", "OMPI_COMM_WORLD_LOCAL_SIZE")
    return any(_number(environment, name) > 1 for name in sizes if name in environment)


def _number(environment: Mapping[str, str], name: str) -> int:
    # SLURM writes "4(x2)" for four tasks on each of two nodes.
    value = environment[name].split("(")[0].split(",")[0]
    try:
        return int(value)
    except ValueError:
        raise UserError(
            f"environment variable {name} is {environment[name]!r}, not a number: unset it or start by `deepspeed`"
        ) from None
