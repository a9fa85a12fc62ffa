"""Public corpora by name, on tables of the form that each is published in."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from tests.scripts import ROOT
from toolkit.corpus.packed import Corpus
from toolkit.corpus.plan import Plan, make_plan, read_inputs
from toolkit.corpus.prepare import prepare
from toolkit.corpus.published.presets import presets
from toolkit.corpus.published.whole_files import read_whole
from toolkit.corpus.table import Row
from toolkit.errors import UserError
from toolkit.poses.layouts import HAND, MEDIAPIPE_BODY
from toolkit.poses.pose_file import read_pose
from toolkit.recipe.corpora import Source
from toolkit.recipe.schema import Data

VIDEO = "-9LIszGTcLmo"
CLIP = f"{VIDEO}-00:00:12.345-00:00:15.678"


def bars(*rows: str) -> bytes:
    return ("\n".join(rows) + "\n").encode()


def packed(content: Any) -> bytes:
    return gzip.compress(pickle.dumps(content), mtime=0)


PHOENIX = "name|video|start|end|speaker|orth|translation"
CSL = "index|name|length|gloss|char|word|postag"
CSL_SPLITS = bars("name|split", "S000000_P0000_T00|train", "S000001_P0004_T00|test")
OPENASL = "vid\tyid\tstart\tend\traw-text\ttokenized-text\tgloss\tsplit"
CSL_CLIP = {"length": 55, "label_word": ["他们", "好"], "label_postag": ["r", "v"], "time": 0}

# Tables by source, and what the first clip and the splits of all of them are.
Published = tuple[str, dict[str, bytes], dict[str, Any], dict[str, int]]
PUBLISHED: dict[str, Published] = {
    "phoenix14t": (
        "phoenix14t",
        {
            "PHOENIX-2014-T.train.corpus.csv": bars(
                PHOENIX, "11August-1|11August-1/1/*.png|-1|-1|Signer08|JETZT WETTER|und nun"
            ),
            "PHOENIX-2014-T.dev.corpus.csv": bars(PHOENIX, "12August-1|12August-1/1/*.png|-1|-1|Signer01|REGEN|regen"),
            "PHOENIX-2014-T.test.corpus.csv": bars(PHOENIX, "13August-1|13August-1/1/*.png|-1|-1|Signer01|SONNE|sonne"),
            "PHOENIX-2014-T.train-complex-annotation.corpus.csv": b"",
        },
        {
            "uid": "11August-1",
            "text": "und nun",
            "signer": "Signer08",
            "gloss": "JETZT WETTER",
            "language": "gsg",
            "start": None,
        },
        {"train": 1, "dev": 1, "test": 1},
    ),
    "csl_daily": (
        "csl_daily",
        {
            "video_map.txt": bars(
                CSL, "0|S000000_P0000_T00|55|他们 好|他 们 好 。|他们 好 。|r v w", "1|S000001_P0004_T00|60|你|你|你|r"
            ),
            "split_1.txt": CSL_SPLITS,
        },
        {"uid": "S000000_P0000_T00", "text": "他们好。", "gloss": "他们 好", "language": "csl", "signer": ""},
        {"train": 1, "test": 1},
    ),
    "csl_daily, pickled": (
        "csl_daily",
        {
            "csl2020ct_v2.pkl": pickle.dumps(
                {
                    "info": [
                        {
                            "name": "S000000_P0000_T00",
                            "label_gloss": ["他们", "好"],
                            "label_char": ["他", "们", "好"],
                            "signer": 3,
                            **CSL_CLIP,
                        },
                        {
                            "name": "S000001_P0004_T00",
                            "label_gloss": ["你"],
                            "label_char": ["你"],
                            "signer": np.int64(4),
                            **CSL_CLIP,
                        },
                    ],
                    "gloss_map": ["他们", "好", "你"],
                }
            ),
            "split_1.txt": CSL_SPLITS,
        },
        {"uid": "S000000_P0000_T00", "text": "他们好", "gloss": "他们 好", "signer": "3"},
        {"train": 1, "test": 1},
    ),
    "openasl": (
        "openasl",
        {
            "openasl-v1.0.tsv": bars(
                OPENASL,
                f'{CLIP}\t{VIDEO}\t00:00:12.345\t00:00:15.678\tHello, "world".\thello , world .\t\ttrain',
                f"{CLIP}1\t{VIDEO}\t00:00:12.345\t00:00:15.678\tHi.\thi .\tHI\tvalid",
            )
        },
        {"uid": CLIP, "text": 'Hello, "world".', "video": VIDEO, "language": "ase", "start": None},
        {"train": 1, "dev": 1},
    ),
    "youtube_asl": (
        "youtube_asl",
        {
            "YT.annotations.train.json": json.dumps(
                {
                    VIDEO: {
                        "clip_order": [f"{VIDEO}.002", f"{VIDEO}.001"],
                        f"{VIDEO}.001": {"translation": "First."},
                        f"{VIDEO}.002": {"translation": "Second."},
                    }
                }
            ).encode(),
            "YT.annotations.dev.json": json.dumps(
                {"b": {"clip_order": ["b.1"], "b.1": {"translation": "Third."}}}
            ).encode(),
        },
        {"uid": f"{VIDEO}.002", "text": "Second.", "video": VIDEO, "split": "train"},
        {"train": 2, "dev": 1},
    ),
    "uni_sign": (
        "uni_sign",
        {
            "labels.train": packed(
                {"a": {"name": "a", "text": "他们好", "gloss": ["他们", "好"], "video_path": "train/x.mp4"}}
            ),
            "labels.test": packed({"b": {"name": "b", "text": "red", "video_path": "test/y.mp4"}}),
        },
        {"uid": "a", "text": "他们好", "gloss": "他们 好", "pose": "train/x.mp4", "split": "train"},
        {"train": 1, "test": 1},
    ),
    "uni_sign, CSL-News": (
        "uni_sign",
        {
            "CSL_News_Labels.json": json.dumps(
                [{"video": f"{n}.mp4", "pose": f"{n}.pkl", "text": "新闻"} for n in "abc"]
            ).encode()
        },
        {"uid": "a.mp4", "text": "新闻", "pose": "a.pkl"},
        {"train": 1, "dev": 1, "test": 1},
    ),
    "glosl": (
        "glosl",
        {
            "annotations.csv": bars(
                "id,split,text,gloss,signer,start,end",
                "7,train,good day,GOOD DAY,anna,0.5,1.25",
                "8,test,bye,BYE,ben,,",
            )
        },
        {"uid": "7", "text": "good day", "gloss": "GOOD DAY", "signer": "anna", "start": 0.5, "end": 1.25},
        {"train": 1, "test": 1},
    ),
    "how2sign": (
        "how2sign",
        {
            f"how2sign_realigned_{split}.csv": bars(
                "VIDEO_ID\tVIDEO_NAME\tSENTENCE_ID\tSENTENCE_NAME\tSTART_REALIGNED\tEND_REALIGNED\tSENTENCE",
                f"{split}1\t{split}1-5-rgb\t{split}1_0\t{split}1_0-5-rgb_front\t0.0\t2.1\tHi, all.",
            )
            for split in ("train", "val", "test")
        },
        {"uid": "test1_0-5-rgb_front", "text": "Hi, all.", "video": "test1", "language": "ase", "start": None},
        {"train": 1, "dev": 1, "test": 1},
    ),
}


def rows_of(folder: Path, source: str, **settings: Any) -> list[Row]:
    return read_inputs(data_of(folder, source, **settings)).rows


def data_of(folder: Path, source: str, table: str = "", **settings: Any) -> Data:
    poses = folder / "poses"
    poses.mkdir(exist_ok=True)
    (poses / "none.pose").touch()
    return Data(source=source, table=str(folder / table), poses=str(poses), workers=1, **settings)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[dict[str, bytes]], Path]:
    def write(files: dict[str, bytes]) -> Path:
        for name, content in files.items():
            (tmp_path / name).write_bytes(content)
        return tmp_path

    return write


def test_every_preset_is_a_source_and_is_tried_here() -> None:
    assert {"table", "demo", *presets()} == set(get_args(Source))
    assert {"isign", *(source for source, *_ in PUBLISHED.values())} == set(presets())


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_folder_as_it_is_published(name: str, write) -> None:
    source, files, first, splits = PUBLISHED[name]
    folder = write(files)
    poses = folder / "poses"
    poses.mkdir()
    rows = rows_of(folder, source)
    (row,) = (row for row in rows if row.uid == first["uid"])
    assert {key: getattr(row, key) for key in first} == first
    for row in rows:
        file = poses / f"{(row.pose or row.uid).rpartition('.mp4')[0] or row.pose or row.uid}.pose".replace(":", "%")
        file.parent.mkdir(exist_ok=True)
        file.touch()
    plan: Plan = make_plan(read_inputs(data_of(folder, source, dev_share=0.3, test_share=0.3)))
    assert {split: len(rows) for split, rows in plan.splits.items()} == splits and not plan.rejects


@pytest.mark.parametrize("name", ["phoenix14t", "uni_sign", "how2sign"])
def test_tables_of_the_splits_by_pattern(name: str, write) -> None:
    source, files, _, _ = PUBLISHED[name]
    pattern = min(files, key=len).replace("test", "{split}").replace("dev", "{split}").replace("val", "{split}")
    rows = rows_of(write(files), source, table=pattern)
    assert len(rows) == len([content for content in files.values() if content])


def test_messages_name_the_table_of_several(write) -> None:
    folder = write({"t_train.csv": b"uid,text\na,x\n", "t_val.csv": b"uid,text\nb,y\n\na,z\n", "t_old.csv": b"uid\n"})
    with pytest.raises(UserError) as raised:
        make_plan(read_inputs(data_of(folder, "table", "t_{split}.csv")))
    assert "t_train.csv, line 2" in raised.value.message
    for file in ("a.pose", "b.pose"):
        (folder / "poses" / file).touch()
    plan = make_plan(read_inputs(data_of(folder, "table", "t_{split}.csv")))
    assert {split: [row.uid for row, _ in rows] for split, rows in plan.splits.items()} == {
        "train": ["a"],
        "dev": ["b"],
    }
    assert "t_train.csv, line 2" in plan.rejects[0][2]


@pytest.mark.parametrize("table", ["t_{split}.csv", ""])
def test_tables_that_are_not_there(tmp_path: Path, table: str) -> None:
    (tmp_path / "t_old.csv").write_text("uid,text\na,b\n")
    with pytest.raises(UserError) as raised:
        rows_of(tmp_path, "openasl", table=table)
    assert ("{split}" in raised.value.message) is bool(table)


def test_a_clip_that_the_table_of_splits_lacks_is_a_reject(write) -> None:
    source, files, _, _ = PUBLISHED["csl_daily"]
    folder = write(files | {"split_1.txt": bars("name|split", "S000000_P0000_T00|train")})
    data_of(folder, source)
    for name in ("S000000_P0000_T00", "S000001_P0004_T00"):
        (folder / "poses" / f"{name}.pose").touch()
    plan = make_plan(read_inputs(data_of(folder, source)))
    ((_, uid, reason, _),) = plan.rejects
    assert uid == "S000001_P0004_T00" and "split_1.txt" in reason
    (folder / "split_1.txt").unlink()
    with pytest.raises(UserError, match=r"split_1\.txt"):
        rows_of(folder, source)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch EVIL",)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (packed({"a": {"name": "a", "text": Evil()}}), "system"),
        (packed([Path("x")]), "pathlib"),
        (pickle.dumps([{"name": "a", "text": "b"}])[:-9], "pickle"),
        (gzip.compress(pickle.dumps([{"name": "a"}]))[:-9], "gzip"),
        (packed("text"), "str"),
        (packed({"a": "b"}), "'a'"),
        (packed([["a", "b"]]), "list"),
        (gzip.compress(b"uid,text\na,b\n"), "JSON"),
        (packed({"v": {"clip_order": ["x"]}}), "'v'"),
        (packed({"v": {"clip_order": [["x"]]}}), "'v'"),
        (packed({"v": {"clip_order": 7}, "w": {"clip_order": []}}), "'v'"),
        (packed([]), "labels.train"),
        (packed([{"name": "a", "text": "b", "split": "x/y"}]), "record 1"),
        (packed([{"name": "a", "text": ["b", 7]}]), "record 1"),
        (packed([{"name": "a"}]), "'text'"),
        (b"[" + b"[]," * 5_000_000, "lists"),
    ],
    ids=lambda value: value if isinstance(value, str) else "content",
)
def test_what_is_no_list_of_clips_is_refused_in_one_line(
    write, content: bytes, named: str, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as raised:
        rows_of(write({"labels.train": content}), "uni_sign")
    assert named in raised.value.message and "\n" not in raised.value.message and raised.value.hint
    assert not (tmp_path / "EVIL").exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_of_every_protocol_with_arrays(tmp_path: Path, protocol: int) -> None:
    clip = {
        "text": np.str_("a"),
        "gloss": np.array(["A", "B"]),
        "n": np.float32(2),
        "more": {"t": (1, b"x", None, [3])},
    }
    content = pickle.dumps({"a": clip}, protocol=protocol)
    path = tmp_path / "t.pkl"
    path.write_bytes(content)
    ((number, record),) = read_whole(path)
    assert (number, record["uid"], record["text"], record["gloss"], record["n"]) == (1, "a", "a", ["A", "B"], 2.0)


def test_keypoints_of_youtube_asl_become_arrays_as_the_page_says(clips: Path, tmp_path: Path, monkeypatch) -> None:
    raw = read_pose((clips / "poses" / "train-00000.pose").read_bytes())
    names = {"POSE": "pose", "FACE": "face", "LEFT_HAND": "left_hand", "RIGHT_HAND": "right_hand"}
    sizes = {"pose": 33, "face": 478, "left_hand": 21, "right_hand": 21}
    frames = []
    for positions, confidence in zip(raw.data[:, 0, :, :2], raw.confidence[:, 0], strict=True):
        frame = {f"{name}_landmarks": [[0.0, 0.0]] * size for name, size in sizes.items()}
        for (component, point), place, seen in zip(raw.header.points, positions, confidence, strict=True):
            name = names.get(component.removesuffix("_LANDMARKS"))
            order = {"pose": MEDIAPIPE_BODY, "left_hand": HAND, "right_hand": HAND}.get(name or "", ())
            if point in order and seen:
                frame[f"{name}_landmarks"][order.index(point)] = [float(value) for value in place]
        if not np.any(frame["left_hand_landmarks"]):
            frame["left_hand_landmarks"] = []
        frames.append(frame)
    monkeypatch.chdir(tmp_path)
    for folder in ("raw_keypoints", "poses"):
        (tmp_path / folder).mkdir()
    (tmp_path / "raw_keypoints" / "v.001.json").write_text(json.dumps({"cropped_keypoints": frames}))
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(  import json.*?)```", page, re.DOTALL)
    exec(textwrap.dedent(code), {})
    (tmp_path / "YT.annotations.train.json").write_text(
        json.dumps({"v": {"clip_order": ["v.001"], "v.001": {"translation": "Hi."}}})
    )
    where = {"table": str(tmp_path), "poses": str(tmp_path / "poses"), "workers": 1}
    data = Data(source="youtube_asl", landmarks="isign_76", **where)
    clip = Corpus.open(prepare(data, tmp_path / "out").path).splits["train"].clip(0)
    assert (clip.uid, clip.text, clip.language) == ("v.001", "Hi.", "ase") and np.isfinite(clip.features).any()


def test_settings_of_a_preset_change_the_corpus_that_is_found_and_those_of_a_table_do_not(write) -> None:
    folder = write({"t.csv": b"uid,text\na,x\n", "s.csv": b"uid,text,signer\na,x,s\n"})
    prints = [
        read_inputs(data_of(folder, "table", "t.csv")),
        read_inputs(data_of(folder, "table", "t.csv", time_unit="frames")),
        read_inputs(data_of(folder, "table", "s.csv")),
    ]
    assert len({inputs.fingerprint for inputs in prints}) == 3
