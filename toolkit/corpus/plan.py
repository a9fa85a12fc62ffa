"""Plan a preparation: read the table, find the files of every row (poses, features or both), assign splits.

All errors that can be found without reading a clip are raised here.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import xxhash

from toolkit.corpus.archives.files import PoseFiles, open_features, open_poses
from toolkit.corpus.names import canonical, contradict, escaped, shared_tail
from toolkit.corpus.packed import FORMAT_VERSION, KEPT_SETTINGS
from toolkit.corpus.published.presets import Preset, assigned_splits, find_tables, presets
from toolkit.corpus.splits import assign_splits, remove_shared_texts
from toolkit.corpus.table import Row, read_table
from toolkit.errors import UserError
from toolkit.poses.features import FEATURES_VERSION
from toolkit.poses.landmarks import NO_LANDMARKS, LandmarkSet, load_landmark_set
from toolkit.poses.pose_file import PoseError
from toolkit.poses.video_features import features_width, read_features
from toolkit.recipe.schema import Data

Reject = tuple[int, str, str, str]
"""Line in the table, uid, reason, and the remedy, which is empty where the file itself must be replaced."""

ClipFiles = tuple[Any, ...]
"""The keys of a clip's files, one of each source."""

Reason = tuple[str, str]
"""Why a row has no file of its own, and the remedy."""

MOST_FILES_MISSING = 0.5  # share of the clips; if more have no file, the folder or the names are wrong
PLACES = {"pose": "poses", "features": "features"}
"""The setting that says where the files of a kind are."""
MOST_EXAMPLES = 20  # rows without a file that are examined for the most frequent reason

# The settings that a corpus depends on; the landmark set, table and poses are hashed by their content.
_HASHED_SETTINGS = {*KEPT_SETTINGS, "source", "columns", "dev_share", "test_share", "split_seed"}


@dataclass(frozen=True)
class Inputs:
    """The rows of a table, and the lists of their files; no clip is read yet, but for the first file of features."""

    data: Data
    landmark_set: LandmarkSet
    rows: list[Row]
    poses: PoseFiles | None  # None for a corpus of features alone
    table_checksum: str
    features: PoseFiles | None = None  # what another network made of the videos, if anything
    num_features: int = 0  # numbers of a frame of these

    @property
    def fingerprint(self) -> str:
        """Hash of everything that the corpus depends on."""
        settings = self.data.model_dump(include=_HASHED_SETTINGS)
        parts = [FORMAT_VERSION, FEATURES_VERSION, settings, self.landmark_set.to_dict(), self.table_checksum]
        parts += [files.identity for files in self.sources]
        if self.features:
            parts += ["features", self.data.features_fps]
        # What later versions added counts only where it is used: corpora that were prepared before are found.
        added = {
            "preset": _preset(self.data).model_dump(exclude_defaults=True),
            "time_unit": self.data.time_unit,
            "split_by": self.data.split_by if self.data.split_by != "table" else "",
            "columns": [name for name in ("signer", "gloss") if any(getattr(row, name) for row in self.rows)],
        }
        parts += [{name: value} for name, value in added.items() if value]
        return xxhash.xxh3_64_hexdigest(json.dumps(parts, sort_keys=True).encode())

    @property
    def sources(self) -> list[PoseFiles]:
        """The lists of files; a clip has one of each."""
        return [files for files in (self.poses, self.features) if files]


@dataclass(frozen=True)
class Plan:
    """The work of a preparation."""

    inputs: Inputs
    splits: dict[str, list[tuple[Row, ClipFiles]]]  # rows with their files, by split
    rejects: list[Reject]  # rows that are rejected already
    removed: list[tuple[int, str, str]]  # line, uid and reason of held-out rows whose text is in train


def read_inputs(data: Data) -> Inputs:
    """Read the table and list the files.

    Raises:
        UserError: either is missing or wrong.
    """
    if data.table is None or (data.poses is None and data.features is None):
        missing = "data.table" if data.table is None else "data.poses"
        raise UserError(
            f"{missing} is not set",
            "set data.table=T.csv data.poses=FOLDER (--table T.csv --poses FOLDER), or data.corpus=PREPARED",
        )
    landmark_set = landmarks_of(data)
    rows, checksum = _read_tables(data, Path(data.table))
    poses = open_poses(Path(data.poses)) if data.poses else None
    features = open_features(Path(data.features)) if data.features else None
    num_features = _width_of_rows(features, rows, data.features_fps) if features else 0
    return Inputs(data, landmark_set, rows, poses, checksum, features, num_features)


def landmarks_of(data: Data) -> LandmarkSet:
    """The landmarks of a corpus that is prepared by these settings: none where it has features and no poses.

    Raises:
        UserError: there is no such set.
    """
    is_alone = data.features and not data.poses and data.source != "demo"
    return NO_LANDMARKS if is_alone else load_landmark_set(data.landmarks)


