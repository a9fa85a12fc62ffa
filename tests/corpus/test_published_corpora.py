"""Corpora as they are published, and mistakes of their users; remedies are followed as they are printed."""

from __future__ import annotations

import gzip
import json
import pickle
import shutil
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.scripts import load_script
from toolkit.corpus.archives.files import open_poses
from toolkit.corpus.names import Names
from toolkit.corpus.packed import Corpus
from toolkit.corpus.prepare import prepare
from toolkit.corpus.table import read_table
from toolkit.errors import TooManyRejects, UserError
from toolkit.recipe.schema import Data

VIDEOS = ["--7E2sU6zP4", "-1b2Cd3Ef4g", "0abcDEF_gh1"]
SENTENCES = [f"{VIDEOS[number % 3]}_{number}-5-rgb_front" for number in range(6)]
HOW2SIGN = "VIDEO_ID\tVIDEO_NAME\tSENTENCE_ID\tSENTENCE_NAME\tSTART_REALIGNED\tEND_REALIGNED\tSENTENCE\n"
TEXT = "red stone door"


def how2sign(second: float = 1.0) -> str:
    """Its table; ``second`` is what one is written as."""
    return HOW2SIGN + "".join(
        f"{name[:11]}\t{name[:11]}-5-rgb_front\t{name[:11]}_{number}\t{name}\t{0.2 * second}\t{2 * second}\t{TEXT}\n"
        for number, name in enumerate(SENTENCES)
    )


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


@pytest.fixture
def poses(clips: Path, tmp_path: Path) -> Callable[..., Path]:
    """A folder with a real clip under each of the names."""

    def copy(*names: str) -> Path:
        folder = tmp_path / "poses"
        folder.mkdir()
        for name in names:
            shutil.copy(clips / "poses" / "train-00000.pose", folder / name)
        return folder

    return copy


def error_of(command: Callable[[], object]) -> UserError:
    with pytest.raises(UserError) as raised:
        command()
    return raised.value


def data_of(table: Path, folder: Path, columns: dict[str, str] | None = None, **settings) -> Data:
    data = Data(table=str(table), poses=str(folder), workers=1, dev_share=0, test_share=0, **settings)
    return data.model_copy(update={"columns": columns or {}})


def of_how2sign(table: Path, folder: Path, **columns: str) -> Data:
    return data_of(table, folder, columns, source="how2sign")


def test_how2sign(write, poses, tmp_path: Path) -> None:
    table, folder = write("how2sign_realigned_train.csv", how2sign()), poses(*(f"{name}.pose" for name in SENTENCES))
    hint = error_of(lambda: read_table(table)).hint
    assert "--source how2sign" in hint and "data.source=how2sign" in hint
    corpus = Corpus.open(prepare(of_how2sign(table, folder), tmp_path / "out").path)
    assert sorted(corpus.splits["train"].uids) == sorted(SENTENCES)


