"""One rank of test_pass_graphs.py: trains, stops and resumes with passes that a stand-in for CUDA graphs replays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.end_to_end.elastic_worker import train
from tests.rank_workers import run_cases
from tests.recorded_calls import RecordedCalls
from toolkit.cluster.ranks import Ranks
from toolkit.training import pass_graphs


def train_by_graphs(case: dict[str, Any], settings: list[str], run_dir: Path, ranks: Ranks) -> dict[str, Any]:
    """Train a case; one that is ``as_written`` has no graphs."""
    recorded = RecordedCalls()
    pass_graphs.capture_on = lambda device: None if case.get("as_written") else recorded
    return train(case, settings, run_dir, ranks) | {"replays": recorded.replays, "graphs": len(recorded.captured)}


if __name__ == "__main__":
    run_cases(train_by_graphs)
