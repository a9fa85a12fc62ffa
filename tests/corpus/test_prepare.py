import csv
import json
import multiprocessing
import shutil
import struct
import time
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from toolkit.corpus import prepare as prepare_module
from toolkit.corpus.packed import Corpus
from toolkit.corpus.prepare import ensure_corpus, find_or_prepare, prepare
from toolkit.corpus.shards import Work
from toolkit.errors import Interrupted, TooManyRejects, UserError
from toolkit.poses.features import extract_features
from toolkit.poses.pose_file import read_pose
from toolkit.recipe.schema import Data


def _data(clips: Path, tmp_path: Path, **settings) -> Data:
    given = {
        "table": str(clips / "table.csv"),
        "poses": str(clips / "poses"),
        "cache": str(tmp_path / "cache"),
        "workers": 1,
    }
    return Data(**(given | settings))


def _bytes(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_corpus_holds_the_features_of_its_clips(clips, tmp_path, rows_of) -> None:
    corpus = Corpus.open(ensure_corpus(_data(clips, tmp_path)))
    rows = [row for row in rows_of(clips / "table.csv") if row["split"] == "train"]
    split = corpus.splits["train"]
    assert [(clip.uid, clip.text, clip.language) for clip in split] == [
        (row["uid"], row["text"], row["language"]) for row in rows
    ]
    for clip in split:
        content = (clips / "poses" / f"{clip.uid}.pose").read_bytes()
        expected = extract_features(content, corpus.landmark_set, 12.5, max_frames=512)
        np.testing.assert_array_equal(clip.features, expected.values.astype(np.float16))
        assert clip.hands_visible == pytest.approx(expected.hands_visible)
    assert corpus.summary()["splits"] == {"train": 16, "dev": 2, "test": 4, "test_unseen_languages": 2}
    assert not any(corpus.metadata.leakage.values())


def test_the_second_time_it_is_there(clips, tmp_path) -> None:
    first, second = (find_or_prepare(_data(clips, tmp_path)) for _ in range(2))
    assert first.path == second.path and first.clips_per_second and second.clips_per_second is None
    assert [path.name for path in (tmp_path / "cache").iterdir() if path.name[0] != "."] == [first.path.name]


def test_settings_and_sources_change_the_hash(own_clips, tmp_path) -> None:
    paths = {ensure_corpus(_data(own_clips, tmp_path, **change)) for change in ({}, {"fps": 10}, {"max_frames": 50})}
    with open(own_clips / "table.csv", "a") as table:
        table.write("train-00000x,again,train,ase\n")
    shutil.copy(own_clips / "poses" / "train-00000.pose", own_clips / "poses" / "train-00000x.pose")
    paths.add(ensure_corpus(_data(own_clips, tmp_path)))
    assert len(paths) == 4


def test_workers_do_not_change_a_byte(clips, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("toolkit.corpus.shards.LEAST_CLIPS", 3)
    one = prepare(_data(clips, tmp_path), tmp_path / "one").path
    two = prepare(_data(clips, tmp_path, workers=2), tmp_path / "two").path
    assert _bytes(one) == _bytes(two)
    assert len(list((one / "train").glob("*.arrow"))) == 6


def test_an_interrupted_preparation_goes_on(clips, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("toolkit.corpus.shards.LEAST_CLIPS", 3)
    whole = prepare(_data(clips, tmp_path), tmp_path / "whole").path
    read = []
    original = Work.rows

    def rows(self, split, number, count):
        read.append((split, number))
        if len(read) == 4:
            raise KeyboardInterrupt
        return original(self, split, number, count)

    monkeypatch.setattr(Work, "rows", rows)
    with pytest.raises(Interrupted, match="run the same command again"):
        prepare(_data(clips, tmp_path), tmp_path / "cut")
    assert not (tmp_path / "cut").exists()
    resumed = prepare(_data(clips, tmp_path), tmp_path / "cut").path
    assert len(read) == 4 + 10 - 3, "the three finished shards are not made again"
    assert _bytes(resumed) == _bytes(whole)


def test_what_is_unusable_is_listed_with_its_reason(own_clips, tmp_path, rows_of) -> None:
    poses = own_clips / "poses"
    (poses / "train-00000.pose").unlink()
    (poses / "train-00001.pose").write_bytes(b"not a pose")
    content = (poses / "train-00002.pose").read_bytes()
    (poses / "train-00002.pose").write_bytes(content[: len(content) // 2])
    with open(own_clips / "table.csv", "a") as table:
        table.write("train-00003,the same uid,train,ase\ntrain-00004x,,train,ase\n")
    path = ensure_corpus(_data(own_clips, tmp_path, max_rejects=0.5))
    assert {row["uid"]: row["reason"] for row in rows_of(path / "rejects.csv")} == {
        "train-00000": "no pose file has its name: looked up 'train-00000' (uid), the nearest is train-00001.pose: "
        "if that is the one, write it into a column pose",
        "train-00001": "not a .pose file, or of an unknown version",
        "train-00002": "the file is truncated",
        "train-00003": "duplicate uid: line 5 has it too",
        "train-00004x": "the text is empty",
    }
    summary = Corpus.open(path).summary()
    assert (summary["clips"], summary["rejects"]) == (21, 5)


def test_too_many_rejects_leave_only_the_list(own_clips, tmp_path, rows_of) -> None:
    (own_clips / "poses" / "train-00001.pose").write_bytes(b"not a pose")
    out = tmp_path / "out"
    with pytest.raises(TooManyRejects, match=r"1 of 24 clips \(4.17 %\) cannot be used.*not a .pose file") as raised:
        prepare(_data(own_clips, tmp_path), out)
    assert raised.value.exit_code == 3
    assert rows_of(tmp_path / "out.rejects.csv")[0]["uid"] == "train-00001"
    assert not out.exists() and not (tmp_path / "out.partial").exists()
    prepare(_data(own_clips, tmp_path, max_rejects=0.1), out)
    assert not (tmp_path / "out.rejects.csv").exists()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"table": None}, "data.table is not set"),
        ({"poses": None}, "data.poses is not set"),
        ({"table": "none.csv"}, "there is no table"),
        ({"poses": "nowhere"}, "there is no folder or archive nowhere"),
        ({"poses": "."}, "holds no .pose, .npy, .npz, .pkl file"),
        ({"landmarks": "none"}, "there is no landmark set"),
        ({"columns": {"text": "sentence"}}, "no column 'sentence'"),
    ],
)
def test_wrong_inputs_are_one_line_and_leave_nothing(clips, tmp_path, monkeypatch, change, complaint: str) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UserError, match=complaint) as raised:
        ensure_corpus(_data(clips, tmp_path, **change))
    assert raised.value.exit_code == 2 and "\n" not in str(raised.value)
    assert not (tmp_path / "cache").exists()


