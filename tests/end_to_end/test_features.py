"""Runs on poses and features of another network, on two ranks: from training to a translation of files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.written_features import write_features

WIDTH, FPS = 24, 10.0


@pytest.fixture(scope="module")
def features(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("features")
    write_features(clips / "poses", folder, WIDTH, FPS)
    return folder


@pytest.mark.nightly
@pytest.mark.parametrize(("ds", "inputs"), [("zero2", "sum"), ("zero3", "concat"), ("zero1", "features alone")])
def test_features_are_trained_evaluated_exported_and_translated(
    run: Callable[..., Any], settings: list[str], clips: Path, features: Path, ds: str, inputs: str, tmp_path: Path
) -> None:
    run_dir, are_alone = tmp_path / "run", inputs == "features alone"
    arguments = [
        *("--recipe", "t5_small", "--ds", ds, "--json", *settings, f"run.dir={run_dir}", "training.epochs=1"),
        *(f"data.features={features}", f"data.features_fps={FPS}"),
        "data.poses=null" if are_alone else f"model.fusion={inputs}",
        *("augmentation.speed=0.2", "augmentation.feature_mask=0.3", "training.ctc_weight=0"),
    ]
    done = run("launch/train.py", *arguments, ranks=2)
    assert done.code == 0, done.err + done.out
    assert done.json["scores"] and (run_dir / "report.html").is_file()
    done = run("launch/export.py", run_dir, "--to", tmp_path / "exported")
    assert done.code == 0, done.err
    clip = sorted((clips / "poses").glob("*.pose"))[0]
    texts = []
    for model in (run_dir, tmp_path / "exported"):
        its_features = features / f"{clip.stem}.npy"
        words = (its_features,) if are_alone else (clip, "--features", its_features)
        done = run("launch/translate.py", "--model", model, *words, "--features-fps", FPS)
        assert done.code == 0, done.err
        texts.append(done.out)
    assert texts[0] == texts[1]
    done = run("launch/evaluate.py", "--model", run_dir, "--split", "test")
    assert done.code == 0, done.err


def test_ctc_beside_two_passes_over_a_clip_is_refused_before_a_process_group(
    train_here: Callable[..., Any], settings: list[str], features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("toolkit.cluster.process_group.join_process_group", None)
    done = train_here(
        *("--recipe", "t5_small", *settings, f"data.features={features}", f"data.features_fps={FPS}"),
        *("model.fusion=concat", "training.ctc_weight=0.3", f"run.dir={tmp_path / 'run'}"),
    )
    assert done.code == 2 and "model.fusion" in done.err and len(done.errors) == 1
