"""A resolved run and a small corpus; choices are kept in a folder of the test's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.small_runs import corpus, resolve

__all__ = ["corpus", "resolve"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"
