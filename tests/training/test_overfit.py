"""Learning a few clips by heart: which clips, by which settings, and the verdict."""

from __future__ import annotations

import pytest

from toolkit.corpus.packed import Corpus
from toolkit.errors import UserError
from toolkit.recipe.load import load_recipe
from toolkit.scoring.predictions import Prediction
from toolkit.training.overfit import few_clips, overfit_overrides, overfit_verdict


def test_the_clips_have_texts_of_their_own(corpus: Corpus) -> None:
    few = few_clips(corpus, 4)
    train = few.splits["train"]
    assert list(train.texts) == ["sun", "moon", "star", "sky"]
    assert list(train.uids) == ["clip-0", "clip-1", "clip-3", "clip-5"]
    assert train.frames.tolist() == [8, 9, 11, 13]
    assert [clip.text for clip in train] == list(train.texts)
    assert [len(clip.features) for clip in train] == train.frames.tolist()
    assert few.splits.keys() == {"train", "dev"}


def test_more_clips_than_there_are_texts(corpus: Corpus) -> None:
    with pytest.raises(UserError, match="only 4 different texts"):
        few_clips(corpus, 5)


@pytest.mark.parametrize(
    ("clips", "ranks", "told"),
    [(8, 9, "start at most 8, or use --overfit 9"), (0, 1, "at least 1"), (-2, 1, "at least")],
)
def test_clips_that_ranks_cannot_share(clips: int, ranks: int, told: str) -> None:
    with pytest.raises(UserError, match=f"--overfit {clips}.*{told}"):
        overfit_overrides(clips, ranks, "demo")


def test_nothing_hinders_memory() -> None:
    recipe = load_recipe("demo", overfit_overrides(8, 2, "demo"))
    assert not any(recipe.augmentation.model_dump().values())
    assert recipe.model.dropout == recipe.model.pose_encoder.dropout == 0
    assert recipe.training.global_batch_size == 8
    assert recipe.training.micro_batch_size == load_recipe("demo").training.micro_batch_size, "the memory's limit stays"
    assert recipe.training.schedule == "constant"
    assert recipe.run.dir == "runs/demo-overfit"


@pytest.mark.parametrize(
    ("hypotheses", "loss", "learned", "told"),
    [
        (["sun", "moon"], 0.001, True, "learned 2 of 2 clips by heart in 30 steps"),
        (["sun", "mon"], 0.3, False, "more steps"),
        (["", ""], 3.0, False, "not learning"),
    ],
)
def test_the_verdict(hypotheses: list[str], loss: float, learned: bool, told: str) -> None:
    rows = [
        Prediction(f"clip-{n}", text, guess)
        for n, (text, guess) in enumerate(zip(["sun", "moon"], hypotheses, strict=True))
    ]
    said, text = overfit_verdict(rows, 30, loss)
    assert said is learned
    assert told in text
