"""A failure of any rank is printed first and once, no process stays, and the same command resumes the run.

One run meets one fault after the other and resumes each time, so that each fault costs one start; at its end it must
have the losses of a run without faults.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.faults import OUT_OF_MEMORY, VARIABLE
from tests.end_to_end.warm_runs import Warm, status_of, wait_for_the_end
from toolkit.checkpointing.checkpoints import complete_checkpoints, read_state
from toolkit.errors import UserError

INJECTED = "Injected: injected"
STEPS = 18  # more than all faults but the last ones let pass
# Fault -> the error on the terminal, after "error: "; {who} is the rank with its host and process.
REASONS = {
    "build": rf"{{who}} failed: {INJECTED}",
    "step_1": rf"{{who}} failed: {INJECTED}",
    "memory": rf"{{who}} ran out of memory in step \d+, with a micro-batch of .*: {re.escape(OUT_OF_MEMORY[:-1])}",
    "step_5": rf"{{who}} failed: {INJECTED}",
    "loader": rf"{{who}} failed: {INJECTED}",
    "killed": r"{who} has ended without an error",
    "evaluation": rf"{{who}} failed: {INJECTED}",
    "saving": rf"{{who}} failed: {INJECTED}",
    "disk": r"(the model of step \d+ cannot be|the checkpoint after step \d+ could not be) written",
    "final_scores": rf"{{who}} failed: {INJECTED}",
}
# Errors without a traceback; for all others it comes first.
WITHOUT_TRACEBACK = {"memory", "killed", "disk"}


@dataclass(frozen=True)
class Seen:
    """What is left of a run that met a fault."""

    code: int
    printed: str
    status: dict[str, Any]
    damaged: list[str]
    unfinished: list[str]

    def reports(self) -> list[str]:
        """Lines that report errors, in order."""
        return [line for line in self.printed.splitlines() if re.match(r"Traceback|error: |\w*Error: |warning: ", line)]


def damaged_checkpoints(folder: Path) -> list[str]:
    problems = []
    for path in complete_checkpoints(folder / "checkpoints"):
        try:
            read_state(path)
        except UserError as error:
            problems.append(str(error))
    return problems


def meet_faults(warm: Warm, arguments: list[str], folder: Path, faults: list[tuple[str, int]], ranks: int) -> Any:
    """Start one run again and again, with a fault each time, and then without.

    Returns:
        what was seen of each fault.
    """
    seen = {}
    for fault, rank in faults:
        run = warm.start(folder, arguments, ranks=ranks, **{VARIABLE: f"{fault} {rank}"})
        processes = run.processes()
        code = run.wait()
        wait_for_the_end(processes)
        unfinished = [path.name for path in folder.rglob("*partial*")] if fault != "killed" else []
        seen[fault, rank] = Seen(code, run.said(), status_of(folder), damaged_checkpoints(folder), unfinished)
    run = warm.start(folder, arguments, ranks=ranks, **{VARIABLE: "none 0"})
    assert run.wait() == 0, run.said()
    return seen


def check(seen: Seen, fault: str, rank: int) -> None:
    who = rf"rank {rank} \({re.escape(socket.gethostname())}, process \d+\)"
    # Another rank may warn of its model or its data while the run ends.
    reports = [line for line in seen.reports() if not line.startswith("warning: ")]
    errors = [line for line in reports if line.startswith("error: ")]
    assert len(errors) == 1, seen.printed
    assert re.match("error: " + REASONS[fault].format(who=who), errors[0]), seen.printed
    before = reports[: reports.index(errors[0])]
    if fault in WITHOUT_TRACEBACK:
        assert before == [], seen.printed
    else:
        assert before[0].startswith("Traceback"), seen.printed
    assert reports[-1] == errors[0], f"a consequence is reported after the cause: {seen.printed}"
    assert seen.code != 0
    status = seen.status
    assert (status["status"], status["host"]) == ("failed", socket.gethostname()), seen.printed
    if fault != "disk":  # every rank knows of it; any of them may report it
        assert status["rank"] == rank, seen.printed
    assert status["reason"] in errors[0] or status["reason"].split(": ", 1)[1] in errors[0], status
    assert seen.damaged == []
    assert seen.unfinished == []


@pytest.fixture(scope="module")
def arguments(settings: list[str]) -> list[str]:
    """An epoch is three steps."""
    return [
        *("--recipe", "t5_small", "--ds", "zero2", *settings, "ds.data_types=null"),
        *("training.epochs=99", f"training.max_steps={STEPS}", "training.save_every=2", "training.log_every=1"),
    ]


FAULTS = [
    *(("step_1", 0), ("memory", 1), ("step_5", 1), ("loader", 1)),
    *(("evaluation", 0), ("killed", 1), ("saving", 1), ("disk", 0)),
]


@pytest.fixture(scope="module")
def faulty(
    warm: Warm, arguments: list[str], losses: Callable[[Path], list[float]], tmp_path_factory: Any
) -> tuple[dict[tuple[str, int], Seen], list[float]]:
    folder = tmp_path_factory.mktemp("faulty") / "run"
    return meet_faults(warm, arguments, folder, FAULTS, ranks=2), losses(folder)


@pytest.mark.parametrize(("fault", "rank"), FAULTS)
def test_the_reason_comes_first_and_once_and_nothing_is_lost(faulty: Any, fault: str, rank: int) -> None:
    check(faulty[0][fault, rank], fault, rank)


def test_a_run_with_faults_has_the_losses_of_one_without(
    faulty: Any, warm: Warm, arguments: list[str], losses: Callable[[Path], list[float]], tmp_path: Path
) -> None:
    run = warm.start(tmp_path / "run", arguments)
    assert run.wait() == 0, run.said()
    assert faulty[1] == losses(run.folder)


@pytest.mark.nightly
def test_a_rank_that_sees_new_files_late_trains(warm: Warm, arguments: list[str], tmp_path: Path) -> None:
    few = [*arguments, "training.max_steps=4"]
    for _ in ("begins", "is shown when finished"):
        run = warm.start(tmp_path / "run", few, **{VARIABLE: "lag 1"})
        assert run.wait() == 0, run.said()
    assert "is finished" in run.said()
    assert status_of(run.folder)["status"] == "finished"
    assert damaged_checkpoints(run.folder) == []


@pytest.mark.nightly
@pytest.mark.parametrize(("ranks", "rank"), [(2, 0), (2, 1), (4, 0), (4, 3)])
def test_every_fault_on_the_first_and_on_the_last_of_two_and_of_four_ranks(
    warm: Warm, arguments: list[str], tmp_path: Path, ranks: int, rank: int
) -> None:
    seen = meet_faults(warm, arguments, tmp_path / "run", [(fault, rank) for fault in REASONS], ranks=ranks)
    for fault in REASONS:
        check(seen[fault, rank], fault, rank)
