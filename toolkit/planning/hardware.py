"""The hardware that a plan is for, and the few constants by which speeds are compared.

The constants are round figures of one class of machine (a data-centre GPU of about 2023, PCIe 4, 100 Gbit/s between
nodes). They order DeepSpeed JSONs by speed; they do not promise seconds.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from toolkit.errors import UserError

GIB = 2**30
UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": GIB, "TiB": 2**40, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
LARGEST_CARD = 1024 * GIB

# What a process takes of a card before it trains: the CUDA context, and NCCL's buffers where ranks communicate.
CUDA_CONTEXT = int(0.5 * GIB)
NCCL_BUFFERS = int(0.3 * GIB)
# cuBLAS keeps a workspace for each thread and stream that has multiplied, of so much on recent cards: for the forward
# and the backward thread, and for the stream of CUDA graphs.
CUBLAS_WORKSPACE = 32 * 2**20
# Rows of the square matrices whose product a rank times before it trains, to know what its GPU could do.
MEASURED_ROWS = 8192
# The share of what is allocated that torch's allocator loses between its blocks.
FRAGMENTS = 0.05
# A process without a model: Python, torch, transformers, DeepSpeed.
PROCESS = int(1.5 * GIB)
# Of a rank on a CPU: its libraries, with the code that a run calls; torch's compiler, which ZeRO imports with Muon, or
# PEFT, which imports the compiler too; what objects other than tensors take until the first step, and from then on.
CPU_LIBRARIES = int(0.48 * GIB)
CPU_COMPILER = int(0.040 * GIB)
CPU_PEFT = int(0.049 * GIB)
CPU_OBJECTS = (int(0.012 * GIB), int(0.030 * GIB))
# What oneDNN and torch keep of each different matrix product in bf16: descriptions of its kernels, and their code.
CPU_KERNEL = int(0.6 * 2**20)

# Sustained, not peak: a large product of bf16 matrices; fp32 products (TF32 off) run at a fraction of it.
FLOPS = 2.5e14
FP32_SHARE = 0.125
# One kernel of a forward or backward pass, as a Python program launches it; a pass is never faster than its launches.
KERNEL_SECONDS = 2.0e-5
# DeepSpeed's hooks of stages 2 and 3, for each trained tensor and backward pass. At stage 1 the host takes no longer
# than at stage 0 (benchmarks/results/host_cost.json, gpu.json).
HOOK_SECONDS = 1.0e-4
GATHER_SECONDS = 1.5e-4  # ZeRO stage 3 gathers and releases a module, on top of the bytes
MEMORY_BANDWIDTH = 2.0e12  # bytes/s of a card's memory, which the optimizer's step is bound by
NODE_BANDWIDTH = 1.5e11  # bytes/s of a rank to the other cards of its node
NETWORK_BANDWIDTH = 1.0e10  # bytes/s of a rank to other nodes
HOST_LINK = 1.2e10  # bytes/s between a card and the host's memory
HOST_ADAM = (
    2.0e10  # bytes/s of optimizer states that DeepSpeed's CPUAdam reads and writes on a host, all ranks together
)
NVME_BANDWIDTH = 3.0e9  # bytes/s of a node's disk


@dataclass(frozen=True)
class Hardware:
    """Nodes that are alike, with one rank on each GPU.

    Attributes:
        gpus: of all nodes together.
        gpu_memory: bytes of each.
        nodes: how many machines they are in.
        host_memory: bytes of main memory of a node; None = not known, and then not checked.
        nvme: bytes of free disk of a node, for offloading; None = not known.
    """

    gpus: int
    gpu_memory: int
    nodes: int = 1
    host_memory: int | None = None
    nvme: int | None = None

    def __post_init__(self) -> None:
        for name, count in (("--gpus", self.gpus), ("--nodes", self.nodes)):
            if count < 1:
                raise UserError(f"{name} {count}: a plan needs at least one", f"give {name} 1 or more")
        if self.gpus % self.nodes:
            raise UserError(
                f"--gpus {self.gpus} on --nodes {self.nodes}: nodes have the same number of GPUs",
                f"--gpus counts those of all nodes: give a multiple of {self.nodes}",
            )
        if self.gpu_memory > LARGEST_CARD:
            raise UserError(
                f"--gpu-memory {in_gib(self.gpu_memory)}: no GPU has so much",
                "give the memory of one GPU, e.g. --gpu-memory 24GiB",
            )

    @property
    def ranks_per_node(self) -> int:
        return self.gpus // self.nodes

    @property
    def context(self) -> int:
        """Bytes of a card that no tensor can have."""
        return CUDA_CONTEXT + (NCCL_BUFFERS if self.gpus > 1 else 0)

    def in_words(self) -> str:
        """E.g. ``8 GPUs of 24 GiB on 2 nodes with 256 GiB of memory``."""
        gpus = "1 GPU" if self.gpus == 1 else f"{self.gpus} GPUs"
        nodes = "" if self.nodes == 1 else f" on {self.nodes} nodes"
        host = "" if self.host_memory is None else f" with {in_gib(self.host_memory)} of memory"
        disk = "" if self.nvme is None else f" and {in_gib(self.nvme)} of NVMe"
        return f"{gpus} of {in_gib(self.gpu_memory)}{nodes}{host or (' with' if disk else '')}{disk}".replace(
            "with and", "with"
        )


def parse_size(text: str, option: str) -> int:
    """Bytes of a text such as ``24GiB`` or ``1.5TB``.

    Raises:
        UserError: it is no size, has no known unit, or is not positive.
    """
    match = re.fullmatch(r"\s*([+-]?[\d.]+)\s*([A-Za-z]*)\s*", text)
    known = {unit.lower(): size for unit, size in UNITS.items()} | {"g": GIB, "gi": GIB, "t": 2**40, "ti": 2**40}
    try:
        number = float(match[1]) if match else None
    except ValueError:
        number = None
    if match is None or number is None or match[2].lower() not in known:
        raise UserError(
            f"{option} {text}: not a size with a known unit",
            f"write a number and one of {', '.join(UNITS)}: {option} 24GiB",
        )
    if number <= 0 or number * known[match[2].lower()] < 1:
        raise UserError(f"{option} {text}: a size is more than 0", f"write e.g. {option} 24GiB")
    return int(number * known[match[2].lower()])


def in_gib(size: float) -> str:
    """Bytes as GiB for people: ``24 GiB``, ``0.35 GiB``."""
    gib = size / GIB
    return f"{gib:.0f} GiB" if gib >= 100 or abs(gib - round(gib)) < 5e-3 else f"{gib:.2f} GiB"
