"""One trial of ``launch/plan.py --tune``: some steps of a run, on all of its ranks, and their speed.

Nothing is evaluated or saved. What the ranks found is written to a file by rank 0.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import distributed as dist

from toolkit.batching.loader import TrainBatches
from toolkit.cluster.ops import check_needed_ops
from toolkit.cluster.ranks import Ranks, check_ranks
from toolkit.cluster.rendezvous import on_rank_0
from toolkit.corpus.mixture.opening import open_corpora
from toolkit.files import write_text_atomically
from toolkit.fitting.micro_batches import fit_micro_batches
from toolkit.models.check import check_model
from toolkit.models.compiled import before_compilations
from toolkit.recipe.resolve import resolve_named
from toolkit.training.engine import set_allocator
from toolkit.training.run import open_run, open_trainer, start_loader
from toolkit.training.start import Start
from toolkit.training.trainer import Trainer

AT_MOST = 4  # times the steps that were asked for, where layers are compiled or graphs captured in many of them


@dataclass(frozen=True)
class Trial:
    """What to try.

    Attributes:
        recipe: its name or path.
        overrides: of it; they give the micro-batch and the run directory.
        deepspeed: the JSON's name.
        steps: that are taken; the first of several is not timed.
        result: the file that gets what was measured.
    """

    recipe: str
    overrides: list[str]
    deepspeed: str
    steps: int
    result: str


@dataclass(frozen=True)
class Speed:
    """What was measured.

    Attributes:
        clips_per_second: over all ranks, of steps after the first one: steps have clips of different lengths.
        peak_gib: the most that a rank held, as ``metrics.jsonl`` counts it.
        batch: the arithmetic of a step in words; of ``auto`` with what was chosen.
    """

    clips_per_second: float
    peak_gib: float
    batch: str


def take_steps(file: Path, ranks: Ranks) -> None:
    """Be one rank of the trial that a file describes."""
    trial = Trial(**json.loads(file.read_text(encoding="utf-8")))
    gpus = torch.cuda.device_count()
    check_ranks(ranks, gpus=gpus)
    resolved = resolve_named(trial.recipe, trial.overrides, ranks.world_size, has_gpu=gpus > 0, ds=trial.deepspeed)
    check_needed_ops(resolved.deepspeed)
    on_rank_0(lambda: check_model(resolved))
    set_allocator(resolved)
    corpus = open_corpora(resolved.recipe.data, is_local_main=ranks.is_local_main)
    resolved = fit_micro_batches(resolved, ranks, corpus, lambda _: None)
    start = Start()
    with (
        closing(start_loader(resolved, ranks, corpus, start.progress)) as batches,
        open_run(resolved, ranks, corpus) as interruptions,
        open_trainer(resolved, ranks, corpus, start, interruptions, lambda _: None) as trainer,
    ):
        batches.set_tokenizer(trainer.processor.tokenizer)
        trainer.engine.train()
        trainer.meter.restart()
        compilations: list[None] = []
        with before_compilations(lambda: compilations.append(None)):
            speed = clips_per_second(lambda: _step(trainer, batches, compilations), trial.steps)
        trainer.memory.compare(trainer.engine.device)
        peak = trainer.memory.largest()
    if ranks.is_main:
        found = Speed(clips_per_second=speed, peak_gib=peak, batch=resolved.batch)
        write_text_atomically(Path(trial.result), json.dumps(asdict(found)))


def clips_per_second(step: Callable[[], tuple[int, float, bool]], steps: int) -> float:
    """The speed of all but the first of so many steps.

    What is compiled or captured in a step takes longer than the step and is done once in a run: another step is taken
    and timed instead, as long as ``AT_MOST`` allows. Where each of them is such a step, they are timed as they are.

    Args:
        step: takes one; gives its clips, its seconds, and whether anything was compiled or captured, on any rank.
        steps: asked for.
    """
    usual: list[tuple[int, float]] = []
    others: list[tuple[int, float]] = []
    step()
    while len(usual) < steps - 1 and len(usual) + len(others) < AT_MOST * (steps - 1):
        clips, seconds, is_once = step()
        (others if is_once else usual).append((clips, seconds))
    timed = usual or others
    return sum(clips for clips, _ in timed) / sum(seconds for _, seconds in timed)


def _step(trainer: Trainer, batches: TrainBatches, compilations: list[None]) -> tuple[int, float, bool]:
    """A step for :func:`clips_per_second`; ``compilations`` of this rank are counted by others."""
    progress = trainer.progress
    if progress.epoch_step == trainer.epoch_steps:
        progress.epoch += 1
        progress.epoch_step = 0
    clips, seconds, made = progress.clips, progress.seconds, _made(trainer, compilations)
    trainer.step(next(batches))
    new = torch.tensor(_made(trainer, compilations) - made, device=trainer.engine.device)
    dist.all_reduce(new)
    return progress.clips - clips, progress.seconds - seconds, bool(new.item())


def _made(trainer: Trainer, compilations: list[None]) -> int:
    return len(compilations) + (len(trainer.graphs.graphs) if trainer.graphs else 0)