def test_the_wrong_folder_is_told_from_missing_clips(own_clips, tmp_path) -> None:
    for file in list((own_clips / "poses").glob("train*"))[:14]:
        file.unlink()
    with pytest.raises(UserError, match=r"14 of the 24 clips.*is data.poses right"):
        ensure_corpus(_data(own_clips, tmp_path))


def test_empty_texts_beyond_the_limit_name_their_line(own_clips, tmp_path) -> None:
    with open(own_clips / "table.csv", "a") as table:
        table.write("a,,train,ase\n")
    shutil.copy(own_clips / "poses" / "train-00000.pose", own_clips / "poses" / "a.pose")
    with pytest.raises(UserError, match="line 26: the text is empty") as raised:
        ensure_corpus(_data(own_clips, tmp_path))
    assert raised.value.exit_code == 2


def test_nested_folders_and_names_with_suffix(own_clips, tmp_path) -> None:
    nested = own_clips / "poses" / "deep" / "er"
    nested.mkdir(parents=True)
    (own_clips / "poses" / "train-00000.pose").rename(nested / "train-00000.pose")
    (own_clips / "poses" / "train-00001.pose").rename(nested / "other.pose")
    table = (own_clips / "table.csv").read_text().replace("train-00001,", "deep/er/other.pose,")
    (own_clips / "table.csv").write_text(table)
    assert Corpus.open(ensure_corpus(_data(own_clips, tmp_path))).summary()["clips"] == 24


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
def test_a_name_in_two_folders_is_told_and_its_remedy_works(clips, tmp_path, rows_of, column: str) -> None:
    poses = str(_in_two_folders(clips, tmp_path, ["a", "b", "c"]))
    rows = [(uid, pose, f"text {uid}", "train") for uid, pose in (("a", ""), ("b", "test/b.pose"), ("test/c", ""))]
    table = _table(tmp_path / "t.csv", rows)
    with pytest.raises(TooManyRejects, match="most often: several pose files have its name: 'a' may be"):
        prepare(_data(clips, tmp_path, table=table, poses=poses), tmp_path / "out")
    (reject,) = rows_of(tmp_path / "out.rejects.csv")
    path = reject["reason"].partition(" may be ")[2].split(" or ")[0]
    rows[0] = (path, *rows[0][1:]) if column == "uid" else ("a", path, *rows[0][2:])
    table = _table(tmp_path / "t.csv", rows)
    out = prepare(_data(clips, tmp_path, table=table, poses=poses), tmp_path / "out").path
    assert Corpus.open(out).summary()["clips"] == 3


