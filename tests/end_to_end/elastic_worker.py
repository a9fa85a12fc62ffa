"""One rank of test_elastic.py: runs, stops and takes up again as many small trainings as its plan lists.

Starting ranks costs more than training a tiny model for some steps, so one start serves all cases of one world size.
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path
from typing import Any

import xxhash
from torch import distributed as dist

from toolkit.checkpointing import run_directory
from toolkit.cluster.logs import log_to_file
from toolkit.cluster.ops import use_extensions_dir
from toolkit.cluster.process_group import join_process_group, leave_process_group
from toolkit.cluster.ranks import read_ranks
from toolkit.corpus.packed import Corpus
from toolkit.errors import Interrupted, UserError
from toolkit.models.loading.weights import trainable_state_dict
from toolkit.recipe.resolve import resolve_named
from toolkit.training.monitoring.interruptions import Interruptions
from toolkit.training.optimization.averaging import averaged_weights
from toolkit.training.run import open_trainer, start_loader
from toolkit.training.start import Start, find_start


class StopAfter(Interruptions):
    """Asks a run to stop after so many steps of this start."""

    def __init__(self, steps: int | None) -> None:
        super().__init__()
        self.steps_left = steps

    def wanted(self) -> bool:
        if self.steps_left is not None:
            self.steps_left -= 1
            if self.steps_left == 0:
                self.reason = "the test"
        return super().wanted()


def main() -> None:
    use_extensions_dir()
    plan = json.loads(Path(sys.argv[-1]).read_text())
    ranks = read_ranks()
    log_to_file(None)
    join_process_group(ranks)
    results = {case["name"]: train(case, plan["settings"], Path(plan["folder"]), ranks) for case in plan["cases"]}
    if ranks.is_main:
        Path(plan["results"]).write_text(json.dumps(results))
    leave_process_group()


def train(case: dict[str, Any], settings: list[str], folder: Path, ranks: Any) -> dict[str, Any]:
    """Train a case from its start to its end, and say what came of it."""
    run_dir = folder / case["name"]
    overrides = [*settings, *case.get("overrides", []), f"run.dir={run_dir}"]
    said: list[str] = []
    result: dict[str, Any] = {"said": said, "run_dir": str(run_dir)}
    interruptions = StopAfter(case.get("stop_after"))
    try:
        resolved = resolve_named("t5_small", overrides, ranks.world_size, has_gpu=False, ds=case["ds"])
        corpus = Corpus.open(resolved.recipe.data.corpus or "")
        start = find_start(resolved, str(folder / case["resume"])) if case.get("resume") else Start()
        if ranks.is_main:
            run_directory.start(resolved, corpus.path)
        dist.barrier()
        with open_trainer(resolved, ranks, corpus, start, interruptions, said.append) as trainer:
            try:
                trainer.run(start_loader(resolved, ranks, corpus, trainer.progress))
            except Interrupted:
                result["interrupted"] = True
            weights = trainable_state_dict(trainer.engine.module, keep=ranks.is_main)
            if trainer.recipe.training.ema:
                with averaged_weights(trainer.engine):
                    averages = trainable_state_dict(trainer.engine.module, keep=True)
                result["average"] = sum(float(tensor.double().square().sum()) for tensor in averages.values()) ** 0.5
            digest = xxhash.xxh3_64()
            for _, tensor in sorted(weights.items()):
                digest.update(tensor.float().numpy().tobytes())
            result["weights"] = digest.hexdigest()
            trainer.engine.destroy()
    except UserError as error:
        result["refused"] = str(error)
    except Exception:
        result["failed"] = traceback.format_exc()
    finally:
        interruptions.close()
    lines = run_dir / "metrics.jsonl"
    entries = [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
    steps = [line for line in entries if line["kind"] == "train"]
    result["losses"] = [line["loss"] for line in steps]
    result["rates"] = [line["learning_rate"] for line in steps]
    return result


if __name__ == "__main__":
    main()
