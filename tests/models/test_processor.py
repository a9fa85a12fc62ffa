"""A clip means the same to a model at translation as it did at training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import ByT5Tokenizer

from tests.written_corpora import write_corpus
from toolkit.batching.collate import collate
from toolkit.corpus.packed import Clip, Clips
from toolkit.models import PoseFeatureExtractor, PoseProcessor
from toolkit.poses.features import NORMALISATION, extract_features, read_clip
from toolkit.poses.landmarks import NO_LANDMARKS, load_landmark_set
from toolkit.poses.pose_file import PoseError
from toolkit.poses.video_features import RawFeatures, Recording


def test_a_file_becomes_what_training_read(tmp_path: Path, processor: PoseProcessor, pose_files: list[Path]) -> None:
    landmark_set = load_landmark_set("hands_body_50")
    clips = [
        Clip(path.stem, "word", extract_features(path.read_bytes(), landmark_set, 12.5).values) for path in pose_files
    ]
    corpus = write_corpus(tmp_path / "corpus", {"train": clips}, landmark_set, 12.5, NORMALISATION)
    packed = corpus.splits["train"].read(range(len(pose_files)))
    batch = collate(packed, range(len(packed)), processor.tokenizer, max_target_tokens=9)
    inputs = processor(pose_files)
    assert torch.equal(inputs["poses"], batch.poses)
    assert torch.equal(inputs["visible"], batch.visible)
    assert torch.equal(inputs["frame_mask"], batch.frame_mask)


@pytest.mark.parametrize("poses", [True, False])
def test_features_from_files_become_what_training_read(poses: bool, tmp_path: Path, pose_files: list[Path]) -> None:
    landmark_set = load_landmark_set("hands_body_50") if poses else NO_LANDMARKS
    files, clips = [], []
    for path in pose_files:
        pose = read_clip(path.read_bytes())
        values = np.random.default_rng(pose.num_frames).normal(size=(pose.num_frames, 6)).astype(np.float32)
        np.save(tmp_path / f"{path.stem}.npy", values)
        files.append(tmp_path / f"{path.stem}.npy")
        found = Recording(pose if poses else None, RawFeatures(values, pose.fps)).sampled(landmark_set, 12.5)
        clips.append(Clip(path.stem, "word", found.features, video_features=found.video_features))
    corpus = write_corpus(tmp_path / "corpus", {"train": clips}, landmark_set, 12.5, NORMALISATION)
    tokenizer = ByT5Tokenizer()
    batch = collate(Clips.of(list(corpus.splits["train"])), range(len(clips)), tokenizer, max_target_tokens=9)
    processor = PoseProcessor(PoseFeatureExtractor(landmark_set.to_dict(), 12.5, num_features=6), tokenizer)
    given = pose_files if poses else [None] * len(files)
    inputs = processor(given, video_features=files, features_fps=pose.fps)
    assert set(inputs) == set(batch.inputs) == {"poses", "visible", "frame_mask", "video_features"}
    assert all(torch.equal(inputs[name], batch.inputs[name]) for name in inputs)
    with pytest.raises(PoseError, match="features"):
        processor(pose_files)


def test_arrays_of_other_types_and_orders_are_padded_alike(processor: PoseProcessor, pose_files: list[Path]) -> None:
    arrays = [processor.feature_extractor.features(path) for path in pose_files]
    wanted = processor.feature_extractor.pad(arrays)
    given = [np.asfortranarray(array.astype(np.float32)) for array in arrays]
    found = processor.feature_extractor.pad(given)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_bytes_and_paths_are_the_same(processor: PoseProcessor, pose_files: list[Path]) -> None:
    by_path, by_bytes = processor(pose_files), processor([path.read_bytes() for path in pose_files])
    for key in by_path:
        assert torch.equal(by_path[key], by_bytes[key])


def test_missing_landmarks_are_zero_and_said_to_be_missing(processor: PoseProcessor, pose_files: list[Path]) -> None:
    inputs = processor(pose_files)
    hidden = ~inputs["visible"]
    assert hidden.any(), "in these clips the unused hand is missing"
    assert not inputs["poses"][hidden].any()
    assert np.isfinite(inputs["poses"].numpy()).all()


def test_a_broken_file_is_refused_with_its_reason(tmp_path: Path, processor: PoseProcessor) -> None:
    broken = tmp_path / "broken.pose"
    broken.write_bytes(b"not a pose file")
    with pytest.raises(PoseError):
        processor([broken])


def test_another_normalisation_is_refused() -> None:
    with pytest.raises(ValueError, match="hips"):
        PoseFeatureExtractor(normalisation="hips")


def test_ids_that_no_token_has_are_no_text(processor: PoseProcessor) -> None:
    """A padded embedding lets an untrained model write them; ByT5's tokenizer cannot decode them."""
    own = PoseProcessor(processor.feature_extractor, ByT5Tokenizer())
    ids = [ord("a") + 3, len(own.tokenizer), ord("b") + 3, 100_000]
    assert own.batch_decode([ids]) == own.batch_decode(torch.tensor([ids])) == ["ab"]