def test_a_uid_that_begins_with_hyphens_is_no_option(write, poses, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    table, folder = write("t.csv", how2sign()), poses(*(f"{name}.pose" for name in SENTENCES))
    prepare(of_how2sign(table, folder), tmp_path / "out")
    script = load_script("launch/prepare.py")
    drawn: list[tuple[str, str]] = []
    # tests/launch/test_prepare.py draws a clip, which takes seconds.
    monkeypatch.setattr(script, "animate", lambda _, uid, out, __: drawn.append((uid, str(out))))
    for words in (["out", SENTENCES[0]], ["out", "--out", "x.gif", SENTENCES[0]], ["out", "--", SENTENCES[0]]):
        arguments = script._parse_show(words)
        assert (arguments.corpus, arguments.uid) == ("out", SENTENCES[0])
        script._show(arguments)
    assert drawn == [(SENTENCES[0], name) for name in (f"{SENTENCES[0]}.gif", "x.gif", f"{SENTENCES[0]}.gif")]
    with pytest.raises(SystemExit):
        script._parse_show(["out"])


def test_excerpts_of_whole_videos_in_seconds_alone(write, poses, tmp_path: Path) -> None:
    """Milliseconds and numbers of frames are beyond the end of the file; all of it would be no excerpt."""
    columns = {"pose": "VIDEO_NAME", "start": "START_REALIGNED", "end": "END_REALIGNED"}
    folder = poses(*(f"{video}-5-rgb_front.pose" for video in VIDEOS))
    data = of_how2sign(write("t.csv", how2sign()), folder, **columns)
    corpus = Corpus.open(prepare(data, tmp_path / "out").path)
    assert [int(frames) for frames in corpus.splits["train"].frames] == [23] * 6
    for unit in (1000, 25):
        wrong = of_how2sign(write("wrong.csv", how2sign(unit)), folder, **columns)
        assert "time_unit" in error_of(lambda wrong=wrong: prepare(wrong, tmp_path / "wrong")).hint


def test_an_end_beyond_the_file_is_counted(write, poses, tmp_path: Path) -> None:
    folder = poses("a.pose", "b.pose")
    length = Corpus.open(prepare(data_of(write("t.csv", "uid,text\na,b\n"), folder), tmp_path / "whole").path).summary()
    seconds = length["frames"] / 12.5
    table = write("late.csv", f"uid,text,start,end\na,{TEXT},0,{seconds + 2}\nb,{TEXT},0,{seconds + 0.5}\n")
    data = data_of(table, folder, columns={"start": "start", "end": "end"})
    assert Corpus.open(prepare(data, tmp_path / "late").path).metadata.counts["end_beyond_file"] == 1


def test_whole_videos_without_times_are_counted(write, poses, tmp_path: Path) -> None:
    folder = poses(*(f"{video}-5-rgb_front.pose" for video in VIDEOS))
    data = of_how2sign(write("t.csv", how2sign()), folder, pose="VIDEO_NAME")
    assert Corpus.open(prepare(data, tmp_path / "out").path).metadata.counts["same_recording"] == 3


def test_texts_that_programs_write_for_a_missing_value_are_counted(write, poses, tmp_path: Path) -> None:
    table = write("t.csv", "uid,text\na,NaN\nb,nan nan\nc,None\n")
    data = data_of(table, poses("a.pose", "b.pose", "c.pose"))
    assert Corpus.open(prepare(data, tmp_path / "out").path).metadata.counts["texts_like_missing"] == 2


def test_the_index_of_pandas_is_nobodys(write) -> None:
    rows = read_table(write("t.csv", f",uid,text\n0,a,{TEXT}\n1,b,{TEXT}\n"))
    assert [(row.uid, row.text) for row in rows] == [("a", TEXT), ("b", TEXT)]
    assert {value for row in rows for value in (row.start, row.end)} == {None}


@pytest.mark.parametrize("asked", ["x.mp4", "videos/x.MP4", "x", "x.mov"])
@pytest.mark.parametrize("there", ["x.pose", "x.mp4.pose", "x.mp4.npy"])
def test_tables_that_name_the_video_and_poses_named_after_it(asked: str, there: str) -> None:
    assert Names([there, "y.pose"]).match(asked) == [there]


def test_poses_that_differ_in_the_suffix_of_their_video_are_told_apart() -> None:
    names = Names(["x.mp4.pose", "x.pose", "y.mp4.pose", "y.mov.pose"])
    assert names.match("x") == ["x.pose"] and names.match("x.mp4") == ["x.mp4.pose"]
    assert sorted(names.match("y")) == ["y.mov.pose", "y.mp4.pose"] and names.match("y.mov") == ["y.mov.pose"]


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("x/x_000000000000_keypoints.json", "load_openpose_directory"),
        ("x.mp4", "videos_to_poses"),
        ("part1.zip", "unpack"),
        ("x.txt", "--poses"),
    ],
)
@pytest.mark.parametrize("form", ["folder", "zip", "tar"])
def test_a_place_without_poses_says_what_it_holds(tmp_path: Path, name: str, remedy: str, form: str) -> None:
    path = tmp_path / "there" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(b"x")
    place = tmp_path / "there"
    if form != "folder":
        place = Path(shutil.make_archive(str(tmp_path / "packed"), form, place))
    error = error_of(lambda: open_poses(place))
    assert path.suffix in error.message and remedy in error.hint


