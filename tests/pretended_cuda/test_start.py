"""How the pretended runtime starts, and what it says where it cannot."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hidden_gpus import python_path
from tests.pretended_cuda.environment import CUDA, find_environment
from tests.time_limits import limit
from toolkit.errors import EXIT_USER_ERROR, UserError

ROOT = Path(__file__).resolve().parents[2]
START = Path(__file__).with_name("start")


def torch_of(folder: Path, cuda: str) -> None:
    (folder / "torch").mkdir()
    (folder / "torch" / "__init__.py").write_text("")
    (folder / "torch" / "version.py").write_text(f"__version__ = '2.11.0'\ncuda = {cuda}\n")


@pytest.mark.process
def test_without_a_cuda_build_one_line_says_so(tmp_path: Path) -> None:
    torch_of(tmp_path, "None")
    done = subprocess.run(
        [sys.executable, "-m", "tests.pretended_cuda", "true"],
        env=os.environ | {"PYTHONPATH": python_path(tmp_path, ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=limit(60),
    )
    error, hint = done.stderr.splitlines()
    assert done.returncode == EXIT_USER_ERROR and error.startswith("error:") and "CUDA" in error
    assert hint.startswith("hint:")


@pytest.mark.parametrize("cuda", ["None", "'12.8'", f"'{CUDA}.0'"])
def test_what_an_environment_lacks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cuda: str) -> None:
    torch_of(tmp_path, cuda)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: _Spec(tmp_path / name / "__init__.py"))
    with pytest.raises(UserError) as caught:
        find_environment()
    assert ("cuda_runtime_api.h" if CUDA in cuda else "CUDA") in caught.value.message and caught.value.hint


def test_without_a_compiler_nothing_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"g\+\+"):
        find_environment()


class _Spec:
    def __init__(self, origin: Path) -> None:
        self.origin = str(origin)


@pytest.mark.process
def test_another_sitecustomize_runs_too_and_operators_come_with_torch(tmp_path: Path) -> None:
    torch_of(tmp_path, "None")
    (tmp_path / "sitecustomize.py").write_text("import builtins; builtins.OWN = True\n")
    (tmp_path / "pretended_operators.py").write_text(
        "import torch\ndef install():\n    torch.is_replaced = bool(torch.__file__)\n"
    )
    first = tmp_path / "first"
    first.mkdir()
    (first / "sitecustomize.py").symlink_to(START / "sitecustomize.py")
    environment = {"LD_PRELOAD": "libcudart.so.13"}  # by its name the start knows where it is; the linker finds none
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (first, tmp_path)))
    asks = "import importlib.util; importlib.util.find_spec('torch')"  # as transformers does before it imports torch
    command = [sys.executable, "-c", f"print(OWN); {asks}; import torch; print(torch.is_replaced)"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=limit(60))
    assert done.stdout.split() == ["True", "True"], done.stdout + done.stderr
