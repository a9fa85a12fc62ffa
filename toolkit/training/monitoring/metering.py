"""How fast a run is and what it spends: one step's counts from all ranks, turned into figures."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import distributed as dist

from toolkit.batching.collate import Batch
from toolkit.recipe.resolve import BFLOAT, HALF, ResolvedRun
from toolkit.training.monitoring.flops import Cost, CostRecorder, measure_peak


@dataclass(frozen=True)
class Window:
    """What all ranks together bring to one optimizer step.

    Attributes:
        tokens: target tokens that count.
        clips: clips that count.
        frames: real frames.
        padded_frames: frames of the batches, padding and fillers included.
        flops: model FLOPs; 0 while they are not known.
        waited: seconds that ranks waited for their batches, summed up.
        wants_stop: ranks that were asked to stop.
    """

    tokens: int
    clips: int
    frames: int
    padded_frames: int
    flops: float
    waited: float
    wants_stop: int

    @property
    def stop(self) -> bool:
        """Whether any rank was asked to stop."""
        return self.wants_stop > 0


class StepMeter:
    """Measures steps: from the end of one, over the wait for data, to the end of the next.

    Args:
        resolved: says in which type matrix products are computed.
        device: the rank's.
        world_size: number of ranks; all of them must make a meter.
    """

    def __init__(self, resolved: ResolvedRun, device: torch.device, world_size: int) -> None:
        self._device = device
        self._world_size = world_size
        self.cost: Cost | None = None  # of a batch, from the first forward pass on
        self._records = True
        peak = torch.tensor(measure_peak(device, product_type(resolved)), dtype=torch.float64, device=device)
        dist.all_reduce(peak)
        self.peak = float(peak)  # FLOP/s of all ranks together
        self._since = self._began = time.monotonic()

    def restart(self) -> None:
        """What happened since the last step (an evaluation, a save) is no part of the next one."""
        self._since = time.monotonic()

    def window(self, batches: Sequence[Batch], wants_stop: bool) -> Window:
        """Begin a step: sum up over all ranks what they are about to train on."""
        self._began = time.monotonic()
        sums = torch.tensor(
            [
                sum(batch.num_target_tokens for batch in batches),
                sum(batch.num_clips for batch in batches),
                sum(batch.num_frames for batch in batches),
                sum(batch.frame_mask.numel() for batch in batches),
                sum(map(self.cost.of, batches)) if self.cost else 0.0,
                self._began - self._since,
                wants_stop,
            ],
            dtype=torch.float64,
            device=self._device,
        )
        dist.all_reduce(sums)
        tokens, clips, frames, padded, flops, waited, stops = sums.tolist()
        return Window(int(tokens), int(clips), int(frames), int(padded), flops, waited, int(stops))

    @contextmanager
    def forward(self, model: Any, batch: Batch) -> Iterator[None]:
        """Around a forward pass: the first one tells what all the others will cost."""
        if not self._records:
            yield
            return
        self._records = False
        with CostRecorder(model, batch) as recorder:
            yield
        self.cost = recorder.cost()

    def end(self, window: Window) -> tuple[float, dict[str, float]]:
        """End a step.

        Returns:
            its seconds, the wait for data included, and its figures by name.
        """
        now = time.monotonic()
        seconds = now - self._since
        self._since = now
        figures = {
            "clips_per_second": window.clips / seconds,
            "frames_per_second": window.frames / seconds,
            "tokens_per_second": window.tokens / seconds,
            "padding_share": 1 - window.frames / max(window.padded_frames, 1),
            "data_wait_share": min(1.0, window.waited / self._world_size / seconds),
            **memory(),
        }
        if window.flops:
            figures["tflops"] = window.flops / seconds / 1e12
            figures["mfu"] = window.flops / seconds / self.peak
        return seconds, figures


def product_type(resolved: ResolvedRun) -> torch.dtype:
    """The type in which the run computes its matrix products."""
    names = (resolved.precision, resolved.autocast)
    if any(name in BFLOAT for name in names):
        return torch.bfloat16
    return torch.float16 if any(name in HALF for name in names) else torch.float32


def memory() -> dict[str, float]:
    """What this rank holds, in GiB: the process, and torch on the GPU (now, and at its highest)."""
    held = {"memory_gib": psutil.Process().memory_info().rss / 2**30}
    if torch.cuda.is_available():
        held["gpu_memory_gib"] = torch.cuda.memory_allocated() / 2**30
        held["gpu_peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return held


def peak_memory_gib() -> float:
    """Largest memory that this rank has held: of its GPU, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    import resource

    # Linux counts KiB, macOS bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
