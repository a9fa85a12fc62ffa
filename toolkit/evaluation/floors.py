"""What one scores without watching: the floors beside which every score is printed.

Small corpora of formulaic sentences give surprisingly high floors, and a model that has learnt nothing but the language
of its training texts scores like them. A score says something only by its distance from these.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from toolkit.evaluation.metrics import Scores, score


def floors(
    train_texts: Sequence[str],
    references: Sequence[str],
    *,
    seed: int = 0,
    tokenize: str = "13a",
    lowercase: bool = False,
) -> dict[str, Scores]:
    """Score two translators that never look at the signing.

    Args:
        train_texts: all texts of the training split.
        references: what was really signed.
        seed: draws the random sentences.
        tokenize, lowercase: as :func:`toolkit.evaluation.metrics.score` takes them; give those of the model's scores.

    Returns:
        ``constant``: one typical training sentence, always the same; ``random``: a random training sentence each time.

    Raises:
        ValueError: there are no training texts.
    """
    if not len(train_texts):
        raise ValueError("floors need at least one training text")
    constant = [typical_sentence(train_texts)] * len(references)
    drawn = np.random.default_rng(seed).integers(len(train_texts), size=len(references))
    random = [train_texts[int(index)] for index in drawn]
    return {
        "constant": score(constant, references, tokenize=tokenize, lowercase=lowercase),
        "random": score(random, references, tokenize=tokenize, lowercase=lowercase),
    }


def typical_sentence(texts: Sequence[str]) -> str:
    """The most frequent text.

    Where several are equally frequent (often none occurs twice): among those of median length in words the one whose
    words occur in most texts, and of these the first in alphabetical order.
    """
    counts = Counter(texts)
    most = max(counts.values())
    candidates = sorted(text for text, count in counts.items() if count == most)
    if len(candidates) == 1:
        return candidates[0]
    words = {text: text.split() for text in counts}
    frequency: Counter[str] = Counter()
    for text, count in counts.items():
        for word in set(words[text]):
            frequency[word] += count
    median = sorted(len(words[text]) for text in candidates)[len(candidates) // 2]
    candidates = [text for text in candidates if len(words[text]) == median]
    return max(candidates, key=lambda text: sum(frequency[word] for word in words[text]))
