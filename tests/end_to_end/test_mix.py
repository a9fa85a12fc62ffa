"""A run on a mix of three corpora, on two ranks: stopped, resumed, scored; and the same clips on one rank."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.scripts import run_main
from tests.written_mixes import write_one, write_three

Run = Callable[..., Any]
ONE_EPOCH = 3  # steps
SMALL = [
    *("training.epochs=2", "data.epoch_clips=24", "training.save_every=99", "evaluation.num_beams=1"),
    *("model.dropout=0", "model.pose_encoder.dropout=0", "evaluation.select_by=chrf", "model.tokenizer=bytes"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_three(tmp_path_factory.mktemp("three"))


@pytest.fixture(scope="module")
def arguments(settings: list[str], folders: list[Path]) -> list[str]:
    large, small, synthetic = map(str, folders)
    parts = [
        {"corpus": large, "weight": 1, "language": "ins", "prefix": "signed {language}:"},
        {"corpus": small, "weight": 1},
        {"corpus": synthetic, "weight": [2, 0]},
    ]
    kept = [value for value in settings if not value.startswith("data.")]
    return ["--recipe", "t5_small", "--ds", "zero2", *kept, *SMALL, f"data.corpora={json.dumps(parts)}"]


def test_a_mix_is_stopped_resumed_and_scored_corpus_by_corpus(
    run: Run, train_here: Run, arguments: list[str], folders: list[Path], tmp_path: Path
) -> None:
    words = [*arguments, f"run.dir={tmp_path / 'run'}", "--json"]
    first = run("launch/train.py", *words, "training.time_limit=0.0001", ranks=2)
    assert first.code == 75, first.out + first.err
    assert "large: 40 clips, 28.6%" in first.out and "synthetic: 20 clips, 42.9%" in first.out
    assert "dev signers in train of another corpus 5" in first.out

    heavier = [word.replace('"weight": 1}', '"weight": 3}') for word in words]
    refused = train_here(*heavier)
    assert refused.code == 2 and "data.corpora.1.weight 1.0 -> 3.0" in refused.err

    rest = run("launch/train.py", *words, ranks=2)
    assert rest.code == 0, rest.out + rest.err
    assert "resuming from" in rest.out and rest.json["steps"] == 2 * ONE_EPOCH
    assert list(rest.json["splits"]) == ["test", "test@large", "test@small"]
    assert [split["clips"] for split in rest.json["splits"].values()] == [6, 4, 2]
    predictions = tmp_path / "run" / "predictions"
    assert {path.name for path in predictions.glob("test*.csv")} == {"test.csv", "test@large.csv", "test@small.csv"}
    entries = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    evaluated = [entry for entry in entries if entry["kind"] == "eval"][-1]
    kept = json.loads((tmp_path / "run" / "best" / "evaluation.json").read_text())
    mean = (evaluated["dev@large_chrf"] + evaluated["dev@small_chrf"]) / 2
    best = max((entry["dev@large_chrf"] + entry["dev@small_chrf"]) / 2 for entry in entries if entry["kind"] == "eval")
    assert kept["scores"]["chrf"] == pytest.approx(best) and mean <= best
    report = (tmp_path / "run" / "report.html").read_text()
    assert "dev signers in train of another corpus 5" in report
    assert "test@small" in report and "have no skeletons" not in report and '"skeleton":null' not in report

    scored = run("launch/evaluate.py", "--model", tmp_path / "run", "--json")
    assert scored.code == 0, scored.out + scored.err
    for name, split in rest.json["splits"].items():
        assert scored.json["splits"][name]["scores"] == split["scores"], name
    done = run_main("launch/export.py", tmp_path / "run", "--to", tmp_path / "exported", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    card = (tmp_path / "exported" / "README.md").read_text()
    assert "A mix of 3 corpora" in card and "`small` (weight 1)" in card and str(folders[0].parent) not in card


def test_corpora_of_other_landmarks_are_refused_before_a_process_group(
    train_here: Run, arguments: list[str], folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("toolkit.cluster.process_group.join_process_group", None)
    other = write_one(tmp_path / "other", {"train": 3}, landmarks="isign_76").path
    done = train_here(*arguments, f"data.corpora=[{folders[0]}, {other}]", f"run.dir={tmp_path / 'run'}")
    assert done.code == 2 and len(done.errors) == 1
    assert "isign_76" in done.err and "launch/prepare.py" in done.err and not (tmp_path / "run").exists()


@pytest.mark.nightly
def test_a_mix_has_the_same_losses_without_a_stop_and_on_one_rank(
    run: Run, losses: Callable[[Path], list[float]], arguments: list[str], tmp_path: Path
) -> None:
    found = {}
    for name, ranks in (("two", 2), ("one", 0), ("stopped", 2)):
        words = [*arguments, "training.log_every=1", f"run.dir={tmp_path / name}"]
        if name == "stopped":
            assert run("launch/train.py", *words, "training.time_limit=0.0001", ranks=2).code == 75
        done = run("launch/train.py", *words, ranks=ranks)
        assert done.code == 0, done.out + done.err
        found[name] = losses(tmp_path / name)
    assert found["two"] == found["stopped"] and len(found["two"]) == 2 * ONE_EPOCH
    assert found["one"] == pytest.approx(found["two"], rel=1e-4)
