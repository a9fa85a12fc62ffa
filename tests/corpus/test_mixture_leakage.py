"""What held-out clips of a mix share with training clips, within a corpus and between corpora."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.written_corpora import write_corpus
from toolkit.corpus.mixture.leakage import leakage_between, leakage_notes, shared_data
from toolkit.corpus.mixture.opening import open_corpora
from toolkit.corpus.packed import Clip, Corpus
from toolkit.corpus.splits import leakage
from toolkit.corpus.table import Row
from toolkit.poses.landmarks import NO_LANDMARKS
from toolkit.recipe.schema import Data

# Of each clip its text, video and signer.
CORPORA: dict[str, dict[str, list[tuple[str, str, str]]]] = {
    "one": {
        "train": [("Good morning!", "v1", "Ann"), ("we eat bread in the evening", "v2", "Bob")],
        "dev": [("nothing of the kind here", "v3", "Bob"), ("she reads a long book", "v9", "Cem")],
        "test": [("good, MORNING", "v4", "Dan"), ("the house is old", "v5", "Eve")],
    },
    "two": {
        "train": [("The house is old.", "v6", "Ann"), ("he reads a long book", "v3", "Fay")],
        "dev": [("bread we eat in the night", "v1", "Gil"), ("Good morning", "v7", "Bob")],
    },
    "three": {"train": [("nobody says this at all", "v8", "Eve"), ("Good morning", "v10", "")]},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder, places = tmp_path_factory.mktemp("corpora"), {}
    for name, splits in CORPORA.items():
        clips = {
            split: [
                Clip(f"{split}{number}", text, np.zeros((2, 0, 3), np.float16), video, signer=signer,
                     video_features=np.zeros((2, 4), np.float16))
                for number, (text, video, signer) in enumerate(rows)
            ]
            for split, rows in splits.items()
        }  # fmt: skip
        write_corpus(folder / name, clips, NO_LANDMARKS, 12.5)
        places[name] = str(folder / name)
    return places


def opened(folders: dict[str, str], *names: str, **settings: Any) -> Corpus:
    parts = [{"corpus": folders[name], **(settings if name == names[0] else {})} for name in names]
    return open_corpora(Data.model_validate({"corpora": parts}))


def test_texts_videos_and_signers_are_compared_with_the_train_of_other_corpora(folders: dict[str, str]) -> None:
    found = leakage_between(opened(folders, *CORPORA).splits)
    assert found == {
        # v3 is in train of two; "she reads ..." is nearly "he reads ..."; Bob of "one" is in its own train alone.
        # Of "two", the bread is nearly that of "one", "Good morning" is in "one" and "three", v1 and Bob are in "one".
        "dev_texts_in_train_of_another_corpus": 1,
        "dev_near_texts_in_train_of_another_corpus": 2,
        "dev_videos_in_train_of_another_corpus": 2,
        "dev_signers_in_train_of_another_corpus": 1,
        # Of "one": the house in "two", "good, MORNING" in "three", and Eve.
        "test_texts_in_train_of_another_corpus": 2,
        "test_near_texts_in_train_of_another_corpus": 0,
        "test_videos_in_train_of_another_corpus": 0,
        "test_signers_in_train_of_another_corpus": 1,
    }


def test_counts_are_those_of_preparation_with_the_clips_of_another_corpus(folders: dict[str, str]) -> None:
    """Held-out clips of one corpus beside the training clips of another, as if a table had them."""
    for held, other in (("one", "two"), ("two", "one"), ("two", "three"), ("one", "three")):
        splits = {"train": CORPORA[other]["train"], **{s: r for s, r in CORPORA[held].items() if s != "train"}}
        rows = {
            split: [Row(f"{split}{n}", text, video, signer=signer) for n, (text, video, signer) in enumerate(given)]
            for split, given in splits.items()
        }
        wanted = leakage(rows)
        train_alone = opened(folders, other, held, splits=["train"])
        found = leakage_between(train_alone.splits)
        assert {name.removesuffix("_of_another_corpus"): count for name, count in found.items()} == wanted, (
            held,
            other,
        )


def test_only_what_a_run_uses_counts(folders: dict[str, str]) -> None:
    both = opened(folders, "one", "two", splits=["dev", "test"])
    assert "test_texts_in_train" not in both.metadata.leakage
    assert shared_data(both)["test_texts_in_train_of_another_corpus"] == 1
    notes = leakage_notes(both)
    assert any("test texts in train of another corpus 1" in note for note in notes)
    assert not any(" 0" in note for note in notes)
    assert not leakage_between(opened(folders, "three", "two", splits=["train"]).splits)[
        "dev_signers_in_train_of_another_corpus"
    ]


def test_a_single_corpus_is_counted_by_its_preparation_alone(folders: dict[str, str]) -> None:
    corpus = Corpus.open(folders["one"])
    assert shared_data(corpus) == corpus.metadata.leakage
