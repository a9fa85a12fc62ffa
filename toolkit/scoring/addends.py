"""Addends: what each clip contributes to each score, and the formulas that turn their sums into scores.

Every score of :mod:`toolkit.scoring.metrics` is a function of sums over clips. With the addends, the scores of a
resampled set take one matrix product, which confidence intervals and significance tests need.

BLEU and chrF++ are sacreBLEU's: its counts, its formulas. WER and CER are jiwer's: its text preparation, and the edit
distance that it too takes from rapidfuzz.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
import numpy.typing as npt
import regex
from rapidfuzz.distance import LCSseq, Levenshtein
from sacrebleu.metrics import BLEU, CHRF

from toolkit.errors import UserError

Matrix = npt.NDArray[np.float64]
Formula = Callable[[Matrix], float]

# Clips whose n-gram counts are held at once: they are a hundred times the size of the addends.
PORTION = 10_000
MAX_ORDER = 4
BLEU_NAMES = tuple(f"bleu{order}" for order in range(1, MAX_ORDER + 1))
BLEU_ORDERS = {name: order for order, name in enumerate(BLEU_NAMES, start=1)} | {"reduced_bleu": MAX_ORDER}

# A token is one character of a script without spaces, or a run of letters, marks and digits. Python's own \w drops the
# vowel signs of Devanagari. The joiners U+200C and U+200D are parts of words.
_BY_CHARACTER = r"\p{Han}\p{Hiragana}\p{Katakana}"
_TOKENS = regex.compile(rf"[{_BY_CHARACTER}]|[[\p{{L}}\p{{M}}\p{{N}}\u200c\u200d]--[{_BY_CHARACTER}]]+", regex.V1)
_HAS_WORD = regex.compile(r"[\p{L}\p{N}]")


@dataclass(frozen=True)
class Measure:
    """One kind of score.

    Attributes:
        addends: float64 [clips, numbers], what each clip contributes.
        formulas: score name -> function of the summed numbers; BLEU orders that are not applicable, because no
            reference has such an n-gram, are left out.
    """

    addends: Matrix
    formulas: dict[str, Formula]

    def values(self, sums: Matrix) -> dict[str, float]:
        """The scores of a set whose contributions add up to ``sums`` [numbers]."""
        return {name: formula(sums) for name, formula in self.formulas.items()}

    def of_clips(self, clips: Sequence[int]) -> Measure:
        """The same of some clips alone, without the BLEU orders that are not applicable to them."""
        addends = self.addends[list(clips)]
        longest_reference = int(addends[:, 1].max())
        applicable = {
            name: formula
            for name, formula in self.formulas.items()
            if name not in BLEU_ORDERS or BLEU_ORDERS[name] <= longest_reference
        }
        return Measure(addends, applicable)


def measure(
    hypotheses: Sequence[str],
    references: Sequence[str],
    *,
    tokenize: str = "13a",
    lowercase: bool = False,
    frequent_words: Collection[str] | None = None,
) -> list[Measure]:
    """Collect what every clip contributes; the arguments are those of :func:`toolkit.scoring.metrics.score`."""
    bleu, plain_bleu = make_bleu(tokenize, lowercase), make_bleu("none", False)
    chrf = CHRF(word_order=2, lowercase=lowercase)
    frequent = None if frequent_words is None else frozenset(word.lower() for word in frequent_words)
    parts: list[list[Matrix]] = []
    for start in range(0, len(references), PORTION):
        portion = slice(start, start + PORTION)
        given, wanted = list(hypotheses[portion]), list(references[portion])
        rows = [_sacrebleu_addends(bleu, given, wanted), _sacrebleu_addends(chrf, given, wanted)]
        if frequent is not None:
            reduced = [[reduce_text(text, bleu, frequent) for text in texts] for texts in (given, wanted)]
            rows.append(_sacrebleu_addends(plain_bleu, *reduced))
        if lowercase:
            given, wanted = [text.lower() for text in given], [text.lower() for text in wanted]
        rows.append(np.array([(rouge_l(*pair), 1.0) for pair in zip(given, wanted, strict=True)]))
        rows.append(_error_addends(jiwer.transformations.wer_default, given, wanted))
        rows.append(_error_addends(jiwer.transformations.cer_default, given, wanted))
        parts.append(rows)
    addends = [np.concatenate(column) for column in zip(*parts, strict=True)]
    names = [
        BLEU_NAMES,
        ("chrf",),
        *([] if frequent is None else [("reduced_bleu",)]),
        ("rouge_l",),
        ("wer",),
        ("cer",),
    ]
    return [
        Measure(numbers, _formulas(of_these, numbers, chrf)) for numbers, of_these in zip(addends, names, strict=True)
    ]


def gloss_errors(hypotheses: Sequence[str], references: Sequence[str]) -> Measure:
    """What every clip adds to the error rate of its glosses."""
    return Measure(_error_addends(jiwer.transformations.wer_default, hypotheses, references), {"gloss_wer": _ratio})


def _formulas(names: tuple[str, ...], addends: Matrix, chrf: CHRF) -> dict[str, Formula]:
    """How the scores of these names follow from sums of addends; without those that are not applicable."""
    if names == ("chrf",):
        return {"chrf": lambda sums: float(chrf._compute_score_from_stats(sums.tolist()).score)}
    if names not in (BLEU_NAMES, ("reduced_bleu",)):
        return dict.fromkeys(names, _ratio)
    longest_reference = int(addends[:, 1].max())
    orders = {name: BLEU_ORDERS[name] for name in names}
    return {name: partial(_bleu_of_order, order) for name, order in orders.items() if order <= longest_reference}


def make_bleu(tokenize: str, lowercase: bool) -> BLEU:
    """sacreBLEU's BLEU with its default smoothing.

    Raises:
        UserError: the tokenizer is unknown or lacks a file or package that it needs.
    """
    if tokenize not in BLEU.TOKENIZERS:
        known = ", ".join(BLEU.TOKENIZERS)
        raise UserError(f"evaluation.tokenize: there is no tokenizer '{tokenize}'", f"choose one of {known}")
    try:
        # force: no warning about texts that look tokenised, because the model's texts are scored as they are.
        return BLEU(tokenize=tokenize, lowercase=lowercase, force=True)
    except (ImportError, OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        model = _sentencepiece_file(tokenize)
        hint = f"put its SentencePiece model at {model}, or set SACREBLEU to a folder that has it"
        raise UserError(
            f"evaluation.tokenize: the tokenizer '{tokenize}' cannot be used here: {reason}",
            hint if model else "choose another one, 13a for instance",
        ) from error


def _sentencepiece_file(tokenize: str) -> str:
    """Where sacreBLEU looks for a tokenizer's SentencePiece model before it downloads it; empty for those without."""
    from sacrebleu.tokenizers import tokenizer_spm

    if tokenize not in tokenizer_spm.SPM_MODELS:
        return ""
    name = tokenizer_spm.SPM_MODELS[tokenize]["url"].rpartition("/")[2]
    return str(Path(tokenizer_spm.SACREBLEU_DIR) / "models" / name)


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


