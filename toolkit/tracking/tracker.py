"""One interface for a run's figures: ``metrics.jsonl`` always, Weights & Biases and TensorBoard when asked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol

from toolkit.recipe.schema import Tracking
from toolkit.tracking.jsonl import METRICS_FILE, JsonLines

Kind = Literal["train", "eval", "event"]


class Sink(Protocol):
    """A place that figures go to."""

    def log(self, step: int, values: Mapping[str, float | str], kind: str) -> None: ...

    def table(self, step: int, name: str, rows: list[dict[str, Any]]) -> None: ...

    def close(self) -> None: ...


class Tracker:
    """Hands figures to every sink; without sinks, as on all ranks but the first, it swallows them.

    Use it as a context manager, so that the sinks are closed however the run ends.
    """

    def __init__(self, sinks: list[Sink]) -> None:
        self._sinks = sinks

    def log(self, step: int, values: Mapping[str, float | str], kind: Kind = "train") -> None:
        """Record named figures of one optimizer step.

        Args:
            step: optimizer steps done so far.
            values: figure by name, such as ``{"loss": 2.31, "clips_per_second": 41.0}``.
            kind: ``train`` for the loop's figures, ``eval`` for scores, ``event`` for what happened once (a save, an
                interruption).
        """
        for sink in self._sinks:
            sink.log(step, values, kind)

    def table(self, step: int, name: str, rows: list[dict[str, Any]]) -> None:
        """Record a table, such as sample outputs; all rows have the first row's keys."""
        for sink in self._sinks:
            sink.table(step, name, rows)

    def close(self) -> None:
        """Close every sink; later calls do nothing."""
        while self._sinks:
            self._sinks.pop().close()

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_tracker(
    run_dir: Path, settings: Tracking, config: dict[str, Any], *, is_main: bool, resume_step: int = 0
) -> Tracker:
    """Open the sinks that the recipe asks for.

    Args:
        run_dir: the run directory, which exists.
        settings: the recipe's ``tracking`` section.
        config: the resolved recipe as a plain dict, shown by trackers that have a place for it.
        is_main: whether this is rank 0; the other ranks get a tracker without sinks.
        resume_step: the optimizer step that the run goes on from. Figures beyond it, told by a run that was killed
            after its last checkpoint, are dropped and will be told again; 0 starts a new story.
    """
    if not is_main:
        return Tracker([])
    sinks: list[Sink] = [JsonLines(run_dir / METRICS_FILE, resume_step)]
    if settings.tensorboard:
        from toolkit.tracking.tensorboard import TensorBoard

        sinks.append(TensorBoard(run_dir / "tensorboard", resume_step))
    if settings.wandb != "off":
        from toolkit.tracking.weights_and_biases import WeightsAndBiases

        sinks.append(WeightsAndBiases(run_dir, settings.wandb, settings.project, config))
    return Tracker(sinks)
