"""Batches on a ladder hold what batches padded to their longest clip hold, in few shapes."""

import pytest
import torch

from tests.batching.test_loader import ALL_ON, assert_same, by_clip
from toolkit.batching.collate import IGNORED_LABEL
from toolkit.batching.ladder import token_rungs, training_ladder
from toolkit.batching.loader import evaluation_batches, train_batches


@pytest.mark.parametrize("budget", [None, 240])
@pytest.mark.parametrize("world_size", [1, 3])
def test_a_ladder_changes_the_padding_alone(corpus, resolve, train, world_size, budget):
    augmentation = ALL_ON | {"frame_drop": 0.2, "speed": 0.5}
    shared = {"data": {"max_frames": 70}, "augmentation": augmentation}
    alone = train(resolve(1, 8, 1, **shared), epoch=1)
    settings = {"global_batch_size": 8, "micro_batch_frames": budget}
    resolved = resolve(world_size, 8, 1, padding="ladder", training=settings, **shared)
    ladder = training_ladder(corpus.splits["train"].frames, resolved.recipe)
    ranks = [train(resolved, epoch=1, rank=rank) for rank in range(world_size)]
    for index, step in enumerate(alone):
        together = by_clip([steps[index] for steps in ranks])
        expected = by_clip([step])
        assert together.keys() == expected.keys()
        assert all(torch.equal(together[uid], expected[uid]) for uid in expected)
        assert len({len(steps[index]) for steps in ranks}) == 1
    batches = [batch for steps in ranks for step in steps for batch in step]
    for batch in batches:
        assert batch.poses.shape[:2] == batch.visible.shape[:2] == batch.frame_mask.shape
        assert batch.frame_mask.shape[1] in ladder.frames and batch.labels.shape[1] in ladder.tokens
        assert budget is None or len(batch) == 1 or batch.frame_mask.numel() <= budget
        assert not batch.poses[~batch.frame_mask].any() and not batch.visible[~batch.frame_mask].any()
        assert batch.num_target_tokens == (batch.labels != IGNORED_LABEL).sum()
        assert batch.num_frames == batch.frame_mask[~batch.is_filler].sum()
    assert sum(batch.num_frames for batch in batches) == sum(batch.num_frames for step in alone for batch in step)
    resumed = train(resolved, epoch=1, start_step=3)
    for one, other in zip(resumed, ranks[0][3:], strict=True):
        for first, second in zip(one, other, strict=True):
            assert_same(first, second)


def test_the_ladder_is_the_same_in_every_epoch_on_any_ranks(corpus, resolve, tokenizer):
    split = corpus.splits["train"]
    ladders = {
        train_batches(
            split,
            tokenizer,
            resolve(world_size, padding="ladder", augmentation={"speed": 0.3}),
            landmark_set=corpus.landmark_set,
            epoch=epoch,
            start_step=2,
            rank=rank,
        ).ladder
        for world_size, rank, epoch in ((1, 0, 0), (3, 2, 0), (3, 1, 5))
    }
    assert len(ladders) == 1 and None not in ladders
    plain = train_batches(split, tokenizer, resolve(), landmark_set=corpus.landmark_set)
    assert plain.ladder is None


def test_evaluation_on_rungs_has_one_number_of_clips_for_each_length(corpus, tokenizer):
    split = corpus.splits["train"]
    batches = list(evaluation_batches(split, tokenizer, 240, (16, 24, 40, 59)))
    assert sorted(uid for batch in batches for uid in batch.uids) == list(split.uids)
    shapes = {tuple(batch.frame_mask.shape) for batch in batches[:-1]}
    assert shapes <= {(4, 59), (6, 40), (10, 24), (15, 16)} and len(shapes) > 2


def test_prefixes_have_few_lengths(known_corpus, tokenizer, resolve):
    model = {"backbone": "t5_small", "prefix": "{language} {context}", "max_prefix_tokens": 64}
    stream = train_batches(
        known_corpus.splits["train"],
        tokenizer,
        resolve(padding="ladder", model=model),
        landmark_set=known_corpus.landmark_set,
    )
    for batch in (batch for step in stream for batch in step):
        assert batch.prefix_ids.shape[1] in token_rungs(64)
        for clip, ids in zip(batch.clips.tolist(), batch.prefix_ids, strict=True):
            assert tokenizer.decode(ids[ids >= 0]) == f"language{clip} context{clip}"
