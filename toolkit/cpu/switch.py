"""The one switch of this room: ``TOOLKIT_CPU_CODE=0`` has CPU ranks run the code of torch and DeepSpeed instead."""

from __future__ import annotations

import os

import torch

SWITCH = "TOOLKIT_CPU_CODE"


def uses_cpu_code() -> bool:
    """Whether this process trains with this room's layers, communication and allocator settings.

    ``shared_memory`` has no switch: it removes files that DeepSpeed leaves in memory.
    """
    return not torch.cuda.is_available() and os.environ.get(SWITCH) != "0"
