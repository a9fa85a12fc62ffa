"""Tests of the pretended runtime itself: those that are marked `gpu` run within it, and not on a real GPU."""

from __future__ import annotations

import pytest

from tests.hidden_gpus import PRETENDED


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not PRETENDED:
        pytest.skip("only `make test-pretended-gpu` has the pretended CUDA runtime")
