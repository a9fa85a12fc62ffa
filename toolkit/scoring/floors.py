"""Floors: the scores of translators that see no poses, printed beside every score.

Small corpora of formulaic sentences have high floors, and a model that has learnt only the language of its training
texts reaches them. The distance of a score from its floors shows what the model reads from the poses:

* ``constant``: one typical training sentence for every clip.
* ``random``: a random training sentence for each clip.
* ``shuffled``: the model's own translations, assigned to clips at random.
* ``control``: the model's translation of another clip's poses, the clip nearest in length with a different text. Unlike
  the shuffled translations these have about the right length. A model that uses the poses scores far above them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt

from toolkit.scoring.metrics import Scores, score

FLOOR_LABELS = {
    "constant": "floor: constant sentence",
    "random": "floor: random sentence",
    "shuffled": "floor: shuffled translations",
    "control": "control: poses of other clips",
}


def floors(
    train_texts: Sequence[str],
    references: Sequence[str],
    *,
    hypotheses: Sequence[str] | None = None,
    frames: npt.NDArray[np.integer] | None = None,
    seed: int = 0,
    tokenize: str = "13a",
    lowercase: bool = False,
    frequent_words: Collection[str] | None = None,
) -> dict[str, Scores]:
    """The scores, by kind of floor, of translators that see no poses.

    Args:
        train_texts: all texts of the training split, at least one.
        references: the texts of the clips.
        hypotheses: the model's translations; without them there is neither ``shuffled`` nor ``control``.
        frames: length of each clip; without it there is no ``control``.
        seed: draws the random sentences and shuffles the translations.
        tokenize, lowercase, frequent_words: as :func:`toolkit.scoring.metrics.score` takes them; give those of the
            model's scores.
    """
    generator = np.random.default_rng(seed)
    drawn = generator.integers(len(train_texts), size=len(references))
    texts = {
        "constant": [typical_sentence(train_texts)] * len(references),
        "random": [train_texts[int(index)] for index in drawn],
    }
    if hypotheses is not None:
        texts["shuffled"] = [hypotheses[index] for index in generator.permutation(len(hypotheses))]
    if hypotheses is not None and frames is not None:
        texts["control"] = [hypotheses[index] for index in other_clips(frames, references)]
    return {
        kind: score(given, references, tokenize=tokenize, lowercase=lowercase, frequent_words=frequent_words)
        for kind, given in texts.items()
    }


def other_clips(frames: npt.NDArray[np.integer], references: Sequence[str]) -> list[int]:
    """For each clip the index of the nearest in length whose text is different; its own where all texts are alike.

    A translation depends on the poses alone: that of another clip's poses is that clip's translation, and no clip is
    translated twice.
    """
    order = np.argsort(frames, kind="stable").tolist()
    others = [0] * len(order)
    for place, clip in enumerate(order):
        nearby = (order[(place + offset) % len(order)] for offset in range(1, len(order)))
        others[clip] = next((other for other in nearby if references[other] != references[clip]), clip)
    return others


def typical_sentence(texts: Sequence[str]) -> str:
    """The most frequent text.

    Of several equally frequent ones: among those of median length in words the one whose words occur in most texts, and
    of these the first in alphabetical order.
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
