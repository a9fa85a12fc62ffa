"""Work that one rank does for all, and ranks that fail: every rank ends, and each node prints the error once."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.hidden_gpus import python_path
from tests.time_limits import limit

ROOT = Path(__file__).parents[2]
PATIENCE = 600.0  # seconds
# Ranks of each case; with three of them two witness the loss of one.
CASES = {
    "agrees": 2,
    "rank_0_refuses": 2,
    "all_refuse": 2,
    "rank_0_cannot_write": 2,
    "rank_0_has_no_reader": 2,
    "last_rank_breaks": 2,
    "rank_0_breaks_for_others": 2,
    "last_rank_is_killed": 3,
    "rank_0_is_killed": 3,
    "consequence_comes_first": 2,
    "reporter_dies_before_the_consequence": 2,
}


@dataclass(frozen=True)
class Ended:
    """What the ranks of a case left behind.

    Attributes:
        codes: their exit codes.
        out, err: what they printed, each as a text of its own.
        pids: their process ids.
    """

    codes: list[int]
    out: list[str]
    err: list[str]
    pids: list[int]

    @property
    def errors(self) -> list[str]:
        """All lines of the node's terminal that report an error."""
        return [line for text in self.err for line in text.splitlines() if line.startswith("error:")]


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def run_cases(folder: Path, *cases: tuple[str, int, str]) -> dict[str, Ended]:
    """Run cases side by side: their names, numbers of ranks and ports."""
    worker = Path(__file__).with_name("failing_worker.py")
    subprocess.run(
        [sys.executable, str(worker), str(folder), *(f"{case}:{size}:{port}" for case, size, port in cases)],
        env=os.environ | {"PYTHONPATH": python_path(ROOT), "TORCH_CPP_LOG_LEVEL": "ERROR"},
        check=True,
        timeout=limit(PATIENCE),
    )

    def read(case: str, size: int, kind: str) -> list[str]:
        return [(folder / f"{case}_{rank}.{kind}").read_text() for rank in range(size)]

    return {
        case: Ended(
            [int(code) for code in read(case, size, "code")],
            read(case, size, "out"),
            read(case, size, "err"),
            [int(pid) for pid in read(case, size, "pid")],
        )
        for case, size, port in cases
        if not port.endswith("+")
    }


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    cases = [(case, size, free_port()) for case, size in CASES.items()]
    return run_cases(tmp_path_factory.mktemp("ranks"), *cases)


@pytest.mark.process
def test_the_value_of_rank_0_reaches_all(ended: dict[str, Ended]) -> None:
    case = ended["agrees"]
    assert case.codes == [0, 0], case.err
    assert case.out[0].count("rank 0 looks") == 2
    assert case.out[1] == "{'seen by': 0} {'seen by': 0}\n"


@pytest.mark.process
@pytest.mark.parametrize("name", ["rank_0_refuses", "all_refuse"])
def test_an_error_of_the_user_is_printed_once_and_ends_all_ranks_with_its_code(
    ended: dict[str, Ended], name: str
) -> None:
    case = ended[name]
    assert case.codes == [2, 2], case.err
    assert case.errors == ["error: no such table"]
    assert "".join(case.err).count("hint: name one") == 1
    assert "Traceback" not in "".join(case.err)


@pytest.mark.process
@pytest.mark.parametrize(("case", "code"), [("rank_0_cannot_write", 2), ("rank_0_has_no_reader", 141)])
def test_what_the_system_refuses_rank_0_is_reported_once_without_a_traceback(
    ended: dict[str, Ended], case: str, code: int
) -> None:
    assert ended[case].codes == [code, code]
    lines = [line for text in ended[case].err for line in text.splitlines() if not line.startswith("hint: ")]
    assert len(lines) == 1, ended[case].err


@pytest.mark.process
def test_a_rank_that_fails_alone_reports_it_and_ends_one_that_hangs(ended: dict[str, Ended]) -> None:
    case = ended["last_rank_breaks"]
    assert case.codes == [1, 1], case.err
    assert case.err[0] == ""
    assert case.err[1].startswith("Traceback")
    host = socket.gethostname()
    why = "ZeroDivisionError: on the last rank alone"
    assert case.errors == [f"error: rank 1 ({host}, process {case.pids[1]}) failed: {why}"]
    assert case.out[0] == "rank 0 tidies up\n"
    assert case.out[1] == f"recorded: rank 1 of {host}: {why}\nrank 1 tidies up\n"


@pytest.mark.process
def test_a_bug_in_work_for_all_ranks_is_reported_by_rank_0_alone(ended: dict[str, Ended]) -> None:
    case = ended["rank_0_breaks_for_others"]
    assert case.codes == [1, 1], case.err
    assert "ZeroDivisionError" in case.err[0]
    assert case.err[1] == ""


@pytest.mark.process
@pytest.mark.parametrize(("name", "lost"), [("last_rank_is_killed", 2), ("rank_0_is_killed", 0)])
def test_a_rank_that_was_killed_is_named_once(ended: dict[str, Ended], name: str, lost: int) -> None:
    case = ended[name]
    assert case.codes[lost] == -signal.SIGKILL
    assert [code for rank, code in enumerate(case.codes) if rank != lost] == [1, 1], case.err
    assert len(case.errors) == 1, case.err
    assert case.errors[0].startswith(f"error: rank {lost} ({socket.gethostname()}, process {case.pids[lost]}) ")
    assert "Traceback" not in "".join(case.err)
    assert "".join(case.out).count(f"recorded: rank {lost} of") == 1


@pytest.mark.process
def test_a_broken_collective_is_not_taken_for_the_cause(ended: dict[str, Ended]) -> None:
    case = ended["consequence_comes_first"]
    assert case.codes == [1, 1], case.err
    assert "ZeroDivisionError: the cause" in case.errors[0]
    assert case.err[1] == ""


@pytest.mark.process
def test_a_cause_that_was_found_is_not_replaced_by_the_end_of_the_rank_that_reported_it(
    ended: dict[str, Ended],
) -> None:
    case = ended["reporter_dies_before_the_consequence"]
    assert case.codes == [-signal.SIGKILL, 1], case.err
    assert "ZeroDivisionError: the cause" in case.errors[0]
    assert case.err[1] == ""


@pytest.mark.process
def test_a_second_run_at_the_same_port_is_refused_and_leaves_the_first_alone(tmp_path: Path) -> None:
    port = free_port()
    second = run_cases(tmp_path, ("hangs", 2, f"{port}+"), ("agrees", 2, port))["agrees"]
    assert second.codes == [2, 2], second.err
    assert len(second.errors) == 1 and "another process uses this port" in second.errors[0], second.err
