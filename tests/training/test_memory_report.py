"""The measured memory beside the plan's: what is printed, and from where on a plan counts as wrong."""

from __future__ import annotations

from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

from toolkit.errors import UserError
from toolkit.planning.afterwards import Computed
from toolkit.training import memory_report as module
from toolkit.training.memory_report import in_a_line, lines, report_memory, wrong_plan

GPU = {"start": {"process": 2.0, "allocated": 1.0}, "step": {"process": 2.0, "allocated": 4.0, "reserved": 5.0}}
HEAVIEST = Computed(2, 30, 8)


def test_the_measured_stands_beside_the_plan() -> None:
    assert in_a_line(GPU, {"step": 3.9}).endswith("start 1.00, step 4.00 (planned 3.90)")
    assert in_a_line({"save": {"process": 2.5}}, {}).endswith("save 2.50")
    found = lines(GPU, {"step": 3.9})
    assert len(found) == 2 and "planned" not in found[0]
    assert all(word in found[1] for word in ("step", "4.000", "5.000", "2.000", "planned 3.900"))


@pytest.mark.parametrize(
    ("planned", "is_wrong"),
    [(4.0, False), (3.5, False), (4.69, False), (3.4, True), (4.8, True)],
    ids=["right", "14 % too low", "15 % too high", "18 % too low", "17 % too high"],
)
def test_a_plan_that_is_more_than_15_percent_off_asks_for_a_report(planned: float, is_wrong: bool) -> None:
    warning = wrong_plan(GPU, {"step": planned}, {"step": planned}, "runs/mine")
    assert (warning is not None) == is_wrong
    if warning:
        assert all(word in warning for word in ("step 4.00", f"{planned:.2f}", "runs/mine", "metrics.jsonl"))
        assert "start" not in warning


def test_small_differences_are_never_wrong_plans_and_processes_are_compared_without_a_gpu() -> None:
    low, one = {"step": 0.05}, {"step": 1.0}
    assert wrong_plan({"step": {"allocated": 0.14}}, low, low, "run") is None
    assert "step 9.00" in (wrong_plan({"step": {"process": 9.0}}, one, one, "run") or "")
    assert wrong_plan({"step": {"process": 9.0, "allocated": 1.0}}, one, one, "run") is None
    assert wrong_plan(GPU, {}, {}, "run") is None


@pytest.mark.parametrize(
    ("process", "words"), [(0.8, "planned 1.00 (-20%)"), (1.0, ""), (1.9, ""), (2.4, "planned 2.00 (+20%)")]
)
def test_what_a_heap_loses_may_be_less_than_was_planned(process: float, words: str) -> None:
    warning = wrong_plan({"step": {"process": process}}, {"step": 2.0}, {"step": 1.0}, "run")
    assert words in warning if words and warning else warning is None and not words


@pytest.fixture
def trainer() -> Any:
    trainer = MagicMock()
    trainer.memory.of_ranks = GPU
    trainer.memory.libraries = 2**30
    trainer.progress.seconds = 31.0
    return trainer


def test_a_process_on_a_cpu_is_compared_with_its_plan(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    trainer.memory.of_ranks = {"step": {"process": 2.0}}
    monkeypatch.setattr(
        module, "planned_cpu_phases", lambda *_, **own: asked.append(own) or 2 * ({"step": 2.1 * 2**30},)
    )
    printed: list[str] = []
    report_memory(trainer, HEAVIEST, printed.append)
    assert "step 2.00 (planned 2.10)" in printed[0] and not trainer.warn.called
    assert asked == [{"libraries": 2**30, "keeps": False}]
    assert trainer.tracker.log.call_args.args[1]["step_planned_gib"] == 2.1
    trainer.progress.seconds = 3.0
    report_memory(trainer, HEAVIEST, printed.append)
    assert len(asked) == 1 and "planned" not in printed[1], "a short run is not worth it"


@pytest.mark.parametrize(("gib", "warns"), [(4.2, False), (2.0, True)])
def test_a_gpu_is_compared_with_its_plan(
    trainer: Any, gib: float, warns: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(module, "hardware_of", lambda ranks: None)
    monkeypatch.setattr(module, "planned_phases", lambda *_: {"step": gib * 2**30})
    printed: list[str] = []
    report_memory(trainer, HEAVIEST, printed.append)
    assert f"planned {gib:.2f}" in printed[0]
    assert trainer.warn.called == warns
    assert trainer.tracker.log.call_args.args[1]["step_planned_gib"] == gib
    assert trainer.tracker.log.call_args.kwargs["kind"] == "memory"


@pytest.mark.parametrize("error", [UserError("cannot be traced"), KeyError("n_layers")])
def test_no_run_fails_for_its_plan(trainer: Any, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(module, "hardware_of", lambda ranks: None)
    monkeypatch.setattr(module, "planned_phases", MagicMock(side_effect=error))
    report_memory(trainer, HEAVIEST, lambda _: None)
    assert not trainer.warn.called and trainer.tracker.log.called
