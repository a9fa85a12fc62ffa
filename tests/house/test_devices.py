"""Nothing places a tensor but by the rank's device, and no barrier leaves its device to be guessed."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = [path for room in ("toolkit", "launch", "benchmarks") for path in (ROOT / room).rglob("*.py")]
GPU = re.compile(r"cuda(:\d*)?")


def offences(source: str) -> Iterator[str]:
    """Every place that names a GPU, or sets the current one, or waits at a bare barrier."""
    tree = ast.parse(source)
    harmless = set()  # "cuda" that is compared with, or is a key
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            harmless |= {id(part) for part in (node.left, *node.comparators)}
        elif isinstance(node, ast.Dict):
            harmless |= {id(key) for key in node.keys}
        elif isinstance(node, ast.Subscript):
            harmless.add(id(node.slice))
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in harmless:
            if GPU.fullmatch(node.value):
                yield f"line {node.lineno}: {node.value!r}"
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            called = ast.unparse(node.func)
            if node.func.attr in ("cuda", "set_device", "current_device") or called.endswith(
                ("dist.barrier", "distributed.barrier", "comm.barrier")
            ):
                yield f"line {node.lineno}: {called}()"


def test_the_rank_s_device_is_chosen_in_one_file() -> None:
    found = {str(path.relative_to(ROOT)): list(offences(path.read_text(encoding="utf-8"))) for path in FILES}
    wrong = {path: places for path, places in found.items() if places}
    assert wrong.keys() == {"toolkit/cluster/devices.py"}, f"use own_device() or barrier() of that file: {wrong}"


@pytest.mark.parametrize(
    "line",
    [
        "model.cuda()",
        'torch.device("cuda")',
        'torch.device("cuda", ranks.local_rank)',
        'x.to("cuda:0")',
        'torch.zeros(1, device="cuda" if torch.cuda.is_available() else "cpu")',
        'torch.device(f"cuda:{number}")',
        "torch.cuda.set_device(0)",
        "torch.device(torch.cuda.current_device())",
        "dist.barrier()",
        "torch.distributed.barrier()",
    ],
)
def test_what_the_rule_finds(line: str) -> None:
    assert list(offences(line))


@pytest.mark.parametrize("line", ['device.type == "cuda"', '"cuda" in tensors', 'tensors["cuda"]', '{"cuda": 13}'])
def test_what_the_rule_allows(line: str) -> None:
    assert not list(offences(line))
