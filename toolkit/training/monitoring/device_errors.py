"""Errors by which a GPU, its driver or a link has failed, and none of the code that ran on it."""

from __future__ import annotations

# Of what CUDA and NCCL say then, in lower case: errors of memory and of NVLink are uncorrectable or of the hardware
# stack; the others are of a GPU that has left the bus, or that another process has for itself.
WORDS = ("uncorrectable", "hardware", "unknown error", "gpu is lost", "no cuda-capable device", "busy or unavailable")


def is_of_device(error: BaseException) -> bool:
    """Whether an error says that the GPU has failed."""
    said = str(error).lower()
    return isinstance(error, RuntimeError) and "cuda" in said and any(word in said for word in WORDS)
