"""Bootstrap intervals of scores, and paired significance tests of two sets of translations.

Each of a thousand samples draws as many clips as there are, with replacement, and is scored (Koehn 2004, "Statistical
Significance Tests for Machine Translation Evaluation"). The draws are sacreBLEU's, with the same seed, so intervals and
p-values of BLEU and chrF++ are those that ``sacrebleu --confidence`` and ``sacrebleu --paired-bs`` print.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from toolkit.scoring.addends import Measure

SAMPLES = 1000
SEED = 12345
# Size of the table of draws that is held at once: 64 MiB.
_DRAWS_AT_ONCE = 2**23

Samples = dict[str, npt.NDArray[np.float64]]
Interval = tuple[float, float]


@dataclass(frozen=True)
class Comparison:
    """One score of two sets of translations of the same clips."""

    first: float  # the score of one
    second: float  # the score of the other
    interval: Interval  # 95 % of the resampled differences (second - first) lie in it
    p_value: float  # chance of so large a difference if there were none

    @property
    def difference(self) -> float:
        """Second minus first."""
        return self.second - self.first


def intervals(measures: Sequence[Measure], samples: int = SAMPLES) -> dict[str, Interval]:
    """The interval of each score that holds 95 % of its resampled values."""
    return {name: _middle(values) for name, values in resample(measures, samples).items()}


def compare(first: Sequence[Measure], second: Sequence[Measure], samples: int = SAMPLES) -> dict[str, Comparison]:
    """Paired bootstrap test of two sets of translations against the same references, by score."""
    assert len(first[0].addends) == len(second[0].addends), "translations of the same clips"
    of_first, of_second = resample(first, samples), resample(second, samples)
    whole_first, whole_second = _scores(first), _scores(second)
    results = {}
    for name in of_first.keys() & of_second.keys():
        differences = of_second[name] - of_first[name]
        sizes = np.abs(differences)
        larger = int(np.sum(sizes - sizes.mean() > abs(whole_second[name] - whole_first[name])))
        # Without any difference between resampled sets the formula would give a small p-value.
        p_value = (larger + 1) / (samples + 1) if sizes.any() else 1.0
        results[name] = Comparison(whole_first[name], whole_second[name], _middle(differences), p_value)
    return results


def _scores(measures: Sequence[Measure]) -> dict[str, float]:
    """The scores of the set itself, not resampled."""
    return {name: value for part in measures for name, value in part.values(part.addends.sum(axis=0)).items()}


def resample(measures: Sequence[Measure], samples: int = SAMPLES) -> Samples:
    """Every score of every resampled set: name -> float64 [samples]."""
    addends = np.concatenate([part.addends for part in measures], axis=1)
    sums = np.concatenate([weights @ addends for weights in _draws(len(addends), samples)])
    values: Samples = {}
    start = 0
    for part in measures:
        own = sums[:, start : start + part.addends.shape[1]]
        start += part.addends.shape[1]
        for name, formula in part.formulas.items():
            values[name] = np.array([formula(row) for row in own])
    return values


def _draws(clips: int, samples: int) -> Iterator[npt.NDArray[np.float64]]:
    """How often each clip is drawn, portion by portion: [samples, clips]."""
    generator = np.random.default_rng(SEED)
    rows = max(1, _DRAWS_AT_ONCE // clips)
    for start in range(0, samples, rows):
        count = min(rows, samples - start)
        drawn = generator.choice(clips, size=(count, clips), replace=True)
        yield np.stack([np.bincount(row, minlength=clips) for row in drawn]).astype(np.float64)


def _middle(values: npt.NDArray[np.float64]) -> Interval:
    """The middle 95 %, with sacreBLEU's rounding of the ends."""
    ordered = np.sort(values)
    tail = len(ordered) // 40
    return float(ordered[tail]), float(ordered[len(ordered) - tail - 1])
