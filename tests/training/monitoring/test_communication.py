"""The table of what comms_logger has counted, and the line that names it."""

from __future__ import annotations

from pathlib import Path

import pytest

from toolkit.recipe.resolve import ResolvedRun, resolve_named
from toolkit.training.monitoring.communication import FILE, report_communication


def run_in(folder: Path, *overrides: str) -> ResolvedRun:
    return resolve_named("demo", [f"run.dir={folder}", *overrides], 2, has_gpu=False)


def test_without_comms_logger_nothing_is_written(tmp_path: Path) -> None:
    said: list[str] = []
    report_communication(run_in(tmp_path), said.append)
    assert not said and not list(tmp_path.iterdir())


def test_calls_and_bytes_of_each_operation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    comm = pytest.importorskip("deepspeed.comm.comm")
    from deepspeed.utils.comms_logging import CommsLogger

    monkeypatch.setattr(comm, "comms_logger", CommsLogger())
    monkeypatch.setattr("deepspeed.comm.get_world_size", lambda group=None: 2)
    run, said = run_in(tmp_path, "ds.comms_logger.enabled=true", "ds.comms_logger.prof_all=true"), list[str]()
    report_communication(run, said.append)
    assert "ds.comms_logger.prof_ops" in said.pop()
    for milliseconds in (100.0, 300.0):
        comm.comms_logger.append("all_reduce", "all_reduce", milliseconds, 2**29)
    comm.comms_logger.append("broadcast", "broadcast", 50.0, 8)
    report_communication(run, said.append)
    assert len(said) == 1 and all(part in said[0] for part in ("3 calls", "1.00 GiB", str(tmp_path / FILE)))
    _, *rows = (tmp_path / FILE).read_text(encoding="utf-8").splitlines()
    assert [row.split() for row in rows] == [
        ["all_reduce", str(2**29), "2", "1024.000"],
        ["broadcast", "8", "1", "0.000"],
    ]
