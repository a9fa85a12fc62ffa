"""Prepare a packed corpus from a table and the files of its clips, once for the same inputs."""

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
from toolkit.corpus.packed import KEPT_SETTINGS, METADATA_FILE, Corpus, Metadata
from toolkit.corpus.plan import Inputs, Plan, Reject, make_plan, read_inputs
from toolkit.corpus.shards import Record, ShardKey, Work, build_on_ray, build_shards
from toolkit.corpus.splits import leakage
from toolkit.corpus.table import Row
from toolkit.corpus.writer import UNFINISHED, finish_corpus, finish_split
from toolkit.errors import Interrupted, TooManyRejects, UserError
from toolkit.poses.features import FEATURES_VERSION, NORMALISATION
from toolkit.recipe.schema import Data

# What programs write for a missing value; it may be a word as well.
_LIKE_MISSING = {"nan", "none", "null", "n/a", "#n/a", "<na>", "undefined"}
REJECT_COLUMNS = ("uid", "reason", "hint")
MESSAGE_WHILE_WAITING = 30.0  # seconds
# How long a shared file system may take to show a node what another one has written.
SHARED_SECONDS = 60.0


Build = Callable[[Work, Sequence[ShardKey]], Iterator[Record]]
"""Builds shards, here or on a cluster, and yields the record of each as it is finished."""


@dataclass(frozen=True)
class Prepared:
    """A prepared corpus, or this job's share of one."""

    path: Path  # its folder
    clips_per_second: float | None  # rate of this preparation, all workers together; None if there was nothing to read
    missing_shards: int = 0  # shards that other jobs must still build; 0 if the corpus is complete


def ensure_corpus(data: Data, *, is_local_main: bool = True) -> Path:
    """The folder of the corpus of these settings, prepared if it does not exist; all ranks call this.

    Rank 0 prepares it. A node that does not see it within a minute has a cache of its own, and prepares it there.
    """
    path = on_rank_0(lambda: find_or_prepare(data, is_local_main=is_local_main).path)
    return on_each_node(
        lambda: path if _is_visible_here(path) else find_or_prepare(data, is_local_main=is_local_main).path
    )


def _is_visible_here(corpus: Path) -> bool:
    """Whether this node sees a corpus that another one has prepared, now or within a minute."""
    end = time.monotonic() + SHARED_SECONDS
    while not (corpus / METADATA_FILE).exists():
        if time.monotonic() > end:
            return False
        time.sleep(1)
    return True


def find_or_prepare(data: Data, *, is_local_main: bool = True, ray: str | None = None) -> Prepared:
    """Find the corpus of these settings in the cache, or prepare it.

    Many processes may call this at the same time: one prepares, and the others wait for it.

    ``data.corpus`` names a prepared one; else it is in ``data.cache``, under a hash of all that it depends on. ``ray``
    is the address of a Ray cluster to prepare on; None prepares on this machine.

    Raises:
        UserError: an input is missing or wrong.
        TooManyRejects: more clips are unusable than ``max_rejects`` allows.
        Interrupted: Ctrl-C; the same call resumes.
    """
    if data.corpus is not None:
        return Prepared(Corpus.open(data.corpus).path, None)
    called_at = time.time()
    cache = Path(data.cache)
    if data.source == "demo":
        data = _with_demo_inputs(data, cache, is_local_main)
    inputs = read_inputs(data)
    out = cache / f"{data.source}-{inputs.fingerprint[:12]}"
    if not (out / METADATA_FILE).exists():
        plan = make_plan(inputs)
        with _locked(out, is_local_main):
            if not (out / METADATA_FILE).exists():
                _raise_if_just_rejected(out, called_at)
                return _prepare(plan, out, _builder(data, ray))
    return Prepared(out, None)


def prepare(
    data: Data, out: Path, *, replace: bool = False, share: tuple[int, int] = (1, 1), ray: str | None = None
) -> Prepared:
    """Prepare a corpus into a given folder.

    Args:
        data: table, poses and how to treat them.
        out: the folder to create; an unfinished preparation of the same inputs is resumed.
        replace: whether an existing corpus may be replaced.
        share: ``(k, n)`` builds the k-th of n shares. Jobs for the others may run at any time, on any machine that
            has the same folder; the job that builds the last missing shard completes the corpus.
        ray: address of a Ray cluster to prepare on; None prepares on this machine.

    Raises:
        UserError, TooManyRejects, Interrupted: as ``find_or_prepare``; besides, ``out`` is there and is not to be
            replaced, or is no corpus.
    """
    if out.exists() and not (out.is_dir() and (not any(out.iterdir()) or _is_corpus(out))):
        raise UserError(f"{out} exists already, and is no prepared corpus", "choose another --out")
    if out.exists() and not replace and share[1] == 1:
        raise _exists(out)
    if data.source == "demo":
        data = _with_demo_inputs(data, Path(data.cache), is_local_main=True)
    plan, build = make_plan(read_inputs(data)), _builder(data, ray)
    if share[1] > 1:
        return _prepare_share(plan, out, share, replace, build)
    with _locked(out, is_local_main=True):
        return _prepare(plan, out, build)


