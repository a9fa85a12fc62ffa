"""The rank of test_held_tensors.py: counts every tensor while steps are taken and models are saved."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ["TOOLKIT_CPU_CODE"] = "0"  # as on a GPU: DeepSpeed's own reductions

from tests.rank_workers import run_cases, start_run
from tests.scripts import load_script
from toolkit.cluster.ranks import Ranks
from toolkit.planning.costs.counts import Weight
from toolkit.planning.costs.zero import zero_memory
from toolkit.training.monitoring.interruptions import Interruptions
from toolkit.training.run import open_trainer, start_loader
from toolkit.training.start import Start
from toolkit.training.trainer import Trainer

# What saving copies into the host's memory, which would not be on a GPU.
TO_THE_HOST = ("loading/weights.py", "checkpointing/writer.py")


def train(case: dict[str, Any], settings: list[str], run_dir: Path, ranks: Ranks) -> dict[str, float]:
    """Train a case and save it.

    Returns:
        bytes: the most of each phase, and ``planned_save``, what is planned.
    """
    resolved, corpus = start_run(case, settings, run_dir, ranks)
    interruptions, log = Interruptions(), load_script("benchmarks/planning_tensors.py").TensorLog(ignored=TO_THE_HOST)
    with log, open_trainer(resolved, ranks, corpus, Start(), interruptions, lambda _: None) as trainer:
        most = watched(trainer, log)
        trainer.run(start_loader(resolved, ranks, corpus, trainer.progress))
        parameters = list(trainer.engine.module.parameters())
        weights = [Weight(getattr(one, "ds_numel", one.numel()), one.requires_grad) for one in parameters]
        zero = zero_memory(weights, resolved.recipe, resolved.deepspeed, ranks.world_size)
        trainer.engine.destroy()
    interruptions.close()
    # Host and device are one here.
    return {"planned_save": sum(zero.in_save.values()) + zero.host, **most}


def watched(trainer: Trainer, log: Any) -> dict[str, int]:
    """The most bytes of each phase, filled as the trainer enters the next one."""
    most: dict[str, int] = {}
    enter = trainer.memory.enter

    def entered(phase: Any) -> None:
        before = trainer.memory.phase
        most[before] = max(most.get(before, 0), log.most())
        log.forget()
        enter(phase)

    trainer.memory.enter = entered  # type: ignore[method-assign]
    return most


if __name__ == "__main__":
    run_cases(train)
