"""The loader's workers of a whole run are forked once, before threads and the process group."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

WORKERS = 2


def test_workers_are_forked_once_before_threads_and_the_group(
    run: Callable[..., Any],
    fork: Callable[..., Any],
    settings: list[str],
    losses: Callable[[Path], list[float]],
    tmp_path: Path,
) -> None:
    """Three epochs, each with a checkpoint and an evaluation; the losses are those of a run without workers."""
    found = {}
    for workers, start in ((WORKERS, run), (0, fork)):
        notes, run_dir = tmp_path / f"forks_{workers}.jsonl", tmp_path / f"workers_{workers}"
        notes.touch()
        done = start(
            "tests/end_to_end/forks_worker.py",
            *(notes, "--recipe", "t5_small", "--ds", "zero1", *settings, f"run.dir={run_dir}"),
            *("training.epochs=3", "training.save_every=2", f"training.workers={workers}"),
        )
        assert done.code == 0, done.err + done.out
        found[workers] = [json.loads(line) for line in notes.read_text().splitlines()], losses(run_dir)
    assert found[0][0] == []
    assert found[WORKERS][0] == [{"threads": ["MainThread"], "group": False, "gpu": False}] * WORKERS
    assert found[WORKERS][1] == found[0][1]
    assert len(found[0][1]) == 9
