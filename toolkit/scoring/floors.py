"""What one scores without watching: the floors beside which every score is printed.

Small corpora of formulaic sentences give surprisingly high floors, and a model that has learnt nothing but the language
of its training texts scores like them. A score says something only by its distance from these:

* ``constant``: one typical training sentence, always the same.
* ``random``: a random training sentence for each clip.
* ``shuffled``: the model's own translations, dealt out at random. What a model scores by sounding right.
* ``control``: what the model says to the poses of another clip, the one nearest in length that says something else. It
  keeps what shuffling destroys, how long the text should be. A model that looks at the signing stands far above it.
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
    """Score translators that never look at the signing.

    Args:
        train_texts: all texts of the training split.
        references: what was really signed.
        hypotheses: the model's translations; without them there is neither ``shuffled`` nor ``control``.
        frames: length of each clip; without it there is no ``control``.
        seed: draws the random sentences and shuffles the translations.
        tokenize, lowercase, frequent_words: as :func:`toolkit.scoring.metrics.score` takes them; give those of the
            model's scores.

    Returns:
        scores by kind of floor.

    Raises:
        ValueError: there are no training texts.
    """
    if not len(train_texts):
        raise ValueError("floors need at least one training text")
    generator = np.random.default_rng(seed)
    drawn = generator.integers(len(train_texts), size=len(references))
    said = {
        "constant": [typical_sentence(train_texts)] * len(references),
        "random": [train_texts[int(index)] for index in drawn],
    }
    if hypotheses is not None:
        said["shuffled"] = [hypotheses[index] for index in generator.permutation(len(hypotheses))]
    if hypotheses is not None and frames is not None:
        said["control"] = [hypotheses[index] for index in other_clips(frames, references)]
    return {
        kind: score(texts, references, tokenize=tokenize, lowercase=lowercase, frequent_words=frequent_words)
        for kind, texts in said.items()
    }


def other_clips(frames: npt.NDArray[np.integer], references: Sequence[str]) -> list[int]:
    """For each clip another one, the nearest in length whose text is different; itself where all texts are alike.

    A translation depends on the poses alone, so what the model says to the other clip's poses is that clip's own
    translation, and nothing need be translated twice.
    """
    order = np.argsort(frames, kind="stable").tolist()
    others = [0] * len(order)
    for place, clip in enumerate(order):
        nearby = (order[(place + step) % len(order)] for step in range(1, len(order)))
        others[clip] = next((other for other in nearby if references[other] != references[clip]), clip)
    return others


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
