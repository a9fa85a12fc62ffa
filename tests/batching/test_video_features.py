"""Features of another network in batches: padded as they are, and changed in time together with the poses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.batching.conftest import make_clip
from tests.written_corpora import write_corpus
from toolkit.batching.collate import Batch, pad
from toolkit.batching.loader import evaluation_batches, train_batches
from toolkit.corpus.packed import Clip, Clips, Corpus
from toolkit.poses.landmarks import load_landmark_set

WIDTH = 5
IN_TIME = {"speed": 0.4, "time_warp": 0.3, "frame_drop": 0.2, "temporal_crop": 0.3}


def clip_of(index: int, frames: int) -> Clip:
    """A clip whose first feature is the time, and so is the x of its first landmark."""
    time = np.arange(frames, dtype=np.float16) / 8
    clip = make_clip(index, frames)
    clip.features[:, 0] = time[:, None]
    features = np.random.default_rng(index).normal(size=(frames, WIDTH)).astype(np.float16)
    features[:, 0] = time
    return replace(clip, video_features=features)


@pytest.fixture(scope="module")
def seen_corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    frames = np.random.default_rng(0).integers(5, 60, size=24)
    clips = [clip_of(index, int(count)) for index, count in enumerate(frames)]
    folder = tmp_path_factory.mktemp("data") / "seen"
    return write_corpus(folder, {"train": clips}, load_landmark_set("hands_body_50"), fps=12.5)


def batches_of(corpus: Corpus, tokenizer: object, resolved: object) -> list[Batch]:
    stream = train_batches(corpus.splits["train"], tokenizer, resolved, landmark_set=corpus.landmark_set)  # type: ignore[arg-type]
    return [batch for step in stream for batch in step]


def test_they_are_padded_with_zeros_and_stay_float16() -> None:
    clips = [clip_of(0, 7), clip_of(1, 4)]
    batch = pad(Clips.of(clips), [0, ~1], frames=9)
    assert batch.video_features is not None and batch.video_features.dtype == torch.float16
    assert batch.video_features.shape == (2, 9, WIDTH) and batch.frame_mask.shape == (2, 9)
    for row, clip in enumerate(clips):
        frames = len(clip.features)
        assert np.array_equal(batch.video_features[row, :frames].numpy(), clip.video_features)
        assert not batch.video_features[row, frames:].any()
    assert set(batch.inputs) == {"poses", "visible", "frame_mask", "video_features"}
    assert "video_features" not in pad(Clips.of([make_clip(0, 4)]), [0]).inputs


def test_evaluation_reads_them_as_they_are(seen_corpus: Corpus, tokenizer: object) -> None:
    split = seen_corpus.splits["train"]
    for batch in evaluation_batches(split, tokenizer, 200):
        for row, clip in enumerate(batch.clips.tolist()):
            features = split.clip(clip).video_features
            assert np.array_equal(batch.video_features[row, : len(features)].numpy(), features)


@pytest.mark.parametrize("padding", ["longest", "ladder"])
def test_they_move_in_time_with_the_poses(
    seen_corpus: Corpus, tokenizer: object, resolve: Callable[..., object], padding: str
) -> None:
    changed = 0
    for batch in batches_of(seen_corpus, tokenizer, resolve(augmentation=IN_TIME, padding=padding)):
        assert batch.video_features.shape[:2] == batch.frame_mask.shape
        assert not batch.video_features[~batch.frame_mask].any()
        times = batch.video_features[..., 0].float()
        shown = batch.visible[..., 0]
        torch.testing.assert_close(times[shown], batch.poses[..., 0, 0][shown], atol=0.02, rtol=0.01)
        for row, clip in enumerate(batch.clips.tolist()):
            changed += int(batch.frame_mask[row].sum()) != int(seen_corpus.splits["train"].frames[clip])
    assert changed > 10


def test_masking_hides_spans_of_features_and_no_pose(
    seen_corpus: Corpus, tokenizer: object, resolve: Callable[..., object]
) -> None:
    strengths = {"noise": 0.05, **IN_TIME}
    plain, masked = (
        {batch.uids[row]: (batch.poses[row], batch.video_features[row], int(batch.frame_mask[row].sum()))
         for batch in batches_of(seen_corpus, tokenizer, resolve(augmentation=strengths | {"feature_mask": share}))
         for row in range(len(batch))}
        for share in (0.0, 0.5)
    )  # fmt: skip
    hidden = []
    for uid, (poses, features, frames) in plain.items():
        assert torch.equal(poses, masked[uid][0]), "changes of the poses are those without a mask"
        lost = (features[:frames] != masked[uid][1][:frames]).any(dim=1)
        assert not masked[uid][1][:frames][lost].any()
        places = lost.nonzero().flatten().tolist()
        assert places == list(range(places[0], places[-1] + 1)) if places else True
        hidden.append(len(places) / frames)
    assert max(hidden) <= 0.5 and 0.1 < np.mean(hidden) < 0.4


def test_a_clip_is_changed_alike_in_any_batch(
    seen_corpus: Corpus, tokenizer: object, resolve: Callable[..., object]
) -> None:
    strengths = IN_TIME | {"feature_mask": 0.4}
    first, second = (
        {batch.uids[row]: batch.video_features[row][batch.frame_mask[row]]
         for batch in batches_of(seen_corpus, tokenizer, resolve(micro=micro, accumulation=12 // micro,
                                                                 augmentation=strengths))
         for row in range(len(batch))}
        for micro in (4, 6)
    )  # fmt: skip
    assert first.keys() == second.keys()
    assert all(torch.equal(first[uid], second[uid]) for uid in first)


def test_features_alone_are_augmented_too(tmp_path: Path, tokenizer: object, resolve: Callable[..., object]) -> None:
    from toolkit.poses.landmarks import NO_LANDMARKS

    clips = [replace(clip_of(n, 20 + n), features=np.empty((20 + n, 0, 3), np.float16)) for n in range(8)]
    corpus = write_corpus(tmp_path / "alone", {"train": clips}, NO_LANDMARKS, fps=12.5)
    every = {"rotation": 10, "scale": 0.2, "noise": 0.1, "mirror": 1.0, "hand_drop": 0.5, **IN_TIME}
    for batch in batches_of(corpus, tokenizer, resolve(augmentation=every)):
        assert batch.poses.shape[2:] == (0, 3) and batch.num_frames == int(batch.frame_mask.sum())
        times = batch.video_features[..., 0].float()
        assert all((times[row, : int(mask.sum())].diff() >= 0).all() for row, mask in enumerate(batch.frame_mask))
