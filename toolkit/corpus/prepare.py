"""From a table and pose files to a packed corpus: prepared once, found again by a hash, and never half."""

from __future__ import annotations

import csv
import json
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash
from filelock import FileLock, Timeout
from tqdm import tqdm  # type: ignore[import-untyped]

from toolkit import __version__
from toolkit.corpus.archives import PoseFiles, open_poses
from toolkit.corpus.card import write_card
from toolkit.corpus.demo import DEMO_VERSION, DemoSizes, find_lexicon, make_demo, words
from toolkit.corpus.packed import FORMAT_VERSION, METADATA_FILE, Corpus, Metadata, finish_corpus, finish_split
from toolkit.corpus.shards import Record, Work, build_shards
from toolkit.corpus.splits import assign_splits, leakage
from toolkit.corpus.table import PRESETS, Row, read_table
from toolkit.errors import Interrupted, TooManyRejects, UserError
from toolkit.poses.features import FEATURES_VERSION, NORMALISATION
from toolkit.poses.landmarks import LandmarkSet, load_landmark_set
from toolkit.recipe.schema import Data

MESSAGE_WHILE_WAITING = 30.0  # seconds
MOST_FILES_MISSING = 0.5  # share of the clips beyond which the folder, not the clips, must be wrong


@dataclass(frozen=True)
class Prepared:
    """A corpus that is there, and how fast it came to be.

    Attributes:
        path: its folder.
        clips_per_second: read by this preparation, all workers together; None when the corpus was there already.
    """

    path: Path
    clips_per_second: float | None


@dataclass(frozen=True)
class _Inputs:
    """A table and pose files, looked through but not yet read."""

    data: Data
    landmark_set: LandmarkSet
    rows: list[Row]
    poses: PoseFiles
    table_checksum: str

    @property
    def fingerprint(self) -> str:
        """Hash of everything that the corpus depends on."""
        settings = self.data.model_dump(
            include={
                "source",
                "fps",
                "max_frames",
                "min_frames",
                "too_long",
                "columns",
                "dev_share",
                "test_share",
                "split_seed",
            }
        )
        parts = [FORMAT_VERSION, FEATURES_VERSION, settings, self.landmark_set.to_dict(), self.table_checksum]
        return xxhash.xxh3_64_hexdigest(json.dumps([*parts, self.poses.identity], sort_keys=True).encode())


def ensure_corpus(data: Data, *, speaks: bool = True) -> Path:
    """The folder of the prepared corpus that the settings mean; see ``find_or_prepare``."""
    return find_or_prepare(data, speaks=speaks).path


