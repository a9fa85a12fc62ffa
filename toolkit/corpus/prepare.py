"""From a table and pose files to a packed corpus: prepared once, found again by a hash, and never half."""

from __future__ import annotations

import csv
import json
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import xxhash
from filelock import FileLock, Timeout
from tqdm import tqdm  # type: ignore[import-untyped]

from toolkit import __version__
from toolkit.cluster.rendezvous import on_each_node, on_rank_0
from toolkit.corpus.card import write_card
from toolkit.corpus.demo import DEMO_VERSION, DemoSizes, find_lexicon, make_demo, words
from toolkit.corpus.packed import METADATA_FILE, Corpus, Metadata
from toolkit.corpus.plan import Inputs, Plan, make_plan, read_inputs
from toolkit.corpus.shards import Record, Shard, Work, build_shards
from toolkit.corpus.splits import leakage
from toolkit.corpus.table import Row
from toolkit.corpus.writer import UNFINISHED, finish_corpus, finish_split
from toolkit.errors import Interrupted, TooManyRejects, UserError
from toolkit.poses.features import FEATURES_VERSION, NORMALISATION
from toolkit.recipe.schema import Data

MESSAGE_WHILE_WAITING = 30.0  # seconds
# A shared file system may say for so long that something is not there which another node has made.
SHARED_SECONDS = 60.0


Build = Callable[[Work, Sequence[Shard]], Iterator[Record]]
"""Builds shards somewhere and yields the record of each as it is finished."""


@dataclass(frozen=True)
class Prepared:
    """A corpus that is there, or this job's share of one, and how fast it came to be.

    Attributes:
        path: its folder.
        clips_per_second: read by this preparation, all workers together; None when nothing was left to read.
        missing_shards: those that other jobs must still build before there is a corpus; 0 when it is there.
    """

    path: Path
    clips_per_second: float | None
    missing_shards: int = 0


def ensure_corpus(data: Data, *, is_local_main: bool = True) -> Path:
    """The folder of the prepared corpus that the settings mean; see ``find_or_prepare``. All ranks call this.

    Rank 0 prepares it. A node that does not see it within a minute has a cache of its own, and prepares it there.
    """
    path = on_rank_0(lambda: find_or_prepare(data, is_local_main=is_local_main).path)
    return on_each_node(lambda: path if _appears(path) else find_or_prepare(data, is_local_main=is_local_main).path)


def _appears(corpus: Path) -> bool:
    """Whether a corpus that another node has prepared is to be seen from here, at once or soon."""
    end = time.monotonic() + SHARED_SECONDS
    while not (corpus / METADATA_FILE).exists():
        if time.monotonic() > end:
            return False
        time.sleep(1)
    return True


def find_or_prepare(data: Data, *, is_local_main: bool = True, ray: str | None = None) -> Prepared:
    """The prepared corpus that the settings mean; prepared now if that was never done before.

    Many processes may ask at the same time: one prepares, and the others wait for it.

    Args:
        data: ``corpus`` names a prepared one; else it is kept in ``cache``, under a hash of all that it depends on.
        speaks: whether this process says so while it waits for another.
        ray: address of a Ray cluster to prepare on; None prepares on this machine.

    Raises:
        UserError: an input is missing or wrong.
        TooManyRejects: more clips are unusable than ``max_rejects`` allows.
        Interrupted: Ctrl-C; asking again goes on.
    """
    if data.corpus is not None:
        return Prepared(Corpus.open(data.corpus).path, None)
    asked_at = time.time()
    cache = Path(data.cache)
    if data.source == "demo":
        data = _with_demo_clips(data, cache, is_local_main)
    inputs = read_inputs(data)
    out = cache / f"{data.source}-{inputs.fingerprint[:12]}"
    if not (out / METADATA_FILE).exists():
        plan = make_plan(inputs)
        with _sole_writer(out, is_local_main):
            if not (out / METADATA_FILE).exists():
                _refuse_again(out, asked_at)
                return _prepare(plan, out, _builder(data, ray))
    return Prepared(out, None)


