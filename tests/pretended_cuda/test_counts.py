"""Where no numbers are wanted, launches are those of torch on a GPU; Triton's kernels are launched where they are."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.time_limits import limit

SCRIPT = Path(__file__).with_name("counted.py")


def counted(kind: str, **settings: str) -> str:
    """What the script writes to standard error; it fails where a count is wrong."""
    done = subprocess.run(
        [sys.executable, SCRIPT, kind],
        env=os.environ | settings,
        capture_output=True,
        text=True,
        check=False,
        timeout=limit(240),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stderr


@pytest.mark.gpu
def test_counts_and_failed_captures_are_torchs_own() -> None:
    report = counted("eager", PRETENDED_CUDA_NUMBERS="0", PRETENDED_CUDA_REPORT="1")
    line = next(number for number, text in enumerate(SCRIPT.read_text().splitlines(), 1) if "y.cpu()" in text)
    assert f"{SCRIPT}:{line} main" in report and "kernels" in report, report


@pytest.mark.gpu
def test_compiled_layers_are_kernels_of_triton_on_request(tmp_path: Path) -> None:
    caches = {name: str(tmp_path / name) for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")}
    counted("compiled", PRETENDED_CUDA_TRITON="1", **caches)


@pytest.mark.gpu
def test_gpus_and_their_memory_are_as_many_as_asked() -> None:
    counted("limited", PRETENDED_CUDA_GPUS="2", PRETENDED_CUDA_GIB="1")