def _builder(data: Data, ray: str | None) -> Build:
    if ray is not None:
        return lambda work, shards: build_on_ray(work, shards, ray, data.workers)
    return lambda work, shards: build_shards(work, shards, data.workers or len(os.sched_getaffinity(0)))


def _is_corpus(folder: Path) -> bool:
    """Whether a folder is a corpus, of whatever version; a run directory has a file of the same name."""
    try:
        return "format_version" in json.loads((folder / METADATA_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def _exists(out: Path) -> UserError:
    return UserError(f"{out} exists already", "choose another --out, or add --replace")


def _prepare(plan: Plan, out: Path, build: Build) -> Prepared:
    """Build under another name, check, and rename."""
    unfinished = _unfinished(out)
    _keep_only_if_same(unfinished, plan.inputs.fingerprint)
    work = _work(plan, unfinished)
    rate = _build_with_progress(work, out.name, work.shards(), build)
    _finish(plan, work, out)
    return Prepared(out, rate)


def _prepare_share(plan: Plan, out: Path, share: tuple[int, int], replace: bool, build: Build) -> Prepared:
    """Build every n-th shard from the k-th on; the lock is held only at the start and for the check at the end."""
    fingerprint = plan.inputs.fingerprint
    # A corpus does not contain the hash of its inputs, so it is written beside it: a job that starts after the others
    # are done recognises the corpus of its own inputs.
    made_from = out.with_name(f".{out.name}.inputs")
    with _locked(out, is_local_main=True):
        if out.exists():
            if made_from.exists() and made_from.read_text(encoding="utf-8") == fingerprint:
                return Prepared(out, None)
            if not replace:
                raise _exists(out)
        unfinished = _unfinished(out)
        if unfinished.exists() and not _is_same(unfinished, fingerprint):
            raise UserError(
                f"{unfinished} belongs to a preparation of other inputs",
                "delete it if that preparation no longer runs, or choose another --out",
            )
        _keep_only_if_same(unfinished, fingerprint)
        work = _work(plan, unfinished)
    number, count = share
    with _resumable(out):
        rate = _build_with_progress(work, f"{out.name} {number}/{count}", work.shards()[number - 1 :: count], build)
    with _locked(out, is_local_main=True):
        # Another share may have completed the corpus in the meantime.
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
    inputs = plan.inputs
    return Work(
        unfinished, inputs.data, inputs.landmark_set, inputs.poses, inputs.features, inputs.num_features, plan.splits
    )


def _build_with_progress(work: Work, title: str, shards: Sequence[ShardKey], build: Build) -> float | None:
    """Build those of the shards that are missing; returns clips read per second, None if there were none."""
    missing = work.missing(shards)
    clips = sum(work.size(shard) for shard in missing)
    started = time.perf_counter()
    with _progress_bar(f"preparing {title}", sum(work.size(shard) for shard in shards)) as bar:
        bar.update(bar.total - clips)
        for record in build(work, missing):
            bar.update(record.clips + len(record.rejects))
    return round(clips / max(time.perf_counter() - started, 1e-9), 1) if clips else None


def _finish(plan: Plan, work: Work, out: Path) -> None:
    """Turn the shards, all of which are built, into a corpus.

    Raises:
        TooManyRejects: everything except the list of rejects is deleted.
    """
    inputs, unfinished = plan.inputs, work.folder
    records = [work.record(shard) for shard in work.shards()]
    splits = {name: [row for row, _ in rows] for name, rows in plan.splits.items()}
    rejects = sorted(plan.rejects + [reject for record in records for reject in record.rejects])
    used = sum(record.clips for record in records)
    assert used + len(rejects) + len(plan.removed) == len(inputs.rows), "every row is a clip, a reject or removed"
    if len(rejects) > inputs.data.max_rejects * len(inputs.rows) or used == 0:
        shutil.rmtree(unfinished)
        raise _too_many_rejects(inputs, rejects, out, any_used=used > 0)
    metadata = _metadata(plan, splits, records, len(rejects))
    for name in splits:
        finish_split(unfinished / name, inputs.landmark_set.width, inputs.num_features)
    _write_reasons(unfinished / "rejects.csv", REJECT_COLUMNS, rejects)
    if plan.removed:
        _write_reasons(unfinished / "removed.csv", REJECT_COLUMNS[:2], plan.removed)
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


def _progress_bar(title: str, clips: int) -> tqdm:
    """A progress bar with clips/s and the time left; in a log file a line every ten seconds."""
    tqdm.monitor_interval = 0  # its thread would be running when the workers are forked
    return tqdm(total=clips, desc=title, unit="clip", delay=1, mininterval=0.2 if sys.stderr.isatty() else 10)


def _metadata(plan: Plan, splits: dict[str, list[Row]], records: list[Record], num_rejects: int) -> Metadata:
    inputs = plan.inputs
    counts: Counter[str] = Counter(rejects=num_rejects)
    if inputs.data.shared_texts != "keep":
        counts["removed_shared_texts"] = len(plan.removed)
    rows = [(files, row) for split in plan.splits.values() for row, files in split]
    counts["same_recording"] = len(rows) - len({(files, row.start, row.end) for files, row in rows})
    counts["texts_like_missing"] = sum(row.text.casefold() in _LIKE_MISSING for _, row in rows)
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
        normalisation=NORMALISATION,
        **inputs.data.model_dump(include=set(KEPT_SETTINGS)),
        splits=summaries,
        counts=dict(counts),
        checksums={"table": inputs.table_checksum, "clips": clips_checksum.hexdigest()},
        leakage=leakage(splits),
        lacking=dict(sorted(lacking.items())),
        versions={"toolkit": __version__, "features": str(FEATURES_VERSION)},
        num_features=inputs.num_features,
    )


def _keep_only_if_same(unfinished: Path, fingerprint: str) -> None:
    """Delete an interrupted preparation of other inputs."""
    if not _is_same(unfinished, fingerprint):
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        (unfinished / "inputs.txt").write_text(fingerprint, encoding="utf-8")


def _is_same(unfinished: Path, fingerprint: str) -> bool:
    note = unfinished / "inputs.txt"
    return note.exists() and note.read_text(encoding="utf-8") == fingerprint


def _rejects_beside(out: Path) -> Path:
    """The list of rejects when they are too many for a corpus."""
    return out.with_name(out.name + ".rejects.csv")


def _write_reasons(path: Path, columns: Sequence[str], rows: Sequence[tuple[int | str, ...]]) -> None:
    """Write rows that begin with their line in the table, without it."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(row[1:] for row in rows)


def _too_many_rejects(inputs: Inputs, rejects: list[Reject], out: Path, *, any_used: bool) -> UserError:
    """The error for a preparation with too many rejects; their list is written beside ``out``."""
    listed = _rejects_beside(out)
    _write_reasons(listed, REJECT_COLUMNS, rejects)
    # Reasons of one kind are alike up to the first colon.
    (kind, number), *_ = Counter(reason.partition(":")[0] for _, _, reason, _ in rejects).most_common(1)
    reason, hint = next(reject[2:] for reject in rejects if reject[2].partition(":")[0] == kind)
    share = 100 * len(rejects) / len(inputs.rows)
    empty = [(line, uid) for line, uid, reason, _ in rejects if reason == "the text is empty"]
    if len(empty) > inputs.data.max_rejects * len(inputs.rows):
        first = next(row for row in inputs.rows if (row.line, row.uid) == empty[0])
        return UserError(
            f"{inputs.data.table}, {first.place}: the text is empty ({len(empty)} such rows)",
            "fill in these texts or remove the rows",
        )
    allowed = f", data.max_rejects allows {100 * inputs.data.max_rejects:g} %" if any_used else ""
    return TooManyRejects(
        f"{len(rejects)} of {len(inputs.rows)} clips ({share:.3g} %) cannot be used{allowed}; most often: {reason} "
        f"({number})",
        f"{hint or 'correct the clips'}; all are listed in {listed}"
        + ("; or raise data.max_rejects (--max-rejects)" if any_used else ""),
    )


def _raise_if_just_rejected(out: Path, called_at: float) -> None:
    """Raise the error of a process that this one has waited for, instead of repeating its work."""
    listed = _rejects_beside(out)
    if listed.exists() and listed.stat().st_mtime >= called_at:
        raise TooManyRejects("too many clips cannot be used", f"correct those that are listed in {listed}")


@contextmanager
def _locked(out: Path, is_local_main: bool) -> Iterator[None]:
    """Hold the lock of a corpus; report every 30 s that another process holds it. Ctrl-C becomes Interrupted."""
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
        with _resumable(out):
            yield
    finally:
        lock.release()


@contextmanager
def _resumable(out: Path) -> Iterator[None]:
    """Ctrl-C becomes Interrupted."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise Interrupted(
            f"the preparation of {out} was stopped by Ctrl-C", "run the same command again to resume it"
        ) from error


def _with_demo_inputs(data: Data, cache: Path, is_local_main: bool) -> Data:
    """The demo's settings with its table and poses, which are made first if they do not exist."""
    sizes = DemoSizes()
    index = (find_lexicon() / "index.csv").read_bytes()
    recipe = json.dumps([DEMO_VERSION, asdict(sizes), words()]).encode()
    clips = cache / f"demo-clips-{xxhash.xxh3_64_hexdigest(recipe + index)[:12]}"
    if not clips.exists():
        with _locked(clips, is_local_main):
            if not clips.exists():
                total = sum(asdict(sizes).values())
                with _progress_bar("making the demo's clips", total) as bar:
                    make_demo(clips, sizes, workers=data.workers or len(os.sched_getaffinity(0)), progress=bar.update)
    return data.model_copy(update={"table": str(clips / "table.csv"), "poses": str(clips / "poses"), "features": None})
