"""The progress line: one live line on a terminal, plain lines every few steps where there is none (a job's log).

``rich.live`` draws it. ``rich.progress`` is not used: it cannot leave out the least important figures on a narrow
terminal, prints no lines where there is no terminal, and takes an evaluation into its pace, so its ETA jumps.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from dataclasses import dataclass
from statistics import median
from typing import TextIO

from rich.console import Console
from rich.live import Live
from rich.text import Text

# Steps whose median duration gives the remaining time: one evaluation or save among them changes nothing.
RECENT_STEPS = 50


@dataclass(frozen=True)
class StepFigures:
    """The figures of one optimizer step."""

    step: int  # optimizer steps done so far
    epoch: float  # epochs done so far, with its fraction
    loss: float  # mean per target token
    learning_rate: float  # of the step just taken
    grad_norm: float | None  # before clipping; None where the engine does not know it
    clips_per_second: float  # over all ranks
    frames_per_second: float  # over all ranks, padding not counted
    tokens_per_second: float  # target tokens over all ranks
    padding_share: float  # of the frames in the batches, 0 to 1
    data_wait_share: float  # of the step's time that ranks waited for their batches, 0 to 1
    memory_gib: float  # resident memory of this process
    tflops: float | None = None  # model FLOPs a second of all ranks, in units of 10^12; None while not known
    mfu: float | None = None  # their share of what the devices can do, 0 to 1
    gpu_memory_gib: float | None = None  # torch's on this GPU now; None without one
    gpu_peak_memory_gib: float | None = None  # the same at its highest


class ProgressLine:
    """Shows how far a run is. A context manager; it prints on the local main rank only (``enabled``)."""

    def __init__(
        self,
        *,
        total_steps: int,
        total_epochs: float,
        start_step: int = 0,
        log_every: int = 10,
        enabled: bool = True,
        stream: TextIO | None = None,
    ) -> None:
        """Prepare the line: without a terminal every ``log_every`` steps; nothing unless ``enabled``, on one rank."""
        self._total_steps = total_steps
        self._total_epochs = total_epochs
        self._log_every = max(1, log_every)
        self._enabled = enabled
        self._console = Console(file=stream or sys.stdout, highlight=False, soft_wrap=True)
        self._live: Live | None = None
        self._durations: deque[float] = deque(maxlen=RECENT_STEPS)
        self._last_step, self._last_time = start_step, time.monotonic()

    def update(self, figures: StepFigures) -> None:
        """Show the figures of the step just taken."""
        if not self._enabled:
            return
        now = time.monotonic()
        if figures.step > self._last_step:
            self._durations.append((now - self._last_time) / (figures.step - self._last_step))
        self._last_step, self._last_time = figures.step, now
        if self._console.is_terminal:
            self._show(fit_line(self._parts(figures), self._console.width))
        elif figures.step % self._log_every == 0 or figures.step == self._total_steps:
            self._print("  ".join(text for text, _ in self._parts(figures)))

    def echo(self, text: str) -> None:
        """Print a line that stays, above the live line."""
        if self._enabled:
            self._print(text)

    def close(self) -> None:
        """End the live line; what it last showed stays on the terminal."""
        if self._live:
            self._live.stop()
            self._live = None

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def remaining_seconds(self) -> float | None:
        """Time to the last step at the median pace of recent steps; None before the first step."""
        if not self._durations:
            return None
        return max(0, self._total_steps - self._last_step) * median(self._durations)

    def _parts(self, figures: StepFigures) -> list[tuple[str, int]]:
        """Parts of the line in reading order, each with its weight: the lightest are left out first."""
        remaining = self.remaining_seconds()
        parts = [
            (f"epoch {figures.epoch:.1f}/{self._total_epochs:g}", 6),
            (f"step {figures.step}/{self._total_steps}", 9),
            (f"loss {figures.loss:.4f}", 8),
            (f"lr {figures.learning_rate:.1e}", 4),
            (f"grad {figures.grad_norm:.2f}" if figures.grad_norm is not None else "", 3),
            (f"{short_rate(figures.clips_per_second)} clips/s", 5),
            (f"{short_rate(figures.frames_per_second)} frames/s", 2),
            (f"pad {100 * figures.padding_share:.0f} %", 1),
            (f"wait {100 * figures.data_wait_share:.0f} %", 2),
            (f"MFU {100 * figures.mfu:.0f} %" if figures.mfu is not None else "", 3),
            (f"ETA {format_duration(remaining)}" if remaining is not None else "", 7),
        ]
        return [part for part in parts if part[0]]

    def _show(self, line: str) -> None:
        text = Text(line, no_wrap=True, overflow="ellipsis")
        if self._live is None:
            self._live = Live(text, console=self._console, auto_refresh=False)
            self._live.start()
        self._live.update(text, refresh=True)

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False)
        self._console.file.flush()


def fit_line(parts: list[tuple[str, int]], width: int) -> str:
    """Join ``(text, weight)`` parts into one line no wider than ``width``, leaving out the lightest."""
    kept = list(parts)
    while len(kept) > 1 and len("  ".join(text for text, _ in kept)) > width:
        kept.remove(min(kept, key=lambda part: part[1]))
    return "  ".join(text for text, _ in kept)


def short_rate(value: float) -> str:
    """A rate in at most five characters: 0.42, 41.2, 2.1k, 1.3M."""
    for limit, unit in ((1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.1f}{unit}"
    return f"{value:.2f}" if value < 1 else f"{value:.1f}"


def format_duration(seconds: float) -> str:
    """A time in words: 40 s, 3 min, 2 h 05 min, 3 d 4 h."""
    minutes = round(seconds / 60)
    if seconds < 60:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24} h"
