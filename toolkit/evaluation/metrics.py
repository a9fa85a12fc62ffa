"""Scores of translations against one reference each, in any script, with the settings that make them comparable.

How each score is computed:

* ``bleu1`` .. ``bleu4``: sacreBLEU's corpus BLEU with that maximal n-gram order, 0..100 (never the precision p_n).
  Where no reference is long enough for an n-gram of the order the score is not applicable: None.
* ``chrf``: sacreBLEU's chrF++, that is chrF with word n-grams up to 2 (``nw:2`` in its signature), 0..100.
* ``rouge_l``: mean over clips of the F1 of the longest common subsequence, 0..100. Tokens are lower-cased runs of
  letters, marks and digits, as in the reference implementation but for all scripts; Chinese and Japanese count by
  character.
* ``wer``, ``cer``: jiwer's word and character error rate over the whole set; ratios, which insertions push above 1.

Texts without any word are defined everywhere: equal to each other they match, else they do not.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import jiwer
import regex
from rapidfuzz.distance import LCSseq
from sacrebleu.metrics import BLEU, CHRF
from sacrebleu.metrics.bleu import BLEUScore

from toolkit.errors import UserError

SCORE_NAMES = ("bleu1", "bleu2", "bleu3", "bleu4", "chrf", "rouge_l", "wer", "cer")
_LOWER_IS_BETTER = frozenset({"wer", "cer"})

# jiwer keeps an alignment of every pair that it is given; in portions its memory stays bounded.
_JIWER_PORTION = 10_000

# Scripts written without spaces, one token a character; elsewhere a run of letters, marks and digits. Python's own \w
# would drop the vowel signs of Devanagari. The joiners U+200C and U+200D belong inside words.
_BY_CHARACTER = r"\p{Han}\p{Hiragana}\p{Katakana}"
_TOKENS = regex.compile(rf"[{_BY_CHARACTER}]|[[\p{{L}}\p{{M}}\p{{N}}\u200c\u200d]--[{_BY_CHARACTER}]]+", regex.V1)


@dataclass(frozen=True)
class Scores:
    """Scores of one set of translations; None = not applicable.

    Attributes:
        bleu1, bleu2, bleu3, bleu4, chrf, rouge_l: 0..100, higher is better.
        wer, cer: ratios, lower is better.
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

    def values(self) -> dict[str, float | None]:
        """The scores by name, without what describes them."""
        return {name: getattr(self, name) for name in SCORE_NAMES}


def better(name: str) -> bool:
    """Whether a higher value of this score is better.

    Raises:
        ValueError: there is no such score.
    """
    if name not in SCORE_NAMES:
        raise ValueError(f"there is no score '{name}': choose one of {', '.join(SCORE_NAMES)}")
    return name not in _LOWER_IS_BETTER


def improves(name: str, new: Scores, best: Scores | None) -> bool:
    """Whether ``new`` beats ``best`` in one score; anything beats nothing, and a score that is n/a beats none."""
    higher = better(name)
    if best is None:
        return True
    new_value, best_value = new.values()[name], best.values()[name]
    if new_value is None or best_value is None:
        return new_value is not None
    return new_value > best_value if higher else new_value < best_value


