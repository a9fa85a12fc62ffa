"""The parallel part of preparation: each shard of a split from its rows to an Arrow file, in any process.

A shard is a pure function of the settings and its rows. So neither the number of workers nor the machines they run on
can change a byte of the result, and an interrupted preparation goes on with the shards that it still lacks.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import signal
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from toolkit.corpus.archives import PoseFiles
from toolkit.corpus.packed import Clip
from toolkit.corpus.splits import source_video
from toolkit.corpus.table import Row
from toolkit.corpus.writer import shard_name, unfinished_name, write_shard
from toolkit.errors import UserError
from toolkit.poses.features import extract_features, read_clip
from toolkit.poses.landmarks import LandmarkSet
from toolkit.poses.pose_file import USUAL_FPS, PoseError
from toolkit.recipe.schema import Data

LEAST_CLIPS = 256
Shard = tuple[str, int, int]
"""Split, number and how many shards the split has."""
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

    def shards(self) -> list[Shard]:
        """Every shard, in the order of the splits."""
        counts = {name: min(MOST_SHARDS, math.ceil(len(rows) / LEAST_CLIPS)) for name, rows in self.splits.items()}
        return [(name, number, count) for name, count in counts.items() for number in range(count)]

    def missing(self, shards: Sequence[Shard]) -> list[Shard]:
        """Those that nobody has built yet."""
        return [shard for shard in shards if not self.record_file(*shard[:2]).exists()]

    def record(self, shard: Shard) -> Record:
        """What a shard that is built says of itself."""
        content = json.loads(self.record_file(*shard[:2]).read_text(encoding="utf-8"))
        return Record(**content | {"rejects": [tuple(reject) for reject in content["rejects"]]})

    def rows(self, split: str, number: int, count: int) -> list[tuple[Row, Any]]:
        return self.splits[split][slice(*self._bounds(split, number, count))]

    def size(self, shard: Shard) -> int:
        """Rows of a shard."""
        start, end = self._bounds(*shard)
        return end - start

    def _bounds(self, split: str, number: int, count: int) -> tuple[int, int]:
        rows = len(self.splits[split])
        return rows * number // count, rows * (number + 1) // count

    def record_file(self, split: str, number: int) -> Path:
        """Where the record of a finished shard is kept until the corpus is complete."""
        return self.folder / "progress" / f"{split}-{number:05d}.json"


@dataclass(frozen=True)
class Record:
    """What became of the rows of one shard.

    Attributes:
        split, number: which shard.
        rejects: line in the table, uid and reason.
        counts: clips that were shortened, normalised without shoulders, show no hands, hold landmarks that
            claim a confidence but have no place, are of an unusual frame rate, or lack landmarks of the set.
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


def build_shards(work: Work, shards: Sequence[Shard], workers: int) -> Iterator[Record]:
    """Build shards in processes of this machine.

    Args:
        work: what they are functions of.
        shards: those to build.
        workers: number of processes; 1 builds in this one.

    Yields:
        the record of each shard as it is finished.

    Raises:
        UserError: a worker process was killed.
    """
    if workers == 1 or len(shards) < 2:
        for shard in shards:
            yield build_shard(work, *shard)
        return

    # Fork, so that a training script with all its imports is not loaded again by every worker; nothing has started
    # threads or touched a GPU when a corpus is prepared.
    context = multiprocessing.get_context("fork")
    executor = ProcessPoolExecutor(min(workers, len(shards)), context, initializer=_become_worker, initargs=(work,))
    try:
        for future in as_completed([executor.submit(_build_inherited_shard, *shard) for shard in shards]):
            yield future.result()
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
    return build_shard(_inherited, split, number, count)


def build_shard(work: Work, split: str, number: int, count: int) -> Record:
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
            raw = read_clip(content, row.fps)
            features = extract_features(
                raw.between(row.start, row.end),
                work.landmark_set,
                data.fps,
                min_frames=data.min_frames,
                max_frames=data.max_frames,
                too_long=data.too_long,
            )
            if features.hands_visible == 0 and data.no_hands == "reject":
                raise PoseError("no hands: no frame shows a landmark of either")
        except PoseError as error:
            rejects.append((row.line, row.uid, str(error)))
            continue
        counts["shortened"] += features.shortened
        counts["normalised_without_shoulders"] += features.normalised_by == "spread"
        counts["without_hands"] += features.hands_visible == 0
        counts["points_without_place"] += features.without_place > 0
        counts["unusual_fps"] += not USUAL_FPS[0] <= raw.fps <= USUAL_FPS[1]
        counts["lacking_landmarks"] += bool(features.lacking)
        lacking.update("/".join(point) for point in features.lacking)
        clips.append(Clip(row.uid, row.text, features.values, source_video(row), row.language, features.hands_visible))
    write_shard(work.folder / split / shard_name(number, count), clips, work.landmark_set.width)
    frames = sum(len(clip.features) for clip in clips)
    record = Record(split, number, len(clips), frames, rejects, dict(counts), dict(lacking), checksum.hexdigest())
    record_file = work.record_file(split, number)
    partial = unfinished_name(record_file)
    partial.write_text(json.dumps(record.__dict__), encoding="utf-8")
    partial.replace(record_file)
    return record
