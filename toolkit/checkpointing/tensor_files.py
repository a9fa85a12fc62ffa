"""Safetensors files, written in one pass that also computes the checksum and flushes to the disk.

The library's own writer needs every byte in memory at once and computes no checksum. Any reader of safetensors can read
the files.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

CHUNK_BYTES = 1 << 24
METADATA = "__metadata__"

DTYPE_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.bool: "BOOL",
}


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> str:
    """Write tensors and JSON metadata to a new file, flush it to the disk, and return its xxh3 in hexadecimal.

    Each tensor is copied from its device in chunks.

    Raises:
        OSError: the disk is full or not writable.
    """
    header: dict[str, Any] = {METADATA: {"json": json.dumps(metadata)}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPE_CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of eight
    digest = xxhash.xxh3_64()
    with path.open("wb") as file:
        for data in (len(text).to_bytes(8, "little"), text):
            digest.update(data)
            file.write(data)
        for tensor in tensors.values():
            flat = tensor.detach().reshape(-1)
            step = max(1, CHUNK_BYTES // tensor.element_size())
            for begin in range(0, flat.numel(), step):
                chunk = flat[begin : begin + step].cpu().contiguous().view(torch.uint8).numpy().data
                digest.update(chunk)
                file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def read_metadata(path: Path) -> Any:
    """The metadata of a file that :func:`write_tensors` wrote.

    Raises:
        ValueError: ``path`` is not such a file.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > path.stat().st_size:
            raise ValueError(f"{path} is no safetensors file")
        return json.loads(json.loads(file.read(size))[METADATA]["json"])


def checksum(path: Path) -> str:
    """xxh3 of a file, in hexadecimal."""
    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
