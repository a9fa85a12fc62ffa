"""Floors: what one scores without watching."""

import pytest

from toolkit.evaluation.floors import floors, typical_sentence
from toolkit.evaluation.metrics import score


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


def test_without_training_texts_there_are_no_floors():
    with pytest.raises(ValueError, match="at least one training text"):
        floors([], ["a"])
