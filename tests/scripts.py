"""Scripts of the repository as modules, so that a test can call their functions."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import subprocess
import sys
import traceback
from pathlib import Path
from types import ModuleType
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]


def load_script(path: str) -> ModuleType:
    """Load a script by its path from the root of the repository; each call loads it again."""
    name = path.removesuffix(".py").replace("/", "_")
    specification = importlib.util.spec_from_file_location(name, ROOT / path)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def run_main(path: str, *arguments: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """What the command line ``path arguments`` gives, run in this process, which costs no start and no imports."""
    words = [path, *map(str, arguments)]
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        contextlib.chdir(cwd),
        mock.patch.object(sys, "argv", words),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            load_script(path).main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except Exception:
            code = 1
            traceback.print_exc()
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())
