"""The commands on a run with adapters: they take it as they take any other."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.terminals import assert_quiet
from tests.time_limits import limit
from toolkit.corpus.packed import Corpus
from toolkit.models.build import build_processor, build_translator
from toolkit.models.loading.weights import save_model, saved_state_dict
from toolkit.recipe.resolve import resolve_named

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "evaluate.py"
WISHES = {"model.tiny": "true", "model.lora": "{r: 4}", "model.quantization": "nf4", "model.extra_tokens": "['<loc>']"}


@pytest.fixture(scope="module")
def run_dir(make_run: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_run(tmp_path_factory.mktemp("runs") / "mine", **WISHES)
    overrides = [f"{key}={value}" for key, value in WISHES.items()]
    resolved = resolve_named("demo", overrides, 1, has_gpu=False, needs_data=False)
    corpus = Corpus.open(folder.parent / "corpus-of-mine")
    processor = build_processor(resolved.recipe, corpus)
    torch.manual_seed(1)
    model = build_translator(resolved, corpus, processor.tokenizer)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
    letters = processor.tokenizer("abcdefghijklmnopqrstuvwxyz", add_special_tokens=False)["input_ids"]
    others = sorted(set(range(model.config.backbone["vocab_size"])) - set(letters))
    model.generation_config.update(num_beams=2, max_new_tokens=8, suppress_tokens=others)
    save_model(folder / "best", model, processor, saved_state_dict(model, keep=True))
    return folder


@pytest.fixture
def done(command, monkeypatch, capsys) -> Callable[..., dict[str, Any]]:
    """Runs a command in this process and gives its JSON line."""

    def run(name: str, *arguments: object) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments), "--json"])
        with pytest.raises(SystemExit) as left:
            command(name).main()
        out, err = capsys.readouterr()
        assert not left.value.code, err
        return dict(json.loads([line for line in out.splitlines() if line.startswith("{")][-1]))

    return run


def test_exported_it_translates_and_scores_as_the_run_does(done, run_dir: Path, clip_files, tmp_path: Path) -> None:
    for merge in (False, True):
        folder = tmp_path / f"merged-{merge}"
        summary = done("export", run_dir, "--to", folder, *(["--merge-lora"] if merge else []))
        assert summary["adapter"] == (None if merge else "adapter") and summary["unpacked"] == "nf4"
        assert summary["largest_difference"] < 0.02, "NF4 computes in bf16"
        card = (folder / "README.md").read_text()
        assert "Trained by LoRA, r = 4" in card and "held in nf4" in card and "`<loc>`" in card
        assert ("merged into" in card) is merge and ("PeftModel" in card) is not merge
    texts = {
        done("translate", "--model", model, clip_files[0])["translations"][0]["text"] for model in (run_dir, folder)
    }
    assert len(texts) == 1


def test_evaluate_takes_the_run_directory(run_dir: Path, tmp_path: Path) -> None:
    corpus = run_dir.parent / "corpus-of-mine"
    command = [sys.executable, str(SCRIPT), "--model", str(run_dir), "--corpus", str(corpus), "evaluation.num_beams=1"]
    done = subprocess.run([*command, "--json"], cwd=tmp_path, capture_output=True, text=True, timeout=limit(200))
    assert_quiet(done)
    assert json.loads(done.stdout.splitlines()[-1])["splits"]["test"]["clips"] == 24


def _started(name: str, *arguments: object) -> list[str]:
    return [sys.executable, str(SCRIPT.with_name(f"{name}.py")), *map(str, arguments)]


def test_export_and_translate_leave_a_quiet_terminal(run_dir: Path, clip_files, tmp_path: Path) -> None:
    """NF4 on a CPU is what bitsandbytes warns of."""
    for command in (
        _started("export", run_dir, "--to", tmp_path / "model"),
        _started("translate", "--model", run_dir, clip_files[0]),
    ):
        assert_quiet(subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=limit(200)))


@pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="gradio, the extra [demo_app], is not installed")
def test_the_demo_app_shows_its_address_alone(run_dir: Path, tmp_path: Path) -> None:
    log = tmp_path / "terminal"
    environment = os.environ | {"GRADIO_TEMP_DIR": str(tmp_path / "uploads"), "HF_HUB_OFFLINE": "1"}
    with log.open("w") as file, socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        listener.close()
        command = _started("demo_app", "--model", run_dir, "--port", port)
        app = subprocess.Popen(command, cwd=tmp_path, stdout=file, stderr=subprocess.STDOUT, env=environment)
    try:
        end = time.monotonic() + limit(120)
        while " serves " not in log.read_text():
            assert app.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.2)
    finally:
        app.terminate()
        app.wait(30)
    assert log.read_text() == f"http://127.0.0.1:{port}/ serves {run_dir}; Ctrl-C ends it\n"