def find_or_prepare(data: Data, *, speaks: bool = True) -> Prepared:
    """The prepared corpus that the settings mean; prepared now if that was never done before.

    Many processes may ask at the same time: one prepares, and the others wait for it.

    Args:
        data: ``corpus`` names a prepared one; else it is kept in ``cache``, under a hash of all that it depends on.
        speaks: whether this process says so while it waits for another.

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
        data = _with_demo_clips(data, cache, speaks)
    inputs = _read_inputs(data)
    out = cache / f"{data.source}-{inputs.fingerprint[:12]}"
    if not (out / METADATA_FILE).exists():
        plan = _plan(inputs)
        with _sole_writer(out, speaks):
            if not (out / METADATA_FILE).exists():
                _refuse_again(out, asked_at)
                return _prepare(plan, out)
    return Prepared(out, None)


def prepare(data: Data, out: Path, *, replace: bool = False) -> Prepared:
    """Prepare a corpus into a folder of the user's choice.

    Args:
        data: table, poses and how to treat them.
        out: the folder to make; an unfinished preparation of the same inputs is continued.
        replace: whether a corpus that is there already may be replaced.

    Raises:
        UserError, TooManyRejects, Interrupted: as ``find_or_prepare``.
    """
    if out.exists() and not replace:
        raise UserError(f"{out} exists already: choose another --out, or say --replace")
    if data.source == "demo":
        data = _with_demo_clips(data, Path(data.cache), speaks=True)
    plan = _plan(_read_inputs(data))
    with _sole_writer(out, speaks=True):
        return _prepare(plan, out)


def _read_inputs(data: Data) -> _Inputs:
    """Everything that can be wrong before a single clip is read is found here."""
    if data.table is None or data.poses is None:
        missing = "data.table" if data.table is None else "data.poses"
        raise UserError(f"{missing} is not set: give data.table=T.csv data.poses=FOLDER, or data.corpus=PREPARED")
    landmark_set = load_landmark_set(data.landmarks)
    table = Path(data.table)
    rows = read_table(table, {**PRESETS.get(data.source, {}), **data.columns})
    return _Inputs(data, landmark_set, rows, open_poses(Path(data.poses)), xxhash.xxh3_64_hexdigest(table.read_bytes()))


@dataclass(frozen=True)
class _Plan:
    """What is to be done: rows with their pose files by split, and the rows (line, uid, reason) already lost."""

    inputs: _Inputs
    splits: dict[str, list[tuple[Row, Any]]]
    rejects: list[tuple[int, str, str]]


def _plan(inputs: _Inputs) -> _Plan:
    """Find the pose file of every row and deal the rows out to splits; raises UserError."""
    located, rejects = _locate(inputs)
    data = inputs.data
    splits = assign_splits([row for row, _ in located], data.dev_share, data.test_share, data.split_seed)
    files = {row.uid: file for row, file in located}
    return _Plan(inputs, {name: [(row, files[row.uid]) for row in rows] for name, rows in splits.items()}, rejects)


def _prepare(plan: _Plan, out: Path) -> Prepared:
    """Build under another name, check, and rename."""
    inputs, data = plan.inputs, plan.inputs.data
    unfinished = out.with_name(out.name + ".partial")
    _keep_only_if_same(unfinished, inputs.fingerprint)
    work = Work(unfinished, data, inputs.landmark_set, inputs.poses, plan.splits)
    started = time.perf_counter()
    records, clips_now = _build_with_progress(work, out, sum(map(len, plan.splits.values())))
    seconds = time.perf_counter() - started

    splits = {name: [row for row, _ in rows] for name, rows in plan.splits.items()}
    rejects = sorted(plan.rejects + [reject for record in records for reject in record.rejects])
    used = sum(record.clips for record in records)
    if len(rejects) > data.max_rejects * len(inputs.rows) or used == 0:
        shutil.rmtree(unfinished)
        raise _too_many_rejects(inputs, rejects, out)
    metadata = _metadata(inputs, splits, records, len(rejects))
    for name in splits:
        finish_split(unfinished / name, inputs.landmark_set.width)
    _write_rejects(unfinished / "rejects.csv", rejects)
    finish_corpus(unfinished, metadata)
    write_card(Corpus.open(unfinished))
    shutil.rmtree(unfinished / "progress")
    (unfinished / "inputs.txt").unlink()
    if out.exists():
        shutil.rmtree(out)
    unfinished.rename(out)
    _rejects_beside(out).unlink(missing_ok=True)
    return Prepared(out, round(clips_now / max(seconds, 1e-9), 1))


def _locate(inputs: _Inputs) -> tuple[list[tuple[Row, Any]], list[tuple[int, str, str]]]:
    """Rows that have a uid, a text and a pose file of their own; and the others as rejects (line, uid, reason).

    Raises:
        UserError: so many files are missing that the folder must be the wrong one.
    """
    located: list[tuple[Row, Any]] = []
    rejects: list[tuple[int, str, str]] = []
    first_line: dict[str, int] = {}
    missing: list[Row] = []
    for row in inputs.rows:
        file = inputs.poses.find(row)
        if not row.uid:
            rejects.append((row.line, "", f"line {row.line} has no uid"))
        elif row.uid in first_line:
            rejects.append((row.line, row.uid, f"duplicate uid: line {first_line[row.uid]} has it too"))
        elif not row.text:
            rejects.append((row.line, row.uid, "the text is empty"))
        elif file is None:
            missing.append(row)
            rejects.append((row.line, row.uid, "no pose file has its name"))
        else:
            located.append((row, file))
        first_line.setdefault(row.uid, row.line)
    if len(missing) > MOST_FILES_MISSING * len(inputs.rows):
        raise UserError(
            f"{len(missing)} of the {len(inputs.rows)} clips in {inputs.data.table} have no pose file "
            f"in {inputs.data.poses} (for instance {missing[0].uid}.pose): is data.poses right?"
        )
    return located, rejects


def _build_with_progress(work: Work, out: Path, total: int) -> tuple[list[Record], int]:
    """All records in the order of the shards, and how many clips were read now rather than by an earlier attempt."""
    records = []
    clips_now = 0
    with _bar(f"preparing {out.name}", total) as bar:
        for record, was_there in build_shards(work, work.data.workers or len(os.sched_getaffinity(0))):
            records.append(record)
            clips = record.clips + len(record.rejects)
            clips_now += 0 if was_there else clips
            bar.update(clips)
    order = {name: position for position, name in enumerate(work.splits)}
    return sorted(records, key=lambda record: (order[record.split], record.number)), clips_now


def _bar(title: str, clips: int) -> tqdm:
    """A live bar with clips/s and the time left; in a log file a line now and then instead."""
    tqdm.monitor_interval = 0  # its thread would be there when the workers are forked
    return tqdm(total=clips, desc=title, unit="clip", delay=1, mininterval=0.2 if sys.stderr.isatty() else 10)


def _metadata(inputs: _Inputs, splits: dict[str, list[Row]], records: list[Record], num_rejects: int) -> Metadata:
    counts: Counter[str] = Counter(rejects=num_rejects)
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
        splits=summaries,
        counts=dict(counts),
        checksums={"table": inputs.table_checksum, "clips": clips_checksum.hexdigest()},
        leakage=leakage(splits),
        lacking=dict(sorted(lacking.items())),
        versions={"toolkit": __version__, "features": str(FEATURES_VERSION)},
    )


def _keep_only_if_same(unfinished: Path, fingerprint: str) -> None:
    """Throw away what an interrupted preparation of other inputs left behind."""
    note = unfinished / "inputs.txt"
    if not note.exists() or note.read_text(encoding="utf-8") != fingerprint:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        note.write_text(fingerprint, encoding="utf-8")


def _rejects_beside(out: Path) -> Path:
    """Where the list of rejects is kept when they were too many for a corpus."""
    return out.with_name(out.name + ".rejects.csv")


def _write_rejects(path: Path, rejects: list[tuple[int, str, str]]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["uid", "reason"])
        rows.writerows((uid, reason) for _, uid, reason in rejects)


def _too_many_rejects(inputs: _Inputs, rejects: list[tuple[int, str, str]], out: Path) -> UserError:
    """The error for a preparation that lost too much; the list of what was lost and why is kept beside ``out``."""
    listed = _rejects_beside(out)
    _write_rejects(listed, rejects)
    (reason, number), *_ = Counter(reason for _, _, reason in rejects).most_common(1)
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
def _sole_writer(out: Path, speaks: bool) -> Iterator[None]:
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
            if speaks:
                print(f"waiting for another process that prepares {out} ({waited:.0f} s)", file=sys.stderr, flush=True)
    try:
        yield
    except KeyboardInterrupt as error:
        raise Interrupted(f"preparing {out} stopped half-way: run the same command again to go on") from error
    finally:
        lock.release()


def _with_demo_clips(data: Data, cache: Path, speaks: bool) -> Data:
    """The demo's settings with its table and poses, which are made first if they are not there."""
    sizes = DemoSizes()
    index = (find_lexicon() / "index.csv").read_bytes()
    recipe = json.dumps([DEMO_VERSION, asdict(sizes), words()]).encode()
    clips = cache / f"demo-clips-{xxhash.xxh3_64_hexdigest(recipe + index)[:12]}"
    if not clips.exists():
        with _sole_writer(clips, speaks):
            if not clips.exists():
                total = sum(asdict(sizes).values())
                with _bar("making the demo's clips", total) as bar:
                    make_demo(clips, sizes, workers=data.workers or len(os.sched_getaffinity(0)), progress=bar.update)
    return data.model_copy(update={"table": str(clips / "table.csv"), "poses": str(clips / "poses")})
