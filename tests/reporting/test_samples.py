import base64
import dataclasses
import json
import re
import shutil
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolkit.errors import UserError
from toolkit.poses.landmarks import load_landmark_set
from toolkit.reporting.report import write_report
from toolkit.reporting.run_files import read_run
from toolkit.reporting.samples import chrf_by_length, find_corpus_of_run, histogram, pick_samples, predictions_of
from toolkit.reporting.skeletons import MARGIN, MISSING, SPAN, pack_clip, place_on_body
from toolkit.scoring.predictions import make_predictions


def unpacked(clip: dict, points: int) -> np.ndarray:
    return np.frombuffer(base64.b64decode(clip["data"]), "<i2").reshape(clip["frames"], points, 2)


def test_packed_landmarks_are_where_they_were():
    landmark_set = load_landmark_set("hands_body_50")
    features = np.random.default_rng(0).normal(size=(30, 50, 3)).astype(np.float16)
    features[3, 7] = features[:, 49] = np.nan
    clip = pack_clip(features, landmark_set, 12.5, 10**6)
    steps = unpacked(clip, 50)
    missing = (steps == MISSING).all(axis=2)
    assert np.array_equal(missing, np.isnan(features[..., 0])) and not (steps[~missing] < 0).any()
    # One scale for both directions: distances in the picture are the distances in shoulder widths.
    within = ~missing & (np.abs(features[..., :2].astype(np.float32)) < 2).all(axis=2)
    shown = (steps[within].astype(np.float64) - MARGIN) / SPAN
    true = features[within][:, :2].astype(np.float64)
    scale = np.ptp(true, axis=0) / np.ptp(shown, axis=0)
    assert scale[0] == pytest.approx(scale[1], rel=1e-3)
    assert np.abs((shown - shown[0]) * scale - (true - true[0])).max() < 2e-3
    assert clip["fps"] == 12.5 and clip["stride"] == 1


def test_long_clips_are_thinned_to_fit_and_keep_their_time():
    landmark_set = load_landmark_set("hands_body_50")
    clip = pack_clip(np.zeros((1000, 50, 3), np.float16), landmark_set, 25, 50_000)
    assert len(base64.b64decode(clip["data"])) <= 50_000
    assert clip["frames"] / clip["fps"] == pytest.approx(40, rel=0.01) and clip["stride"] == 4


def test_a_clip_without_any_landmark_is_drawn_empty():
    clip = pack_clip(np.full((5, 50, 3), np.nan, np.float16), load_landmark_set("hands_body_50"), 25, 1000)
    assert (unpacked(clip, 50) == MISSING).all()


def test_parts_relative_to_an_anchor_are_moved_to_the_body():
    landmark_set = load_landmark_set("unisign_69")
    places = np.zeros((2, landmark_set.num_points, 2), np.float32)
    wrist = landmark_set.position("POSE_LANDMARKS", "LEFT_WRIST")
    places[0, wrist], places[1, wrist] = (2, 3), np.nan
    moved = place_on_body(places, landmark_set)
    left_hand = list(landmark_set.parts["left_hand"])
    assert (moved[0, left_hand] == (2, 3)).all() and np.isnan(moved[1, left_hand]).all()
    lost = dataclasses.replace(landmark_set, anchors={"body": landmark_set.parts["body"][0]})
    assert np.isnan(place_on_body(places, lost)[:, list(lost.parts["body"])]).all()


@given(st.lists(st.tuples(st.integers(0, 60), st.floats(0, 100)), min_size=1, max_size=300))
def test_groups_by_length_hold_every_sentence_once(pairs):
    lengths, chrf = [length for length, _ in pairs], [value for _, value in pairs]
    groups = chrf_by_length(lengths, chrf)
    assert sum(group["clips"] for group in groups) == len(pairs) and len(groups) <= 8
    mean = sum(group["value"] * group["clips"] for group in groups) / len(pairs)
    assert mean == pytest.approx(sum(chrf) / len(chrf), abs=0.02)


