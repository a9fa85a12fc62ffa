import csv
import json
import multiprocessing
import re
import shutil
import struct
import time
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from tests.corpus.data_settings import data_of
from tests.time_limits import limit
from toolkit.corpus import prepare as prepare_module
from toolkit.corpus.packed import Corpus
from toolkit.corpus.prepare import ensure_corpus, find_or_prepare, prepare
from toolkit.corpus.shards import Work
from toolkit.errors import Interrupted, TooManyRejects, UserError
from toolkit.poses.features import extract_features
from toolkit.poses.pose_file import read_pose
from toolkit.recipe.schema import Data


def _bytes(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_corpus_holds_the_features_of_its_clips(clips, tmp_path, rows_of) -> None:
    corpus = Corpus.open(ensure_corpus(data_of(clips, tmp_path)))
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


def test_a_second_preparation_finds_the_first(clips, tmp_path) -> None:
    first, second = (find_or_prepare(data_of(clips, tmp_path)) for _ in range(2))
    assert first.path == second.path and first.clips_per_second and second.clips_per_second is None
    assert [path.name for path in (tmp_path / "cache").iterdir() if path.name[0] != "."] == [first.path.name]


def test_settings_and_sources_change_the_hash(own_clips, tmp_path) -> None:
    paths = {ensure_corpus(data_of(own_clips, tmp_path, **change)) for change in ({}, {"fps": 10}, {"max_frames": 50})}
    with open(own_clips / "table.csv", "a") as table:
        table.write("train-00000x,again,train,ase\n")
    shutil.copy(own_clips / "poses" / "train-00000.pose", own_clips / "poses" / "train-00000x.pose")
    paths.add(ensure_corpus(data_of(own_clips, tmp_path)))
    assert len(paths) == 4


@pytest.mark.process
def test_workers_do_not_change_a_byte(clips, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("toolkit.corpus.shards.LEAST_CLIPS", 3)
    one = prepare(data_of(clips, tmp_path), tmp_path / "one").path
    two = prepare(data_of(clips, tmp_path, workers=2), tmp_path / "two").path
    assert _bytes(one) == _bytes(two)
    assert len(list((one / "train").glob("*.arrow"))) == 6


def test_an_interrupted_preparation_is_resumed(clips, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("toolkit.corpus.shards.LEAST_CLIPS", 3)
    whole = prepare(data_of(clips, tmp_path), tmp_path / "whole").path
    read = []
    original = Work.rows

    def rows(self, split, number, count):
        read.append((split, number))
        if len(read) == 4:
            raise KeyboardInterrupt
        return original(self, split, number, count)

    monkeypatch.setattr(Work, "rows", rows)
    with pytest.raises(Interrupted) as raised:
        prepare(data_of(clips, tmp_path), tmp_path / "out")
    assert raised.value.hint and not (tmp_path / "out").exists()
    resumed = prepare(data_of(clips, tmp_path), tmp_path / "out").path
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
    path = ensure_corpus(data_of(own_clips, tmp_path, max_rejects=0.5))
    assert {row["uid"]: (row["reason"], row["hint"]) for row in rows_of(path / "rejects.csv")} == {
        "train-00000": (
            "no pose file has its name: looked up 'train-00000' (uid), the nearest is train-00001.pose",
            "write the name of its file into a column pose",
        ),
        "train-00001": ("not a .pose file, or of an unknown version", ""),
        "train-00002": ("the file is truncated", ""),
        "train-00003": ("duplicate uid: line 5 has it too", "remove one of the rows"),
        "train-00004x": ("the text is empty", ""),
    }
    summary = Corpus.open(path).summary()
    assert (summary["clips"], summary["rejects"]) == (21, 5)


def test_too_many_rejects_leave_only_the_list(own_clips, tmp_path, rows_of) -> None:
    (own_clips / "poses" / "train-00001.pose").write_bytes(b"not a pose")
    out = tmp_path / "out"
    with pytest.raises(TooManyRejects, match=r"\b1\b.*\b24 clips .*4\.17 %.*\.pose") as raised:
        prepare(data_of(own_clips, tmp_path), out)
    assert raised.value.exit_code == 3 and "out.rejects.csv" in raised.value.hint
    assert rows_of(tmp_path / "out.rejects.csv")[0]["uid"] == "train-00001"
    assert not out.exists() and not (tmp_path / "out.partial").exists()
    prepare(data_of(own_clips, tmp_path, max_rejects=0.1), out)
    assert not (tmp_path / "out.rejects.csv").exists()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"table": None}, "data.table"),
        ({"poses": None}, "data.poses"),
        ({"table": "none.csv"}, "none.csv"),
        ({"poses": "nowhere"}, "nowhere"),
        ({"poses": "."}, ".pose, .npy, .npz, .pkl"),
        ({"landmarks": "none"}, "'none'"),
        ({"columns": {"text": "sentence"}}, "'sentence'"),
    ],
)
def test_wrong_inputs_are_named_and_leave_nothing(clips, tmp_path, monkeypatch, change, named: str) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UserError, match=re.escape(named)) as raised:
        ensure_corpus(data_of(clips, tmp_path, **change))
    assert raised.value.exit_code == 2 and raised.value.hint
    assert not (tmp_path / "cache").exists()


