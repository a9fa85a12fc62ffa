"""The command line of the processes that benchmarks compare."""

from __future__ import annotations

from tests.scripts import load_script


def test_overrides_may_come_before_and_after_options() -> None:
    words = ["ours", "folder", "deepspeed=zero1", "--as-on-gpu", "--threads", "1", "ds.bf16.enabled=false"]
    arguments = load_script("benchmarks/training_side.py").read_arguments(words)
    assert arguments.overrides == ["deepspeed=zero1", "ds.bf16.enabled=false"]
    assert arguments.as_on_gpu and arguments.threads == 1
