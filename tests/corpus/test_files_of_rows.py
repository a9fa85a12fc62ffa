"""Which pose file belongs to which row of the table: ambiguous, missing and shared names."""

import shutil
import unicodedata
from pathlib import Path

import pytest

from tests.corpus.data_settings import data_of
from toolkit.corpus.packed import Corpus
from toolkit.corpus.prepare import ensure_corpus, prepare
from toolkit.errors import TooManyRejects, UserError


def test_the_wrong_folder_is_an_error_of_its_own(own_clips, tmp_path) -> None:
    for file in list((own_clips / "poses").glob("train*"))[:14]:
        file.unlink()
    with pytest.raises(UserError, match=r"\b14\b.*\b24 clips") as raised:
        ensure_corpus(data_of(own_clips, tmp_path))
    assert "data.poses" in raised.value.hint


def test_nested_folders_and_names_with_suffix(own_clips, tmp_path) -> None:
    nested = own_clips / "poses" / "deep" / "er"
    nested.mkdir(parents=True)
    (own_clips / "poses" / "train-00000.pose").rename(nested / "train-00000.pose")
    (own_clips / "poses" / "train-00001.pose").rename(nested / "other.pose")
    table = (own_clips / "table.csv").read_text().replace("train-00001,", "deep/er/other.pose,")
    (own_clips / "table.csv").write_text(table)
    assert Corpus.open(ensure_corpus(data_of(own_clips, tmp_path))).summary()["clips"] == 24


def _table(path: Path, rows: list[tuple[str, ...]], header: str = "uid,pose,text,split") -> str:
    path.write_text("\n".join([header, *(",".join(row) for row in rows)]) + "\n", encoding="utf-8")
    return str(path)


