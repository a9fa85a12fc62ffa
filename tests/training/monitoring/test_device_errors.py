"""Which errors are of a GPU that has failed."""

from __future__ import annotations

import pytest

from toolkit.training.monitoring.device_errors import is_of_device


@pytest.mark.parametrize(
    "said",
    [
        "CUDA error: uncorrectable ECC error encountered\nCUDA kernel errors might be reported at some other call",
        "CUDA error: uncorrectable NVLink error detected during the execution",
        "CUDA error: unknown error",
        "CUDA error: CUDA-capable device(s) is/are busy or unavailable",
        "NCCL error: unhandled cuda error; Last error: Cuda failure 2 'hardware stack error'",
    ],
)
def test_what_failed_devices_say_is_recognised(said: str) -> None:
    assert is_of_device(RuntimeError(said))


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("CUDA error: device-side assert triggered"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("unknown error"),
        ValueError("CUDA error: unknown error"),
    ],
)
def test_errors_of_code_are_not(error: Exception) -> None:
    assert not is_of_device(error)
