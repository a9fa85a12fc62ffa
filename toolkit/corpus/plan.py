"""What a preparation is about to do: the table read, every clip's file found, the splits dealt out, nothing built yet.

Everything that can be wrong before a single clip is read is found here.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import xxhash

from toolkit.corpus.archives import PoseFiles, open_poses
from toolkit.corpus.names import canonical, contradict, printable, shared_tail
from toolkit.corpus.packed import FORMAT_VERSION
from toolkit.corpus.splits import assign_splits, remove_shared_texts
from toolkit.corpus.table import PRESETS, Row, read_table
from toolkit.errors import UserError
from toolkit.poses.features import FEATURES_VERSION
from toolkit.poses.landmarks import LandmarkSet, load_landmark_set
from toolkit.recipe.schema import Data

MOST_FILES_MISSING = 0.5  # share of the clips beyond which the folder, not the clips, must be wrong
MOST_EXAMPLES = 20  # lost rows that are looked at to tell what they have most in common

# The settings that a corpus depends on; the landmark set, table and poses count by their content.
_SETTINGS_THAT_MATTER = {
    "source",
    "fps",
    "max_frames",
    "min_frames",
    "too_long",
    "no_hands",
    "columns",
    "dev_share",
    "test_share",
    "split_seed",
    "shared_texts",
}


@dataclass(frozen=True)
class Inputs:
    """A table and pose files, looked through but not yet read."""

    data: Data
    landmark_set: LandmarkSet
    rows: list[Row]
    poses: PoseFiles
    table_checksum: str

    @property
    def fingerprint(self) -> str:
        """Hash of everything that the corpus depends on."""
        settings = self.data.model_dump(include=_SETTINGS_THAT_MATTER)
        parts = [FORMAT_VERSION, FEATURES_VERSION, settings, self.landmark_set.to_dict(), self.table_checksum]
        return xxhash.xxh3_64_hexdigest(json.dumps([*parts, self.poses.identity], sort_keys=True).encode())


@dataclass(frozen=True)
class Plan:
    """What is to be done.

    Attributes:
        splits: rows with their pose files, by split.
        rejects: line, uid and reason of the rows that are lost already.
        removed: likewise, of the rows taken out of held-out splits because train has their text.
    """

    inputs: Inputs
    splits: dict[str, list[tuple[Row, Any]]]
    rejects: list[tuple[int, str, str]]
    removed: list[tuple[int, str, str]]


def read_inputs(data: Data) -> Inputs:
    """Read the table and look through the place of the pose files.

    Raises:
        UserError: either is missing or wrong.
    """
    if data.table is None or data.poses is None:
        missing = "data.table" if data.table is None else "data.poses"
        raise UserError(f"{missing} is not set: give data.table=T.csv data.poses=FOLDER, or data.corpus=PREPARED")
    landmark_set = load_landmark_set(data.landmarks)
    table = Path(data.table)
    rows = read_table(table, {**PRESETS.get(data.source, {}), **data.columns})
    return Inputs(data, landmark_set, rows, open_poses(Path(data.poses)), xxhash.xxh3_64_hexdigest(table.read_bytes()))


def make_plan(inputs: Inputs) -> Plan:
    """Find the pose file of every row and deal the rows out to splits.

    Raises:
        UserError: most files are missing, or the rows cannot be split as asked.
    """
    located, rejects = _locate(inputs)
    data = inputs.data
    rows = [row for row, _ in located]
    splits = assign_splits(rows, data.dev_share, data.test_share, data.split_seed, str(data.table))
    splits, removed = remove_shared_texts(splits, data.shared_texts)
    files = {row.uid: file for row, file in located}
    dealt = {name: [(row, files[row.uid]) for row in rows] for name, rows in splits.items()}
    return Plan(inputs, dealt, rejects, removed)


def _locate(inputs: Inputs) -> tuple[list[tuple[Row, Any]], list[tuple[int, str, str]]]:
    """Rows that have a uid, a text and a pose file of their own; and the others as rejects (line, uid, reason).

    Raises:
        UserError: so many files are missing or ambiguous that the folder or the names must be wrong.
    """
    found: list[tuple[Row, str, str]] = []  # with what was looked up and the file that it means
    lost: list[Row] = []
    rejects: list[tuple[int, str, str]] = []
    first: dict[str, Row] = {}
    for row in inputs.rows:
        if not row.uid:
            rejects.append((row.line, "", f"line {row.line} has no uid"))
        elif row.uid in first:
            rejects.append((row.line, row.uid, _duplicate(row, first[row.uid])))
        elif not row.text:
            rejects.append((row.line, row.uid, "the text is empty"))
        else:
            name, files = inputs.poses.match(row)
            if len(files) == 1:
                found.append((row, name, files[0]))
            else:
                lost.append(row)
        first.setdefault(row.uid, row)
    reasons = {row.line: reason for row, reason in _claimed_twice(found)}
    if len(lost) + len(reasons) > MOST_FILES_MISSING * len(inputs.rows):
        _refuse(inputs, lost, reasons)
    rejects += [(row.line, row.uid, inputs.poses.reason_not_found(row)) for row in lost]
    rejects += [(row.line, row.uid, reasons[row.line]) for row, _, _ in found if row.line in reasons]
    return [(row, inputs.poses.files[file]) for row, _, file in found if row.line not in reasons], rejects


def _duplicate(row: Row, first: Row) -> str:
    reason = f"duplicate uid: line {first.line} has it too"
    if not row.pose or canonical(row.pose) == canonical(first.pose):
        return reason
    return f"{reason}, with another pose file: a uid may hold folders, so take the path of the file as the uid"


def _refuse(inputs: Inputs, lost: Sequence[Row], reasons: Mapping[int, str]) -> NoReturn:
    """Refuse a table most of whose clips have no file of their own, with the reason of the most frequent kind."""
    examples = [(row.line, inputs.poses.reason_not_found(row)) for row in lost[:MOST_EXAMPLES]]
    examples += list(reasons.items())[:MOST_EXAMPLES]
    (kind, _), *_ = Counter(reason.partition(":")[0] for _, reason in examples).most_common(1)
    line, reason = next(example for example in examples if example[1].startswith(kind))
    raise UserError(
        f"{len(lost) + len(reasons)} of the {len(inputs.rows)} clips in {inputs.data.table} have no pose file "
        f"of their own in {inputs.data.poses}: is data.poses right? Line {line}: {reason}"
    )


def _claimed_twice(found: Sequence[tuple[Row, str, str]]) -> Iterator[tuple[Row, str]]:
    """Rows that may not have their file, because another row has it by right, and why.

    Several clips may be cut from one file, and say so by one name. But ``/data/train/7.pose`` and
    ``/data/test/7.pose`` are two files, even where only one 7 is there.
    """
    claims: dict[str, list[tuple[Row, str]]] = {}
    for row, name, file in found:
        claims.setdefault(file, []).append((row, name))
    for file, rows in claims.items():
        if len(rows) > 1:
            yield from _losers(file, rows)


def _losers(file: str, rows: Sequence[tuple[Row, str]]) -> Iterator[tuple[Row, str]]:
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
                f"two names lead to one pose file: '{printable(name)}' and '{printable(others_name)}' (line "
                f"{other.line}) both to {printable(file)}: set data.poses to the folder that holds the files of both",
            )
        elif contradict(name, best):
            yield (
                row,
                f"no pose file has its name: looked up '{printable(name)}', the nearest is {printable(file)}, "
                f"but that is '{printable(best)}' of line {owner.line}: the file is missing",
            )
        elif by_uid is not None and name == row.uid:
            yield row, f"duplicate uid: line {by_uid.line} has it too, written '{printable(by_uid.uid)}'"
        elif name == row.uid:
            by_uid = row
