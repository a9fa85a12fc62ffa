"""docs/benchmarks.md says what benchmarks/results say, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest

from tests.scripts import load_script

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def benchmark_page() -> ModuleType:
    return load_script("benchmarks/page.py")


def test_the_page_is_drawn_from_the_results_as_they_are(benchmark_page: ModuleType) -> None:
    assert benchmark_page.PAGE.read_text(encoding="utf-8") == benchmark_page.page(), "run python benchmarks/page.py"


def test_every_result_and_every_target_stands_on_the_page(benchmark_page: ModuleType) -> None:
    text = benchmark_page.PAGE.read_text(encoding="utf-8")
    files = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
    assert files
    for file in files:
        assert file.stem in benchmark_page.SECTIONS, f"benchmarks/page.py does not know {file.name}"
        heading, command, _ = benchmark_page.SECTIONS[file.stem]
        assert f"## {heading}" in text and command in text
        results = json.loads(file.read_text(encoding="utf-8"))
        for key, value in results.items() if isinstance(results, dict) else ():
            if isinstance(value, dict) and "target" in value:
                assert f"| {key} |" in text and str(value["target"]) in text
