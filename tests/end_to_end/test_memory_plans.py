"""Long runs on CPUs that keep freed memory need what their plans say: batches of all lengths, evaluations, saves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.training_corpus import make_corpus
from tests.end_to_end.conftest import Finished
from toolkit.training.memory_report import OFF
from toolkit.training.monitoring.memory_phases import PHASES

RUNS = {
    "demo": ["--recipe=demo", "training.max_steps=200", "data.source=table"],
    "t5_small": ["--recipe=t5_small", "training.max_steps=24", "training.micro_batch_size=16"],
    "t5_small_in_autocast": [
        "--recipe=t5_small",
        "--ds=zero2_autocast",
        "training.max_steps=16",
        "training.micro_batch_size=8",
    ],
}
SMALL = ["model.from_scratch=true", "model.tokenizer=train", "training.workers=0", "evaluation.max_new_tokens=12"]


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips") / "corpus"
    make_corpus(folder, clips=512, held_out=32)
    return folder


@pytest.mark.nightly
@pytest.mark.parametrize("name", RUNS)
def test_a_long_run_needs_what_its_plan_says(
    name: str, run: Callable[..., Finished], clips: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    own = SMALL if name != "demo" else ["data.fps=12.5", "model.tokenizer=bytes"]
    arguments = [*RUNS[name], f"data.corpus={clips}", f"run.dir={folder}", "training.eval_every=1", *own]
    done = run("launch/train.py", *arguments, ranks=2)
    assert done.code == 0, done.err
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    figures = [row for row in rows if row["kind"] == "memory"][-1]
    assert all(f"{phase}_planned_gib" in figures for phase in PHASES), "too short a run is not compared"
    assert figures["step_process_gib"] < (1 + OFF) * figures["step_planned_gib"]
    assert "the plan of this run's memory" not in (folder / "log.txt").read_text()
