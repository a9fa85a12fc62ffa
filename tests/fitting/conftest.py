"""A resolved run, a small corpus, a run fitted to a machine; choices are kept in a folder of the test's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fitting.machine import Machine
from tests.small_runs import corpus, resolve
from toolkit.cluster.ranks import Ranks
from toolkit.corpus.packed import Corpus
from toolkit.fitting import micro_batches, planned_size, stage
from toolkit.fitting.hardware import GIB, Card
from toolkit.fitting.memory_limits import MemoryLimit
from toolkit.fitting.micro_batches import fit_micro_batches
from toolkit.recipe.resolve import ResolvedRun

__all__ = ["corpus", "resolve"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def fit(monkeypatch: pytest.MonkeyPatch, corpus: Corpus) -> Callable[..., tuple[ResolvedRun, list[str]]]:
    """Fits a run to a machine; gives the run and the lines on the terminal."""

    def fit(
        run: ResolvedRun,
        machine: Machine,
        *,
        limit: float = 100.0,
        space: float | None = None,
        gpu: bool = False,
        rehearses: bool = True,
    ) -> tuple[ResolvedRun, list[str]]:
        lines: list[str] = []
        monkeypatch.setattr(stage, "Rehearsal", machine)
        monkeypatch.setattr(micro_batches, "cards", lambda: [Card("H100", 80 * GIB, 70 * GIB)] if gpu else [])
        monkeypatch.setattr(micro_batches, "build_missing_ops", lambda *_: None)
        monkeypatch.setattr(micro_batches, "import_libraries", lambda _: None)  # no engine is built
        for module in (stage, planned_size):
            monkeypatch.setattr(
                module,
                "memory_limit",
                lambda _: MemoryLimit(int(limit * GIB), None if space is None else int(space * GIB)),
            )
        return fit_micro_batches(run, Ranks(), corpus, lines.append, rehearses=rehearses), lines

    return fit
