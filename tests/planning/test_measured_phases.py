"""Plans by phase against what torch's allocator held on pretended GPUs (benchmarks/results/planning_gpu.json).

The rows are planned here again, so that no change of a plan can leave them behind.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.by_night import cases
from toolkit.planning.afterwards import Computed, planned_phases
from toolkit.planning.hardware import GIB, Hardware
from toolkit.recipe.resolve import resolve_named

ROOT = Path(__file__).resolve().parents[2]
ROWS = {row["cell"]: row for row in json.loads((ROOT / "benchmarks/results/planning_gpu.json").read_text())["cells"]}
# A run that takes more than its plan dies; less is only memory that lies idle.
MOST_BELOW, MOST_ABOVE = -0.05, 0.10
# An H100 held the sum of gradients twice (`not explained` in docs/planning.md), which the pretended one does not.
MOST_OF = {"t5_small/zero2_offload/4/2 micro-batches": 0.35}
BY_DAY = (
    "demo/zero1/32",  # its search is scored by CTC, too
    "t5_small/zero2/4/2 micro-batches",
    "t5_small/zero2_offload/32",
    "t5_small/zero1/32/compile=graphs",
    "t5_small/zero1/32/ema=0.999",
    "t5_base/zero2/16/gradient_checkpointing=false/lora.r=16",
)


@pytest.mark.parametrize("name", cases(ROWS, BY_DAY))
def test_each_phase_is_planned(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    cells = importlib.import_module("planning_gpu_cells")
    cell = next(cell for cell in cells.CELLS if cell.name == name)
    overrides = [key for key in cells.overrides_of(cell, Path("made")) if not key.startswith(("data.", "model.tok"))]
    # The rows of the vocabulary are the measured ones.
    run = resolve_named(
        cell.recipe, [*overrides, "model.tokenizer=train"], cell.ranks, has_gpu=True, ds=cell.ds, needs_data=False
    )
    held_out: Any = SimpleNamespace(splits={"dev": SimpleNamespace(frames=np.full(cells.HELD_OUT, cells.FRAMES))})
    row = ROWS[name]
    computed = Computed.from_dict(row["computed"])
    phases = planned_phases(run, held_out, Hardware(cell.ranks, 140 * GIB), computed, row["rows"])
    off = {phase: planned / GIB / row["peaks"][phase]["allocated"] - 1 for phase, planned in phases.items()}
    assert all(MOST_BELOW <= error <= MOST_OF.get(name, MOST_ABOVE) for error in off.values()), off
