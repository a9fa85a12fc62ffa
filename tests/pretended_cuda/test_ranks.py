"""Two ranks on two pretended GPUs: collectives of NCCL give the right numbers, also from a graph."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.time_limits import limit

pytestmark = pytest.mark.gpu
SCRIPT = Path(__file__).with_name("collectives.py")


def test_collectives_of_two_ranks(tmp_path: Path, free_port: int) -> None:
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port), "PRETENDED_CUDA_GPUS": "2"}
    outputs = [tmp_path / f"{rank}.txt" for rank in range(2)]
    ranks = []
    for rank, output in enumerate(outputs):
        environment = os.environ | group | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        with output.open("w") as file:
            ranks.append(subprocess.Popen([sys.executable, SCRIPT], env=environment, stdout=file, stderr=file))
    try:
        codes = [process.wait(timeout=limit(120)) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert codes == [0, 0], "".join(output.read_text() for output in outputs)
