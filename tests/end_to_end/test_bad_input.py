"""Wrong input: one error that names what and where, a hint, exit code 2 or 3, and no run directory."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaModel

from toolkit.models.tokenizers import make_tokenizer

Run = Callable[..., Any]


@pytest.fixture
def refused(fork: Run, train_here: Callable[..., Any], settings: list[str], tmp_path: Path) -> Callable[..., str]:
    """Run the trainer, in this process where ``ranks`` is None, expect a refusal; its error and hint."""

    def refused(*arguments: object, code: int = 2, recipe: str = "t5_small", ranks: int | None = None) -> str:
        run_dir = tmp_path / "run"
        words = ["--recipe", recipe, *settings, *arguments, f"run.dir={run_dir}"]
        done = train_here(*words) if ranks is None else fork("launch/train.py", *words, ranks=ranks)
        assert done.code == code, done.out + done.err
        assert len(done.errors) == 1, done.err
        assert "Traceback" not in done.err
        assert not run_dir.exists()
        return str(done.errors[0])

    return refused


def test_no_such_table(refused: Callable[..., str], tmp_path: Path) -> None:
    error = refused(f"data.table={tmp_path}/nowhere.csv", ranks=0)
    assert "nowhere.csv" in error


def test_a_table_without_texts(refused: Callable[..., str], tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    table.write_text("uid,sentence\na,b\n")
    error = refused(f"data.table={table}")
    assert "text" in error and "sentence" in error


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
    error = refused(f"data.poses={poses}", code=3)
    assert "rejects" in error


def test_empty_texts(refused: Callable[..., str], clips: Path, tmp_path: Path) -> None:
    lines = (clips / "table.csv").read_text().splitlines()
    header, rows = lines[0], [line.split(",") for line in lines[1:]]
    emptied = [
        ",".join([row[0], "", *row[2:]]) if number % 5 == 0 else ",".join(row) for number, row in enumerate(rows)
    ]
    table = tmp_path / "table.csv"
    table.write_text("\n".join([header, *emptied]) + "\n")
    error = refused(f"data.table={table}")
    assert "table.csv" in error and "line 2" in error


def test_glosses_that_the_clips_lack(refused: Callable[..., str]) -> None:
    error = refused("training.ctc_weight=0.5", "training.ctc_target=gloss")
    assert "24 of 24" in error and "column gloss" in error and "training.ctc_target=text" in error


@pytest.mark.parametrize("wrong", ["evaluation.tokenize=13b", "evaluation.tokenize=ko-mecab", "model.tokenizer={}"])
def test_a_tokenizer_that_cannot_be_loaded(refused: Callable[..., str], tmp_path: Path, wrong: str) -> None:
    assert wrong.format(tmp_path).rpartition("=")[2] in refused(wrong.format(tmp_path))


def test_a_recipe_that_does_not_exist(refused: Callable[..., str]) -> None:
    error = refused(recipe="t5_smal")
    assert "t5_small" in error


def test_misspelt_keys_are_listed_at_once(refused: Callable[..., str]) -> None:
    error = refused("training.epoch=3", "trainin.seed=1", "ds.gradient_cliping=1")
    assert "training.epochs" in error and "training" in error and "gradient_clipping" in error


def test_a_deepspeed_json_with_an_unknown_key(refused: Callable[..., str], tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2, "overlap_com": True}}))
    error = refused("--ds", path)
    assert "overlap_comm" in error and "mine.json" in error


def as_rank_0_of(monkeypatch: pytest.MonkeyPatch, ranks: int) -> None:
    """Let this process be the first of so many ranks, as a launcher starts them; the others are not there."""
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, str(ranks))
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")


def test_fewer_clips_in_a_batch_than_ranks(refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    as_rank_0_of(monkeypatch, 2)
    error = refused("training.global_batch_size=1")
    assert "training.global_batch_size=2" in error


def test_more_ranks_than_the_machine_has(refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = 1 + (torch.cuda.device_count() or os.cpu_count() or 1)
    as_rank_0_of(monkeypatch, ranks)
    error = refused()
    assert f"--num_gpus {ranks}" in error


def test_two_ranks_print_it_once(refused: Callable[..., str], tmp_path: Path) -> None:
    assert "nowhere.csv" in refused(f"data.table={tmp_path}/nowhere.csv", ranks=2)


def test_a_model_that_is_not_in_the_cache_while_offline(refused: Callable[..., str], tmp_path: Path) -> None:
    error = refused("model.backbone=somebody/some-model", "model.from_scratch=false", "model.tiny=false", ranks=0)
    assert "somebody/some-model" in error and "HF_HOME" in error


LLAMA = {
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


@pytest.fixture
def backbone(tmp_path: Path) -> Callable[..., str]:
    """An override that names a folder with this configuration and no weights."""

    def backbone(**config: object) -> str:
        (tmp_path / "config.json").write_text(json.dumps(config))
        return f"model.backbone={tmp_path}"

    return backbone


@pytest.mark.parametrize("kind", ["bert", "clip_text_model", "qwen2_vl", "qwen2_5_vl", "gemma3", "mllama", "llava"])
def test_models_that_only_read_or_that_see_pictures(
    refused: Callable[..., str], backbone: Callable[..., str], kind: str, tmp_path: Path
) -> None:
    error = refused(backbone(model_type=kind))
    assert f"model.backbone={tmp_path} is a {kind}" in error and "recipes.py ls" in error


def test_a_configuration_whose_values_do_not_go_together(
    refused: Callable[..., str], backbone: Callable[..., str], tmp_path: Path
) -> None:
    error = refused(backbone(**LLAMA | {"num_attention_heads": 3}), "model.tiny=false", "model.from_scratch=false")
    assert str(tmp_path) in error and "16" in error and "3" in error


def test_a_language_model_that_reads_words_only(
    refused: Callable[..., str], backbone: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(self: Any, input_ids: Any = None, attention_mask: Any = None) -> Any: ...

    monkeypatch.setattr(LlamaModel, "forward", forward)
    error = refused(backbone(**LLAMA))
    assert "llama" in error and "inputs_embeds" in error


def test_a_context_that_is_shorter_than_a_clip_and_its_text(
    refused: Callable[..., str], backbone: Callable[..., str]
) -> None:
    error = refused(backbone(**LLAMA, max_position_embeddings=24), "model.tiny=false")
    assert "24 positions" in error and "data.max_frames" in error


def test_a_chat_template_that_drops_the_poses(refused: Callable[..., str], tmp_path: Path) -> None:
    tokenizer = make_tokenizer("bytes")
    tokenizer.chat_template = "{% for message in messages %}{{ message['role'] }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    words = ["model.backbone=smollm2_135m", f"model.tokenizer={tmp_path / 'tokenizer'}"]
    error = refused(*words, "model.prompt='Translate {poses} into English'")
    assert "model.prompt" in error and "chat template" in error and "model.prefix" in error
