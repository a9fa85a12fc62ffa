"""Wrong input: one line that says what, where and how to mend it, exit code 2 or 3, and nothing left behind."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

Run = Callable[..., Any]


@pytest.fixture
def refused(run: Run, settings: list[str], tmp_path: Path) -> Callable[..., str]:
    """Run the trainer, expect a refusal, and hand back its one line."""

    def refused(*arguments: object, code: int = 2, recipe: str = "t5_small", ranks: int = 0) -> str:
        run_dir = tmp_path / "run"
        done = run("launch/train.py", "--recipe", recipe, *settings, *arguments, f"run.dir={run_dir}", ranks=ranks)
        assert done.code == code, done.out + done.err
        assert len(done.errors) == 1, done.err
        assert "Traceback" not in done.err
        assert not run_dir.exists()
        return str(done.errors[0])

    return refused


def test_no_such_table(refused: Callable[..., str], tmp_path: Path) -> None:
    line = refused(f"data.table={tmp_path}/nowhere.csv")
    assert "nowhere.csv" in line


def test_a_table_without_texts(refused: Callable[..., str], tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    table.write_text("uid,sentence\na,b\n")
    line = refused(f"data.table={table}")
    assert "text" in line and "sentence" in line


def test_no_such_folder_of_clips(refused: Callable[..., str], tmp_path: Path) -> None:
    assert "nowhere" in refused(f"data.poses={tmp_path}/nowhere")


def test_clips_that_are_all_missing(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(f"data.poses={tmp_path}/empty")


def test_some_unreadable_clips_are_too_many(refused: Callable[..., str], clips: Path, tmp_path: Path) -> None:
    poses = tmp_path / "poses"
    poses.mkdir()
    for number, path in enumerate(sorted((clips / "poses").iterdir())):
        (poses / path.name).write_bytes(path.read_bytes()[: 2000 if number % 5 == 0 else None])
    line = refused(f"data.poses={poses}", code=3)
    assert "rejects" in line


def test_empty_texts(refused: Callable[..., str], clips: Path, tmp_path: Path) -> None:
    lines = (clips / "table.csv").read_text().splitlines()
    header, rows = lines[0], [line.split(",") for line in lines[1:]]
    emptied = [
        ",".join([row[0], "", *row[2:]]) if number % 5 == 0 else ",".join(row) for number, row in enumerate(rows)
    ]
    table = tmp_path / "table.csv"
    table.write_text("\n".join([header, *emptied]) + "\n")
    line = refused(f"data.table={table}")
    assert "line 2" in line and "text is empty" in line


def test_a_recipe_that_does_not_exist(refused: Callable[..., str]) -> None:
    line = refused(recipe="t5_smal")
    assert "did you mean t5_small?" in line


def test_misspelt_keys_are_listed_at_once(refused: Callable[..., str]) -> None:
    line = refused("training.epoch=3", "trainin.seed=1", "ds.gradient_cliping=1")
    assert "training.epochs" in line and "training" in line and "gradient_clipping" in line


def test_a_deepspeed_json_with_an_unknown_key(refused: Callable[..., str], tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2, "overlap_com": True}}))
    line = refused("--ds", path)
    assert "overlap_comm" in line and "mine.json" in line


def test_fewer_clips_in_a_batch_than_ranks(refused: Callable[..., str]) -> None:
    line = refused("training.global_batch_size=1", ranks=2)
    assert "training.global_batch_size=2" in line


def test_more_ranks_than_the_machine_has(refused: Callable[..., str]) -> None:
    ranks = 1 + (torch.cuda.device_count() or os.cpu_count() or 1)
    line = refused(ranks=ranks)
    assert f"--num_gpus {ranks}" in line


def test_two_ranks_say_it_once(refused: Callable[..., str], tmp_path: Path) -> None:
    assert "nowhere.csv" in refused(f"data.table={tmp_path}/nowhere.csv", ranks=2)


def test_a_model_that_is_not_there_while_offline(refused: Callable[..., str], tmp_path: Path) -> None:
    line = refused("model.backbone=somebody/some-model", "model.from_scratch=false", "model.tiny=false")
    assert "somebody/some-model" in line and "HF_HOME" in line