def width_of_features(place: Path) -> int:
    """Numbers of a frame of the features in a folder or archive; raises UserError where none can be read."""
    features = open_features(place)
    return _first_width(features, features.files.items())


def _width_of_rows(features: PoseFiles, rows: Sequence[Row], fps: float | None) -> int:
    """Numbers of a frame of the features; their frame rate, of which nothing is a default, is known.

    Raises:
        UserError: no clip has features, or none of the first can be read.
    """
    found = ((row, features.find(row)) for row in rows)
    pairs = list(islice(((row, key) for row, key in found if key is not None), MOST_EXAMPLES))
    if not pairs:
        reason, remedy = features.reason_not_found(rows[0])
        raise UserError(f"no clip has its features, such as {rows[0].place}: {reason}", remedy)
    return _first_width(features, [(row.uid, key) for row, key in pairs], [row.features_fps or fps for row, _ in pairs])


def _first_width(
    features: PoseFiles, keys: Iterable[tuple[str, Any]], rates: Sequence[float | None] | None = None
) -> int:
    """Numbers of a frame of the first of these files that can be read, which all others must have.

    With ``rates``, those that table and settings give, a file whose frame rate is not known cannot be read.

    Raises:
        UserError: none can be read; the message says what is wrong with the first.
    """
    first: tuple[str, PoseError] | None = None
    for number, (name, key) in enumerate(islice(keys, MOST_EXAMPLES)):
        try:
            content = features.read(key)
            return read_features(content, rates[number]).width if rates else features_width(content)
        except PoseError as error:
            first = first or (name, error)
    assert first, "a place of features holds a file"
    raise UserError(
        f"no features can be read, such as those of {first[0]}: {first[1]}", first[1].hint or "replace them"
    )


def _preset(data: Data) -> Preset:
    return presets().get(data.source, Preset())


def _read_tables(data: Data, table: Path) -> tuple[list[Row], str]:
    """The rows of all tables that ``data.table`` names, and the checksum of their contents."""
    preset = _preset(data)
    tables = find_tables(table, preset)
    rows: list[Row] = []
    checksum = xxhash.xxh3_64()
    for split, path in tables:
        found = read_table(
            path, data.columns, preset=preset, time_unit=data.time_unit, split=split, one_of_several=len(tables) > 1
        )
        checksum.update(path.read_bytes())
        if preset.splits and data.split_by == "table" and "split" not in data.columns:
            beside, assigned = assigned_splits(path, preset.splits)
            found = [replace(row, split=assigned.get(row.uid, "")) for row in found]
            checksum.update(beside.read_bytes())
        rows += found
    return rows, checksum.hexdigest()


def make_plan(inputs: Inputs) -> Plan:
    """Find the files of every row and assign the rows to splits.

    Raises:
        UserError: most files are missing, or the rows cannot be split as asked.
    """
    located, rejects = _locate(inputs)
    data = inputs.data
    rows = [row for row, _ in located]
    if not rows:
        return Plan(inputs, {}, rejects, [])  # the preparation ends with the reasons
    splits = assign_splits(rows, data.dev_share, data.test_share, data.split_seed, str(data.table), data.split_by)
    splits, removed = remove_shared_texts(splits, data.shared_texts)
    files = {row.uid: file for row, file in located}
    with_files = {name: [(row, files[row.uid]) for row in rows] for name, rows in splits.items()}
    return Plan(inputs, with_files, rejects, removed)


def _locate(inputs: Inputs) -> tuple[list[tuple[Row, ClipFiles]], list[Reject]]:
    """Rows with a uid, a text and files of their own; and the others as rejects.

    Raises:
        UserError: most files are missing or ambiguous.
    """
    rows: list[Row] = []
    rejects: list[Reject] = []
    first: dict[str, Row] = {}
    data = inputs.data
    by_table = _preset(data).splits if data.split_by == "table" and "split" not in data.columns else None
    for row in inputs.rows:
        if not row.uid:
            rejects.append((row.line, "", f"{row.place} has no uid", ""))
        elif row.uid in first:
            rejects.append((row.line, row.uid, *_duplicate(row, first[row.uid])))
        elif not row.text:
            rejects.append((row.line, row.uid, "the text is empty", ""))
        elif by_table and not row.split:
            rejects.append((row.line, row.uid, f"{by_table.file} does not assign it to a split", "add it there"))
        else:
            rows.append(row)
        first.setdefault(row.uid, row)
    located: dict[str, ClipFiles] = {row.uid: () for row in rows}
    for source in inputs.sources:
        keys, without = _locate_in(source, [row for row in rows if row.uid in located], inputs)
        located = {uid: (*before, keys[uid]) for uid, before in located.items() if uid in keys}
        rejects += without
    return [(row, located[row.uid]) for row in rows if row.uid in located], rejects


