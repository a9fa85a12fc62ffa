"""A finished run is extended; its losses are the same when it is stopped and resumed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]
Losses = Callable[[Path], list[float]]


@pytest.fixture(scope="module")
def arguments(settings: list[str]) -> list[str]:
    small = ["model.pose_encoder.hidden=32", "training.warmup_ratio=0.5", "evaluation.select_by=cer"]
    return ["--recipe", "t5_small", "--ds", "zero2", *settings, *small, "ds.data_types=null"]


@pytest.fixture(scope="module")
def finished(fork: Run, arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    done = fork("launch/train.py", *arguments, "training.epochs=2", f"run.dir={run_dir}")
    assert done.code == 0, done.out + done.err
    return run_dir


def figures(run_dir: Path, name: str) -> list[float]:
    entries = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [entry[name] for entry in entries if entry["kind"] == "train"]


def test_an_extended_run_resumes_to_the_last_bit(
    fork: Run, arguments: list[str], finished: Path, losses: Losses, tmp_path: Path
) -> None:
    straight, stopped = (Path(shutil.copytree(finished, tmp_path / name)) for name in ("straight", "stopped"))
    longer = [*arguments, "training.epochs=4"]
    done = fork("launch/train.py", *longer, f"run.dir={straight}", "--extend", "--json")
    assert done.code == 0, done.out + done.err
    assert "from 6 to 12 steps" in done.out
    assert done.json["steps"] == 12
    assert losses(straight)[:6] == losses(finished) and len(losses(straight)) == 12
    rates = figures(straight, "learning_rate")
    rise, factors = [0.25, 0.5, 0.75, 1, 1, 1], [1 - (step - 3) / (12 - 3) for step in range(6, 12)]
    assert rates[6:] == pytest.approx([3e-4 * share * factor for share, factor in zip(rise, factors, strict=True)])
    assert json.loads((straight / "best" / "evaluation.json").read_text())["step"] == done.json["best_step"]

    early = [*longer, f"run.dir={stopped}", "training.time_limit=0.0001"]
    for step, more in ((7, ["--extend"]), (8, [])):
        part = fork("launch/train.py", *early, *more)
        assert part.code == 75, part.out + part.err
        assert f"after step {step} of 12" in part.err
    rest = fork("launch/train.py", *longer, f"run.dir={stopped}")
    assert rest.code == 0, rest.out + rest.err
    assert losses(stopped) == losses(straight)
    assert figures(stopped, "learning_rate") == rates


@pytest.mark.nightly
def test_without_a_dev_split_the_best_model_is_the_last_one_of_the_longer_run(
    fork: Run, settings: list[str], arguments: list[str], finished: Path, tmp_path: Path
) -> None:
    cache = next(value for value in settings if value.startswith("data.cache=")).partition("=")[2]
    prepared = next(path.parent for path in Path(cache).glob("*/corpus.json"))
    corpus = Path(shutil.copytree(prepared, tmp_path / "corpus"))
    metadata = json.loads((corpus / "corpus.json").read_text())
    del metadata["splits"]["dev"]
    (corpus / "corpus.json").write_text(json.dumps(metadata))
    others = [value for value in arguments if not value.startswith("data.")]
    for steps, more in ((1, []), (2, ["--extend"])):
        done = fork(
            *("launch/train.py", *others, f"data.corpus={corpus}", f"run.dir={tmp_path / 'run'}", "--json"),
            *(f"training.max_steps={steps}", *more),
        )
        assert done.code == 0, done.out + done.err
        assert json.loads((tmp_path / "run" / "best" / "evaluation.json").read_text())["step"] == steps
        assert done.json["best_step"] == steps
    assert sorted(path.name for path in (tmp_path / "run").iterdir() if "best" in path.name) == ["best"]
