"""Corpora of features that a test makes itself; ``launch/prepare.py`` packs pose files."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np

from toolkit.corpus.packed import Clip, Corpus, Metadata
from toolkit.corpus.writer import finish_corpus, finish_split, shard_name, write_shard
from toolkit.poses.landmarks import LandmarkSet


def write_corpus(
    folder: Path, splits: dict[str, Iterable[Clip]], landmark_set: LandmarkSet, fps: float, normalisation: str = "none"
) -> Corpus:
    """Pack features, in one process.

    Args:
        folder: to be created.
        splits: clips by split; features [frames, points, channels] fit ``landmark_set``, NaN = missing (a landmark with
            a NaN in one channel is missing); with ``video_features`` in all of them or in none.
        landmark_set: the landmarks in order.
        fps: frames per second of the features.
        normalisation: description of the origin and unit of the coordinates.
    """
    splits = {name: list(clips) for name, clips in splits.items()}
    of_clips = (clip.video_features for clips in splits.values() for clip in clips)
    first = next(of_clips, None)
    widths = landmark_set.width, 0 if first is None else first.shape[1]
    summaries = {}
    for name, clips in splits.items():
        (folder / name).mkdir(parents=True)
        packed = [_missing_in_every_channel(clip) for clip in clips]
        write_shard(folder / name / shard_name(0, 1), packed, *widths)
        finish_split(folder / name, *widths)
        summaries[name] = {"clips": len(packed), "frames": sum(len(clip.features) for clip in packed)}
    metadata = Metadata(landmark_set.to_dict(), fps, normalisation, splits=summaries, num_features=widths[1])
    finish_corpus(folder, metadata)
    return Corpus.open(folder)


def _missing_in_every_channel(clip: Clip) -> Clip:
    seen = np.isfinite(clip.features).all(axis=2, keepdims=True)
    return replace(clip, features=np.where(seen, clip.features, np.asarray(np.nan, clip.features.dtype)))
