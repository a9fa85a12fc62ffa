"""A run whose CTC head reads glosses, on two ranks: stopped, resumed and scored as a run that was not stopped."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.written_corpora import write_corpus
from toolkit.corpus.packed import Clip
from toolkit.poses.features import NORMALISATION
from toolkit.poses.landmarks import load_landmark_set

SIGNS = ("HELLO", "RAIN", "NIGHT", "RED", "MOON")
READS = ("--recipe", "t5_small", "--ds", "zero2", "training.ctc_target=gloss", "training.ctc_weight=0.5")
SMALL = (
    "training.epochs=2",
    "training.log_every=1",
    "training.save_every=99",
    "evaluation.num_beams=1",
    "model.tokenizer=bytes",
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sentences of two signs, whose words stand in another order than the glosses."""
    rng, landmark_set = np.random.default_rng(0), load_landmark_set("hands_body_50")

    def clip(split: str, number: int) -> Clip:
        signs = rng.choice(SIGNS, 2, replace=False).tolist()
        features = rng.normal(size=(int(rng.integers(20, 41)), 50, 3)).astype(np.float16)
        return Clip(f"{split}-{number}", " and ".join(reversed(signs)).lower(), features, gloss=" ".join(signs))

    clips = {
        split: [clip(split, n) for n in range(count)] for split, count in {"train": 24, "dev": 4, "test": 5}.items()
    }
    return write_corpus(tmp_path_factory.mktemp("glosses") / "corpus", clips, landmark_set, 12.5, NORMALISATION).path


@pytest.mark.nightly
def test_a_gloss_run_is_stopped_resumed_and_scored(
    run: Callable[..., Any], losses: Callable[[Path], list[float]], settings: list[str], corpus: Path, tmp_path: Path
) -> None:
    kept = [value for value in settings if not value.startswith("data.")]
    arguments = [*READS, *kept, *SMALL, f"data.corpus={corpus}", "--json"]
    whole = run("launch/train.py", *arguments, f"run.dir={tmp_path / 'whole'}", ranks=2)
    assert whole.code == 0, whole.out + whole.err
    assert whole.json["steps"] == 6 and whole.json["splits"]["test"]["scores"]["gloss_wer"] is not None

    words = [*arguments, f"run.dir={tmp_path / 'run'}"]
    first = run("launch/train.py", *words, "training.time_limit=0.0001", ranks=2)
    assert first.code == 75, first.out + first.err
    rest = run("launch/train.py", *words, ranks=2)
    assert rest.code == 0, rest.out + rest.err
    assert "resuming from" in rest.out and rest.json["steps"] == 6
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert rest.json["splits"]["test"]["scores"] == whole.json["splits"]["test"]["scores"]
    entries = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(entry["dev_gloss_wer"] >= 0 for entry in entries if entry["kind"] == "eval")

    scored = run("launch/evaluate.py", "--model", tmp_path / "run", "--split", "test", "--json")
    assert scored.code == 0, scored.out + scored.err
    assert scored.json["splits"]["test"]["scores"] == rest.json["splits"]["test"]["scores"]
