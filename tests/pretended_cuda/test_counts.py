"""Where no numbers are wanted, launches are those of torch on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.time_limits import limit

SCRIPT = Path(__file__).with_name("counted.py")


@pytest.mark.gpu
def test_counts_and_failed_captures_are_torchs_own() -> None:
    environment = os.environ | {"PRETENDED_CUDA_NUMBERS": "0", "PRETENDED_CUDA_REPORT": "1"}
    command = [sys.executable, SCRIPT]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=limit(120))
    assert done.returncode == 0, done.stdout + done.stderr
    line = next(number for number, text in enumerate(SCRIPT.read_text().splitlines(), 1) if "y.cpu()" in text)
    assert f"{SCRIPT}:{line} main" in done.stderr and "kernels" in done.stderr, done.stderr
