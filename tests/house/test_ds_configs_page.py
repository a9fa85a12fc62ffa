"""The measured figures in ds_configs/README.md are those of benchmarks/results/memory.json."""

from __future__ import annotations

from types import ModuleType

import pytest

from tests.scripts import load_script
from toolkit.recipe.deepspeed.json_file import ds_config_names


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    module = load_script("benchmarks/memory.py")
    if not module.RESULTS.exists():
        pytest.skip("nothing was measured yet: python benchmarks/memory.py")
    return module


def test_the_table_is_drawn_from_the_results_as_they_are(benchmark: ModuleType) -> None:
    text = benchmark.README.read_text(encoding="utf-8")
    assert text == benchmark.with_table(text, benchmark.read_results()), "run python benchmarks/memory.py --table"


def test_every_json_that_runs_without_a_gpu_was_measured(benchmark: ModuleType) -> None:
    rows = {row["ds"]: row for row in benchmark.read_results()}
    assert set(rows) == set(ds_config_names()) - set(benchmark.GPU_HOSTS)


def test_memory_falls_as_the_states_are_divided(benchmark: ModuleType) -> None:
    peaks = {row["ds"]: row["peak_gib"] for row in benchmark.read_results()}
    assert peaks["zero3"] < min(peaks["zero1"], peaks["zero2"])
    assert max(peaks["zero1"], peaks["zero2"]) < peaks["zero0"]
    assert peaks["zero2_bf16_states"] < peaks["zero2"]
