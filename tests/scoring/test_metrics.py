"""Scores agree with sacreBLEU, jiwer and a plain ROUGE-L in four scripts and are defined everywhere."""

import re
import unicodedata

import jiwer
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sacrebleu.metrics import BLEU, CHRF

from toolkit.errors import UserError
from toolkit.scoring.addends import frequent_words
from toolkit.scoring.metrics import (
    SCORE_NAMES,
    higher_is_better,
    rouge_l,
    rouge_tokens,
    score,
    sentence_chrf,
)

# (hypothesis, reference) pairs as a translator of middling quality writes them.
ENGLISH = [
    ("the weather will be fine in the north tomorrow", "the weather will be fine in the north tomorrow"),
    ("I don't know where he lives.", "I do not know where she lives."),
    ("Put two cups of flour in a bowl", "First, put two cups of flour into a large bowl."),
    ("hello", "Good morning, everyone!"),
    ("we we we went went home home", "Yesterday we went home at 10:30."),
]
GERMAN = [
    ("am Samstag fällt in den Bergen Schnee", "am Samstag fällt in den höheren Bergen viel Schnee"),
    ("der Wind weht schwach bis mäßig", "der Wind weht schwach bis mäßig aus Südwest"),
    ("im Süden örtlich Gewitter", "im Süden gibt es örtlich kräftige Gewitter"),
    ("heute nacht neun grad", "heute Nacht neun Grad am Oberrhein und null Grad an den Alpen"),
]
CHINESE = [
    ("今天天气很好", "今天的天气非常好。"),
    ("我弟弟在医院工作", "我哥哥在北京的一家医院工作。"),
    ("你想喝什么", "你想喝点什么?"),
    ("他买了3本书和一支笔", "她昨天买了3本书。"),
]
HINDI = [
    ("मैं कल दिल्ली जाऊँगा", "मैं कल अपने भाई के साथ दिल्ली जाऊँगा।"),
    ("पानी बहुत ठंडा है", "यह पानी बहुत ठंडा है।"),
    ("बच्चे स्कूल में पढ़ते हैं", "बच्चे स्कूल में हिन्दी पढ़ते हैं।"),
    ("किताब मेज पर", "लाल किताब मेज़ पर रखी है।"),
]
SCRIPTS = {"english": ENGLISH, "german": GERMAN, "chinese": CHINESE, "hindi": HINDI}


def columns(pairs: list[tuple[str, str]]) -> tuple[list[str], list[str]]:
    hypotheses, references = zip(*pairs, strict=True)
    return list(hypotheses), list(references)


@pytest.mark.parametrize("tokenize", ["13a", "none", "char", "zh", "intl"])
@pytest.mark.parametrize("lowercase", [False, True])
@pytest.mark.parametrize("script", SCRIPTS)
def test_bleu_and_chrf_are_those_of_sacrebleu(script, tokenize, lowercase):
    hypotheses, references = columns(SCRIPTS[script])
    scores = score(hypotheses, references, tokenize=tokenize, lowercase=lowercase)
    for order in (1, 2, 3, 4):
        bleu = BLEU(tokenize=tokenize, lowercase=lowercase, max_ngram_order=order, force=True)
        expected = bleu.corpus_score(hypotheses, [references]).score
        got = scores.values()[f"bleu{order}"]
        if got is None:
            assert max(len(bleu.tokenizer(reference).split()) for reference in references) < order
        else:
            assert got == pytest.approx(expected, abs=1e-6)
    chrf = CHRF(word_order=2, lowercase=lowercase)
    assert scores.chrf == pytest.approx(chrf.corpus_score(hypotheses, [references]).score, abs=1e-6)
    assert scores.signature["bleu"] == str(bleu.get_signature())
    assert scores.signature["chrf"] == str(chrf.get_signature())
    assert "nw:2" in scores.signature["chrf"]


def test_bleu_n_is_not_the_precision_of_order_n():
    hypotheses, references = columns(ENGLISH)
    precisions = BLEU().corpus_score(hypotheses, [references]).precisions
    assert abs(score(hypotheses, references).bleu4 - precisions[3]) > 1


