"""What the first epoch pads to in micro-batches of a size, and which size is the fastest with it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import ByT5Tokenizer

from tests.written_corpora import write_corpus
from toolkit.batching.loader import train_batches
from toolkit.cluster.ranks import Ranks
from toolkit.corpus.packed import Clip, Corpus
from toolkit.fitting import micro_batches, stage
from toolkit.fitting.hardware import GIB
from toolkit.fitting.memory_limits import MemoryLimit
from toolkit.fitting.micro_batches import fit_micro_batches
from toolkit.fitting.pace import Pace
from toolkit.fitting.rehearsal_engine import Measured
from toolkit.planning.sizes.first_epoch import FirstEpoch
from toolkit.planning.sizes.shapes import Limits, Shape
from toolkit.poses.landmarks import load_landmark_set
from toolkit.recipe.batches import MicroBatchChoice
from toolkit.recipe.resolve import ResolvedRun

AUTO = ("training.micro_batch_size=auto", "training.global_batch_size=6", "augmentation.speed=0")
HANDS = load_landmark_set("hands_body_50")


def corpus_of(folder: Path, lengths: Sequence[int]) -> Corpus:
    clips = [
        Clip(f"clip-{n}", "sun", np.random.default_rng(n).normal(size=(length, 50, 3)).astype(np.float16))
        for n, length in enumerate(lengths)
    ]
    return write_corpus(folder, {"train": clips}, HANDS, 12.5)


class Machine:
    """Takes ``constant`` seconds for a pass, and ``per_frame`` for each of its padded frames."""

    def __init__(self, constant: float, per_frame: float) -> None:
        self.constant, self.per_frame = constant, per_frame

    def __call__(self, *_: Any, **__: Any) -> Machine:
        return self

    def passes(self, shape: Shape) -> Measured:
        return Measured(seconds=self.constant + self.per_frame * shape.clips * shape.frames)

    def at_most(self, _: Sequence[Shape]) -> Measured:
        return Measured(resident=GIB)

    translation = at_most

    def close(self) -> None:
        pass


def chosen(run: ResolvedRun, machine: Machine, corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> ResolvedRun:
    monkeypatch.setattr(stage, "Rehearsal", machine)
    monkeypatch.setattr(micro_batches, "cards", lambda: [])
    monkeypatch.setattr(micro_batches, "import_libraries", lambda _: None)  # no engine is built
    monkeypatch.setattr(stage, "memory_limit", lambda _: MemoryLimit(100 * GIB, None))
    return fit_micro_batches(run, Ranks(), corpus, lambda _: None)


def test_of_sizes_whose_passes_are_alike_the_one_that_pads_less_is_taken(
    resolve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 2, 3 and 6 of the longest clips a pass over clips of typical length has 6 clips of 10 frames."""
    corpus = corpus_of(tmp_path / "corpus", [30, 10, 10, 10, 10, 10])
    run = chosen(resolve(*AUTO), Machine(1.0, 0.0), corpus, monkeypatch)
    # Passes of 60 and 40 padded frames, against 90 and 30, or 180 in one.
    assert (run.clip_limit, run.frame_limit) == (6, 60)


@pytest.mark.parametrize(
    ("machine", "expected"),
    [(Machine(1.0, 0.0), 6), (Machine(1.0, 1.0), 6), (Machine(0.0, 1.0), 1)],
    ids=["passes cost", "both cost", "frames cost"],
)
def test_clips_of_one_length_are_not_padded_and_passes_alone_decide(
    resolve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, machine: Machine, expected: int
) -> None:
    corpus = corpus_of(tmp_path / "corpus", [10] * 6)
    run = chosen(resolve(*AUTO), machine, corpus, monkeypatch)
    assert run.clip_limit == expected


@pytest.mark.parametrize("padding", ["longest", "ladder"])
@pytest.mark.parametrize("limits", [Limits(3, 45), Limits(2, None), Limits(6, None)])
@pytest.mark.parametrize("speed", [0, 0.3])
def test_the_frames_are_those_of_the_batches_that_a_run_computes(
    resolve: Any, tmp_path: Path, padding: str, limits: Limits, speed: float
) -> None:
    corpus = corpus_of(tmp_path / "corpus", [8, 30, 11, 9, 14, 13, 21, 10, 12, 17, 19])
    settings = (*AUTO[:2], f"augmentation.speed={speed}", f"training.padding={padding}", "training.workers=0")
    run = resolve(*settings, "augmentation.frame_drop=0.2", world_size=2)
    epoch = FirstEpoch(run, corpus.splits["train"])
    fitted = run.with_choice(MicroBatchChoice(limits.clips, limits.frames, "", "", ""))
    batches = train_batches(corpus.splits["train"], ByT5Tokenizer(), fitted, landmark_set=corpus.landmark_set)
    computed = [batch.frame_mask.numel() for step in batches for batch in step]
    assert epoch.padded_frames(limits).tolist() == computed
    assert epoch.clips == 5.5


def test_the_pace_is_on_the_lines_through_the_passes() -> None:
    pace = Pace()
    pace.add(Shape(1, 10), [2.0])
    assert pace.seconds(np.array([5])) == pytest.approx(1.0), "of one pass in proportion"
    for clips, seconds in ((2, 9.0), (2, 3.0), (4, 6.0)):
        pace.add(Shape(clips, 10), [seconds])
    for frames, seconds in ((5, 1.5), (10, 2.0), (15, 2.5), (20, 3.0), (40, 6.0), (60, 9.0)):
        assert pace.seconds(np.array([frames])) == pytest.approx(seconds)
    assert pace.seconds(np.array([5, 15])) == pytest.approx(4.0)


def test_a_pass_that_was_disturbed_makes_no_other_free() -> None:
    pace = Pace()
    for clips in (1, 2):
        pace.add(Shape(clips, 10), [4.0])
    assert pace.seconds(np.array([40])) == pytest.approx(4.0 + 0.5 * 4.0)
    steep = Pace()
    for clips, seconds in ((1, 1.0), (2, 4.0)):
        steep.add(Shape(clips, 10), [seconds])
    assert steep.seconds(np.array([5])) == pytest.approx(0.5), "no frames take no less than nothing"


def test_of_each_rank_its_fastest_pass_counts_and_the_slowest_rank_decides() -> None:
    pace = Pace()
    for ranks in ([1.0, 9.0], [8.0, 3.0]):
        pace.add(Shape(1, 10), ranks)
    assert pace.seconds(np.array([10])) == pytest.approx(3.0)
