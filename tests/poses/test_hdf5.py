"""Features in real HDF5 files: every layout that they come in, and one line for what cannot be used."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from toolkit.errors import UserError
from toolkit.poses.pose_file import PoseError
from toolkit.poses.video_features import features_width, read_features

VALUES = np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32)


def hdf5(write: Callable[[h5py.File], Any]) -> bytes:
    file = io.BytesIO()
    with h5py.File(file, "w") as opened:
        write(opened)
    return file.getvalue()


def _linked(file: h5py.File) -> None:
    file["clips/clip7"] = VALUES
    file["features"] = h5py.SoftLink("/clips/clip7")


LAYOUTS: dict[str, Callable[[h5py.File], Any]] = {
    "an accepted name": lambda file: file.create_dataset("features", data=VALUES),
    "any name": lambda file: file.create_dataset("clip7", data=VALUES),
    "in groups": lambda file: file.create_dataset("train/clip7/hidden", data=VALUES),
    "beside others": lambda file: [file.create_dataset(name, data=VALUES[:n]) for name, n in (("a", 3), ("data", 60))],
    "compressed chunks": lambda file: file.create_dataset("x", data=VALUES, chunks=(7, 3), compression="gzip"),
    "resizable": lambda file: file.create_dataset("x", data=VALUES, maxshape=(None, 4)),
    "float64, big-endian": lambda file: file.create_dataset("x", data=VALUES.astype(">f8")),
    "float16": lambda file: file.create_dataset("x", data=VALUES.astype(np.float16)),
    "a batch of one": lambda file: file.create_dataset("x", data=VALUES[None]),
    "a link within the file": _linked,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_features(layout: str) -> None:
    content = hdf5(LAYOUTS[layout])
    raw = read_features(content, 25.0)
    np.testing.assert_allclose(raw.values.astype(np.float32), VALUES, atol=2e-3)
    assert features_width(content) == 4 and raw.fps == 25.0


def _rate_of(where: str) -> Callable[[h5py.File], Any]:
    def write(file: h5py.File) -> None:
        file["clip/features"] = VALUES
        if where == "dataset":
            file["fps"] = 12.5
        else:
            file[where].attrs["fps"] = 12.5 if where != "/" else np.array([12.5], np.float32)
        if where == "clip/features":
            file.attrs["fps"] = 25.0  # further away

    return write


@pytest.mark.parametrize("where", ["clip/features", "clip", "/", "dataset"])
def test_the_frame_rate_is_an_attribute_near_the_array_or_a_dataset(where: str) -> None:
    content = hdf5(_rate_of(where))
    assert read_features(content).fps == 12.5
    with pytest.raises(PoseError, match=r"12\.5.*\b25\b"):
        read_features(content, 25.0)


def _some_chunks(file: h5py.File) -> None:
    file.create_dataset("features", (60, 4), np.float32, chunks=(20, 4))[:20] = VALUES[:20]


def _from_other_files(file: h5py.File) -> None:
    layout = h5py.VirtualLayout((60, 4), np.float32)
    layout[:] = h5py.VirtualSource("/etc/other.h5", "features", (60, 4))
    file.create_virtual_dataset("features", layout)


REFUSED: dict[str, tuple[Callable[[h5py.File], Any], str]] = {
    "no dataset": (lambda file: file.create_group("features"), "none"),
    "two datasets": (
        lambda file: [file.create_dataset(f"clip/{name}", data=VALUES) for name in "ab"],
        "clip/a, clip/b",
    ),
    "too many": (lambda file: [file.create_group(f"clip{number}") for number in range(1001)], "1,000"),
    "words": (lambda file: file.create_dataset("features", data=["a", "b"]), "features.* numbers"),
    "truth values": (lambda file: file.create_dataset("features", data=VALUES > 0), "features.* numbers"),
    "records": (lambda file: file.create_dataset("features", data=np.zeros((9, 4), "f4,i4")), "features.* numbers"),
    "nothing": (lambda file: file.create_dataset("features", data=h5py.Empty("f4")), "features.* numbers"),
    "a vector": (lambda file: file.create_dataset("features", data=VALUES[0]), r"\[4\]"),
    "no frames": (lambda file: file.create_dataset("features", data=VALUES[:0]), r"\[0, 4\]"),
    "larger than a clip": (lambda file: file.create_dataset("features", (2**30, 4), "i1", chunks=(1024, 4)), "1 GiB"),
    "never written": (lambda file: file.create_dataset("features", (60, 4), np.float32), "features.*0 of 1"),
    "written in part": (_some_chunks, "features.*1 of 3"),
    "raw values elsewhere": (
        lambda file: file.create_dataset("features", (1, 4), "i1", external=[("/etc/hostname", 0, 4)]),
        "features.* other files",
    ),
    "virtual": (_from_other_files, "features.* other files"),
    "a link elsewhere": (lambda file: file.__setitem__("features", h5py.ExternalLink("/x.h5", "features")), "none"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_used_is_refused_in_a_line(case: str) -> None:
    write, named = REFUSED[case]
    with pytest.raises(PoseError, match=named) as raised:
        read_features(hdf5(write), 25.0)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("length", [9, 600, -1])
def test_a_file_that_is_truncated_or_damaged_is_refused(length: int) -> None:
    content = hdf5(LAYOUTS["compressed chunks"])
    for damaged in (content[:length], content[:-500] + b"\xff" * 400 + content[-100:]):
        with pytest.raises(PoseError) as raised:
            read_features(damaged, 25.0)
        assert "\n" not in str(raised.value)


def test_a_rate_that_is_no_number_is_refused() -> None:
    def write(file: h5py.File) -> None:
        file["features"] = VALUES
        file.attrs["fps"] = "many"

    with pytest.raises(PoseError, match="many"):
        read_features(hdf5(write))


def test_h5py_is_an_extra_that_the_error_names(monkeypatch: pytest.MonkeyPatch) -> None:
    content = hdf5(LAYOUTS["any name"])
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(UserError, match="h5py") as raised:
        read_features(content, 25.0)
    assert "[hdf5]" in raised.value.hint and raised.value.exit_code == 2
    setup = Path(__file__).resolve().parents[2] / "setup.py"
    assert '"hdf5": HDF5' in setup.read_text(encoding="utf-8")