def frequent_words(texts: Iterable[str], tokenize: str = "13a", share: float = 0.5) -> frozenset[str]:
    """The words that reduced BLEU leaves out: the most frequent ones, which make up ``share`` of ``texts``.

    ``share`` (0..1) is an upper limit.
    """
    bleu = make_bleu(tokenize, False)
    counts = Counter(word for text in texts for word in bleu.tokenizer(text.lower().rstrip()).split())
    counts = Counter({word: count for word, count in counts.items() if _HAS_WORD.search(word)})
    left = share * counts.total()
    chosen = []
    for word, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        left -= count
        if left < 0:
            break
        chosen.append(word)
    return frozenset(chosen)


def reduce_text(text: str, bleu: BLEU, frequent: Collection[str]) -> str:
    """The tokenised words of ``text`` without frequent words and punctuation."""
    words = bleu.tokenizer((text.lower() if bleu.lowercase else text).rstrip()).split()
    return " ".join(word for word in words if word.lower() not in frequent and _HAS_WORD.search(word))


def _sacrebleu_addends(metric: Any, hypotheses: list[str], references: list[str]) -> Matrix:
    # A private method, which sacreBLEU's own bootstrap uses; tests compare all results with the public functions.
    return np.array(metric._extract_corpus_statistics(hypotheses, [references]), dtype=np.float64)


def _bleu_of_order(order: int, sums: Matrix) -> float:
    """Corpus BLEU up to n-grams of ``order``, not the precision of that order alone."""
    hypothesis_length, reference_length = sums[:2].tolist()
    correct, total = sums[2 : 2 + order].tolist(), sums[2 + MAX_ORDER : 2 + MAX_ORDER + order].tolist()
    lengths = int(hypothesis_length), int(reference_length)
    return float(BLEU.compute_bleu(correct, total, *lengths, smooth_method="exp", max_ngram_order=order).score)


def _error_addends(prepare: Any, hypotheses: Sequence[str], references: Sequence[str]) -> Matrix:
    """Errors and reference length of each pair, in words or characters."""
    pairs = zip(prepare(list(references)), prepare(list(hypotheses)), strict=True)
    return np.array([(Levenshtein.distance(wanted, given), len(wanted)) for wanted, given in pairs], dtype=np.float64)


def _ratio(sums: Matrix) -> float:
    """First number over the second; for empty references the number of insertions, as in jiwer."""
    return float(sums[0] / max(sums[1], 1.0))
