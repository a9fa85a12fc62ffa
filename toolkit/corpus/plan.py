"""What a preparation is about to do: the table read, every clip's file found, the splits dealt out, nothing built yet.

Everything that can be wrong before a single clip is read is found here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from toolkit.corpus.archives import PoseFiles, open_poses
from toolkit.corpus.packed import FORMAT_VERSION
from toolkit.corpus.splits import assign_splits, remove_shared_texts
from toolkit.corpus.table import PRESETS, Row, read_table
from toolkit.errors import UserError
from toolkit.poses.features import FEATURES_VERSION
from toolkit.poses.landmarks import LandmarkSet, load_landmark_set
from toolkit.recipe.schema import Data

MOST_FILES_MISSING = 0.5  # share of the clips beyond which the folder, not the clips, must be wrong

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
    splits = assign_splits([row for row, _ in located], data.dev_share, data.test_share, data.split_seed)
    splits, removed = remove_shared_texts(splits, data.shared_texts)
    files = {row.uid: file for row, file in located}
    dealt = {name: [(row, files[row.uid]) for row in rows] for name, rows in splits.items()}
    return Plan(inputs, dealt, rejects, removed)


def _locate(inputs: Inputs) -> tuple[list[tuple[Row, Any]], list[tuple[int, str, str]]]:
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
