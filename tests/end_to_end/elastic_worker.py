"""One rank of test_elastic.py: runs, stops and resumes small trainings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.rank_workers import digest_of, ends_in, run_cases, start_run, steps_of
from toolkit.cluster.ranks import Ranks
from toolkit.errors import Interrupted
from toolkit.models.loading.weights import trainable_state_dict
from toolkit.training.monitoring.interruptions import Interruptions
from toolkit.training.optimization.averaging import averaged_weights
from toolkit.training.run import open_trainer, start_loader
from toolkit.training.start import Start, find_start


class StopAfter(Interruptions):
    """Requests a run to stop after so many steps of this start."""

    def __init__(self, steps: int | None) -> None:
        super().__init__()
        self.steps_left = steps

    def wanted(self) -> bool:
        if self.steps_left is not None:
            self.steps_left -= 1
            if self.steps_left == 0:
                self.reason = "the test"
        return super().wanted()


def train(case: dict[str, Any], settings: list[str], run_dir: Path, ranks: Ranks) -> dict[str, Any]:
    """Train a case from its start, or from the checkpoint that it names, to its end."""
    printed: list[str] = []
    result: dict[str, Any] = {"printed": printed, "run_dir": str(run_dir)}
    interruptions = StopAfter(case.get("stop_after"))
    with ends_in(result, interruptions):
        resolved, corpus = start_run(case, settings, run_dir, ranks)
        start = find_start(resolved, str(run_dir.parent / case["resume"])) if case.get("resume") else Start()
        with open_trainer(resolved, ranks, corpus, start, interruptions, printed.append) as trainer:
            try:
                trainer.run(start_loader(resolved, ranks, corpus, trainer.progress))
            except Interrupted:
                result["interrupted"] = True
            weights = trainable_state_dict(trainer.engine.module, keep=ranks.is_main)
            if trainer.recipe.training.ema:
                with averaged_weights(trainer.engine):
                    averages = trainable_state_dict(trainer.engine.module, keep=True)
                result["average"] = sum(float(tensor.double().square().sum()) for tensor in averages.values()) ** 0.5
            result["weights"] = digest_of(weights)
            trainer.engine.destroy()
    steps = steps_of(run_dir)
    result["losses"] = [line["loss"] for line in steps]
    result["rates"] = [line["learning_rate"] for line in steps]
    return result


if __name__ == "__main__":
    run_cases(train)
