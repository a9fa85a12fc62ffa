"""Build the shards of a corpus in parallel, by processes of this machine or of a Ray cluster.

A shard is a pure function of the settings and its rows. The number of workers and their machines therefore do not
change the result, and an interrupted preparation resumes with the shards that are missing.
"""

from __future__ import annotations

import json
import logging
import math
import multiprocessing
import os
import signal
import socket
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import xxhash

from toolkit.corpus.archives.files import PoseFiles
from toolkit.corpus.packed import Clip
from toolkit.corpus.plan import ClipFiles
from toolkit.corpus.splits import source_video
from toolkit.corpus.table import Row
from toolkit.corpus.writer import shard_name, unfinished_name, write_shard
from toolkit.errors import UserError, first_line
from toolkit.poses.features import read_clip
from toolkit.poses.landmarks import LandmarkSet
from toolkit.poses.pose_file import USUAL_FPS, PoseError
from toolkit.poses.video_features import Recording, SampledClip, read_features
from toolkit.recipe.prompts import CONDITIONS
from toolkit.recipe.schema import Data

CODE = Path(__file__).resolve().parents[2]
LEAST_CLIPS = 256
LATE_END = 1.0  # seconds by which a clip may end after its file without being counted
ShardKey = tuple[str, int, int]
"""Split, number of the shard, and number of shards of the split."""
_CHECK_RAY = "start the cluster by `ray start --head`, and check the address of its head"
MOST_SHARDS = 256  # of a split: each stays open as a memory map, and a process may have about a thousand open files


@dataclass(frozen=True)
class Work:
    """What the shards of a corpus are functions of."""

    folder: Path  # the unfinished corpus
    data: Data
    landmark_set: LandmarkSet
    poses: PoseFiles | None  # None without poses
    features: PoseFiles | None  # of another network; None without
    num_features: int  # numbers of a frame of these
    splits: dict[str, list[tuple[Row, ClipFiles]]]  # rows of each split, each with its files

    @property
    def sources(self) -> list[PoseFiles]:
        """The lists of files, in the order in which a row has its files."""
        return [files for files in (self.poses, self.features) if files]

    def shards(self) -> list[ShardKey]:
        """Every shard, in the order of the splits."""
        counts = {name: min(MOST_SHARDS, math.ceil(len(rows) / LEAST_CLIPS)) for name, rows in self.splits.items()}
        return [(name, number, count) for name, count in counts.items() for number in range(count)]

    def missing(self, shards: Sequence[ShardKey]) -> list[ShardKey]:
        """Those of the shards that are not built yet."""
        return [shard for shard in shards if not self.record_file(*shard[:2]).exists()]

    def record(self, shard: ShardKey) -> Record:
        """The record of a shard that is built."""
        content = json.loads(self.record_file(*shard[:2]).read_text(encoding="utf-8"))
        return Record(**content | {"rejects": [tuple(reject) for reject in content["rejects"]]})

    def rows(self, split: str, number: int, count: int) -> list[tuple[Row, ClipFiles]]:
        return self.splits[split][slice(*self._bounds(split, number, count))]

    def size(self, shard: ShardKey) -> int:
        """Rows of a shard."""
        start, end = self._bounds(*shard)
        return end - start

    def _bounds(self, split: str, number: int, count: int) -> tuple[int, int]:
        rows = len(self.splits[split])
        return rows * number // count, rows * (number + 1) // count

    def record_file(self, split: str, number: int) -> Path:
        """The file of a finished shard's record, which exists until the corpus is complete."""
        return self.folder / "progress" / f"{split}-{number:05d}.json"


@dataclass(frozen=True)
class Record:
    """The result of one shard.

    ``counts`` are of clips that were shortened, normalised without shoulders, show no hands, have landmarks with a
    confidence but without a place, end after their file, have an unusual frame rate, or lack landmarks of the set.
    """

    split: str
    number: int
    clips: int
    frames: int
    rejects: list[tuple[int, str, str, str]]  # line in the table, uid, reason and remedy
    counts: dict[str, int]
    lacking: dict[str, int]  # landmarks that files lack, each with the number of clips
    checksum: str  # xxh3 of the files, in order


def build_shards(work: Work, shards: Sequence[ShardKey], workers: int) -> Iterator[Record]:
    """Build shards in ``workers`` processes (1: in this one), and yield the record of each as it is finished.

    Raises:
        UserError: a worker process was killed.
    """
    if workers == 1 or len(shards) < 2:
        for shard in shards:
            yield build_shard(work, *shard)
        return

    # Forked workers need not import everything again; no threads run and no GPU is in use during preparation.
    context = multiprocessing.get_context("fork")
    executor = ProcessPoolExecutor(min(workers, len(shards)), context, initializer=_become_worker, initargs=(work,))
    try:
        for future in as_completed([executor.submit(_build_inherited_shard, *shard) for shard in shards]):
            yield future.result()
    except BrokenProcessPool as error:
        raise UserError(
            "a preparation process was killed, as when the kernel is short of memory",
            "run the same command again with fewer data.workers (--workers)",
        ) from error
    finally:
        executor.shutdown(cancel_futures=True)


_inherited: Work


def _become_worker(work: Work) -> None:
    global _inherited
    _inherited = work
    # Ctrl-C reaches the whole process group; the parent handles it, and shards that are being built are finished.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _build_inherited_shard(split: str, number: int, count: int) -> Record:
    return build_shard(_inherited, split, number, count)


