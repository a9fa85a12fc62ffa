"""Intervals and p-values are sacreBLEU's, and mean what they should."""

import numpy as np
import pytest
from sacrebleu.metrics import BLEU, CHRF
from sacrebleu.significance import PairedTest

from toolkit.scoring.addends import measure
from toolkit.scoring.resampling import compare, intervals, resample
from toolkit.scoring.table import comparison_table, verdict

rng = np.random.default_rng(5)
WORDS = [f"word{index}" for index in range(40)]
REFERENCES = [" ".join(rng.choice(WORDS, size=rng.integers(4, 12))) for _ in range(60)]


def spoil(share: float) -> list[str]:
    """The references with a share of their words exchanged."""
    return [" ".join(word if rng.random() > share else "wrong" for word in text.split()) for text in REFERENCES]


GOOD, BAD = spoil(0.1), spoil(0.4)


def test_intervals_are_those_of_sacrebleu():
    own = intervals(measure(GOOD, REFERENCES))
    for name, metric in (("bleu4", BLEU()), ("chrf", CHRF(word_order=2))):
        score = metric.corpus_score(GOOD, [REFERENCES], n_bootstrap=1000)
        low, high = own[name]
        assert (high - low) / 2 == pytest.approx(score._ci, abs=1e-3)


def test_p_values_are_those_of_sacrebleu():
    similar = [*GOOD[:57], *BAD[57:]]
    for second in (BAD, similar):
        metrics = {"bleu4": BLEU(), "chrf": CHRF(word_order=2)}
        _, expected = PairedTest([("a", GOOD), ("b", second)], metrics, [REFERENCES], test_type="bs")()
        own = compare(measure(GOOD, REFERENCES), measure(second, REFERENCES))
        for name, (_, result) in zip(metrics, list(expected.values())[1:], strict=True):
            assert own[name].p_value == pytest.approx(result.p_value, abs=2.1e-3)


def test_resampled_scores_are_scores_of_resampled_texts():
    measures = measure(GOOD, REFERENCES, frequent_words={"word1", "word2"})
    drawn = np.random.default_rng(12345).choice(60, size=(3, 60), replace=True)
    for row, indices in enumerate(drawn):
        texts = [[texts[index] for index in indices] for texts in (GOOD, REFERENCES)]
        for part in measure(*texts, frequent_words={"word1", "word2"}):
            for name, value in part.values(part.addends.sum(axis=0)).items():
                assert resample(measures, 3)[name][row] == pytest.approx(value, abs=1e-6), name


def test_draws_in_portions_are_those_of_the_whole(monkeypatch):
    measures = measure(GOOD, REFERENCES)
    whole = resample(measures, 20)
    monkeypatch.setattr("toolkit.scoring.resampling._DRAWS_AT_ONCE", 7 * 60)
    for name, values in resample(measures, 20).items():
        assert values == pytest.approx(whole[name])


def test_a_real_difference_is_shown_and_none_is_not():
    worse = compare(measure(GOOD, REFERENCES), measure(BAD, REFERENCES))
    assert worse["bleu4"].p_value < 0.01 and worse["bleu4"].interval[1] < 0 < worse["wer"].interval[0]
    assert verdict("bleu4", worse["bleu4"], "A", "B") == verdict("wer", worse["wer"], "A", "B") == "A is better"
    same = compare(measure(GOOD, REFERENCES), measure(GOOD, REFERENCES))
    assert {item.p_value for item in same.values()} == {1.0}
    assert verdict("bleu4", same["bleu4"], "A", "B") == "no difference shown"
    table = comparison_table("A", "B", worse).splitlines()
    assert table[0].split()[:3] == ["A", "B", "difference"] and "A is better" in table[2]


def test_only_translations_of_the_same_clips_are_compared():
    with pytest.raises(AssertionError, match="clips"):
        compare(measure(GOOD, REFERENCES), measure(GOOD[:5], REFERENCES[:5]))