@pytest.mark.parametrize("lowercase", [False, True])
@pytest.mark.parametrize("script", SCRIPTS)
def test_error_rates_are_those_of_jiwer(script, lowercase):
    hypotheses, references = columns(SCRIPTS[script])
    scores = score(hypotheses, references, lowercase=lowercase)
    if lowercase:
        hypotheses, references = [text.lower() for text in hypotheses], [text.lower() for text in references]
    assert scores.wer == pytest.approx(jiwer.wer(references, hypotheses), abs=1e-6)
    assert scores.cer == pytest.approx(jiwer.cer(references, hypotheses), abs=1e-6)


def test_scores_in_portions_are_those_of_the_whole(monkeypatch):
    hypotheses, references = columns(ENGLISH + GERMAN)
    whole = score(hypotheses, references)
    monkeypatch.setattr("toolkit.scoring.addends.PORTION", 2)
    assert score(hypotheses, references) == whole


def plain_rouge_l(hypothesis: list[str], reference: list[str]) -> float:
    """The textbook's table of common subsequences."""
    table = [[0] * (len(reference) + 1) for _ in range(len(hypothesis) + 1)]
    for i, word in enumerate(hypothesis):
        for j, other in enumerate(reference):
            table[i + 1][j + 1] = table[i][j] + 1 if word == other else max(table[i][j + 1], table[i + 1][j])
    common = table[-1][-1]
    precision, recall = common / len(hypothesis), common / len(reference)
    return 100 * 2 * precision * recall / (precision + recall) if common else 0.0


def test_rouge_l_of_english_is_that_of_the_reference_implementation():
    """Which lower-cases and keeps runs of a-z and 0-9, and averages F1 over pairs."""
    expected = [plain_rouge_l(*(re.findall("[a-z0-9]+", text.lower()) for text in pair)) for pair in ENGLISH]
    assert [rouge_l(*pair) for pair in ENGLISH] == pytest.approx(expected, abs=1e-6)
    assert score(*columns(ENGLISH)).rouge_l == pytest.approx(sum(expected) / len(expected), abs=1e-6)


# What the package rouge-score 0.1.2 gives for these pairs with a tokenizer that knows their script: words without
# punctuation, characters for Chinese. Its own tokenizer knows a-z and 0-9 alone and gives 0 for Chinese and Hindi.
REFERENCE_ROUGE_L = {
    "english": [100.0, 57.14285714, 77.77777778, 0.0, 42.85714286],
    "german": [87.5, 85.71428571, 72.72727273, 50.0],
    "chinese": [71.42857143, 57.14285714, 90.90909091, 55.55555556],
    "hindi": [66.66666667, 88.88888889, 90.90909091, 44.44444444],
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_rouge_l_is_that_of_rouge_score_in_every_script(script):
    assert [rouge_l(*pair) for pair in SCRIPTS[script]] == pytest.approx(REFERENCE_ROUGE_L[script], abs=1e-6)


def test_reduced_bleu_is_bleu_of_what_remains():
    train = ["the wind and the rain", "the sun and the moon", "the snow"]
    frequent = frequent_words(train)
    # 12 words, of which half may go: five are "the"; the next, "and", would be the sixth and seventh.
    assert frequent == {"the"}
    hypotheses, references = (
        ["The wind, the heavy snow falls over hills!"],
        ["the wind; the heavy snow falls on the hills"],
    )
    kept = [["wind heavy snow falls over hills"], ["wind heavy snow falls on hills"]]
    expected = BLEU(tokenize="none").corpus_score(kept[0], [kept[1]]).score
    scores = score(hypotheses, references, frequent_words=frequent)
    assert scores.reduced_bleu == pytest.approx(expected, abs=1e-6)
    assert "1 frequent words" in scores.signature["reduced_bleu"]
    assert score(hypotheses, references).reduced_bleu is None
    only_frequent = score(["the the"], ["the"], frequent_words=frequent)
    assert only_frequent.reduced_bleu is None


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("Don't stop, Nr. 5!", ["don", "t", "stop", "nr", "5"]),
        ("Fällt Schnee – örtlich", ["fällt", "schnee", "örtlich"]),
        ("fa\u0308llt", ["fällt"]),
        ("我买了iPhone手机。", ["我", "买", "了", "iphone", "手", "机"]),
        ("カタカナとひらがな", list("カタカナとひらがな")),
        ("오늘 날씨가 좋다", ["오늘", "날씨가", "좋다"]),
        ("हिन्दी पढ़ते हैं।", ["हिन्दी", "पढ़ते", "हैं"]),
        ("क्\u200dष", ["क्\u200dष"]),
        ("مرحبا بالعالم", ["مرحبا", "بالعالم"]),
        (" ...?! ", []),
    ],
)
def test_rouge_l_tokens_of_many_scripts(text, tokens):
    assert rouge_tokens(text) == [unicodedata.normalize("NFC", token) for token in tokens]


