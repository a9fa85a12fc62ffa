"""Preparation with features of another network: beside the poses, instead of them, and when something is wrong."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from datasets import load_from_disk

from tests.corpus.data_settings import data_of
from tests.written_corpora import write_corpus
from toolkit.corpus.mixture.opening import frame_of, mix
from toolkit.corpus.packed import Clip, Corpus
from toolkit.corpus.prepare import ensure_corpus
from toolkit.errors import TooManyRejects, UserError
from toolkit.poses.landmarks import NO_LANDMARKS
from toolkit.poses.pose_file import read_pose
from toolkit.recipe.schema import MixPart

WIDTH, FPS = 6, 5.0


@pytest.fixture
def features(own_clips: Path, rows_of: Any) -> Path:
    """A folder with a feature file of each clip, as long as its poses: the first number is the time in seconds."""
    folder = own_clips / "features"
    folder.mkdir()
    for row in rows_of(own_clips / "table.csv"):
        write(folder / f"{row['uid']}.npy", seconds_of(own_clips, row["uid"]))
    return folder


def seconds_of(clips: Path, uid: str) -> float:
    raw = read_pose((clips / "poses" / f"{uid}.pose").read_bytes())
    return raw.num_frames / raw.fps


def write(path: Path, seconds: float, width: int = WIDTH) -> None:
    frames = max(1, round(seconds * FPS))
    values = np.random.default_rng(0).normal(size=(frames, width))
    values[:, 0] = np.arange(frames) / FPS
    np.save(path, values.astype(np.float32))


def settings(own_clips: Path, **more: Any) -> dict[str, Any]:
    return {"features": str(own_clips / "features"), "features_fps": FPS, **more}


def test_poses_and_features_have_the_same_frames(own_clips: Path, features: Path, tmp_path: Path) -> None:
    alone = Corpus.open(ensure_corpus(data_of(own_clips, tmp_path)))
    both = Corpus.open(ensure_corpus(data_of(own_clips, tmp_path, **settings(own_clips))))
    assert both.path != alone.path and both.metadata.num_features == WIDTH
    for mine, theirs in zip(both.splits["train"], alone.splits["train"], strict=True):
        np.testing.assert_array_equal(mine.features, theirs.features)
        assert mine.video_features is not None and theirs.video_features is None
        assert mine.video_features.shape == (len(mine.features), WIDTH) and mine.video_features.dtype == np.float16
        times = np.minimum(np.arange(len(mine.features)) / both.metadata.fps, mine.video_features[-1, 0])
        np.testing.assert_allclose(mine.video_features[:, 0], times, atol=5e-3, rtol=1e-3)
    assert frame_of(data_of(own_clips, tmp_path, **settings(own_clips))) == (both.landmark_set, WIDTH)
    assert not both.splits["train"].clip(0).video_features.flags.writeable, "a view into the map"
    again = pickle.loads(pickle.dumps(both.splits["train"]))
    np.testing.assert_array_equal(again.clip(3).video_features, both.splits["train"].clip(3).video_features)


def test_features_alone_need_no_poses(own_clips: Path, features: Path, tmp_path: Path) -> None:
    data = data_of(own_clips, tmp_path, **settings(own_clips, poses=None, features_fps=None))
    table = own_clips / "table.csv"
    lines = table.read_text().splitlines()
    table.write_text("\n".join([lines[0] + ",features_fps,features", *(f"{line},{FPS}," for line in lines[1:])]) + "\n")
    corpus = Corpus.open(ensure_corpus(data))
    assert corpus.landmark_set.num_points == 0 and frame_of(data) == (corpus.landmark_set, WIDTH)
    clip = corpus.splits["train"].clip(0)
    assert clip.features.shape == (len(clip.video_features), 0, 3) and clip.hands_visible == 1.0
    assert (
        corpus.splits["train"].frames[0]
        == len(clip.video_features)
        == round((len(np.load(features / f"{clip.uid}.npy")) - 1) / FPS * 12.5 - 0.5 + 1e-6) + 1
    )
    there = load_from_disk(str(corpus.path))["train"][0]
    assert there["uid"] == clip.uid and "features" not in there
    np.testing.assert_array_equal(np.array(there["video_features"], np.float16), clip.video_features)


def test_a_column_names_the_file_and_an_archive_holds_it(own_clips: Path, features: Path, tmp_path: Path) -> None:
    archive = tmp_path / "features.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for number, path in enumerate(sorted(features.iterdir())):
            file.write(path, f"i3d/{number:03d}.npy")
    names = {path.stem: f"i3d/{number:03d}" for number, path in enumerate(sorted(features.iterdir()))}
    table = own_clips / "table.csv"
    lines = table.read_text().splitlines()
    table.write_text("\n".join([lines[0] + ",i3d", *(f"{line},{names[line.split(',')[0]]}" for line in lines[1:])]))
    named = settings(own_clips, features=str(archive), columns={"features": "i3d"})
    corpus = Corpus.open(ensure_corpus(data_of(own_clips, tmp_path, **named)))
    plain = Corpus.open(ensure_corpus(data_of(own_clips, tmp_path, **settings(own_clips))))
    for mine, theirs in zip(corpus.splits["train"], plain.splits["train"], strict=True):
        np.testing.assert_array_equal(mine.video_features, theirs.video_features)


def test_clips_whose_features_cannot_be_used_are_listed(
    own_clips: Path, features: Path, tmp_path: Path, rows_of: Any
) -> None:
    (features / "train-00001.npy").unlink()
    write(features / "train-00002.npy", seconds_of(own_clips, "train-00002"), width=WIDTH + 2)
    write(features / "train-00003.npy", 3 * seconds_of(own_clips, "train-00003") + 5)
    values = np.load(features / "train-00004.npy")
    values[0, 1] = np.nan
    np.save(features / "train-00004.npy", values)
    (features / "train-00005.npy").write_bytes(b"\x93NUMPY")
    data = data_of(own_clips, tmp_path, **settings(own_clips, max_rejects=0.5))
    reasons = {row["uid"]: row["reason"] for row in rows_of(ensure_corpus(data) / "rejects.csv")}
    assert list(reasons) == [f"train-0000{number}" for number in range(1, 6)]
    for number, word in enumerate(("no features file", f"{WIDTH + 2} ", "rates disagree", "NaN", "read"), start=1):
        assert word in reasons[f"train-0000{number}"], reasons
    with pytest.raises(TooManyRejects):
        ensure_corpus(data.model_copy(update={"max_rejects": 0.1, "cache": str(tmp_path / "another")}))


def test_hdf5_files_give_the_corpus_that_npy_files_give(
    own_clips: Path, features: Path, tmp_path: Path, rows_of: Any
) -> None:
    plain = Corpus.open(ensure_corpus(data_of(own_clips, tmp_path, **settings(own_clips))))
    for path in sorted(features.iterdir()):
        values = np.load(path)
        path.unlink()
        with h5py.File(path.with_suffix(".h5"), "w") as file:
            if path.stem != "train-00001":
                file.create_dataset("clip/hidden", data=values, chunks=True, compression="gzip").attrs["fps"] = FPS
            if path.stem == "train-00002":
                file["another"] = values
    (features / "train-00003.h5").write_bytes((features / "train-00003.h5").read_bytes()[:-100])
    data = data_of(own_clips, tmp_path, **settings(own_clips, features_fps=None, max_rejects=0.5))
    corpus = Corpus.open(ensure_corpus(data))
    reasons = {row["uid"]: row["reason"] for row in rows_of(corpus.path / "rejects.csv")}
    assert list(reasons) == [f"train-0000{number}" for number in range(1, 4)]
    for reason, word in zip(reasons.values(), ("none", "another, clip/hidden", "truncated"), strict=True):
        assert word in reason, reasons
    theirs = {clip.uid: clip.video_features for clip in plain.splits["train"]}
    for clip in corpus.splits["train"]:
        np.testing.assert_array_equal(clip.video_features, theirs[clip.uid])


def test_a_frame_rate_that_nobody_gives_is_an_error_before_preparation(
    own_clips: Path, features: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="rate") as raised:
        ensure_corpus(data_of(own_clips, tmp_path, **settings(own_clips, features_fps=None)))
    assert raised.value.exit_code == 2 and "data.features_fps" in raised.value.hint


@pytest.mark.parametrize(("place", "named"), [("nowhere", "nowhere"), ("poses", ".h5")])
def test_a_place_without_features_is_an_error(own_clips: Path, tmp_path: Path, place: str, named: str) -> None:
    with pytest.raises(UserError, match=named) as raised:
        ensure_corpus(data_of(own_clips, tmp_path, features=str(own_clips / place), features_fps=FPS))
    assert "data.features" in raised.value.hint


def test_a_corpus_of_poses_is_written_as_before(clips: Path, tmp_path: Path) -> None:
    path = ensure_corpus(data_of(clips, tmp_path))
    info = json.loads((path / "train" / "dataset_info.json").read_text())["features"]
    assert "video_features" not in info and "features" in info
    assert io.BytesIO((path / "README.md").read_bytes()).getvalue().count(b"Features of another network: none") == 1


def test_corpora_of_two_widths_are_not_mixed(tmp_path: Path) -> None:
    def packed(name: str, width: int) -> Corpus:
        array = np.zeros((4, width), np.float16)
        clip = Clip("clip", "text", np.empty((4, 0, 3), np.float16), video_features=array)
        return write_corpus(tmp_path / name, {"train": [clip]}, NO_LANDMARKS, 12.5)

    corpora = [packed("narrow", 6), packed("wide", 8), packed("narrow_too", 6)]
    parts = [MixPart(corpus=str(corpus.path)) for corpus in corpora]
    with pytest.raises(UserError, match=r"wide .*features 6 and 8"):
        mix(parts[:2], corpora[:2])
    mixed = mix([parts[0], parts[2]], [corpora[0], corpora[2]])
    assert [clip.video_features.shape for clip in mixed.splits["train"]] == [(4, 6), (4, 6)]
