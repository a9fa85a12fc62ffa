"""One rank of test_strategies.py: trains the same model by every DeepSpeed JSON and division of the batch."""

from __future__ import annotations

import functools
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import distributed as dist

from tests.rank_workers import change_weights, run_cases, start_run, steps_of
from tests.scripts import load_script
from toolkit.checkpointing.checkpoints import Progress, read_state
from toolkit.checkpointing.reader import load_checkpoint
from toolkit.checkpointing.zero_shards import shards
from toolkit.cluster.ranks import Ranks
from toolkit.models import compiled
from toolkit.models.loading.load import load_translator
from toolkit.models.loading.weights import whole_state_dict
from toolkit.training.monitoring.interruptions import Interruptions
from toolkit.training.optimization import gradient_reduction
from toolkit.training.optimization.gradient_reduction import LARGEST_WHOLE_GRADIENT
from toolkit.training.optimization.joined_gradients import joins_gradients
from toolkit.training.run import open_trainer, start_loader
from toolkit.training.start import Start

# DeepSpeed's functions that sum gradients (and some small numbers) over ranks.
SUMS = ("all_reduce", "inference_all_reduce", "reduce", "reduce_scatter_fn")


def train(case: dict[str, Any], settings: list[str], run_dir: Path, ranks: Ranks) -> dict[str, Any]:
    resolved, corpus = start_run(case, settings, run_dir, ranks)
    interruptions = Interruptions()
    # The tiny models stand for models of the usual size, whose gradients no rank holds whole, except in cases that are
    # about small models.
    compiled.BACKEND = "aot_eager"  # graphs as on a GPU, without kernels
    gradient_reduction.LARGEST_WHOLE_GRADIENT = LARGEST_WHOLE_GRADIENT if case.get("small") else 0
    # A case that counts runs the code of GPUs.
    path = mock.patch.dict(os.environ, {"TOOLKIT_CPU_CODE": "0"}) if case.get("waits") else nullcontext()
    with path, open_trainer(resolved, ranks, corpus, Start(Progress()), interruptions, lambda _: None) as trainer:
        waits, walks = count_waits(trainer) if case.get("waits") else ([], [])
        micro_batches, frames, sent = *count_micro_batches(trainer), count_sent(trainer)
        gradients = keep_gradients(trainer) if case.get("gradients") else {}
        if "spoiled" in case and not ranks.is_main:
            spoil_gradient(trainer, case["spoiled"])
        batches = start_loader(resolved, ranks, corpus, trainer.progress)
        first = whole_state_dict(trainer.engine.module, keep=True) if case.get("moves") else {}
        trainer.run(batches)
        trainer.save()
        weights = whole_state_dict(trainer.engine.module, keep=True)
        predictions = trainer.translate(corpus.splits["test"]).predictions
        layers = getattr(trainer.engine.module, "compiled_layers", None)
        # Change the weights, load the checkpoint, compare.
        change_weights(trainer.engine)
        trainer.checkpoints.wait()
        checkpoint = run_dir / "checkpoints" / f"step_{trainer.progress.step:06d}"
        state = read_state(checkpoint)
        load_checkpoint(trainer.engine, checkpoint, state, layout=state.layout, seed=0)
        restored = whole_state_dict(trainer.engine.module, keep=True)
        trainer.engine.destroy()
    interruptions.close()
    best = load_translator(run_dir / "best")[0].state_dict()
    steps = steps_of(run_dir) if ranks.is_main else []
    return {
        "compiled_layers": layers is not None and layers.works and len(layers.choices) > 0,
        "micro_batches": micro_batches,
        "frames": sorted(frames),
        "ladder": batches.ladder.frames if batches.ladder else (),
        "sent": sent,
        "waits": waits,
        "walks": walks,
        "joins": joins_gradients(trainer.engine),
        "gradients": gradients,
        "losses": [line["loss"] for line in steps],
        "grad_norms": [line.get("grad_norm") for line in steps],
        "weights_norm": norm(weights),
        "moved": norm({name: weights[name].float() - tensor.float() for name, tensor in first.items()})
        if first
        else None,
        "best_is_last": all(torch.equal(best[name], tensor.to(best[name].dtype)) for name, tensor in weights.items()),
        "restored": all(torch.equal(restored[name], tensor) for name, tensor in weights.items()),
        "hypotheses": [row.hypothesis for row in predictions],
        "uids": [row.uid for row in predictions],
    }


