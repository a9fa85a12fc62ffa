"""How many micro-batches of which size a step has, in words, too; tests/batching/test_order.py sees it happen."""

import pytest

from toolkit.recipe.batches import batch_in_words, micro_batch_sizes, num_micro_batches


@pytest.mark.parametrize(
    ("clips", "world_size", "limit", "number", "sizes", "words"),
    [
        (128, 8, 16, 1, (16, 16), "128 clips = 8 ranks x 1 micro-batch of 16"),
        (32, 8, 16, 1, (4, 4), "32 clips = 8 ranks x 1 micro-batch of 4"),
        (128, 6, 16, 2, (10, 11), "128 clips = 6 ranks x 2 micro-batches of 10 or 11"),
        (8, 1, 3, 3, (2, 3), "8 clips = 1 rank x 3 micro-batches of 2 or 3"),
        (7, 2, 1, 4, (0, 1), "7 clips = 2 ranks x 4 micro-batches of 0 or 1"),
    ],
)
def test_as_few_as_the_limit_allows_and_as_equal_as_they_can_be(clips, world_size, limit, number, sizes, words):
    assert num_micro_batches(clips, world_size, limit) == number
    assert micro_batch_sizes(clips, world_size, limit) == sizes
    assert batch_in_words(clips, world_size, limit, None) == words


def test_a_frame_budget_leaves_the_number_open():
    words = "128 clips over 6 ranks, in micro-batches of at most 16 clips and 4000 frames"
    assert batch_in_words(128, 6, 16, 4000) == words