def _in_two_folders(clips: Path, tmp_path: Path, names: list[str]) -> Path:
    """Different files under the same names, in train/ and in test/."""
    files = sorted((clips / "poses").glob("train-*"))
    for number, path in enumerate(f"{folder}/{name}.pose" for folder in ("train", "test") for name in names):
        (tmp_path / "two" / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(files[number], tmp_path / "two" / path)
    return tmp_path / "two"


@pytest.mark.parametrize("column", ["uid", "pose"])
def test_a_name_in_two_folders_is_rejected_and_the_remedy_works(clips, tmp_path, rows_of, column: str) -> None:
    poses = str(_in_two_folders(clips, tmp_path, ["a", "b", "c"]))
    rows = [(uid, pose, f"text {uid}", "train") for uid, pose in (("a", ""), ("b", "test/b.pose"), ("test/c", ""))]
    table = _table(tmp_path / "t.csv", rows)
    with pytest.raises(TooManyRejects, match=r"'a'.*test/a\.pose"):
        prepare(data_of(clips, tmp_path, table=table, poses=poses), tmp_path / "out")
    (reject,) = rows_of(tmp_path / "out.rejects.csv")
    path = reject["reason"].partition(" may be ")[2].split(" or ")[0]
    rows[0] = (path, *rows[0][1:]) if column == "uid" else ("a", path, *rows[0][2:])
    table = _table(tmp_path / "t.csv", rows)
    out = prepare(data_of(clips, tmp_path, table=table, poses=poses), tmp_path / "out").path
    assert Corpus.open(out).summary()["clips"] == 3


def test_one_uid_for_files_of_two_folders_is_rejected_and_the_remedy_works(clips, tmp_path, rows_of) -> None:
    poses = str(_in_two_folders(clips, tmp_path, ["a", "b"]))
    paths = ["train/a.pose", "train/b.pose", "test/a.pose", "test/b.pose"]
    rows = [(path[-6], path, f"text {path}", "train") for path in paths]
    table = _table(tmp_path / "t.csv", rows)
    with pytest.raises(TooManyRejects, match="line 2 ") as raised:
        prepare(data_of(clips, tmp_path, table=table, poses=poses), tmp_path / "out")
    assert "path" in raised.value.hint
    data = data_of(clips, tmp_path, table=table, poses=poses, columns={"uid": "pose"})
    assert Corpus.open(prepare(data, tmp_path / "out").path).summary()["clips"] == 4


def test_when_most_names_are_ambiguous_the_error_names_the_files(clips, tmp_path) -> None:
    poses = str(_in_two_folders(clips, tmp_path, ["a", "b"]))
    table = _table(tmp_path / "t.csv", [("a", "", "one", "train"), ("b", "", "two", "train")])
    with pytest.raises(UserError, match=r"\b2\b.*\b2 clips .* line 2: .*'a' .*test/a\.pose"):
        prepare(data_of(clips, tmp_path, table=table, poses=poses), tmp_path / "out")


def test_two_paths_that_lead_to_one_file_are_rejected(clips, tmp_path, rows_of) -> None:
    """The table knows train/a and test/a, but --poses is the folder of one of them."""
    poses = _in_two_folders(clips, tmp_path, ["a", "b", "c"])
    rows = [
        (f"/data/two/{path}.pose", "", f"text {path}", "train") for path in ("train/a", "test/a", "train/b", "test/c")
    ]
    table = _table(tmp_path / "t.csv", rows)
    settings = {"table": table, "poses": str(poses / "test"), "max_rejects": 0.5}
    out = prepare(data_of(clips, tmp_path, **settings), tmp_path / "out").path
    reasons = {row["uid"]: f"{row['reason']}: {row['hint']}" for row in rows_of(out / "rejects.csv")}
    assert list(reasons) == ["/data/two/train/a.pose", "/data/two/test/a.pose"]
    assert all(
        "two names lead to one pose file" in reason and "the folder that holds" in reason for reason in reasons.values()
    )
    settings["poses"] = str(poses)  # the folder that holds those of both
    assert Corpus.open(prepare(data_of(clips, tmp_path, **settings), tmp_path / "two-out").path).summary()["clips"] == 4


def test_a_missing_file_is_not_replaced_by_one_of_another_folder(clips, tmp_path, rows_of) -> None:
    poses = _in_two_folders(clips, tmp_path, ["a", "b", "c"])
    shutil.rmtree(poses / "test")
    rows = [(f"/data/{path}.pose", "", f"text {path}", "train") for path in ("train/a", "train/b", "train/c", "test/b")]
    data = data_of(clips, tmp_path, table=_table(tmp_path / "t.csv", rows), poses=str(poses), max_rejects=0.5)
    (reject,) = rows_of(prepare(data, tmp_path / "out").path / "rejects.csv")
    assert reject["uid"] == "/data/test/b.pose"
    assert "train/b.pose, but that is '/data/train/b.pose' of line 3" in reject["reason"]
    assert reject["hint"] == "add the missing file"


def test_one_uid_in_two_spellings_is_a_duplicate(clips, tmp_path, rows_of) -> None:
    rows = [("train-00000", "", "one", "train"), ("./train-00000.POSE", "", "two", "train")]
    rows += [("train-00001", "", "three", "train"), ("again", "train-00001.pose", "another text of it", "train")]
    data = data_of(clips, tmp_path, table=_table(tmp_path / "t.csv", rows), max_rejects=0.5)
    (reject,) = rows_of(prepare(data, tmp_path / "out").path / "rejects.csv")
    assert reject == {
        "uid": "./train-00000.POSE",
        "reason": "duplicate uid: line 2 has it too, written 'train-00000'",
        "hint": "remove one of the rows",
    }


def test_the_value_that_was_looked_up_and_the_nearest_are_named(clips, tmp_path) -> None:
    """The remedy is to map the column that holds the names."""
    rows = [(f"clip {n}", f"D:\\all\\train-0000{n}.POSE", f"text {n}", "train") for n in range(4)]
    table = _table(tmp_path / "t.csv", rows, "uid,file,text,split")
    with pytest.raises(UserError, match=r"\b4\b.*\b4 clips .* line 2: .*'clip 0' \(uid\).* [-a-z]+0000\d\.pose"):
        prepare(data_of(clips, tmp_path, table=table), tmp_path / "out")
    out = prepare(data_of(clips, tmp_path, table=table, columns={"pose": "file"}), tmp_path / "out").path
    assert Corpus.open(out).summary()["clips"] == 4


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_names_from_a_mac_and_suffixes_in_capitals(clips, tmp_path, form: str) -> None:
    other = {"NFC": "NFD", "NFD": "NFC"}[form]
    (tmp_path / "poses").mkdir()
    for number in range(3):
        name = unicodedata.normalize(form, f"\u00dcbung_{number}\u00e9.POSE")
        shutil.copy(clips / "poses" / f"train-0000{number}.pose", tmp_path / "poses" / name)
    rows = [(unicodedata.normalize(other, f"\u00dcbung_{n}\u00e9"), "", f"text {n}", "train") for n in range(3)]
    data = data_of(clips, tmp_path, table=_table(tmp_path / "t.csv", rows), poses=str(tmp_path / "poses"))
    assert Corpus.open(prepare(data, tmp_path / "out").path).summary()["clips"] == 3