def prepare(
    data: Data, out: Path, *, replace: bool = False, share: tuple[int, int] = (1, 1), ray: str | None = None
) -> Prepared:
    """Prepare a corpus into a folder of the user's choice.

    Args:
        data: table, poses and how to treat them.
        out: the folder to make; an unfinished preparation of the same inputs is continued.
        replace: whether a corpus that is there already may be replaced.
        share: ``(k, n)`` builds the k-th of n shares. Jobs for the others may run at any time, on any machine that
            has the same folder; whoever finds that nothing is missing any more makes the corpus.
        ray: address of a Ray cluster to prepare on; None prepares on this machine.

    Raises:
        UserError, TooManyRejects, Interrupted: as ``find_or_prepare``.
    """
    if out.exists() and not replace and share[1] == 1:
        raise _exists(out)
    if data.source == "demo":
        data = _with_demo_clips(data, Path(data.cache), is_local_main=True)
    plan, build = make_plan(read_inputs(data)), _builder(data, ray)
    if share[1] > 1:
        return _prepare_share(plan, out, share, replace, build)
    with _sole_writer(out, is_local_main=True):
        return _prepare(plan, out, build)


def _builder(data: Data, ray: str | None) -> Build:
    if ray is not None:
        from toolkit.corpus.on_ray import build_on_ray

        return lambda work, shards: build_on_ray(work, shards, ray, data.workers)
    return lambda work, shards: build_shards(work, shards, data.workers or len(os.sched_getaffinity(0)))


def _exists(out: Path) -> UserError:
    return UserError(f"{out} exists already: choose another --out, or say --replace")


def _prepare(plan: Plan, out: Path, build: Build) -> Prepared:
    """Build under another name, check, and rename."""
    unfinished = _unfinished(out)
    _keep_only_if_same(unfinished, plan.inputs.fingerprint)
    work = _work(plan, unfinished)
    rate = _build_with_progress(work, out.name, work.shards(), build)
    _finish(plan, work, out)
    return Prepared(out, rate)


def _prepare_share(plan: Plan, out: Path, share: tuple[int, int], replace: bool, build: Build) -> Prepared:
    """Build every n-th shard from the k-th on; the lock is held only to begin and to look whether all are there."""
    fingerprint = plan.inputs.fingerprint
    # A corpus does not say where its sources lay, so what it was made from is noted beside it: a job that starts when
    # the others are done must find out that this is the corpus it was to help with.
    made_from = out.with_name(f".{out.name}.inputs")
    with _sole_writer(out, is_local_main=True):
        if out.exists():
            if made_from.exists() and made_from.read_text(encoding="utf-8") == fingerprint:
                return Prepared(out, None)
            if not replace:
                raise _exists(out)
        unfinished = _unfinished(out)
        if unfinished.exists() and not _is_same(unfinished, fingerprint):
            raise UserError(
                f"{unfinished} belongs to a preparation of other inputs: delete it if that one no longer runs, "
                "or choose another --out"
            )
        _keep_only_if_same(unfinished, fingerprint)
        work = _work(plan, unfinished)
    number, count = share
    with _goes_on_later(out):
        rate = _build_with_progress(work, f"{out.name} {number}/{count}", work.shards()[number - 1 :: count], build)
    with _sole_writer(out, is_local_main=True):
        # Another share may have found everything there in the meantime, and made the corpus.
        if unfinished.exists():
            missing = len(work.missing(work.shards()))
            if missing:
                return Prepared(out, rate, missing)
            _finish(plan, work, out)
            made_from.write_text(fingerprint, encoding="utf-8")
    return Prepared(out, rate)


