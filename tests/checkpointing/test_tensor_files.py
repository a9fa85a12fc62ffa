"""Files of tensors: the safetensors library reads what is written; the checksum is that of the file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from toolkit.checkpointing import tensor_files
from toolkit.checkpointing.tensor_files import checksum, read_metadata, write_tensors


@pytest.mark.parametrize("chunk", [64, 1 << 24])
def test_safetensors_reads_what_is_written(tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_files, "CHUNK_BYTES", chunk)
    tensors = {
        "a": torch.randn(7, 5),
        "b": torch.randn(100).bfloat16(),
        "c": torch.arange(3),
        "empty": torch.zeros(0),
        "strided": torch.randn(4, 4)[:, 1],
        "bytes": torch.arange(200, dtype=torch.uint8),
        "flag": torch.tensor(True),
    }
    path = tmp_path / "x.safetensors"
    assert write_tensors(path, tensors, {"step": 3, "name": "ü"}) == checksum(path)
    found = load_file(path)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert read_metadata(path) == {"step": 3, "name": "ü"}
    with safe_open(path, framework="pt") as file:
        assert torch.equal(file.get_slice("b")[20:30], tensors["b"][20:30])


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"\xff" * 20)
    with pytest.raises(ValueError, match="safetensors"):
        read_metadata(tmp_path / "x")
