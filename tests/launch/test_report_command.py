import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "report.py"


def call(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def run(make_run, tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "a")


def test_one_run_gets_its_report_again(run, tmp_path):
    done = call(run, "--json", "--corpus", run.parent / "corpus-of-a", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said == {"page": str(run / "report.html"), "bytes": (run / "report.html").stat().st_size}


def test_several_runs_are_compared(run, tmp_path):
    done = call(run, run, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout == "comparison.html\n"
    done = call(run, run, run, "--out", "three.html", cwd=tmp_path)
    assert done.returncode == 0 and (tmp_path / "three.html").read_text().startswith("<!doctype html>")


def test_mistakes_are_one_line(run, tmp_path):
    cases = [
        ([tmp_path], "is not a run directory"),
        ([run, tmp_path / "none"], "does not exist"),
        ([run, "--corpus", tmp_path], "is not a prepared corpus"),
        ([run, "--out", "x.html"], "--out is for a comparison"),
        ([run, run, "--corpus", "x"], "--corpus is for the report of one run"),
        ([run, run, "--out", run / "metrics.jsonl" / "x.html"], "cannot be written"),
    ]
    for arguments, complaint in cases:
        done = call(*arguments, cwd=tmp_path)
        assert done.returncode == 2 and complaint in done.stderr, done
        assert len(done.stderr.strip().splitlines()) == 1