def test_one_uid_for_files_of_two_folders_is_told_and_its_remedy_works(clips, tmp_path, rows_of) -> None:
    poses = str(_in_two_folders(clips, tmp_path, ["a", "b"]))
    paths = ["train/a.pose", "train/b.pose", "test/a.pose", "test/b.pose"]
    rows = [(path[-6], path, f"text {path}", "train") for path in paths]
    table = _table(tmp_path / "t.csv", rows)
    with pytest.raises(
        TooManyRejects, match=r"line 2 has it too, with another pose file: .* take the path .* as the uid"
    ):
        prepare(_data(clips, tmp_path, table=table, poses=poses), tmp_path / "out")
    data = _data(clips, tmp_path, table=table, poses=poses, columns={"uid": "pose"})
    assert Corpus.open(prepare(data, tmp_path / "out").path).summary()["clips"] == 4


def test_when_most_names_are_ambiguous_the_line_says_so(clips, tmp_path) -> None:
    poses = str(_in_two_folders(clips, tmp_path, ["a", "b"]))
    table = _table(tmp_path / "t.csv", [("a", "", "one", "train"), ("b", "", "two", "train")])
    with pytest.raises(
        UserError, match=r"2 of the 2 clips .* Line 2: several pose files have its name: 'a' may be test"
    ):
        prepare(_data(clips, tmp_path, table=table, poses=poses), tmp_path / "out")


def test_two_paths_that_would_share_a_file_are_not_paired_by_chance(clips, tmp_path, rows_of) -> None:
    """The table knows train/a and test/a, but --poses is the folder of one of them."""
    poses = _in_two_folders(clips, tmp_path, ["a", "b", "c"])
    rows = [
        (f"/data/two/{path}.pose", "", f"text {path}", "train") for path in ("train/a", "test/a", "train/b", "test/c")
    ]
    table = _table(tmp_path / "t.csv", rows)
    settings = {"table": table, "poses": str(poses / "test"), "max_rejects": 0.5}
    out = prepare(_data(clips, tmp_path, **settings), tmp_path / "out").path
    reasons = {row["uid"]: row["reason"] for row in rows_of(out / "rejects.csv")}
    assert list(reasons) == ["/data/two/train/a.pose", "/data/two/test/a.pose"]
    assert all(
        "two names lead to one pose file" in reason and "the folder that holds" in reason for reason in reasons.values()
    )
    settings["poses"] = str(poses)  # the folder that holds those of both
    assert Corpus.open(prepare(_data(clips, tmp_path, **settings), tmp_path / "two-out").path).summary()["clips"] == 4


def test_a_missing_file_is_not_replaced_by_one_of_another_folder(clips, tmp_path, rows_of) -> None:
    poses = _in_two_folders(clips, tmp_path, ["a", "b", "c"])
    shutil.rmtree(poses / "test")
    rows = [(f"/data/{path}.pose", "", f"text {path}", "train") for path in ("train/a", "train/b", "train/c", "test/b")]
    data = _data(clips, tmp_path, table=_table(tmp_path / "t.csv", rows), poses=str(poses), max_rejects=0.5)
    (reject,) = rows_of(prepare(data, tmp_path / "out").path / "rejects.csv")
    assert reject["uid"] == "/data/test/b.pose"
    assert "train/b.pose, but that is '/data/train/b.pose' of line 3: the file is missing" in reject["reason"]


def test_one_uid_in_two_spellings_is_a_duplicate(clips, tmp_path, rows_of) -> None:
    rows = [("train-00000", "", "one", "train"), ("./train-00000.POSE", "", "two", "train")]
    rows += [("train-00001", "", "three", "train"), ("again", "train-00001.pose", "another text of it", "train")]
    data = _data(clips, tmp_path, table=_table(tmp_path / "t.csv", rows), max_rejects=0.5)
    (reject,) = rows_of(prepare(data, tmp_path / "out").path / "rejects.csv")
    assert reject == {
        "uid": "./train-00000.POSE",
        "reason": "duplicate uid: line 2 has it too, written 'train-00000'",
    }


