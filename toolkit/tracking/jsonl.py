"""``metrics.jsonl``: one JSON object a line, in the order in which things happened, readable during the run."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from toolkit.files import write_text_atomically
from toolkit.tracking.background import warn

METRICS_FILE = "metrics.jsonl"


class JsonLines:
    """Appends a run's figures to a file, one flushed line each.

    A figure that is not finite is written as null, because JSON has no other word for it. A disk that is full costs
    lines of this file, not the run.
    """

    def __init__(self, path: Path, resume_step: int) -> None:
        """Open ``path`` for appending, after dropping what a resumed run will log again (see ``keep_until``)."""
        keep_until(path, resume_step)
        self._file = path.open("a", encoding="utf-8")
        self._has_warned = False

    def log(self, step: int, values: Mapping[str, float | str], kind: str) -> None:
        """Write named figures of one step."""
        self._write({"kind": kind, "step": step, "time": round(time.time(), 3), **values})

    def table(self, step: int, name: str, rows: list[dict[str, Any]]) -> None:
        """Write a table, such as sample outputs, as one line."""
        self._write({"kind": "table", "step": step, "time": round(time.time(), 3), "name": name, "rows": rows})

    def close(self) -> None:
        """Close the file; safe to call twice."""
        with contextlib.suppress(OSError):  # a full disk, which was reported when the lines were written
            self._file.close()

    def _write(self, entry: dict[str, Any]) -> None:
        line = json.dumps(_finite(entry), ensure_ascii=False, allow_nan=False) + "\n"
        try:
            self._file.write(line)
            self._file.flush()
        except OSError as error:
            if not self._has_warned:
                self._has_warned = True
                warn(f"{self._file.name} cannot be written ({error.strerror}): the run continues, figures are missing")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All complete entries of a ``metrics.jsonl``; a last line that a crash left incomplete is skipped."""
    if not path.exists():
        return []
    entries = []
    for line in path.read_text(encoding="utf-8").split("\n"):  # texts may hold other line ends, such as U+2028
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return entries


def keep_until(path: Path, step: int) -> None:
    """Drop the entries beyond ``step``, so that a run resumed from a checkpoint has each step once in its file.

    Raises:
        UserError: the file cannot be replaced.
    """
    if path.exists():
        kept = [entry for entry in read_lines(path) if entry.get("step", 0) <= step]
        write_text_atomically(path, "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in kept))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
