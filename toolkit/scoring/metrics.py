"""Scores of translations against one reference each, in any script, and their signatures.

How each score is computed:

* ``bleu1`` .. ``bleu4``: sacreBLEU's corpus BLEU with that maximal n-gram order, 0..100 (never the precision p_n).
  Where no reference is long enough for an n-gram of the order the score is not applicable: None.
* ``reduced_bleu``: BLEU-4 of what remains when frequent words and punctuation are taken out of both texts, 0..100;
  None unless the frequent words are given. A model that has learnt only the phrases of its language scores well in
  BLEU and near zero here (Tarrés et al. 2023, "Sign Language Translation from Instructional Videos", arXiv:2304.06371).
  Their list was made by hand for How2Sign; here ``frequent_words`` makes it from the training texts.
* ``chrf``: sacreBLEU's chrF++, that is chrF with word n-grams up to 2 (``nw:2`` in its signature), 0..100.
* ``rouge_l``: mean over clips of the F1 of the longest common subsequence, 0..100. Tokens are lower-cased runs of
  letters, marks and digits, as in the reference implementation but for all scripts; Chinese and Japanese count by
  character.
* ``wer``, ``cer``: jiwer's word and character error rate over the whole set; ratios, above 1 with many insertions.
* ``gloss_wer``: the word error rate of the glosses that a CTC head reads (``training.ctc_target: gloss``), else None.

Texts without any word have scores, too: two such texts match where they are equal.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from sacrebleu.metrics import CHRF

from toolkit.scoring.addends import Measure, make_bleu, measure, rouge_l, rouge_tokens

__all__ = ["SCORE_NAMES", "Scores", "higher_is_better", "mean_of", "rouge_l", "rouge_tokens", "score", "sentence_chrf"]

SCORE_NAMES = ("bleu1", "bleu2", "bleu3", "bleu4", "reduced_bleu", "chrf", "rouge_l", "wer", "cer", "gloss_wer")
_LOWER_IS_BETTER = frozenset({"wer", "cer", "gloss_wer"})


@dataclass(frozen=True)
class Scores:
    """Scores of one set of translations; None = not applicable.

    Attributes:
        bleu1, bleu2, bleu3, bleu4, chrf, rouge_l, reduced_bleu: 0..100, higher is better.
        wer, cer, gloss_wer: ratios, lower is better.
        clips: number of pairs scored.
        signature: for each kind of score the settings that it was computed with.
    """

    bleu1: float | None
    bleu2: float | None
    bleu3: float | None
    bleu4: float | None
    chrf: float | None
    rouge_l: float | None
    wer: float | None
    cer: float | None
    clips: int
    signature: dict[str, str] = field(default_factory=dict)
    reduced_bleu: float | None = None
    gloss_wer: float | None = None

    def values(self) -> dict[str, float | None]:
        """The scores by name, without what describes them."""
        return {name: getattr(self, name) for name in SCORE_NAMES}


def mean_of(scores: Sequence[Scores]) -> Scores:
    """The mean of several scores, each set counting the same; None where one of them is."""
    columns = {name: [one.values()[name] for one in scores] for name in SCORE_NAMES}
    values: dict[str, Any] = {
        name: None if None in column else sum(value or 0.0 for value in column) / len(column)
        for name, column in columns.items()
    }
    return Scores(**values, clips=sum(one.clips for one in scores), signature=scores[0].signature)


def higher_is_better(name: str) -> bool:
    """Whether a higher value of this score is better."""
    return name not in _LOWER_IS_BETTER


def score(
    hypotheses: Sequence[str],
    references: Sequence[str],
    *,
    tokenize: str = "13a",
    lowercase: bool = False,
    frequent_words: Collection[str] | None = None,
) -> Scores:
    """Score translations.

    Args:
        hypotheses: the translations, detokenised.
        references: the correct texts, in the same order.
        tokenize: name of sacreBLEU's tokenizer for BLEU: 13a, none, char, zh, intl, flores200, ...
        lowercase: compare lower-cased texts.
        frequent_words: words that reduced BLEU leaves out; None = no reduced BLEU.

    Raises:
        ValueError: the two lists differ in length.
        UserError: the tokenizer is unknown or lacks a file or package that it needs.
    """
    if len(hypotheses) != len(references):
        raise ValueError(f"{len(hypotheses)} hypotheses cannot be scored against {len(references)} references")
    settings: dict[str, Any] = {"tokenize": tokenize, "lowercase": lowercase, "frequent_words": frequent_words}
    if not references:
        make_bleu(tokenize, lowercase)
        return Scores(None, None, None, None, None, None, None, None, clips=0)
    return add_up(measure(hypotheses, references, **settings), **settings)


def add_up(
    measures: Sequence[Measure], *, tokenize: str, lowercase: bool, frequent_words: Collection[str] | None
) -> Scores:
    """The scores of a whole set from what its clips contribute; the settings go into the signature."""
    values: dict[str, Any] = dict.fromkeys(SCORE_NAMES)
    for part in measures:
        values |= part.values(part.addends.sum(axis=0))
    signature = make_signature(tokenize, lowercase, None if frequent_words is None else len(frequent_words))
    return Scores(**values, clips=len(measures[0].addends), signature=signature)


def make_signature(tokenize: str, lowercase: bool, num_frequent_words: int | None) -> dict[str, str]:
    """The settings of each kind of score; for BLEU and chrF++ sacreBLEU's own signatures."""
    bleu, chrf = make_bleu(tokenize, lowercase), CHRF(word_order=2, lowercase=lowercase)
    bleu.num_refs = chrf.num_refs = 1
    signature = {"bleu": bleu.get_signature().format(), "chrf": chrf.get_signature().format()}
    if num_frequent_words is not None:
        signature["reduced_bleu"] = f"as bleu, without punctuation and {num_frequent_words} frequent words"
    return signature | {
        "rouge_l": "f1|mean over clips|case:lc|tok:unicode words, Han and kana by character",
        "wer, cer": f"jiwer:{version('jiwer')}|case:{'lc' if lowercase else 'mixed'}",
    }


def sentence_chrf(hypotheses: Sequence[str], references: Sequence[str], *, lowercase: bool = False) -> list[float]:
    """chrF++ of each pair by itself, 0..100."""
    chrf = CHRF(word_order=2, lowercase=lowercase)
    return [
        chrf.sentence_score(hypothesis, [reference]).score
        for hypothesis, reference in zip(hypotheses, references, strict=True)
    ]
