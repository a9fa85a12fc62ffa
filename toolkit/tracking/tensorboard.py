"""TensorBoard event files in the run directory, for those who look at curves there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


class TensorBoard:
    """Writes a run's figures as TensorBoard scalars and its tables as Markdown text."""

    def __init__(self, folder: Path, resume_step: int) -> None:
        """Open an event file in ``folder``; TensorBoard itself hides earlier points beyond ``resume_step``."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=resume_step + 1 if resume_step else None)

    def log(self, step: int, values: Mapping[str, float | str], kind: str) -> None:
        """Write named figures of one step, grouped by kind."""
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self._writer.add_scalar(f"{kind}/{name}", value, step)

    def table(self, step: int, name: str, rows: list[dict[str, Any]]) -> None:
        """Write a table as Markdown."""
        if rows:
            head = list(rows[0])
            lines = [
                head,
                ["---"] * len(head),
                *([str(row.get(key, "")).replace("|", "\\|") for key in head] for row in rows),
            ]
            self._writer.add_text(name, "\n".join(f"| {' | '.join(line)} |" for line in lines), step)

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()
