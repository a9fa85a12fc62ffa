"""Run a script on GPUs that are not there: everything computes on the CPU, and every tensor claims to be somewhere.

    deepspeed --num_gpus 2 tests/gpu/pretend_gpus.py launch/train.py --recipe demo ...

No machine of the project has two GPUs, and what only two can show is a tensor or a collective in the wrong place. Here
torch says that it sees PRETEND_GPUS GPUs (2); whatever asks for one gets memory of the CPU and a note on its storage,
which the results of operations inherit; ``tensor.device`` reads the note. DeepSpeed takes its ways for CUDA, and the
ranks meet over gloo, which is taken for NCCL. All numbers are real: passes forward and backward, sums, files.

A rank ends with WrongDevice where it

- makes another rank's GPU the current one, or lets anything be placed there;
- gives a collective a tensor that is not on its own GPU, or pickles objects over NCCL while another is current;
- waits at a barrier whose device would be guessed;
- computes with tensors of two devices, or hands one of a GPU to NumPy.

What it cannot show: kernels, streams, memory, NCCL itself. What autograd's own code makes carries no note until an
operation or its parameter gives it one.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE)]

from toolkit.cluster.ops import use_extensions_dir

use_extensions_dir()  # before anything imports DeepSpeed
os.environ |= {"DS_ACCELERATOR": "cuda", "CUDA_VISIBLE_DEVICES": ""}  # real GPUs stay out of it

import bitsandbytes  # noqa: F401 - it looks for its CUDA library as soon as torch says that there is a GPU
import torch
from pretend_cuda import Pretence, Rank, meant, pretend_cuda, pretend_tensors
from pretend_nccl import pretend_nccl


def pretend_ops() -> None:
    """Give DeepSpeed the ops that it builds for CPUs in place of those for CUDA."""
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
    from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator

    cpu = CPU_Accelerator()
    CUDA_Accelerator.create_op_builder = lambda _, name: (
        None if name == "ShareMemCommBuilder" else cpu.create_op_builder(name)
    )
    CUDA_Accelerator.get_op_builder = lambda _, name: cpu.get_op_builder(name)


def install() -> None:
    """Turn this process, which may have imported everything already, into a rank on its GPU."""
    Rank.gpus = int(os.environ.get("PRETEND_GPUS", "2"))
    Rank.own = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) if Rank.gpus > 1 else 0)
    pretend_cuda()
    pretend_tensors()
    pretend_nccl()
    pretend_ops()
    from toolkit.training.monitoring import metering

    metering.measure_peak = lambda device, _: float(meant(device) == Rank.own)  # 8192 columns take a CPU half a minute


def run(words: list[str]) -> None:
    """Run a script with its arguments on the rank's GPU."""
    install()
    sys.argv = words
    with Pretence():
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    # DeepSpeed's launcher puts --local_rank before the script's name.
    run([word for word in sys.argv[1:] if not word.startswith("--local_rank")])
