"""Write the files of a packed corpus: shards in Arrow, and the small files that make a folder of them a corpus."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from toolkit.corpus.packed import METADATA_FILE, TEXT_COLUMNS, Clip, Metadata

CLIPS_PER_RECORD_BATCH = 256
UNFINISHED = ".tmp"
ARRAYS = ("features", "video_features")
"""Columns with an array of each clip, float16 [frames, ...]."""


def write_shard(path: Path, clips: Sequence[Clip], features_width: int, num_features: int = 0) -> None:
    """Write one Arrow file of a split; it appears under its name only when it is complete.

    Args:
        path: ``data-NNNNN-of-NNNNN.arrow`` in the folder of the split.
        clips: features are [frames, points, channels], any float type; they are written as float16.
        features_width: points x channels; 0 where clips have no poses.
        num_features: numbers of a frame of their ``video_features``; 0 where they have none.
    """
    schema = _schema(features_width, num_features)
    partial = unfinished_name(path)
    with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for start in range(0, len(clips), CLIPS_PER_RECORD_BATCH):
            writer.write_batch(_record_batch(clips[start : start + CLIPS_PER_RECORD_BATCH], schema))
    partial.replace(path)


def unfinished_name(path: Path) -> Path:
    """The temporary name of ``path`` while it is written; it is unique in a cluster."""
    return path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}{UNFINISHED}")


def _record_batch(clips: Sequence[Clip], schema: pa.Schema) -> pa.RecordBatch:
    frames = np.array([len(clip.features) for clip in clips], np.int32)
    columns = [
        *(pa.array([getattr(clip, name) for clip in clips], pa.string()) for name in TEXT_COLUMNS),
        pa.array(frames),
        pa.array([clip.hands_visible for clip in clips], pa.float32()),
        *(_frames_column(clips, name, schema.field(name).type) for name in ARRAYS if name in schema.names),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _frames_column(clips: Sequence[Clip], name: str, column: pa.LargeListType) -> pa.Array:
    """One array of each clip as lists of frames, in float16."""
    arrays = [getattr(clip, name) for clip in clips]
    width = column.value_type.list_size
    offsets = np.concatenate([[0], np.cumsum([len(array) for array in arrays], dtype=np.int64)])
    flat = np.empty(int(offsets[-1]) * width, np.float16)
    with np.errstate(over="ignore"):
        for array, start, end in zip(arrays, offsets[:-1] * width, offsets[1:] * width, strict=True):
            flat[start:end] = array.reshape(-1)
    # Values beyond float16 are thousands of shoulder widths away, so the landmark is missing, in every channel.
    beyond = np.isinf(flat)
    if beyond.any():
        channels = arrays[0].shape[2]
        flat.reshape(-1, channels)[beyond.reshape(-1, channels).any(axis=1)] = np.nan
    frames_of_clips = pa.FixedSizeListArray.from_arrays(pa.array(flat, pa.float16()), width)
    return pa.LargeListArray.from_arrays(pa.array(offsets), frames_of_clips)


def _widths(features_width: int, num_features: int) -> dict[str, int]:
    """The columns of arrays that a corpus has, each with the numbers of a frame."""
    widths = zip(ARRAYS, (features_width, num_features), strict=True)
    return {name: width for name, width in widths if width}


def _schema(features_width: int, num_features: int) -> pa.Schema:
    columns = [
        *((name, pa.string()) for name in TEXT_COLUMNS),
        ("frames", pa.int32()),
        ("hands_visible", pa.float32()),
        *(
            (name, pa.large_list(pa.list_(pa.float16(), width)))
            for name, width in _widths(features_width, num_features).items()
        ),
    ]
    features = _dataset_features(features_width, num_features)
    return pa.schema(columns, metadata={"huggingface": json.dumps({"info": {"features": features}})})


def _dataset_features(features_width: int, num_features: int) -> dict[str, Any]:
    """The columns as the ``datasets`` library describes them."""

    def value(dtype: str) -> dict[str, Any]:
        return {"dtype": dtype, "_type": "Value"}

    frames = {
        name: {"feature": {"feature": value("float16"), "length": width, "_type": "Sequence"}, "_type": "LargeList"}
        for name, width in _widths(features_width, num_features).items()
    }
    return {
        **{name: value("string") for name in TEXT_COLUMNS},
        "frames": value("int32"),
        "hands_visible": value("float32"),
        **frames,
    }


def shard_name(index: int, count: int) -> str:
    return f"data-{index:05d}-of-{count:05d}.arrow"


def finish_split(folder: Path, features_width: int, num_features: int = 0) -> None:
    """Write the two small files that ``datasets.load_from_disk`` needs in a folder of shards."""
    shards = sorted(path.name for path in folder.glob("data-*.arrow"))
    info = {
        "citation": "",
        "description": "",
        "features": _dataset_features(features_width, num_features),
        "homepage": "",
        "license": "",
    }
    state: dict[str, Any] = {
        "_data_files": [{"filename": name} for name in shards],
        "_fingerprint": xxhash.xxh3_64_hexdigest("\n".join([folder.name, *shards]).encode()),
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": folder.name,
    }
    _write_json(folder / "dataset_info.json", info)
    _write_json(folder / "state.json", state)


def finish_corpus(folder: Path, metadata: Metadata) -> None:
    """Write the two files that make a folder of finished splits a corpus; ``metadata.splits`` names them."""
    _write_json(folder / "dataset_dict.json", {"splits": list(metadata.splits)})
    _write_json(folder / METADATA_FILE, asdict(metadata))


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
