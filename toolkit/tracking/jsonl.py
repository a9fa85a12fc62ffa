"""``metrics.jsonl``: one JSON object a line, in the order in which things happened, readable while the run goes on."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

METRICS_FILE = "metrics.jsonl"


class JsonLines:
    """Appends a run's figures to a file, one flushed line each.

    A figure that is not finite is written as null, since JSON has no other word for it.
    """

    def __init__(self, path: Path, resume_step: int) -> None:
        """Open ``path`` for appending, after dropping what a continued run will tell again (see ``keep_until``)."""
        keep_until(path, resume_step)
        self._file = path.open("a", encoding="utf-8")

    def log(self, step: int, values: Mapping[str, float | str], kind: str) -> None:
        """Write named figures of one step."""
        self._write({"kind": kind, "step": step, "time": round(time.time(), 3), **values})

    def table(self, step: int, name: str, rows: list[dict[str, Any]]) -> None:
        """Write a table, such as sample outputs, as one line."""
        self._write({"kind": "table", "step": step, "time": round(time.time(), 3), "name": name, "rows": rows})

    def close(self) -> None:
        """Close the file; safe to call twice."""
        self._file.close()

    def _write(self, entry: dict[str, Any]) -> None:
        self._file.write(json.dumps(_finite(entry), ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All complete entries of a ``metrics.jsonl``; a last line that a crash cut short is left out."""
    if not path.exists():
        return []
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return entries


def keep_until(path: Path, step: int) -> None:
    """Drop the entries beyond ``step``, so that a run continued from a checkpoint leaves a file that tells one story.

    The shorter file replaces the longer one in one move: a crash leaves either.
    """
    if not path.exists():
        return
    kept = [entry for entry in read_lines(path) if entry.get("step", 0) <= step]
    aside = path.with_name(path.name + ".tmp")
    with aside.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(entry, ensure_ascii=False) + "\n" for entry in kept)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
