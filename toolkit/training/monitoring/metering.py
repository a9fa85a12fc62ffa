"""Speed and memory of a run: the counts of a step over all ranks, turned into figures."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import Tensor
from torch import distributed as dist

from toolkit.batching.collate import Batch
from toolkit.batching.copies import on_device
from toolkit.cluster.ranks import Ranks
from toolkit.models.backbone import recomputes
from toolkit.recipe.deepspeed.cells import BFLOAT, HALF
from toolkit.recipe.resolve import ResolvedRun
from toolkit.training.monitoring.flops import Cost, CostRecorder, cost_beside_training, measure_peak
from toolkit.training.monitoring.memory_phases import MemoryPhases


@dataclass(frozen=True)
class StepCounts:
    """What the micro-batches of one optimizer step hold, summed over all ranks; :meth:`StepMeter.begin` counts it."""

    tokens: float  # target tokens that count
    clips: float  # clips that count
    frames: float  # real frames
    padded_frames: float  # frames of the batches, padding and fillers included
    flops: float  # model FLOPs; 0 while they are not known
    waited: float  # seconds that ranks waited for their batches


class StepMeter:
    """Measures steps: each from the end of the one before, over the wait for data, to its own end."""

    def __init__(self, resolved: ResolvedRun, device: torch.device, ranks: Ranks, phases: MemoryPhases) -> None:
        self._phases = phases
        self._device = device
        self._ranks = ranks
        self.cost: Cost | None = None  # of a batch, from the first forward pass on
        self._records = True
        peak = torch.tensor(measure_peak(device, product_type(resolved)), dtype=torch.float64, device=device)
        dist.all_reduce(peak)
        self.peak = float(peak)  # FLOP/s of all ranks together
        self._process = psutil.Process()  # to look it up takes longer than to read it
        self._since = time.monotonic()

    def restart(self) -> None:
        """Exclude what happened since the last step (an evaluation, a save) from the next one."""
        self._since = time.monotonic()

    def begin(self, batches: Sequence[Batch]) -> Tensor:
        """Begin a step; all ranks call this, each with its micro-batches.

        Returns:
            the numbers of :class:`StepCounts`, over all ranks, on the device: float64 [6].
        """
        sums = on_device(
            [
                sum(batch.num_target_tokens for batch in batches),
                sum(batch.num_clips for batch in batches),
                sum(batch.num_frames for batch in batches),
                sum(batch.frame_mask.numel() for batch in batches),
                sum(map(self.cost.of, batches)) if self.cost else 0.0,
                time.monotonic() - self._since,
            ],
            self._device,
        )
        dist.all_reduce(sums)
        sums[:-1] /= self._ranks.tensor_parallel_size  # ranks that hold one copy of the model have the same batches
        return sums

    @contextmanager
    def forward(self, model: Any, batch: Batch) -> Iterator[None]:
        """Around a forward pass; the first one measures what any other costs, or one before it."""
        if not self._records:
            yield
            return
        self._records = False
        if hasattr(model, "compiled_layers") or _recomputes_alike(model):
            self.cost = cost_beside_training(model, batch.to(self._device))
            yield
            return
        with CostRecorder(model, batch) as recorder:
            yield
        self.cost = recorder.cost()

    def end(self, counts: StepCounts) -> tuple[float, dict[str, float]]:
        """End a step; gives its seconds, the wait for data included, and its figures by name."""
        now = time.monotonic()
        seconds = now - self._since
        self._since = now
        figures = {
            "clips_per_second": counts.clips / seconds,
            "frames_per_second": counts.frames / seconds,
            "tokens_per_second": counts.tokens / seconds,
            "padding_share": 1 - counts.frames / max(counts.padded_frames, 1),
            "data_wait_share": min(1.0, counts.waited / self._ranks.world_size / seconds),
            **self._memory(),
        }
        if counts.flops:
            figures["tflops"] = counts.flops / seconds / 1e12
            figures["mfu"] = counts.flops / seconds / self.peak
        return seconds, figures

    def _memory(self) -> dict[str, float]:
        """Memory of this rank in GiB: of the process, and of torch on the GPU (now, and at its highest)."""
        held = {"memory_gib": self._process.memory_info().rss / 2**30}
        if torch.cuda.is_available():
            highest = self._phases.highest("allocated")
            held |= {"gpu_memory_gib": self._phases.allocated, "gpu_peak_memory_gib": highest}
        return held


def product_type(resolved: ResolvedRun) -> torch.dtype:
    """The type in which the run computes its matrix products."""
    names = (resolved.precision, resolved.autocast)
    if any(name in BFLOAT for name in names):
        return torch.bfloat16
    return torch.float16 if any(name in HALF for name in names) else torch.float32


def _recomputes_alike(model: Any) -> bool:
    """Whether layers run again in the backward pass, and must do so without hooks as they did with them.

    Layers with hooks multiply by one weight after the other (``toolkit/models/gpu_layers.py``), as all of ZeRO stage 3
    do, whose weights are gathered by hooks.
    """
    return recomputes(model.backbone) and not any(hasattr(weight, "ds_id") for weight in model.parameters())
