"""launch/evaluate.py as a user runs it: files, JSON, exit codes, and every mistake in one line."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import T5Config

from tests.small_configs import T5, translator_config
from tests.terminals import assert_quiet
from tests.time_limits import limit
from tests.written_corpora import write_corpus
from toolkit.cluster.ranks import Ranks
from toolkit.corpus.packed import Clip, Corpus
from toolkit.errors import EXIT_OUT_OF_MEMORY, exit_code_of
from toolkit.evaluation import splits
from toolkit.models.translator import PoseTranslator
from toolkit.poses.features import NORMALISATION
from toolkit.poses.landmarks import LandmarkSet, load_landmark_set
from toolkit.recipe.load import load_recipe
from toolkit.recipe.yaml_text import dump_yaml
from toolkit.scoring.predictions import Prediction, write_predictions

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "evaluate.py"


def evaluate(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=limit(200))


def write(folder: Path, landmarks: LandmarkSet, fps: float = 12.5, normalisation: str = NORMALISATION) -> Corpus:
    rng = np.random.default_rng(0)

    def clips(name: str, count: int) -> list[Clip]:
        shape = (landmarks.num_points, landmarks.num_channels)
        return [
            Clip(
                f"{name}{index}",
                f"we go home {index}",
                rng.normal(size=(8 + index, *shape)).astype(np.float16),
                signer=f"signer {index % 2}",
            )
            for index in range(count)
        ]

    return write_corpus(folder, {"train": clips("a", 4), "test": clips("b", 9)}, landmarks, fps, normalisation)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    return write(tmp_path_factory.mktemp("corpora") / "invented", load_landmark_set("hands_body_50"))


def test_results_lie_in_files_and_the_json_line_says_where(model_folder, corpus, tmp_path) -> None:
    done = evaluate("--model", model_folder, "--corpus", corpus.path, "--n-best", 2, "--json", cwd=tmp_path)
    assert_quiet(done)
    summary = json.loads(done.stdout.splitlines()[-1])
    out = tmp_path / "evaluation" / model_folder.name / "invented"
    assert Path(summary["out"]) == out.relative_to(tmp_path)
    assert json.loads((out / "scores.json").read_text()) == summary
    assert list(summary["floors"]) == ["constant", "random", "shuffled", "control"]
    low, high = summary["intervals"]["chrf"]
    assert low <= summary["scores"]["chrf"] <= high and summary["splits"]["test"]["clips"] == 9
    with (out / "test.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["uid"] for row in rows] == [f"b{index}" for index in range(9)]
    assert set(rows[0]) == {"uid", "reference", "hypothesis", "score", "chrf"}
    assert len((out / "test_n_best.csv").read_text().splitlines()) == 1 + 2 * 9
    (signers,) = summary["splits"]["test"]["groups"].values()
    assert {name: scores["clips"] for name, scores in signers.items()} == {"signer 0": 5, "signer 1": 4}
    assert "test, by signer" in done.stdout
    for words in ("floor: shuffled", "control: poses of other clips", "95 % from", "looks at the signing"):
        assert words in done.stdout
    again = evaluate("compare", out / "test.csv", out / "test.csv", "--json", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout.splitlines()[-1])["scores"]["cer"]["p_value"] == 1.0


def test_generation_batches_are_no_larger_than_those_that_the_run_chose(
    model_folder, corpus, tmp_path, command, monkeypatch
) -> None:
    run = tmp_path / "run"
    shutil.copytree(model_folder, run / "best")
    recipe = load_recipe("demo").model_dump(mode="json")
    (run / "recipe.yaml").write_text(dump_yaml(recipe), encoding="utf-8")
    chosen = {"clips": 2, "frames": None, "reason": "", "hardware": "", "settings": "", "batch_frames": 40}
    sizes: list[int] = []
    own = splits.find_hypotheses
    monkeypatch.setattr(splits, "find_hypotheses", lambda *a, **k: sizes.append(k["batch_frames"]) or own(*a, **k))
    for given, size in (((), 8192), ((), 40), (("evaluation.batch_frames=64",), 64)):
        arguments = ["--model", run, "--corpus", corpus.path, "--out", tmp_path / f"out{size}", *given]
        assert run_in_process(command, arguments, monkeypatch) == 0
        assert sizes.pop() == size
        (run / "micro_batch.json").write_text(json.dumps(chosen))


def test_the_share_of_the_ctc_head_is_that_of_the_command_line(
    model_folder, corpus, tmp_path, command, monkeypatch
) -> None:
    model = tmp_path / "model"
    shutil.copytree(model_folder, model)
    PoseTranslator(translator_config(T5Config(**T5), ctc=True, ctc_search_weight=0.25)).save_pretrained(model)
    shutil.copy(model_folder / "generation_config.json", model)
    weights: list[float] = []
    own = splits.find_hypotheses

    def find(model: PoseTranslator, *rest: Any, **named: Any) -> Any:
        weights.append(model.config.ctc_search_weight)
        return own(model, *rest, **named)

    monkeypatch.setattr(splits, "find_hypotheses", find)
    for given, weight in (((), 0.25), (("evaluation.ctc_weight=0.5",), 0.5), (("evaluation.ctc_weight=0",), 0)):
        arguments = ["--model", model, "--corpus", corpus.path, "--out", tmp_path / f"out{weight}", *given]
        assert run_in_process(command, arguments, monkeypatch) == 0
        assert weights.pop() == weight


def test_mistakes_are_an_error_and_a_hint(model_folder, corpus, tmp_path, command, capsys, monkeypatch) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(model_folder, bare)
    (bare / "processor_config.json").unlink()
    other_set = write(tmp_path / "other_set", load_landmark_set("holistic_178"))
    other_rate = write(tmp_path / "other_rate", load_landmark_set("hands_body_50"), fps=25.0)
    other_unit = write(tmp_path / "other_unit", load_landmark_set("hands_body_50"), normalisation="pixels")
    cases = [
        (["--model", tmp_path / "nowhere"], "nowhere"),
        (["--model", bare, "--corpus", corpus.path], "processor_config.json"),
        (["--model", model_folder], "--corpus FOLDER"),
        (["--model", model_folder, "--corpus", tmp_path], str(tmp_path)),
        (["--model", model_folder, "--corpus", corpus.path, "--split", "dev"], "split dev"),
        (["--model", model_folder, "--corpus", other_set.path], "landmarks hands_body_50 (50 points"),
        (["--model", model_folder, "--corpus", other_rate.path], "fps 12.5 and 25.0"),
        (["--model", model_folder, "--corpus", other_unit.path], "normalisation"),
        (["--model", model_folder, "--corpus", corpus.path, "--out", bare / "config.json" / "x"], "--out"),
        (["--model", model_folder, "--corpus", corpus.path, "--n-best", "9"], "evaluation.num_beams=9"),
        (["--model", model_folder, "--corpus", corpus.path, "training.epochs=2"], "training.epochs=2"),
        (["--model", model_folder, "--corpus", corpus.path, "evaluation.tokenize=13b"], "'13b'"),
        (["--model", model_folder, "--corpus", corpus.path, "evaluation.forced_language=hi_IN"], "hi_IN"),
        (["--model", model_folder, "--corpus", corpus.path, "evaluation.ctc_weight=0.5"], "evaluation.ctc_weight=0.5"),
        (["--model", model_folder, "--neural", "comet"], "NAME=CHECKPOINT"),
        (["compare", tmp_path / "a.csv", tmp_path / "b.csv"], "a.csv"),
    ]
    monkeypatch.chdir(tmp_path)
    for arguments, complaint in cases:
        assert run_in_process(command, arguments, monkeypatch) == 2, arguments
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("error: ", "hint: "))]
        assert [line.split()[0] for line in lines] in (["error:", "hint:"], ["error:"]), lines
        assert complaint in "".join(lines), lines


def run_in_process(command, arguments: list[object], monkeypatch) -> int:
    """The exit code of a command, but for ``run_rank``, which would end this process."""
    script, words = command("evaluate"), list(map(str, arguments))
    if words[0] != "compare":
        return exit_code_of(lambda: script.run(script.parse(words), Ranks()), debug=False)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *words])
    with pytest.raises(SystemExit) as ended:
        script.main()
    return ended.value.code


def test_too_little_memory_is_an_error_and_a_hint(model_folder, corpus, tmp_path, command, capsys, monkeypatch) -> None:
    def search(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr("toolkit.decoding.decode_split.search", search)
    words: list[object] = ["--model", model_folder, "--corpus", corpus.path, "--out", tmp_path / "out"]
    assert run_in_process(command, words, monkeypatch) == EXIT_OUT_OF_MEMORY
    said = capsys.readouterr().err
    assert "error: " in said and "2.00 GiB" in said and "hint: " in said and "evaluation.num_beams" in said


def test_only_files_about_the_same_clips_are_compared(tmp_path, command, capsys, monkeypatch) -> None:
    rows = [Prediction(f"u{index}", f"text {index}\0", f"text {index}") for index in range(4)]
    write_predictions(tmp_path / "a.csv", rows)
    write_predictions(tmp_path / "reversed.csv", rows[::-1])
    write_predictions(tmp_path / "fewer.csv", rows[:3])
    write_predictions(tmp_path / "twice.csv", [*rows, rows[0]])
    write_predictions(tmp_path / "other.csv", [*rows[:3], Prediction("u3", "something else", "text 3")])
    monkeypatch.chdir(tmp_path)
    assert run_in_process(command, ["compare", "a.csv", "reversed.csv"], monkeypatch) == 0
    assert "no difference shown" in capsys.readouterr().out
    for name, complaint in (
        ("fewer.csv", "fewer.csv has no clip 'u3'"),
        ("twice.csv", "twice.csv has the clip 'u0'"),
        ("other.csv", "clip 'u3'"),
    ):
        assert run_in_process(command, ["compare", "a.csv", name], monkeypatch) == 2
        assert complaint in capsys.readouterr().err


def test_results_are_printed_even_if_they_cannot_be_written(model_folder, corpus, tmp_path) -> None:
    (tmp_path / "out" / "scores.json").mkdir(parents=True)
    done = evaluate("--model", model_folder, "--corpus", corpus.path, "--out", "out", "--json", cwd=tmp_path)
    assert done.returncode == 2 and "out/scores.json" in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert "floor: shuffled" in done.stdout and "nothing was written" in done.stdout
    assert json.loads(done.stdout.splitlines()[-1])["splits"]["test"]["clips"] == 9


def test_results_are_written_even_if_nobody_reads_them(model_folder, corpus, tmp_path) -> None:
    command = f"{sys.executable} {SCRIPT} --model {model_folder} --corpus {corpus.path} --out results | head -n 1"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 141 and "Traceback" not in done.stderr, done.stderr
    assert json.loads((tmp_path / "results" / "scores.json").read_text())["splits"]["test"]["clips"] == 9
