"""Collation: masks of missing landmarks and padding, fillers without labels, truncated targets with their end."""

import numpy as np
import pytest
import torch
from transformers import ByT5Tokenizer

from toolkit.batching.collate import IGNORED_LABEL, collate, target_labels
from toolkit.corpus.packed import Clip, Clips
from toolkit.models.tokenizers import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> ByT5Tokenizer:
    return ByT5Tokenizer()


def clip(frames: int, text: str = "ab", fill: float = 1.0) -> Clip:
    return Clip(uid=f"u{frames}", text=text, features=np.full((frames, 4, 3), fill, np.float16))


def test_shapes_types_and_masks(tokenizer):
    batch = collate(Clips.of([clip(5, "abc"), clip(2, "a")]), [7, 3], tokenizer, max_target_tokens=16)
    assert batch.poses.shape == (2, 5, 4, 3) and batch.poses.dtype == torch.float32
    assert batch.visible.shape == (2, 5, 4) and batch.visible.dtype == torch.bool
    assert batch.frame_mask.tolist() == [[True] * 5, [True, True, False, False, False]]
    assert batch.visible.all(-1).equal(batch.frame_mask)
    assert (batch.poses[1, 2:] == 0).all() and (batch.poses[1, :2] == 1).all()
    assert batch.uids == ["u5", "u2"] and batch.texts == ["abc", "a"] and batch.clips.tolist() == [7, 3]
    assert tokenizer.decode(batch.labels[0][:3]) == "abc"
    assert batch.labels[1].tolist() == [ord("a") + 3, tokenizer.eos_token_id, IGNORED_LABEL, IGNORED_LABEL]
    assert (batch.num_frames, batch.num_target_tokens, batch.num_clips, len(batch)) == (7, 6, 2, 2)
    assert batch.labelled.tolist() == [0, 1, 2, 3, 4, 5]


def test_a_missing_landmark_is_zero_and_not_visible(tokenizer):
    one = clip(3)
    one.features[1, 2] = np.nan
    batch = collate(Clips.of([one]), [0], tokenizer, max_target_tokens=16)
    assert not batch.visible[0, 1, 2]
    assert batch.visible.sum() == 11
    assert (batch.poses[0, 1, 2] == 0).all()
    assert torch.isfinite(batch.poses).all()


def test_a_clip_at_the_origin_is_seen(tokenizer):
    assert collate(Clips.of([clip(2, fill=0.0)]), [0], tokenizer, max_target_tokens=16).visible.all()


def test_read_only_features_are_accepted(tokenizer):
    one = clip(3)
    one.features.flags.writeable = False
    assert collate(Clips.of([one]), [0], tokenizer, max_target_tokens=16).poses.sum() == 36


def test_a_filler_has_no_labels_and_no_frames(tokenizer):
    batch = collate(Clips.of([clip(5), clip(4)]), [2, ~6], tokenizer, max_target_tokens=16)
    assert batch.is_filler.tolist() == [False, True]
    assert batch.clips.tolist() == [2, 6]
    assert (batch.labels[1] == IGNORED_LABEL).all()
    assert (batch.num_frames, batch.num_target_tokens, batch.num_clips) == (5, 3, 1)
    assert batch.labelled.tolist() == [0, 1, 2]


@pytest.mark.parametrize("kind", ["bytes", "trained"])
def test_a_truncated_text_keeps_its_end_of_sentence(tokenizer, kind):
    texts = ["one two three four five six seven", "one", ""]
    chosen = tokenizer if kind == "bytes" else train_tokenizer(texts)
    whole, labels = target_labels(texts, chosen, 100), target_labels(texts, chosen, 5)
    assert labels.shape == (3, 5)
    assert labels[0].tolist() == [*whole[0, :4].tolist(), chosen.eos_token_id]
    ends = [row[row != IGNORED_LABEL][-1].item() for row in labels]
    assert ends == [chosen.eos_token_id] * 3


def test_moving_a_batch_keeps_all_of_it(tokenizer):
    batch = collate(Clips.of([clip(3)]), [0], tokenizer, max_target_tokens=16)
    moved = batch.to("meta")
    assert all(getattr(moved, name).is_meta for name in ("poses", "visible", "frame_mask", "labels", "labelled"))
    assert not moved.is_filler.is_meta and not moved.clips.is_meta, "they are read by the host"
    assert moved.uids == batch.uids and moved.num_frames == batch.num_frames
    assert not batch.poses.is_meta


def test_halves_of_a_batch_are_those_of_its_clips(tokenizer):
    clips, places = [clip(5, "abc"), clip(2, "a"), clip(4, "abcd")], [7, 3, ~5]
    batch = collate(Clips.of(clips), places, tokenizer, max_target_tokens=16)
    first, second = batch.halves()
    assert (first.uids, second.uids) == (["u5"], ["u2", "u4"])
    assert (first.clips.tolist(), second.clips.tolist()) == ([7], [3, 5])
    assert (first.num_clips, first.num_frames, second.num_clips, second.num_frames) == (1, 5, 1, 2)
    assert second.is_filler.tolist() == [False, True]
    for half in (first, second):
        counted = (half.labels.flatten() != IGNORED_LABEL).nonzero().flatten()
        assert half.labelled.tolist() == counted.tolist()
        assert half.poses.shape[1:] == batch.poses.shape[1:]
    assert torch.cat([first.poses, second.poses]).equal(batch.poses)


def test_clips_of_another_type_are_refused_and_never_read_as_float16(tokenizer):
    one = Clip(uid="a", text="b", features=np.ones((4, 4, 3), np.float32))
    with pytest.raises(TypeError, match="float16"):
        collate(Clips.of([one, clip(2)]), [0, 1], tokenizer, max_target_tokens=16)
