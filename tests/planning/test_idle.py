"""A plan says when the global batch leaves GPUs idle, and which batch and learning rate would not."""

from __future__ import annotations

import math
from dataclasses import asdict
from functools import cache

import pytest

from toolkit.planning.comparison import compare
from toolkit.planning.hardware import GIB, Hardware
from toolkit.planning.idle import BUSY, IdleGpus, idle_gpus
from toolkit.planning.plan import make_plan
from toolkit.planning.subject import Subject
from toolkit.planning.table import as_dict, as_text
from toolkit.planning.workload import from_maxima
from toolkit.recipe.load import load_recipe
from toolkit.recipe.resolve import ResolvedRun, resolve_named

WORKLOAD = from_maxima(load_recipe("t5_base"))


@cache
def subject() -> Subject:
    return Subject.of(load_recipe("t5_base"))


def resolved(gpus: int, batch: int = 128) -> ResolvedRun:
    settings = [f"training.global_batch_size={batch}"]
    return resolve_named("t5_base", settings, gpus, has_gpu=True, ds="zero1", needs_data=False)


def test_graphs_are_named_where_passes_can_be() -> None:
    found = idle(8)
    assert found is not None and found.graphs and "training.compile=graphs" in found.in_words()
    for setting, is_named in (("training.compile=graphs", None), ("training.gradient_checkpointing=true", False)):
        run = resolve_named("t5_base", [setting], 8, has_gpu=True, ds="zero1", needs_data=False)
        others = idle_gpus(subject(), run, Hardware(8, 80 * GIB), WORKLOAD, 1024)
        assert (others and others.graphs) is is_named


def idle(gpus: int, batch: int = 128, largest: int = 1024, memory: int = 80 * GIB) -> IdleGpus | None:
    return idle_gpus(subject(), resolved(gpus, batch), Hardware(gpus, memory), WORKLOAD, largest)


def test_sixteen_clips_a_rank_leave_a_t5_base_idle_and_more_do_not() -> None:
    found = idle(8)
    assert found is not None and found.clips == 16 and found.busy < BUSY
    assert found.global_batch_size is not None and found.learning_rate is not None and found.then_busy is not None
    assert found.then_busy >= BUSY
    factor = found.global_batch_size // 128
    assert found.learning_rate == pytest.approx(load_recipe("t5_base").training.learning_rate * math.sqrt(factor))
    assert idle(8, found.global_batch_size) is None, "the batch that was named"
    assert idle(8, found.global_batch_size // 2) is not None, "the smallest that would do, among its doublings"


def test_a_whole_batch_on_one_gpu_is_not_called_too_small() -> None:
    assert idle(1) is None


def test_a_batch_that_memory_limits_is_not_called_too_small() -> None:
    assert idle(8, largest=15) is None and idle(8, largest=16) is not None


def test_no_batch_is_named_that_does_not_fit() -> None:
    two = make_plan(subject(), resolved(128), Hardware(128, 80 * GIB), WORKLOAD, micro_batch_size=2).total
    found = idle(128, memory=int(two) - 1)
    assert found is not None and found.clips == 1 and found.global_batch_size is None
    assert "fewer GPUs" in found.in_words()


def test_the_plan_says_so_as_text_and_as_json() -> None:
    recipe, hardware = load_recipe("t5_base"), Hardware(8, 80 * GIB)
    comparison = compare(subject(), {"zero1": resolved(8)}, hardware, WORKLOAD, "zero1")
    assert comparison.idle == idle(8)
    assert comparison.idle is not None
    text = as_text(comparison, subject(), hardware, WORKLOAD, ["t5_base"])
    assert f"training.global_batch_size={comparison.idle.global_batch_size}" in text
    assert as_dict(comparison, recipe, hardware, WORKLOAD, ["t5_base"])["idle"] == asdict(comparison.idle)