def score(
    hypotheses: Sequence[str], references: Sequence[str], *, tokenize: str = "13a", lowercase: bool = False
) -> Scores:
    """Score translations.

    Args:
        hypotheses: what the model wrote, detokenised.
        references: what it should have written, in the same order.
        tokenize: name of sacreBLEU's tokenizer for BLEU: 13a, none, char, zh, intl, ...
        lowercase: compare lower-cased texts.

    Raises:
        ValueError: the two lists differ in length.
        UserError: the tokenizer is unknown or lacks a file or package that it needs.
    """
    if len(hypotheses) != len(references):
        raise ValueError(f"{len(hypotheses)} hypotheses cannot be scored against {len(references)} references")
    bleu, chrf = make_bleu(tokenize, lowercase), CHRF(word_order=2, lowercase=lowercase)
    if not references:
        return Scores(None, None, None, None, None, None, None, None, clips=0)
    # One pass collects the n-gram counts of all orders; BLEU-n follows from the first n of them.
    counted = bleu.corpus_score(hypotheses, [references])
    order = _longest_order(references, bleu)
    bleu1, bleu2, bleu3, bleu4 = (_bleu_of_order(counted, n) if n <= order else None for n in range(1, 5))
    chrf_score = chrf.corpus_score(hypotheses, [references]).score
    if lowercase:
        hypotheses, references = [text.lower() for text in hypotheses], [text.lower() for text in references]
    return Scores(
        bleu1,
        bleu2,
        bleu3,
        bleu4,
        chrf=chrf_score,
        rouge_l=sum(map(rouge_l, hypotheses, references)) / len(references),
        wer=_error_rate(jiwer.process_words, hypotheses, references),
        cer=_error_rate(jiwer.process_characters, hypotheses, references),
        clips=len(references),
        signature={
            "bleu": bleu.get_signature().format(),
            "chrf": chrf.get_signature().format(),
            "rouge_l": "f1|mean over clips|case:lc|tok:unicode words, Han and kana by character",
            "wer, cer": f"jiwer:{version('jiwer')}|case:{'lc' if lowercase else 'mixed'}",
        },
    )


def sentence_chrf(hypotheses: Sequence[str], references: Sequence[str], *, lowercase: bool = False) -> list[float]:
    """chrF++ of each pair by itself, 0..100."""
    chrf = CHRF(word_order=2, lowercase=lowercase)
    return [
        chrf.sentence_score(hypothesis, [reference]).score
        for hypothesis, reference in zip(hypotheses, references, strict=True)
    ]


def rouge_l(hypothesis: str, reference: str) -> float:
    """F1 of the longest common subsequence of tokens of one pair, 0..100."""
    hypothesis_tokens, reference_tokens = rouge_tokens(hypothesis), rouge_tokens(reference)
    if not hypothesis_tokens or not reference_tokens:
        return 100.0 * (hypothesis.split() == reference.split())
    common = LCSseq.similarity(hypothesis_tokens, reference_tokens)
    return 200.0 * common / (len(hypothesis_tokens) + len(reference_tokens))


def rouge_tokens(text: str) -> list[str]:
    """The tokens that ROUGE-L compares."""
    return _TOKENS.findall(unicodedata.normalize("NFC", text.lower()))


def make_bleu(tokenize: str, lowercase: bool) -> BLEU:
    """sacreBLEU's BLEU with its default smoothing.

    Raises:
        UserError: the tokenizer is unknown or lacks a file or package that it needs.
    """
    if tokenize not in BLEU.TOKENIZERS:
        known = ", ".join(BLEU.TOKENIZERS)
        raise UserError(f"evaluation.tokenize: there is no tokenizer '{tokenize}': choose one of {known}")
    try:
        # force: a model that writes its full stops apart is judged as it is, without advice on standard error.
        return BLEU(tokenize=tokenize, lowercase=lowercase, force=True)
    except (ImportError, OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"evaluation.tokenize: the tokenizer '{tokenize}' cannot be used here: {reason}") from error


def _bleu_of_order(counted: BLEUScore, n: int) -> float:
    totals = counted.counts[:n], counted.totals[:n], counted.sys_len, counted.ref_len
    return BLEU.compute_bleu(*totals, smooth_method="exp", max_ngram_order=n).score


def _longest_order(references: Sequence[str], bleu: BLEU) -> int:
    """The highest n-gram order, up to 4, that any reference has."""
    longest = 0
    for reference in references:
        text = reference.lower() if bleu.lowercase else reference
        longest = max(longest, len(bleu.tokenizer(text.rstrip()).split()))
        if longest >= bleu.max_ngram_order:
            break
    return longest


def _error_rate(process: Callable[..., Any], hypotheses: Sequence[str], references: Sequence[str]) -> float:
    """Errors per reference word or character; with nothing to be said, the number of insertions, as jiwer has it."""
    errors = length = 0
    for start in range(0, len(references), _JIWER_PORTION):
        portion = slice(start, start + _JIWER_PORTION)
        counts = process(list(references[portion]), list(hypotheses[portion]))
        errors += counts.substitutions + counts.deletions + counts.insertions
        length += counts.hits + counts.substitutions + counts.deletions
    return errors / max(length, 1)