def count_micro_batches(trainer: Any) -> tuple[list[int], set[int]]:
    """A list that grows by this rank's number of micro-batches with every step, and the lengths of all of them."""
    counts: list[int] = []
    lengths: set[int] = set()
    step = trainer.step

    def counted(batches: Any) -> bool:
        counts.append(len(batches))
        lengths.update(batch.frame_mask.shape[1] for batch in batches)
        return step(batches)

    trainer.step = counted
    return counts, lengths


def count_sent(trainer: Any) -> list[int]:
    """A list that grows by the number of elements that DeepSpeed gives to be summed over ranks, with every step."""
    import deepspeed.comm

    counts: list[int] = []
    step = trainer.step

    def counted(batches: Any) -> bool:
        counts.append(0)
        own = {name: getattr(deepspeed.comm, name) for name in SUMS}

        def counting(function: Any) -> Any:
            @functools.wraps(function)
            def count(tensor: torch.Tensor, *arguments: Any, **settings: Any) -> Any:
                counts[-1] += tensor.numel()
                return function(tensor, *arguments, **settings)

            return count

        for name, function in own.items():
            setattr(deepspeed.comm, name, counting(function))
        try:
            return step(batches)
        finally:
            for name, function in own.items():
                setattr(deepspeed.comm, name, function)

    trainer.step = counted
    return counts


def count_waits(trainer: Any) -> tuple[list[dict[str, int]], list[int]]:
    """Lists that grow with every step: how often its host would wait for a GPU, by whose code and for what; and how
    often it walks through the model for its parameters."""
    counts: list[dict[str, int]] = []
    walks: list[int] = []
    step, module = trainer.step, trainer.engine.module

    def counted(batches: Any) -> bool:
        walked = mock.patch.object(module, "named_parameters", wraps=module.named_parameters)
        with load_script("benchmarks/operator_calls.py").Calls() as calls, walked as walk:
            stop = step(batches)
        counts.append({": ".join(key): count for key, count in calls.waits.items()})
        walks.append(walk.call_count)
        return stop

    trainer.step = counted
    return counts, walks


def spoil_gradient(trainer: Any, step: int) -> None:
    """Have a weight of this rank get a gradient in one step that is not finite."""
    scale = {step - 1: float("nan")}
    weight = trainer.engine.module.pose_encoder.back[0].weight
    weight.register_hook(lambda gradient: gradient * scale.get(trainer.progress.step, 1.0))


def keep_gradients(trainer: Any) -> dict[str, tuple[float, float]]:
    """A dictionary that the first step fills with every gradient's norm and its product with a fixed vector, by name.

    AdamW's first moment after one step is the gradient times 1 - beta1, at every stage and division of the batch.
    """
    gradients: dict[str, tuple[float, float]] = {}
    step = trainer.step

    def looked_at(batches: Any) -> bool:
        stop = step(batches)
        if not gradients:
            gradients.update(first_moments(trainer.engine, 1 - trainer.recipe.training.betas[0]))
        return stop

    trainer.step = looked_at
    return gradients


def first_moments(engine: Any, factor: float) -> dict[str, tuple[float, float]]:
    shapes = {name: getattr(weight, "ds_shape", weight.shape) for name, weight in engine.module.named_parameters()}
    whole = {name: torch.zeros(shape.numel(), dtype=torch.float64) for name, shape in shapes.items()}
    for shard in shards(engine):
        if shard.replicated and dist.get_rank() != 0:
            continue
        moments = shard.state["exp_avg"].flatten()
        for part in shard.fragments:
            whole[part.name][part.start : part.start + part.numel] = moments.narrow(0, part.offset, part.numel) / factor
    for gradient in whole.values():
        dist.all_reduce(gradient)
    return {
        name: (float(gradient.norm()), float(gradient @ torch.arange(len(gradient), dtype=torch.float64).cos()))
        for name, gradient in whole.items()
    }


def norm(weights: dict[str, torch.Tensor]) -> float:
    return float(sum(tensor.double().square().sum() for tensor in weights.values()).sqrt())  # type: ignore[union-attr]


if __name__ == "__main__":
    run_cases(train)