def test_empty_texts_beyond_the_limit_name_their_line(own_clips, tmp_path) -> None:
    with open(own_clips / "table.csv", "a") as table:
        table.write("a,,train,ase\n")
    shutil.copy(own_clips / "poses" / "train-00000.pose", own_clips / "poses" / "a.pose")
    with pytest.raises(UserError, match=r"line 26: .*empty") as raised:
        ensure_corpus(data_of(own_clips, tmp_path))
    assert raised.value.exit_code == 2


def test_clips_of_one_file_by_start_and_end(clips, tmp_path) -> None:
    (tmp_path / "t.csv").write_text(
        "uid,text,video,split,from,to\na,one,train-00000,train,0,0.8\nb,two,train-00000,train,0.8,1.6\n"
    )
    columns = {"start": "from", "end": "to"}
    data = data_of(clips, tmp_path, table=str(tmp_path / "t.csv"), columns=columns, fps=25)
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
    kept = Corpus.open(ensure_corpus(data_of(own_clips, tmp_path)))
    assert kept.metadata.counts["without_hands"] == 1 and kept.summary()["clips"] == 24
    path = ensure_corpus(data_of(own_clips, tmp_path, no_hands="reject", max_rejects=0.1))
    assert rows_of(path / "rejects.csv") == [
        {"uid": "train-00003", "reason": "no hands: no frame shows a landmark of either", "hint": ""}
    ]
    assert Corpus.open(path).metadata.counts["without_hands"] == 0


def test_removed_texts_are_counted_and_listed(own_clips, tmp_path, rows_of) -> None:
    rows = rows_of(own_clips / "table.csv")
    taken = next(row for row in rows if row["split"] == "test")
    taken["text"] = rows[0]["text"].upper() + "!"
    lines = ["uid,text,split,language", *(",".join(row.values()) for row in rows)]
    (own_clips / "table.csv").write_text("\n".join(lines) + "\n")
    kept = Corpus.open(ensure_corpus(data_of(own_clips, tmp_path)))
    assert kept.metadata.leakage["test_texts_in_train"] == 1 and not (kept.path / "removed.csv").exists()
    corpus = Corpus.open(ensure_corpus(data_of(own_clips, tmp_path, shared_texts="remove")))
    assert corpus.metadata.counts["removed_shared_texts"] == 1 and corpus.summary()["rejects"] == 0
    assert corpus.summary()["splits"]["test"] == 3 and not any(corpus.metadata.leakage.values())
    assert rows_of(corpus.path / "removed.csv") == [{"uid": taken["uid"], "reason": "train has its text"}]


@pytest.mark.parametrize("holds", [{"a.pose": "x"}, {"corpus.json": "{}", "status.json": "{}"}, None])
def test_what_is_no_corpus_is_never_replaced(clips, tmp_path, holds) -> None:
    out = tmp_path / "out"
    if holds is None:
        out.write_text("of a user")
    else:
        out.mkdir()
        for name, content in holds.items():
            (out / name).write_text(content)
    with pytest.raises(UserError, match="out") as refusal:
        prepare(data_of(clips, tmp_path), out, replace=True)
    assert "--out" in refusal.value.hint and "--replace" not in refusal.value.hint
    assert out.is_file() if holds is None else {path.name for path in out.iterdir()} == holds.keys()


def test_a_finished_corpus_is_only_replaced_when_asked(clips, tmp_path) -> None:
    out = prepare(data_of(clips, tmp_path), tmp_path / "out").path
    with pytest.raises(UserError, match="/out "):
        prepare(data_of(clips, tmp_path, fps=5), out)
    prepare(data_of(clips, tmp_path, fps=5), out, replace=True)
    assert Corpus.open(out).metadata.fps == 5


