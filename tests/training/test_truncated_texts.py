"""Texts that are cut are counted, and the keys that let them be whole are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import ByT5Tokenizer

from toolkit.batching.collate import IGNORED_LABEL, target_labels
from toolkit.models.tokenizers import train_tokenizer
from toolkit.recipe.load import load_recipe
from toolkit.tracking.tracker import open_tracker
from toolkit.training.truncated_texts import TruncatedTexts, find_truncated_texts, warn_of_truncated_texts

TEXTS = ["one two three four five six seven", "one", "", "one two three four", "six seven"]


@pytest.mark.parametrize("kind", ["bytes", "trained"])
@pytest.mark.parametrize("limit", [3, 5, 9, 20, 33, 34, 99])
def test_what_is_counted_is_what_is_cut(kind: str, limit: int) -> None:
    tokenizer: Any = ByT5Tokenizer() if kind == "bytes" else train_tokenizer(TEXTS)
    whole = (target_labels(TEXTS, tokenizer, 999) != IGNORED_LABEL).sum(dim=1)
    learnt = (target_labels(TEXTS, tokenizer, limit) != IGNORED_LABEL).sum(dim=1)
    expected = TruncatedTexts(int((learnt < whole).sum()), len(TEXTS), int(whole.max()))
    assert find_truncated_texts(TEXTS, tokenizer, limit) == (expected if expected.count else None)


def told(run_dir: Path, *overrides: str, step: int = 0) -> tuple[list[str], list[dict[str, Any]]]:
    recipe = load_recipe("demo", overrides)
    said: list[str] = []
    with open_tracker(run_dir, recipe.tracking, {}, is_main=True) as tracker:
        warn_of_truncated_texts(recipe, TEXTS, ByT5Tokenizer(), tracker, step, said.append)
    return said, [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_line_and_an_event_say_how_many_and_which_keys(tmp_path: Path) -> None:
    said, events = told(tmp_path, "training.max_target_tokens=16", "evaluation.max_new_tokens=20")
    assert len(said) == 1 and "\n" not in said[0]
    assert said[0].startswith("warning: 2 of 5 training texts are longer than training.max_target_tokens=16 ")
    assert "the longest has 34 tokens: training.max_target_tokens=34 learns them whole" in said[0]
    assert said[0].endswith("evaluation.max_new_tokens=34 lets them be written")
    assert [(event["kind"], event["step"]) for event in events] == [("event", 0)]
    assert (events[0]["texts_cut"], events[0]["longest_text_tokens"]) == (2, 34)


def test_a_run_that_goes_on_says_it_again_and_tells_no_second_event(tmp_path: Path) -> None:
    said, events = told(tmp_path, "training.max_target_tokens=16", "evaluation.max_new_tokens=40", step=7)
    assert len(said) == 1 and "max_new_tokens" not in said[0]
    assert events == []


def test_nothing_is_said_where_nothing_is_cut(tmp_path: Path) -> None:
    assert told(tmp_path, "training.max_target_tokens=34") == ([], [])
