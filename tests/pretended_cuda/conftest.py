"""Tests of the pretended runtime itself run within it; those of what CUDA does, too, run on a real GPU as well."""

from __future__ import annotations

import pytest

from tests.hidden_gpus import PRETENDED

AS_CUDA = "test_as_cuda.py"


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not PRETENDED and item.path.name != AS_CUDA:
        pytest.skip("only `make test-pretended-gpu` has the pretended CUDA runtime")
