"""The presets of public corpora (``presets.yaml``), and the tables that each has."""

from __future__ import annotations

import glob
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import yaml
from pydantic import Field

from toolkit.corpus.table_lines import table_lines
from toolkit.corpus.table_records import read_records
from toolkit.errors import UserError
from toolkit.recipe.corpora import TimeUnit
from toolkit.recipe.sections.values import Section

SPLIT = "{split}"  # stands for the name of a split in the name of a table
SPLIT_NAMES = {
    "training": "train",
    **dict.fromkeys(("val", "valid", "validation", "development"), "dev"),
    "testing": "test",
}
KNOWN_SPLITS = {"train", "dev", "test", *SPLIT_NAMES}


class SplitTable(Section):
    """A table beside the first that assigns clips to splits."""

    file: str
    uid: str  # its column with the names of the clips
    split: str  # its column with the names of their splits


class Preset(Section):
    """What the tables of a public corpus call our columns; ``presets.yaml`` says what each key means."""

    files: list[str] = Field(default_factory=list)
    columns: dict[str, str | list[str]] = Field(default_factory=dict)
    unspaced: list[str] = Field(default_factory=list)
    splits: SplitTable | None = None
    time_unit: TimeUnit = "seconds"
    language: str = ""

    def names(self, column: str) -> list[str]:
        """What its tables call one of our columns; empty where that is our name."""
        names = self.columns.get(column, [])
        return [names] if isinstance(names, str) else names


@cache
def presets() -> Mapping[str, Preset]:
    """All presets by name."""
    content = yaml.safe_load(Path(__file__).with_name("presets.yaml").read_text(encoding="utf-8"))
    return {name: Preset(**values) for name, values in content.items()}


def find_tables(table: Path, preset: Preset) -> list[tuple[str, Path]]:
    """The tables that ``data.table`` names: one, one for each split, or those of a public corpus in a folder.

    Returns:
        the split that the name of each table says ("" where it says none), and its path.

    Raises:
        UserError: none is there.
    """
    if SPLIT in str(table):
        found = _matching(re.split(r"(\{split\})", str(table)))
        if not found:
            raise UserError(
                f"there is no table {table} of any split",
                f"{SPLIT} stands for train, dev, val, valid, test or another usual name of a split",
            )
        return found
    if not (table.is_dir() and preset.files):
        return [("", table)]
    for name in preset.files:
        if found := _matching([f"{table}/", *re.split(r"(\{split\}|\*)", name)]):
            return found
    raise UserError(
        f"{table} holds none of the tables {', '.join(preset.files)}",
        "set data.table (--table) to the table itself, or to the folder that holds it",
    )


def _matching(parts: Sequence[str]) -> list[tuple[str, Path]]:
    """The files whose path consists of these parts, where ``*`` is any text and ``{split}`` the name of a split."""
    wanted = "".join({"*": "*", SPLIT: "*"}.get(part, glob.escape(part)) for part in parts)
    named = "".join({"*": ".*", SPLIT: "([A-Za-z]+)"}.get(part, re.escape(part)) for part in parts)
    found = []
    for path in sorted(glob.glob(wanted)):
        match = re.fullmatch(named, path)
        splits = {split.lower() for split in match.groups()} if match else set()
        if match and len(splits) <= 1 and splits <= KNOWN_SPLITS:
            found.append((next(iter(splits), ""), Path(path)))
    return found


def assigned_splits(table: Path, splits: SplitTable) -> tuple[Path, dict[str, str]]:
    """The table of splits beside a table, and the split of each clip.

    Raises:
        UserError: it is not there, or lacks a column.
    """
    path = table.parent / splits.file
    if not path.is_file():
        raise UserError(f"{splits.file}, which assigns the clips of {table} to splits, is not beside it", f"add {path}")
    records, _ = read_records(table_lines(path), path, (splits.uid, splits.split))
    assigned = {}
    for line, record in records:
        if missing := [name for name in (splits.uid, splits.split) if name not in record]:
            raise UserError(
                f"{path}, line {line} has no column '{missing[0]}'", f"begin it with {splits.uid}|{splits.split}"
            )
        assigned[str(record[splits.uid]).strip()] = str(record[splits.split]).strip()
    return path, assigned


def recognised(columns: Sequence[str]) -> str | None:
    """The preset whose columns a table has; None if it is of no public corpus."""
    for name, preset in presets().items():
        required = [preset.names(column) for column in ("uid", "text")]
        if "text" not in required[1] and all(set(names) & set(columns) for names in required):
            return name
    return None
