"""A corpus without training clips, or another one than the run was started with, is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.written_corpora import write_corpus
from toolkit.checkpointing import run_directory
from toolkit.checkpointing.run_directory import PROCESSOR
from toolkit.corpus.packed import Clip, Corpus
from toolkit.errors import UserError
from toolkit.models.processor import PoseFeatureExtractor, PoseProcessor
from toolkit.models.tokenizers import make_tokenizer
from toolkit.poses.features import NORMALISATION
from toolkit.poses.landmarks import LandmarkSet, load_landmark_set
from toolkit.recipe.resolve import ResolvedRun
from toolkit.training.start import check_corpus


def corpus_of(folder: Path, landmarks: LandmarkSet, fps: float = 12.5, normalisation: str = NORMALISATION) -> Corpus:
    features = np.zeros((3, landmarks.num_points, landmarks.num_channels), np.float32)
    return write_corpus(folder, {"train": [Clip("a", "text", features)]}, landmarks, fps, normalisation)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Directory of a run with hands_body_50 at 12.5 fps."""
    extractor = PoseFeatureExtractor(landmark_set=load_landmark_set("hands_body_50").to_dict(), fps=12.5)
    PoseProcessor(extractor, make_tokenizer("bytes", [])).save_pretrained(tmp_path / "run" / PROCESSOR)
    return tmp_path / "run"


def test_the_same_features_are_accepted(run_dir: Path, tmp_path: Path) -> None:
    landmarks = replace(load_landmark_set("hands_body_50"), name="another_name")
    check_corpus(corpus_of(tmp_path / "corpus", landmarks), run_dir)


@pytest.mark.parametrize(
    ("landmarks", "fps", "named"),
    [
        ("hands_body_50", 25.0, ["fps", "12.5", "25.0"]),
        ("isign_76", 12.5, ["hands_body_50", "50 points", "isign_76", "76 points"]),
        ("unisign_69", 12.5, ["hands_body_50", "unisign_69", "69 points", "x y confidence"]),
    ],
)
def test_other_features_are_refused(
    run_dir: Path, tmp_path: Path, landmarks: str, fps: float, named: list[str]
) -> None:
    corpus = corpus_of(tmp_path / "corpus", load_landmark_set(landmarks), fps)
    with pytest.raises(UserError) as refusal:
        check_corpus(corpus, run_dir)
    assert all(part in refusal.value.message for part in [str(run_dir), *named])
    assert "--new" in refusal.value.hint
    check_corpus(corpus, None)


def test_parts_relative_to_an_anchor_are_other_features(run_dir: Path, tmp_path: Path) -> None:
    landmarks = load_landmark_set("hands_body_50")
    wrist = landmarks.parts["left_hand"][0]
    relative = replace(landmarks, anchors={"left_hand": wrist})
    with pytest.raises(UserError, match="left_hand"):
        check_corpus(corpus_of(tmp_path / "corpus", relative), run_dir)


def test_another_normalisation_is_refused(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path / "corpus", load_landmark_set("hands_body_50"), normalisation="none")
    with pytest.raises(UserError, match="'none'"):
        check_corpus(corpus, None)


def test_no_training_clips(tmp_path: Path) -> None:
    landmarks = load_landmark_set("hands_body_50")
    corpus = write_corpus(tmp_path / "corpus", {"test": []}, landmarks, 12.5, NORMALISATION)
    with pytest.raises(UserError, match="clips") as refusal:
        check_corpus(corpus, None)
    assert str(corpus.path) in refusal.value.message and "split" in refusal.value.hint


def clips_of(folder: Path, *clips: Clip) -> Corpus:
    return write_corpus(folder, {"train": list(clips)}, load_landmark_set("hands_body_50"), 12.5, NORMALISATION)


def test_the_same_clips_may_be_elsewhere_and_other_clips_are_refused(
    resolve: Callable[..., ResolvedRun], tmp_path: Path
) -> None:
    landmarks = load_landmark_set("hands_body_50")
    one = Clip("a", "text", np.zeros((3, landmarks.num_points, landmarks.num_channels), np.float32))
    began = clips_of(tmp_path / "here", one)
    run_dir = resolve().run_dir
    run_directory.start(resolve(), began)
    check_corpus(clips_of(tmp_path / "there", one), run_dir)
    shutil.rmtree(tmp_path / "here")
    for other in (replace(one, uid="b"), replace(one, text="another text"), replace(one, features=one.features[:2])):
        with pytest.raises(UserError, match="clips") as refusal:
            check_corpus(clips_of(tmp_path / "here", other), run_dir)
        assert "--new" in refusal.value.hint and "run.dir" in refusal.value.hint
        shutil.rmtree(tmp_path / "here")
    check_corpus(clips_of(tmp_path / "here", replace(one, text="another text")), None)


def test_other_lengths_are_other_features(resolve: Callable[..., ResolvedRun], tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path / "corpus", load_landmark_set("hands_body_50"))
    run_directory.start(resolve(), corpus)
    other = replace(corpus, metadata=replace(corpus.metadata, too_long="reject"))
    with pytest.raises(UserError, match="clips"):
        check_corpus(other, resolve().run_dir)
