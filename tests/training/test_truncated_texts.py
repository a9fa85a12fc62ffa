"""Truncated training texts are counted, and the warning names the settings that train on them whole."""

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
from toolkit.training.truncated_texts import truncated_lengths, warn_of_truncated_texts

TEXTS = ["one two three four five six seven", "one", "", "one two three four", "six seven"]


@pytest.mark.parametrize("kind", ["bytes", "trained"])
@pytest.mark.parametrize("limit", [3, 5, 9, 20, 33, 34, 99])
def test_the_count_is_that_of_truncated_labels(kind: str, limit: int) -> None:
    tokenizer: Any = ByT5Tokenizer() if kind == "bytes" else train_tokenizer(TEXTS)
    whole = (target_labels(TEXTS, tokenizer, 999) != IGNORED_LABEL).sum(dim=1)
    learnt = (target_labels(TEXTS, tokenizer, limit) != IGNORED_LABEL).sum(dim=1)
    assert truncated_lengths(TEXTS, tokenizer, limit) == whole[learnt < whole].tolist()


def warn(run_dir: Path, *overrides: str, step: int = 0) -> tuple[list[str], list[dict[str, Any]]]:
    """Lines on the terminal, and events in ``metrics.jsonl``."""
    recipe = load_recipe("demo", overrides)
    lines: list[str] = []
    with open_tracker(run_dir, recipe.tracking, {}, is_main=True) as tracker:
        warn_of_truncated_texts(recipe, TEXTS, ByT5Tokenizer(), tracker, step, lines.append)
    return lines, [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_line_and_an_event_give_the_count_and_the_settings(tmp_path: Path) -> None:
    lines, events = warn(tmp_path, "training.max_target_tokens=16", "evaluation.max_new_tokens=20")
    assert len(lines) == 1 and "\n" not in lines[0]
    settings = ("training.max_target_tokens=16", "training.max_target_tokens=34", "evaluation.max_new_tokens=34")
    assert all(part in lines[0] for part in ("warning:", "2 of 5", *settings))
    assert [(event["kind"], event["step"]) for event in events] == [("event", 0)]
    assert (events[0]["texts_cut"], events[0]["longest_text_tokens"]) == (2, 34)


def test_a_resumed_run_warns_again_without_a_second_event(tmp_path: Path) -> None:
    lines, events = warn(tmp_path, "training.max_target_tokens=16", "evaluation.max_new_tokens=40", step=7)
    assert len(lines) == 1 and "max_new_tokens" not in lines[0]
    assert events == []


def test_without_truncated_texts_there_is_no_warning(tmp_path: Path) -> None:
    assert warn(tmp_path, "training.max_target_tokens=34") == ([], [])
