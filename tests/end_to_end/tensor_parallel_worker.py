"""One rank of test_tensor_parallel.py: trains, stops and resumes small language models, their layers split or not."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from tests.end_to_end.elastic_worker import StopAfter
from tests.rank_workers import digest_of, ends_in, run_cases, start_run, steps_of
from toolkit.cluster.ranks import Ranks
from toolkit.cluster.tensor_parallel import part_of
from toolkit.errors import Interrupted
from toolkit.models.loading.load import load_translator
from toolkit.models.loading.weights import whole_state_dict
from toolkit.training.final_scores import score_best
from toolkit.training.monitoring.gradient_guard import GradientGuard
from toolkit.training.run import open_trainer, start_loader
from toolkit.training.start import Start, find_start


def train(case: dict[str, Any], settings: list[str], run_dir: Path, ranks: Ranks) -> dict[str, Any]:
    """Train a case from its start, or from the checkpoint that it names, to its end, and score its best model."""
    result: dict[str, Any] = {}
    interruptions = StopAfter(case.get("stop_after"))
    with ends_in(result, interruptions):
        resolved, corpus = start_run(case, settings, run_dir, ranks)
        start = find_start(resolved, str(run_dir.parent / case["resume"])) if case.get("resume") else Start()
        with open_trainer(resolved, ranks, corpus, start, interruptions, lambda _: None) as trainer:
            if case.get("spoiled") == ranks.rank:
                spoil(trainer.engine.module)
                if case.get("guarded"):  # its hooks see the gradient then
                    trainer.gradient_guard = GradientGuard(trainer.engine.module)
            result["model_flops"] = flops = []
            trainer.meter.end = functools.partial(counted, trainer.meter.end, flops)
            try:
                trainer.run(start_loader(resolved, ranks, corpus, trainer.progress))
                result |= translated(trainer, run_dir)
            except Interrupted:
                result["interrupted"] = True
            result["clips"] = trainer.progress.clips
            trainer.engine.destroy()
    steps = steps_of(run_dir)
    return result | {key: [line.get(key) for line in steps] for key in ("loss", "grad_norm")}


def counted(end: Any, flops: list[float], counts: Any) -> Any:
    """End a step, and remember the model FLOPs that were counted of it."""
    flops.append(counts.flops)
    return end(counts)


def translated(trainer: Any, run_dir: Path) -> dict[str, Any]:
    """What a trained model came to: its weights, and the translations before and after it is loaded again."""
    module, test = trainer.engine.module, trainer.corpus.splits["test"]
    with trainer._kept_weights():
        weights = whole_state_dict(module, keep=True)
    evaluated = trainer.translate(test)
    best = load_translator(run_dir / "best")[0].state_dict()
    evaluation = trainer.resolved.evaluation
    held, alike = sum(weight.numel() for weight in module.parameters()), is_alike(module, trainer.ranks)
    scored = score_best(
        trainer.engine, run_dir / "best", trainer.processor, trainer.corpus, ["test"], evaluation, trainer.ranks
    )["test"]
    return {
        "alike": alike,
        "held": held,
        "digest": digest_of(weights),
        "best_is_last": all(torch.equal(best[name], value.to(best[name].dtype)) for name, value in weights.items()),
        "hypotheses": [row.hypothesis for row in scored.predictions],
        "uids": [row.uid for row in scored.predictions],
        "scores": scored.scores.values(),
        "same_scores": evaluated.scores.values() == scored.scores.values(),
    }


def is_alike(module: torch.nn.Module, ranks: Ranks) -> bool:
    """Whether the weights that are not split are the same, bit by bit, on all ranks."""
    whole = {name: weight for name, weight in module.named_parameters() if not part_of(weight)}
    found: list[Any] = [None] * ranks.world_size
    dist.all_gather_object(found, digest_of(whole))
    return len(set(found)) == 1


def spoil(module: torch.nn.Module) -> None:
    """Have one rank's part of a weight get a gradient that is not finite."""
    weight = next(value for name, value in module.named_parameters() if name.endswith("mlp.down_proj.weight"))
    weight.register_hook(lambda gradient: gradient * float("nan"))


if __name__ == "__main__":
    run_cases(train)
