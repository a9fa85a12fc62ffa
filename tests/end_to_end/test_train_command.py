"""`launch/train.py` from the command line to the scores, on two ranks."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModel, AutoProcessor

import toolkit.auto  # noqa: F401 - registers the translator
from toolkit.corpus.packed import Corpus
from toolkit.recipe.resolve import ResolvedRun
from toolkit.scoring.predictions import read_predictions

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def finished(run: Run, settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, list[str]]:
    """A run of the recipe for iSign's layout on somebody's own clips."""
    run_dir = tmp_path_factory.mktemp("runs") / "mine"
    arguments = [
        *("--recipe", "t5_small", "--ds", "zero3", "--json", *settings, f"run.dir={run_dir}"),
        *("training.epochs=2", "training.ctc_weight=0.5", "evaluation.ctc_weight=0.3", "evaluation.select_by=cer"),
        "ds.zero_optimization.stage3_param_persistence_threshold=0",
    ]
    done = run("launch/train.py", *arguments, ranks=2)
    assert done.code == 0, done.err + done.out
    return run_dir, done, arguments


def test_the_last_line_is_one_json_object_with_scores_floors_and_signature(
    finished: tuple[Path, Any, list[str]],
) -> None:
    run_dir, done, _ = finished
    summary = done.json
    assert {
        "run_dir",
        "steps",
        "clips_per_second",
        "scores",
        "floors",
        "signature",
        "peak_memory_gib",
    } <= summary.keys()
    names = {"bleu1", "bleu2", "bleu3", "bleu4", "chrf", "rouge_l", "wer", "cer"}
    assert summary["scores"].keys() >= names
    assert summary["floors"].keys() >= {"constant", "random"}
    assert summary["floors"]["constant"].keys() >= names
    assert summary["steps"] == 6
    assert summary["clips_per_second"] > 0
    assert "sacrebleu" not in summary and "version:" in summary["signature"]["bleu"]
    assert json.loads((run_dir / "scores.json").read_text()) == summary


def test_a_person_sees_a_table_samples_and_the_run_directory(finished: tuple[Path, Any, list[str]]) -> None:
    run_dir, done, _ = finished
    assert "floor: constant sentence" in done.out
    assert done.out.count("hypothesis") == 6
    assert f"run directory: {run_dir}" in done.out
    for word in ("epoch", "loss", "lr", "grad", "clips/s", "frames/s", "pad", "ETA"):
        assert word in next(line for line in done.out.splitlines() if line.startswith("epoch ")), word


def test_the_run_directory_holds_everything(finished: tuple[Path, Any, list[str]]) -> None:
    run_dir, _, _ = finished
    resolved = ResolvedRun.load(run_dir)
    assert resolved.world_size == 2
    assert resolved.zero_stage == 3
    assert resolved.accumulation_steps == 2
    assert json.loads((run_dir / "status.json").read_text())["status"] == "finished"
    assert json.loads((run_dir / "environment.json").read_text())["packages"]["deepspeed"]
    (attention,) = re.findall(r"attention: (.+); kernels enabled for sdpa: cpu", (run_dir / "log.txt").read_text())
    assert "cpu_sdpa" in attention
    assert [path.name for path in sorted((run_dir / "predictions").iterdir())] == [
        "predictions_epoch_001.csv",
        "predictions_epoch_002.csv",
        "test.csv",
        "test_unseen_languages.csv",
    ]
    kinds = [json.loads(line)["kind"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert kinds.count("train") == 6
    assert kinds.count("eval") >= 2


def test_every_test_clip_is_translated_exactly_once(finished: tuple[Path, Any, list[str]], clips: Path) -> None:
    run_dir, _, _ = finished
    table = [line.split(",") for line in (clips / "table.csv").read_text().splitlines()[1:]]
    expected = {row[0]: row[1] for row in table if row[2] == "test"}
    predictions = read_predictions(run_dir / "predictions" / "test.csv")
    assert {row.uid: row.reference for row in predictions} == expected
    assert len(predictions) == len(expected)


def test_best_is_a_folder_that_turns_a_pose_file_into_text(finished: tuple[Path, Any, list[str]], clips: Path) -> None:
    run_dir, _, _ = finished
    model = AutoModel.from_pretrained(run_dir / "best").eval()
    processor = AutoProcessor.from_pretrained(run_dir / "best")
    rows = read_predictions(run_dir / "predictions" / "test.csv")
    inputs = processor([clips / "poses" / f"{row.uid}.pose" for row in rows])
    texts = processor.batch_decode(model.generate(**inputs))
    assert [text.strip() for text in texts] == [row.hypothesis for row in rows]


def test_a_finished_run_is_not_trained_again(finished: tuple[Path, Any, list[str]], fork: Run) -> None:
    run_dir, done, arguments = finished
    before = (run_dir / "metrics.jsonl").read_bytes()
    again = fork("launch/train.py", *arguments, ranks=2)
    assert again.code == 0, again.err
    assert "is finished; --new trains again" in again.out
    assert again.json == done.json
    assert (run_dir / "metrics.jsonl").read_bytes() == before


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_clips(
    fork: Run, settings: list[str], clips: Path, tmp_path: Path
) -> None:
    absurd = ["training.learning_rate=1e30", "training.warmup_ratio=0", "training.schedule=constant"]
    done = fork("launch/train.py", "--recipe", "t5_small", *settings, *absurd, f"run.dir={tmp_path}/r")
    assert done.code == 2, done.out + done.err
    assert len(done.errors) == 1
    assert "the loss is not finite at step 2" in done.errors[0]
    listed = (tmp_path / "r" / "not_finite_rank_00.txt").read_text().split()
    known = [line.partition(",")[0] for line in (clips / "table.csv").read_text().splitlines()]
    assert len(listed) == 8
    assert set(listed) <= set(known)
    assert json.loads((tmp_path / "r" / "status.json").read_text())["status"] == "failed"


@pytest.mark.nightly  # tests/as_users_do overfits by day
def test_overfit_reports_whether_it_worked(fork: Run, settings: list[str], tmp_path: Path) -> None:
    learning = ["training.learning_rate=3e-3", "training.pose_encoder_learning_rate=3e-3", "training.max_steps=400"]
    sizes = ("training.global_batch_size", "training.micro_batch_size")
    lengths = ("training.max_target_tokens", "evaluation.max_new_tokens")
    given = [setting for setting in settings if not setting.startswith((*sizes, *lengths))]
    done = fork(
        "launch/train.py", "--recipe", "demo", "--overfit", 4, "--json", *given, *learning, f"run.dir={tmp_path}/r"
    )
    assert done.code == 0, done.err
    assert "learned 4 of 4 clips" in done.out
    assert done.json["learned"] is True
    assert done.json["steps"] < 400
    hopeless = fork(
        "launch/train.py", "--recipe", "demo", "--overfit", 4, *given, "training.max_steps=2", f"run.dir={tmp_path}/h"
    )
    assert hopeless.code == 0, hopeless.err
    assert "learned 0 of 4 clips in 2 steps" in hopeless.out
    assert "it is not learning" in hopeless.out


def test_a_corpus_that_is_ready_is_used_as_it_is(
    finished: tuple[Path, Any, list[str]], fork: Run, settings: list[str], tmp_path: Path
) -> None:
    cache = next(value for value in settings if value.startswith("data.cache=")).partition("=")[2]
    corpus = next(path.parent for path in Path(cache).glob("*/corpus.json"))
    others = [value for value in settings if not value.startswith("data.")]
    done = fork(
        *("launch/train.py", "--recipe", "t5_small", "--json", *others),
        *(f"data.corpus={corpus}", "training.max_steps=1", f"run.dir={tmp_path}/r"),
    )
    assert done.code == 0, done.err
    assert done.json["splits"]["test"]["clips"] == len(Corpus.open(corpus).splits["test"])


def test_a_run_whose_scores_stand_still_ends_early(fork: Run, settings: list[str], tmp_path: Path) -> None:
    still = ["training.learning_rate=1e-30", "training.epochs=9", "training.early_stopping=2"]
    done = fork("launch/train.py", "--recipe", "t5_small", "--json", *settings, *still, f"run.dir={tmp_path}/r")
    assert done.code == 0, done.out + done.err
    assert "stopping early: no better bleu4 in 2 evaluations; the best model is that of step 3" in done.out
    assert done.json["steps"] == 9  # three epochs of three steps
    assert json.loads((tmp_path / "r" / "status.json").read_text())["status"] == "finished"