def _locate_in(source: PoseFiles, rows: Sequence[Row], inputs: Inputs) -> tuple[dict[str, Any], list[Reject]]:
    """The key of each row's file by its uid, and the rows without one as rejects."""
    found: list[tuple[Row, str, str]] = []  # with the name that was looked up and its file
    without_file: list[Row] = []
    for row in rows:
        name, files = source.match(row)
        if len(files) == 1:
            found.append((row, name, files[0]))
        else:
            without_file.append(row)
    conflicts = list(_conflicts(found, source.kind))
    if len(without_file) + len(conflicts) > MOST_FILES_MISSING * len(inputs.rows):
        raise _most_files_missing(inputs, source, without_file, conflicts)
    reasons = {row.uid: reason for row, reason in conflicts}
    rejects: list[Reject] = [(row.line, row.uid, *source.reason_not_found(row)) for row in without_file]
    rejects += [(row.line, row.uid, *reasons[row.uid]) for row, _, _ in found if row.uid in reasons]
    return {row.uid: source.files[file] for row, _, file in found if row.uid not in reasons}, rejects


def _duplicate(row: Row, first: Row) -> tuple[str, str]:
    """The reason and the remedy."""
    reason = f"duplicate uid: {first.place} has it too"
    if not row.pose or canonical(row.pose) == canonical(first.pose):
        return reason, "remove one of the rows"
    return f"{reason}, with another pose file", "use the path of the file as the uid, which may contain folders"


def _most_files_missing(
    inputs: Inputs, source: PoseFiles, without_file: Sequence[Row], conflicts: Sequence[tuple[Row, Reason]]
) -> UserError:
    """The error for a table most of whose rows lack a file of a source, with an example of the most frequent reason."""
    examples = [(row, source.reason_not_found(row)) for row in without_file[:MOST_EXAMPLES]]
    examples += conflicts[:MOST_EXAMPLES]
    (kind, _), *_ = Counter(reason.partition(":")[0] for _, (reason, _) in examples).most_common(1)
    row, (reason, remedy) = next(example for example in examples if example[1][0].startswith(kind))
    key = PLACES[source.kind]
    place = getattr(inputs.data, key)
    return UserError(
        f"{len(without_file) + len(conflicts)} of the {len(inputs.rows)} clips in {inputs.data.table} have no "
        f"{source.kind} file of their own in {place}, such as {row.place}: {reason}",
        f"check data.{key} (--{key}); if it is right, {remedy}",
    )


def _conflicts(found: Sequence[tuple[Row, str, str]], kind: str) -> Iterator[tuple[Row, tuple[str, str]]]:
    """Rows whose name leads to the file of another row, and the reason with the remedy.

    Several clips may come from one file if they name it alike. But ``/data/train/7.pose`` and ``/data/test/7.pose`` are
    two files, even if only one file 7 exists.
    """
    claims: dict[str, list[tuple[Row, str]]] = {}
    for row, name, file in found:
        claims.setdefault(file, []).append((row, name))
    for file, rows in claims.items():
        if len(rows) > 1:
            yield from _conflicts_of_file(file, rows, kind)


def _conflicts_of_file(file: str, rows: Sequence[tuple[Row, str]], kind: str) -> Iterator[tuple[Row, tuple[str, str]]]:
    rank = {name: shared_tail(name, file) for _, name in rows}
    owner, best = max(rows, key=lambda claim: rank[claim[1]])
    rivals = [claim for claim in rows if contradict(claim[1], best)]
    undecided = next(((row, name) for row, name in rivals if rank[name] == rank[best]), None)
    by_uid: Row | None = None
    for row, name in rows:
        other, others_name = (owner, best) if contradict(name, best) else (undecided or (owner, best))
        if undecided and rank[name] == rank[best]:
            yield (
                row,
                (
                    f"two names lead to one {kind} file: '{escaped(name)}' and '{escaped(others_name)}' "
                    f"({other.place}) both to {escaped(file)}",
                    f"set data.{PLACES[kind]} to the folder that holds the files of both",
                ),
            )
        elif contradict(name, best):
            yield (
                row,
                (
                    f"no {kind} file has its name: looked up '{escaped(name)}', the nearest is {escaped(file)}, "
                    f"but that is '{escaped(best)}' of {owner.place}",
                    "add the missing file",
                ),
            )
        elif by_uid is not None and name == row.uid:
            reason = f"duplicate uid: {by_uid.place} has it too, written '{escaped(by_uid.uid)}'"
            yield row, (reason, "remove one of the rows")
        elif name == row.uid:
            by_uid = row
