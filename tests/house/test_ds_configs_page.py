"""The measured figures in ds_configs/README.md are those of benchmarks/results/memory.json."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from toolkit.recipe.deepspeed.json_file import ds_config_names

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    specification = importlib.util.spec_from_file_location("benchmark_memory", ROOT / "benchmarks" / "memory.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
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
