"""What a device computes without a compiler, and without a folder that could keep what one makes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.time_limits import limit

# torch 2.13 has a kernel of Triton's for this product, unless it is left out.
OUTER_PRODUCT = """
import torch
from toolkit.cluster.devices import choose_device
device = choose_device("cuda")
torch.bmm(torch.ones(2, 4, 1, device=device), torch.ones(2, 1, 6, device=device))
torch.cuda.synchronize()
"""


@pytest.mark.gpu
def test_no_kernel_is_compiled_outside_of_compiled_layers(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    own = {"TRITON_CACHE_DIR": str(tmp_path / "file" / "cache"), "CC": "/nowhere/cc", "PRETENDED_CUDA_NUMBERS": "0"}
    words = [sys.executable, "-c", OUTER_PRODUCT]
    done = subprocess.run(words, env=os.environ | own, capture_output=True, text=True, timeout=limit(240), check=False)
    assert done.returncode == 0, done.stderr
