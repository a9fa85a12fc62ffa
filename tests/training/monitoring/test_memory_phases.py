"""The peaks of a run's phases, with stand-ins for the kernel's file and for torch's allocator."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from toolkit.training.monitoring import memory_phases as module
from toolkit.training.monitoring.memory_phases import MemoryPhases, Shape, heaviest, memory_figures, resident_peak_gib

CPU = torch.device("cpu")


class Machine:
    """Holds so many GiB now; peaks are the most since the last reset."""

    def __init__(self) -> None:
        self.process = self.process_peak = 1.0
        self.gpu = self.gpu_peak = 0.0

    def take(self, process: float = 0.0, gpu: float = 0.0) -> None:
        """Allocate and free again."""
        self.process_peak = max(self.process_peak, self.process + process)
        self.gpu_peak = max(self.gpu_peak, self.gpu + gpu)

    def reset_process(self) -> None:
        self.process_peak = self.process

    def reset_gpu(self) -> None:
        self.gpu_peak = self.gpu


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine()
    monkeypatch.setattr(module, "resident_peak_gib", lambda: machine.process_peak)
    monkeypatch.setattr(module, "RESET", SimpleNamespace(write_text=lambda _: machine.reset_process()))
    return machine


@pytest.fixture
def gpu(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(module, "gpu_gib", lambda: (machine.gpu, machine.gpu_peak, machine.gpu_peak + 0.5))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", machine.reset_gpu)


@pytest.fixture
def reduced(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Let another rank have as much as this one, and so much more."""

    def other(more: float) -> None:
        def all_reduce(tensor: torch.Tensor, op: Any) -> None:
            assert op == torch.distributed.ReduceOp.MAX
            tensor[tensor >= 0] += more

        monkeypatch.setattr(module.dist, "all_reduce", all_reduce)

    return other


def test_each_phase_has_its_own_peak(machine: Machine) -> None:
    machine.take(3)
    memory = MemoryPhases()
    memory.enter("step")
    machine.take(1)
    with memory.during("evaluation"):
        machine.take(5)
        with memory.during("save"):
            machine.take(0.5)
        machine.take(2)
    machine.take(0.25)
    assert memory.highest("process") == 6
    assert {phase: values["process"] for phase, values in memory.peaks.items()} == {
        "start": 4,
        "step": 2,
        "evaluation": 6,
        "save": 1.5,
    }
    assert memory.phase == "step"


def test_an_error_leaves_the_rank_in_the_phase_that_failed(machine: Machine) -> None:
    memory = MemoryPhases(phase="step")
    with pytest.raises(MemoryError), memory.during("evaluation"):
        raise MemoryError
    assert memory.phase == "evaluation"


def test_without_a_reset_a_phase_is_known_where_it_raised_the_peak(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: str) -> None:
        raise PermissionError

    monkeypatch.setattr(module, "RESET", SimpleNamespace(write_text=refuse))
    machine.take(1)
    memory = MemoryPhases()
    memory.enter("step")
    machine.take(4)
    memory.enter("save")
    machine.take(3)
    memory.enter("step")
    assert memory.highest("process") == 5
    assert {phase: values.get("process") for phase, values in memory.peaks.items()} == {
        "start": 2,
        "step": 5,
        "save": None,
    }


@pytest.mark.usefixtures("gpu")
def test_a_gpu_has_what_torch_allocated_and_reserved(machine: Machine) -> None:
    memory = MemoryPhases()
    machine.gpu = 2
    machine.take(gpu=3)
    memory.enter("step")
    machine.take(gpu=1)
    memory.enter("save")
    assert (memory.peaks["start"]["allocated"], memory.peaks["start"]["reserved"]) == (5, 5.5)
    assert memory.peaks["step"]["allocated"] == 3
    assert memory.highest("allocated") == 5


def test_the_fullest_rank_counts_and_growth_is_noticed(machine: Machine, reduced: Callable[[float], None]) -> None:
    reduced(2.0)
    memory = MemoryPhases()
    machine.take(3)
    assert memory.compare(CPU)
    assert memory.of_ranks == {"start": {"process": 6}}
    assert not memory.compare(CPU), "nothing has grown since"
    memory.enter("step")
    machine.take(6)
    assert memory.compare(CPU)
    assert memory.largest() == 9


@pytest.mark.usefixtures("gpu")
def test_the_largest_of_a_gpu_is_what_torch_allocated(machine: Machine, reduced: Callable[[float], None]) -> None:
    reduced(0.0)
    memory = MemoryPhases()
    machine.take(process=40, gpu=3)
    memory.compare(CPU)
    assert memory.largest() == 3


def batch(clips: int, frames: int, tokens: int) -> Any:
    return SimpleNamespace(frame_mask=torch.ones(clips, frames), labels=torch.ones(clips, tokens))


def test_the_heaviest_micro_batches_are_remembered() -> None:
    memory = MemoryPhases()
    for number, shape in enumerate([(2, 30, 7), (3, 10, 9), (1, 10, 2)], start=1):
        memory.see(number, batch(*shape))
    memory.see(1, batch(4, 14, 30))
    assert memory.first == (Shape(4, 14, 30), Shape(2, 30, 7)), "one has most tokens, the other most frames"
    assert memory.later == (Shape(3, 10, 9),)
    assert str(memory.batch) == "4 clips x 14 frames x 30 tokens"


def test_one_of_the_heaviest_micro_batches_takes_most_whatever_a_frame_and_a_token_take() -> None:
    numbers = np.random.default_rng(0)
    shapes = [Shape(*map(int, sizes)) for sizes in numbers.integers(1, 40, (60, 3))]
    found = heaviest(shapes)
    assert heaviest([]) == () and len(found) < 12
    assert heaviest([*found, *shapes[:30]]) == found, "what is added later changes nothing"
    for of_frame, of_token in numbers.random((50, 2)):
        taken = [of_frame * shape.padded[0] + of_token * shape.padded[1] for shape in (*found, *shapes)]
        assert max(taken[: len(found)]) == pytest.approx(max(taken))


def test_different_micro_batches_are_named_while_they_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_SHAPES", 2)
    memory = MemoryPhases()
    for frames in (20, 10, 20):
        memory.see(1, batch(2, frames, 5))
    assert memory.named_shapes() == ((2, 10, 5), (2, 20, 5))
    for frames in (30, 40):
        memory.see(1, batch(2, frames, 5))
    assert memory.named_shapes() is None and len(memory.shapes) == 3


def test_the_kernel_resets_the_peak_of_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    if not module.RESET.exists():
        pytest.skip("the kernel cannot reset it")
    memory = MemoryPhases()
    memory.enter("step")
    held = bytearray(64 << 20)
    held[::4096] = b"1" * len(held[::4096])
    memory.enter("save")
    del held
    assert memory.peaks["step"]["process"] > resident_peak_gib() - 0.05
    assert 0.05 < resident_peak_gib() < 100, "of a process that has imported torch"
    monkeypatch.setattr(module, "STATUS", Path("/nowhere"))
    assert 0.05 < resident_peak_gib() < 100, "where there is no such file, the system's own count"


def test_figures_have_names_of_their_own() -> None:
    named = memory_figures({"step": {"process": 1.23456, "allocated": 3.0}}, {"step": 2.5, "save": 1.0})
    assert named == {
        "step_process_gib": 1.2346,
        "step_allocated_gib": 3.0,
        "step_planned_gib": 2.5,
        "save_planned_gib": 1.0,
    }
