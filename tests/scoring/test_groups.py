"""Scores of groups of clips are those of the clips alone."""

from __future__ import annotations

import pytest

from toolkit.scoring.addends import frequent_words, measure
from toolkit.scoring.groups import group_scores, length_group
from toolkit.scoring.metrics import score

HYPOTHESES = [
    "the door is red",
    "we go",
    "a stone",
    "it rains again over the hills today",
    "yes",
    "the red door is open",
]
REFERENCES = [
    "the door is blue",
    "we go home",
    "stone",
    "it rains again over all the hills today",
    "no",
    "the door is open",
]
SIGNERS = ["anna", "ben", "anna", "anna", "", "ben"]


def groups(scoring, **values):
    return group_scores(measure(HYPOTHESES, REFERENCES, **scoring), values, REFERENCES, scoring)


@pytest.mark.parametrize("words", [None, frequent_words(REFERENCES)])
def test_each_group_scores_as_its_clips_alone(words) -> None:
    scoring = {"tokenize": "13a", "lowercase": False, "frequent_words": words}
    found = groups(scoring, signer=SIGNERS, language=["ase"] * 6)
    assert list(found) == ["signer", "length"], "a column that says the same of all clips has no groups"
    assert list(found["signer"]) == ["anna", "ben", "unknown"], "the largest groups first"
    assert list(found["length"]) == ["1-5", "6-10"]
    for name, group in found["signer"].items():
        clips = [place for place, signer in enumerate(SIGNERS) if (signer or "unknown") == name]
        alone = score([HYPOTHESES[clip] for clip in clips], [REFERENCES[clip] for clip in clips], **scoring)
        assert group == alone
    assert found["signer"]["unknown"].bleu4 is None and found["signer"]["anna"].bleu4 is not None


def test_lengths() -> None:
    texts = ["", "one", "a b c d e", "a b c d e f", "a " * 20, "a " * 21, "今天天气很好"]
    assert [length_group(text) for text in texts] == ["1-5", "1-5", "1-5", "6-10", "11-20", "21+", "6-10"]
