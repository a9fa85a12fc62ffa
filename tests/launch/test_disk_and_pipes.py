"""Every command ends with one error where the system refuses a path, and with one line at a closed pipe."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO

import pytest

from toolkit.corpus.demo import DemoSizes, make_demo

LAUNCH = Path(__file__).resolve().parents[2] / "launch"


@pytest.fixture(scope="module")
def place(tmp_path_factory, make_run, model_folder: Path) -> Path:
    """A folder with what the commands read: a run with its model and corpus, a table with poses, and a plain file."""
    folder = tmp_path_factory.mktemp("place")
    run = make_run(folder / "run")
    shutil.copytree(model_folder, run / "best")
    make_demo(folder / "clips", DemoSizes(3, 1, 1, 1))
    shutil.copy(next((folder / "clips" / "poses").glob("*.pose")), folder / "clip.pose")
    (folder / "file").touch()
    return folder


@pytest.fixture
def run_command(command, monkeypatch, place: Path) -> Callable[[str], int]:
    """Runs a command line in this process and gives its exit code."""

    def run(line: str) -> int:
        name, *arguments = line.split()
        monkeypatch.chdir(place)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        with pytest.raises(SystemExit) as ended:
            command(name).main()
        return int(ended.value.code or 0)

    return run


@pytest.mark.parametrize(
    "line",
    [
        "prepare --table clips/table.csv --poses clips/poses --workers 1 --out file/corpus",
        "prepare show corpus-of-run test-000 --out file/clip.gif",
        "translate --model run clip.pose --window 0 --srt file/clip.srt",
        "export run --to file/model",
        "report run run --out file/page.html",
        "recipes cp demo file/mine.yaml",
    ],
)
def test_a_folder_that_cannot_be_made_is_an_error_with_its_path(line: str, run_command, capsys) -> None:
    assert run_command(line) == 2
    errors = capsys.readouterr().err.splitlines()
    assert [text.split()[0] for text in errors] == ["error:", "hint:"], errors
    assert "file" in errors[0]


def taking_nothing(output: str) -> IO[str]:
    """A pipe that nobody reads any more ("closed"), or a full disk ("full")."""
    if output == "full":
        return open("/dev/full", "w")
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w")


@pytest.mark.parametrize("output", ["closed", "full"])
@pytest.mark.parametrize(
    "line",
    [
        "recipes ls",
        "recipes show demo",
        "doctor --json",
        "report run",
        "prepare show corpus-of-run test-000 --out clip.gif",
        "translate --model run clip.pose clip.pose --window 0",
    ],
)
def test_standard_output_that_takes_nothing_is_one_error(
    line: str, output: str, run_command, monkeypatch, capsys
) -> None:
    with taking_nothing(output) as file:
        monkeypatch.setattr(sys, "stdout", file)
        assert run_command(line) == {"closed": 141, "full": 2}[output]
    errors = [text for text in capsys.readouterr().err.splitlines() if not text.startswith("hint: ")]
    assert len(errors) == 1 and errors[0].split()[0] == {"closed": "interrupted:", "full": "error:"}[output], errors


@pytest.mark.nightly
def test_training_into_a_path_below_a_file_is_one_error(place: Path) -> None:
    arguments = ["--recipe", "demo", "data.corpus=corpus-of-run", "run.dir=file/run", "training.micro_batch_size=8"]
    command = [sys.executable, str(LAUNCH / "train.py"), *arguments]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=300)
    errors = [text for text in done.stderr.splitlines() if text.startswith("error: ")]
    assert done.returncode == 2 and len(errors) == 1 and "file" in errors[0], done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("script", sorted(path.name for path in LAUNCH.glob("*.py")))
@pytest.mark.parametrize("output", ["closed", "full"])
def test_help_that_cannot_be_printed(script: str, output: str, tmp_path: Path) -> None:
    """``--help | head`` where the help is longer than a buffer: the description is made so long."""
    lengthened = (
        "import argparse, runpy, sys; make = argparse.ArgumentParser.__init__\n"
        "def longer(self, *a, **k): make(self, *a, **k | {'description': 'word ' * 9000})\n"
        "argparse.ArgumentParser.__init__ = longer; sys.argv[0] = sys.argv.pop(1)\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    with taking_nothing(output) as file:
        command = [sys.executable, "-c", lengthened, str(LAUNCH / script), "--help"]
        done = subprocess.run(command, stdout=file, stderr=subprocess.PIPE, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == {"closed": 141, "full": 2}[output], done.stderr
    assert done.stderr.split()[0] == {"closed": "interrupted:", "full": "error:"}[output], done.stderr
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
