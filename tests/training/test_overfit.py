"""Overfitting a few clips: which clips, with which settings, and the verdict."""

from __future__ import annotations

import pytest

from toolkit.corpus.packed import Corpus
from toolkit.errors import UserError
from toolkit.recipe.load import load_recipe
from toolkit.scoring.predictions import Prediction
from toolkit.training.overfit import few_clips, overfit_overrides, overfit_verdict


def test_the_clips_have_different_texts(corpus: Corpus) -> None:
    few = few_clips(corpus, 4)
    train = few.splits["train"]
    assert list(train.texts) == ["sun", "moon", "star", "sky"]
    assert list(train.uids) == ["clip-0", "clip-1", "clip-3", "clip-5"]
    assert train.frames.tolist() == [8, 9, 11, 13]
    assert [clip.text for clip in train] == list(train.texts)
    assert [len(clip.features) for clip in train] == train.frames.tolist()
    assert few.splits.keys() == {"train", "dev"}


def test_more_clips_than_there_are_texts(corpus: Corpus) -> None:
    with pytest.raises(UserError, match=r"--overfit 5.* 4 ") as refusal:
        few_clips(corpus, 5)
    assert "--overfit 4" in refusal.value.hint


@pytest.mark.parametrize(
    ("clips", "ranks", "remedy"), [(8, 9, "--overfit 9"), (0, 1, "--overfit 8"), (-2, 1, "--overfit 8")]
)
def test_clips_that_ranks_cannot_share(clips: int, ranks: int, remedy: str) -> None:
    with pytest.raises(UserError, match=f"--overfit {clips}") as refusal:
        overfit_overrides(clips, ranks, "demo")
    assert remedy in refusal.value.hint


def test_regularisation_is_off() -> None:
    recipe = load_recipe("demo", overfit_overrides(8, 2, "demo"))
    assert not any(recipe.augmentation.model_dump().values())
    assert recipe.model.dropout == recipe.model.pose_encoder.dropout == 0
    assert recipe.training.global_batch_size == 8
    assert recipe.training.micro_batch_size == load_recipe("demo").training.micro_batch_size, (
        "the limit on memory stays"
    )
    assert recipe.training.schedule == "constant"
    assert recipe.run.dir == "runs/demo-overfit"


@pytest.mark.parametrize(
    ("hypotheses", "loss", "learned", "named"),
    [
        (["sun", "moon"], 0.001, True, "2 of 2 clips in 30 steps"),
        (["sun", "mon"], 0.3, False, "training.max_steps"),
        (["", ""], 3.0, False, "training.learning_rate"),
    ],
)
def test_the_verdict(hypotheses: list[str], loss: float, learned: bool, named: str) -> None:
    rows = [
        Prediction(f"clip-{n}", text, guess)
        for n, (text, guess) in enumerate(zip(["sun", "moon"], hypotheses, strict=True))
    ]
    found, text = overfit_verdict(rows, 30, loss)
    assert found is learned
    assert named in text
