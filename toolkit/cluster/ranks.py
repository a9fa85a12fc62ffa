"""Which process of how many this is, read from the launcher's environment variables.

It needs no process group, so that wrong input is reported once per node before there is one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from toolkit.errors import UserError

SLURM_TASKS, SLURM_NODE = "SLURM_STEP_TASKS_PER_NODE", "SLURM_NODEID"
# rank, local rank, world size, ranks on this node: DeepSpeed's and torch's launchers (one says LOCAL_SIZE, the other
# LOCAL_WORLD_SIZE), Open MPI, MVAPICH2, Hydra (mpiexec of MPICH and Intel MPI), SLURM's srun. srun comes last: the
# others may start their daemons with it, and SLURM counts those.
LAUNCHERS: tuple[tuple[str, str, str, tuple[str, ...]], ...] = (
    ("RANK", "LOCAL_RANK", "WORLD_SIZE", ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")),
    (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_SIZE",
        ("OMPI_COMM_WORLD_LOCAL_SIZE",),
    ),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_SIZE", ("MV2_COMM_WORLD_LOCAL_SIZE",)),
    ("PMI_RANK", "MPI_LOCALRANKID", "PMI_SIZE", ("MPI_LOCALNRANKS",)),
    ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS", (SLURM_TASKS,)),
)


@dataclass(frozen=True)
class Ranks:
    """This process's place in the run."""

    rank: int = 0  # number of this process, 0 to ``world_size - 1``
    local_rank: int = 0  # number of this process on its node
    world_size: int = 1  # processes in the whole run
    local_world_size: int = 1  # processes on this node
    tensor_parallel_size: int = 1  # consecutive processes that hold one copy of the model together

    @property
    def is_main(self) -> bool:
        """Whether this is the one process that writes the run directory."""
        return self.rank == 0

    @property
    def data_parallel_rank(self) -> int:
        """Number of the copy of the model that this process holds a part of: which clips it reads."""
        return self.rank // self.tensor_parallel_size

    @property
    def data_parallel_size(self) -> int:
        """Copies of the model, which share out the clips of a step."""
        return self.world_size // self.tensor_parallel_size

    @property
    def is_first_of_copy(self) -> bool:
        """Whether this process answers for its copy of the model where all that hold it have the same."""
        return self.rank % self.tensor_parallel_size == 0

    @property
    def is_local_main(self) -> bool:
        """Whether this is the one process of its node that prints errors."""
        return self.local_rank == 0


def read_ranks(environment: Mapping[str, str] = os.environ) -> Ranks:
    """The ranks that a launcher gave to this process; a process without a launcher is rank 0 of 1.

    Raises:
        UserError: a launcher's variable is not a number, or the ranks do not fit each other.
    """
    names = _launcher(environment)
    if names is None:
        return Ranks()
    rank, local_rank, world_size, local_sizes = names
    size = _number(environment, world_size)
    ranks = Ranks(
        rank=_number(environment, rank),
        local_rank=_number(environment, local_rank) if local_rank in environment else 0,
        world_size=size,
        local_world_size=next((_on_this_node(environment, name) for name in local_sizes if name in environment), size),
    )
    fits_node = 0 <= ranks.local_rank < ranks.local_world_size <= ranks.world_size
    if not (0 <= ranks.rank < ranks.world_size and fits_node):
        raise UserError(
            f"{rank}={ranks.rank}, {local_rank}={ranks.local_rank} does not fit {world_size}={ranks.world_size} "
            f"with {ranks.local_world_size} on this node",
            "start the run with `deepspeed`, or unset these variables to run a single process",
        )
    return ranks


def read_local_rank(environment: Mapping[str, str] = os.environ) -> int:
    """Number of this process on its node, for printing an error: it never raises; 0 where it is unknown."""
    names = _launcher(environment)
    try:
        return max(0, int(environment[names[1]])) if names else 0
    except (KeyError, ValueError):
        return 0


def tasks_per_node(text: str) -> list[int]:
    """Tasks of each node of a SLURM step: ``8(x2),4`` means 8, 8 and 4.

    Raises:
        ValueError: this is not how SLURM writes it.
    """
    tasks = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if not found:
            raise ValueError(f"not a number of tasks: {part!r}")
        tasks += [int(found[1])] * int(found[2] or 1)
    return tasks


def check_ranks(
    ranks: Ranks,
    *,
    gpus: int,
    cores: int | None = None,
    environment: Mapping[str, str] = os.environ,
    option: str = "--num_gpus",
) -> None:
    """Refuse more ranks on this node than GPUs or, without a GPU, than CPU ``cores`` (None: counted here).

    The environment says whether srun or mpirun started the ranks, which can bind a GPU to each; ``option`` is the one
    that gave their number.

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
            f"{option} {ranks.local_world_size} is more than the {devices} {kind}{plural} of this machine",
            f"start at most {devices} with {option} {devices}",
        )


def check_master_address(ranks: Ranks, environment: Mapping[str, str] = os.environ) -> None:
    """Raise UserError for several ranks without MASTER_ADDR, which would wait for each other without end."""
    if ranks.world_size > 1 and "MASTER_ADDR" not in environment:
        raise UserError(
            f"{ranks.world_size} ranks were started without MASTER_ADDR, the address of rank 0",
            "start the run with `deepspeed` or launch/train_slurm.sh, or set MASTER_ADDR and MASTER_PORT to the host "
            "of rank 0 and a free port of it",
        )


def _are_tasks(environment: Mapping[str, str]) -> bool:
    """Whether the ranks of this node are tasks of srun or mpirun, not processes of a launcher that is one itself."""
    sizes = (SLURM_TASKS, "OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")
    return any(_on_this_node(environment, name) > 1 for name in sizes if name in environment)


def _launcher(environment: Mapping[str, str]) -> tuple[str, str, str, tuple[str, ...]] | None:
    """The variables of the launcher that started this process."""
    for names in LAUNCHERS:
        rank, local_rank, world_size, _ = names
        # A number on the node is a launcher's own; RANK and WORLD_SIZE alone may be set by hand.
        if rank in environment and world_size in environment and (local_rank in environment or rank == "RANK"):
            return names
    return None


def _number(environment: Mapping[str, str], name: str) -> int:
    try:
        return int(environment[name])
    except ValueError:
        raise UserError(
            f"environment variable {name} is {environment[name]!r}, not a number",
            "unset it, or start the run with `deepspeed`",
        ) from None


def _on_this_node(environment: Mapping[str, str], name: str) -> int:
    """How many ranks this node has; SLURM lists all nodes of the step."""
    if name != SLURM_TASKS:
        return _number(environment, name)
    try:
        tasks = tasks_per_node(environment[name])
    except ValueError:
        raise UserError(
            f"environment variable {name} is {environment[name]!r}, not a list such as 8(x2),4",
            "unset it, or start the run with srun",
        ) from None
    node = _number(environment, SLURM_NODE) if SLURM_NODE in environment else 0
    if SLURM_NODE not in environment and len(set(tasks)) > 1:
        raise UserError(
            f"{name}={environment[name]}, and {SLURM_NODE}, the number of this node, is not set",
            "start the run with srun, which sets both",
        )
    if not 0 <= node < len(tasks):
        raise UserError(
            f"{SLURM_NODE}={node} is not one of the {len(tasks)} nodes of {name}={environment[name]}",
            "start the run with srun, which sets both",
        )
    return tasks[node]
