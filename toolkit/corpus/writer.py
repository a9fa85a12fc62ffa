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


def write_shard(path: Path, clips: Sequence[Clip], features_width: int) -> None:
    """Write one Arrow file of a split; it appears under its name only when it is complete.

    Args:
        path: ``data-NNNNN-of-NNNNN.arrow`` in the folder of the split.
        clips: features are [frames, points, channels], any float type; they are written as float16.
        features_width: points x channels.
    """
    schema = _schema(features_width)
    partial = unfinished_name(path)
    with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for start in range(0, len(clips), CLIPS_PER_RECORD_BATCH):
            writer.write_batch(_record_batch(clips[start : start + CLIPS_PER_RECORD_BATCH], schema, features_width))
    partial.replace(path)


def unfinished_name(path: Path) -> Path:
    """The temporary name of ``path`` while it is written; it is unique in a cluster."""
    return path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}{UNFINISHED}")


def _record_batch(clips: Sequence[Clip], schema: pa.Schema, width: int) -> pa.RecordBatch:
    frames = np.array([len(clip.features) for clip in clips], np.int32)
    offsets = np.concatenate([[0], np.cumsum(frames, dtype=np.int64)])
    flat = np.empty(int(offsets[-1]) * width, np.float16)
    with np.errstate(over="ignore"):
        for clip, start, end in zip(clips, offsets[:-1] * width, offsets[1:] * width, strict=True):
            flat[start:end] = clip.features.reshape(-1)
    # Values beyond float16 are thousands of shoulder widths away, so the landmark is missing, in every channel.
    beyond = np.isinf(flat)
    if beyond.any():
        channels = clips[0].features.shape[2]
        flat.reshape(-1, channels)[beyond.reshape(-1, channels).any(axis=1)] = np.nan
    frames_of_clips = pa.FixedSizeListArray.from_arrays(pa.array(flat, pa.float16()), width)
    columns = [
        *(pa.array([getattr(clip, name) for clip in clips], pa.string()) for name in TEXT_COLUMNS),
        pa.array(frames),
        pa.array([clip.hands_visible for clip in clips], pa.float32()),
        pa.LargeListArray.from_arrays(pa.array(offsets), frames_of_clips),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _schema(width: int) -> pa.Schema:
    features = pa.large_list(pa.list_(pa.float16(), width))
    columns = [
        *((name, pa.string()) for name in TEXT_COLUMNS),
        ("frames", pa.int32()),
        ("hands_visible", pa.float32()),
        ("features", features),
    ]
    return pa.schema(columns, metadata={"huggingface": json.dumps({"info": {"features": _dataset_features(width)}})})


def _dataset_features(width: int) -> dict[str, Any]:
    """The columns as the ``datasets`` library describes them."""

    def value(dtype: str) -> dict[str, Any]:
        return {"dtype": dtype, "_type": "Value"}

    frame = {"feature": value("float16"), "length": width, "_type": "Sequence"}
    return {
        **{name: value("string") for name in TEXT_COLUMNS},
        "frames": value("int32"),
        "hands_visible": value("float32"),
        "features": {"feature": frame, "_type": "LargeList"},
    }


def shard_name(index: int, count: int) -> str:
    return f"data-{index:05d}-of-{count:05d}.arrow"


def finish_split(folder: Path, features_width: int) -> None:
    """Write the two small files that ``datasets.load_from_disk`` needs in a folder of shards."""
    shards = sorted(path.name for path in folder.glob("data-*.arrow"))
    info = {
        "citation": "",
        "description": "",
        "features": _dataset_features(features_width),
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
