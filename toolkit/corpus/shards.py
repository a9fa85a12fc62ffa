"""The parallel part of preparation: each shard of a split from its rows to an Arrow file, in any process.

A shard is a pure function of the settings and its rows. So the number of workers cannot change a byte of the result,
and an interrupted preparation goes on with the shards that it still lacks.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import signal
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import xxhash

from toolkit.corpus.archives import PoseFiles
from toolkit.corpus.packed import Clip, shard_name, write_shard
from toolkit.corpus.splits import source_video
from toolkit.corpus.table import Row
from toolkit.errors import UserError
from toolkit.poses.features import extract_features, read_clip
from toolkit.poses.landmarks import LandmarkSet
from toolkit.poses.pose_file import PoseError, checked_fps
from toolkit.recipe.schema import Data

LEAST_CLIPS = 256
MOST_SHARDS = 256  # of a split: each stays open as a memory map, and a process may hold about a thousand open files


@dataclass(frozen=True)
class Work:
    """All that the shards of a corpus are functions of.

    Attributes:
        folder: the unfinished corpus.
        splits: rows of each split, each with its pose file.
    """

    folder: Path
    data: Data
    landmark_set: LandmarkSet
    poses: PoseFiles
    splits: dict[str, list[tuple[Row, Any]]]

    def shards(self) -> list[tuple[str, int, int]]:
        """Split, number and count of every shard."""
        counts = {name: min(MOST_SHARDS, math.ceil(len(rows) / LEAST_CLIPS)) for name, rows in self.splits.items()}
        return [(name, number, count) for name, count in counts.items() for number in range(count)]

    def rows(self, split: str, number: int, count: int) -> list[tuple[Row, Any]]:
        rows = self.splits[split]
        return rows[len(rows) * number // count : len(rows) * (number + 1) // count]

    def record_file(self, split: str, number: int) -> Path:
        """Where the record of a finished shard is kept until the corpus is complete."""
        return self.folder / "progress" / f"{split}-{number:05d}.json"


@dataclass(frozen=True)
class Record:
    """What became of the rows of one shard.

    Attributes:
        split, number: which shard.
        rejects: line in the table, uid and reason.
        counts: clips that were shortened, normalised without shoulders, show no hands, or lack landmarks of the set.
        lacking: of each landmark that files lack, how many clips.
        checksum: xxh3 of the pose files that went in, in order.
    """

    split: str
    number: int
    clips: int
    frames: int
    rejects: list[tuple[int, str, str]]
    counts: dict[str, int]
    lacking: dict[str, int]
    checksum: str


def build_shards(work: Work, workers: int) -> Iterator[tuple[Record, bool]]:
    """Build the shards that are not there yet.

    Yields:
        the record of each shard as it is finished, and whether it was there already.

    Raises:
        UserError: a worker process was killed.
    """
    (work.folder / "progress").mkdir(parents=True, exist_ok=True)
    for split in work.splits:
        (work.folder / split).mkdir(exist_ok=True)
    todo = []
    for shard in work.shards():
        record_file = work.record_file(*shard[:2])
        if record_file.exists():
            yield Record(**json.loads(record_file.read_text(encoding="utf-8"))), True
        else:
            todo.append(shard)
    if workers == 1 or len(todo) < 2:
        for shard in todo:
            yield _build_shard(work, *shard), False
        return

    # Fork, so that a training script with all its imports is not loaded again by every worker; nothing has started
    # threads or touched a GPU when a corpus is prepared.
    context = multiprocessing.get_context("fork")
    executor = ProcessPoolExecutor(min(workers, len(todo)), context, initializer=_become_worker, initargs=(work,))
    try:
        for future in as_completed([executor.submit(_build_inherited_shard, *shard) for shard in todo]):
            yield future.result(), False
    except BrokenProcessPool as error:
        raise UserError(
            "a preparation process was killed, perhaps for lack of memory: run it again with fewer data.workers"
        ) from error
    finally:
        executor.shutdown(cancel_futures=True)


_inherited: Work


def _become_worker(work: Work) -> None:
    global _inherited
    _inherited = work
    # Ctrl-C reaches the whole process group; the parent alone decides, and lets the shards in hand be finished.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _build_inherited_shard(split: str, number: int, count: int) -> Record:
    return _build_shard(_inherited, split, number, count)


def _build_shard(work: Work, split: str, number: int, count: int) -> Record:
    """Features of all rows of a shard, written; what cannot be used is recorded."""
    data = work.data
    clips: list[Clip] = []
    rejects: list[tuple[int, str, str]] = []
    counts: Counter[str] = Counter()
    lacking: Counter[str] = Counter()
    checksum = xxhash.xxh3_64()
    for row, file in work.rows(split, number, count):
        try:
            content = work.poses.read(file)
            checksum.update(content)
            raw = read_clip(content)
            if row.fps is not None:
                raw = replace(raw, fps=checked_fps(row.fps))
            features = extract_features(
                raw.between(row.start, row.end),
                work.landmark_set,
                data.fps,
                min_frames=data.min_frames,
                max_frames=data.max_frames,
                too_long=data.too_long,
            )
        except PoseError as error:
            rejects.append((row.line, row.uid, str(error)))
            continue
        counts["shortened"] += features.shortened
        counts["normalised_without_shoulders"] += features.normalised_by == "spread"
        counts["without_hands"] += features.hands_visible == 0
        counts["lacking_landmarks"] += bool(features.lacking)
        lacking.update("/".join(point) for point in features.lacking)
        clips.append(Clip(row.uid, row.text, features.values, source_video(row), row.language, features.hands_visible))
    write_shard(work.folder / split / shard_name(number, count), clips, work.landmark_set.width)
    frames = sum(len(clip.features) for clip in clips)
    record = Record(split, number, len(clips), frames, rejects, dict(counts), dict(lacking), checksum.hexdigest())
    record_file = work.record_file(split, number)
    partial = record_file.with_suffix(".tmp")
    partial.write_text(json.dumps(record.__dict__), encoding="utf-8")
    partial.replace(record_file)
    return record
