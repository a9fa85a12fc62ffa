"""Settings that do not go together with a corpus get a note that names key, value and remedy; others get none."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoTokenizer, ByT5Tokenizer

from toolkit.models.tokenizers import make_tokenizer, train_tokenizer
from toolkit.recipe.load import load_recipe
from toolkit.recipe.prompts import CONDITIONS
from toolkit.training.setting_notes import setting_notes

LONG = ["a first sentence of words", "and a second one"]
METADATA = {"fps": 12.5, "max_frames": 300, "min_frames": 2, "too_long": "subsample", "no_hands": "keep"}


def notes(
    *overrides: str,
    dev: list[str] | None = LONG,
    steps: int = 1000,
    epoch_steps: int = 100,
    tokenizer: Any = None,
    repeats: int = 0,
    leakage: dict[str, int] | None = None,
) -> list[str]:
    unknown = dict.fromkeys(CONDITIONS, "")
    train = SimpleNamespace(texts=LONG, condition_counts=lambda: [(unknown, len(LONG))])
    splits = {"train": train} | ({"dev": SimpleNamespace(texts=dev)} if dev else {})
    corpus: Any = SimpleNamespace(
        splits=splits,
        metadata=SimpleNamespace(**METADATA, shared_texts="keep", leakage=leakage or {}),
        members={},
        landmark_set=SimpleNamespace(name="hands_body_50"),
    )
    recipe = load_recipe("t5_small", ["data.corpus=C", f"evaluation.no_repeat_ngram_size={repeats}", *overrides])
    return list(setting_notes(recipe, corpus, tokenizer or ByT5Tokenizer(), steps=steps, epoch_steps=epoch_steps))


def test_settings_that_go_together_get_no_note() -> None:
    assert notes() == []
    assert notes("training.freeze_backbone_steps=999", "training.eval_every=10") == []
    assert notes(leakage={"dev_signers_in_train": 0}) == []


def test_what_splits_share_is_stated_before_the_first_step() -> None:
    (note,) = notes(leakage={"dev_signers_in_train": 3, "dev_videos_in_train": 0})
    assert "dev signers in train 3" in note
    assert notes("training.early_stopping=9", "evaluation.max_new_tokens=22") == []


@pytest.mark.parametrize(
    ("overrides", "given", "named"),
    [
        ([], {"steps": 499}, ["training.save_every=500", "499 steps", "training.save_every=124"]),
        (["training.freeze_backbone_steps=1000"], {}, ["training.freeze_backbone_steps=1000", "1000 steps"]),
        (["training.eval_every=11"], {}, ["training.eval_every=11", "10 epochs"]),
        (["training.early_stopping=10"], {}, ["training.early_stopping=10", "10 times"]),
        (["training.early_stopping=3"], {"dev": None}, ["training.early_stopping=3", "0 times"]),
        (["evaluation.max_new_tokens=20"], {}, ["evaluation.max_new_tokens=20", "1 of 2", "max_new_tokens=26"]),
        ([], {"dev": ["one two three", "four"]}, ["evaluation.select_by=bleu4", "evaluation.select_by=chrf"]),
        (["data.fps=25"], {}, ["data.fps=25.0 (corpus: 12.5) has no effect", "data.corpus=C"]),
        (
            ["data.landmarks=isign_76", "data.max_frames=512"],
            {},
            ["data.max_frames=512 (corpus: 300)", "data.landmarks=isign_76 (corpus: hands_body_50) have no effect"],
        ),
    ],
)
def test_a_note_names_the_setting_and_the_remedy(overrides: list[str], given: Any, named: list[str]) -> None:
    (note,) = notes(*overrides, **given)
    assert all(part in note for part in named), note


def test_words_are_those_of_the_score() -> None:
    chinese = ["红色的石头门", "蓝色的木头窗"]
    assert len(notes(dev=chinese)) == 1
    assert notes("evaluation.tokenize=zh", dev=chinese) == []
    assert notes("evaluation.select_by=bleu1", dev=["one", "two"]) == []
    assert notes("evaluation.select_by=cer", dev=["one", "two"]) == []


def test_a_tokenizer_of_bytes_is_known_by_its_tokens(tmp_path) -> None:
    """A model in a folder of any name has it, too."""
    texts = ["Stop, go, stop नमस्ते"] * 8
    for tokenizer in (ByT5Tokenizer(), make_tokenizer("bytes")):
        tokenizer.save_pretrained(tmp_path / "mine")
        loaded = AutoTokenizer.from_pretrained(tmp_path / "mine")
        (note,) = notes(repeats=3, tokenizer=loaded)
        assert "evaluation.no_repeat_ngram_size=3" in note and "set evaluation.no_repeat_ngram_size=0" in note
        assert notes(repeats=0, tokenizer=loaded) == []
    words = train_tokenizer(texts)
    assert notes(repeats=3, tokenizer=words) == []
