"""A run on features of another network, without any pose, learns its clips."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.training.small_trainers import batches_of, group, make
from tests.written_corpora import write_corpus
from toolkit.corpus.packed import Clip, Corpus
from toolkit.poses.features import NORMALISATION
from toolkit.poses.landmarks import NO_LANDMARKS
from toolkit.training.trainer import Trainer

__all__ = ["group", "make"]
TEXTS = ["sun", "moon", "star", "sky", "rain", "snow", "wind", "fog"]


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    """Eight clips whose features differ."""
    rng = np.random.default_rng(0)

    def clip(number: int, text: str) -> Clip:
        features = (rng.normal(size=16) + 0.3 * rng.normal(size=(8 + number, 16))).astype(np.float16)
        return Clip(f"clip-{number}", text, np.empty((8 + number, 0, 3), np.float16), video_features=features)

    clips = [clip(number, text) for number, text in enumerate(TEXTS)]
    return write_corpus(tmp_path / "corpus", {"train": clips, "dev": clips}, NO_LANDMARKS, 12.5, NORMALISATION)


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_eight_clips_are_learnt_from_features_alone(make: Callable[..., Trainer], corpus: Corpus, kind: str) -> None:
    trainer = make(
        f"model.feature_encoder={{kind: {kind}, hidden: 64, dropout: 0}}",
        *("training.global_batch_size=8", "training.micro_batch_size=8", "training.max_steps=400"),
        *("training.epochs=400", "training.eval_every=400", "training.learning_rate=0.005"),
        *("training.schedule=constant", "training.warmup_ratio=0.05", "training.log_every=400"),
        *("evaluation.num_beams=1", "evaluation.max_new_tokens=8"),
        target_loss=0.02,
    )
    trainer.run(batches_of(trainer))
    assert trainer.progress.step < 400, "the loss has reached its target"
    predictions = trainer.translate(corpus.splits["dev"]).predictions
    assert [prediction.hypothesis for prediction in predictions] == TEXTS
