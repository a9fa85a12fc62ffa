"""Clip bounds in seconds, milliseconds, frames and clock times."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from toolkit.corpus.packed import Corpus
from toolkit.corpus.prepare import prepare
from toolkit.corpus.table import read_table
from toolkit.errors import UserError
from toolkit.recipe.schema import Data


@pytest.mark.parametrize(
    ("unit", "start", "end", "seconds"),
    [
        ("seconds", "0.4", "1.2", (0.4, 1.2)),
        ("milliseconds", "400", "1200.5", (0.4, 1.2005)),
        ("frames", "10", "30", (0.4, 1.2)),
        ("frames", "", "30", (None, 1.2)),
        (None, "0:00:00.4", "00:01,2", (0.4, 1.2)),
        ("milliseconds", "0:00.4", "1:02:03", (0.4, 3723.0)),
        ("frames", "00:00:00.400", "", (0.4, None)),
        ("seconds", "0.4", "0:01.2", (0.4, 1.2)),
    ],
)
def test_units_of_time(tmp_path: Path, unit: Any, start: str, end: str, seconds: tuple) -> None:
    table = tmp_path / "t.tsv"
    table.write_text(f"uid\ttext\tstart\tend\na\tb\t{start}\t{end}\n")
    (row,) = read_table(table, {"start": "start", "end": "end"}, time_unit=unit)
    assert row.seconds(fps=25) == pytest.approx(seconds)


@pytest.mark.parametrize(("start", "end"), [("10", "0:01"), ("1:2:3:4", ""), ("0:1x", ""), ("", "12:")])
def test_times_that_are_none(tmp_path: Path, start: str, end: str) -> None:
    table = tmp_path / "t.tsv"
    table.write_text(f"uid\ttext\tstart\tend\na\tb\t{start}\t{end}\n")
    with pytest.raises(UserError, match="line 2"):
        read_table(table, {"start": "start", "end": "end"}, time_unit="frames")


def test_a_clip_is_the_same_in_every_unit(clips: Path, tmp_path: Path) -> None:
    folder = tmp_path / "poses"
    folder.mkdir()
    shutil.copy(clips / "poses" / "train-00000.pose", folder / "a.pose")
    found = {}
    times = {"start": "start", "end": "end"}
    for unit, start, end, fps in (
        ("seconds", "0.4", "1.2", ""),
        ("milliseconds", "400", "1200", ""),
        ("frames", "20", "60", "50"),
        ("frames", "0:00.4", "0:01.2", ""),
    ):
        table = tmp_path / "t.csv"
        table.write_text(f"uid,text,start,end,fps,signer,gloss\na,b,{start},{end},{fps},anna,A B\n")
        where = {"table": str(table), "poses": str(folder), "workers": 1, "dev_share": 0, "test_share": 0}
        data = Data(time_unit=unit, columns=times, **where)
        clip = Corpus.open(prepare(data, tmp_path / f"{unit}{start}").path).splits["train"].clip(0)
        assert (clip.signer, clip.gloss) == ("anna", "A B")
        found[unit, start] = clip.features
    assert np.array_equal(found["seconds", "0.4"], found["milliseconds", "400"], equal_nan=True)
    assert np.array_equal(found["seconds", "0.4"], found["frames", "0:00.4"], equal_nan=True)
    assert {len(features) for features in found.values()} == {10}
