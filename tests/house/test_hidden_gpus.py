"""No test sees a GPU unless it is marked so, nor does any process that it starts."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.end_to_end.conftest import environment, launcher
from tests.time_limits import limit

TESTS = Path(__file__).resolve().parents[1]
SCRIPT = "import os; open(os.environ['RANK'], 'w').write(os.environ['CUDA_VISIBLE_DEVICES'])"
# As a key, as an argument, by name.
SETS_PYTHONPATH = re.compile(r"""(?:["']PYTHONPATH["'][:,]|\bPYTHONPATH=) ?(?P<value>\w+\(?)""")


def test_tests_see_no_gpu() -> None:
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    assert torch.cuda.device_count() == 0


@pytest.mark.process
def test_ranks_see_no_gpu_although_the_launcher_numbers_them(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    subprocess.run([*launcher(2), script], env=environment(), cwd=tmp_path, check=True, timeout=limit(120))
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["", ""]


@pytest.mark.nightly
def test_without_a_gpu_make_test_gpu_says_what_it_needs() -> None:
    makefile = (TESTS.parent / "Makefile").read_text(encoding="utf-8")
    (words,) = re.findall(r"^test-gpu:.*\n\t@TEST_GPUS=1 \$\(BIN\)/python (.+)$", makefile, re.MULTILINE)
    command = [sys.executable, *shlex.split(words), "tests/gpu/test_captures.py"]
    done = subprocess.run(
        command,
        env=environment() | {"TEST_GPUS": "1"},
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        check=False,
        timeout=limit(120),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"SKIPPED .*tests/gpu/test_captures\.py.* 1 GPU, and 0 ", done.stdout), done.stdout


def test_a_test_that_sets_pythonpath_keeps_the_gpus_hidden() -> None:
    sources = {path.name: path.read_text(encoding="utf-8") for path in TESTS.rglob("*.py")}
    set_to = {(name, found["value"]) for name, text in sources.items() for found in SETS_PYTHONPATH.finditer(text)}
    assert ("test_cores.py", "python_path(") in set_to
    assert {value for _, value in set_to} == {"python_path("}, set_to