@given(st.lists(st.integers(0, 500) | st.floats(0, 500), min_size=1, max_size=200), st.lists(st.integers(0, 9)))
def test_histograms_count_everything(first, second):
    found = histogram({"first": first, "second": second})
    assert found["series"].keys() == ({"first", "second"} if second else {"first"})
    for shares in found["series"].values():
        assert len(shares) == len(found["edges"]) - 1 <= 26 and sum(shares) == pytest.approx(1, abs=1e-3)
    assert all(low < high for low, high in pairwise(found["edges"]))


def test_no_values_have_no_histogram():
    assert histogram({"none": []}) == {"edges": [], "series": {}}


def test_samples_are_the_best_the_worst_and_others():
    texts = [f"sentence number {index}" for index in range(30)]
    rows = make_predictions([str(i) for i in range(30)], texts, texts)
    chrf = [float(index) for index in range(30)]
    chosen = pick_samples(rows, chrf, [3] * 30, seed=1)
    assert [sample["chrf"] for sample in chosen["best"]] == [29, 28, 27, 26, 25, 24]
    assert [sample["chrf"] for sample in chosen["worst"]] == [0, 1, 2, 3, 4, 5]
    assert len(chosen["random"]) == 6 and all(6 <= sample["chrf"] <= 23 for sample in chosen["random"])
    assert chosen == pick_samples(rows, chrf, [3] * 30, seed=1)
    assert [len(group) for group in pick_samples(rows[:3], chrf[:3], [3] * 3, seed=1).values()] == [3, 0, 0]


@pytest.fixture
def run(make_run, tmp_path):
    return make_run(tmp_path / "runs" / "mine", **{"data.cache": "prepared"})


def test_the_corpus_is_where_the_run_says(run):
    files = read_run(run)
    corpus = find_corpus_of_run(files, predictions_of(files))
    assert corpus is not None and corpus.path == run.parent / "corpus-of-mine" and not files.warnings


def test_a_run_copied_from_elsewhere_finds_the_corpus_with_its_clips(make_run, run, tmp_path, monkeypatch):
    make_run(tmp_path / "other", [("something else", "x")] * 24)
    prepared = tmp_path / "prepared"
    prepared.mkdir()
    (tmp_path / "corpus-of-other").rename(prepared / "a-others")
    (run.parent / "corpus-of-mine").rename(prepared / "b-mine")
    (prepared / "c-broken").mkdir()
    (prepared / "c-broken" / "corpus.json").write_text("{}")
    files = read_run(run)
    corpus = find_corpus_of_run(files, predictions_of(files))
    assert corpus is not None and corpus.path == prepared / "b-mine"


def test_without_a_corpus_there_are_no_skeletons_and_a_warning(run):
    shutil.rmtree(run.parent / "corpus-of-mine")
    files = read_run(run)
    assert find_corpus_of_run(files, predictions_of(files)) is None
    assert "--corpus" in files.warnings[-1]


def test_a_given_corpus_must_be_one(run, tmp_path):
    with pytest.raises(UserError, match=re.escape(str(tmp_path))):
        write_report(run, tmp_path)


def test_the_corpus_warns_of_leakage_and_rejects(run):
    path = run.parent / "corpus-of-mine" / "corpus.json"
    content = json.loads(path.read_text())
    content |= {"leakage": {"test_videos_in_train": 7, "x": 0}, "counts": {"rejects": 3}, "lacking": {"NOSE": 2}}
    path.write_text(json.dumps(content))
    page = write_report(run).read_text()
    assert "test videos in train 7" in page and "3 clips were rejected" in page and "1 landmarks of the set" in page


def test_a_page_stays_small_however_long_the_clips_are(make_run, tmp_path):
    run = make_run(tmp_path / "long", frames=3000, steps=4000)
    assert write_report(run).stat().st_size < 3_000_000