def build_shard(work: Work, split: str, number: int, count: int) -> Record:
    """Extract the features of all rows of a shard and write them; rejects are in the record."""
    clips: list[Clip] = []
    rejects: list[tuple[int, str, str, str]] = []
    counts: Counter[str] = Counter()
    lacking: Counter[str] = Counter()
    checksum = xxhash.xxh3_64()
    for row, files in work.rows(split, number, count):
        try:
            contents = {source.kind: source.read(key) for source, key in zip(work.sources, files, strict=True)}
            for content in contents.values():
                checksum.update(content)
            sampled, counted = _read_row(work, row, contents)
        except PoseError as error:
            rejects.append((row.line, row.uid, str(error), error.hint))
            continue
        counts.update(counted)
        lacking.update("/".join(point) for point in (sampled.poses.lacking if sampled.poses else ()))
        clips.append(
            Clip(
                uid=row.uid,
                text=row.text,
                features=sampled.features,
                video=source_video(row),
                hands_visible=sampled.poses.hands_visible if sampled.poses else 1.0,
                video_features=sampled.video_features,
                signer=row.signer,
                gloss=row.gloss,
                **{name: getattr(row, name) for name in CONDITIONS},
            )
        )
    write_shard(work.folder / split / shard_name(number, count), clips, work.landmark_set.width, work.num_features)
    frames = sum(len(clip.features) for clip in clips)
    record = Record(split, number, len(clips), frames, rejects, dict(counts), dict(lacking), checksum.hexdigest())
    record_file = work.record_file(split, number)
    partial = unfinished_name(record_file)
    partial.write_text(json.dumps(record.__dict__), encoding="utf-8")
    partial.replace(record_file)
    return record


def _read_row(work: Work, row: Row, contents: Mapping[str, bytes]) -> tuple[SampledClip, Counter[str]]:
    """The arrays of a row's clip out of its files, given by their kind, and what is counted of them.

    Raises:
        PoseError: one of them cannot be used.
    """
    data = work.data
    raw = read_clip(contents[work.poses.kind], row.fps) if work.poses else None
    video = None
    if work.features:
        video = read_features(contents[work.features.kind], row.features_fps or data.features_fps)
        if video.width != work.num_features:
            raise PoseError(
                f"features of two widths: {video.width} numbers a frame here, {work.num_features} in the first file",
                "make the features of all clips by one network",
            )
    recording = Recording(raw, video)
    start, end = row.seconds(raw.fps if raw else video.fps if video else 1.0)
    sampled = recording.between(start, end).sampled(
        work.landmark_set, data.fps, min_frames=data.min_frames, max_frames=data.max_frames, too_long=data.too_long
    )
    counts: Counter[str] = Counter(shortened=int(sampled.shortened))
    if raw and (found := sampled.poses):
        if found.hands_visible == 0 and data.no_hands == "reject":
            raise PoseError("no hands: no frame shows a landmark of either")
        counts["normalised_without_shoulders"] += found.normalised_by == "spread"
        counts["without_hands"] += found.hands_visible == 0
        counts["points_without_place"] += found.without_place > 0
        counts["end_beyond_file"] += end is not None and end > raw.num_frames / raw.fps + LATE_END
        counts["unusual_fps"] += not USUAL_FPS[0] <= raw.fps <= USUAL_FPS[1]
        counts["lacking_landmarks"] += bool(found.lacking)
    return sampled, counts


def build_on_ray(work: Work, shards: Sequence[ShardKey], address: str, workers: int = 0) -> Iterator[Record]:
    """Build shards on a running Ray cluster, whose machines have the same folders, and yield their records.

    ``address`` is that of the cluster's head (``host:6379``), or ``auto`` on one of its machines. At most ``workers``
    builders run at a time; 0 = one for each processor of the cluster.

    Raises:
        UserError: Ray is not installed, or the cluster does not answer.
    """
    if not shards:
        return
    try:
        import ray
        from ray.util import ActorPool
    except ImportError as error:
        raise UserError(
            "--ray needs Ray, which is not installed", 'pip install "sign-language-translation-toolkit[ray]"'
        ) from error
    _check_port(address)
    try:
        # Builders may start in any folder; they import the toolkit from the folder of this process.
        ray.init(
            address=address,
            runtime_env={"env_vars": {"PYTHONPATH": f"{CODE}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}},
            logging_level=logging.ERROR,
            log_to_driver=False,
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UserError(f"--ray {address}: no Ray cluster answers: {first_line(error)[:200]}", _CHECK_RAY) from error
    try:
        processors = int(ray.cluster_resources().get("CPU", 1))
        shared = ray.put(replace(work, folder=work.folder.absolute()))
        # A builder whose machine fails starts again on another; a shard may be built twice.
        builder: Any = ray.remote(num_cpus=1, max_restarts=-1, max_task_retries=-1)(_Builder)
        builders = min(workers or processors, processors, len(shards))
        pool: Any = ActorPool([builder.remote(shared) for _ in range(builders)])
        yield from pool.map_unordered(lambda actor, shard: actor.build.remote(shard), shards)
    finally:
        ray.shutdown()


def _check_port(address: str) -> None:
    """Raise UserError where no process listens at ``host:port``; Ray itself would try for many minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return  # `auto` and others, which Ray looks up in files of this machine
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise UserError(f"--ray {address}: no process answers: {error}", _CHECK_RAY) from error


class _Builder:
    """Builds shards in a process of its own, which receives the work once and not with every shard."""

    def __init__(self, work: Work) -> None:
        self.work = work

    def build(self, shard: ShardKey) -> Record:
        return build_shard(self.work, *shard)