def _unfinished(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def _work(plan: Plan, unfinished: Path) -> Work:
    (unfinished / "progress").mkdir(parents=True, exist_ok=True)
    for split in plan.splits:
        (unfinished / split).mkdir(exist_ok=True)
    return Work(unfinished, plan.inputs.data, plan.inputs.landmark_set, plan.inputs.poses, plan.splits)


def _build_with_progress(work: Work, title: str, shards: Sequence[Shard], build: Build) -> float | None:
    """Build those of the shards that are missing.

    Returns:
        clips read per second; None if there was nothing to read.
    """
    missing = work.missing(shards)
    clips = sum(work.size(shard) for shard in missing)
    started = time.perf_counter()
    with _bar(f"preparing {title}", sum(work.size(shard) for shard in shards)) as bar:
        bar.update(bar.total - clips)
        for record in build(work, missing):
            bar.update(record.clips + len(record.rejects))
    return round(clips / max(time.perf_counter() - started, 1e-9), 1) if clips else None


def _finish(plan: Plan, work: Work, out: Path) -> None:
    """Turn the shards, all of which are there, into a corpus.

    Raises:
        TooManyRejects: then everything but the list of rejects is gone.
    """
    inputs, unfinished = plan.inputs, work.folder
    records = [work.record(shard) for shard in work.shards()]
    splits = {name: [row for row, _ in rows] for name, rows in plan.splits.items()}
    rejects = sorted(plan.rejects + [reject for record in records for reject in record.rejects])
    used = sum(record.clips for record in records)
    assert used + len(rejects) + len(plan.removed) == len(inputs.rows), "every row is a clip, a reject or removed"
    if len(rejects) > inputs.data.max_rejects * len(inputs.rows) or used == 0:
        shutil.rmtree(unfinished)
        raise _too_many_rejects(inputs, rejects, out)
    metadata = _metadata(plan, splits, records, len(rejects))
    for name in splits:
        finish_split(unfinished / name, inputs.landmark_set.width)
    _write_reasons(unfinished / "rejects.csv", rejects)
    if plan.removed:
        _write_reasons(unfinished / "removed.csv", plan.removed)
    finish_corpus(unfinished, metadata)
    write_card(Corpus.open(unfinished))
    shutil.rmtree(unfinished / "progress")
    (unfinished / "inputs.txt").unlink()
    for leftover in unfinished.rglob(f"*{UNFINISHED}"):
        leftover.unlink()
    if out.exists():
        shutil.rmtree(out)
    unfinished.rename(out)
    _rejects_beside(out).unlink(missing_ok=True)


def _bar(title: str, clips: int) -> tqdm:
    """A live bar with clips/s and the time left; in a log file a line now and then instead."""
    tqdm.monitor_interval = 0  # its thread would be there when the workers are forked
    return tqdm(total=clips, desc=title, unit="clip", delay=1, mininterval=0.2 if sys.stderr.isatty() else 10)


def _metadata(plan: Plan, splits: dict[str, list[Row]], records: list[Record], num_rejects: int) -> Metadata:
    inputs = plan.inputs
    counts: Counter[str] = Counter(rejects=num_rejects)
    if inputs.data.shared_texts != "keep":
        counts["removed_shared_texts"] = len(plan.removed)
    lacking: Counter[str] = Counter()
    summaries = {name: {"clips": 0, "frames": 0} for name in splits}
    clips_checksum = xxhash.xxh3_64()
    for record in records:
        counts.update(record.counts)
        lacking.update(record.lacking)
        summaries[record.split]["clips"] += record.clips
        summaries[record.split]["frames"] += record.frames
        clips_checksum.update(record.checksum.encode())
    return Metadata(
        landmark_set=inputs.landmark_set.to_dict(),
        fps=inputs.data.fps,
        normalisation=NORMALISATION,
        max_frames=inputs.data.max_frames,
        min_frames=inputs.data.min_frames,
        too_long=inputs.data.too_long,
        no_hands=inputs.data.no_hands,
        shared_texts=inputs.data.shared_texts,
        splits=summaries,
        counts=dict(counts),
        checksums={"table": inputs.table_checksum, "clips": clips_checksum.hexdigest()},
        leakage=leakage(splits),
        lacking=dict(sorted(lacking.items())),
        versions={"toolkit": __version__, "features": str(FEATURES_VERSION)},
    )


def _keep_only_if_same(unfinished: Path, fingerprint: str) -> None:
    """Throw away what an interrupted preparation of other inputs left behind."""
    if not _is_same(unfinished, fingerprint):
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        (unfinished / "inputs.txt").write_text(fingerprint, encoding="utf-8")


def _is_same(unfinished: Path, fingerprint: str) -> bool:
    note = unfinished / "inputs.txt"
    return note.exists() and note.read_text(encoding="utf-8") == fingerprint


def _rejects_beside(out: Path) -> Path:
    """Where the list of rejects is kept when they were too many for a corpus."""
    return out.with_name(out.name + ".rejects.csv")


def _write_reasons(path: Path, rejects: list[tuple[int, str, str]]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["uid", "reason"])
        rows.writerows((uid, reason) for _, uid, reason in rejects)


def _too_many_rejects(inputs: Inputs, rejects: list[tuple[int, str, str]], out: Path) -> UserError:
    """The error for a preparation that lost too much; the list of what was lost and why is kept beside ``out``."""
    listed = _rejects_beside(out)
    _write_reasons(listed, rejects)
    # What follows a colon is about the one clip.
    (kind, number), *_ = Counter(reason.partition(":")[0] for _, _, reason in rejects).most_common(1)
    reason = next(reason for _, _, reason in rejects if reason.partition(":")[0] == kind)
    share = 100 * len(rejects) / len(inputs.rows)
    empty = [line for line, _, reason in rejects if reason == "the text is empty"]
    if len(empty) > inputs.data.max_rejects * len(inputs.rows):
        return UserError(
            f"{inputs.data.table}, line {empty[0]}: the text is empty ({len(empty)} such rows): "
            "fill in these texts or take the rows out"
        )
    return TooManyRejects(
        f"{len(rejects)} of {len(inputs.rows)} clips ({share:.3g} %) cannot be used, data.max_rejects allows "
        f"{100 * inputs.data.max_rejects:g} %; most often: {reason} ({number}); all are listed in {listed}"
    )


def _refuse_again(out: Path, asked_at: float) -> None:
    """Spare a process that waited for another's failure the same long way to the same failure."""
    listed = _rejects_beside(out)
    if listed.exists() and listed.stat().st_mtime >= asked_at:
        raise TooManyRejects(f"too many clips cannot be used: all are listed in {listed}")


@contextmanager
def _sole_writer(out: Path, is_local_main: bool) -> Iterator[None]:
    """Hold the lock of a corpus; while another process holds it, say so now and then. Ctrl-C becomes Interrupted."""
    out.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out.with_name(f".{out.name}.lock"))
    waited = 0.0
    while True:
        try:
            lock.acquire(timeout=MESSAGE_WHILE_WAITING)
            break
        except Timeout:
            waited += MESSAGE_WHILE_WAITING
            if is_local_main:
                print(f"waiting for another process that prepares {out} ({waited:.0f} s)", file=sys.stderr, flush=True)
    try:
        with _goes_on_later(out):
            yield
    finally:
        lock.release()


@contextmanager
def _goes_on_later(out: Path) -> Iterator[None]:
    """Ctrl-C becomes Interrupted."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise Interrupted(f"preparing {out} stopped half-way: run the same command again to go on") from error


def _with_demo_clips(data: Data, cache: Path, is_local_main: bool) -> Data:
    """The demo's settings with its table and poses, which are made first if they are not there."""
    sizes = DemoSizes()
    index = (find_lexicon() / "index.csv").read_bytes()
    recipe = json.dumps([DEMO_VERSION, asdict(sizes), words()]).encode()
    clips = cache / f"demo-clips-{xxhash.xxh3_64_hexdigest(recipe + index)[:12]}"
    if not clips.exists():
        with _sole_writer(clips, is_local_main):
            if not clips.exists():
                total = sum(asdict(sizes).values())
                with _bar("making the demo's clips", total) as bar:
                    make_demo(clips, sizes, workers=data.workers or len(os.sched_getaffinity(0)), progress=bar.update)
    return data.model_copy(update={"table": str(clips / "table.csv"), "poses": str(clips / "poses")})