def test_the_value_that_was_looked_up_and_the_nearest_are_named(clips, tmp_path) -> None:
    """The remedy is to map the column that holds the names."""
    rows = [(f"clip {n}", f"D:\\all\\train-0000{n}.POSE", f"text {n}", "train") for n in range(4)]
    table = _table(tmp_path / "t.csv", rows, "uid,file,text,split")
    complaint = r"4 of the 4 clips .* is data.poses right\? Line 2: .* looked up 'clip 0' \(uid\), the nearest is "
    with pytest.raises(UserError, match=complaint):
        prepare(_data(clips, tmp_path, table=table), tmp_path / "out")
    out = prepare(_data(clips, tmp_path, table=table, columns={"pose": "file"}), tmp_path / "out").path
    assert Corpus.open(out).summary()["clips"] == 4


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_names_from_a_mac_and_suffixes_in_capitals(clips, tmp_path, form: str) -> None:
    other = {"NFC": "NFD", "NFD": "NFC"}[form]
    (tmp_path / "poses").mkdir()
    for number in range(3):
        name = unicodedata.normalize(form, f"\u00dcbung_{number}\u00e9.POSE")
        shutil.copy(clips / "poses" / f"train-0000{number}.pose", tmp_path / "poses" / name)
    rows = [(unicodedata.normalize(other, f"\u00dcbung_{n}\u00e9"), "", f"text {n}", "train") for n in range(3)]
    data = _data(clips, tmp_path, table=_table(tmp_path / "t.csv", rows), poses=str(tmp_path / "poses"))
    assert Corpus.open(prepare(data, tmp_path / "out").path).summary()["clips"] == 3


def test_clips_cut_from_one_file_by_start_and_end(clips, tmp_path) -> None:
    (tmp_path / "t.csv").write_text(
        "uid,text,video,split,from,to\na,one,train-00000,train,0,0.8\nb,two,train-00000,train,0.8,1.6\n"
    )
    columns = {"start": "from", "end": "to"}
    data = _data(clips, tmp_path, table=str(tmp_path / "t.csv"), columns=columns, fps=25)
    assert Corpus.open(ensure_corpus(data)).splits["train"].frames.tolist() == [20, 20]


def _without_hands(path: Path) -> None:
    """Make every hand of a recording unseen."""
    raw = read_pose(path.read_bytes())
    confidence = raw.confidence.copy()
    hands = [index for index, (component, _) in enumerate(raw.header.points) if "HAND" in component]
    confidence[:, :, hands] = 0
    content = path.read_bytes()
    path.write_bytes(content[: len(content) - confidence.nbytes] + confidence.tobytes())


def test_clips_without_hands_are_counted_and_rejected_when_asked(own_clips, tmp_path, rows_of) -> None:
    _without_hands(own_clips / "poses" / "train-00003.pose")
    kept = Corpus.open(ensure_corpus(_data(own_clips, tmp_path)))
    assert kept.metadata.counts["without_hands"] == 1 and kept.summary()["clips"] == 24
    path = ensure_corpus(_data(own_clips, tmp_path, no_hands="reject", max_rejects=0.1))
    assert rows_of(path / "rejects.csv") == [
        {"uid": "train-00003", "reason": "no hands: no frame shows a landmark of either"}
    ]
    assert Corpus.open(path).metadata.counts["without_hands"] == 0


def test_removed_texts_are_counted_and_listed(own_clips, tmp_path, rows_of) -> None:
    rows = rows_of(own_clips / "table.csv")
    taken = next(row for row in rows if row["split"] == "test")
    taken["text"] = rows[0]["text"].upper() + "!"
    lines = ["uid,text,split,language", *(",".join(row.values()) for row in rows)]
    (own_clips / "table.csv").write_text("\n".join(lines) + "\n")
    kept = Corpus.open(ensure_corpus(_data(own_clips, tmp_path)))
    assert kept.metadata.leakage["test_texts_in_train"] == 1 and not (kept.path / "removed.csv").exists()
    corpus = Corpus.open(ensure_corpus(_data(own_clips, tmp_path, shared_texts="remove")))
    assert corpus.metadata.counts["removed_shared_texts"] == 1 and corpus.summary()["rejects"] == 0
    assert corpus.summary()["splits"]["test"] == 3 and not any(corpus.metadata.leakage.values())
    assert rows_of(corpus.path / "removed.csv") == [{"uid": taken["uid"], "reason": "train has its text"}]


