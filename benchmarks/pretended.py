"""The pretended CUDA runtime for benchmarks that count what a GPU is asked for: kernels compute nothing."""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.pretended_cuda.environment import find_environment
from toolkit.errors import UserError


def use_pretended_gpu() -> str:
    """Have processes that start from now on see one, wherever the command was started; ends it where none can be.

    Returns:
        version of torch, with that of CUDA.
    """
    try:
        environment = find_environment()
    except UserError as error:
        print(f"error: {error.lines}", file=sys.stderr)
        sys.exit(error.exit_code)
    paths = filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))
    os.environ |= {"PRETENDED_CUDA_NUMBERS": "0", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    return environment.torch