@pytest.mark.parametrize(
    "content",
    [pickle.dumps({"info": [{"name": "S000"}]}, protocol=protocol) for protocol in (2, 4, 5)]
    + [b"\x93NUMPY\x01\x00v\x00{", b"SQLite format 3\x00", b"version https://git-lfs.github.com/spec/v1\n", b"<html>"],
)
def test_a_file_that_is_no_text_is_named_before_its_lines(write, content: bytes) -> None:
    error = error_of(lambda: read_table(write("table", content)))
    assert "line" not in error.message and error.hint


@pytest.mark.process
def test_a_compressed_pickle_is_named_after_its_remedy(write, tmp_path: Path) -> None:
    table = write("labels.train.gz", gzip.compress(pickle.dumps([{"name": "S000"}])))
    assert "gunzip" in error_of(lambda: read_table(table)).hint
    subprocess.run(["gunzip", str(table)], check=True)
    assert "JSONL" in error_of(lambda: read_table(tmp_path / "labels.train")).hint


@pytest.mark.skipif(shutil.which("jq") is None, reason="jq is not installed")
@pytest.mark.process
@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize(
    "content",
    [
        {"a b": {"text": TEXT}, "c": {"text": TEXT}},
        [{"uid": "a b", "text": TEXT}, {"uid": "c", "text": TEXT}],
    ],
)
def test_one_json_of_all_clips_is_converted_by_its_remedy(write, tmp_path: Path, content, indent: int | None) -> None:
    table = write("my labels.json", json.dumps(content, indent=indent))
    hint = error_of(lambda: read_table(table)).hint
    subprocess.run(hint.partition(": ")[2], shell=True, cwd=tmp_path, check=True)
    assert [(row.uid, row.text) for row in read_table(tmp_path / "NEW.jsonl")] == [("a b", TEXT), ("c", TEXT)]


def test_one_json_of_columns_names_the_call_of_pandas(write) -> None:
    table = write("t.json", json.dumps({"uid": {"0": "a", "1": "b"}, "text": {"0": TEXT, "1": TEXT}}))
    assert "orient='records', lines=True" in error_of(lambda: read_table(table)).hint


def test_columns_that_are_mapped_backwards(write) -> None:
    table = write("t.csv", f"id,sentence\na,{TEXT}\n")
    hint = error_of(lambda: read_table(table, {"id": "uid", "sentence": "text"})).hint
    columns = dict(pair.split("=") for pair in hint.partition("--columns ")[2].split(","))
    assert read_table(table, columns)[0].uid == "a"


@pytest.mark.parametrize("header", ["uid text", "uid\u3000text"])
def test_a_header_of_one_column_is_no_name_to_map(write, header: str) -> None:
    assert "uid,text" in error_of(lambda: read_table(write("t.csv", f"{header}\na {TEXT}\n"))).hint


def test_where_no_row_is_left_the_reasons_are_given(write, poses, tmp_path: Path) -> None:
    table = write("t.csv", "uid,text\na,\nb,\nc,\n")
    assert "empty" in error_of(lambda: prepare(data_of(table, poses("a.pose")), tmp_path / "out")).message


def test_where_no_clip_is_usable_no_share_of_rejects_is_a_remedy(write, poses, tmp_path: Path) -> None:
    folder = poses()
    for name in ("a", "b"):
        (folder / f"{name}.pose").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n")
    data = data_of(write("t.csv", f"uid,text\na,{TEXT}\nb,{TEXT}\n"), folder, max_rejects=1)
    with pytest.raises(TooManyRejects) as raised:
        prepare(data, tmp_path / "out")
    assert "lfs" in raised.value.hint and "max-rejects" not in raised.value.lines


def test_a_zip_within_a_zip_is_named(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "outer.zip", "w") as archive:
        archive.writestr("poses/inner.zip", b"PK\x05\x06" + bytes(18))
    assert ".zip" in error_of(lambda: open_poses(tmp_path / "outer.zip")).message


def test_arrays_with_the_suffix_of_their_video(write, tmp_path: Path) -> None:
    folder = tmp_path / "poses"
    folder.mkdir()
    np.save(folder / "S000.mp4.npy", np.random.default_rng(0).normal(size=(20, 75, 3)).astype(np.float32))
    prepared = prepare(data_of(write("t.csv", f"uid,text\nS000,{TEXT}\n"), folder), tmp_path / "out")
    assert Corpus.open(prepared.path).summary()["clips"] == 1
