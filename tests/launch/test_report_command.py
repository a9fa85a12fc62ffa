import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.terminals import assert_quiet
from tests.time_limits import limit

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "report.py"


def call(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=limit(120))


@pytest.fixture(scope="module")
def run(make_run, tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "a")


def test_the_report_of_one_run_is_written_again(run, tmp_path):
    done = call(run, "--json", "--corpus", run.parent / "corpus-of-a", cwd=tmp_path)
    assert_quiet(done)
    said = json.loads(done.stdout)
    assert said == {"page": str(run / "report.html"), "bytes": (run / "report.html").stat().st_size}


def test_several_runs_are_compared(run, tmp_path):
    done = call(run, run, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout == "comparison.html\n"
    done = call(run, run, run, "--out", "three.html", cwd=tmp_path)
    assert done.returncode == 0 and (tmp_path / "three.html").read_text().startswith("<!doctype html>")


def test_a_mistake_is_a_message_and_a_hint(run, tmp_path):
    cases = [
        ([tmp_path], str(tmp_path)),
        ([run, tmp_path / "none"], str(tmp_path / "none")),
        ([run, "--corpus", tmp_path], str(tmp_path)),
        ([run, "--out", "x.html"], "--out"),
        ([run, run, "--corpus", "x"], "--corpus"),
        ([run, run, "--out", run / "metrics.jsonl" / "x.html"], str(run / "metrics.jsonl")),
    ]
    for arguments, named in cases:
        done = call(*arguments, cwd=tmp_path)
        message, *hints = done.stderr.strip().splitlines()
        assert done.returncode == 2 and message.startswith("error: ") and named in message, done
        assert len(hints) <= 1 and all(hint.startswith("hint: ") for hint in hints)