def test_a_finished_corpus_is_only_replaced_when_asked(clips, tmp_path) -> None:
    out = prepare(_data(clips, tmp_path), tmp_path / "out").path
    with pytest.raises(UserError, match="exists already"):
        prepare(_data(clips, tmp_path, fps=5), out)
    prepare(_data(clips, tmp_path, fps=5), out, replace=True)
    assert Corpus.open(out).metadata.fps == 5


def test_a_prepared_corpus_is_taken_as_it_is(clips, tmp_path) -> None:
    out = prepare(_data(clips, tmp_path), tmp_path / "out").path
    assert ensure_corpus(Data(corpus=str(out))) == out
    with pytest.raises(UserError, match="not a prepared corpus"):
        ensure_corpus(Data(corpus=str(tmp_path)))


def _ask(data: Data, results) -> None:
    found = find_or_prepare(data)
    results.put((str(found.path), found.clips_per_second is not None))


def test_many_ranks_prepare_once(clips, tmp_path) -> None:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    ranks = [context.Process(target=_ask, args=(_data(clips, tmp_path), results)) for _ in range(4)]
    for rank in ranks:
        rank.start()
    answers = [results.get(timeout=60) for _ in ranks]
    for rank in ranks:
        rank.join()
    assert len({path for path, _ in answers}) == 1 and sum(prepared for _, prepared in answers) == 1


def test_who_waits_says_so(clips, tmp_path, monkeypatch, capfd) -> None:
    monkeypatch.setattr(prepare_module, "MESSAGE_WHILE_WAITING", 0.2)
    out = tmp_path / "out"
    held = FileLock(tmp_path / ".out.lock")
    held.acquire()
    context = multiprocessing.get_context("fork")
    waiting = context.Process(target=prepare, args=(_data(clips, tmp_path), out))
    waiting.start()
    time.sleep(0.7)
    held.release()
    waiting.join(30)
    assert waiting.exitcode == 0 and out.exists()
    assert f"waiting for another process that prepares {out}" in capfd.readouterr().err


def test_metadata_tells_how_the_features_were_made(clips, tmp_path) -> None:
    path = ensure_corpus(_data(clips, tmp_path))
    metadata = json.loads((path / "corpus.json").read_text())
    assert metadata["landmark_set"]["name"] == "hands_body_50"
    assert metadata["normalisation"].startswith("shoulders")
    assert set(metadata["checksums"]) == {"table", "clips"}
    assert metadata["counts"] == {
        "rejects": 0,
        "shortened": 0,
        "normalised_without_shoulders": 0,
        "without_hands": 0,
        "points_without_place": 0,
        "unusual_fps": 0,
        "lacking_landmarks": 0,
    }
    assert str(clips) not in json.dumps(metadata), "a corpus is the same wherever its sources lay"


def test_the_table_overrules_what_a_file_says_of_its_rate(clips, tmp_path) -> None:
    """Rates of 0 and 1000 in the files: rejects as they are, ordinary clips where the table knows."""
    poses = tmp_path / "rates"
    shutil.copytree(clips / "poses", poses)
    files = sorted(poses.glob("*.pose"))
    for file, claimed in zip(files, [0.0, float("nan"), 1000.0], strict=False):
        content = file.read_bytes()
        raw = read_pose(content)
        sizes = len(content) - raw.data.nbytes - raw.confidence.nbytes - 10  # the rate comes first
        file.write_bytes(content[:sizes] + struct.pack("<f", claimed) + content[sizes + 4 :])
    told = tmp_path / "told.csv"
    with open(clips / "table.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    with open(told, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*rows[0], "fps"])
        writer.writeheader()
        writer.writerows(row | {"fps": "25"} for row in rows)
    data = _data(clips, tmp_path).model_copy(update={"poses": str(poses)})
    with pytest.raises(TooManyRejects, match="frames per second, which no camera has: the table's fps column"):
        ensure_corpus(data)
    corpus = Corpus.open(ensure_corpus(data.model_copy(update={"table": str(told)})))
    assert corpus.metadata.counts["rejects"] == 0 and corpus.metadata.counts["unusual_fps"] == 0
