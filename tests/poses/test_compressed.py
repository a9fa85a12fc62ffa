"""A file that unpacks to more than any clip is refused before it fills the memory."""

from __future__ import annotations

import gzip
import io
import zipfile
from pathlib import Path

import numpy as np
import pytest

from toolkit.corpus.archives.files import open_poses
from toolkit.poses import compressed
from toolkit.poses.array_files import read_named_arrays
from toolkit.poses.compressed import decompress
from toolkit.poses.pose_file import PoseError


@pytest.fixture(autouse=True)
def _small_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compressed, "LARGEST_CLIP", 5000)


@pytest.mark.parametrize("size", [5000, 5001, 10**7])
def test_gzip(size: int) -> None:
    content = gzip.compress(bytes(size))
    if size <= 5000:
        assert decompress(content) == bytes(size)
    else:
        with pytest.raises(PoseError, match="GiB"):
            decompress(content)


def test_a_member_of_a_zip(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "poses.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("small.pose", bytes(5000))
        archive.writestr("large.pose", bytes(5001))
    poses = open_poses(tmp_path / "poses.zip")
    keys = {name: key for name, key, _ in poses.container.entries()}
    assert poses.read(keys["small.pose"]) == bytes(5000)
    with pytest.raises(PoseError, match="GiB"):
        poses.read(keys["large.pose"])


def test_an_npz() -> None:
    file = io.BytesIO()
    np.savez_compressed(file, keypoints=np.zeros((100, 50, 2)))
    with pytest.raises(PoseError, match="GiB"):
        read_named_arrays(file.getvalue())
