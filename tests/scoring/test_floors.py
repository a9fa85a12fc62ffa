"""Floors: what one scores without watching."""

import numpy as np
import pytest

from toolkit.scoring.floors import floors, other_clips, typical_sentence
from toolkit.scoring.metrics import score


def test_the_most_frequent_text_is_the_typical_one():
    assert typical_sentence(["b", "a", "b", "c"]) == "b"


def test_among_equally_frequent_texts_it_is_of_median_length_and_of_common_words():
    texts = ["yes", "the cat sleeps", "the dog sleeps", "a bird sings", "one two three four five six seven"]
    assert typical_sentence(texts) == "the cat sleeps"
    assert typical_sentence(texts[::-1]) == "the cat sleeps"


def test_floors_are_the_scores_of_the_sentences_that_they_name():
    train = ["it rains", "it rains", "the sun shines in the north"]
    references = ["it rains today", "the sun shines", "it snows"]
    result = floors(train, references, seed=3)
    assert list(result) == ["constant", "random"]
    assert result["constant"] == score(["it rains"] * 3, references)
    assert result["random"] == floors(train, references, seed=3)["random"]
    assert all(scores.clips == 3 for scores in result.values())


def test_random_floor_draws_different_sentences_for_different_seeds():
    train = [f"sentence number {index}" for index in range(1000)]
    references = [f"sentence number {index}" for index in range(0, 1000, 10)]
    assert len({floors(train, references, seed=seed)["random"].cer for seed in range(4)}) > 1


def test_settings_reach_the_scores():
    lower = floors(["IT RAINS"], ["it rains"], tokenize="char", lowercase=True)["constant"]
    assert lower.wer == 0 and "tok:char" in lower.signature["bleu"] and "case:lc" in lower.signature["bleu"]


def test_the_other_clip_is_the_nearest_in_length_that_says_something_else():
    frames = np.array([50, 10, 12, 11, 90])
    assert other_clips(frames, ["a", "b", "c", "b", "d"]) == [4, 2, 0, 2, 1]
    assert other_clips(frames, ["a"] * 5) == [0, 1, 2, 3, 4]
    assert other_clips(frames[:1], ["a"]) == [0]


def test_shuffled_and_control_are_made_of_the_models_own_translations():
    references = [f"sentence number {index}" for index in range(50)]
    found = floors(["it rains"], references, hypotheses=references, frames=np.arange(50))
    assert list(found) == ["constant", "random", "shuffled", "control"]
    # All share "sentence number", and none says its own clip's number.
    assert found["control"].wer == pytest.approx(1 / 3) and found["control"].rouge_l == pytest.approx(200 / 3)
    assert 0 < found["shuffled"].wer <= 1 / 3