def test_a_prepared_corpus_is_taken_as_it_is(clips, tmp_path) -> None:
    out = prepare(data_of(clips, tmp_path), tmp_path / "out").path
    assert ensure_corpus(Data(corpus=str(out))) == out
    with pytest.raises(UserError, match=r"corpus\.json"):
        ensure_corpus(Data(corpus=str(tmp_path)))


def _ask(data: Data, results) -> None:
    found = find_or_prepare(data)
    results.put((str(found.path), found.clips_per_second is not None))


@pytest.mark.process
def test_many_ranks_prepare_once(clips, tmp_path) -> None:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    ranks = [context.Process(target=_ask, args=(data_of(clips, tmp_path), results)) for _ in range(4)]
    for rank in ranks:
        rank.start()
    answers = [results.get(timeout=limit(60)) for _ in ranks]
    for rank in ranks:
        rank.join()
    assert len({path for path, _ in answers}) == 1 and sum(prepared for _, prepared in answers) == 1


@pytest.mark.process
def test_a_process_that_waits_reports_it(clips, tmp_path, monkeypatch, capfd) -> None:
    monkeypatch.setattr(prepare_module, "MESSAGE_WHILE_WAITING", 0.2)
    out = tmp_path / "out"
    held = FileLock(tmp_path / ".out.lock")
    held.acquire()
    context = multiprocessing.get_context("fork")
    waiting = context.Process(target=prepare, args=(data_of(clips, tmp_path), out))
    waiting.start()
    deadline, printed = time.monotonic() + limit(30), ""
    while f"waiting for another process that prepares {out}" not in printed:
        assert time.monotonic() < deadline, printed
        time.sleep(0.02)
        printed += capfd.readouterr().err
    assert not out.exists()
    held.release()
    waiting.join(limit(30))
    assert waiting.exitcode == 0 and out.exists()


def test_metadata_describe_how_the_features_were_made(clips, tmp_path) -> None:
    path = ensure_corpus(data_of(clips, tmp_path))
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
        "end_beyond_file": 0,
        "same_recording": 0,
        "texts_like_missing": 0,
    }
    assert str(clips) not in json.dumps(metadata), "a corpus is the same wherever its sources lay"


def test_the_table_overrules_the_frame_rate_of_a_file(clips, tmp_path) -> None:
    """Rates of 0 and 1000 in the files: rejects as they are, ordinary clips where the table knows."""
    poses = tmp_path / "rates"
    shutil.copytree(clips / "poses", poses)
    files = sorted(poses.glob("*.pose"))
    for file, claimed in zip(files, [0.0, float("nan"), 1000.0], strict=False):
        content = file.read_bytes()
        raw = read_pose(content)
        sizes = len(content) - raw.data.nbytes - raw.confidence.nbytes - 10  # the rate comes first
        file.write_bytes(content[:sizes] + struct.pack("<f", claimed) + content[sizes + 4 :])
    table = tmp_path / "rates.csv"
    with open(clips / "table.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    with open(table, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*rows[0], "fps"])
        writer.writeheader()
        writer.writerows(row | {"fps": "25"} for row in rows)
    data = data_of(clips, tmp_path).model_copy(update={"poses": str(poses)})
    with pytest.raises(TooManyRejects, match=r"\b0 frames") as raised:
        ensure_corpus(data)
    assert "fps" in raised.value.hint
    corpus = Corpus.open(ensure_corpus(data.model_copy(update={"table": str(table)})))
    assert corpus.metadata.counts["rejects"] == 0 and corpus.metadata.counts["unusual_fps"] == 0


def test_a_reason_and_its_remedy_have_columns_of_their_own(own_clips, tmp_path, rows_of) -> None:
    poses = own_clips / "poses"
    rate = read_pose((poses / "train-00001.pose").read_bytes())
    content = (poses / "train-00001.pose").read_bytes()
    place = len(content) - rate.data.nbytes - rate.confidence.nbytes - 10
    (poses / "train-00001.pose").write_bytes(content[:place] + np.float32(0).tobytes() + content[place + 4 :])
    (poses / "train-00002.pose").write_bytes(b"BZh91AY")
    with pytest.raises(TooManyRejects) as raised:
        prepare(data_of(own_clips, tmp_path), tmp_path / "out")
    rejects = {row["uid"]: row for row in rows_of(tmp_path / "out.rejects.csv")}
    assert "fps column" in rejects["train-00001"]["hint"] and "gzip" in rejects["train-00002"]["hint"]
    assert not any(row["hint"] and row["hint"] in row["reason"] for row in rejects.values())
    first = next(row for row in rejects.values() if row["reason"] in raised.value.message)
    assert first["hint"] in raised.value.hint and first["hint"] not in raised.value.message