@pytest.mark.parametrize("script", SCRIPTS)
def test_identical_texts_score_best_in_every_script(script):
    _, references = columns(SCRIPTS[script])
    scores = score(references, references)
    assert scores.rouge_l == 100 and scores.wer == 0 and scores.cer == 0
    assert scores.bleu1 == pytest.approx(100) and scores.chrf == pytest.approx(100)


def test_rouge_l_by_hand():
    # 3 of 4 and 3 of 5 tokens in common order: F1 = 2 * 3 / 9.
    assert rouge_l("a b c x", "a y b z c") == pytest.approx(100 * 6 / 9)
    # Chinese by character: 5 of 6 and 5 of 8.
    assert rouge_l("今天天气很好", "今天的天气非常好") == pytest.approx(100 * 10 / 14)


def test_an_order_that_no_reference_has_is_not_applicable():
    scores = score(["yes", "no thank you very much"], ["yes", "not now"])
    assert scores.bleu1 is not None and scores.bleu2 is not None
    assert scores.bleu3 is None and scores.bleu4 is None


def test_a_model_that_says_nothing_scores_zero_not_nothing():
    scores = score(["", ""], ["one two three four five", "six"])
    assert [scores.bleu1, scores.bleu4, scores.chrf, scores.rouge_l, scores.wer, scores.cer] == [0, 0, 0, 0, 1, 1]


def test_texts_without_words_are_defined():
    both_empty = score([""], [""])
    assert (both_empty.rouge_l, both_empty.wer, both_empty.cer) == (100, 0, 0)
    assert both_empty.bleu1 is None
    only_hypothesis = score(["a b"], [""])
    # jiwer's definition: with nothing to be said, the number of insertions.
    assert (only_hypothesis.rouge_l, only_hypothesis.wer, only_hypothesis.cer) == (0, 2, 3)
    assert rouge_l("?!", "?!") == 100 and rouge_l("?", "!") == 0 and rouge_l("?", "why") == 0


def test_no_clips_no_scores():
    scores = score([], [])
    assert scores.clips == 0 and set(scores.values().values()) == {None}


def test_unequal_numbers_are_refused():
    with pytest.raises(ValueError, match=r"2 hypotheses .*\b1 references"):
        score(["a", "b"], ["a"])


def test_an_unknown_or_unusable_tokenizer_is_the_users_error():
    with pytest.raises(UserError, match=r"evaluation\.tokenize.*13b") as caught:
        score(["a"], ["a"], tokenize="13b")
    assert "none, zh, 13a" in caught.value.hint


any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(any_text, any_text), min_size=1, max_size=5))
def test_any_texts_at_all_have_scores_within_their_bounds(pairs):
    scores = score(*columns(pairs))
    for name, value in scores.values().items():
        assert value is None or value >= 0
        assert value is None or name in ("wer", "cer") or value <= 100 + 1e-9
    assert None not in (scores.chrf, scores.rouge_l, scores.wer, scores.cer)
    assert scores.clips == len(pairs)


@given(any_text, any_text)
def test_rouge_l_is_symmetric_and_full_on_itself(one, other):
    assert rouge_l(one, other) == rouge_l(other, one)
    assert rouge_l(one, one) == 100


def test_sentence_chrf_is_that_of_sacrebleu():
    hypotheses, references = columns(ENGLISH + HINDI)
    chrf = CHRF(word_order=2)
    expected = [chrf.sentence_score(hypothesis, [reference]).score for hypothesis, reference in ENGLISH + HINDI]
    assert sentence_chrf(hypotheses, references) == pytest.approx(expected, abs=1e-6)


def test_which_way_is_better():
    assert [name for name in SCORE_NAMES if not higher_is_better(name)] == ["wer", "cer", "gloss_wer"]
