"""One interface for a run's figures: ``metrics.jsonl`` always, Weights & Biases and TensorBoard when asked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from toolkit.recipe.schema import Tracking
from toolkit.tracking.background import BackgroundSink, Sink
from toolkit.tracking.jsonl import METRICS_FILE, JsonLines

Kind = Literal["train", "eval", "event", "memory"]


class Tracker:
    """Passes figures to ``metrics.jsonl`` and to the trackers; without a file, as on all ranks but rank 0, drops them.

    Use it as a context manager, so that everything is closed however the run ends.
    """

    def __init__(self, file: JsonLines | None = None, trackers: list[BackgroundSink] | None = None) -> None:
        self._file, self._trackers = file, trackers or []

    @property
    def _sinks(self) -> list[Sink]:
        return [*([self._file] if self._file else []), *self._trackers]

    def log(self, step: int, values: Mapping[str, float | str], kind: Kind = "train") -> None:
        """Record named figures of one optimizer step, such as ``{"loss": 2.31, "clips_per_second": 41.0}``.

        The kind is ``train`` for the loop's figures, ``eval`` for scores, ``event`` for what happened once (a save, an
        interruption), ``memory`` for the peaks of the run's phases until then.
        """
        for sink in self._sinks:
            sink.log(step, values, kind)

    def table(self, step: int, name: str, rows: list[dict[str, Any]]) -> None:
        """Record a table, such as sample outputs; all rows have the first row's keys."""
        for sink in self._sinks:
            sink.table(step, name, rows)

    def close(self, timeout: float | None = None) -> None:
        """Close the file and the trackers, each within ``timeout`` seconds where that is less than the recipe's.

        Later calls do nothing.
        """
        if self._file:
            self._file.close()
        while self._trackers:
            self._trackers.pop().close(timeout)
        self._file = None

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_tracker(
    run_dir: Path, settings: Tracking, config: dict[str, Any], *, is_main: bool, resume_step: int = 0
) -> Tracker:
    """Open ``metrics.jsonl`` and the trackers that the recipe asks for.

    A tracker that fails or hangs, at any time, is one line on the terminal and in the log.

    Only rank 0 (``is_main``) records. Figures beyond ``resume_step``, which a run logged that was killed after its last
    checkpoint, are dropped: they will be logged again. ``config`` is the resolved recipe, for trackers that show it.

    Raises:
        UserError: ``metrics.jsonl`` of an earlier start cannot be rewritten.
    """
    if not is_main:
        return Tracker()
    file = JsonLines(run_dir / METRICS_FILE, resume_step)
    trackers = []

    def tensorboard() -> Sink:
        from toolkit.tracking.tensorboard import TensorBoard

        return TensorBoard(run_dir / "tensorboard", resume_step)

    def wandb() -> Sink:
        from toolkit.tracking.weights_and_biases import WeightsAndBiases

        return WeightsAndBiases(run_dir, settings.wandb, settings.project, config, settings.timeout / 2)

    if settings.tensorboard:
        trackers.append(BackgroundSink("tensorboard", tensorboard, settings.timeout))
    if settings.wandb != "off":
        trackers.append(BackgroundSink("wandb", wandb, settings.timeout))
    return Tracker(file, trackers)
